"""Names for the sizes that inputs choose, so that a graph shows ``f32[batch, length, 576]`` and not a probe's sizes.

Shapes are propagated twice, for inputs that differ in every size that may be chosen. What a dimension is both times
tells which one it follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...codegen.sizes import BATCH, CAPACITY, LENGTH, TOTAL
from .program import STATE, Program

PAST = "past"
"""The graph's input that counts the tokens before the new ones, and the name of a size that follows it."""

_OTHERS = ((11, 5, 1), (13, 7, 2), (17, 8, 4), (19, 10, 3))
"""Sequences, new tokens and past ones of the other inputs; the first that has no size of the probe's is taken."""

_SPARE = 2
"""Slots of the state beyond all tokens in the other inputs: a capacity is no number of tokens."""


@dataclass(frozen=True)
class Names:
    """Inputs of other sizes, and what the sizes are called.

    Attributes:
        inputs: to propagate shapes for, by placeholder; tensors without values.
        values: what every size is in the probe, and in these inputs.
    """

    inputs: Mapping[str, Any]
    values: Mapping[str, tuple[int, int]]

    def text(self, here: str, there: str) -> str:
        """A dtype and shape (:func:`.dump.shape_text`) with names.

        Args:
            here, there: the text for the probe, and for :attr:`inputs`.
        """
        head, _, sizes = here[:-1].partition("[")
        dimensions, others = sizes.split(", "), there[:-1].partition("[")[2].split(", ")
        if not sizes or len(dimensions) != len(others):
            return here
        return f"{head}[{', '.join(self._name(a, b) for a, b in zip(dimensions, others, strict=True))}]"

    def _name(self, here: str, there: str) -> str:
        """A size that is ``here`` in the probe and ``there`` in the other inputs; ``?`` where it follows none of them,
        or the values of a tensor, as the number of places where a mask is set does."""
        if not (here.isdecimal() and there.isdecimal()):
            return "?"
        if here == there:
            return here
        return next((name for name, size in self._candidates(int(here)) if size == int(there)), "?")

    def _candidates(self, here: int) -> Iterator[tuple[str, int]]:
        """What a size that is ``here`` in the probe may follow, simplest first, and what it then is in the others.

        That is a size that inputs choose, tokens of all sequences, a multiple of these, or one and a number.
        """
        yield from ((name, b) for name, (a, b) in self.values.items() if a == here)
        (one, other), tokens = self.values[BATCH], self.values.keys() & {LENGTH, TOTAL}
        products = {f"{BATCH}*{n}": (one * a, other * b) for n, (a, b) in self.values.items() if n in tokens}
        for name, (a, b) in {**self.values, **products}.items():
            if a and here % a == 0:
                factor = here // a
                yield (name if factor == 1 else f"{factor}*{name}"), factor * b
        yield from ((f"{name}{here - a:+d}", b + here - a) for name, (a, b) in self.values.items())


def choose(program: Program, probe: Mapping[str, Any]) -> Names | None:
    """Inputs of other sizes than the probe's; None where the graph takes no others.

    A language model chooses sequences and tokens, another module the first dimension of its inputs where capture left
    that open.
    """
    names = {str(node.target) for node in program.placeholders()}
    if program.kind == "causal-lm" and {"input_ids", "attention_mask"} <= names:
        return _of_tokens(program, probe, PAST in names)
    values = [node.meta.get("val") for node in program.placeholders()]
    firsts = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    if not firsts or not all(isinstance(size, torch.SymInt) for size in firsts):
        return None
    batched = {name: t for name, t in probe.items() if isinstance(t, Tensor) and t.dim()}
    batch = len(next(iter(batched.values())))
    other = 2 * batch + 1
    inputs = {name: t.new_empty((other, *t.shape[1:])) for name, t in batched.items()}
    return Names({**probe, **inputs}, {BATCH: (batch, other)})


def _of_tokens(program: Program, probe: Mapping[str, Any], cached: bool) -> Names:
    """Inputs of a language model; ``cached`` where it takes past tokens."""
    (batch, length), total = probe["input_ids"].shape, probe["attention_mask"].shape[1]
    sequences, tokens, past = next(
        (s, new, old) for s, new, old in _OTHERS if s != batch and not {new, new + old} & {length, total}
    )
    past = past if cached else 0
    ids = torch.zeros((sequences, tokens), dtype=torch.int64)
    mask = torch.ones((sequences, past + tokens), dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": ids, "attention_mask": mask}
    values = {BATCH: (batch, sequences), LENGTH: (length, tokens)}
    if cached:
        capacity = past + tokens + _SPARE
        states = {str(n.target): n.meta[STATE].allocate(sequences, capacity) for n in program.state_placeholders()}
        inputs |= {PAST: past, **states}
        values |= {TOTAL: (total, past + tokens), CAPACITY: (total, capacity)}
    return Names(inputs, values)
