"""Sequences that are decoded together have, to the bit, the logits that each has alone."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
import talker

from lbllm_compile.native import batch as batches
from lbllm_compile.native import description as described
from lbllm_compile.native import program as native
from lbllm_compile.native.batch import Batch, can_batch, is_exact
from lbllm_compile.native.generate import GenerationError
from lbllm_compile.native.program import NativeProgram, NativeSession, State


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> NativeProgram:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        found = talker.make(Path(tempfile.mkdtemp(dir=tmp_path_factory.mktemp("made")))).native
    assert found is not None
    return found


class Pair:
    """A sequence in a session of its own, and the session of the same one that joins batches."""

    def __init__(self, program: NativeProgram, prompt: np.ndarray):
        self.alone, self.joining = program.session(1), program.session(1)
        self.expected = self.alone.step(prompt[None])
        assert np.array_equal(self.joining.step(prompt[None]), self.expected)

    def same_state(self) -> bool:
        past = self.alone.past
        arrays = zip(self.alone.state.arrays, self.joining.state.arrays, strict=True)
        return self.joining.past == past and all(np.array_equal(a[:, :, :past], b[:, :, :past]) for a, b in arrays)


@pytest.mark.parametrize(("slack", "headroom"), [(256, 64), (9, 2)], ids=["roomy", "moving"])
@pytest.mark.parametrize("seed", range(3))
def test_sequences_join_and_leave_between_steps(program, monkeypatch, slack, headroom, seed):
    monkeypatch.setattr(batches, "SLACK", slack)
    monkeypatch.setattr(batches, "HEADROOM", headroom)
    generator = np.random.default_rng(seed)
    vocabulary = program.description.bounds.vocabulary
    batch, rows = Batch(program, 5), []
    for _ in range(60):
        if len(rows) < 5 and (not rows or generator.random() < 0.3):
            pair = Pair(program, generator.integers(0, vocabulary, generator.integers(1, 60)))
            assert batch.join(pair.joining) == len(rows)
            rows.append(pair)
        tokens = generator.integers(0, vocabulary, len(rows))
        logits = batch.step(tokens.tolist())
        for pair, token, row in zip(rows, tokens, logits, strict=True):
            assert np.array_equal(pair.alone.step(token.reshape(1, 1))[0], row)
        if generator.random() < 0.25:
            leaving = int(generator.integers(len(rows)))
            batch.leave(leaving, rows[leaving].joining)
            assert rows[leaving].same_state()
            rows[leaving] = rows[-1]
            rows.pop()
    assert len(batch) == len(rows)


def test_a_session_goes_on_from_a_part_of_another(program):
    generator = np.random.default_rng(0)
    first = Pair(program, generator.integers(3, 90, 40))
    fork = program.session(1)
    fork.take(first.joining.state, 0, 0, 25)
    rest = generator.integers(3, 90, (1, 9))
    assert first.alone.rewind(25)
    assert np.array_equal(fork.step(rest), first.alone.step(rest))


def test_a_probe_shows_that_it_is_exact(program, monkeypatch):
    assert is_exact(program)
    real = Batch.step
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", lambda self, ids: real(self, ids) * np.float32(1 + 1e-6))
        assert not is_exact(program)
    fed = NativeSession.step
    longest = max(batches.PROBE)
    monkeypatch.setattr(
        NativeSession, "step", lambda self, ids: fed(self, ids) * np.float32(1 + 1e-6 * (ids.shape[1] > longest))
    )
    assert not is_exact(program)


def test_more_elements_than_a_call_can_index_are_refused(program, monkeypatch):
    """As in a session of its own."""
    session, batch = program.session(1), Batch(program, 2)
    session.step(np.array([[5, 6, 7]]))
    for _ in range(2):
        batch.join(session)
    monkeypatch.setattr(described, "MOST_ELEMENTS", 64)
    with pytest.raises(GenerationError, match="too many for one call; use a shorter context"):
        batch.step([5, 6])
    with pytest.raises(GenerationError, match="too many for one call; use a shorter context"):
        session.step(np.array([[5, 6]]))


def test_padding_that_has_positions_keeps_sequences_apart(program):
    bounds = dataclasses.replace(program.description.bounds, slots=64)
    other = type("Program", (), {"description": dataclasses.replace(program.description, bounds=bounds)})()
    assert can_batch(program) and not can_batch(other)


def test_a_state_of_fixed_size_cannot_go_back_and_moves_with_its_sequence(program, monkeypatch):
    member = native.Member("convolution", ("batch", 3), "float32", 0)
    description = dataclasses.replace(program.description, fixed=(member,), fixed_bytes=12)
    other = type("Program", (), {"description": description, "machine": program.machine})()
    one, three = State(other, 1, 64), State(other, 3, 64)
    one.arrays[-1][0] = [1.0, 2.0, 3.0]
    three.take(2, 7, one, 0, 0, 0)
    assert three.arrays[-1].tolist() == [[0.0] * 3, [0.0] * 3, [1.0, 2.0, 3.0]]
    session = program.session(1)
    session.step(np.array([[5, 6, 7]]))
    monkeypatch.setattr(program, "description", description)
    assert not session.rewind(2) and session.past == 3
    assert session.rewind(3)
