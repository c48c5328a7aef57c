"""What a stored program says of itself, whatever runs it. Needs neither torch nor TVM."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbllm_compile.codegen.sizes import MOST_ELEMENTS
from lbllm_compile.native.generate import GenerationError
from lbllm_compile.native.language import InputBounds, LanguageModel

LIBRARY, WEIGHTS, DESCRIPTION = "program.so", "weights.bin", "program.json"
"""Files of a stored program: what its backend loads, the block of weights, and the description."""


@dataclass(frozen=True)
class Member:
    """A tensor within a block of bytes.

    Attributes:
        name: of the weight or state.
        shape: dimensions; in KV state ``"batch"`` and ``"capacity"`` stand for what a session chooses; state
            of fixed size has no capacity.
        dtype: numpy's name of the dtype.
        offset: in bytes; in KV state per sequence and slot, in state of fixed size per sequence.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class Function:
    """One function of a stored program.

    Attributes:
        name: in the library.
        batch, length: sequences and tokens of a call; None for any number.
        most: tokens of all sequences together that a call takes at most; None for any number.
        last: gives the logits of the last token only.
        tensors: the tensors that its kernels index, as pairs of the symbols in a shape and the elements there are
            where each symbol is one.
    """

    name: str
    batch: int | None
    length: int | None
    most: int | None
    last: bool
    tensors: tuple[tuple[tuple[str, ...], int], ...]

    def takes(self, batch: int, length: int, last: bool) -> bool:
        """Whether it computes a call of that kind, however large its tensors get."""
        fits = self.batch in (None, batch) and self.length in (None, length)
        return fits and (self.most is None or batch * length <= self.most) and self.last == last

    def sequences(self, sizes: Mapping[str, int]) -> int:
        """Most sequences, at least one, for which every tensor can be indexed.

        Args:
            sizes: what the symbols ``length``, ``total`` and ``capacity`` stand for.

        Raises:
            GenerationError: not even one sequence fits.
        """
        elements = [
            count * math.prod(sizes[symbol] for symbol in symbols if symbol != "batch")
            for symbols, count in self.tensors
            if "batch" in symbols
        ]
        most = MOST_ELEMENTS // max(elements, default=1)
        if most < 1:
            raise GenerationError(
                f"{sizes['length']} tokens of a sequence with room for {sizes['capacity']} are too many for one call;"
                " use a shorter context"
            )
        return most


@dataclass(frozen=True)
class Description:
    """What a stored program says of itself.

    Attributes:
        target: what it runs on.
        schedules: of its kernels, as :func:`schedules_key` gives them.
        inputs: arguments of its functions before the blocks: some of ``input_ids``, ``attention_mask``,
            ``position_ids``.
        weights, state, fixed: tensors of the blocks: weights, KV state and state of fixed size.
        state_bytes: of the KV state per sequence and slot.
        fixed_bytes: of the state of fixed size per sequence.
        functions: what the library computes; the first that takes a call is the best for it.
        workspaces: bytes of working memory of the functions that take some.
        bounds: of the token ids and positions that the functions take.
        merged: functions of few launches that compute, to the bit, what their kernels do.
        config: the model's configuration.
        plain_tokenizer: whether :class:`~.text.TextTokenizer` does what the model's tokenizer does.
    """

    target: str
    schedules: str
    inputs: tuple[str, ...]
    weights: tuple[Member, ...]
    state: tuple[Member, ...]
    state_bytes: int
    fixed: tuple[Member, ...]
    fixed_bytes: int
    functions: tuple[Function, ...]
    workspaces: Mapping[str, int]
    bounds: InputBounds
    merged: tuple[str, ...]
    config: Mapping[str, Any]
    plain_tokenizer: bool

    @classmethod
    def from_json(cls, text: str) -> Description:
        fields = json.loads(text)
        for block in ("weights", "state", "fixed"):
            fields[block] = tuple(Member(**{**m, "shape": tuple(m["shape"])}) for m in fields[block])
        functions = []
        for function in fields["functions"]:
            tensors = tuple((tuple(symbols), count) for symbols, count in function["tensors"])
            functions.append(Function(**{**function, "tensors": tensors}))
        fields["bounds"] = InputBounds(**fields["bounds"])
        for name in ("inputs", "merged"):
            fields[name] = tuple(fields[name])
        return cls(**{**fields, "functions": tuple(functions)})

    def function(self, batch: int, length: int, last: bool, merged: bool = True) -> Function:
        """The best function for a call; without ``merged`` of those that do not run in few launches."""
        usable = (f for f in self.functions if f.name not in self.workspaces or (merged and f.name in self.merged))
        return next(f for f in usable if f.takes(batch, length, last))


class StoredModel(LanguageModel):
    """What a stored program and a tokenizer are as a model.

    Args:
        description: of the program.
        tokenizer: as :attr:`~.language.LanguageModel.tokenizer`.
    """

    def __init__(self, description: Description, tokenizer: Any):
        self.config = description.config
        self.tokenizer = tokenizer
        self._bounds = description.bounds

    @property
    def context_length(self) -> int | None:
        """Tokens the model can attend to: as its configuration says, and as many as its graph has positions for."""
        bounds = self._bounds
        known = [most for most in (super().context_length, bounds.positions, bounds.slots) if most is not None]
        return min(known, default=None)
