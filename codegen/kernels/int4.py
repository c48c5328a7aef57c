"""4-bit weights by look-up: a code picks one of 16 int8 levels in a register, then an 8-bit dot product.

Packed layout: blocks of 16 rows in one sequential stream; within a block, group after group:

* codes, 128 bytes per 16 columns: byte ``4 * row + j`` of the first half holds column ``j`` in its low bits, ``4 + j``
  in its high ones; that of the second half has columns ``8 + j`` and ``12 + j``;
* 32 bytes of fp16 scales.

The levels, offset by 128, follow the last block, four times over: a vector shuffles bytes within 16. Rows are padded to
a multiple of 32 with zero scales, columns to 16. The bias, fp32, comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..format import Int4Weight
from ..tvm_api import T
from .dot import SLAB, VECTOR_BYTES
from .grouped import SCALE_BYTES, GroupedOperand, load_scales
from .isa import InstructionSet

SLAB_BYTES = 2 * VECTOR_BYTES
TABLE_BYTES = VECTOR_BYTES


@dataclass(frozen=True)
class Int4Operand(GroupedOperand):
    """4-bit weights in the layout above, decoded by byte shuffles."""

    def bytes_of(self, slabs: int) -> int:
        return slabs * SLAB_BYTES + SCALE_BYTES

    def padded(self, slabs: int) -> int:
        return slabs * SLAB

    @property
    def table_start(self) -> int:
        return self.problem.row_blocks * self.block_bytes

    @property
    def packed_bytes(self) -> int:
        return self.table_start + TABLE_BYTES

    def tables(self, isa: InstructionSet, packed: Any, address: Any, slabs: int) -> Any:
        return T.Bind(isa.prepare(packed[T.ramp(self.table_start, 1, 4 * isa.lanes)]))

    def fields(self, isa: InstructionSet, packed: Any, address: Any, slab: Any, tables: Any) -> list[Any]:
        fields = []
        for half in range(2):
            start = address + slab * SLAB_BYTES + half * VECTOR_BYTES
            codes = T.Bind(T.reinterpret(isa.int32, packed[T.ramp(start, 1, 4 * isa.lanes)]))
            for shifted in (codes, codes >> isa.broadcast(4)):
                fields.append(isa.shuffle(tables, shifted & isa.broadcast(0x0F0F0F0F)))
        return fields

    def scale(self, isa: InstructionSet, packed: Any, block: Any, address: Any, half: int, slabs: int) -> Any:
        return load_scales(isa, packed, address + slabs * SLAB_BYTES + 2 * half)

    def pack(self, weight: Int4Weight) -> Tensor:
        """Packs a matrix ``[N, K]`` into ``uint8 [packed_bytes]``."""
        levels = weight.table.view(torch.uint8) ^ 0x80
        return torch.cat([self.pack_rows(weight.codes(), weight.scale), levels.repeat(TABLE_BYTES // len(levels))])

    def pack_groups(self, codes: Tensor, *sides: Tensor) -> Tensor:
        (scale,) = sides
        blocks, groups = codes.shape[0] // SLAB, scale.shape[1]
        fields = codes.reshape(blocks, SLAB, groups, -1, 2, 2, 4)
        pairs = fields[..., 0, :] | (fields[..., 1, :] << 4)
        packed = pairs.permute(0, 2, 3, 4, 1, 5).reshape(blocks, groups, -1)
        halves = scale.reshape(blocks, SLAB, groups).permute(0, 2, 1).contiguous().view(torch.uint8)
        return torch.cat([packed, halves.reshape(blocks, groups, -1)], -1).flatten(1)
