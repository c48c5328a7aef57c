"""Int8-per-row weights (lm_head): bytes go straight into the 8-bit dot product.

Packed layout: blocks of 16 rows in one sequential stream; within a block 256 bytes per 16 columns (four fields of four
columns, byte ``4 * row + column``), each weight offset by 128, then 16 fp32 row scales. Rows are padded to a multiple
of 32 with zero weights and scales, the columns of each activation group to 16. The bias, fp32, follows the last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tvm_api import T
from .dot import FIELDS, SLAB, VECTOR_BYTES, Problem, load_float32
from .isa import InstructionSet

SLAB_BYTES = FIELDS * VECTOR_BYTES
SCALE_BYTES = 4 * SLAB


@dataclass(frozen=True)
class Int8Operand:
    """Int8 weights in the layout above."""

    problem: Problem

    decodes = False

    def bytes_of(self, slabs: int) -> int:
        return slabs * SLAB_BYTES

    @property
    def group_bytes(self) -> int:
        return self.bytes_of(self.problem.group_slabs)

    @property
    def block_bytes(self) -> int:
        return self.problem.slabs * SLAB_BYTES + SCALE_BYTES

    @property
    def packed_bytes(self) -> int:
        return self.problem.row_blocks * self.block_bytes

    def tables(self, isa: InstructionSet, packed: Any, address: Any, slabs: int) -> Any:
        return None

    def fields(self, isa: InstructionSet, packed: Any, address: Any, slab: Any, tables: Any) -> list[Any]:
        start = address + slab * SLAB_BYTES
        return [isa.prepare(packed[T.ramp(start + f * VECTOR_BYTES, 1, 4 * isa.lanes)]) for f in range(FIELDS)]

    def scale(self, isa: InstructionSet, packed: Any, block: Any, address: Any, half: int, slabs: int) -> Any:
        return load_float32(isa, packed, (block + 1) * self.block_bytes - SCALE_BYTES + 4 * half)

    def pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Packs ``int8 [N, K]`` and ``fp32 [N]`` into ``uint8 [packed_bytes]``."""
        p = self.problem
        padded_rows = p.row_blocks * SLAB - p.rows
        rows = F.pad(weight.view(torch.uint8) ^ 0x80, (0, 0, 0, padded_rows), value=0x80)
        split = p.full_groups * p.group
        full = rows[:, :split].reshape(rows.shape[0], p.full_groups, p.group)
        tail = rows[:, split:]
        padded = [
            F.pad(full, (0, p.group_slabs * SLAB - p.group), value=0x80).flatten(1),
            F.pad(tail, (0, p.tail_slabs * SLAB - tail.shape[1]), value=0x80),
        ]
        fields = torch.cat(padded, 1).reshape(p.row_blocks, SLAB, -1, 4).transpose(1, 2).reshape(p.row_blocks, -1)
        scales = F.pad(scale.float(), (0, padded_rows)).reshape(p.row_blocks, SLAB).view(torch.uint8)
        return torch.cat([fields, scales], 1).flatten()
