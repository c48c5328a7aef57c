"""The scheduler: one thread that owns the program and decodes the requests of many clients together.

Between two steps requests join and leave. A step reads so many tokens of prompts at most that answers which are being
written do not stop for a long one, and then decodes one token of every request. Requests begin with what is known of
their prompt: the longest beginning that it shares with a conversation that was answered before or is being answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.native.batch import Batch, can_batch
from lbllm_compile.native.generate import AnswerText, Sampling, choose, left_pad
from lbllm_compile.native.language import check_prompts
from lbllm_compile.native.program import NativeModel, NativeSession

PART_TOKENS = 128
"""Tokens of prompts that are read between two steps of the others."""

READ_TOKENS = 512
"""The same where more requests wait for that than are being answered: few pause longer, and many begin earlier."""

CALL_TOKENS = 16
"""A call takes as long as so many tokens of a prompt, and some: prompts that differ by no more are read at once."""

SHARED_TOKENS = 16
"""Prompts that share fewer tokens than this are not worth a copy."""

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of a probability of zero, which JSON has no number for, as in the OpenAI API."""

_FAILED = "the server cannot answer any more after a fault; its log says more, and it must be started again"

_LOG = logging.getLogger(__name__)


class BusyError(LbllmError):
    """Too many requests wait already."""


class ClosedError(LbllmError):
    """The engine takes no more requests."""


class SchedulerError(LbllmError):
    """The engine cannot answer any more, after a fault of its own."""


class LateError(LbllmError):
    """A request was not answered in the time it had."""


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        prompt: token ids.
        sampling: how tokens are chosen.
        stop: strings that end the answer.
        logprobs: log-probabilities of so many of the likeliest tokens are wanted beside those of the tokens that were
            chosen; None where none are.
        seconds: from now on, in which it must be answered.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seconds: float = 600.0


@dataclass(frozen=True)
class Token:
    """One token of an answer, with the natural logarithm of its probability and the likeliest tokens' where they were
    asked for, at least :data:`LEAST_LOGPROB`; sampling options do not change these."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next token of an answer, None at its end, and the text that is certain now."""

    text: str
    token: Token | None


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: ``stop`` for a stop string or an end-of-text token, ``length`` where ``max_new_tokens`` were generated.
        prompt_tokens: of the request.
        cached_tokens: those of them that were known from another request.
        tokens: that were generated.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of a request that could not be answered."""

    error: Exception


Event = Piece | Finished | Failed
"""What a request's listener is called with, from the scheduler's thread; the last is :class:`Finished` or
:class:`Failed`, unless the request was cancelled."""


class Listener(Protocol):
    """Hears what the engine does, in its thread."""

    def step(self, sequences: int, seconds: float) -> None:
        """One token of so many sequences was decoded."""
        ...

    def read(self, tokens: int, cached: int) -> None:
        """Tokens of a prompt were read; others were known."""
        ...

    def ended(self, reason: str, tokens: int, first: float | None, seconds: float) -> None:
        """A request ended: by ``stop``, ``length``, ``cancelled``, ``late`` or ``failed``, after so many tokens and
        seconds, the first token after ``first``."""
        ...


@dataclass(eq=False)
class _Active:
    """A request in work.

    Attributes:
        session: holds the tokens in ``held``.
        rest: tokens of the prompt that were not read.
        logits: behind the tokens that were fed, ``[1, V]``, until the next token is chosen.
        next: the token to feed.
        count: tokens of the answer.
        cached: tokens of the prompt that were known.
        first: when the first token came.
    """

    request: Request
    deliver: Callable[[Event], None]
    text: AnswerText
    generator: np.random.Generator
    began: float
    cancelled: bool = False
    session: NativeSession | None = None
    held: list[int] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)
    logits: np.ndarray | None = None
    next: int | None = None
    count: int = 0
    cached: int = 0
    first: float | None = None


class Ticket:
    """A request that was taken."""

    def __init__(self, engine: Engine, active: _Active):
        self._engine, self._active = engine, active

    def cancel(self) -> None:
        """Ends the request; its listener hears no more once the scheduler has seen it."""
        self._active.cancelled = True
        self._engine.wake()


class Engine:
    """Answers requests, several at once.

    Args:
        model: a native program and its tokenizer.
        together: requests that are decoded together at most; one at a time where the graph counts padding as positions.
        waiting: requests that wait at most.
        kept_bytes: memory for conversations that were answered, whose beginnings others may share.
        listener: hears what is done.
    """

    def __init__(
        self, model: NativeModel, *, together: int, waiting: int, kept_bytes: int, listener: Listener | None = None
    ):
        self.model = model
        self.together = together if can_batch(model.program) else 1
        self._most_waiting, self._listener = waiting, listener
        self._stop_tokens = frozenset(model.stop_tokens())
        self._kept = _Kept(kept_bytes, bool(model.program.description.fixed))
        # What is behind padding is the same to the bit but for states of fixed size.
        self._pads = not model.program.description.fixed
        self._changed = threading.Condition()
        self._waiting: deque[_Active] = deque()
        self._running: list[_Active] = []
        self._batch, self._rows = Batch(model.program, self.together), list[_Active]()
        self._closing = self._ended = self._failed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in work."""
        return len(self._running)

    @property
    def status(self) -> str:
        """``ok`` while requests are taken, ``closing`` when no more are, ``failed`` after a fault of the scheduler."""
        return "failed" if self._failed else "closing" if self._closing else "ok"

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Ticket:
        """Takes a request.

        Args:
            request: what to generate.
            deliver: called with every event, in the scheduler's thread; must return at once.

        Raises:
            GenerationError: it does not fit the context, or a token or stop string is out of range.
            BusyError: too many wait.
            ClosedError: the engine is closed.
            SchedulerError: the scheduler has failed.
        """
        check_prompts([request.prompt], request.sampling, self.model.context_length)
        self.model.program.description.bounds.check_ids(min(request.prompt), max(request.prompt))
        text = AnswerText(self.model.decode, request.stop)
        generator = np.random.default_rng(request.sampling.seed)
        active = _Active(request, deliver, text, generator, time.monotonic(), rest=list(request.prompt))
        with self._changed:
            if self._failed:
                raise SchedulerError(_FAILED)
            if self._closing:
                raise ClosedError("the server is shutting down; ask another one")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{self._most_waiting} requests wait already; try again later")
            self._waiting.append(active)
            self._changed.notify()
        return Ticket(self, active)

    def wake(self) -> None:
        """Lets the scheduler look at what has changed."""
        with self._changed:
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Takes no more requests, waits until those there are answered, ends what is left after so many seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._ended = True
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop()
                self._admit()
                self._read()
                self._decode()
        except Exception:
            _LOG.exception("the scheduler failed")
            self._give_up()

    def _wait(self) -> bool:
        """Waits for something to do; whether there is."""
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _give_up(self) -> None:
        """Takes no more requests, and ends those that are there without touching what may be broken."""
        with self._changed:
            self._failed = self._closing = True
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running.clear()
        for active in left:
            try:
                self._tell(active, "failed", Failed(SchedulerError(_FAILED)))
            except Exception:
                _LOG.exception("a request could not be told that the scheduler failed")

    def _drop(self) -> None:
        """Ends requests that were cancelled, are late, or are still there when the engine ends."""
        now = time.monotonic()
        with self._changed:
            there = [*self._waiting, *self._running]
        for active in there:
            if active.cancelled:
                self._end(active, "cancelled", None)
            elif self._ended:
                self._end(active, "failed", Failed(ClosedError("the server was shut down before this was answered")))
            elif now - active.began > active.request.seconds:
                error = LateError(f"the answer was not finished in {active.request.seconds:g} seconds; ask for less")
                self._end(active, "late", Failed(error))

    def _admit(self) -> None:
        """Lets requests begin for which there is room, the oldest first."""
        while len(self._running) < self.together:
            with self._changed:
                if not self._waiting:
                    return
                active = self._waiting.popleft()
                self._running.append(active)
            try:
                self._begin(active)
            except Exception as error:
                self._fail([active], error)

    def _begin(self, active: _Active) -> None:
        """Gives a request a session that holds as much of its prompt as is known."""
        prompt = active.request.prompt
        others = [(a.held, a.session) for a in self._running if a.session is not None]
        session, source, shared = self._kept.begin(prompt, others)
        if session is None:
            session = self.model.program.session(1, len(prompt) + active.request.sampling.max_new_tokens)
            if source is not None:
                session.take(source.state, 0, 0, shared)
        active.session, active.held, active.cached = session, list(prompt[:shared]), shared
        del active.rest[:shared]

    def _read(self) -> None:
        """Reads the oldest prompt that is not read, a part of it where it is long, and those behind it that fit into
        the same step whole: at once those of about one length of which nothing is known."""
        unread = [active for active in self._running if active.rest]
        left = most = PART_TOKENS if 2 * len(unread) <= len(self._running) else READ_TOKENS
        fresh: list[_Active] = []
        for active in unread:
            part = active.rest[:most]
            if len(part) > left:
                break
            left -= len(part)
            if self._pads and not active.held and len(part) == len(active.rest):
                fresh.append(active)
            else:
                self._read_part(active, part)
        fresh.sort(key=lambda active: len(active.rest))
        while fresh:
            longest = len(fresh[-1].rest)
            together = [active for active in fresh if longest - len(active.rest) <= CALL_TOKENS]
            del fresh[-len(together) :]
            self._read_together(together)

    def _read_together(self, actives: Sequence[_Active]) -> None:
        """Reads whole prompts in one call, the shorter ones padded; what cannot be read at once, one by one."""
        if len(actives) > 1:
            prompts = [list(active.rest) for active in actives]
            ids, mask = left_pad(prompts)
            try:
                session = self.model.program.session(len(actives), ids.shape[1])
                session.start(mask)
                logits = session.step(ids)
            except Exception as error:
                _LOG.warning("prompts could not be read together", exc_info=error)
            else:
                for row, (active, prompt) in enumerate(zip(actives, prompts, strict=True)):
                    assert active.session is not None
                    active.session.take(session.state, row, ids.shape[1] - len(prompt), len(prompt))
                    self._has_read(active, prompt, logits[row : row + 1])
        for active in actives:
            if active.rest:
                self._read_part(active, list(active.rest))

    def _read_part(self, active: _Active, part: list[int]) -> None:
        try:
            assert active.session is not None
            logits = active.session.step(np.array([part], np.int64))
        except Exception as error:
            self._fail([active], error)
            return
        self._has_read(active, part, logits)

    def _has_read(self, active: _Active, part: list[int], logits: np.ndarray) -> None:
        """A request's session holds the next tokens of its prompt; these are the logits behind them, ``[1, V]``."""
        del active.rest[: len(part)]
        active.held += part
        if not active.rest:
            active.logits = logits
            if self._listener is not None:
                self._listener.read(len(active.request.prompt) - active.cached, active.cached)

    def _decode(self) -> None:
        """Chooses the next token of every request whose prompt is read, and feeds those that go on."""
        for active in [a for a in self._running if a.logits is not None]:
            try:
                self._choose(active)
            except Exception as error:
                self._fail([active], error)
        feeding = [a for a in self._running if a.next is not None]
        if not feeding:
            return
        start = time.perf_counter()
        try:
            self._feed(feeding)
        except Exception as error:
            self._fail(feeding, error)
            return
        if self._listener is not None:
            self._listener.step(len(feeding), time.perf_counter() - start)

    def _choose(self, active: _Active) -> None:
        """The next token of a request, which may be its last."""
        logits, request = active.logits, active.request
        assert logits is not None
        active.logits = None
        token = int(choose(logits, request.sampling, active.generator)[0])
        if active.first is None:
            active.first = time.monotonic()
        if token in self._stop_tokens:
            self._finish(active, "stop")
            return
        active.count += 1
        active.deliver(Piece(active.text.push(token), _with_logprobs(token, logits[0], request.logprobs)))
        if active.text.stopped:
            self._finish(active, "stop")
        elif active.count == request.sampling.max_new_tokens:
            self._finish(active, "length")
        else:
            active.next = token

    def _feed(self, feeding: Sequence[_Active]) -> None:
        """Feeds each request its next token: one alone in its session, several in the batch."""
        if len(feeding) == 1:
            (active,) = feeding
            assert active.session is not None and active.next is not None
            self._leave(active)
            active.logits = active.session.step(np.array([[active.next]], np.int64))
        else:
            for active in feeding:
                if active not in self._rows:
                    assert active.session is not None
                    self._batch.join(active.session)
                    self._rows.append(active)
            logits = self._batch.step([active.next for active in self._rows if active.next is not None])
            for row, active in enumerate(self._rows):
                active.logits = logits[row : row + 1]
        for active in feeding:
            assert active.next is not None
            active.held.append(active.next)
            active.next = None

    def _leave(self, active: _Active) -> None:
        """Takes a request out of the batch; its session holds all its tokens again."""
        if active not in self._rows:
            return
        row, last = self._rows.index(active), self._rows[-1]
        assert active.session is not None
        self._batch.leave(row, active.session)
        self._rows[row] = last
        self._rows.pop()

    def _finish(self, active: _Active, reason: str) -> None:
        if rest := active.text.end():
            active.deliver(Piece(rest, None))
        figures = Finished(reason, len(active.request.prompt), active.cached, active.count)
        self._end(active, reason, figures)

    def _fail(self, actives: Sequence[_Active], error: Exception) -> None:
        """Ends requests whose tokens could not be computed, and forgets what was computed with them."""
        _LOG.error("a request failed", exc_info=error)
        for active in actives:
            active.session = None
        if any(active in self._rows for active in actives):
            for active in [a for a in self._rows if a not in actives]:
                self._leave(active)
            self._batch, self._rows = Batch(self.model.program, self.together), []
        for active in actives:
            self._end(active, "failed", Failed(error))

    def _end(self, active: _Active, reason: str, event: Event | None) -> None:
        """Takes a request out of the engine, and keeps its conversation for others."""
        if active.session is not None:
            self._leave(active)
            self._kept.add(active.held, active.session)
        with self._changed:
            for there in (self._waiting, self._running):
                if active in there:
                    there.remove(active)
        self._tell(active, reason, event)

    def _tell(self, active: _Active, reason: str, event: Event | None) -> None:
        """Tells who listens that a request has ended."""
        if event is not None:
            active.deliver(event)
        if self._listener is not None:
            now = time.monotonic()
            first = None if active.first is None else active.first - active.began
            self._listener.ended(reason, active.count, first, now - active.began)


class _Kept:
    """Conversations that were answered, the one used last at the end.

    Args:
        most: bytes that their sessions may hold together; with 0 nothing is shared, not even with what is in work.
        whole: only whole conversations can be gone on with, because the model keeps a state that cannot go back.
    """

    def __init__(self, most: int, whole: bool):
        self._most, self._whole = most, whole
        self._bytes = 0
        self._sessions: OrderedDict[tuple[int, ...], tuple[NativeSession, int]] = OrderedDict()

    def add(self, ids: Sequence[int], session: NativeSession) -> None:
        """Keeps a conversation, and forgets what was not used for the longest time where there is no room for it."""
        size = session.state.memory(len(ids))
        if not ids or size > self._most:
            return
        self._forget(tuple(ids))
        self._sessions[tuple(ids)] = session, size
        self._bytes += size
        while self._bytes > self._most:
            self._forget(next(iter(self._sessions)))

    def begin(
        self, prompt: Sequence[int], others: Sequence[tuple[Sequence[int], NativeSession]]
    ) -> tuple[NativeSession | None, NativeSession | None, int]:
        """What is known of a prompt; its last token is always to be read, for the logits behind it.

        Args:
            prompt: token ids.
            others: conversations in work: tokens and the session that holds the first of them.

        Returns:
            A session that holds the beginning, for the caller; or else one to copy it from; and how many tokens.
        """
        if self._most == 0:
            return None, None, 0
        kept = [(ids, session) for ids, (session, _) in self._sessions.items()]
        found, source, known = 0, None, ()
        beginning = tuple(prompt[:SHARED_TOKENS])
        for ids, session in [*kept, *((ids[: session.past], session) for ids, session in others)]:
            if tuple(ids[:SHARED_TOKENS]) != beginning:
                continue  # nearly all of them, at a glance
            shared = _shared(ids, prompt[:-1])
            if shared > found and (shared == len(ids) or not self._whole):
                found, source, known = shared, session, tuple(ids)
        if source is None or found < SHARED_TOKENS:
            return None, None, 0
        if found == len(known) and known in self._sessions:
            self._forget(known)
            return source, None, found
        if known in self._sessions:
            self._sessions.move_to_end(known)
        return None, source, found

    def _forget(self, ids: tuple[int, ...]) -> None:
        if ids in self._sessions:
            self._bytes -= self._sessions.pop(ids)[1]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    count = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:count]) != np.asarray(b[:count]))
    return int(different[0]) if len(different) else count


def _with_logprobs(token: int, logits: np.ndarray, wanted: int | None) -> Token:
    """A token with what was asked for.

    Args:
        token: that was chosen.
        logits: ``[V]``.
        wanted: as :attr:`Request.logprobs`.
    """
    if wanted is None:
        return Token(token)
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    exact = exact.clip(min=LEAST_LOGPROB)
    return Token(token, float(exact[token]), tuple((i, float(exact[i])) for i in _highest(exact, wanted)))


def _highest(values: np.ndarray, count: int) -> list[int]:
    """Where the ``count`` highest values are, the highest first and of equal ones the first."""
    count = min(count, len(values))
    if not count:
        return []
    least = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count].tolist()
