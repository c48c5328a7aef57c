"""Exports: what another engine reads computes what the artifact's graph computes with float activations."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from graphs import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.contracts import relative_error
from lbllm_compile.passes.ir import weight_only
from lbllm_compile.passes.ir.program import Program, set_attribute
from lbllm_compile.passes.ir.rewrite import make_call
from lbllm_compile.passes.lower import stored_weights
from lbllm_compile.passes.smooth import Smooth
from rtn import quantize, simulate
from safetensors.torch import load_file
from stages import apply as apply_passes
from stages import batches
from test_zoo import apply, inputs, stages
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from zoo import ZOO, captured

from lbllm_compile import artifact, cli, export, frontend
from lbllm_compile.evaluate import compare
from lbllm_compile.export import ExportError
from lbllm_compile.export.gguf import BLOCK, BLOCK_BYTES, blocks
from lbllm_compile.frontend import UserModel

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


# GGUF

gguf = pytest.importorskip("gguf")

_EVEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A multiple of 32 columns everywhere."""


@functools.cache
def even(architecture: str, **options: Any) -> Program:
    """A lowered model all of whose matrices fit blocks."""
    config = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")(**_EVEN, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(transformers, architecture)(config).eval()
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model = frontend.prepare(UserModel(module.requires_grad_(False), "causal-lm", architecture, "even"))
    annotated = apply(frontend.capture(model), "canonicalize,annotate")
    return apply(simulate(annotated, group=64), "head,merge,lower,cache,cleanup")


def read_back(file: Path) -> dict[str, Any]:
    """Tensors of a GGUF file by name: their type and values."""
    return {
        t.name: (t.tensor_type.name, torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(file).tensors
    }


@settings(max_examples=50, deadline=None)
@given(
    group=st.sampled_from([32, 64, 128, 256]),
    rows=st.integers(1, 3),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-20, 12),
)
def test_a_group_is_blocks_to_the_bit(group, rows, count, seed, exponent):
    weight = quantize(normal(rows, count * BLOCK, seed=seed) * 2.0**exponent, group)
    scale = weight.scale.repeat_interleave(group // BLOCK, -1)[:, : weight.in_features // BLOCK]
    stored = blocks(weight.integer_levels(), scale)
    assert stored.shape == (rows, count * BLOCK_BYTES)
    read = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(torch.from_numpy(read), weight.dequantize())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 128}),
    ],
)
def test_transformers_reads_the_file_as_the_same_model(architecture, options, tmp_path):
    program = even(architecture, **options)
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out, dtype="float16")
    assert "14 of 14, 8.5 bits" in str(report.facts)
    assert 0 < report.facts["largest_error_of_an_int8_row's_scale_in_float16"] <= 2**-11
    module = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    state, weights = module.state_dict(), stored_weights(program)
    assert len(weights) == 14
    for path, weight in weights.items():
        assert torch.equal(state[path], weight.dequantize()), path
    item = inputs(3, 13)
    with torch.no_grad():
        logits = module(**item).logits[item["attention_mask"].bool()]
    assert relative_error(weight_only_logits(program), logits) < 2**-10  # scales of embedding and head


def test_the_file_says_what_each_tensor_is(tmp_path):
    program = stages("llama")[1]  # 72 and 104 columns, no multiples of 32
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out, dtype="bfloat16")
    assert report.facts["W(1+1)_matrices_exact_in_Q8_0"].startswith("0 of 14")
    assert "rounded to bfloat16" in report.facts["others"]
    tensors = read_back(out)
    assert tensors["blk.0.attn_norm.weight"][0] == "F32"
    kind, values = tensors["blk.1.ffn_down.weight"]
    expected = stored_weights(program)["model.layers.1.mlp.down_proj.weight"].dequantize()
    assert kind == "BF16" and torch.equal(values, expected.bfloat16().float())
    assert report.nbytes == sum(t.n_bytes for t in gguf.GGUFReader(out).tensors)


def test_rows_of_llamas_queries_and_keys_and_their_biases_alternate(tmp_path):
    program = even("LlamaForCausalLM", attention_bias=True)
    out = tmp_path / "model.gguf"
    export.export(saved(program, tmp_path), "gguf", out)
    tensors, weights, plain = read_back(out), stored_weights(program), dict(program.parameters())
    for name, projection, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        path = f"model.layers.1.self_attn.{projection}"
        matrix, bias = weights[f"{path}.weight"].dequantize(), plain[f"{path}.bias"]
        for head in range(heads):
            for pair in range(8):
                for half in (0, 1):
                    row, original = 16 * head + 2 * pair + half, 16 * head + 8 * half + pair
                    assert torch.equal(tensors[f"blk.1.{name}.weight"][1][row], matrix[original])
                    assert tensors[f"blk.1.{name}.bias"][1][row] == bias[original]
    values = weights["model.layers.1.self_attn.v_proj.weight"].dequantize()
    assert torch.equal(tensors["blk.1.attn_v.weight"][1], values)


def byte_level(*steps: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer over bytes with a few merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the compiler lowers every linear layer to integer kernels 1234"] * 4, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    return made


BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("steps", "splits"),
    [([BYTES], "gpt-2"), ([tokenizers.pre_tokenizers.Digits(individual_digits=True), BYTES], "smollm")],
)
def test_the_tokenizer_is_in_the_file(steps, splits, tmp_path):
    tokenizer = byte_level(*steps)
    program = dataclasses.replace(even("LlamaForCausalLM"), tokenizer=tokenizer)
    out = tmp_path / "model.gguf"
    export.export(saved(program, tmp_path), "gguf", out)
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.pre"].contents() == splits
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 320 and tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert [tokens[i] for i in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.token_type"].contents()[319] == gguf.TokenType.UNUSED
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert (fields["tokenizer.ggml.bos_token_id"].contents(), fields["tokenizer.ggml.eos_token_id"].contents()) == (
        1,
        2,
    )
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_what_gguf_is_not_written_for_is_refused(tmp_path):
    refused = [
        (stages("gpt2")[1], "GGUF is written for llama, mistral, qwen2, qwen3, not for gpt2; use --format hf-dense"),
        (stages("mistral")[1], "not written for the sliding window of mistral"),
        (
            dataclasses.replace(even("LlamaForCausalLM"), tokenizer=byte_level(tokenizers.pre_tokenizers.Whitespace())),
            "GGUF is written for byte-level BPE tokenizers",
        ),
    ]
    for number, (program, message) in enumerate(refused):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ExportError, match=message):
            export.export(saved(program, tmp_path / str(number)), "gguf", tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"'.*/model' is no .gguf file; pass --out .*/model.gguf"):
        export.export(tmp_path / "0" / "compiled", "gguf", tmp_path / "model")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("LlamaForCausalLM", {}), ("Qwen2ForCausalLM", {}), ("Qwen3ForCausalLM", {"head_dim": 128})],
)
def test_llama_cpp_computes_the_same(architecture, options, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = byte_level(tokenizers.pre_tokenizers.Digits(individual_digits=True), BYTES)
    program = dataclasses.replace(even(architecture, **options), tokenizer=tokenizer)
    export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    for text in ("the linear kernels", " 1234 x\n\n  tabs\t", "naïve café, 你好 😀", "a<s>b</s>"):
        ids = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
        model.reset()
        model.eval(ids)
        actual = torch.tensor(model.scores[: len(ids)])[None]
        item = frontend.language_model_inputs(torch.tensor([ids]))
        figures = compare(lambda _, a=actual: a, lambda _, i=item: weight_only.run(program, i), [item["input_ids"]])
        assert figures.summary()["kld_mean"] <= 1e-3


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
    assert (report.scores["chunks"], report.scores["tokens"]) == (2, 30)
