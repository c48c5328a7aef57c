"""Holds what a rewrite put into a graph against what was there before, node by node and on the same inputs.

The whole model's output says little about a rewrite that rounds otherwise: where activations have four bits, a last bit
that differs moves codes, and these spread. So the program before runs on a probe, and what replaces one of its nodes is
computed from the values that this node's neighbours have there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, Runner, get_attribute


def relative_error(before: Tensor, after: Tensor) -> float:
    """Frobenius norm of the difference over that of ``before``; infinite where NaNs or shapes disagree."""
    if before.shape != after.shape or not bool(torch.isfinite(after).all()):
        return float("inf")
    norm = before.double().norm()
    difference = (after.double() - before.double()).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype and shape and hold the same, to the bit, NaNs and signs of zeros too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def errors(
    before: Program,
    after: Program,
    replaced: Mapping[str, fx.Node],
    probe: Mapping[str, Any],
    compared: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, float]:
    """The relative error (Frobenius norm) of every replacement on the probe, by the name of what was replaced.

    Args:
        before: the program that a pass was given.
        after: its copy, rewritten; nodes that stayed have the names they had.
        replaced: nodes of ``after`` by the name of the node of ``before`` whose value they take the place of.
        probe: inputs by placeholder; without any, nothing is compared.
        compared: the part of a value that counts.
    """
    if not probe or not replaced:
        return {}
    comparison = _Comparison(before, after, replaced, probe, compared)
    with torch.no_grad():
        comparison.run(*before.arguments(probe))
    return comparison.errors


class _Comparison(Runner):
    def __init__(
        self,
        before: Program,
        after: Program,
        replaced: Mapping[str, fx.Node],
        probe: Mapping[str, Any],
        compared: Callable[[Tensor], Tensor],
    ):
        super().__init__(before.module)
        self._after, self._replaced, self._compared = after.module, replaced, compared
        self._before = {n.name for n in before.graph.nodes}
        self._values: dict[fx.Node, Any] = dict(zip(after.placeholders(), after.arguments(probe), strict=True))
        self._leaves = {n.name: n for node in replaced.values() for n in self._known_inputs(node)}
        self.errors: dict[str, float] = {}

    def _known_inputs(self, node: fx.Node) -> set[fx.Node]:
        """The nearest nodes that a replacement depends on and the program before has, weights excepted."""
        pending, seen, found = [node], {node}, set()
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in seen or source.op in ("get_attr", "placeholder"):
                    continue
                seen.add(source)
                if source.name in self._before:
                    found.add(source)
                else:
                    pending.append(source)
        return found

    def evaluate(self, n: fx.Node) -> Any:
        result = super().evaluate(n)
        if n.name in self._leaves:
            self._values[self._leaves[n.name]] = result
        if n.name in self._replaced:
            old, new = (self._compared(v).float() for v in (result, self._value(self._replaced[n.name])))
            self.errors[n.name] = float((new - old).norm() / old.norm().clamp_min(1e-30))
        return result

    def _value(self, node: fx.Node) -> Any:
        """The value of a node of the program after. Those of weights are not kept."""
        if node in self._values:
            return self._values[node]
        if node.op == "get_attr":
            return get_attribute(self._after, str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        assert callable(node.target)
        value = node.target(*args, **kwargs)
        if self._known_inputs(node):
            self._values[node] = value
        return value
