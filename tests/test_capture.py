"""Capture, canonicalize and annotate over the zoo: bit-equal graphs, every weight matrix counted, every layer found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers.masking_utils
import zoo
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LAYER, LINEAR, layer_count, linears, matrix_count
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir.program import get_attribute
from torch import Tensor

from lbllm_compile import frontend
from lbllm_compile.frontend import LM_INPUTS, language_model_inputs, tracing

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
        assert module.get_submodule(path) is not None


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
