"""Holds a token that is decoded behind others against the same token within its sequence, node by node.

Logits say little about that where activations have few bits: a last bit that differs moves codes, and these spread
through the layers until the logits have hardly anything in common. So the graph runs on the whole sequence, on all but
its last token and on that token behind them, node by node in step, and wherever a value has a vector for every token,
the latter two go on from what the whole sequence has there. What a node is off by is then its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .compare import relative_error
from .program import STATE, Program, Runner


class _Runs(NamedTuple):
    """The values of a node."""

    whole: Any
    before: Any
    last: Any


def step_errors(program: Program, probe: Mapping[str, Tensor]) -> dict[fx.Node, float]:
    """How far the last token's values are off where it is decoded behind the others.

    Args:
        program: has a KV state.
        probe: at least two tokens a sequence.

    Returns:
        The relative error (Frobenius norm) of every node whose value has the shape ``[B, S, …]`` with a vector for
        every token, and of the output, in graph order; infinite where other places are not finite.
    """
    rows, length = probe["input_ids"].shape
    states = {str(n.target): n.meta[STATE].allocate(rows, length) for n in program.state_placeholders()}
    before = {name: value[:, : length - 1] for name, value in probe.items()}
    last = {name: value[:, length - 1 :] for name, value in probe.items()}
    last["attention_mask"] = probe["attention_mask"]
    inputs = (probe, {**before, **states, "past": 0}, {**last, **states, "past": length - 1})
    runner = _Lockstep(program)
    with torch.no_grad():
        runner.run(*map(_Runs, *map(program.arguments, inputs)))
    return {node: runner.errors[node.name] for node in program.graph.nodes if node.name in runner.errors}


class _Lockstep(Runner):
    """Values are those of all runs, except where they depend on weights alone.

    Attributes:
        errors: by the node's name.
    """

    def __init__(self, program: Program):
        super().__init__(program.module)
        self.errors: dict[str, float] = {}

    def evaluate(self, n: fx.Node) -> Any:
        if n.op == "placeholder" or not any(isinstance(self.env[a], _Runs) for a in n.all_input_nodes):
            return super().evaluate(n)
        values = _Runs(*(self._value(n, run) for run in range(len(_Runs._fields))))
        if n.op != "output" and not _per_token(values):
            return values
        whole = values.whole
        self.errors[n.name] = _error(whole[:, -1:], values.last)
        return _Runs(whole, whole[:, :-1].contiguous(), whole[:, -1:].contiguous())

    def _value(self, node: fx.Node, run: int) -> Any:
        """The value of a node in one of the runs."""

        def own(argument: fx.Node) -> Any:
            value = self.env[argument]
            return value[run] if isinstance(value, _Runs) else value

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), own)
        return getattr(self, node.op)(node.target, args, kwargs)


def _per_token(values: _Runs) -> bool:
    """Whether values are ``[B, S, …]`` and a vector for every token."""
    if not all(isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2 for value in values):
        return False
    (rows, length, *tail), *others = (value.shape for value in values)
    return tail != [1] * len(tail) and [tuple(shape) for shape in others] == [
        (rows, length - 1, *tail),
        (rows, 1, *tail),
    ]


def _error(whole: Tensor, last: Tensor) -> float:
    """The relative error of the finite numbers; infinite where others are finite."""
    finite = torch.isfinite(whole)
    if whole.shape != last.shape or not torch.equal(finite, torch.isfinite(last)):
        return float("inf")
    return relative_error(whole[finite], last[finite])
