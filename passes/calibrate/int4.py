"""Fits 4-bit codes to a matrix: 16 levels for all of it, and a scale per row and group that makes the most of them.

Weights are dense around zero, so levels are, too, as those of NF4 (arXiv 2305.14314) and of llama.cpp's ``IQ4_NL``,
from which the fit starts. Levels and scales are then refined in turn, as by Lloyd: every weight takes the level next to
it, every group the scale and the table the levels that are best for what was taken, in least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.errors import FormatError
from ...codegen.format import LEVEL_MAX, SCALE_MIN, Int4Weight, pack_codes
from ...codegen.sizes import group_count

_START = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Levels of ``IQ4_NL`` (``kvalues_iq4nl`` in llama.cpp's ``ggml-common.h``)."""

_SHARES = (0.8, 0.9, 0.97, 1.06)
"""Where the weight furthest from zero is tried to lie, in parts of an outermost level."""

_SAMPLE_ROWS = 4096
"""Rows that the table is fitted to."""

_ROUNDS = 6
"""Of levels and scales in turn."""

_ROWS_AT_ONCE = 2048

_HALVES = 256
"""Half steps between levels on either side of zero, within which all middles are."""

_MANY = 1 << 15
"""Weights from which on a look-up is worth its table."""


def quantize_int4(weight: Tensor, group: int) -> Int4Weight:
    """The 4-bit form of a matrix ``[N, K]`` with groups of ``group`` columns, each weight at the level next to it.

    Raises:
        FormatError: a weight is not finite, or too large for an fp16 scale.
    """
    table = fit_table(weight, group)
    columns = weight.shape[1]
    codes, scales = [], []
    for part in weight.split(_ROWS_AT_ONCE):
        groups, there = _in_groups(part, group)
        scale = fit_scales(groups, there, table)
        codes.append(pack_codes(nearest_codes(groups, scale, table).flatten(1)[:, :columns]))
        scales.append(scale.squeeze(-1).half())
    return Int4Weight(torch.cat(codes), table, torch.cat(scales), columns, group)


def fit_table(weight: Tensor, group: int) -> Tensor:
    """The levels for a matrix ``[N, K]``: int8 ``[16]``, ascending, the furthest from zero :data:`LEVEL_MAX` away.

    Raises:
        FormatError: a weight is not finite, or too large for an fp16 scale.
    """
    peak = weight.abs().amax()
    if not bool(torch.isfinite(peak)):
        raise FormatError("a weight is NaN or infinite; check the model's weights")
    if bool(peak > 65504.0 * LEVEL_MAX / 2):
        raise FormatError("a weight exceeds 4.1e6, the largest that 4-bit codes with an fp16 scale surely hold")
    groups, there = _in_groups(weight[:: -(-weight.shape[0] // _SAMPLE_ROWS)], group)
    table = torch.tensor(_START, dtype=torch.float32, device=weight.device)
    for _ in range(_ROUNDS):
        scale = fit_scales(groups, there, table)
        codes = nearest_codes(groups, scale, table).int().flatten()
        # An error counts as it is in the matrix, so that a level is a mean weighted with squares of scales.
        weighted = there * scale
        sums, counts = (
            torch.zeros_like(table).index_add_(0, codes, part.flatten())
            for part in (weighted * groups, weighted * scale)
        )
        levels = torch.where(counts > 0, sums / counts.clamp_min(1e-30), table).sort().values
        furthest = levels.abs().max()
        table = (levels * (LEVEL_MAX / furthest)).round() if furthest > 0 else table
    return table.to(torch.int8)


def fit_scales(groups: Tensor, importance: Tensor, table: Tensor) -> Tensor:
    """The scales, fp16 numbers as fp32 ``[..., 1]``, with which the levels next to weights have the least error.

    Args:
        groups: fp32 ``[..., W]``, a group's weights along the last dimension.
        importance: what a squared error counts, ``[W]`` or more dimensions that broadcast; 0 for padding.
        table: ``[16]``.
    """
    table = table.float()
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.full_like(furthest, torch.inf)
    scale = torch.zeros_like(furthest)
    for outermost in (level for level in (table[0], table[-1]) if level != 0):
        for share in _SHARES:
            levels = table[nearest_codes(groups, furthest / (outermost * share), table).int()]
            weighted = levels * importance
            squares = (weighted * levels).sum(-1, keepdim=True)
            tried = (weighted * groups).sum(-1, keepdim=True) / squares.clamp_min(1e-30)
            error = (levels * tried).sub_(groups).square_().mul_(importance).sum(-1, keepdim=True)
            scale = torch.where(error < best, tried, scale)
            best = torch.minimum(error, best)
    stored = scale.half().float()
    return torch.where((stored == 0) & (furthest != 0), SCALE_MIN, stored)


def nearest_codes(weights: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The level next to every weight, the lower one of two, uint8; where the scale, which broadcasts, is zero the one
    next to zero. Levels are whole numbers of int8."""
    table = table.float()
    middles = (table[1:] + table[:-1]) / 2
    units = weights * torch.where(scale == 0, 0.0, 1 / scale)
    if units.numel() < _MANY:
        return torch.bucketize(units, middles, out_int32=True).to(torch.uint8)
    # Middles are multiples of a half, so all weights between two of these have one code, which a look-up finds faster.
    halves = torch.arange(-_HALVES, _HALVES, device=units.device) / 2
    codes = torch.bucketize(halves + 0.25, middles, out_int32=True).to(torch.uint8)
    places = units.mul_(2).ceil_().clamp_(1 - _HALVES, _HALVES).add_(_HALVES - 1).int()
    return codes.index_select(0, places.flatten()).view(places.shape)


def _in_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """``[N, K]`` as fp32 ``[N, G, group]``, padded with zeros, and the columns that are there, ``[G, group]``."""
    columns = weight.shape[1]
    padded = group_count(columns, group) * group
    there = (torch.arange(padded, device=weight.device) < columns).float().unflatten(0, (-1, group))
    return torch.nn.functional.pad(weight.float(), (0, padded - columns)).unflatten(1, (-1, group)), there
