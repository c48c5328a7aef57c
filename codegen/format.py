"""The canonical W(1+1) weight format: two bit-planes and four int8 levels per group.

A matrix ``W`` of shape ``[N, K]`` (``N = out_features``, ``K = in_features``) is cut, per output row, into groups of
``group`` input columns; the last group is short where ``K % group != 0``. Each group has four *levels*, sorted, stored
as int8 times one fp16 *scale*. An element picks one of the four by two bits (LBLLM, arXiv 2604.19167, equation 3)::

    bitmap = 1 (inner pair):  sign ? level[2] : level[1]
    bitmap = 0 (outer pair):  sign ? level[3] : level[0]

The index into the sorted levels is the *code* (0..3). All functions accept leading batch dimensions (stacked experts).

Bits are packed along ``K``, eight to a byte, least significant bit first; padding bits of the last byte are zero.

Token embeddings and output heads have int8 rows (:func:`quantize_rows`) or 4-bit codes (:class:`Int4Weight`), which
linears of decoder layers may have, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .errors import FormatError
from .sizes import GROUPS, group_count

LEVELS = 4
"""Levels per group."""

LEVEL_MAX = 127
"""Largest magnitude of a stored int8 level."""

SCALE_MIN = 2.0**-24
"""Smallest positive fp16 number: a non-zero group never gets a smaller scale."""

TABLE_LEVELS = 16
"""Levels that 4-bit codes pick from."""


def pack_plane(bits: Tensor) -> Tensor:
    """Packs a boolean plane ``[..., K]`` into ``uint8 [..., ceil(K / 8)]``, least significant bit first."""
    k = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -k % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_plane(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_plane`: ``uint8 [..., ceil(K / 8)]`` to ``bool [..., K]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :in_features].bool()


def codes_to_planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Splits level codes ``[..., K]`` (0..3) into packed ``(sign, bitmap)`` planes."""
    return pack_plane(codes >= 2), pack_plane((codes == 1) | (codes == 2))


def planes_to_codes(sign: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """Joins packed planes into level codes ``uint8 [..., K]`` (0..3)."""
    codes = _CODES.to(sign.device)[sign.int() | bitmap.int() << 8]
    return codes.view(torch.uint8)[..., :in_features]


def _codes_of_bytes() -> Tensor:
    """The codes of eight columns as the bytes of one int64, at the sign plane's byte plus 256 times the bitmap's.

    NumPy computes it: torch would start its threads as this is imported, and processes forked from then on would hang.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    codes = np.where(bits[:, None], 1 + bits, 3 * bits)
    return torch.from_numpy(codes.view(np.int64).ravel())


_CODES = _codes_of_bytes()


def quantize_levels(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds float levels ``[..., G, 4]`` to ``(int8 [..., G, 4], fp16 scale [..., G])``.

    The scale is ``max |level| / 127`` rounded to fp16; the levels are rounded half to even and clamped to +-127.
    Order is kept: sorted levels stay sorted. A group of zeros gets scale 0.

    Raises:
        FormatError: a level is not finite or too large for an fp16 scale.
    """
    peak = levels.abs().amax(-1)
    if not bool(torch.isfinite(peak).all()):
        raise FormatError("a weight level is NaN or infinite; check the model's weights")
    if bool((peak > 65504.0 * LEVEL_MAX).any()):
        raise FormatError("a weight exceeds 8.3e6, the largest the fp16 group scale can hold; rescale the layer")
    scale = (peak.float() / LEVEL_MAX).to(torch.float16)
    scale = torch.where((scale == 0) & (peak > 0), torch.full_like(scale, SCALE_MIN), scale)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float().unsqueeze(-1)
    quantized = (levels.float() / safe).round().clamp_(-LEVEL_MAX, LEVEL_MAX).to(torch.int8)
    return quantized, scale


@dataclass(frozen=True)
class QuantizedWeight:
    """One W(1+1) matrix in canonical form (or ``E`` stacked ones, with a leading dimension).

    Attributes:
        sign: ``uint8 [..., N, ceil(K / 8)]``, packed.
        bitmap: ``uint8 [..., N, ceil(K / 8)]``, packed.
        levels: ``int8 [..., N, G, 4]``, sorted ascending.
        scale: ``float16 [..., N, G]``, finite and not negative.
        in_features: ``K``.
        group: input columns per group, one of :data:`GROUPS`.
    """

    sign: Tensor
    bitmap: Tensor
    levels: Tensor
    scale: Tensor
    in_features: int
    group: int

    @property
    def out_features(self) -> int:
        return self.sign.shape[-2]

    @property
    def groups(self) -> int:
        return group_count(self.in_features, self.group)

    @property
    def stored_bits(self) -> int:
        """Bits of the whole matrix as stored: two planes, four int8 levels and one fp16 scale a group."""
        return 8 * sum(t.numel() * t.element_size() for t in (self.sign, self.bitmap, self.levels, self.scale))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        levels: Tensor,
        group: int,
        quantize: Callable[[Tensor], tuple[Tensor, Tensor]] = quantize_levels,
    ) -> QuantizedWeight:
        """From codes ``[..., N, K]`` (0..3) and sorted float levels ``[..., N, G, 4]``.

        Args:
            quantize: makes levels what is stored; a level rule's own (:meth:`.levels.LevelRule.quantize`) keeps it.

        Raises:
            FormatError: shapes disagree, levels are unsorted or not finite.
        """
        sign, bitmap = codes_to_planes(codes)
        quantized, scale = quantize(levels)
        weight = cls(sign, bitmap, quantized, scale, codes.shape[-1], group)
        weight.validate()
        return weight

    def refined(self, group: int) -> QuantizedWeight:
        """The same matrix with smaller groups, those of one old group with its levels and scale.

        Raises:
            FormatError: ``group`` is no divisor of the weight's.
        """
        levels, scale = (_refined(side, self, group) for side in (self.levels.transpose(-1, -2), self.scale))
        return replace(self, levels=levels.transpose(-1, -2).contiguous(), scale=scale, group=group)

    def on(self, device: torch.device) -> QuantizedWeight:
        """The weight with its tensors on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("sign", "bitmap", "levels", "scale")}
        return replace(self, **tensors)

    def codes(self) -> Tensor:
        """Level codes, ``uint8 [..., N, K]``."""
        return planes_to_codes(self.sign, self.bitmap, self.in_features)

    def integer_levels(self) -> Tensor:
        """The int8 level of every element, ``int8 [..., N, K]``."""
        padded = self.groups * self.group
        codes = torch.nn.functional.pad(self.codes(), (0, padded - self.in_features))
        codes = codes.unflatten(-1, (self.groups, self.group)).long()
        return torch.gather(self.levels, -1, codes).flatten(-2)[..., : self.in_features]

    def dequantize(self) -> Tensor:
        """The matrix as ``float32 [..., N, K]``: int8 level times fp16 scale, exact in fp32."""
        scale = self.scale.float().repeat_interleave(self.group, -1)[..., : self.in_features]
        return self.integer_levels().float() * scale

    def validate(self, name: str = "weight") -> None:
        """Checks every rule of the format.

        Raises:
            FormatError: naming ``name`` and the rule that is broken.
        """
        if self.group not in GROUPS:
            raise FormatError(f"{name}: group size {self.group} is not one of {GROUPS}")
        if self.sign.dim() < 2:
            raise FormatError(f"{name}.sign has the shape {tuple(self.sign.shape)}, which is no matrix")
        n, nbytes = self.out_features, -(-self.in_features // 8)
        batch = self.sign.shape[:-2]
        expected = {
            "sign": (torch.uint8, (*batch, n, nbytes)),
            "bitmap": (torch.uint8, (*batch, n, nbytes)),
            "levels": (torch.int8, (*batch, n, self.groups, LEVELS)),
            "scale": (torch.float16, (*batch, n, self.groups)),
        }
        for field, (dtype, shape) in expected.items():
            tensor: Tensor = getattr(self, field)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise FormatError(
                    f"{name}.{field} is {tensor.dtype} {tuple(tensor.shape)}, the format needs {dtype} {shape}"
                )
        if self.in_features % 8:
            last = torch.cat([self.sign[..., -1:], self.bitmap[..., -1:]], -1)
            if bool((last >> (self.in_features % 8)).any()):
                raise FormatError(f"{name}: a padding bit behind column {self.in_features} is set")
        if bool((self.levels[..., 1:] < self.levels[..., :-1]).any()):
            raise FormatError(f"{name}: the levels of a group are not sorted")
        if not bool(torch.isfinite(self.scale).all()) or bool((self.scale < 0).any()):
            raise FormatError(f"{name}: a group scale is negative, NaN or infinite")

    def concatenate_rows(self, *others: QuantizedWeight) -> QuantizedWeight:
        """Stacks matrices with the same ``K`` and group row-wise (merged q/k/v or gate/up)."""
        parts = (self, *others)
        if any(p.in_features != self.in_features or p.group != self.group for p in parts):
            raise FormatError("only matrices with the same in_features and group can be merged")
        return QuantizedWeight(
            torch.cat([p.sign for p in parts], -2),
            torch.cat([p.bitmap for p in parts], -2),
            torch.cat([p.levels for p in parts], -3),
            torch.cat([p.scale for p in parts], -2),
            self.in_features,
            self.group,
        )


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row, for the embedding and lm_head: ``[N, K]`` to ``(int8 [N, K], fp32 scale [N])``."""
    peak = weight.abs().amax(-1).float()
    if not bool(torch.isfinite(peak).all()):
        raise FormatError("a weight is NaN or infinite; check the model's weights")
    scale = peak / LEVEL_MAX
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(-1)
    return (weight.float() / safe).round().clamp_(-LEVEL_MAX, LEVEL_MAX).to(torch.int8), scale


def pack_codes(codes: Tensor) -> Tensor:
    """Packs 4-bit codes ``uint8 [..., K]`` into ``uint8 [..., ceil(K / 2)]``, the even column in the low bits."""
    pairs = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_codes(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_codes`: ``uint8 [..., ceil(K / 2)]`` to ``uint8 [..., K]``."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :in_features]


@dataclass(frozen=True)
class Int4Weight:
    """A matrix of 4-bit codes, of a linear or a token embedding: ``table[code] * scale``.

    Each code picks one of 16 int8 levels, which all of the matrix shares. They need not be evenly spaced.

    Attributes:
        packed: ``uint8 [N, ceil(K / 2)]``: two codes a byte, the even column in the low bits, padding zero.
        table: ``int8 [16]``, ascending.
        scale: ``float16 [N, G]``, finite; negative where the levels serve the group better mirrored.
        in_features: ``K``.
        group: input columns per scale, one of :data:`GROUPS`.
    """

    packed: Tensor
    table: Tensor
    scale: Tensor
    in_features: int
    group: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[-2]

    def codes(self) -> Tensor:
        """Codes, ``uint8 [N, K]``."""
        return unpack_codes(self.packed, self.in_features)

    def integer_levels(self) -> Tensor:
        """The int8 level of every element, ``int8 [N, K]``."""
        return self.table[self.codes().int()]

    def dequantize(self) -> Tensor:
        """The matrix as ``float32 [N, K]``: int8 level times fp16 scale, exact in fp32."""
        scale = self.scale.float().repeat_interleave(self.group, -1)[..., : self.in_features]
        return self.integer_levels().float() * scale

    def refined(self, group: int) -> Int4Weight:
        """The same matrix with smaller groups, see :meth:`QuantizedWeight.refined`."""
        return replace(self, scale=_refined(self.scale, self, group), group=group)

    def rows(self, chosen: Tensor | slice) -> Int4Weight:
        """Some of the rows."""
        return replace(self, packed=self.packed[chosen], scale=self.scale[chosen])

    def validate(self, name: str = "weight") -> None:
        """Checks every rule of the format.

        Raises:
            FormatError: naming ``name`` and the rule that is broken.
        """
        if self.group not in GROUPS:
            raise FormatError(f"{name}: group size {self.group} is not one of {GROUPS}")
        if self.packed.dim() != 2:
            raise FormatError(f"{name}.codes has the shape {tuple(self.packed.shape)}, which is no matrix")
        n, k = self.out_features, self.in_features
        expected = {
            "codes": (self.packed, torch.uint8, (n, -(-k // 2))),
            "table": (self.table, torch.int8, (TABLE_LEVELS,)),
            "scale": (self.scale, torch.float16, (n, group_count(k, self.group))),
        }
        for field, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise FormatError(
                    f"{name}.{field} is {tensor.dtype} {tuple(tensor.shape)}, the format needs {dtype} {shape}"
                )
        if k % 2 and bool((self.packed[..., -1] >> 4).any()):
            raise FormatError(f"{name}: the padding code behind column {k} is set")
        if bool((self.table[1:] < self.table[:-1]).any()):
            raise FormatError(f"{name}: the levels of the table are not sorted")
        if not bool(torch.isfinite(self.scale).all()):
            raise FormatError(f"{name}: a group scale is NaN or infinite")


def _refined(side: Tensor, weight: QuantizedWeight | Int4Weight, group: int) -> Tensor:
    """What belongs to the groups of a weight ``[..., G]``, for groups of ``group`` columns."""
    if group == weight.group:
        return side
    times, rest = divmod(weight.group, group)
    if rest:
        raise FormatError(f"groups of {group} columns do not divide those of {weight.group}")
    return side.repeat_interleave(times, -1)[..., : group_count(weight.in_features, group)]


Weight = QuantizedWeight | Int4Weight | tuple[Tensor, Tensor]
"""A matrix that integer linears multiply: W(1+1), 4-bit, or int8 rows ``[N, K]`` with their fp32 scales ``[N]``."""
