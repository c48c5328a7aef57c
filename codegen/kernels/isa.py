"""What a CPU's vector instructions must do for the kernels that all CPU families share (:mod:`.dot`, :mod:`.lut8`).

A new family is a subclass of :class:`InstructionSet` in the module of its architecture (:mod:`.x86`, :mod:`.arm`),
listed there in ``INSTRUCTION_SETS``, and a row of ``codegen/targets/<architecture>.py``.

Weights reach :meth:`InstructionSet.dot` as bytes offset by 128 (``level + 128``, unsigned), activation values as signed
bytes. Where an instruction needs signed weights, :meth:`InstructionSet.prepare` takes the offset away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tvm_api import T

Pair = tuple[Any, Any]
"""(weight bytes, activation bytes), both ``4 * lanes`` bytes: four columns of one row in each 32-bit lane."""


class InstructionSet:
    """Vectors of ``lanes`` 32-bit lanes and what the kernels do with them.

    Subclasses give :meth:`shuffle` and :meth:`dot`. One with an instruction that multiplies small matrices also sets
    ``tokens_per_dot`` and replaces :meth:`arrange`, :meth:`load_values`, :meth:`multiply` and :meth:`by_token`.

    Attributes:
        name: as in target strings.
        lanes: 32-bit lanes of a vector; one weight row a lane.
        registers: vector registers.
        offset: 128 if :meth:`dot` sums ``(level + 128) * value``, so that the caller must take ``128 * sum(value)``
            away; 0 if it sums ``level * value``.
        pairs_per_dot: pairs that :meth:`dot` likes to get at once, fields that :meth:`multiply` takes.
        tokens_per_dot: tokens that :meth:`multiply` takes at once.
        counts_bits: whether an instruction counts the bits of every byte, as :mod:`.popcount` wants.
        chains: independent accumulators per row vector that are worth trying for one token, a good guess first.
        tiles: the tile instructions that :mod:`.tiles` multiplies many tokens with, where there are any.
    """

    name: str
    lanes: int
    registers: int
    offset: int
    pairs_per_dot: int = 1
    tokens_per_dot: int = 1
    counts_bits: bool = False
    chains: tuple[int, ...] = (4, 2, 1)
    tiles: TileSet | None = None

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
        """Offset weight bytes in the form :meth:`dot` takes: as they are, or signed where ``offset`` is 0."""
        if self.offset:
            return weights
        return T.reinterpret(self.uint8, T.reinterpret(self.int32, weights) ^ self.broadcast(-0x7F7F7F80))

    def shuffle(self, table: Any, index: Any) -> Any:
        """Byte look-up within 128-bit blocks; ``index`` is a vector of 32-bit lanes, its bytes below 16."""
        raise NotImplementedError

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        """``total`` plus, in every lane, the products of its four bytes, summed over ``pairs``."""
        raise NotImplementedError

    def quad(self, staged: Any, slab: Any, field: int) -> Any:
        """Four activation bytes of one token in every lane: a field of the slab at an address of ``staged``."""
        return self.broadcast(T.reinterpret("int32", staged[T.ramp(slab + 4 * field, 1, 4)]))

    def arrange(self, fields: list[Any]) -> list[Any]:
        """The fields of a slab, one vector each, in the form :meth:`multiply` takes."""
        return fields

    def load_values(self, staged: Any, slab: Any, field: int) -> list[Any]:
        """``pairs_per_dot`` fields, from ``field`` on, of the slab of ``tokens_per_dot`` tokens at an address."""
        return [self.quad(staged, slab, field + k) for k in range(self.pairs_per_dot)]

    def multiply(self, totals: list[Any], weights: list[Any], values: list[Any]) -> list[Any]:
        """Adds the products of ``pairs_per_dot`` fields to the totals of ``tokens_per_dot`` tokens.

        Args:
            totals: a vector for each token; how rows and tokens lie in them is only known to :meth:`by_token`.
            weights: ``pairs_per_dot`` vectors from :meth:`arrange`.
            values: from :meth:`load_values`.
        """
        return [self.dot(totals[0], list(zip(weights, values, strict=True)))]

    def by_token(self, totals: list[Any]) -> list[Any]:
        """The totals of :meth:`multiply` as a vector for each token, a row in each lane."""
        return totals


class TileSet(InstructionSet):
    """Vectors of 16 lanes, and registers that hold a tile: up to 16 lines of up to 64 bytes.

    Weights are decoded to signed bytes, and :meth:`multiply_tiles` takes the place of :meth:`dot`. Tile registers are
    numbers that are known when a kernel is generated. They are a thread's own: it configures them before it uses them
    and releases them afterwards.
    """

    lanes = 16
    offset = 0

    def configure_tiles(self, scratch: Any, shapes: Mapping[int, tuple[int, int]]) -> None:
        """Gives registers their ``(lines, bytes of a line)``; ``scratch`` is ``int32 [16]``."""
        raise NotImplementedError

    def release_tiles(self) -> None:
        """Gives all registers back."""
        raise NotImplementedError

    def clear_tile(self, tile: int) -> None:
        """Fills a register with zeros."""
        raise NotImplementedError

    def load_tile(self, tile: int, buffer: Any, address: Any, stride: int) -> None:
        """Fills a register from an element of a buffer on; the next line begins ``stride`` bytes further."""
        raise NotImplementedError

    def store_tile(self, tile: int, buffer: Any, address: Any, stride: int) -> None:
        """Writes a register as :meth:`load_tile` reads it."""
        raise NotImplementedError

    def multiply_tiles(self, total: int, values: int, weights: int) -> None:
        """Adds products to a register of int32: ``total[m, n] += sum(values[m, 4 k + j] * weights[k, 4 n + j])``."""
        raise NotImplementedError
