"""Scales of the binary planes of 4-bit activation codes, by least squares on real inputs.

A code ``q`` is four binary planes, and an input about ``step * sum_b scale_b (q_b - z_b)`` with the code ``z`` of zero.
For given codes the best scales are a linear least-squares problem in four unknowns; for given scales the best code is
the one next to the input. The two take turns, as in k-means. BWA (ACL 2025 Findings 459, arXiv 2504.05352) balances the
planes' scales by quantization errors; its full text was not at hand, so that it is done this way is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen import reference
from ...codegen.reference import PLANE_SCALE_MAX, PLANES, UNIFORM_PLANES
from .knees import sampled

ROUNDS = 8
"""Rounds of codes and scales; the best ones met are kept, which may be the evenly spaced ones."""

RIDGE = 1e-6
"""Pull towards the scales of the round before, relative to the mean diagonal: for planes in which all codes agree."""

SMALLEST = 2.0**-6
"""Smallest scale of the first plane, in steps."""


def best_plane_scales(x: Tensor, clip: Tensor, group: int) -> Tensor:
    """The plane scales with the smallest mean relative error on ``x [..., K]`` that were met, float32 ``[4]``.

    Args:
        x: as many tokens of it are looked at as for knees.
        clip: float32 ``[2]``, the quantizer's.
        group: channels per table; 0 for one per token.
    """
    x = sampled(x)
    square = x.square().sum(-1).clamp_min(reference.RANGE_MIN)
    scales = torch.tensor(UNIFORM_PLANES)
    best, least = scales, torch.inf
    for _ in range(ROUNDS):
        values, scale = reference.quantize_activation(x, clip, 4, group, None, scales)
        difference = reference.dequantize_activation(values, scale, group) - x
        error = float((difference.square().sum(-1) / square).mean())
        if error >= least:
            break
        best, least = scales, error
        scales = _refit(x, clip, group, scales, square)
    return best


def _refit(x: Tensor, clip: Tensor, group: int, scales: Tensor, square: Tensor) -> Tensor:
    """Scales by least squares for the codes that ``scales`` give, each token relative to its ``square [M]``."""
    grouped = reference.in_groups(x, group or x.shape[-1])
    high, low = reference.clipped_range(grouped, clip)
    table = reference.plane_table(high, low, scales)
    planes = torch.arange(PLANES)
    ones = (reference.table_codes(grouped, table).unsqueeze(-1) >> planes & 1).double()
    of_zero = (table.zero.long().unsqueeze(-1) >> planes & 1).double()
    step = ((high - low) / reference.INT4_MAX).double() / square.double().sqrt().unsqueeze(-1)
    features = ((ones - of_zero.unsqueeze(-2)) * step[..., None, None]).reshape(-1, PLANES)
    target = (grouped / square.sqrt()[:, None, None]).double().reshape(-1)
    normal = features.t() @ features
    normal.diagonal().add_(RIDGE * normal.diagonal().mean().clamp_min(1e-30))
    change = torch.linalg.solve(normal, features.t() @ (target - features @ scales.double()))
    return _ascending(scales.double() + change)


def _ascending(scales: Tensor) -> Tensor:
    """The scales, raised where codes would not ascend and at most twice the evenly spaced ones; float32."""
    most = torch.tensor(UNIFORM_PLANES) * (PLANE_SCALE_MAX / UNIFORM_PLANES[-1])
    found = scales.float().minimum(most).clamp_min(SMALLEST)
    below = found[0]
    for plane in range(1, PLANES):
        # The sum in the order and precision that codes are placed in, so that none lies below the one before it.
        found[plane] = torch.maximum(found[plane], below)
        below = below + found[plane]
    return found
