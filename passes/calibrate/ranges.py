"""How wide the inputs of quantized linears are, as their quantizers see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import operators as operators
from ...codegen import reference
from ..base import batches_of
from ..ir.annotations import LINEAR
from ..ir.program import Program, Runner
from ..ir.rewrite import computed, is_call

SEQUENCES = 4
"""Calibration sequences whose activations are looked at."""

UNCLIPPED = torch.ones(2)


def input_ranges(program: Program, batch: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ranges of all quantizers' inputs before any clipping, in graph order.

    Args:
        program: with ``fake_quantize`` in front of linears.
        batch: inputs by placeholder.

    Returns:
        By path of the (first) linear behind a quantizer: its ``layer``, and ``low`` and ``high``, the ends of the range
        that shares a scale, of a token or a group of its channels, on average; and ``peak``, the largest magnitude.
    """
    if program.kind == "causal-lm":
        batch = next(batches_of(batch, SEQUENCES))
    found = _Ranges(program.module)
    with torch.no_grad():
        found.run(*program.arguments(batch))
    return found.ranges


class _Ranges(Runner):
    """Runs a program as far as its last quantizer, and looks at what quantizers get."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.ranges: dict[str, dict[str, Any]] = {}
        self._left = {n for n in self.graph.nodes if is_call(n, torch.ops.lbllm.fake_quantize.default)}

    def evaluate(self, n: fx.Node) -> Any:
        if not self._left:
            return None  # nothing looks at it
        if n in self._left:
            self._left.remove(n)
            linear = next((user for user in n.users if LINEAR in user.meta), None)
            if linear is not None:
                info = linear.meta[LINEAR]
                self.ranges[info.path] = {"layer": info.layer, **_range(*computed(n, self.env).pick("x", "group"))}
        return super().evaluate(n)


def _range(x: Tensor, group: int) -> dict[str, float]:
    high, low = reference.clipped_range(reference.in_groups(x.float(), group or x.shape[-1]), UNCLIPPED)
    figures = {"low": low.mean(), "high": high.mean(), "peak": x.abs().amax()}
    return {name: float(f"{float(value):.5g}") for name, value in figures.items()}
