"""Sequences that are decoded together, and join and leave between two steps.

The program's functions take sequences that end at the same slot of their state. A sequence that joins a running batch
is therefore copied once: its keys and values go to the slots in front of the batch's end, what is before them stays
hidden. A step then reads the weights once for all of them. Nothing is copied from step to step; only when the end
reaches the state's capacity, or a longer sequence joins, do all sequences move.

A sequence's logits are, to the bit, those that it has in a session of its own: linears are exact, every other operator
works on one row, and attention sums over keys in the order of the sequence, wherever it stands
(:mod:`lbllm_compile.codegen.kernels.attention`). :func:`is_exact` shows it for a program on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lbllm_compile.native.generate import left_pad
from lbllm_compile.native.program import NativeProgram, NativeSession, State

SLACK, HEADROOM = 256, 64
"""Slots beyond the end of the sequences in a fresh state, and at least behind a move: so many steps come before
sequences have to move again."""

PROBE = (7, 18, 3)
"""Tokens of the sequences with which :func:`is_exact` looks."""

PROBE_STEPS = 4
"""Tokens that it decodes behind each."""


class Batch:
    """Up to ``most`` sequences of one program, each a row.

    Args:
        program: whose positions do not count padding (:func:`can_batch`).
        most: rows there is room for.
    """

    def __init__(self, program: NativeProgram, most: int):
        self._program, self._most = program, most
        self._state: State | None = None
        self._lengths: list[int] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def join(self, session: NativeSession) -> int:
        """Copies a session of a single sequence without padding into a new row; returns its number, the highest."""
        assert len(self) < self._most
        count = session.past
        if self._state is None or count > self._end:
            self._move_to(max(self._end, count))
        row = len(self)
        assert self._state is not None
        self._state.take(row, self._end - count, session.state, 0, 0, count)
        self._lengths.append(count)
        return row

    def leave(self, row: int, session: NativeSession) -> None:
        """Gives a row's tokens behind those that the session holds to it, and its place to the last row."""
        self.settle(row, session)
        last = len(self) - 1
        if row != last:
            assert self._state is not None
            count = self._lengths[last]
            self._state.take(row, self._end - count, self._state, last, self._end - count, count)
            self._lengths[row] = self._lengths[last]
        del self._lengths[last]
        if not self._lengths:
            self._end = 0

    def settle(self, row: int, session: NativeSession) -> None:
        """Gives a row's tokens behind those that the session holds to it; the row stays."""
        assert self._state is not None
        missing = self._lengths[row] - session.past
        session.take(self._state, row, self._end - missing, missing)

    def step(self, ids: Sequence[int]) -> np.ndarray:
        """Feeds every row one more token id; returns the logits behind them, ``[B, V]``."""
        bounds = self._program.description.bounds
        bounds.check_ids(min(ids), max(ids))
        bounds.check_length(max(self._lengths) + 1, 0)
        assert self._state is not None
        if self._end == self._state.capacity:
            self._move_to(max(self._lengths))
        state, end = self._state, self._end + 1
        lengths = np.array(self._lengths, np.int64)[:, None]
        inputs = {
            "input_ids": np.array(ids, np.int64)[:, None],
            "attention_mask": (np.arange(end) >= self._end - lengths).astype(np.int64),
            "position_ids": lengths,
        }
        logits = self._program.feed(inputs, state, last=True)
        self._lengths = [n + 1 for n in self._lengths]
        self._end = end
        return logits[:, -1]

    def _move_to(self, end: int) -> None:
        """Moves all rows so that they end at slot ``end``, to a larger state where this one is nearly full then."""
        state = self._state
        if state is None or end + HEADROOM > state.capacity:
            state = State(self._program, self._most, end + SLACK)
        if self._state is not None and (state is not self._state or end != self._end):
            for row, count in enumerate(self._lengths):
                state.take(row, end - count, self._state, row, self._end - count, count)
        self._state, self._end = state, end


def can_batch(program: NativeProgram) -> bool:
    """Whether sequences of different lengths can be together: not where the graph counts padding as positions."""
    return program.description.bounds.slots is None


def is_exact(program: NativeProgram) -> bool:
    """Whether logits are the same to the bit however a sequence is fed: token by token together with others or alone,
    behind a beginning that was read in parts or, padded, together with others, or all at once."""
    bounds = program.description.bounds
    most = min(bounds.positions or max(PROBE) + PROBE_STEPS, max(PROBE) + PROBE_STEPS)
    generator, batch = np.random.default_rng(0), Batch(program, len(PROBE) + 1)  # with room, as most batches have
    sequences = [generator.integers(0, bounds.vocabulary or 100, (1, most)) for _ in PROBE]
    starts = [min(start, max(1, most - PROBE_STEPS)) for start in PROBE]
    sessions = [program.session(1) for _ in PROBE]
    found = []
    for session, ids, start in zip(sessions, sequences, starts, strict=True):
        *beginning, rest = np.array_split(ids[:, :start], min(2, start), axis=1)
        for part in beginning:
            session.step(part)
        found.append(session.step(rest))
        batch.join(session)
    if not program.description.fixed:
        padded, mask = left_pad([ids[0, :start].tolist() for ids, start in zip(sequences, starts, strict=True)])
        together = program.session(len(PROBE))
        together.start(mask)
        if not np.array_equal(together.step(padded), np.concatenate(found)):
            return False
    steps = min(PROBE_STEPS, most - max(starts))
    for i in range(steps):
        fed = [ids[:, start + i : start + i + 1] for ids, start in zip(sequences, starts, strict=True)]
        found = [session.step(token) for session, token in zip(sessions, fed, strict=True)]
        if not np.array_equal(batch.step([int(token[0, 0]) for token in fed]), np.concatenate(found)):
            return False
    whole = [program.session(1).step(ids[:, : start + steps]) for ids, start in zip(sequences, starts, strict=True)]
    return all(np.array_equal(a, b) for a, b in zip(whole, found, strict=True))
