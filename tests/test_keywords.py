"""Passes read the arguments of calls by name, so how a call gives them changes nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lbllm_compile.codegen.operators.arguments import parameters
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import dump, exact
from lbllm_compile.passes.ir.program import Program
from stages import batches, same_tensors
from test_zoo import inputs
from zoo import captured

from lbllm_compile.inspect import linear_rows
from lbllm_compile.lowering.executor import requirements

PASSES = (
    "canonicalize",
    "annotate",
    "smooth",
    "observe",
    "ptq{group=32}",
    "distill{epochs=1}",
    "activate{ranges=knees,group=32,steps=0}",
    "head",
    "merge",
    "lower",
    "cache",
    "cleanup",
)

MODELS = pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])


def by_name(program: Program) -> Program:
    """A copy whose calls give every argument by name, but those that have their default."""
    program = program.copy()
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names: dict[str, Any] = parameters(node.target)
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            node.args, node.kwargs = (), {n: given[n] for n in names if n in given and given[n] is not names[n]}
    program.module.recompile()
    return program


@functools.cache
def context(name: str) -> PassContext:
    teacher = apply(captured(name)[1], "canonicalize,annotate", PassContext())
    return PassContext(teacher=teacher, calibration=batches(2), validation=batches(1, seed=1), probe=inputs(2, 9))


def apply(program: Program, text: str, given: PassContext) -> Program:
    for item in pipeline.parse(text):
        program = item.apply(program, given).program
    return program


@functools.cache
def before(name: str, index: int) -> Program:
    """The program that the pass of that index gets, its arguments given as passes give them."""
    return apply(before(name, index - 1), PASSES[index - 1], context(name)) if index else captured(name)[1]


@pytest.mark.parametrize("index", range(len(PASSES)), ids=PASSES.__getitem__)
@MODELS
def test_a_pass_makes_the_same_of_arguments_by_name(name, index):
    made = apply(by_name(before(name, index)), PASSES[index], context(name))
    expected = before(name, index + 1)
    assert dump.render(by_name(made)) == dump.render(by_name(expected))
    assert same_tensors(made, expected)


@MODELS
def test_integer_arithmetic_takes_arguments_by_name(name):
    simulated = before(name, PASSES.index("lower"))
    item = inputs(2, 9)
    assert torch.equal(exact.run(by_name(simulated), item), exact.run(simulated, item))


@MODELS
def test_a_lowered_graph_is_read_by_name(name):
    lowered = before(name, len(PASSES))
    assert requirements(by_name(lowered)) == requirements(lowered)
    for program in (before(name, PASSES.index("lower")), lowered):
        assert linear_rows(by_name(program)) == linear_rows(program)
