"""Where the knees of activation quantizers start: the shares of the range with the smallest error on real inputs.

What a good share is depends on how far a site's outliers lie outside: on normally distributed channels it is about
0.35, with six of a thousand channels twenty times larger about 0.1 (and the error a quarter of what 0.3 gives). So it
is searched for every site, on the program as it runs, quantizers with knees already placed before it included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import operators as operators
from ...codegen import reference
from ...codegen.progress import Progress
from ..base import batches_of
from ..ir.program import Program, Runner
from ..ir.rewrite import activation_knees, computed, is_call

UNPLACED = 0.3
"""A share that serves until the search: the best one on Laplace-distributed channels."""

SHARES = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
"""Shares that are tried: steps of about the square root of two."""

SEQUENCES = 4
"""Calibration sequences whose activations are looked at."""

TOKENS = 128
"""Tokens of them, evenly spread, on which a site's shares are compared."""

_lbllm = torch.ops.lbllm


def place_knees(program: Program, batch: Mapping[str, Any], progress: Progress) -> None:
    """Moves the knees of all quantizers to their best place; the tensors themselves change.

    Args:
        batch: inputs by placeholder.
    """
    if program.kind == "causal-lm":
        batch = next(batches_of(batch, SEQUENCES))
    sites = sum(1 for n in program.graph.nodes if _has_knees(n))
    with torch.no_grad(), progress.task("stage 3: placing knees", sites) as task:
        _Search(program.module, sites, task).run(*program.arguments(batch))


def best_knees(x: Tensor, clip: Tensor, group: int) -> Tensor:
    """The pair of shares with the smallest mean relative error on ``x [..., K]``, float32 ``[2]``.

    First one share for both sides, then one side after the other.
    """
    x = x.reshape(-1, x.shape[-1]).float()
    x = x[:: max(len(x) // TOKENS, 1)][:TOKENS]
    square = x.square().sum(-1).clamp_min(reference.RANGE_MIN)

    def error(pair: tuple[float, float]) -> float:
        values, scale = reference.quantize_activation(x, clip, 4, group, torch.tensor(pair))
        difference = reference.dequantize_activation(values, scale, group) - x
        return float((difference.square().sum(-1) / square).mean())

    lower = upper = min(SHARES, key=lambda share: error((share, share)))
    upper = min(SHARES, key=lambda share: error((lower, share)))
    lower = min(SHARES, key=lambda share: error((share, upper)))
    return torch.tensor((lower, upper))


def _has_knees(node: fx.Node) -> bool:
    return is_call(node, _lbllm.fake_quantize.default) and bool(activation_knees(node))


class _Search(Runner):
    """Runs a program up to its last quantizer with knees, and places those of each on its way."""

    def __init__(self, module: fx.GraphModule, sites: int, task: Any):
        super().__init__(module)
        self._left, self._task = sites, task

    def evaluate(self, n: fx.Node) -> Any:
        if not self._left:
            return None
        if _has_knees(n):
            x, clip, group, knees = computed(n, self.env).pick("x", "clip", "group", "knees")
            knees.copy_(best_knees(x, clip, group))
            self._left -= 1
            self._task.advance()
        return super().evaluate(n)
