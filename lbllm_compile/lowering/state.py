"""The KV state of one generation: quantized keys and values of every attention, growing as tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lbllm_compile.codegen.sizes import MIN_CAPACITY
from lbllm_compile.passes.ir.program import PER_TOKEN, STATE, Program, StateSpec


class KVState:
    """State tensors, ``[B, heads, capacity, ...]`` or of a fixed size, in the order of the graph's placeholders.

    Attributes:
        past: tokens stored so far, padding included.
    """

    def __init__(self, specs: Sequence[StateSpec], batch: int, capacity: int):
        self.past = 0
        self._specs = specs
        self._capacity = max(capacity, MIN_CAPACITY)
        self.tensors = [spec.allocate(batch, self._capacity) for spec in specs]

    @classmethod
    def of(cls, program: Program, batch: int, capacity: int) -> KVState:
        """An empty state for ``program``."""
        return cls([n.meta[STATE] for n in program.state_placeholders()], batch, capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def has_fixed(self) -> bool:
        """Whether some of it is of fixed size and holds no token by itself."""
        return any(spec.kind != PER_TOKEN for spec in self._specs)

    @property
    def bytes(self) -> int:
        """Memory of all state tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more, at least doubling when it has to grow."""
        needed = self.past + tokens
        if needed <= self._capacity:
            return
        capacity = max(needed, 2 * self._capacity)
        for index, (spec, old) in enumerate(zip(self._specs, self.tensors, strict=True)):
            if spec.kind != PER_TOKEN:
                continue
            new = spec.allocate(old.shape[0], capacity)
            new[:, :, : self.past] = old[:, :, : self.past]
            self.tensors[index] = new
        self._capacity = capacity


def positions(mask: Tensor) -> Tensor:
    """Position ids ``[B, S]``: the number of tokens before, padding not counted."""
    return (mask.cumsum(1) - 1).clamp_min(0)
