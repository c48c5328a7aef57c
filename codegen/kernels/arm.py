"""ARM vector instructions the kernels are built from, each a thin wrapper of one LLVM intrinsic or a short idiom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..tvm_api import T, pure_intrinsic
from .isa import InstructionSet, Pair


class NeonDotprod(InstructionSet):
    """128-bit ``tbl``, ``cnt``, and ``sdot``, which takes signed weights and sums exactly in int32."""

    name = "neon-dotprod"
    lanes = 4
    registers = 32
    offset = 0
    counts_bits = True
    chains = (2, 1, 4)  # a block has four row vectors, whose tables and sixteen accumulators would spill

    def shuffle(self, table: Any, index: Any) -> Any:
        return pure_intrinsic(self.uint8, "llvm.aarch64.neon.tbl1", table, T.reinterpret(self.uint8, index))

    def dot(self, total: Any, pairs: list[Pair]) -> Any:
        for weights, values in pairs:
            total = pure_intrinsic(
                self.int32, "llvm.aarch64.neon.sdot", total, weights, T.reinterpret(self.int8, values)
            )
        return total

    def quad(self, staged: Any, slab: Any, field: int) -> Any:
        # A lane of the whole slab: ``sdot`` takes it from there, so that a slab costs one load and no broadcast.
        values = T.reinterpret(self.int32, staged[T.ramp(slab, 1, 16)])
        return T.Shuffle([values], [field] * self.lanes)


class NeonI8mm(NeonDotprod):
    """``smmla``, two rows times two tokens of eight columns, for many tokens; ``sdot`` for one."""

    name = "neon-i8mm"
    pairs_per_dot = 2
    tokens_per_dot = 2

    def arrange(self, fields: list[Any]) -> list[Any]:
        """Two fields of four rows become eight columns of rows 0 and 1, and of rows 2 and 3."""
        words = [T.Bind(T.reinterpret(self.int32, field)) for field in fields]
        arranged = []
        for pair in (words[:2], words[2:]):
            arranged += [T.Shuffle(pair, [0, 4, 1, 5]), T.Shuffle(pair, [2, 6, 3, 7])]
        return [T.reinterpret(self.uint8, vector) for vector in arranged]

    def load_values(self, staged: Any, slab: Any, field: int) -> list[Any]:
        """Eight columns of one token, then of the next."""
        return [staged[T.ramp(slab + 4 * field * self.tokens_per_dot, 1, 16)]]

    def multiply(self, totals: list[Any], weights: list[Any], values: list[Any]) -> list[Any]:
        (tokens,) = values
        return [
            pure_intrinsic(self.int32, "llvm.aarch64.neon.smmla", total, tokens, rows)
            for total, rows in zip(totals, weights, strict=True)
        ]

    def by_token(self, totals: list[Any]) -> list[Any]:
        return [T.Shuffle(totals, [0, 1, 4, 5]), T.Shuffle(totals, [2, 3, 6, 7])]


INSTRUCTION_SETS: dict[str, Callable[[int], InstructionSet]] = {
    "neon-i8mm": lambda act_bits: NeonI8mm(),
    "neon-dotprod": lambda act_bits: NeonDotprod(),
}
"""The instructions of a kernel family for values of 4 or 8 bits."""
