"""The exact meaning of every lbllm operator, slow and plain. Kernels must agree with it bit for bit.

Activations. A token's channels are cut into groups like the weight's (or one group for the whole token). Every group is
quantized dynamically to *values* (small signed integers) times one fp32 *scale*:

* 4 bit, asymmetric: ``hi = max(max(x) * clip[0], 0)``, ``lo = min(min(x) * clip[1], 0)`` (both clamped to +-1.5e38),
  ``scale = max(hi - lo, 1e-30) / 15``, ``zero = clamp(round(-lo / scale), 0, 15)``,
  ``value = clamp(round(x / scale) + zero, 0, 15) - zero``. The values of a group lie in a window of 16 around zero, and
  kernels rely on it.
* 8 and 16 bit, symmetric: ``peak = max(hi, -lo)``, ``scale = max(peak, 1e-30) / q`` with ``q = 127`` or ``32767``,
  ``value = clamp(round(x / scale), -q, q)``.
* 4 bit with *knees* or *plane scales*: ``scale`` as for 8 bits, and a code picks one of 16 int8 values of the group's
  own *table* (:func:`knee_table`, :func:`plane_table`); ``value`` is the entry next to ``x``.

All divisions are fp32 IEEE divisions, rounding is half to even, and no multiply and add are contracted. The sum that
rounds stays in fp32 until it is clamped, so that large quotients saturate. Inputs must be finite: for NaN or infinite
inputs the values are unspecified (but in range).

Linears. ``acc[m, n, g]`` is the int32 dot product of a group's values and int8 levels (exact in any order). The output
is ``y = fma(float(acc[g]), x_scale[m, g] * w_scale[n, g], y)`` from ``y = 0`` over ascending groups, then ``y + bias``:
one correctly rounded fp32 fused multiply-add per group, so every kernel that keeps the group order gives equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import FormatError
from .format import Int4Weight, QuantizedWeight, Weight
from .sizes import GROUPS, PLANES, group_count

RANGE_MAX = 1.5e38
"""Clipped bounds of a group are clamped to this, so that ``hi - lo`` cannot overflow fp32."""

RANGE_MIN = 1e-30
"""Smallest range (4 bit) or peak (8, 16 bit) of a group: an all-zero group gets a tiny scale, not zero."""

INT16_MAX = 32767
INT8_MAX = 127
INT4_MAX = 15

CORE_CODES = 8
"""Codes between the knees, ends included."""

TAIL_CODES = 4
"""Codes beyond each knee."""

UNIFORM_PLANES = (1.0, 2.0, 4.0, 8.0)
"""Plane scales with which codes are evenly spaced."""

PLANE_SCALE_MAX = 16.0
"""Largest scale of a plane: twice what the largest one has where codes are evenly spaced."""

_HEAD_ROWS = 4096
"""Rows of a head that are multiplied at a time: in float64 a vocabulary of them is larger than a layer."""


def value_dtype(bits: int) -> torch.dtype:
    """Storage type of quantized activation values: int8 for 4 and 8 bits, int16 for 16 bits."""
    return torch.int16 if bits == 16 else torch.int8


def in_groups(x: Tensor, group: int) -> Tensor:
    """``[..., K]`` to ``[..., G, group]``, the tail padded with zeros (zero never widens a clipped range)."""
    k = x.shape[-1]
    return F.pad(x, (0, -k % group)).unflatten(-1, (group_count(k, group), group))


def clipped_range(grouped: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """``hi`` and ``lo`` of every group of ``grouped [..., G, group]``, float32 ``[..., G]``."""
    high = (grouped.amax(-1) * clip[0]).clamp(0.0, RANGE_MAX)
    low = (grouped.amin(-1) * clip[1]).clamp(-RANGE_MAX, 0.0)
    return high, low


@dataclass(frozen=True)
class CodeTable:
    """What the codes of one group mean with knees or plane scales.

    Attributes:
        values: float32 ``[..., 16]``, ascending integers in [-127, 127].
        scale: float32 ``[...]``: what they are multiples of.
        zero: float32 ``[...]``: the code of zero, an integer; with knees its place among the core's eight codes.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def thresholds(self) -> Tensor:
        """Float32 ``[..., 15]``: an input above the first ``i`` of them has code ``i``."""
        return (self.values[..., 1:] + self.values[..., :-1]) * 0.5 * self.scale.unsqueeze(-1)


def knee_table(high: Tensor, low: Tensor, knees: Tensor) -> CodeTable:
    """The tables of groups with the ranges ``low <= 0 <= high [...]``.

    LBLLM (arXiv 2604.19167, equation 2) cuts a token's range at two learned knees into a negative tail, a core and a
    positive tail, each of them uniform with a step and an offset of its own. Where the 16 codes go is not stated there;
    here the tails have four each and the core eight. Ours, too, are: knees as shares of the range's ends; zero as a
    code of the core (activations of exactly zero are common, and so cost nothing); steps between a tail and the core as
    wide as the tail's own; positions that are integers times the 8-bit scale, so that the products stay those of 8-bit
    activations. In fp32, with ``top = high / scale`` and ``bottom = low / scale``::

        step = max(min(top * knees[1], 127) - max(bottom * knees[0], -127), 1e-30) / 7
        zero = clamp(round(-max(bottom * knees[0], -127) / step), 0, 7)
        H, L = round(top), round(bottom)
        core[i] = clamp(round((i - zero) * step), L, H)               i = 0 .. 7
        positive tail[j] = round((core[7] * (4 - j) + H * j) / 4)     j = 1 .. 4
        negative tail[j] = round((core[0] * (4 - j) + L * j) / 4)     j = 4 .. 1

    The sums are exact, so nothing depends on whether they are contracted. An input has the code of the entry next to
    it; one that lies on the middle of two, ``(T[i] + T[i + 1]) / 2 * scale``, has the lower one.

    Args:
        high, low: float32 ``[...]``, as :func:`clipped_range` gives them.
        knees: float32 ``[2]``: shares in (0, 1) of ``low`` and of ``high`` at which core and tails meet.
    """
    scale = torch.maximum(high, -low).clamp_min(RANGE_MIN) / INT8_MAX
    top, bottom = high / scale, low / scale
    upper, lower = (top * knees[1]).clamp_max(INT8_MAX), (bottom * knees[0]).clamp_min(-INT8_MAX)
    step = (upper - lower).clamp_min(RANGE_MIN) / (CORE_CODES - 1)
    zero = (-lower / step).round().clamp(0, CORE_CODES - 1)
    top, bottom = top.round().unsqueeze(-1), bottom.round().unsqueeze(-1)
    codes = torch.arange(CORE_CODES, dtype=torch.float32, device=high.device)
    core = ((codes - zero.unsqueeze(-1)) * step.unsqueeze(-1)).round()
    core = torch.minimum(torch.maximum(core, bottom), top)
    outward = torch.arange(1, TAIL_CODES + 1, dtype=torch.float32, device=high.device)
    above = (core[..., -1:] * (TAIL_CODES - outward) + top * outward) / TAIL_CODES
    below = (core[..., :1] * (TAIL_CODES - outward) + bottom * outward) / TAIL_CODES
    return CodeTable(torch.cat([below.round().flip(-1), core, above.round()], -1), scale, zero)


def plane_places(plane_scales: Tensor) -> Tensor:
    """Where codes 0 to 15 lie, in steps: sums of the scales ``[4]`` of the planes in which a code has a one, the lowest
    plane's first; float32 ``[16]``."""
    codes = torch.arange(1 << PLANES, device=plane_scales.device)
    places = torch.zeros(len(codes), device=plane_scales.device)
    for plane in range(PLANES):
        places = torch.where((codes >> plane & 1) == 1, places + plane_scales[plane], places)
    return places


def plane_table(high: Tensor, low: Tensor, plane_scales: Tensor) -> CodeTable:
    """The tables of groups with the ranges ``low <= 0 <= high [...]``.

    A 4-bit code is four binary planes, ``q = q_0 + 2 q_1 + 4 q_2 + 8 q_3``. BWA (ACL 2025 Findings 459, arXiv
    2504.05352) replaces 1, 2, 4 and 8 by fitted scales. Its full text was not at hand: that all tokens share the
    scales, that zero stays a code and that ``x`` has the code of the entry next to it is ours. Positions are integers
    times the 8-bit scale, as with knees. In fp32, with ``top = high / scale`` and ``bottom = low / scale``::

        step     = max(top - bottom, 1e-30) / 15
        zero     = clamp(round(-bottom / step), 0, 15)
        place[q] = sum of plane_scales[b] over the planes b in which q has a one, from b = 0 on
        value[q] = clamp(round((place[q] - place[zero]) * step), -127, 127)

    Args:
        high, low: float32 ``[...]``, as :func:`clipped_range` gives them.
        plane_scales: float32 ``[4]``, each positive and at least the sum of those before it, so that values ascend;
            ``UNIFORM_PLANES`` are evenly spaced codes.
    """
    scale = torch.maximum(high, -low).clamp_min(RANGE_MIN) / INT8_MAX
    top, bottom = high / scale, low / scale
    step = (top - bottom).clamp_min(RANGE_MIN) / INT4_MAX
    zero = (-bottom / step).round().clamp(0, INT4_MAX)
    places = plane_places(plane_scales)
    offset = places[zero.long()].unsqueeze(-1)
    return CodeTable(((places - offset) * step.unsqueeze(-1)).round().clamp(-INT8_MAX, INT8_MAX), scale, zero)


def table_codes(grouped: Tensor, table: CodeTable) -> Tensor:
    """Codes 0 to 15 of ``grouped [..., G, group]``, int64."""
    codes = torch.zeros(grouped.shape, dtype=torch.uint8, device=grouped.device)
    # Compared one by one: to search them for every element takes torch three times as long.
    for threshold in table.thresholds.split(1, -1):
        codes += grouped > threshold
    return codes.long()


def quantize_activation(
    x: Tensor, clip: Tensor, bits: int, group: int, knees: Tensor | None = None, plane_scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantizes ``x [..., K]`` (fp32) per token and group (see the module docstring).

    Args:
        x: float32, finite.
        clip: float32 ``[2]``: factors in (0, 1] on the group's maximum and minimum.
        bits: 4, 8 or 16.
        group: channels per scale; 0 means one scale for the whole token.
        knees: float32 ``[2]``, for 4 bits alone: see :func:`knee_table`.
        plane_scales: float32 ``[4]``, for 4 bits without knees alone: see :func:`plane_table`.

    Returns:
        ``(values, scale)``: int8 (int16 for 16 bits) ``[..., K]`` and float32 ``[..., G]``.

    Raises:
        FormatError: knees or plane scales with other than 4 bits, or both.
    """
    k = x.shape[-1]
    grouped = in_groups(x.float(), group or k)
    high, low = clipped_range(grouped, clip)
    table = None
    if knees is not None:
        table = knee_table(high, low, knees)
    elif plane_scales is not None:
        table = plane_table(high, low, plane_scales)
    if table is not None:
        if bits != 4:
            name = "plane scales" if knees is None else "knees"
            raise FormatError(f"{bits}-bit activations have no {name}; only those of 4 bits do")
        if knees is not None and plane_scales is not None:
            raise FormatError("4-bit activations have knees or plane scales, not both")
        values, scale = table.values.gather(-1, table_codes(grouped, table)), table.scale
    elif bits == 4:
        scale = (high - low).clamp_min(RANGE_MIN) / INT4_MAX
        zero = (-low / scale).round().clamp(0, INT4_MAX).unsqueeze(-1)
        values = ((grouped / scale.unsqueeze(-1)).round() + zero).clamp(0, INT4_MAX) - zero
    else:
        limit = INT8_MAX if bits == 8 else INT16_MAX
        scale = torch.maximum(high, -low).clamp_min(RANGE_MIN) / limit
        values = (grouped / scale.unsqueeze(-1)).round().clamp(-limit, limit)
    return values.flatten(-2)[..., :k].to(value_dtype(bits)), scale


def dequantize_activation(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """``values [..., K]`` times ``scale [..., G]`` as float32."""
    k = values.shape[-1]
    return values.float() * scale.repeat_interleave(group or k, -1)[..., :k]


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Correctly rounded fp32 ``a * b + c``, by rounding to odd in fp64 (Boldo and Melquiond, 2008).

    The product of two fp32 numbers is exact in fp64; the sum is rounded to odd there, which makes the second rounding,
    to fp32, the only one that counts.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    # No number where an operand is infinite or no number itself, and then there is nothing to round.
    error = (product - (total - back) + (addend - back)).nan_to_num_(0.0)
    bits = total.view(torch.int64)
    outwards = (error.sign_() * total.sign()).to(torch.int64)
    return (bits + outwards * (1 - (bits & 1))).view(torch.float64).float()


def _scaled_group_sum(accumulators: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``acc [G, M, N]``, ``x_scale [M, G or 1]``, ``w_scale [N, G or 1]`` to fp32 ``[M, N]`` in the stated order."""
    groups, m, n = accumulators.shape
    x_scale, w_scale = x_scale.expand(m, groups), w_scale.float().expand(n, groups)
    out = accumulators.new_zeros((m, n), dtype=torch.float32)
    for g in range(groups):
        product = x_scale[:, g, None] * w_scale[None, :, g]
        out = fused_multiply_add(accumulators[g].float(), product, out)
    return out if bias is None else out + bias


def _integer_accumulators(values: Tensor, weight: Tensor, group: int) -> Tensor:
    """Group dot products ``[G, M, N]`` of integer ``values [M, K]`` and ``weight [N, K]``, as exact float64."""
    a = in_groups(values.double(), group).transpose(0, 1)
    b = in_groups(weight.double(), group).permute(1, 2, 0)
    return torch.bmm(a, b)


def _accumulated(x_scale: Tensor, weight: QuantizedWeight | Int4Weight) -> int:
    """Columns of one accumulator, from the number of scales that a token has."""
    count = x_scale.shape[-1]
    fitting = (g for g in GROUPS if weight.group % g == 0 and group_count(weight.in_features, g) == count)
    # Of groups that give equally many, one that is as long as the row, all are the same.
    return weight.group if count == 1 else next(fitting, weight.group)


def bit_linear(values: Tensor, x_scale: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``[..., K]`` quantized activations times a W(1+1) matrix, float32 ``[..., N]``.

    ``x_scale`` is ``[..., 1]``, or has a scale for each of the weight's groups or for smaller ones.
    """
    k = values.shape[-1]
    weight = weight.refined(_accumulated(x_scale, weight))
    accumulators = _integer_accumulators(values.reshape(-1, k), weight.integer_levels(), weight.group)
    out = _scaled_group_sum(accumulators, x_scale.reshape(-1, x_scale.shape[-1]), weight.scale, bias)
    return out.reshape(*values.shape[:-1], weight.out_features)


def _by_rows(
    values: Tensor,
    x_scale: Tensor,
    group: int,
    bias: Tensor | None,
    count: int,
    some: Callable[[slice], tuple[Tensor, Tensor]],
) -> Tensor:
    """A product with a matrix of ``count`` rows, of which ``some`` gives a part and its scales ``[N, G or 1]``."""
    k = values.shape[-1]
    flat, x_scale = values.reshape(-1, k), x_scale.reshape(-1, x_scale.shape[-1])
    parts = []
    for start in range(0, count, _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        integers, w_scale = some(rows)
        accumulators = _integer_accumulators(flat, integers, group or k)
        parts.append(_scaled_group_sum(accumulators, x_scale, w_scale, None if bias is None else bias[rows]))
    return torch.cat(parts, -1).reshape(*values.shape[:-1], count)


def int8_linear(
    values: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    """``[..., K]`` quantized activations times an int8-per-row matrix ``[N, K]``, float32 ``[..., N]``.

    ``group`` is the activations' (0: the whole token is one group); the weight has one fp32 scale a row.
    """
    return _by_rows(values, x_scale, group, bias, weight.shape[0], lambda rows: (weight[rows], w_scale[rows, None]))


def int4_linear(values: Tensor, x_scale: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``[..., K]`` quantized activations times a matrix of 4-bit codes, float32 ``[..., N]``; ``x_scale`` as for
    :func:`bit_linear`."""
    weight = weight.refined(_accumulated(x_scale, weight))

    def some(rows: slice) -> tuple[Tensor, Tensor]:
        part = weight.rows(rows)
        return part.integer_levels(), part.scale

    return _by_rows(values, x_scale, weight.group, bias, weight.out_features, some)


def linear(values: Tensor, x_scale: Tensor, weight: Weight, bias: Tensor | None, group: int) -> Tensor:
    """``[..., K]`` quantized activations times a matrix of any kind; ``group`` is that of the linear."""
    if isinstance(weight, QuantizedWeight):
        return bit_linear(values, x_scale, weight, bias)
    if isinstance(weight, Int4Weight):
        return int4_linear(values, x_scale, weight, bias)
    return int8_linear(values, x_scale, *weight, bias, group)


def quantize_kv(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantizes keys or values ``[..., D]`` per token and head, asymmetric, for the KV cache.

    Returns:
        For 4 and 8 bits ``(uint8 [..., D * bits / 8], float16 [..., 2])``: codes (two to a byte at 4 bits, low nibble
        first, an odd ``D`` padded with zero) and ``(scale, zero point)``; the scale is rounded to fp16 before it is
        used. For 16 bits ``(float16 [..., D], float16 [..., 0])``.
    """
    if bits == 16:
        return x.clamp(-65504.0, 65504.0).half(), x.new_empty((*x.shape[:-1], 0), dtype=torch.float16)
    limit = (1 << bits) - 1
    high, low = x.amax(-1).clamp_min(0.0).float(), x.amin(-1).clamp_max(0.0).float()
    scale = ((high - low) / limit).clamp(2.0**-24, 65504.0).half()
    zero = (-low / scale.float()).round().clamp(0, limit)
    codes = ((x.float() / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, limit).to(torch.uint8)
    if bits == 4:
        codes = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
        codes = codes[..., 0] | (codes[..., 1] << 4)
    return codes, torch.stack([scale, zero.half()], -1)


def dequantize_kv(codes: Tensor, params: Tensor, bits: int, head_dim: int) -> Tensor:
    """Inverse of :func:`quantize_kv`, float32 ``[..., D]``."""
    if bits == 16:
        return codes.float()
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :head_dim]
    params = params.float()
    return (codes.float() - params[..., 1:2]) * params[..., 0:1]


def attention_places(key_mask: Tensor, counted: bool) -> Tensor:
    """Where every slot of ``key_mask [B, T]`` stands in its sequence, int64 ``[B, T]``; -1 before the first token.

    Slots count from the sequence's first token on; with ``counted``, tokens alone count, so that a hole takes no place.
    """
    seen = (key_mask != 0).cumsum(-1)
    return (seen if counted else (seen > 0).cumsum(-1)) - 1


def attention_mask(
    key_mask: Tensor, queries: int, past: int, window: int, chunk: int = 0, counted: bool = False
) -> Tensor:
    """Boolean ``[B, 1, S, T]``: query slot ``past + i`` sees key slot ``j <= past + i`` that ``key_mask [B, T]`` marks,
    with a sliding ``window > 0`` only ``j > past + i - window``, and with a ``chunk > 0`` only keys whose place
    (:func:`attention_places`) is in the query's chunk of that many."""
    total = key_mask.shape[1]
    query = torch.arange(past, past + queries, device=key_mask.device)[:, None]
    key = torch.arange(total, device=key_mask.device)[None, :]
    visible = key <= query
    if window > 0:
        visible = visible & (key > query - window)
    visible = visible[None, None] & (key_mask != 0)[:, None, None, :]
    if chunk > 0:
        of_key = attention_places(key_mask, counted).div(chunk, rounding_mode="floor")
        visible = visible & (of_key[:, None, None, :] == of_key[:, None, past : past + queries, None])
    return visible


def soft_cap(scores: Tensor, bound: float) -> Tensor:
    """``bound * tanh(scores / bound)``; with a bound of 0, the scores."""
    return bound * torch.tanh(scores / bound) if bound else scores


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Shares of keys by their ``scores [B, H, S, T]``, of which -inf hides one; a row that sees none gives zeros.

    Args:
        scores: of every key.
        sinks: ``[H]`` further scores, whose shares are left out.
    """
    best = scores.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks[:, None, None].to(scores.dtype)
    if sink is not None:
        best = torch.maximum(best, sink)
    shares = (scores - best.clamp_min(torch.finfo(scores.dtype).min)).exp()
    total = shares.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - best).exp()
    return shares / total.masked_fill(total == 0, 1.0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention whose scores are capped, or of which sinks take a share: ``[B, H, S, Dv]``.

    The score of a key is ``soft_cap(scale * query @ key) + mask``.

    Args:
        query: ``[B, H, S, D]``.
        key, value: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``; ``H`` is a multiple of ``Hkv``.
        mask: float, broadcast to ``[B, H, S, T]``: what is added to the scores.
        scale: softmax scale.
        softcap: see :func:`soft_cap`.
        sinks: ``[H]``, see :func:`softmax_with_sinks`.
    """
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = soft_cap(query @ key.transpose(-1, -2) * scale, softcap) + mask
    return softmax_with_sinks(scores, sinks) @ value


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_params: Tensor,
    value_codes: Tensor,
    value_params: Tensor,
    key_mask: Tensor,
    past: int,
    scale: float,
    window: int,
    bits: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    counted: bool = False,
    chunk: int = 0,
) -> Tensor:
    """Attention over a quantized KV cache; writes the new keys and values at slots ``past .. past + S``.

    Args:
        query: ``[B, H, S, D]``.
        key, value: new ones, ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``; ``H`` is a multiple of ``Hkv``.
        key_codes, key_params, value_codes, value_params: the state, ``[B, Hkv, C, ...]`` as :func:`quantize_kv` lays it
            out, capacity ``C >= past + S``; changed in place.
        key_mask: ``[B, past + S]``, nonzero where a slot holds a token (zero: padding).
        past: tokens already in the state.
        scale: softmax scale.
        window: sliding window in tokens, 0 for none.
        bits: 4, 8 or 16.
        softcap: bound of the scores' magnitude, 0 for none; see :func:`soft_cap`.
        sinks: ``[H]`` scores that take a share and add no value, or None.
        slopes: ``[H]``, or None. ALiBi (Press et al., arXiv 2108.12409): ``slope * (place of key - place of query)`` is
            added to a score, after it was capped.
        counted: what a place is, see :func:`attention_places`.
        chunk: tokens in a chunk beyond which no query sees, 0 for none.

    Returns:
        float ``[B, H, S, Dv]``. A query that sees no key (a padding slot) gives zeros.
    """
    end = past + query.shape[2]
    for new, codes, params in ((key, key_codes, key_params), (value, value_codes, value_params)):
        new_codes, new_params = quantize_kv(new, bits)
        codes[:, :, past:end] = new_codes
        params[:, :, past:end] = new_params
    keys = dequantize_kv(key_codes[:, :, :end], key_params[:, :, :end], bits, key.shape[-1]).to(query.dtype)
    values = dequantize_kv(value_codes[:, :, :end], value_params[:, :, :end], bits, value.shape[-1]).to(query.dtype)
    return visible_attention(query, keys, values, key_mask, past, scale, window, softcap, sinks, slopes, counted, chunk)


def visible_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_mask: Tensor,
    past: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    counted: bool = False,
    chunk: int = 0,
) -> Tensor:
    """Attention of the queries at slots ``past .. past + S`` over the keys and values of all slots, as they are.

    Args:
        query: ``[B, H, S, D]``.
        keys, values: ``[B, Hkv, past + S, D]`` and ``[B, Hkv, past + S, Dv]``.
        key_mask, past, scale, window, softcap, sinks, slopes, counted, chunk: as in :func:`cached_attention`.

    Returns:
        float ``[B, H, S, Dv]``. A query that sees no key (a padding slot) gives zeros.
    """
    end = past + query.shape[2]
    mask = attention_mask(key_mask, query.shape[2], past, window, chunk, counted)
    if softcap or sinks is not None or slopes is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype)
        if slopes is not None:
            places = attention_places(key_mask, counted)
            distance = places[:, None, None, :] - places[:, None, past:end, None]
            bias = slopes[:, None, None].to(query.dtype) * distance
        return attention(query, keys, values, bias.masked_fill(~mask, -torch.inf), scale, softcap, sinks)
    repeat = query.shape[1] // keys.shape[1]
    if repeat > 1:
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def cached_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """A causal convolution of every channel with itself over tokens, behind those of earlier calls.

    Args:
        x: ``[B, C, S]`` new tokens.
        weight: ``[C, 1, K]`` taps, the last one for the token itself.
        bias: ``[C]`` or None.
        state: ``[B, C, K - 1]`` tokens before the new ones, zeros before the first; gets the last ones, in place.

    Returns:
        ``[B, C, S]``.
    """
    joined = torch.cat([state, x], -1)
    state.copy_(joined[..., joined.shape[-1] - state.shape[-1] :])
    return torch.nn.functional.conv1d(joined, weight, bias, groups=weight.shape[0])
