"""What a kernel is asked to compute: one linear, quantizer or attention, free of target, layout and schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import KernelError
from .sizes import ACTIVATION_BITS, GROUPS, KV_BITS, PLANES, group_count

KINDS = ("bit", "int4", "int8")
"""Kinds of linears."""


def weights_in_words(kind: str, group: int) -> str:
    """The weights of a kind of linear, e.g. ``W(1+1) g64``."""
    return {"bit": f"W(1+1) g{group}", "int4": f"int4 g{group}", "int8": "int8"}[kind]


@dataclass(frozen=True, order=True)
class LinearSpec:
    """One ``bit_linear``, ``int4_linear`` or ``int8_linear``: ``[M, in_features]`` quantized values to float32
    ``[M, out_features]``.

    Attributes:
        kind: ``"bit"`` (W(1+1) weights), ``"int4"`` (4-bit codes of a table, with one fp16 scale a group) or ``"int8"``
            (int8 weights with one fp32 scale a row).
        out_features: ``N``.
        in_features: ``K``.
        group: inputs per integer accumulator: the activations' group. For ``"int8"`` 0 when the whole token is one; for
            the other kinds the weight's then, which is else a multiple of it.
        act_bits: of the values: 4, 8 or 16; 8 where 4-bit codes index a table.
        per_token: one activation scale a token (``x_scale`` has one column) instead of one per group.
        bias: a float32 bias ``[N]`` is added last.
        additive: of ``"bit"`` weights with 4-bit values, of which kernels may use it: every group's levels are additive
            (:mod:`.levels`).

    Raises:
        KernelError: a field is outside what the operators define.
    """

    kind: Literal["bit", "int4", "int8"]
    out_features: int
    in_features: int
    group: int
    act_bits: int = 4
    per_token: bool = False
    bias: bool = False
    additive: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KernelError(f"a linear of kind {self.kind!r} does not exist; use {', '.join(map(repr, KINDS))}")
        if self.out_features < 1 or self.in_features < 1:
            raise KernelError(f"a {self.out_features}x{self.in_features} linear is empty")
        if self.group not in GROUPS and not (self.kind == "int8" and self.group == 0):
            raise KernelError(f"group size {self.group} is not one of {GROUPS}")
        if self.act_bits not in ACTIVATION_BITS:
            raise KernelError(f"{self.act_bits}-bit activations do not exist; use one of {ACTIVATION_BITS}")
        if self.additive and (self.kind != "bit" or self.act_bits != 4):
            raise KernelError("additive levels are told apart only where W(1+1) weights meet 4-bit values")

    @property
    def groups(self) -> int:
        """Integer accumulators per output."""
        return group_count(self.in_features, self.group) if self.group else 1

    @property
    def x_scales(self) -> int:
        """Columns of ``x_scale``."""
        return 1 if self.per_token else self.groups

    @property
    def weights(self) -> str:
        """Its weights in words, e.g. ``W(1+1) g64``."""
        return weights_in_words(self.kind, self.group)

    @property
    def marks(self) -> str:
        """What names of its kernels say of the levels and the bias."""
        return ("_additive" if self.additive else "") + ("_bias" if self.bias else "")


def complete(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`LinearSpec` in JSON, also of one written before additive levels were told apart."""
    return {"additive": False, **fields}


@dataclass(frozen=True, order=True)
class QuantizeSpec:
    """One ``quantize_activation``: float32 ``[M, in_features]`` to integer values and scales.

    Attributes:
        in_features: ``K``.
        group: channels per scale, 0 for one scale a token.
        bits: 4, 8 or 16.
        knees: 4-bit codes index a table of 8-bit values that two knees shape.
        planes: likewise, a table that the scales of four binary planes shape.

    Raises:
        KernelError: a field is outside what the operator defines.
    """

    in_features: int
    group: int
    bits: int = 4
    knees: bool = False
    planes: bool = False

    def __post_init__(self) -> None:
        if self.in_features < 1:
            raise KernelError("a quantizer of no channels is empty")
        if self.group not in (0, *GROUPS):
            raise KernelError(f"group size {self.group} is not 0 or one of {GROUPS}")
        if self.bits not in ACTIVATION_BITS:
            raise KernelError(f"{self.bits}-bit activations do not exist; use one of {ACTIVATION_BITS}")
        if self.knees and self.bits != 4:
            raise KernelError(f"{self.bits}-bit activations have no knees; only those of 4 bits do")
        if self.planes and (self.bits != 4 or self.knees):
            raise KernelError("only 4-bit activations without knees have plane scales")

    @property
    def tabled(self) -> bool:
        """Whether codes index a table."""
        return self.knees or self.planes

    @property
    def shape_size(self) -> int:
        """How many numbers shape the table: two knees, four plane scales, none without a table."""
        return 2 if self.knees else PLANES if self.planes else 0

    @property
    def value_bits(self) -> int:
        """Bits of the values, which a linear multiplies."""
        return 8 if self.tabled else self.bits

    @property
    def scales(self) -> int:
        """Scales per token."""
        return group_count(self.in_features, self.group) if self.group else 1


@dataclass(frozen=True, order=True)
class AttentionSpec:
    """One ``cached_attention``.

    Attributes:
        heads: query heads ``H``, a multiple of ``kv_heads``.
        kv_heads: ``Hkv``.
        key_width, value_width: channels of a key and of a value.
        bits: 4, 8 or 16 bits a stored number.
        window: sliding window in tokens, 0 for none.
        scale: softmax scale.
        softcap: bound of the scores' magnitude, 0 for none.
        sinks: every head has a score that takes its share and adds no value.
        slopes: every head has a bias per token of distance (ALiBi).
        counted: places count attended tokens instead of slots.
        chunk: tokens in a chunk beyond which no query sees, 0 for none.

    Raises:
        KernelError: a field is outside what the operator defines.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    bits: int
    window: int
    scale: float
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    counted: bool = False
    chunk: int = 0

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.key_width, self.value_width) < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise KernelError(f"{self.heads} query heads cannot share {self.kv_heads} key and value heads")
        if self.bits not in KV_BITS:
            raise KernelError(f"{self.bits}-bit keys and values do not exist; use one of {KV_BITS}")
        if not 0.0 <= self.softcap < math.inf:
            raise KernelError(f"scores cannot be bounded by {self.softcap}")
        if min(self.window, self.chunk) < 0:
            raise KernelError("a window or a chunk has no negative size")

    @property
    def repeat(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def per_head(self) -> bool:
        """Whether the kernel takes numbers of every query head."""
        return self.sinks or self.slopes

    @property
    def places(self) -> bool:
        """Whether it matters where among a sequence's tokens a slot is."""
        return self.slopes or self.chunk > 0

    def stored(self, width: int) -> int:
        """Elements in which a key or value of ``width`` channels is stored: bytes, halves at 16 bits."""
        return width if self.bits == 16 else -(-width * self.bits // 8)


@dataclass(frozen=True, order=True)
class ConvolutionSpec:
    """One ``cached_conv``: ``channels`` that each have ``taps`` of their own, and maybe a bias."""

    channels: int
    taps: int
    bias: bool


@dataclass(frozen=True, order=True)
class EmbeddingSpec:
    """One ``int8_embedding`` or ``int4_embedding``: a table of ``rows`` rows with ``columns`` columns.

    Attributes:
        rows: of the table.
        columns: int8 ones with an fp32 scale a row, or 4-bit codes.
        group: columns per fp16 scale of 4-bit codes; 0 for int8 columns.
    """

    rows: int
    columns: int
    group: int = 0

    def __str__(self) -> str:
        """For names of kernels."""
        return f"{self.rows}x{self.columns}" + (f"_int4_g{self.group}" if self.group else "")
