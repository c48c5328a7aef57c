"""Differentiable stand-ins for quantized weights and activations, and the sub-graphs that use them.

Training cannot move integers, so a stage trains *latent* quantities and quantizes them in every forward pass, exactly
as the packed format would; the backward pass goes straight through the rounding.

A weight has a latent value, a relaxed bitmap in [0, 1] and four levels per group (LBLLM, arXiv 2604.19167, equation 3).
With ``inner = bitmap > 0.5`` an element belongs to the pair (level 1, level 2) or (level 0, level 3), and
``upper = latent > middle of its pair`` picks one of the two. Its gradients:

* latent: straight through where it lies within a pair's width of the pair's middle, else 0, so that it cannot drift;
* bitmap: the difference between what the two pairs would give;
* levels: the exact sum over the elements that use the level (int8 rounding straight through).

:func:`lift` turns a stage of a quantized program into a function of its weights and clip factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..codegen import ops as ops
from ..codegen import reference
from ..codegen.format import LEVELS, QuantizedWeight, group_count, quantize_levels
from .layers import Stage, Values
from .program import get_attribute

CHUNK = 1 << 16
"""Elements of a weight handled at a time, so that what a chunk needs stays in the processor's cache."""

LATENT_MARGIN = 0.05
"""Smallest distance of a starting latent from its threshold, in widths of its pair."""

STEEP = 3e38
"""Slope of the clamped line that stands in for a step function."""

BITMAP_MARGIN = 0.02
"""Smallest distance of a starting bitmap from 0.5."""

_lbllm = torch.ops.lbllm


@dataclass
class LatentWeight:
    """The trainable form of one W(1+1) matrix (or stack of them), rows flattened.

    Attributes:
        latent: float32 ``[R, G, group]``; columns behind ``in_features`` are padding.
        bitmap: float32 ``[R, G, group]`` in [0, 1]; above 0.5 means the inner pair.
        levels: float32 ``[R, G, 4]``; sorted at first, maybe not after training.
        shape: shape of the matrix, ``[..., N, K]``.
        group: input columns per group.
    """

    latent: Tensor
    bitmap: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, weight: QuantizedWeight, float_weight: Tensor) -> LatentWeight:
        """From a quantized weight and the float weight it approximates ``[..., N, K]``.

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
        return cls(latent, bitmap, levels, tuple(float_weight.shape), group)

    def simulate(self) -> Tensor:
        """The matrix these parameters stand for, float32 of ``shape``; differentiable."""
        padded = _Simulate.apply(self.latent, self.bitmap, self.levels)
        return padded.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes ``uint8 [R, G, group]`` into sorted levels ``float32 [R, G, 4]``."""
        quantized, _, per_unit = _integers(self.levels)
        inner, _, _, offset = _decide(self.latent, self.bitmap, quantized, per_unit)
        upper = _step(offset)
        picked = torch.where(inner > 0.5, 1 + upper, 3 * upper).long()
        return _sorted(picked, self.levels)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        codes, levels = self.codes()
        groups = levels.shape[1]
        codes = codes.flatten(1)[:, : self.shape[-1]].reshape(self.shape)
        return QuantizedWeight.from_codes(codes, levels.reshape(*self.shape[:-1], groups, LEVELS), self.group)


def _step(x: Tensor) -> Tensor:
    """1.0 where ``x > 0``, else 0.0, in place: several times faster on a CPU than comparing and selecting."""
    return x.mul_(STEEP).clamp_(0.0, 1.0)


def _decide(latent: Tensor, bitmap: Tensor, quantized: Tensor, per_unit: Tensor) -> tuple[Tensor, ...]:
    """What a chunk's elements pick, in units of the group's scale, where all levels are integers and sums exact.

    Args:
        latent, bitmap: ``[r, G, g]``.
        quantized: integer levels as floats, ``[r, G, 4]``.
        per_unit: reciprocal of the scale, ``[r, G, 1]``.

    Returns:
        ``(inner, low, width, offset)``, all ``[r, G, g]``: membership of the inner pair (0 or 1), the pair's lower
        level, its width, and the latent's offset from the pair's middle.
    """
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in quantized.unbind(-1))
    inner = _step(bitmap - 0.5)
    low = torch.addcmul(l0, inner, l1 - l0)
    width = torch.addcmul(l3 - l0, inner, (l2 - l1) - (l3 - l0))
    offset = torch.sub(latent * per_unit, low).add_(width, alpha=-0.5)
    return inner, low, width, offset


def _integers(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels ``[R, G, 4]`` as stored: integers as floats, their scale ``[R, G, 1]`` and its reciprocal."""
    quantized, scale = quantize_levels(levels)
    scale = scale.float().unsqueeze(-1)
    return quantized.float(), scale, torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))


class _Simulate(torch.autograd.Function):
    """Latent ``[R, G, g]``, bitmap ``[R, G, g]`` and levels ``[R, G, 4]`` to the matrix ``[R, G, g]``."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, bitmap: Tensor, levels: Tensor) -> Tensor:
        quantized, scale, per_unit = _integers(levels)
        ctx.save_for_backward(latent, bitmap, quantized, scale, per_unit)
        out = torch.empty_like(latent)
        for rows in _chunks(latent):
            _, low, width, offset = _decide(latent[rows], bitmap[rows], quantized[rows], per_unit[rows])
            torch.mul(torch.addcmul(low, _step(offset), width), scale[rows], out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent, bitmap, quantized, scale, per_unit = ctx.saved_tensors
        grad_latent, grad_bitmap, grad_levels = (torch.empty_like(t) for t in (latent, bitmap, quantized))
        for rows in _chunks(latent):
            g, units = grad[rows], latent[rows] * per_unit[rows]
            inner, _, width, offset = _decide(latent[rows], bitmap[rows], quantized[rows], per_unit[rows])
            l0, l1, l2, l3 = (v.unsqueeze(-1) for v in quantized[rows].unbind(-1))
            inner_upper = _step(units - (l1 + l2) * 0.5)
            outer_upper = _step(units - (l0 + l3) * 0.5)
            pull = torch.addcmul(l1 - l0, inner_upper, l2 - l1).sub_(outer_upper * (l3 - l0))
            torch.mul(pull.mul_(scale[rows]), g, out=grad_bitmap[rows])
            # A pair whose levels changed places during training has a negative width.
            inside = _step(width.abs_().sub_(offset.abs()))
            torch.mul(g, inside, out=grad_latent[rows])
            of_inner = g * inner
            of_outer = g - of_inner
            low_inner, low_outer = of_inner.sum(-1), of_outer.sum(-1)
            high_inner, high_outer = of_inner.mul_(inner_upper).sum(-1), of_outer.mul_(outer_upper).sum(-1)
            parts = (low_outer - high_outer, low_inner - high_inner, high_inner, high_outer)
            torch.stack(parts, -1, out=grad_levels[rows])
        return grad_latent, grad_bitmap, grad_levels


def _chunks(latent: Tensor) -> list[slice]:
    rows, per_row = latent.shape[0], latent[0].numel()
    step = max(CHUNK // per_row, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


class _LevelsOnly(torch.autograd.Function):
    """Planes ``uint8 [R, G, g]`` and levels ``[R, G, 4]`` to the matrix ``[R, G, g]``; only levels have a gradient."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, upper: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(inner, upper)
        quantized, scale, _ = _integers(levels)
        out = torch.empty(inner.shape)
        for rows in _chunks(inner):
            l0, l1, l2, l3 = (v.unsqueeze(-1) for v in quantized[rows].unbind(-1))
            of_inner, high = inner[rows].float(), upper[rows].float()
            low = torch.addcmul(l0, of_inner, l1 - l0)
            width = torch.addcmul(l3 - l0, of_inner, (l2 - l1) - (l3 - l0))
            torch.mul(torch.addcmul(low, high, width), scale[rows], out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        inner, upper = ctx.saved_tensors
        grad_levels = grad.new_empty((*inner.shape[:2], LEVELS))
        for rows in _chunks(inner):
            g, high = grad[rows], upper[rows].float()
            of_inner = g * inner[rows].float()
            of_outer = g - of_inner
            low_inner, low_outer = of_inner.sum(-1), of_outer.sum(-1)
            high_inner, high_outer = of_inner.mul_(high).sum(-1), of_outer.mul_(high).sum(-1)
            parts = (low_outer - high_outer, low_inner - high_inner, high_inner, high_outer)
            torch.stack(parts, -1, out=grad_levels[rows])
        return None, None, grad_levels


@dataclass
class LevelWeight:
    """A W(1+1) matrix whose planes are frozen and whose levels train.

    Attributes:
        inner, upper: uint8 ``[R, G, group]``, 0 or 1: bitmap and sign plane, padded as in :class:`LatentWeight`.
        levels: float32 ``[R, G, 4]``.
        shape: shape of the matrix, ``[..., N, K]``.
        group: input columns per group.
    """

    inner: Tensor
    upper: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> LevelWeight:
        groups = weight.groups
        codes = F.pad(weight.codes(), (0, groups * weight.group - weight.in_features))
        codes = codes.reshape(-1, groups, weight.group)
        levels = weight.levels.float() * weight.scale.float().unsqueeze(-1)
        shape = (*weight.sign.shape[:-1], weight.in_features)
        inner, upper = ((codes == 1) | (codes == 2)).to(torch.uint8), (codes >= 2).to(torch.uint8)
        return cls(inner, upper, levels.reshape(-1, groups, LEVELS), shape, weight.group)

    def simulate(self) -> Tensor:
        """The matrix, float32 of ``shape``; differentiable in the levels."""
        padded = _LevelsOnly.apply(self.inner, self.upper, self.levels)
        return padded.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        picked = torch.where(self.inner > 0, 1 + self.upper, 3 * self.upper).long()
        codes, levels = _sorted(picked, self.levels)
        codes = codes.flatten(1)[:, : self.shape[-1]].reshape(self.shape)
        levels = levels.reshape(*self.shape[:-1], -1, LEVELS)
        return QuantizedWeight.from_codes(codes, levels, self.group)


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
        groups = group_count(k, group)

        def cut(t: Tensor) -> Tensor:
            return F.pad(t, (0, groups * group - k)).unflatten(-1, (groups, group))

        x_cut, grad_cut = cut(x), cut(grad)
        steps = x_cut / scale.unsqueeze(-1)
        rest = cut(values.float()) - steps
        above, below = rest < -0.5 - 1e-4, rest > 0.5 + 1e-4
        inside = ~(above | below)
        grad_x = (grad_cut * inside).flatten(-2)[..., :k]
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        of_step = (grad_cut * rest * inside).sum(-1)
        top, bottom = (grad_cut * above).sum(-1), (grad_cut * below).sum(-1)
        high, low = x_cut.amax(-1).clamp_min(0.0), x_cut.amin(-1).clamp_max(0.0)
        if ctx.bits == 4:
            by_high = top + of_step / reference.INT4_MAX
            by_low = bottom - of_step / reference.INT4_MAX
        else:
            limit = reference.INT8_MAX if ctx.bits == 8 else reference.INT16_MAX
            peak = top - bottom + of_step / limit
            positive = high * clip[0] >= -low * clip[1]
            by_high, by_low = peak * positive, -peak * ~positive
        return grad_x, torch.stack([(by_high * high).sum(), (by_low * low).sum()]), None, None


def fake_quantize(x: Tensor, clip: Tensor, bits: int, group: int) -> Tensor:
    """Differentiable ``lbllm.fake_quantize``: the same values."""
    return _FakeQuantize.apply(x, clip, bits, group)


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


@dataclass(frozen=True)
class Lifted:
    """A stage of a quantized program as a function of its quantized weights and clip factors.

    Attributes:
        module: takes the stage's inputs, then the weights, then the clips, by position.
        stage: the stage it was made from.
        weights: the paths of the quantized weights, ``<module path>.weight``.
        clips: the paths of the clip factors.
    """

    module: fx.GraphModule
    stage: Stage
    weights: tuple[str, ...]
    clips: tuple[str, ...]

    def run(self, values: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Values:
        """The stage's outputs for one batch, with ``parameters`` by path (dequantized weights, clip factors)."""
        inputs = [values[name] for name in self.stage.inputs]
        extra = [parameters[path] for path in (*self.weights, *self.clips)]
        return dict(zip(self.stage.outputs, self.module(*inputs, *extra), strict=True))

    def stored(self, path: str) -> QuantizedWeight:
        """A weight as the program stores it."""
        node = next(n for n in _unpacks(self.stage.module.graph) if _weight_path(n) == path)
        tensors = [get_attribute(self.stage.module, a.target) for a in node.args[:4]]
        return QuantizedWeight(*tensors, *node.args[4:])

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

    def run(self, values: Mapping[str, Any]) -> Values:
        return self.lifted.run(values, self.parameters)


def lift(stage: Stage) -> Lifted:
    """Makes inputs of a stage's quantized weights and clip factors, and its quantizers differentiable."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(stage.module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)
    weights: dict[str, fx.Node] = {}
    for node in _unpacks(stage.module.graph):
        path = _weight_path(node)
        if path not in weights:
            weights[path] = graph.placeholder(f"weight_{len(weights)}")
        copies[node] = weights[path]
    clips: dict[str, fx.Node] = {}
    for node in nodes:
        if node.target is _lbllm.fake_quantize.default:
            clip = node.args[1]
            if clip.target not in clips:
                clips[clip.target] = graph.placeholder(f"clip_{len(clips)}")
            copies[clip] = clips[clip.target]
    for node in nodes:
        if node in copies:
            continue
        if node.target in _DIFFERENTIABLE:
            args = fx.node.map_arg(node.args, lambda n: copies[n])
            copies[node] = graph.call_function(_DIFFERENTIABLE[node.target], args)
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.eliminate_dead_code()
    return Lifted(fx.GraphModule(stage.module, graph), stage, tuple(weights), tuple(clips))


_DIFFERENTIABLE = {
    _lbllm.fake_quantize.default: fake_quantize,
    _lbllm.fake_quantize_kv.default: fake_quantize_kv,
    _lbllm.grouped_linear.default: grouped_linear,
}


def _unpacks(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is _lbllm.unpack_weight.default]


def _weight_path(unpack: fx.Node) -> str:
    return unpack.args[0].target.removesuffix(".sign")
