"""With every linear kept float, a compile changes nothing: what it gives is what the original model gives."""

from __future__ import annotations

import pytest
import torch
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import matrix_count
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import calls
from reference_kernels import ReferenceKernels
from stages import batches
from test_zoo import inputs
from torch import Tensor
from zoo import ZOO, captured

from lbllm_compile import recipe
from lbllm_compile.runtime import CompiledModel

TOLERANCE = 2e-3
"""Relative error that keys and values in half precision, the only thing that is rounded, may come to."""


class Notes:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def float_pipeline(name: str, preset: str, keep_dense: str = "*") -> str:
    """A recipe's whole pipeline for kept linears, with a float head and a 16-bit cache."""
    choices = recipe.Choices(name, preset, kv_bits=16, keep_dense=(keep_dense,))
    text = pipeline.render(recipe.passes(choices, "cpu"))
    return text.replace(",head,", ",head{bits=16},")


def compile_float(model: str, text: str) -> tuple[Program, Notes]:
    notes = Notes()
    context = PassContext(calibration=batches(4), validation=batches(2, seed=1), probe=inputs(2, 9))
    context.progress.note = notes.note  # type: ignore[method-assign]
    program, _ = pipeline.run(captured(model)[1], pipeline.parse(text), context)
    return program, notes


def difference(model: str, program: Program, given: dict[str, Tensor]) -> float:
    """Relative error of what a stored and loaded program gives, against the original module."""
    stored = graph_json.loads(graph_json.dumps(program.module), dict(program.parameters()))
    compiled = CompiledModel(program.with_module(stored), ReferenceKernels())
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        expected = captured(model)[0](**given, use_cache=False).logits[seen]
    return float((compiled(**given)[seen] - expected).norm() / expected.norm())


@pytest.mark.parametrize("preset", recipe.PRESETS)
@pytest.mark.parametrize("name", recipe.RECIPES)
def test_every_recipe_leaves_a_kept_model_unchanged(name: str, preset: str) -> None:
    program, notes = compile_float("mixtral", float_pipeline(name, preset))
    assert matrix_count(program) == 0
    assert difference("mixtral", program, inputs(3, 33)) < TOLERANCE
    for item in ("ptq", "distill", "activate"):
        assert any(f"'{item}'" in note for note in notes.notes)


@pytest.mark.parametrize("model", sorted(set(ZOO) - {"mixtral"}))
def test_every_architecture_can_be_kept(model: str) -> None:
    program, _ = compile_float(model, float_pipeline("lbllm", "quick"))
    assert difference(model, program, inputs(3, 33)) < TOLERANCE


def test_experts_can_be_kept_alone() -> None:
    """Attention is quantized, the experts run float beside it."""
    text = "canonicalize,annotate{keep_dense=*.experts},observe,ptq{group=32},distill{epochs=1},"
    text += "activate{group=32,steps=1},finetune{steps=1},head,merge,lower,cache,cleanup"
    program, _ = compile_float("mixtral", text)
    grouped = calls(program.graph, torch.ops.lbllm.grouped_linear.default)
    assert len(grouped) == 4
    assert len(calls(program.graph, torch.ops.lbllm.bit_linear.default)) == 4
    # as the loaded artifact computes it, on kernels
    assert difference("mixtral", program, inputs(3, 33)) < 1.0


def test_a_tied_embedding_stays_with_its_kept_head() -> None:
    """One tensor cannot be int8 rows for the embedding and float for the head."""
    program, _ = compile_float("llama-tied", float_pipeline("lbllm", "quick").replace("{bits=16},merge", ",merge"))
    assert not calls(program.graph, torch.ops.lbllm.int8_embedding.default)
    assert difference("llama-tied", program, inputs(3, 33)) < TOLERANCE


def test_a_quantized_cache_is_as_asked() -> None:
    program, _ = compile_float("llama", float_pipeline("lbllm", "quick").replace("kv=16", "kv=4"))
    attention = calls(program.graph, torch.ops.lbllm.cached_attention.default)[0]
    assert attention.args[-1] == 4
    assert TOLERANCE < difference("llama", program, inputs(3, 33)) < 0.5


@pytest.mark.parametrize("text", ["smooth", "observe", "ptq", "distill", "activate", "finetune"])
def test_without_annotate_there_is_no_telling(text: str) -> None:
    context = PassContext(calibration=batches(1), validation=batches(1), probe=inputs(2, 9))
    with pytest.raises(PassError, match="run 'annotate' before it"):
        pipeline.parse(text)[0].apply(captured("llama")[1], context)
