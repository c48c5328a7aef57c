"""With every linear kept float, a compile changes nothing: what it gives is what the original model gives."""

from __future__ import annotations

from pathlib import Path

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

import lbllm_compile
from lbllm_compile import driver, plan, recipe
from lbllm_compile.options import CompileOptions
from lbllm_compile.runtime import CompiledModel

TOLERANCE = 2e-3
"""Relative error that keys and values in half precision, the only thing that is rounded, may come to."""

TINY = recipe.Preset(
    sequences=4,
    sequence_length=32,
    validation_sequences=2,
    distill_epochs=1,
    activate_steps=1,
    finetune_steps=1,
    tune_trials=1,
    tune_seconds=5,
)


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


def test_patterns_that_keep_all_say_so_for_the_cache() -> None:
    def bits(**given: object) -> int:
        passes = recipe.passes(recipe.Choices(**given), "cpu")  # type: ignore[arg-type]
        return next(item.kv for item in passes if item.name == "activate")  # type: ignore[attr-defined]

    assert bits() == bits(keep_dense=("model.*",)) == 4
    assert bits(keep_dense=("*",)) == bits(keep_dense=("lm_head", "*")) == 16
    assert bits(keep_dense=("*",), kv_bits=8) == 8


@pytest.mark.parametrize(
    "model", ["llama", *(pytest.param(m, marks=pytest.mark.slow) for m in ("llama-tied", "mixtral"))]
)
def test_keep_dense_as_typed_leaves_a_model_unchanged(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option alone, through a whole compile: the artifact gives what the original model gives."""
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(recipe.PRESETS, "quick", TINY)
    module = captured(model)[0]
    compiled = driver.compile(CompileOptions(module, keep_dense="*", preset="quick", out=tmp_path / "out"))
    loaded = lbllm_compile.load(compiled.out)
    assert loaded.native is not None
    item = inputs(3, 33)
    seen = item["attention_mask"].bool()
    with torch.no_grad():
        expected = module(**item, use_cache=False).logits[seen]
    for runs in (loaded, CompiledModel(loaded.program, loaded.kernels)):
        found = runs.logits(item["input_ids"], item["attention_mask"])[seen]
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_the_plan_counts_all_that_is_kept_as_floats(model: str) -> None:
    planned = plan.make_plan(CompileOptions(captured(model)[0], keep_dense="*"))
    assert planned.artifact == 4 * planned.parameters


@pytest.mark.parametrize("preset", recipe.PRESETS)
@pytest.mark.parametrize("name", recipe.RECIPES)
def test_every_recipe_leaves_a_kept_model_unchanged(name: str, preset: str) -> None:
    program, notes = compile_float("mixtral", float_pipeline(name, preset))
    assert matrix_count(program) == 0
    assert difference("mixtral", program, inputs(3, 33)) < TOLERANCE
    for item in {"ptq", "distill", "activate"} & {item.name for item in pipeline.parse(float_pipeline(name, preset))}:
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
