"""Runs a stored program that decodes one sequence, one token at a time, in a device's memory.

Every sequence of a batch is decoded by itself, all on the same weights, so padding takes no part in it. A prompt is fed
in parts, unless the logits of all its tokens are wanted. Needs neither torch nor TVM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lbllm_compile.codegen.backend import DecodedSequence, SequenceBackend, StateTensor, backend_of
from lbllm_compile.codegen.errors import KernelError, OutOfMemoryError
from lbllm_compile.codegen.sampling import Draw
from lbllm_compile.codegen.sizes import CAPACITY_MULTIPLE, MOST_ELEMENTS, capacity_for
from lbllm_compile.codegen.targets import Target
from lbllm_compile.native.description import DESCRIPTION, LIBRARY, WEIGHTS, Description, Member, StoredModel
from lbllm_compile.native.generate import GenerationError, Sampling, check_finite


class ReplayedProgram:
    """A program in a device's memory. Its sessions may be in different threads, each in one.

    Args:
        directory: what :func:`lbllm_compile.lowering.build.build_native` wrote.
        target: the device.

    Raises:
        TargetError: this machine has no such device.
        KernelError: it cannot be loaded.
    """

    def __init__(self, directory: Path, target: Target):
        self.directory = directory
        backend = backend_of(target)
        if not isinstance(backend, SequenceBackend):
            raise KernelError(f"programs of {target.name} do not decode sequences one by one; this is a bug")
        self.backend: SequenceBackend = backend
        try:
            self.description = Description.from_json((directory / DESCRIPTION).read_text(encoding="utf-8"))
            state = [_state_tensor(member) for member in self.description.state]
            self.machine = backend.sequences(directory / LIBRARY, directory / WEIGHTS, state, target)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KernelError(f"the stored program {directory} is damaged ({error})") from error
        self._slots = MOST_ELEMENTS // max((t.heads * t.bytes for t in state), default=1)

    def session(self, batch: int, capacity: int = 0) -> ReplayedSession:
        """An empty conversation with ``batch`` sequences and room for ``capacity`` tokens, which grows.

        Raises:
            KernelError: the device has no room for it.
        """
        return ReplayedSession(self, batch, capacity)

    def model(self, tokenizer: Any) -> ReplayedModel:
        """The program with a tokenizer, or without one."""
        return ReplayedModel(self, tokenizer)

    def capacity_for(self, tokens: int) -> int:
        """Slots of a state with room for so many tokens.

        Raises:
            GenerationError: kernels could not index it.
        """
        capacity = capacity_for(tokens)
        if capacity > self._slots:
            raise GenerationError(f"{tokens} tokens of a sequence are too many for one state; use a shorter context")
        return capacity

    def grown(self, sequence: DecodedSequence, tokens: int) -> None:
        """Makes room for so many tokens in a sequence: for twice as many as there was, so that it seldom has to, as far
        as the model has positions, kernels can index and the device has memory.

        Raises:
            GenerationError: kernels could not index it.
            KernelError: the device has no room for it.
        """
        least = self.capacity_for(tokens)
        bounds = self.description.bounds
        most = [self._slots // CAPACITY_MULTIPLE * CAPACITY_MULTIPLE]
        most += [capacity_for(limit) for limit in (bounds.positions, bounds.slots) if limit is not None]
        wanted = max(least, min(2 * sequence.capacity, *most))
        if wanted > least:
            with suppress(OutOfMemoryError):
                sequence.grow(wanted)
                return
        sequence.grow(least)


def _state_tensor(member: Member) -> StateTensor:
    """A tensor ``[batch, heads, capacity, ...]`` of one sequence."""
    _, heads, _, *tail = (size if isinstance(size, int) else 1 for size in member.shape)
    return StateTensor(member.offset, heads, math.prod(tail) * np.dtype(member.dtype).itemsize)


class ReplayedSession:
    """One generation in progress: a sequence in the device's memory for each of a batch.

    Implements :class:`~.generate.ChoosingSteps`.

    Attributes:
        sequences: in the order of the batch.
    """

    def __init__(self, program: ReplayedProgram, batch: int, capacity: int):
        self._program = program
        room = program.capacity_for(capacity)
        self.sequences: list[DecodedSequence] = [program.machine.sequence(room) for _ in range(batch)]
        self._prompt_mask: np.ndarray | None = None
        self._chosen: list[int | None] = [None] * batch

    def start(self, mask: np.ndarray) -> None:
        """Sets which tokens of the prompt, fed next, are not padding: ``[B, S]``."""
        self._prompt_mask = np.asarray(mask, np.int64)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits behind the last one, ``[B, V]``."""
        self._feed(ids)
        return self._logits()

    def chosen(self, ids: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
        """As :meth:`~.generate.ChoosingSteps.chosen`: a token and its logit are copied for each sequence."""
        self._feed(ids, sampling.draws(generator, len(self.sequences)))
        choices = [sequence.choice() for sequence in self.sequences]
        check_finite(np.array([logit for _, logit in choices]))
        self._chosen = [token for token, _ in choices]
        return np.array(self._chosen, np.int64)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits of all of them, ``[B, S, V]``.

        Those of padding are those of the token before it, or zeros.
        """
        mask = self._checked(ids)
        found = []
        for i in range(ids.shape[1]):
            self._feed_column(ids[:, i], mask[:, i], [None] * len(self.sequences))
            found.append(self._logits())
        return np.stack(found, 1)

    def rewind(self, tokens: int) -> bool:
        """Forgets all but the first ``tokens`` of a single sequence.

        Returns:
            False, with nothing changed, where the model keeps a state that cannot go back.
        """
        (sequence,) = self.sequences
        if tokens < sequence.past and self._program.description.fixed:
            return False
        sequence.rewind(tokens)
        self._chosen = [None]
        return True

    def _logits(self) -> np.ndarray:
        return np.stack([sequence.logits() for sequence in self.sequences])

    def _feed(self, ids: np.ndarray, draws: Sequence[Draw | None] = ()) -> None:
        """Feeds ``[B, S]`` more token ids; behind the last one the device chooses by the draws."""
        mask = self._checked(ids)
        draws = draws or [None] * len(self.sequences)
        if ids.shape[1] == 1:
            self._feed_column(ids[:, 0], mask[:, 0], draws)
            return
        for number, (sequence, row, new, draw) in enumerate(zip(self.sequences, ids, mask, draws, strict=True)):
            if tokens := row[new != 0].tolist():
                sequence.feed(tokens, draw)
                self._chosen[number] = None

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """The mask ``[B, S]`` of tokens that are fed next, which are valid, and for which there is room then."""
        bounds = self._program.description.bounds
        if ids.size:
            bounds.check_ids(int(ids.min()), int(ids.max()))
        mask = np.ones(ids.shape, np.int64) if self._prompt_mask is None else self._prompt_mask
        counts = [s.past + int(new) for s, new in zip(self.sequences, mask.sum(1), strict=True)]
        longest = max(counts, default=0)
        bounds.check_length(longest, longest)
        for sequence, count in zip(self.sequences, counts, strict=True):
            if count > sequence.capacity:
                self._program.grown(sequence, count)
        self._prompt_mask = None
        return mask

    def _feed_column(self, ids: np.ndarray, mask: np.ndarray, draws: Sequence[Draw | None]) -> None:
        """Feeds a token to every sequence whose mask is not 0; the device has what it chose itself."""
        rows = zip(self.sequences, ids.tolist(), mask.tolist(), draws, strict=True)
        for number, (sequence, token, new, draw) in enumerate(rows):
            if new:
                sequence.step(None if self._chosen[number] == token else token, draw)
                self._chosen[number] = None


class ReplayedModel(StoredModel):
    """A program in a device's memory and a tokenizer."""

    def __init__(self, program: ReplayedProgram, tokenizer: Any):
        super().__init__(program.description, tokenizer)
        self.program = program

    def session(self, batch: int, capacity: int = 0) -> ReplayedSession:
        return self.program.session(batch, capacity)
