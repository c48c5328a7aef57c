"""Differentiable stand-ins for quantized weights and activations, and the sub-graphs that use them.

Training cannot move integers, so a stage trains *latent* quantities and quantizes them in every forward pass, exactly
as the packed format would; the backward pass goes straight through the rounding.

A weight has a latent value, a relaxed bitmap in [0, 1] and four levels per group; what they stand for and their
gradients are in ``codegen/latent.py``.

:func:`lift` turns a stage of a quantized program into a function of its weights, its ranges (clip factors and knees)
and its vectors (weights of norms, and biases). Weights of 4-bit codes do not train: they are inputs, too, so that they
are dequantized once, and stay as they were fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...codegen import levels as level_rules
from ...codegen import operators as operators
from ...codegen import reference
from ...codegen.format import LEVELS, QuantizedWeight
from ...codegen.latent import decide, gradients, level_gradients, matrix, pick, stored_levels
from ...codegen.levels import FREE, LevelRule
from ...codegen.operators import Arguments
from ...codegen.operators.lbllm.linears import WEIGHT
from ..ir.annotations import LINEAR
from ..ir.program import discard_attributes, get_attribute
from ..ir.rewrite import constant
from .layers import Stage, Values

LATENT_MARGIN = 0.05
"""Smallest distance of a starting latent from its threshold, in widths of its pair."""

MOVED_MARGIN = 0.25
"""The same, in gaps between levels, where one number decides both planes and GPTQ chose another level than the one that
is nearest to the float weight."""

BITMAP_MARGIN = 0.02
"""Smallest distance of a starting bitmap from 0.5."""

LOGIT = 2.0
"""A clip factor is ``sigmoid(logit) / sigmoid(LOGIT)``: 1, no clipping, where training starts."""

KNEE_LOGIT = 4.0
"""Largest magnitude of a knee's logit: a knee stays between 0.018 and 0.982 of the range."""

_lbllm = torch.ops.lbllm


@dataclass
class LatentWeight:
    """The trainable form of one W(1+1) matrix (or stack of them), rows flattened.

    Attributes:
        latent: float32 ``[R, G, group]``; columns behind ``in_features`` are padding.
        bitmap: float32 ``[R, G, group]`` in [0, 1]; above 0.5 means the inner pair.
        parameters: float32 ``[R, G, P]``, what the levels follow from.
        shape: shape of the matrix, ``[..., N, K]``.
        group: input columns per group.
        rule: which levels a group may have.
    """

    latent: Tensor
    bitmap: Tensor
    parameters: Tensor
    shape: tuple[int, ...]
    group: int
    rule: LevelRule = FREE

    @property
    def levels(self) -> Tensor:
        """float32 ``[R, G, 4]``; sorted at first, maybe not after training."""
        return self.rule.levels(self.parameters)

    @classmethod
    def of(cls, weight: QuantizedWeight, float_weight: Tensor, rule: LevelRule = FREE) -> LatentWeight:
        """From a quantized weight, whose levels follow the rule, and the float weight it approximates ``[..., N, K]``.

        The latent is the float weight, moved to where it picks the quantized weight's level; the bitmap is soft: the
        closer the two pairs come to the float weight, the easier it flips. So the simulation starts as the quantized
        weight, bit for bit.
        """
        group, groups = weight.group, weight.groups
        pad = groups * group - weight.in_features
        codes = F.pad(weight.codes(), (0, pad)).reshape(-1, groups, group)
        target = F.pad(float_weight.float(), (0, pad)).reshape(-1, groups, group)
        levels = (weight.levels.float() * weight.scale.float().unsqueeze(-1)).reshape(-1, groups, LEVELS)
        l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
        inner, upper = (codes == 1) | (codes == 2), codes >= 2
        middle = torch.where(inner, (l1 + l2) / 2, (l0 + l3) / 2)
        width = torch.where(inner, l2 - l1, l3 - l0)
        margin = LATENT_MARGIN * width
        latent = torch.where(upper, torch.maximum(target, middle + margin), torch.minimum(target, middle - margin))
        latent = torch.minimum(torch.maximum(latent, middle - width), middle + width)
        to_inner = torch.minimum((target - l1).abs(), (target - l2).abs())
        to_outer = torch.minimum((target - l0).abs(), (target - l3).abs())
        soft = 0.5 + 0.45 * (to_outer - to_inner) / (to_outer + to_inner).clamp_min(1e-12)
        bitmap = torch.where(inner, soft.clamp_min(0.5 + BITMAP_MARGIN), soft.clamp_max(0.5 - BITMAP_MARGIN))
        return cls(latent, bitmap, rule.parameters(levels), tuple(float_weight.shape), group, rule)

    def simulate(self) -> Tensor:
        """The matrix these parameters stand for, float32 of ``shape``; differentiable."""
        padded = _Simulate.apply(self.latent, self.bitmap, self.levels, self.rule)
        return padded.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes ``uint8 [R, G, group]`` into sorted levels ``float32 [R, G, 4]``."""
        levels = self.levels
        inner, inner_upper, outer_upper = decide(self.latent, self.bitmap, *stored_levels(levels, self.rule))
        return _sorted(torch.where(inner, 1 + inner_upper.long(), 3 * outer_upper.long()), levels)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        codes, levels = self.codes()
        groups = levels.shape[1]
        codes = codes.flatten(1)[:, : self.shape[-1]].reshape(self.shape)
        levels = levels.reshape(*self.shape[:-1], groups, LEVELS)
        return QuantizedWeight.from_codes(codes, levels, self.group, self.rule.quantize)


class _Simulate(torch.autograd.Function):
    """Latent ``[R, G, g]``, bitmap ``[R, G, g]`` and levels ``[R, G, 4]`` to the matrix ``[R, G, g]``."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, bitmap: Tensor, levels: Tensor, rule: LevelRule) -> Tensor:
        operands = (latent.flatten(0, 1), bitmap.flatten(0, 1), *stored_levels(levels.flatten(0, 1), rule))
        ctx.save_for_backward(*operands)
        return matrix(*operands).view_as(latent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.shape[:2]
        return *(g.unflatten(0, rows) for g in gradients(grad.flatten(0, 1), *ctx.saved_tensors)), None


class _LevelsOnly(torch.autograd.Function):
    """Codes ``uint8 [R, G, g]`` and levels ``[R, G, 4]`` to the matrix ``[R, G, g]``; only levels have a gradient."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, levels: Tensor, rule: LevelRule) -> Tensor:
        units = codes.flatten(0, 1)
        ctx.save_for_backward(units)
        quantized, scale = stored_levels(levels.flatten(0, 1), rule)
        return pick(units, quantized * scale.unsqueeze(-1)).view(codes.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (units,) = ctx.saved_tensors
        return None, level_gradients(grad.flatten(0, 1), units).unflatten(0, grad.shape[:2]), None


@dataclass
class LevelWeight:
    """A W(1+1) matrix whose planes are frozen and whose levels train.

    Attributes:
        picked: uint8 ``[R, G, group]``, 0 to 3: the level of every element, padded as in :class:`LatentWeight`.
        parameters: float32 ``[R, G, P]``, what the levels follow from.
        shape: shape of the matrix, ``[..., N, K]``.
        group: input columns per group.
        rule: which levels a group may have.
    """

    picked: Tensor
    parameters: Tensor
    shape: tuple[int, ...]
    group: int
    rule: LevelRule = FREE

    @property
    def levels(self) -> Tensor:
        """float32 ``[R, G, 4]``."""
        return self.rule.levels(self.parameters)

    @classmethod
    def of(cls, weight: QuantizedWeight, rule: LevelRule = FREE) -> LevelWeight:
        """From a quantized weight, whose levels follow the rule."""
        groups = weight.groups
        codes = F.pad(weight.codes(), (0, groups * weight.group - weight.in_features))
        codes = codes.reshape(-1, groups, weight.group)
        levels = weight.levels.float() * weight.scale.float().unsqueeze(-1)
        shape = (*weight.sign.shape[:-1], weight.in_features)
        return cls(codes, rule.parameters(levels.reshape(-1, groups, LEVELS)), shape, weight.group, rule)

    def simulate(self) -> Tensor:
        """The matrix, float32 of ``shape``; differentiable in the levels."""
        padded = _LevelsOnly.apply(self.picked, self.levels, self.rule)
        return padded.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        codes, levels = _sorted(self.picked.long(), self.levels)
        codes = codes.flatten(1)[:, : self.shape[-1]].reshape(self.shape)
        levels = levels.reshape(*self.shape[:-1], -1, LEVELS)
        return QuantizedWeight.from_codes(codes, levels, self.group, self.rule.quantize)


class _Nearest(torch.autograd.Function):
    """Latent ``[R, G, g]`` and ascending levels ``[R, G, 4]`` to the matrix ``[R, G, g]`` of nearest levels.

    A level's gradient is the sum over the elements that take it, as if no element were about to take another; a
    latent's goes straight through, up to as far outside the levels as the next one is inside.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor, rule: LevelRule) -> Tensor:
        units = latent.flatten(0, 1)
        quantized, scale = stored_levels(levels.flatten(0, 1), rule)
        codes = _nearest(units, quantized, scale)
        near = None
        if ctx.needs_input_grad[0]:
            values = quantized * scale.unsqueeze(-1)
            lowest = (2 * values[:, 0] - values[:, 1]).unsqueeze(-1)
            highest = (2 * values[:, 3] - values[:, 2]).unsqueeze(-1)
            near = (units >= lowest) & (units <= highest)
        ctx.save_for_backward(codes, near)
        return pick(codes, quantized * scale.unsqueeze(-1)).view_as(latent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        codes, near = ctx.saved_tensors
        of_levels = level_gradients(grad.flatten(0, 1), codes).unflatten(0, grad.shape[:2])
        return None if near is None else grad * near.view_as(grad), of_levels, None


def _nearest(latent: Tensor, quantized: Tensor, scale: Tensor) -> Tensor:
    """Which of the stored, ascending levels ``[U, 4]`` is next to each element ``[U, g]``: codes, uint8.

    Comparisons are in units of the scale ``[U]``, where the middle of two levels is exact; of two that are equally far,
    the lower one.
    """
    units = latent * torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale)).unsqueeze(-1)
    codes = torch.zeros(latent.shape, dtype=torch.uint8, device=latent.device)
    for middle in ((quantized[:, 1:] + quantized[:, :-1]) * 0.5).unbind(-1):
        codes += units > middle.unsqueeze(-1)
    return codes


@dataclass
class NearestWeight:
    """A W(1+1) matrix whose elements take the level next to their latent: both planes follow from one number, and
    change as soon as levels do.

    Attributes:
        latent: float32 ``[R, G, group]``; columns behind ``in_features`` are padding.
        parameters: float32 ``[R, G, P]``, what the levels follow from.
        shape: shape of the matrix, ``[..., N, K]``.
        group: input columns per group.
        rule: which levels a group may have.
    """

    latent: Tensor
    parameters: Tensor
    shape: tuple[int, ...]
    group: int
    rule: LevelRule = FREE

    @property
    def levels(self) -> Tensor:
        """float32 ``[R, G, 4]``, ascending."""
        levels = self.rule.levels(self.parameters)
        return levels if bool((levels.diff(dim=-1) >= 0).all()) else levels.sort(dim=-1, stable=True).values

    @classmethod
    def of(cls, weight: QuantizedWeight, float_weight: Tensor, rule: LevelRule = FREE) -> NearestWeight:
        """From a quantized weight, whose levels follow the rule, and the float weight it approximates ``[..., N, K]``.

        The latent is the float weight where the quantized weight's level is the nearest. An element that makes up for
        the errors of others has another level; its latent is moved there, further from the threshold than the rest, or
        the first steps would undo it. So the simulation starts as the quantized weight, bit for bit.
        """
        group, groups = weight.group, weight.groups
        pad = groups * group - weight.in_features
        codes = F.pad(weight.codes(), (0, pad)).reshape(-1, groups, group).long()
        target = F.pad(float_weight.float(), (0, pad)).reshape(-1, groups, group)
        levels = (weight.levels.float() * weight.scale.float().unsqueeze(-1)).reshape(-1, groups, LEVELS)
        gaps = levels.diff(dim=-1)
        middles = levels[..., :-1] + gaps / 2

        def within(margin: float) -> tuple[Tensor, Tensor]:
            """The ends of the range in which each element's level is the nearest, by so many gaps."""
            lowest = F.pad(middles + margin * gaps, (1, 0), value=-torch.inf)
            highest = F.pad(middles - margin * gaps, (0, 1), value=torch.inf)
            return lowest.gather(-1, codes), highest.gather(-1, codes)

        lowest, highest = within(0.0)
        kept, moved = (target.clamp(*within(margin)) for margin in (LATENT_MARGIN, MOVED_MARGIN))
        latent = torch.where((target >= lowest) & (target <= highest), kept, moved)
        return cls(latent, rule.parameters(levels), tuple(float_weight.shape), group, rule)

    def simulate(self) -> Tensor:
        """The matrix, float32 of ``shape``; differentiable."""
        padded = _Nearest.apply(self.latent, self.levels, self.rule)
        return padded.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        levels = self.levels
        codes = _nearest(self.latent.flatten(0, 1), *stored_levels(levels.flatten(0, 1), self.rule))
        codes = codes.reshape(len(levels), -1)[:, : self.shape[-1]].reshape(self.shape)
        levels = levels.reshape(*self.shape[:-1], -1, LEVELS)
        return QuantizedWeight.from_codes(codes, levels, self.group, self.rule.quantize)


def flips(before: QuantizedWeight, after: QuantizedWeight) -> tuple[int, int]:
    """Elements whose sign, and elements whose bitmap differ."""
    old, new = before.codes(), after.codes()
    signs = int(((old >= 2) != (new >= 2)).sum())
    return signs, int((((old == 1) | (old == 2)) != ((new == 1) | (new == 2))).sum())


def _sorted(picked: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted levels ``[R, G, 4]`` and codes into them: training may have changed the order of the levels."""
    levels, order = levels.sort(dim=-1, stable=True)
    return order.argsort(dim=-1).gather(-1, picked).to(torch.uint8), levels


class _FakeQuantize(torch.autograd.Function):
    """``lbllm.fake_quantize`` with gradients for the input and the clip factors.

    Straight through inside the clipped range, zero outside. The factors see the exact derivative of the range's ends
    for clipped values, and of the step for the others (LSQ, arXiv 1902.08153); maximum and minimum count as constants.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int, group: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values, scale = reference.quantize_activation(x, clip, bits, group)
            out = reference.dequantize_activation(values, scale, group).to(x.dtype)
        ctx.save_for_backward(x, clip, values, scale)
        ctx.bits, ctx.group = bits, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, clip, values, scale = ctx.saved_tensors
        k = x.shape[-1]
        group = ctx.group or k

        def cut(t: Tensor) -> Tensor:
            return reference.in_groups(t, group)

        grad_cut = cut(grad.float())
        rest = torch.addcdiv(cut(values).float(), cut(x.float()), scale.unsqueeze(-1), value=-1.0)
        grad_inside = torch.where(rest.abs() <= 0.5 + 1e-4, grad_cut, 0.0)
        grad_x = grad_inside.flatten(-2)[..., :k].to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        of_step = torch.linalg.vecdot(grad_inside, rest)
        grad_outside = grad_cut - grad_inside
        top = torch.where(rest < 0, grad_outside, 0.0).sum(-1)
        bottom = grad_outside.sum(-1) - top
        high, low = reference.clipped_range(cut(x.float()), torch.ones(2))
        if ctx.bits == 4:
            by_high = top + of_step / reference.INT4_MAX
            by_low = bottom - of_step / reference.INT4_MAX
        else:
            limit = reference.INT8_MAX if ctx.bits == 8 else reference.INT16_MAX
            peak = top - bottom + of_step / limit
            positive = high * clip[0] >= -low * clip[1]
            by_high, by_low = peak * positive, -peak * ~positive
        return grad_x, torch.stack([(by_high * high).sum(), (by_low * low).sum()]), None, None


_TAIL = torch.arange(reference.TAIL_CODES, 0, -1) / reference.TAIL_CODES
_NO_TAIL = torch.zeros(reference.CORE_CODES + reference.TAIL_CODES)

OF_LOW, OF_HIGH = torch.cat([_TAIL, _NO_TAIL]), torch.cat([_NO_TAIL, _TAIL.flip(0)])
"""Share of the range's lower and upper end in the position of every code."""

OF_CORE_END = 1 - OF_LOW - OF_HIGH
"""Share of a core position: one within the core, less the further out a tail's code is."""

CORE_PLACE = torch.arange(-reference.TAIL_CODES, reference.CORE_CODES + reference.TAIL_CODES).clamp(
    0, reference.CORE_CODES - 1
)
"""The core's code that a code lies at, or whose end of the core its tail begins at."""


def _by_table(
    x: Tensor, clip: Tensor, group: int, make: Callable[..., reference.CodeTable], shape: Tensor
) -> tuple[Tensor, Tensor, reference.CodeTable]:
    """What a table that knees or plane scales shape makes of an input: the values, their codes, and the table."""
    with torch.autocast(x.device.type, enabled=False):
        grouped = reference.in_groups(x.float(), group or x.shape[-1])
        table = make(*reference.clipped_range(grouped, clip), shape)
        codes = reference.table_codes(grouped, table)
        out = table.values.gather(-1, codes) * table.scale.unsqueeze(-1)
    return out.flatten(-2)[..., : x.shape[-1]].to(x.dtype), codes, table


class _TableGradients:
    """What the gradients of :func:`_by_table` have in common, whatever shapes the table.

    Attributes:
        grad: of the output, float32 ``[..., G, group]``.
        high, low: ends of the clipped ranges, float32 ``[..., G]``.
    """

    def __init__(self, x: Tensor, clip: Tensor, group: int, grad: Tensor):
        width = group or x.shape[-1]
        self._x, self._grouped = x, reference.in_groups(x.float(), width)
        self.grad = reference.in_groups(grad.float(), width)
        self.high, self.low = reference.clipped_range(self._grouped, clip)

    def of_input(self) -> Tensor:
        """Straight through within the range."""
        inside = (self._grouped <= self.high.unsqueeze(-1)) & (self._grouped >= self.low.unsqueeze(-1))
        return (self.grad * inside).flatten(-2)[..., : self._x.shape[-1]].to(self._x.dtype)

    def of_clip(self, of_high: Tensor, of_low: Tensor) -> Tensor:
        """From the gradients of the ranges' ends; maximum and minimum count as constants."""
        top, bottom = self._grouped.amax(-1).clamp_min(0.0), self._grouped.amin(-1).clamp_max(0.0)
        return torch.stack([(of_high * top).sum(), (of_low * bottom).sum()])


class _FakeQuantizeKnees(torch.autograd.Function):
    """``lbllm.fake_quantize`` with knees, with gradients for the input, the clip factors and the knees.

    The position of a code is linear in both ends of the range and in both knees: with ``step = (r_high * high - r_low *
    low) / 7`` it is ``OF_CORE_END * (CORE_PLACE - zero) * step + OF_HIGH * high + OF_LOW * low``. Its derivative is
    that of what is computed wherever no input changes its code, up to the rounding of positions to int8 and of the zero
    point, which gradients pass straight through. An input that changes its code does so half way between two positions,
    where the error stays the same, so the mean squared error has no other derivative. The paper (LBLLM, arXiv
    2604.19167) decides regions by the knees themselves and adds a soft mask for inputs that change them; that term
    would be the difference of two regions' values for one input, here of neighbours at the same distance.

    The input's gradient passes straight through within the range. Maximum and minimum count as constants.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, knees: Tensor, group: int) -> Tensor:
        out, codes, table = _by_table(x, clip, group, reference.knee_table, knees)
        ctx.save_for_backward(x, clip, knees, codes.to(torch.uint8), table.zero)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, clip, knees, codes, zero = ctx.saved_tensors
        shared = _TableGradients(x, clip, ctx.group, grad)
        by_code = shared.grad.new_zeros((*zero.shape, len(CORE_PLACE)))
        by_code.scatter_add_(-1, codes.long(), shared.grad)
        core_end, place, at_high, at_low = (t.to(grad.device) for t in (OF_CORE_END, CORE_PLACE, OF_HIGH, OF_LOW))
        of_step = (by_code * core_end * (place - zero.unsqueeze(-1))).sum(-1) / (reference.CORE_CODES - 1)
        of_high = (by_code * at_high).sum(-1) + of_step * knees[1]
        of_low = (by_code * at_low).sum(-1) - of_step * knees[0]
        of_knees = torch.stack([-(of_step * shared.low).sum(), (of_step * shared.high).sum()])
        return shared.of_input(), shared.of_clip(of_high, of_low), of_knees, None


class _FakeQuantizePlanes(torch.autograd.Function):
    """``lbllm.fake_quantize`` with plane scales, with gradients for the input and the clip factors.

    A code lies at ``(place[q] - place[zero]) * (high - low) / 15``, which is linear in both ends of the range. The
    input's gradient passes straight through within the range, and rounding is passed straight through as with knees.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, plane_scales: Tensor, group: int) -> Tensor:
        out, codes, table = _by_table(x, clip, group, reference.plane_table, plane_scales)
        places = reference.plane_places(plane_scales)
        ctx.save_for_backward(x, clip, places[codes] - places[table.zero.long()].unsqueeze(-1))
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, clip, places = ctx.saved_tensors
        shared = _TableGradients(x, clip, ctx.group, grad)
        of_range = torch.linalg.vecdot(shared.grad, places) / reference.INT4_MAX
        return shared.of_input(), shared.of_clip(of_range, -of_range), None, None


def fake_quantize(
    x: Tensor, clip: Tensor, bits: int, group: int, knees: Tensor | None = None, plane_scales: Tensor | None = None
) -> Tensor:
    """Differentiable ``lbllm.fake_quantize``: the same values."""
    if plane_scales is not None:
        return _FakeQuantizePlanes.apply(x, clip, plane_scales, group)
    if knees is None:
        return _FakeQuantize.apply(x, clip, bits, group)
    return _FakeQuantizeKnees.apply(x, clip, knees, group)


class _FakeQuantizeKv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _lbllm.fake_quantize_kv(x.float(), bits).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize_kv(x: Tensor, bits: int) -> Tensor:
    """``lbllm.fake_quantize_kv``, straight through in the backward pass."""
    return _FakeQuantizeKv.apply(x, bits)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Differentiable ``lbllm.grouped_linear``: the same values."""
    ends = offsets.tolist()
    parts = [F.linear(x[start:end], w) for start, end, w in zip([0, *ends[:-1]], ends, weight, strict=True)]
    rest = x.new_zeros((x.shape[0] - ends[-1], weight.shape[1]))
    return torch.cat([*parts, rest])


def clip_factors(logit: Tensor) -> Tensor:
    """Factors in (0, 1] on a range's upper and lower end, from logits of at most ``LOGIT``."""
    return torch.sigmoid(logit) / torch.sigmoid(torch.tensor(LOGIT))


def clip_logits(factors: Tensor) -> Tensor:
    """Inverse of :func:`clip_factors`."""
    return torch.logit(factors * torch.sigmoid(torch.tensor(LOGIT)))


def knee_shares(logit: Tensor) -> Tensor:
    """Knees, as shares of the range's lower and upper end, from logits."""
    return torch.sigmoid(logit)


def knee_logits(knees: Tensor) -> Tensor:
    """Inverse of :func:`knee_shares`."""
    return torch.logit(knees)


@dataclass(frozen=True)
class Lifted:
    """A stage of a quantized program as a function of its quantized weights, clip factors, knees and vectors.

    Attributes:
        module: takes the stage's inputs, then the weights, the coded ones, the clips, the knees and the vectors, by
            position.
        stage: the stage it was made from.
        weights: the paths of the W(1+1) weights, ``<module path>.weight``.
        coded: the paths of the weights of 4-bit codes.
        clips: the paths of the clip factors.
        knees: the paths of the knees.
        vectors: the paths of the weights of norms and of biases.
        rules: which levels each of the weights may have, by path.
    """

    module: fx.GraphModule
    stage: Stage
    weights: tuple[str, ...]
    coded: tuple[str, ...]
    clips: tuple[str, ...]
    knees: tuple[str, ...]
    vectors: tuple[str, ...]
    rules: Mapping[str, LevelRule]

    @property
    def ranges(self) -> tuple[str, ...]:
        """The paths of clip factors and knees."""
        return self.clips + self.knees

    def run(self, values: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Values:
        """The stage's outputs for one batch, with ``parameters`` by path: dequantized weights, ranges and vectors."""
        inputs = [values[name] for name in self.stage.inputs]
        extra = [parameters[path] for path in (*self.weights, *self.coded, *self.ranges, *self.vectors)]
        return dict(zip(self.stage.outputs, self.module(*inputs, *extra), strict=True))

    def constants(self) -> dict[str, Tensor]:
        """What does not train layer by layer: weights of codes, dequantized, and vectors, by path; on the stage's
        device."""
        module, found = self.stage.module, self.stored_vectors()
        for node in _unpacks(module.graph):
            if _weight_path(node) in self.coded:
                found[_weight_path(node)] = node.target(*(constant(module, value) for value in node.args))
        return found

    def stored_vectors(self) -> dict[str, Tensor]:
        """Weights of norms and biases as the program stores them, by path."""
        return {path: get_attribute(self.stage.module, path) for path in self.vectors}

    def stored(self, path: str) -> QuantizedWeight:
        """A W(1+1) weight as the program stores it."""
        node = next(n for n in _unpacks(self.stage.module.graph) if _weight_path(n) == path)
        arguments = Arguments(node)
        tensors = [get_attribute(self.stage.module, a.target) for a in arguments.pick(*WEIGHT)]
        return QuantizedWeight(*tensors, in_features=arguments.in_features, group=arguments.group)

    def on(self, device: torch.device) -> Lifted:
        """See :meth:`.layers.Stage.on`."""
        return self if device == self.stage.device else lift(self.stage.on(device))

    def discard(self) -> None:
        """See :meth:`.layers.Stage.discard`."""
        discard_attributes(self.module)
        self.stage.discard()

    def bind(self, parameters: Mapping[str, Tensor]) -> Bound:
        """The stage with fixed parameters, for streaming."""
        return Bound(self, parameters)


@dataclass(frozen=True)
class Bound:
    """A lifted stage and its parameters; runs like a :class:`~.layers.Stage`."""

    lifted: Lifted
    parameters: Mapping[str, Tensor]

    @property
    def live(self) -> frozenset[str]:
        return self.lifted.stage.live

    def on(self, device: torch.device) -> Bound:
        if device == self.lifted.stage.device:
            return self
        return Bound(self.lifted.on(device), {path: t.to(device) for path, t in self.parameters.items()})

    def discard(self) -> None:
        self.lifted.discard()

    def run(self, values: Mapping[str, Any]) -> Values:
        return self.lifted.run(values, self.parameters)


def lift(stage: Stage) -> Lifted:
    """Makes inputs of a stage's quantized weights, ranges and vectors, and its quantizers differentiable."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(stage.module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)
    planes, codes = (
        [n for n in _unpacks(stage.module.graph) if n.target is target]
        for target in (_lbllm.unpack_weight.default, _lbllm.unpack_int4.default)
    )
    weights, coded = (
        _inputs(graph, name, {node: _weight_path(node) for node in nodes}, copies)
        for name, nodes in (("weight", planes), ("coded", codes))
    )
    quantizers = [n for n in nodes if n.target is _lbllm.fake_quantize.default]
    of_clips = [Arguments(n).clip for n in quantizers]
    of_knees = [k for n in quantizers if (k := Arguments(n).knees) is not None]
    clips, knees = (
        _inputs(graph, name, {node: node.target for node in nodes}, copies)
        for name, nodes in (("clip", of_clips), ("knees", of_knees))
    )
    vectors = _inputs(graph, "vector", {n: n.target for n in nodes if _is_vector(stage.module, n)}, copies)
    for node in nodes:
        if node in copies:
            continue
        if node.target in _DIFFERENTIABLE:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: copies[n])
            copies[node] = graph.call_function(_DIFFERENTIABLE[node.target], args, kwargs)
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.eliminate_dead_code()
    rules = {_weight_path(node): _level_rule(node) for node in planes}
    return Lifted(fx.GraphModule(stage.module, graph), stage, weights, coded, clips, knees, vectors, rules)


def _inputs(
    graph: fx.Graph, name: str, paths: Mapping[fx.Node, str], copies: dict[fx.Node, fx.Node]
) -> tuple[str, ...]:
    """Makes an input for every distinct path, notes it in ``copies`` for the nodes; returns the paths."""
    made: dict[str, fx.Node] = {}
    for node, path in paths.items():
        if path not in made:
            made[path] = graph.placeholder(f"{name}_{len(made)}")
        copies[node] = made[path]
    return tuple(made)


_DIFFERENTIABLE = {
    _lbllm.fake_quantize.default: fake_quantize,
    _lbllm.fake_quantize_kv.default: fake_quantize_kv,
    _lbllm.grouped_linear.default: grouped_linear,
}


def _is_vector(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is the weight of a norm or a bias, which trains as it is."""
    if node.op != "get_attr" or node.target.rpartition(".")[2] not in ("weight", "bias"):
        return False
    tensor = get_attribute(module, node.target)
    plain = all(getattr(user.target, "namespace", "") == "aten" for user in node.users)
    return plain and tensor.dim() == 1 and tensor.is_floating_point()


def _unpacks(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target in (_lbllm.unpack_weight.default, _lbllm.unpack_int4.default)]


def _weight_path(unpack: fx.Node) -> str:
    arguments = Arguments(unpack)
    tensor = arguments.sign if unpack.target is _lbllm.unpack_weight.default else arguments.codes
    return tensor.target.rpartition(".")[0]


def _level_rule(unpack: fx.Node) -> LevelRule:
    """Which levels the linears that read a quantized weight let it have."""
    schemes = [user.meta[LINEAR].scheme for user in unpack.users if LINEAR in user.meta]
    return level_rules.get(schemes[0].levels) if schemes else FREE
