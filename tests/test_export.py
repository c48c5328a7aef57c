"""Exports: what another engine reads computes what the artifact's graph computes with float activations."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import weight_only
from lbllm_compile.passes.ir.compare import relative_error
from lbllm_compile.passes.ir.program import Program, set_attribute
from lbllm_compile.passes.ir.rewrite import make_call
from lbllm_compile.passes.lower import stored_int4, stored_weights
from lbllm_compile.passes.smooth import Smooth
from proven_kernels import kernels_of
from rtn import simulate
from safetensors.torch import load_file
from stages import annotated, batches, context
from stages import apply as apply_passes
from test_errors import fails
from test_zoo import agree, apply, inputs, stages
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from zoo import ZOO, captured

from lbllm_compile import artifact, cli, export, frontend
from lbllm_compile.evaluate import compare
from lbllm_compile.export import ExportError
from lbllm_compile.lowering.build import build_native

LOCK = {"model": "0" * 64, "seed": "0"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def saved(program: Program, folder: Path) -> Path:
    artifact.save(program, folder / "compiled", lock=LOCK)
    return folder / "compiled"


def smoothed(name: str) -> Program:
    """A lowered model with even channels and centered keys."""
    program = apply(captured(name)[1], "canonicalize,annotate")
    context = PassContext(probe=inputs(2, 9), calibration=batches(2))
    return apply(simulate(Smooth(strength=0.5).apply(program, context).program), "head,merge,lower,cache,cleanup")


@functools.cache
def with_head(name: str, options: str) -> Program:
    """A lowered model with a head of few bits."""
    simulated = simulate(apply(captured(name)[1], "canonicalize,annotate"))
    text = f"head{{group=32,{options}}},merge,lower,cache,cleanup"
    return apply_passes(simulated, text, PassContext(probe=inputs(2, 9), calibration=batches(2))).program


HEADS = [
    pytest.param(name, options, id=f"{name} {options}")
    for name in ("llama", "llama-tied")
    for options in ("bits=4,embedding=4,sequences=0", "bits=4", "bits=2", "bits=2,embedding=4")
]


@pytest.mark.parametrize(("name", "options"), HEADS)
def test_heads_of_few_bits_are_exported_as_they_are(name, options, tmp_path):
    """A head that was tied to an embedding with int8 rows is written apart from it."""
    program = with_head(name, options)
    out = tmp_path / "dense"
    export.export(saved(program, tmp_path), "hf-dense", out, dtype="float32")
    assert relative_error(weight_only_logits(program), logits_of(out)) < 1e-5
    apart = name == "llama" or options != "bits=4,embedding=4,sequences=0"
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == apart


def test_codes_of_layers_are_exported_as_they_are(tmp_path):
    simulated = simulate(apply(captured("llama")[1], "canonicalize,annotate"), coded=("_proj",))
    program = apply_passes(simulated, "head,merge,lower,cache,cleanup", PassContext(probe=inputs(2, 9))).program
    assert len(stored_int4(program)) == 14
    out = tmp_path / "dense"
    export.export(saved(program, tmp_path), "hf-dense", out, dtype="float32")
    assert relative_error(weight_only_logits(program), logits_of(out)) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [*HEADS[:1], *(pytest.param(*each.values, id=each.id, marks=pytest.mark.slow) for each in HEADS[1:])],
)
def test_heads_of_few_bits_run_natively_as_their_operators_define(name, options, tmp_path):
    program = with_head(name, options)
    loaded = artifact.load(saved(program, tmp_path)).program
    found = build_native(loaded, kernels_of(loaded), tmp_path)
    assert found is not None
    for batch, length in ((1, 1), (2, 9)):
        item = inputs(batch, length)
        session = found.session(batch)
        session.start(item["attention_mask"].numpy())
        logits = torch.from_numpy(session.logits(item["input_ids"].numpy()))
        agree(logits, program.run(item), item["attention_mask"].bool())


def logits_of(folder: Path, batch: int = 3, length: int = 13) -> torch.Tensor:
    """Of every token that is not padding, from what transformers reads there."""
    module, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    item = inputs(batch, length)
    with torch.no_grad():
        return module(**item).logits[item["attention_mask"].bool()]


def weight_only_logits(program: Program, batch: int = 3, length: int = 13) -> torch.Tensor:
    item = inputs(batch, length)
    return weight_only.run(program, item)[item["attention_mask"].bool()]


@pytest.mark.parametrize("name", ZOO)
def test_what_transformers_reads_computes_what_the_graph_does_with_float_activations(name, tmp_path):
    program = stages(name)[1]
    out = tmp_path / "dense"
    report = export.export(saved(program, tmp_path), "hf-dense", out, dtype="float32")
    assert relative_error(weight_only_logits(program), logits_of(out)) < 1e-5
    assert report.graph_error < 1e-5
    written = sum((out / f).stat().st_size for f in ("model.safetensors",))
    assert report.nbytes <= written < report.nbytes + 100_000


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "mixtral"])
def test_moved_scales_and_centered_keys_are_in_the_written_weights(name, tmp_path):
    program = smoothed(name)
    assert any("key_mean" in path for path, _ in program.parameters())
    out = tmp_path / "dense"
    export.export(saved(program, tmp_path), "hf-dense", out, dtype="float32")
    assert relative_error(weight_only_logits(program), logits_of(out)) < 1e-4


def test_the_folder_is_the_original_models(tmp_path):
    program = stages("mixtral")[1]
    out = tmp_path / "dense"
    export.export(saved(program, tmp_path), "hf-dense", out)
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["MixtralForCausalLM"], "bfloat16")
    assert "quantization_config" not in config
    weights = load_file(out / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    # as checkpoints of this architecture have it, one expert at a time
    gate_up = stored_weights(program)["model.layers.1.mlp.experts.gate_up_proj"].dequantize()[2]
    written = [weights[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"] for name in ("w1", "w3")]
    assert torch.equal(torch.cat(written), gate_up.bfloat16())
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_the_type_of_weights_is_that_of_the_configuration_where_that_has_16_bits(tmp_path):
    program = stages("llama")[1]
    program = program.with_module(program.module)
    object.__setattr__(program, "config", {**program.config, "dtype": "float16"})
    report = export.export(saved(program, tmp_path), "hf-dense", tmp_path / "dense")
    assert report.dtype == "float16"
    with pytest.raises(ExportError, match="there is no dtype 'int8'; use one of float32, bfloat16, float16"):
        export.export(tmp_path / "compiled", "hf-dense", tmp_path / "other", dtype="int8")


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path):
    program = apply_passes(stages("llama")[1], "cleanup").program.copy()
    path = "model.norm.weight"
    set_attribute(program.module, path, torch.full((72,), 1e5))
    with pytest.raises(ExportError, match=f"the weight '{path}' is too large for float16; use --dtype bfloat16"):
        export.export(saved(program, tmp_path), "hf-dense", tmp_path / "dense", dtype="float16")
    assert not (tmp_path / "dense").exists()


def test_a_graph_that_does_more_than_its_architecture_is_refused(tmp_path):
    program = stages("llama")[1].copy()
    output = next(n for n in program.graph.nodes if n.op == "output")
    logits = output.args[0]
    with program.graph.inserting_before(output):
        negated = make_call(program.graph, torch.ops.aten.neg.default, (logits,), logits)
    output.replace_input_with(logits, negated)
    program.module.recompile()
    with pytest.raises(ExportError, match="LlamaForCausalLM with its weights computes something else than its graph"):
        export.export(saved(program, tmp_path), "hf-dense", tmp_path / "dense")


@pytest.mark.parametrize("own", ["true", "false"])
def test_outlier_channels_are_refused_in_a_sentence(own, tmp_path):
    moved = apply_passes(annotated(), "outliers{share=0.1}", context()).program
    text = f"observe,ptq{{group=32,outliers={own}}},activate{{group=32,steps=0}},head,merge,lower,cache,cleanup"
    program = apply_passes(moved, text, context(probe=batches(1, seed=2)[0])).program
    with pytest.raises(ExportError, match=r"loudest channels of its inputs have moved \(pass 'outliers'\).*serve take"):
        export.export(saved(program, tmp_path), "hf-dense", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_what_is_there_is_not_touched(tmp_path):
    where = saved(stages("llama")[1], tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ExportError, match="mine' exists; pass another --out"):
        export.export(where, "hf-dense", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    export.export(where, "hf-dense", tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compiled", "empty", "mine"]


def test_the_command_says_what_it_wrote(tmp_path):
    where = saved(stages("llama")[1], tmp_path)
    line = ["export", str(where), "--format", "hf-dense", "--out", str(tmp_path / "dense"), "--json"]
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["format"] == "hf-dense" and document["graph_error"] < 1e-5 and document["scores"] == {}
    assert "of weights" in result.stderr
    again = CliRunner().invoke(cli.app, line[:-1])
    assert again.exit_code == 2 and "exists; pass another --out" in again.stderr
    wrong = CliRunner().invoke(cli.app, [*line[:2], "--format", "onnx", "--out", str(tmp_path / "x")])
    assert wrong.exit_code == 2 and "there is no format 'onnx'; use one of hf-dense, gguf" in wrong.stderr


def test_the_distance_from_the_artifact_is_stated(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    program = dataclasses.replace(stages("llama")[1], tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i * i + 3 * i) % 101}" for i in range(64)))
    report = export.export(
        saved(program, tmp_path), "hf-dense", tmp_path / "dense", dtype="float32", text=text, seq_len=16, chunks=2
    )
    pieces = [torch.tensor([tokenizer(text.read_text())["input_ids"][i : i + 16]]) for i in (0, 16)]
    expected = compare(
        lambda ids: weight_only.run(program, frontend.language_model_inputs(ids)),
        lambda ids: program.run(frontend.language_model_inputs(ids)),
        pieces,
    ).summary()
    assert report.scores["kld_mean"] == pytest.approx(expected["kld_mean"], rel=0.05) and expected["kld_mean"] > 1e-3
    assert report.scores["weights_kld_mean"] < 1e-6  # float32 has them all
    assert (report.scores["chunks"], report.scores["tokens"]) == (2, 30)
    rounded = export.export(
        tmp_path / "compiled", "hf-dense", tmp_path / "rounded", dtype="bfloat16", text=text, seq_len=16, chunks=2
    )
    assert 1e-6 < rounded.scores["weights_kld_mean"] < rounded.scores["kld_mean"]


@pytest.mark.parametrize("option", ["--seq-len", "--chunks"])
def test_an_option_of_a_text_that_is_not_named_is_refused(tmp_path, option):
    words = ("export", "somewhere", "--out", str(tmp_path / "out"), option, "32")
    assert f"{option} has no effect without --text" in fails(*words)
