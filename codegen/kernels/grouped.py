"""What the packed layouts of W(1+1) weights have in common: blocks of 16 rows, in a block one group after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..format import QuantizedWeight
from .dot import SLAB, Problem


@dataclass(frozen=True)
class GroupedOperand(ABC):
    """W(1+1) weights in such a layout; see :class:`.dot.Operand`.

    Attributes:
        problem: what the weights are of.
    """

    problem: Problem

    decodes = True

    @abstractmethod
    def bytes_of(self, slabs: int) -> int:
        """Bytes of a group of so many slabs, of one row block."""

    @abstractmethod
    def padded(self, slabs: int) -> int:
        """Columns that the codes of a short group of so many slabs are padded to."""

    @abstractmethod
    def pack_groups(self, codes: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        """Packs groups of equal width, ``B`` blocks of them.

        Args:
            codes: uint8 ``[16 B, G * width]``.
            levels: int8 ``[16 B, G, 4]``.
            scale: float16 ``[16 B, G]``.

        Returns:
            uint8 ``[B, bytes]``.
        """

    @property
    def group_bytes(self) -> int:
        return self.bytes_of(self.problem.group_slabs)

    @property
    def block_bytes(self) -> int:
        tail = self.problem.tail_slabs
        return self.problem.full_groups * self.group_bytes + (self.bytes_of(tail) if tail else 0)

    @property
    def packed_bytes(self) -> int:
        return self.problem.row_blocks * self.block_bytes

    def pack(self, weight: QuantizedWeight) -> Tensor:
        """Packs canonical planes ``[N, K]`` into ``uint8 [packed_bytes]``."""
        p = self.problem
        rows = p.row_blocks * SLAB - p.rows
        codes = F.pad(weight.codes(), (0, 0, 0, rows))
        levels = F.pad(weight.levels, (0, 0, 0, 0, 0, rows))
        scale = F.pad(weight.scale, (0, 0, 0, rows))
        full, split = p.full_groups, p.full_groups * p.group
        parts = []
        if full:
            parts.append(self.pack_groups(codes[:, :split], levels[:, :full], scale[:, :full]))
        if p.tail_slabs:
            tail = F.pad(codes[:, split:], (0, self.padded(p.tail_slabs) - (p.columns - split)))
            parts.append(self.pack_groups(tail, levels[:, full:], scale[:, full:]))
        return torch.cat(parts, 1).flatten()
