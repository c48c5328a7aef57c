"""W(1+1) weights by look-up: a 2-bit code picks one of four int8 levels in a register, then an 8-bit dot product.

Packed layout: blocks of 16 rows in one sequential stream; within a block, group after group:

* 64 bytes of levels, offset by 128: byte ``4 * row + code``;
* codes, 64 bytes per 16 columns: byte ``4 * row + j`` holds columns ``j``, ``4 + j``, ``8 + j``, ``12 + j`` in its
  2-bit fields, lowest first;
* 32 bytes of fp16 scales.

That is the order in which they are read: hardware prefetchers lose a stream that jumps back. A group of 128 columns
takes 608 bytes. Rows are padded to a multiple of 32 with zero levels and scales, columns to 16. The bias, fp32, follows
the last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tvm_api import T
from .dot import FIELDS, SLAB, VECTOR_BYTES
from .grouped import SCALE_BYTES, BitOperand, load_scales
from .isa import InstructionSet

LEVEL_BYTES = 64


@dataclass(frozen=True)
class Lut8Operand(BitOperand):
    """W(1+1) weights in the layout above, decoded by byte shuffles."""

    def bytes_of(self, slabs: int) -> int:
        return slabs * VECTOR_BYTES + LEVEL_BYTES + SCALE_BYTES

    def padded(self, slabs: int) -> int:
        return slabs * SLAB

    def tables(self, isa: InstructionSet, packed: Any, address: Any, slabs: int) -> Any:
        levels = packed[T.ramp(address, 1, 4 * isa.lanes)]
        by_row = T.Bind(isa.prepare(levels))
        # The same table with row and level index swapped: its look-up index keeps the code in bits 2 and 3, so that
        # the second and fourth field need no shift of their own.
        by_level = T.Bind(isa.shuffle(by_row, isa.broadcast(0x0C080400) + isa.row_index(0x01010101)))
        return by_row, by_level

    def fields(self, isa: InstructionSet, packed: Any, address: Any, slab: Any, tables: Any) -> list[Any]:
        by_row, by_level = tables
        start = address + LEVEL_BYTES + slab * VECTOR_BYTES
        low = T.Bind(T.reinterpret(isa.int32, packed[T.ramp(start, 1, 4 * isa.lanes)]))
        high = T.Bind(low >> isa.broadcast(4))
        fields = []
        for codes in (low, high):
            fields.append(isa.shuffle(by_row, (codes & isa.broadcast(0x03030303)) | isa.row_index(0x04040404)))
            fields.append(isa.shuffle(by_level, (codes & isa.broadcast(0x0C0C0C0C)) | isa.row_index(0x01010101)))
        return fields

    def scale(self, isa: InstructionSet, packed: Any, block: Any, address: Any, half: int, slabs: int) -> Any:
        start = address + LEVEL_BYTES + slabs * VECTOR_BYTES + 2 * half
        return load_scales(isa, packed, start)

    def pack_groups(self, codes: Tensor, *sides: Tensor) -> Tensor:
        levels, scale = sides
        blocks, groups = codes.shape[0] // SLAB, levels.shape[1]
        fields = codes.reshape(blocks, SLAB, groups, -1, FIELDS, 4)
        packed = fields[..., 0, :] | (fields[..., 1, :] << 2) | (fields[..., 2, :] << 4) | (fields[..., 3, :] << 6)
        packed = packed.permute(0, 2, 3, 1, 4).reshape(blocks, groups, -1)
        levels = levels.contiguous().view(torch.uint8) ^ 0x80
        levels = levels.reshape(blocks, SLAB, groups, 4).permute(0, 2, 1, 3).reshape(blocks, groups, -1)
        halves = scale.reshape(blocks, SLAB, groups).permute(0, 2, 1).contiguous().view(torch.uint8)
        return torch.cat([levels, packed, halves.reshape(blocks, groups, -1)], -1).flatten(1)
