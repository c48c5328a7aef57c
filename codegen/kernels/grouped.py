"""What the packed layouts of weights with a scale per group have in common: blocks of 16 rows, in a block one group
after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..format import QuantizedWeight
from ..tvm_api import T
from .dot import SLAB, Problem
from .isa import InstructionSet

SCALE_BYTES = 2 * SLAB
"""Bytes of the fp16 scales of a group of a row block."""


def load_scales(isa: InstructionSet, packed: Any, address: Any) -> Any:
    """``lanes`` fp16 numbers from a byte buffer, as fp32."""
    halves = T.reinterpret(f"float16x{isa.lanes}", packed[T.ramp(address, 1, 2 * isa.lanes)])
    return T.cast(halves, isa.float32)


@dataclass(frozen=True)
class GroupedOperand(ABC):
    """Weights in such a layout; see :class:`.dot.Operand`.

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
    def pack_groups(self, codes: Tensor, *sides: Tensor) -> Tensor:
        """Packs groups of equal width, ``B`` blocks of them.

        Args:
            codes: uint8 ``[16 B, G * width]``.
            sides: what belongs to the groups, ``[16 B, G, ...]``.

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

    def pack_rows(self, codes: Tensor, *sides: Tensor) -> Tensor:
        """Packs codes ``[N, K]`` and what belongs to their groups, ``[N, G, ...]``, into ``uint8 [bytes]``."""
        p = self.problem
        missing = p.row_blocks * SLAB - p.rows
        codes, sides = _more_rows(codes, missing), tuple(_more_rows(side, missing) for side in sides)
        full, split = p.full_groups, p.full_groups * p.group
        parts = []
        if full:
            parts.append(self.pack_groups(codes[:, :split], *(side[:, :full] for side in sides)))
        if p.tail_slabs:
            tail = F.pad(codes[:, split:], (0, self.padded(p.tail_slabs) - (p.columns - split)))
            parts.append(self.pack_groups(tail, *(side[:, full:] for side in sides)))
        return torch.cat(parts, 1).flatten()


@dataclass(frozen=True)
class BitOperand(GroupedOperand):
    """W(1+1) weights, whose groups have levels and a scale."""

    def pack(self, weight: QuantizedWeight) -> Tensor:
        """Packs canonical planes ``[N, K]`` into ``uint8 [packed_bytes]``."""
        return self.pack_rows(weight.codes(), weight.levels, weight.scale)


def _more_rows(tensor: Tensor, count: int) -> Tensor:
    """A tensor with so many rows of zeros behind its own."""
    return torch.cat([tensor, tensor.new_zeros((count, *tensor.shape[1:]))])
