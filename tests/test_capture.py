"""Capture, canonicalize and annotate over the zoo: bit-equal graphs, every weight matrix counted, every layer found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers
import transformers.masking_utils
import zoo
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LAYER, LINEAR, layer_count, linears, matrix_count
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program, get_attribute
from torch import Tensor
from transformers import PreTrainedModel

from lbllm_compile import frontend
from lbllm_compile.frontend import LM_INPUTS, CaptureError, UserModel, language_model_inputs, tracing
from lbllm_compile.native.language import COMPILED_CONTEXT

aten = torch.ops.aten

SHAPES = [(batch, length) for batch in (1, 3) for length in (1, 7, 33)]


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens; the second sequence is padded on the left."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(zoo.VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, : length // 2] = 0
    return language_model_inputs(ids, mask)


@pytest.fixture
def written_out_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes eager transformers write its masks out where it could say ``is_causal``: torch sums differently then."""
    monkeypatch.setattr(transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **kwargs: False)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_graph_is_bit_equal_to_the_model(name: str, written_out_masks: None) -> None:
    module, program = zoo.captured(name)
    for batch, length in SHAPES:
        batch_inputs = inputs(batch, length)
        expected = module(**batch_inputs, use_cache=False).logits
        attended = batch_inputs["attention_mask"].bool()
        assert torch.equal(program.run(batch_inputs)[attended], expected[attended]), (batch, length)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_canonical_form_counts_every_matrix(name: str) -> None:
    module, program = zoo.captured(name)
    model = zoo.ZOO[name]
    context = PassContext(probe=inputs(3, 7))
    result, records = pipeline.run(program, pipeline.parse("canonicalize,annotate"), context)
    assert matrix_count(result, "decoder") == model.matrices
    assert matrix_count(result, "head") == 1
    assert matrix_count(result, "dense") == model.routers
    assert layer_count(result) == zoo.LAYERS
    assert records[0].error <= 1e-5 and records[1].error == 0
    for node, info in linears(result):
        assert info.layer == node.meta[LAYER]
        assert info.weight == node.args[1].target
        weight = get_attribute(result.module, info.weight)
        assert weight.shape[-1] == node.args[0].meta["val"].shape[-1]
        assert weight.shape[-2] == node.meta["val"].shape[-1]
        assert info.experts == (weight.shape[0] if weight.dim() == 3 else 0)
    assert all(LAYER in node.meta for node in result.graph.nodes)
    assert dict(module.named_modules()).keys() >= {info.path for _, info in linears(result) if not info.experts}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_graph_shape(name: str) -> None:
    module, program = zoo.captured(name)
    assert tuple(node.target for node in program.placeholders()) == LM_INPUTS
    known = {path: tensor.data_ptr() for path, tensor in module.state_dict(keep_vars=True).items()}
    for path, tensor in program.parameters():
        assert path not in known or known[path] == tensor.data_ptr(), "weights are shared, not copied"
    attentions = [n for n in program.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert len(attentions) == zoo.LAYERS
    for node in attentions:
        mask = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
        assert mask.meta["val"].dtype is torch.bool and mask.meta["val"].dim() == 4
        assert "stack_trace" in node.meta
    first_linear = next(n for n in program.graph.nodes if n.target in (aten.linear.default, aten.addmm.default))
    for path, _ in first_linear.meta["nn_module_stack"].values():
        assert path in dict(module.named_modules())


def test_tied_weights_stay_one() -> None:
    _, program = zoo.captured("llama-tied")
    result, _ = pipeline.run(program, pipeline.parse("canonicalize,annotate"), PassContext(probe=inputs(1, 7)))
    embedding = next(n for n in result.graph.nodes if n.target is aten.embedding.default)
    head = next(n for n, info in linears(result) if info.role == "head")
    assert head.args[1].target == embedding.args[0].target == "model.embed_tokens.weight"
    assert head.meta[LINEAR].path == "lm_head"


def test_sliding_windows_reach_the_graph() -> None:
    """A token behind the window changes nothing in a model with sliding attention only."""
    _, program = zoo.captured("mistral")
    first = inputs(1, 33)
    second = {**first, "input_ids": first["input_ids"].clone()}
    second["input_ids"][0, 0] += 1
    reach = zoo.LAYERS * (8 - 1)
    difference = (program.run(first) - program.run(second)).abs().amax(-1)[0]
    assert torch.count_nonzero(difference[reach + 1 :]) == 0 and difference[reach] > 0


def test_padding_does_not_leak() -> None:
    """A padded sequence computes what it computes alone."""
    _, program = zoo.captured("llama")
    alone = inputs(1, 7)
    padded = {
        "input_ids": torch.nn.functional.pad(alone["input_ids"], (4, 0)),
        "attention_mask": torch.nn.functional.pad(alone["attention_mask"], (4, 0)),
        "position_ids": torch.nn.functional.pad(alone["position_ids"], (4, 0)),
    }
    torch.testing.assert_close(program.run(padded)[:, 4:], program.run(alone), rtol=1e-4, atol=1e-5)


def test_one_call_leaves_the_global_seed_alone() -> None:
    before = torch.random.get_rng_state()
    frontend.capture(zoo.user_model("llama"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_graph_is_the_same_in_every_process() -> None:
    """Gemma 3 walks through a set of strings, whose order depends on how the process hashes strings."""
    code = "import zoo; print(zoo.captured('gemma3')[1].graph)"
    graphs = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        graphs.append(done.stdout)
    assert "rotary" in graphs[0]
    assert graphs[0] == graphs[1]


def test_sets_of_a_model_are_ordered_while_it_is_traced() -> None:
    ordered = tracing._OrderedSet(["b", "a", "b", "c"])
    ordered.discard("a")
    ordered.add("d")
    assert list(ordered) == ["b", "c", "d"]
    assert ordered == {"b", "c", "d"}
    file = sys.modules[__name__]
    with tracing._ordered_sets(Walker()):
        assert file.set is tracing._OrderedSet
    assert "set" not in vars(file)


class Walker(torch.nn.Module):
    pass


def rotary_model(context: int | None = None, **rope: object) -> tuple[PreTrainedModel, Program]:
    options = {} if rope["rope_type"] == "dynamic" else {"original_max_position_embeddings": 32}
    name = "Llama" if rope["rope_type"] == "dynamic" else "Phi3"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=zoo.VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128 if options else 32,
        pad_token_id=0,
        rope_scaling={**rope, "rope_theta": 100.0},
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model, frontend.capture(frontend.prepare(UserModel(model, "causal-lm", "rotary", "-")), context)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def error_at(model: PreTrainedModel, program: Program, length: int) -> float:
    tokens = inputs(2, length)
    with torch.no_grad():
        expected = model(**tokens, use_cache=False).logits
    return float((program.run(tokens) - expected).norm() / expected.norm())


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rotary_frequencies_are_those_of_the_context(rope: dict[str, object]) -> None:
    """The default context has the unscaled frequencies, a longer one those of its length; the model stays as it was."""
    model, program = rotary_model(**rope)
    before = model.model.rotary_emb.inv_freq.clone()
    assert program.config[COMPILED_CONTEXT] == 32 and "up to 32 tokens" in program.metadata["context"]
    assert error_at(model, program, 32) < 1e-5 and error_at(model, program, 1) < 1e-5
    assert error_at(model, program, 60) > 1e-2, "the frequencies of longer sequences are others"
    assert error_at(model, program, 8) < 1e-5

    model, program = rotary_model(context=60, **rope)
    assert torch.equal(model.model.rotary_emb.inv_freq, before) and model.model.rotary_emb.rope_type != "default"
    assert program.config[COMPILED_CONTEXT] == 60 and "60 tokens" in program.metadata["context"]
    assert error_at(model, program, 60) < 1e-5
    assert error_at(model, program, 8) > 1e-2


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="attends to 128 tokens at most; --context cannot be 129"):
        rotary_model(context=129, **LONGROPE)
    with pytest.raises(CaptureError, match="--context cannot be 0; ask for at least 1"):
        rotary_model(context=0, **LONGROPE)
    with pytest.raises(CaptureError, match="attends to 128 tokens at most"):
        model = zoo.ZOO["llama-tied"].build()
        frontend.capture(frontend.prepare(UserModel(model, "causal-lm", "llama", "-")), 257)


def test_tables_made_for_the_longest_sequence_bound_the_context() -> None:
    """GPT-Neo slices a mask that was made for the longest sequence."""
    config = transformers.GPTNeoConfig(
        vocab_size=zoo.VOCABULARY,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=40,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    )
    model = transformers.GPTNeoForCausalLM(config).eval()
    program = frontend.capture(frontend.prepare(UserModel(model, "causal-lm", "neo", "-")))
    assert program.config[COMPILED_CONTEXT] == 40
    program, _ = pipeline.run(program, pipeline.parse("canonicalize"), PassContext(probe=inputs(2, 7)))
    assert all(error_at(model, program, length) < 1e-5 for length in (1, 7, 40))


def test_source_lines_are_the_models() -> None:
    """Of every operation of a transformers model, the line of its modeling file."""
    _, program = zoo.captured("llama-tied")
    program, _ = pipeline.run(program, pipeline.parse("canonicalize"), PassContext(probe=inputs(2, 7)))
    # torch itself reads sizes, for its own checks
    operations = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not aten.sym_size.int]
    lines = [dump.source_line(n) for n in operations]
    assert len(lines) > 50
    assert {line.rpartition("/")[2].rpartition(":")[0] for line in lines} == {"modeling_llama.py"}
