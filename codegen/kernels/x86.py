"""x86 vector instructions the kernels are built from, each a thin wrapper of one LLVM intrinsic or a short idiom."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..tvm_api import T, intrinsic, pure_intrinsic
from .isa import InstructionSet, Pair, TileSet


class Avx512Vnni(InstructionSet):
    """512-bit ``vpshufb`` and ``vpdpbusd``, which sums exactly in int32."""

    name = "avx512-vnni"
    lanes = 16
    registers = 32
    offset = 128

    def shuffle(self, table: Any, index: Any) -> Any:
        return pure_intrinsic(self.uint8, "llvm.x86.avx512.pshuf.b.512", table, T.reinterpret(self.uint8, index))

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for weights, values in pairs:
            total = pure_intrinsic(
                self.int32, "llvm.x86.avx512.vpdpbusd.512", total, weights, T.reinterpret(self.int8, values)
            )
        return total


class Avx512Vpopcnt(Avx512Vnni):
    """The same with ``vpopcntb``, which LLVM makes of its generic bit count."""

    name = "avx512-vpopcnt"
    counts_bits = True


class AmxTiles(TileSet):
    """512-bit ``vpshufb``, and tiles of bytes that ``tdpbssd`` multiplies, which sums exactly in int32."""

    name = "avx512-amx"
    registers = 32

    def shuffle(self, table: Any, index: Any) -> Any:
        return pure_intrinsic(self.uint8, "llvm.x86.avx512.pshuf.b.512", table, T.reinterpret(self.uint8, index))

    def configure_tiles(self, scratch: Any, shapes: Mapping[int, tuple[int, int]]) -> None:
        # LDTILECFG in Intel's Software Developer's Manual: byte 0 is the palette, 16-bit numbers from byte 16 on are
        # the bytes of a line, bytes from byte 48 on the lines.
        memory = bytearray(64)
        memory[0] = 1
        for tile, (lines, line_bytes) in shapes.items():
            memory[16 + 2 * tile], memory[48 + tile] = line_bytes, lines
        for i in range(len(memory) // 4):
            T.buffer_store(scratch, int.from_bytes(memory[4 * i : 4 * i + 4], "little"), [i])
        _on_tiles("llvm.x86.ldtilecfg", T.address_of(scratch[0]))

    def release_tiles(self) -> None:
        _on_tiles("llvm.x86.tilerelease")

    def clear_tile(self, tile: int) -> None:
        _on_tiles("llvm.x86.tilezero", T.int8(tile))

    def load_tile(self, tile: int, buffer: Any, address: Any, stride: int) -> None:
        _on_tiles("llvm.x86.tileloadd64", T.int8(tile), T.address_of(buffer[address]), T.int64(stride))

    def store_tile(self, tile: int, buffer: Any, address: Any, stride: int) -> None:
        _on_tiles("llvm.x86.tilestored64", T.int8(tile), T.address_of(buffer[address]), T.int64(stride))

    def multiply_tiles(self, total: int, values: int, weights: int) -> None:
        _on_tiles("llvm.x86.tdpbssd", T.int8(total), T.int8(values), T.int8(weights))


def _on_tiles(name: str, *operands: Any) -> None:
    """An instruction on tile registers, which LLVM does not see; to it, it may read and write all memory."""
    T.evaluate(T.call_llvm_intrin("void", intrinsic(name), *operands))


class Avx512Amx(Avx512Vpopcnt):
    """The same for one token, and tiles for more."""

    name = "avx512-amx"
    tiles = AmxTiles()


class _Ymm(InstructionSet):
    """256-bit ``vpshufb``."""

    lanes = 8
    registers = 16

    def shuffle(self, table: Any, index: Any) -> Any:
        return pure_intrinsic(self.uint8, "llvm.x86.avx2.pshuf.b", table, T.reinterpret(self.uint8, index))


class AvxVnni(_Ymm):
    """256-bit ``vpdpbusd``: VEX-encoded by AVX-VNNI; the intrinsic has the name of its AVX-512 form."""

    name = "avx-vnni"
    offset = 128

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for weights, values in pairs:
            total = pure_intrinsic(
                self.int32, "llvm.x86.avx512.vpdpbusd.256", total, weights, T.reinterpret(self.int8, values)
            )
        return total


class _Avx2(_Ymm):
    name = "avx2"

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

    def _sign(self, a: Any, b: Any) -> Any:
        return pure_intrinsic(
            self.int8, "llvm.x86.avx2.psign.b", T.reinterpret(self.int8, a), T.reinterpret(self.int8, b)
        )

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for weights, values in pairs:
            magnitude = self._sign(weights, weights)
            total = total + self._widen(self._multiply_add_bytes(magnitude, self._sign(values, weights)))
        return total


INSTRUCTION_SETS: dict[str, Callable[[int], InstructionSet]] = {
    "avx512-amx": lambda act_bits: Avx512Amx(),
    "avx512-vpopcnt": lambda act_bits: Avx512Vpopcnt(),
    "avx512-vnni": lambda act_bits: Avx512Vnni(),
    "avx-vnni": lambda act_bits: AvxVnni(),
    "avx2": lambda act_bits: Avx2Int4() if act_bits == 4 else Avx2Int8(),
}
"""The instructions of a kernel family for values of 4 or 8 bits."""
