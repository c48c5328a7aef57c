"""Where the knees of activation quantizers start: the shares of the range with the smallest error on real inputs.

What a good share is depends on how far a site's outliers lie outside: on normally distributed channels it is about
0.35, with six of a thousand channels twenty times larger about 0.1 (and the error a quarter of what 0.3 gives). So it
is searched for every site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen import reference

UNPLACED = 0.3
"""A share that serves until the search: the best one on Laplace-distributed channels."""

SHARES = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
"""Shares that are tried: steps of about the square root of two."""

TOKENS = 128
"""Tokens, evenly spread, on which a site's shares are compared."""


def sampled(x: Tensor) -> Tensor:
    """As many of the tokens of ``x [..., K]``, float32 ``[M, K]``."""
    x = x.reshape(-1, x.shape[-1]).float()
    return x[:: max(len(x) // TOKENS, 1)][:TOKENS]


def best_knees(x: Tensor, clip: Tensor, group: int) -> Tensor:
    """The pair of shares with the smallest mean relative error on ``x [..., K]``, float32 ``[2]``.

    First one share for both sides, then one side after the other.
    """
    x = sampled(x)
    square = x.square().sum(-1).clamp_min(reference.RANGE_MIN)

    def error(pair: tuple[float, float]) -> float:
        values, scale = reference.quantize_activation(x, clip, 4, group, torch.tensor(pair))
        difference = reference.dequantize_activation(values, scale, group) - x
        return float((difference.square().sum(-1) / square).mean())

    lower = upper = min(SHARES, key=lambda share: error((share, share)))
    upper = min(SHARES, key=lambda share: error((lower, share)))
    lower = min(SHARES, key=lambda share: error((share, upper)))
    return torch.tensor((lower, upper))
