"""Sampling: from a step function over token ids to tokens, greedy or random, for one sequence or a padded batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.sampling import Draw, drawn


class GenerationError(LbllmError):
    """A request that cannot be answered: an empty prompt, one beyond the context, options out of range."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many tokens a sequence.
        temperature: 0 for the most likely token (greedy); else logits are divided by it. Any finite value will do: the
            nearer to 0, the likelier is the most likely token, and very large ones make all tokens alike.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together reach this probability; 1 for all.
        seed: start of the generator that draws; the global one is not touched.

    Raises:
        GenerationError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1")
        if not 0.0 <= self.temperature < math.inf:
            raise GenerationError(f"the temperature is {self.temperature}; use 0 (greedy) or a number above it")
        if self.top_k < 0:
            raise GenerationError(f"top_k is {self.top_k}; use 0 (all tokens) or more")
        if self.seed < 0:
            raise GenerationError(f"the seed is {self.seed}; use 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p is {self.top_p}; use a probability above 0 and at most 1")

    def draws(self, generator: np.random.Generator, count: int) -> list[Draw | None]:
        """What chooses the next tokens of so many sequences; None for the most likely ones."""
        if self.temperature == 0.0:
            return [None] * count
        return [Draw(self.temperature, self.top_k, self.top_p, place) for place in generator.random(count).tolist()]


def choose(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """Next token ids ``[B]`` from logits ``[B, V]``.

    Raises:
        GenerationError: the highest logit is infinite or no number.
    """
    likeliest = logits.argmax(-1)  # the first one that is no number, where there is one
    highest = logits[np.arange(len(logits)), likeliest, None]
    check_finite(highest)
    draws = sampling.draws(generator, len(logits))
    rows = zip(logits, likeliest.tolist(), draws, strict=True)
    return np.array([first if draw is None else drawn(row, draw) for row, first, draw in rows], np.int64)


def check_finite(highest: np.ndarray) -> None:
    """Refuses logits of which the highest are these.

    Raises:
        GenerationError: one is infinite or no number.
    """
    if not np.isfinite(highest).all():
        raise GenerationError("the model's logits are infinite or no numbers here; its weights may be damaged")


class Steps(Protocol):
    """One generation in progress: the KV state and the attention mask of a batch of sequences."""

    def start(self, mask: np.ndarray) -> None:
        """Sets which tokens of the prompt, fed next, are not padding: ``[B, S]``."""
        ...

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits behind the last one, ``[B, V]``."""
        ...

    def rewind(self, tokens: int) -> bool:
        """Forgets all but the first ``tokens`` of a single sequence without padding; False where it cannot."""
        ...


@runtime_checkable
class ChoosingSteps(Steps, Protocol):
    """Steps of which a device chooses the tokens itself, so that logits need not be copied from it."""

    def chosen(self, ids: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns what :func:`choose` does of the logits behind the last one.

        Raises:
            GenerationError: the highest logit is infinite or no number.
        """
        ...


def next_tokens(steps: Steps, ids: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """Feeds ``[B, S]`` more token ids; returns the tokens ``[B]`` that are chosen behind them.

    Raises:
        GenerationError: the highest logit is infinite or no number.
    """
    if isinstance(steps, ChoosingSteps):
        return steps.chosen(ids, sampling, generator)
    return choose(steps.step(ids), sampling, generator)


def tokens(steps: Steps, prompt: np.ndarray, sampling: Sampling, stop: Sequence[int]) -> Iterator[list[int | None]]:
    """Generates; yields one token per sequence and step, None where a sequence has ended.

    A stop token ends its sequence and is not yielded. Ended sequences are fed their stop token until all have ended.
    """
    generator = np.random.default_rng(sampling.seed)
    stop_ids = frozenset(stop)
    running = [True] * prompt.shape[0]
    ids = prompt
    for _ in range(sampling.max_new_tokens):
        chosen = next_tokens(steps, ids, sampling, generator).tolist()
        running = [r and token not in stop_ids for r, token in zip(running, chosen, strict=True)]
        if not any(running):
            return
        yield [token if r else None for r, token in zip(running, chosen, strict=True)]
        ids = np.array(chosen, dtype=np.int64)[:, None]


def left_pad(sequences: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[B, S]`` and attention mask ``[B, S]`` (int64), shorter sequences padded on the left."""
    length = max(len(s) for s in sequences)
    ids = np.full((len(sequences), length), pad, dtype=np.int64)
    mask = np.zeros((len(sequences), length), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        if len(sequence):
            ids[row, length - len(sequence) :] = sequence
            mask[row, length - len(sequence) :] = 1
    return ids, mask


class TextStream:
    """Turns token ids into text piece by piece, holding back characters whose bytes are not complete."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that ``token`` adds; empty while a character is incomplete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd"):
            return ""
        # a few tokens of context keep spaces between words; older ones no longer matter
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """What was held back."""
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]


def check_stop_strings(stop: Sequence[str]) -> Sequence[str]:
    """The stop strings as they are.

    Raises:
        GenerationError: one is empty.
    """
    if not all(stop):
        raise GenerationError("a stop string is empty; give at least one character")
    return stop


class AnswerText:
    """Text of an answer, token by token, up to the first of some stop strings.

    Text that may be the beginning of a stop string is held back until it is clear whether it is one.

    Attributes:
        stopped: whether a stop string came; it and what follows is not part of the text.

    Raises:
        GenerationError: a stop string is empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        check_stop_strings(stop)
        self.stopped = False
        self._stream, self._stop, self._held = TextStream(decode), tuple(stop), ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        return self._certain(self._stream.push(token))

    def end(self) -> str:
        """What was held back, where the answer ends without a stop string."""
        text = self._certain(self._stream.end())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _certain(self, piece: str) -> str:
        self._held += piece
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        most = len(self._held) + 1  # a beginning of a stop string that is held is no longer than what is held
        beginnings = [n for stop in self._stop for n in range(1, min(len(stop), most)) if self._held.endswith(stop[:n])]
        certain = len(self._held) - max(beginnings, default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text
