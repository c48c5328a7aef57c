"""x86 vector instructions the kernels are built from, each a thin wrapper of one LLVM intrinsic or a short idiom.

Weights reach :meth:`InstructionSet.dot` as bytes offset by 128 (``level + 128``, unsigned), activation values as signed
bytes. Where an instruction needs signed weights, :meth:`InstructionSet.prepare` takes the offset away.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from ..tvm_api import T, pure_intrinsic

Pair = tuple[Any, Any]
"""(weight bytes, activation bytes), both ``4 * lanes`` bytes: four columns of one row in each 32-bit lane."""


class InstructionSet:
    """Vectors of ``lanes`` 32-bit lanes and what the kernels do with them.

    Attributes:
        name: as in target strings.
        lanes: 32-bit lanes of a vector; one weight row a lane.
        offset: 128 if :meth:`dot` sums ``(level + 128) * value``, so that the caller must take ``128 * sum(value)``
            away; 0 if it sums ``level * value``.
        pairs_per_dot: pairs that :meth:`dot` likes to get at once.
    """

    name: str
    lanes: int
    offset: int
    pairs_per_dot: int

    @property
    def int32(self) -> str:
        return f"int32x{self.lanes}"

    @property
    def float32(self) -> str:
        return f"float32x{self.lanes}"

    @property
    def uint8(self) -> str:
        return f"uint8x{4 * self.lanes}"

    @property
    def int8(self) -> str:
        return f"int8x{4 * self.lanes}"

    def broadcast(self, value: Any) -> Any:
        """One 32-bit integer constant or expression in every lane."""
        return T.broadcast(T.int32(value) if isinstance(value, int) else value, self.lanes)

    def row_index(self, scale: int) -> Any:
        """``(lane % 4) * scale`` in every lane: the row within a 128-bit shuffle block."""
        return (T.ramp(T.int32(0), 1, self.lanes) & self.broadcast(3)) * self.broadcast(scale)

    def prepare(self, weights: Any) -> Any:
        """Offset weight bytes in the form :meth:`dot` takes."""
        return weights

    def shuffle(self, table: Any, index: Any) -> Any:
        """Byte look-up within 128-bit blocks; ``index`` is a vector of 32-bit lanes."""
        raise NotImplementedError

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        """``total`` plus, in every lane, the products of its four bytes, summed over ``pairs``."""
        raise NotImplementedError


class Avx512Vnni(InstructionSet):
    """512-bit ``vpshufb`` and ``vpdpbusd``, which sums exactly in int32."""

    name = "avx512-vnni"
    lanes = 16
    offset = 128
    pairs_per_dot = 1

    def shuffle(self, table: Any, index: Any) -> Any:
        return pure_intrinsic(self.uint8, "llvm.x86.avx512.pshuf.b.512", table, T.reinterpret(self.uint8, index))

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for weights, values in pairs:
            total = pure_intrinsic(
                self.int32, "llvm.x86.avx512.vpdpbusd.512", total, weights, T.reinterpret(self.int8, values)
            )
        return total


class _Avx2(InstructionSet):
    name = "avx2"
    lanes = 8

    def shuffle(self, table: Any, index: Any) -> Any:
        return pure_intrinsic(self.uint8, "llvm.x86.avx2.pshuf.b", table, T.reinterpret(self.uint8, index))

    def _multiply_add_bytes(self, unsigned: Any, signed: Any) -> Any:
        return pure_intrinsic(
            "int16x16",
            "llvm.x86.avx2.pmadd.ub.sw",
            T.reinterpret(self.uint8, unsigned),
            T.reinterpret(self.int8, signed),
        )

    def _widen(self, words: Any) -> Any:
        return pure_intrinsic(self.int32, "llvm.x86.avx2.pmadd.wd", words, T.broadcast(T.int16(1), 16))


class Avx2Int4(_Avx2):
    """``vpmaddubsw`` for 4-bit values: ``|value| <= 15``, so eight products of ``255 * 15`` (30600) fit int16."""

    offset = 128
    pairs_per_dot = 4

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for start in range(0, len(pairs), 4):
            words = [self._multiply_add_bytes(w, x) for w, x in pairs[start : start + 4]]
            total = total + self._widen(functools.reduce(operator.add, words))
        return total


class Avx2Int8(_Avx2):
    """``vpmaddubsw`` for 8-bit values: ``|level| <= 128`` times ``value`` with the level's sign, two products
    (32512) fit int16; the product of offset levels would saturate."""

    offset = 0
    pairs_per_dot = 1

    def _sign(self, a: Any, b: Any) -> Any:
        return pure_intrinsic(
            self.int8, "llvm.x86.avx2.psign.b", T.reinterpret(self.int8, a), T.reinterpret(self.int8, b)
        )

    def prepare(self, weights: Any) -> Any:
        flipped = T.reinterpret(self.int32, weights) ^ self.broadcast(-0x7F7F7F80)
        return T.reinterpret(self.uint8, flipped)

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for weights, values in pairs:
            magnitude = self._sign(weights, weights)
            total = total + self._widen(self._multiply_add_bytes(magnitude, self._sign(values, weights)))
        return total


def instruction_set(name: str, act_bits: int) -> InstructionSet:
    """The instruction set of a target family, such as ``avx2``, for values of ``act_bits`` (4 or 8) bits."""
    if name in ("avx512-vpopcnt", "avx512-vnni"):
        return Avx512Vnni()
    return Avx2Int4() if act_bits == 4 else Avx2Int8()
