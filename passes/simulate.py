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

LATENT_MARGIN = 0.05
"""Smallest distance of a starting latent from its threshold, in widths of its pair."""

BITMAP_MARGIN = 0.02
"""Smallest distance of a starting bitmap from 0.5."""

LOGIT = 2.0
"""A clip factor is ``sigmoid(logit) / sigmoid(LOGIT)``: 1, no clipping, where training starts."""

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
        inner, inner_upper, outer_upper = _decide(self.latent, self.bitmap, *_integers(self.levels))
        return _sorted(torch.where(inner, 1 + inner_upper.long(), 3 * outer_upper.long()), self.levels)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        codes, levels = self.codes()
        groups = levels.shape[1]
        codes = codes.flatten(1)[:, : self.shape[-1]].reshape(self.shape)
        return QuantizedWeight.from_codes(codes, levels.reshape(*self.shape[:-1], groups, LEVELS), self.group)


def _integers(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels ``[R, G, 4]`` as stored: integers as floats, and their scale ``[R, G]``."""
    quantized, scale = quantize_levels(levels)
    return quantized.float(), scale.float()


def _decide(latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What elements ``[R, G, g]`` pick: whether the inner pair, and of the inner and of the outer pair the upper level.

    ``levels`` and ``scale`` are those of :func:`_integers`; half the sum of two of them is exact.
    """
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
    units = latent * torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale)).unsqueeze(-1)
    return bitmap > 0.5, units > (l1 + l2) * 0.5, units > (l0 + l3) * 0.5


def latent_matrix(latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """The matrix ``[R, G, g]`` of latents and bitmaps, with integer levels ``[R, G, 4]`` and their scale ``[R, G]``."""
    inner, inner_upper, outer_upper = _decide(latent, bitmap, levels, scale)
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
    picked = torch.where(inner, torch.where(inner_upper, l2, l1), torch.where(outer_upper, l3, l0))
    return picked * scale.unsqueeze(-1)


def latent_gradients(
    grad: Tensor, latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of latent, bitmap and levels from that of the matrix; see the module's text."""
    inner, inner_upper, outer_upper = _decide(latent, bitmap, levels, scale)
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
    pull = torch.where(inner_upper, l2, l1) - torch.where(outer_upper, l3, l0)
    middle = torch.where(inner, (l1 + l2) * 0.5, (l0 + l3) * 0.5)
    # A pair whose levels changed places during training has a negative width.
    width = torch.where(inner, (l2 - l1).abs(), (l3 - l0).abs())
    units = latent * torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale)).unsqueeze(-1)
    grad_latent = torch.where((units > middle - width) & (units < middle + width), grad, 0.0)
    codes = torch.where(inner, 1 + inner_upper.to(torch.uint8), 3 * outer_upper.to(torch.uint8))
    return grad_latent, pull * scale.unsqueeze(-1) * grad, level_gradients(grad, codes)


def level_gradients(grad: Tensor, codes: Tensor) -> Tensor:
    """``[R, G, 4]``: the sum of ``grad [R, G, g]`` over the elements of each code."""
    return torch.stack([(grad * (codes == level)).sum(-1) for level in range(LEVELS)], -1)


def _kernel(name: str, like: Tensor) -> Any:
    """A fused kernel for units of ``like [R, G, group]``."""
    # Loads TVM: seconds that a look at the catalogue of passes need not spend.
    from ..codegen.kernels.latent import latent_kernels

    return latent_kernels(like.shape[-1])[name]


def _units(*tensors: Tensor) -> list[Tensor]:
    """The tensors with rows and groups in one dimension, as the kernels take them."""
    return [t.flatten(0, 1) for t in tensors]


class _Simulate(torch.autograd.Function):
    """Latent ``[R, G, g]``, bitmap ``[R, G, g]`` and levels ``[R, G, 4]`` to the matrix ``[R, G, g]``."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, bitmap: Tensor, levels: Tensor) -> Tensor:
        operands = (latent, bitmap, *_integers(levels))
        ctx.save_for_backward(*operands)
        if latent.device.type != "cpu":
            return latent_matrix(*operands)
        out = torch.empty_like(latent)
        _kernel("latent_forward", latent)(*_units(*operands, out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        operands = ctx.saved_tensors
        if grad.device.type != "cpu":
            return latent_gradients(grad, *operands)
        latent, bitmap, levels, _ = operands
        grads = torch.empty_like(latent), torch.empty_like(bitmap), torch.empty_like(levels)
        _kernel("latent_backward", latent)(*_units(grad.contiguous(), *operands, *grads))
        return grads


class _LevelsOnly(torch.autograd.Function):
    """Codes ``uint8 [R, G, g]`` and levels ``[R, G, 4]`` to the matrix ``[R, G, g]``; only levels have a gradient."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        quantized, scale = _integers(levels)
        values = quantized * scale.unsqueeze(-1)
        if codes.device.type != "cpu":
            return values.gather(-1, codes.long())
        out = torch.empty(codes.shape)
        _kernel("codes_forward", codes)(*_units(codes, values, out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        if grad.device.type != "cpu":
            return None, level_gradients(grad, codes)
        grad_levels = torch.empty(*codes.shape[:2], LEVELS)
        _kernel("codes_backward", codes)(*_units(grad.contiguous(), codes, grad_levels))
        return None, grad_levels


@dataclass
class LevelWeight:
    """A W(1+1) matrix whose planes are frozen and whose levels train.

    Attributes:
        picked: uint8 ``[R, G, group]``, 0 to 3: the level of every element, padded as in :class:`LatentWeight`.
        levels: float32 ``[R, G, 4]``.
        shape: shape of the matrix, ``[..., N, K]``.
        group: input columns per group.
    """

    picked: Tensor
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
        return cls(codes, levels.reshape(-1, groups, LEVELS), shape, weight.group)

    def simulate(self) -> Tensor:
        """The matrix, float32 of ``shape``; differentiable in the levels."""
        padded = _LevelsOnly.apply(self.picked, self.levels)
        return padded.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def fold(self) -> QuantizedWeight:
        """The packed weight; its dequantized form equals :meth:`simulate` bit for bit."""
        codes, levels = _sorted(self.picked.long(), self.levels)
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


def clip_factors(logit: Tensor) -> Tensor:
    """Factors in (0, 1] on a range's upper and lower end, from logits of at most ``LOGIT``."""
    return torch.sigmoid(logit) / torch.sigmoid(torch.tensor(LOGIT))


def clip_logits(factors: Tensor) -> Tensor:
    """Inverse of :func:`clip_factors`."""
    return torch.logit(factors * torch.sigmoid(torch.tensor(LOGIT)))


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
