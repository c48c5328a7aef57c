"""First and second moments of values inside a float program, over calibration sequences."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..base import PassContext
from ..ir.program import Program
from .layers import Activations, Values, calibration_batches, segments, split
from .precision import Precision

BATCH = 8
"""Sequences run at a time."""


class Moments:
    """Sums of a value and of its square over a calibration set.

    Attributes:
        mean, square: float32; see :meth:`add` for the shape.
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def add(self, x: Tensor, kept: int) -> None:
        """Takes in ``x [..., K]``; dimension ``kept`` and the last one are not averaged."""
        dims = [d for d in range(x.dim() - 1) if d != kept]
        x = x.float()
        sums = x.sum(dims), x.square().sum(dims)
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        self._count += x[..., 0].numel() // (x.shape[kept] if kept >= 0 else 1)

    @property
    def mean(self) -> Tensor:
        assert self._sums is not None
        return self._sums[0].cpu() / self._count

    @property
    def square(self) -> Tensor:
        assert self._sums is not None
        return self._sums[1].cpu() / self._count


@torch.no_grad()
def measure(
    program: Program, context: PassContext, wanted: Mapping[str, int], sequences: int, precision: Precision
) -> dict[str, Moments]:
    """Moments of the wanted values, by node name; those of nodes in no layer are left out.

    Args:
        program: an annotated one.
        wanted: the dimension that is not averaged, besides the last one: 1 for the heads of keys ``[B, H, S, D]``, -1
            for none.
        sequences: of the calibration set that are measured on, at most.
        precision: of the matrix products.
    """
    batches = calibration_batches(program, context.calibration, BATCH, sequences)
    layers = split(program)
    chain = Activations(batches, context.device)
    chain.advance(layers.prologue)
    found: dict[str, Moments] = {}

    def take(values: Values, names: Sequence[str]) -> None:
        for name in names:
            found.setdefault(name, Moments()).add(values[name], wanted[name])

    with context.progress.task("measuring channels", len(layers.layers)) as task:
        for layer in layers.layers:
            ready = [name for name in layer.inputs if name in wanted and name not in found]
            for values in chain if ready else ():
                take(values, ready)
            cuts = [n for n in layer.module.graph.nodes if n.name in wanted and n.op == "call_function"]
            for part in segments(layer, cuts):
                names = [name for name in part.outputs if name in wanted]
                chain.advance(part, functools.partial(take, names=names), precision)
            task.advance()
    return found
