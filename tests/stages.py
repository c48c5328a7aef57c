"""A tiny language model and what the calibrating stages need around it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext, PassResult
from lbllm_compile.passes.ir.program import Program
from torch import Tensor
from zoo import VOCABULARY, user_model

from lbllm_compile import frontend
from lbllm_compile.report.stages import of_output


@functools.cache
def annotated(name: str = "llama") -> Program:
    """A zoo model, captured and annotated."""
    return apply(frontend.capture(user_model(name)), "canonicalize,annotate").program


def apply(program: Program, text: str, context: PassContext | None = None) -> PassResult:
    """The last pass's result of a pipeline, without the pipeline's own checks."""
    result = PassResult(program)
    for item in pipeline.parse(text):
        result = item.apply(result.program, context or PassContext())
    return result


def batches(count: int, rows: int = 2, length: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random token sequences whose tokens are not equally frequent."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = (torch.rand((rows, length), generator=generator).square() * VOCABULARY).long()
        made.append(frontend.language_model_inputs(ids))
    return made


def context(name: str = "llama", count: int = 16, **options: Any) -> PassContext:
    """A context with calibration and validation sequences for :func:`annotated`."""
    return PassContext(teacher=annotated(name), calibration=batches(count), validation=batches(4, seed=1), **options)


@functools.cache
def quantized(name: str = "llama", group: int = 32) -> Program:
    """The model after stage 1."""
    return apply(annotated(name), f"observe,ptq{{group={group}}}", context(name)).program


class Notes(NoProgress):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Memory:
    """Checkpoints that stay in memory, and can stop the run after some saves, as a kill would."""

    class KilledError(Exception):
        pass

    def __init__(self, saves: int | None = None):
        self.kept: dict[tuple[str, int], tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self.left = saves
        self.loaded = 0

    def load(self, stage: str, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = self.kept.get((stage, index))
        self.loaded += found is not None
        return found

    def save(self, stage: str, index: int, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
        self.kept[stage, index] = ({k: t.clone() for k, t in tensors.items()}, dict(metrics))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Memory.KilledError


def same_tensors(a: Program, b: Program) -> bool:
    """Whether two programs hold the same weights, bit for bit."""
    left, right = dict(a.parameters()), dict(b.parameters())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def improved(summary: Mapping[str, Any]) -> bool:
    """Whether a training brought the whole model closer to the float model on held-out data."""
    return of_output([summary]).passed
