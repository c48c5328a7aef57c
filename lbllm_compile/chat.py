"""A conversation in the terminal: ``lbllm-compile chat DIR``."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from lbllm_compile.native.generate import AnswerText, GenerationError, Sampling, Steps, next_tokens
from lbllm_compile.native.language import LanguageModel, encode, encode_turns, has_chat_template

READ_TOKENS = 256
"""Tokens of a prompt that are read at once: an interrupt is heard between two such parts."""

MOST_TOKENS = 512
"""Tokens of an answer at most, where nothing else is asked for and the context is at least twice as long."""

HELP = """\
/reset          forget the conversation; the system prompt stays
/system TEXT    set the system prompt and begin anew; without TEXT, show it
/help           this
/exit           leave, as Ctrl-D does
Ctrl-C ends an answer and keeps the conversation. Begin with // for a message that begins with /."""


@dataclass(frozen=True)
class Answered:
    """Figures of an answer.

    Attributes:
        prompt: tokens of the prompt.
        read: those of them that were not known from before.
        tokens: of the answer.
        read_seconds, seconds: what reading the prompt and generating behind it took.
        dropped: turns that were left out because the context does not hold them.
        interrupted: whether the user ended it.
    """

    prompt: int
    read: int
    tokens: int
    read_seconds: float
    seconds: float
    dropped: int
    interrupted: bool


class Conversation:
    """Turns of a user and a model, and the state that holds the tokens of all of them.

    A model without chat template continues each message as plain text, for itself.

    Args:
        model: generates the answers.
        sampling: of each answer; one generator draws for all of them.
        system: the system prompt; nothing for none.
        stop: strings that end an answer.

    Attributes:
        turns: what was said, with the system prompt.
        last: figures of the last answer.
    """

    def __init__(self, model: LanguageModel, sampling: Sampling, system: str = "", stop: Sequence[str] = ()):
        self._model, self._sampling, self._stop = model, sampling, tuple(stop)
        self._generator = np.random.default_rng(sampling.seed)
        self._session: Steps | None = None
        self._held: list[int] = []
        self.plain = not has_chat_template(model.tokenizer)
        self.system = system
        self.last: Answered | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system prompt."""
        self.turns = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, message: str, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer's text, piece by piece; the message and as much of the answer as came become turns.

        Args:
            message: the user's.
            interrupted: asked between tokens; ends the answer.

        Raises:
            GenerationError: the message alone does not fit the context, or the template refuses it; it is no turn then.
        """
        turns, prompt, dropped = self._fitting(message)
        said: list[str] = []
        try:
            for piece in self._generate(prompt, dropped, interrupted):
                said.append(piece)
                yield piece
        except BaseException:
            self._session = None  # whatever it holds
            raise
        if not self.plain:
            self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]

    def _fitting(self, message: str) -> tuple[list[dict[str, str]], list[int], int]:
        """The turns with the message, their tokens, and how many of the oldest had to go for them to fit."""
        limit = self._model.context_length
        room = None if limit is None else limit - self._sampling.max_new_tokens
        if self.plain:
            turns, first = [{"role": "user", "content": message}], 0
        else:
            turns, first = [*self.turns, {"role": "user", "content": message}], 1 if self.system else 0
        dropped = 0
        while True:
            prompt = (
                encode(self._model.tokenizer, message) if self.plain else encode_turns(self._model.tokenizer, turns)
            )
            if not prompt:
                raise GenerationError("the message is empty for the model's tokenizer; write at least one token")
            if room is None or len(prompt) <= room:
                return turns, prompt, dropped
            if len(turns) - first < 3:
                raise GenerationError(
                    f"the message takes {len(prompt)} tokens and the answer up to {self._sampling.max_new_tokens}, but"
                    f" the model's context holds {limit}; shorten it, or ask for fewer with --max-tokens"
                )
            del turns[first : first + 2]  # a question and its answer
            dropped += 2

    def _generate(self, prompt: list[int], dropped: int, interrupted: Callable[[], bool]) -> Iterator[str]:
        session, start = self._begin(prompt)
        rest = prompt[start:]
        text, count, stopped = AnswerText(self._model.decode, self._stop), 0, frozenset(self._model.stop_tokens())
        began = time.perf_counter()
        first = began
        parts = [rest[i : i + READ_TOKENS] for i in range(0, len(rest), READ_TOKENS)]
        token, ended = None, False
        for part in parts:
            if ended := interrupted():
                break
            token = self._feed(session, part, chooses=part is parts[-1])
        first = time.perf_counter()
        while token is not None and not ended and count < self._sampling.max_new_tokens:
            if token in stopped:
                break
            count += 1
            if piece := text.push(token):
                yield piece
            ended = interrupted()
            if text.stopped or ended or count == self._sampling.max_new_tokens:
                break
            token = self._feed(session, [token])
        if tail := text.end():
            yield tail
        now = time.perf_counter()
        self.last = Answered(len(prompt), len(rest), count, first - began, now - first, dropped, ended)

    def _begin(self, prompt: list[int]) -> tuple[Steps, int]:
        """A session that holds the beginning of the prompt, and of how many tokens."""
        shared = 0
        for held, token in zip(self._held, prompt[:-1], strict=False):
            if held != token:
                break
            shared += 1
        if self._session is None or not self._session.rewind(shared):
            self._session, shared = self._model.session(1), 0
        del self._held[shared:]
        return self._session, shared

    def _feed(self, session: Steps, ids: list[int], chooses: bool = True) -> int | None:
        """Feeds tokens; the next one, where one is to be chosen."""
        fed, token = np.array([ids], np.int64), None
        if chooses:
            token = int(next_tokens(session, fed, self._sampling, self._generator)[0])
        else:
            session.step(fed)
        self._held += ids
        return token


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """In this block, Ctrl-C sets the event and raises nothing."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def messages(out: IO[str], tell: Callable[[str], None]) -> Iterator[str]:
    """What the user types, line by line with editing and history; or the lines of standard input that is no terminal.

    Raises:
        GenerationError: standard input is closed, or no UTF-8.
    """
    if sys.stdin is None:
        raise GenerationError("standard input is closed; run chat in a terminal, or pipe messages to it")
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise GenerationError(
                    f"line {number} of standard input is not UTF-8 text (byte {error.start}); convert it first, e.g."
                    " with iconv"
                ) from error
        return
    with contextlib.suppress(ImportError):  # Python was built without it: lines come without editing
        import readline  # noqa: F401  # what input() edits lines with
    while True:
        try:
            with contextlib.redirect_stdout(out):
                line = input("> ")
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write("\n")
            tell("/exit or Ctrl-D leaves")
            continue
        yield line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def talk(conversation: Conversation, lines: Iterator[str], out: IO[str], tell: Callable[[str], None]) -> None:
    """Answers messages until they end; answers go to ``out``, everything else to ``tell``."""
    if conversation.plain:
        tell("the model has no chat template: it continues each message as plain text, and remembers none; /help helps")
    for line in lines:
        if line.startswith("/") and not line.startswith("//"):
            if _command(conversation, line, tell):
                return
        elif line.strip():
            _answer(conversation, line.removeprefix("/") if line.startswith("//") else line, out, tell)


def _command(conversation: Conversation, line: str, tell: Callable[[str], None]) -> bool:
    """Does what a line that begins with a slash says; whether it is to leave."""
    word, _, rest = line.strip().partition(" ")
    if word in ("/exit", "/quit"):
        return True
    if word == "/reset":
        conversation.reset()
        tell("the conversation is forgotten")
    elif word == "/system" and rest.strip():
        if conversation.plain:
            tell("the model has no chat template, so it can have no system prompt")
        else:
            conversation.system = rest.strip()
            conversation.reset()
            tell("the system prompt is set, and the conversation begins anew")
    elif word == "/system":
        tell(conversation.system or "there is no system prompt; /system TEXT sets one")
    elif word == "/help":
        tell(HELP)
    else:
        tell(f"there is no command {word}; /help lists them")
    return False


def _answer(conversation: Conversation, message: str, out: IO[str], tell: Callable[[str], None]) -> None:
    with _interrupts() as interrupt:
        try:
            for piece in conversation.answer(message, interrupt.is_set):
                out.write(piece)
                out.flush()
        except GenerationError as error:
            tell(str(error))
            return
    out.write("\n")
    out.flush()
    assert conversation.last is not None
    tell(describe(conversation.last))


def describe(answered: Answered) -> str:
    """The figures of an answer in a line."""
    parts: list[Any] = [f"{answered.tokens} tokens"]
    if answered.tokens and answered.seconds > 0:
        parts.append(f"{answered.tokens / answered.seconds:.1f} tokens/s")
    parts.append(f"{answered.read} of {answered.prompt} prompt tokens read in {answered.read_seconds:.2f} s")
    if answered.dropped:
        parts.append(f"the oldest {answered.dropped} turns no longer fit the context and were left out")
    if answered.interrupted:
        parts.append("interrupted")
    return "[" + ", ".join(parts) + "]"
