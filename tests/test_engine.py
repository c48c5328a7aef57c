"""The scheduler and what HTTP makes of it, in one process: what fails, what goes on from what, what is told."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import queue
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
import talker

from lbllm_compile.native.generate import GenerationError, Sampling
from lbllm_compile.native.language import InputBounds
from lbllm_compile.native.program import NativeModel, NativeProgram, NativeSession
from lbllm_compile.runtime import CompiledModel
from lbllm_compile.serve import app as front
from lbllm_compile.serve import engine as scheduler
from lbllm_compile.serve.engine import (
    ClosedError,
    Engine,
    Failed,
    Finished,
    LateError,
    Piece,
    Request,
    SchedulerError,
    Token,
)
from lbllm_compile.serve.metrics import Metrics
from lbllm_compile.serve.protocol import UNBOUNDED_TOKENS, CompletionAnswer, RequestError, Served

BYTES = 256

# A program without a model


class Stub:
    """Stands for a program: what it says next is a function of all tokens it was fed, and it cannot go back.

    Args:
        say: the next token; the one above it is the second likeliest, all others are impossible.
        bounds: of its inputs.

    Attributes:
        gate: steps wait until it is set.
    """

    def __init__(self, say: Callable[[bytes], int], bounds: InputBounds):
        self.say, self.gate = say, threading.Event()
        self.gate.set()
        self.description = SimpleNamespace(bounds=bounds, config={}, fixed=("a state",))

    def session(self, batch: int, capacity: int = 0) -> StubSession:
        return StubSession(self)


class StubSession:
    """Its state is itself."""

    def __init__(self, program: Stub):
        self._program, self.fed, self.past, self.state = program, b"", 0, self

    def memory(self, tokens: int) -> int:
        return tokens

    def take(self, source: StubSession, sequence: int, start: int, count: int) -> None:
        self.fed, self.past = source.fed, self.past + count

    def step(self, ids: np.ndarray) -> np.ndarray:
        self._program.gate.wait(60)
        self.fed, self.past = self.fed + bytes(ids[0].tolist()), self.past + ids.shape[1]
        logits = np.full((1, BYTES), -np.inf, np.float32)
        said = self._program.say(self.fed)
        logits[0, [said, (said + 1) % BYTES]] = 2.0, 1.0
        return logits


class ByteTokenizer:
    """A token a byte; a chat template that refuses everything."""

    eos_token_id, chat_template = None, "refuses"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no turns here")


def letter(fed: bytes) -> int:
    """A letter that depends on every byte before it."""
    return ord("a") + zlib.crc32(fed) % 26


def continued(prompt: bytes, tokens: int) -> bytes:
    """What :func:`letter` continues a prompt with."""
    text = prompt
    for _ in range(tokens):
        text += bytes([letter(text)])
    return text[len(prompt) :]


def stub(say: Callable[[bytes], int] = letter, slots: int | None = 1 << 16) -> Any:
    """A model of a :class:`Stub`; of many slots unless told otherwise, so that requests are answered one at a time."""
    program: Any = Stub(say, InputBounds(BYTES, None, slots))
    return NativeModel(program, ByteTokenizer())


class Heard:
    """Writes down what an engine does.

    Attributes:
        gate: behind every step the engine waits until it is set.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ends: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def step(self, sequences: int, seconds: float) -> None:
        self.steps.append(sequences)
        self.gate.wait(60)

    def read(self, tokens: int, cached: int) -> None: ...

    def ended(self, reason: str, tokens: int, first: float | None, seconds: float) -> None:
        self.ends.append(reason)


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes engines, and closes them."""
    made: list[Engine] = []

    def make(model: Any, *, together: int = 4, waiting: int = 20, kept_bytes: int = 1 << 24, **more: Any) -> Engine:
        made.append(Engine(model, together=together, waiting=waiting, kept_bytes=kept_bytes, **more))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)


class Asked:
    """A request and its events."""

    def __init__(self, engine: Engine, prompt: Sequence[int], tokens: int, seed: int = 0, **more: Any):
        self.events: queue.Queue[Any] = queue.Queue()
        self.tokens: list[int] = []
        request = Request(tuple(prompt), Sampling(max_new_tokens=tokens, seed=seed), **more)
        self.ticket = engine.submit(request, self.events.put)

    def begun(self) -> Asked:
        """Once there is a token."""
        self.tokens.append(self.events.get(timeout=60).token.id)
        return self

    def end(self) -> Any:
        while isinstance(event := self.events.get(timeout=60), Piece):
            self.tokens += [] if event.token is None else [event.token.id]
        return event


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return talker.make(Path(tempfile.mkdtemp(dir=tmp_path_factory.mktemp("made"))))


def native(model: CompiledModel, **changes: Any) -> NativeModel:
    """The talker's program, whose description may say something else."""
    assert isinstance(model.native, NativeProgram)
    program = copy.copy(model.native)
    program.description = dataclasses.replace(program.description, **changes)
    return NativeModel(program, model.tokenizer)


# What goes on from what


def test_a_state_that_cannot_go_back_is_gone_on_with_only_whole(engines):
    engine = engines(stub())
    first = Asked(engine, b"x" * 40, 5)
    assert first.end().cached_tokens == 0
    answer = continued(b"x" * 40, 5)
    assert bytes(first.tokens) == answer
    partly = Asked(engine, b"x" * 30 + b"otherwise", 5)
    assert partly.end().cached_tokens == 0
    assert bytes(partly.tokens) == continued(b"x" * 30 + b"otherwise", 5)
    longer = b"x" * 40 + answer + b"and then?"
    wholly = Asked(engine, longer, 5)
    assert wholly.end().cached_tokens == 44  # the last token of an answer is not fed
    assert bytes(wholly.tokens) == continued(longer, 5)


def test_padding_that_has_positions_is_answered_one_at_a_time(engines):
    heard = Heard()
    engine = engines(stub(), together=4, listener=heard)
    prompts = [bytes([65 + i]) * 20 for i in range(4)]
    asked = [Asked(engine, prompt, 20) for prompt in prompts]
    assert all(isinstance(each.end(), Finished) for each in asked)
    assert [bytes(each.tokens) for each in asked] == [continued(prompt, 20) for prompt in prompts]
    assert engine.together == 1 and set(heard.steps) == {1}


@pytest.mark.parametrize(("kept_bytes", "shares"), [(0, False), (1 << 24, True)])
def test_without_memory_for_conversations_nothing_is_shared(engines, talking, kept_bytes, shares):
    engine = engines(native(talking), kept_bytes=kept_bytes)
    prompt = talking.encode("Everybody knows that this is the beginning")
    first = Asked(engine, prompt, 200).begun()
    second = Asked(engine, prompt, 3)
    assert (second.end().cached_tokens > 0) == shares
    first.end()
    assert (Asked(engine, prompt, 3).end().cached_tokens > 0) == shares


@pytest.mark.parametrize(("lengths", "steps"), [((40, 40, 40, 40), [4, 4]), ((100, 20, 10), [3, 3])])
def test_short_prompts_are_read_in_one_step(engines, talking, lengths, steps):
    heard = Heard()
    engine = engines(native(talking), listener=heard)
    texts = [chr(65 + i) * length for i, length in enumerate(lengths)]
    with engine._changed:  # the scheduler sees none before all are there
        asked = [Asked(engine, talking.encode(text), 3) for text in texts]
    assert all(isinstance(each.end(), Finished) for each in asked)
    assert [talking.decode(each.tokens) for each in asked] == [talking.generate(t, max_new_tokens=3) for t in texts]
    assert heard.steps == steps


@pytest.mark.parametrize(("answered", "more", "steps"), [(2, 2, [2, 3, 4]), (1, 3, [1, 4])])
def test_more_is_read_in_one_step_where_more_wait_than_are_answered(engines, talking, answered, more, steps):
    heard = Heard()
    heard.gate.clear()
    engine = engines(native(talking), listener=heard)
    prompts = [talking.encode(chr(65 + i) * 90) for i in range(answered + more)]
    with engine._changed:  # the scheduler sees none before all are there
        first = [Asked(engine, prompt, 60) for prompt in prompts[:answered]]
    assert [each.begun() for each in first] == first
    asked = first + [Asked(engine, prompt, 3) for prompt in prompts[answered:]]
    heard.gate.set()
    assert all(isinstance(each.end(), Finished) for each in asked)
    assert [sequences for sequences, _ in itertools.groupby(heard.steps)][: len(steps)] == steps


@pytest.mark.parametrize("fails", [False, True])
def test_prompts_of_about_one_length_are_read_at_once(engines, talking, monkeypatch, fails):
    """Where that fails, one by one."""
    fed, step = [], NativeSession.step

    def watched(self, ids):
        if len(ids) > 1:
            fed.append(ids.shape)
            if fails:
                raise RuntimeError("broken")
        elif ids.shape[1] > 1:
            fed.append(ids.shape)
        return step(self, ids)

    texts = ["A" * 20, "Everybody knows how this begins", "B" * 52, "C" * 24]
    prompts = [talking.encode(text) for text in texts]
    expected = [talking.generate(text, max_new_tokens=9) for text in texts]
    monkeypatch.setattr(NativeSession, "step", watched)
    engine = engines(native(talking))
    with engine._changed:  # the scheduler sees none before all are there
        asked = [Asked(engine, prompt, 9) for prompt in prompts]
    assert all(isinstance(each.end(), Finished) for each in asked)
    assert [talking.decode(each.tokens) for each in asked] == expected
    lengths = sorted(map(len, prompts))
    together = [length for length in lengths if lengths[-1] - length > scheduler.CALL_TOKENS]
    assert lengths[0] < together[-1] - 1 and len(together) == 3
    one_by_one = {(1, length) for length in (together if fails else [])}
    assert set(fed) == {(3, together[-1]), (1, lengths[-1])} | one_by_one


# What fails


def test_one_that_fails_leaves_the_others_right(engines, talking, monkeypatch):
    calls, real = itertools.count(), scheduler.choose

    def choose(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
        if sampling.seed == 13 and next(calls) == 30:
            raise RuntimeError("broken")
        return real(logits, sampling, generator)

    monkeypatch.setattr(scheduler, "choose", choose)
    heard = Heard()
    engine = engines(native(talking), listener=heard)
    texts = ("Once upon a time", "Hello", "There was")
    with engine._changed:  # all are there before the first is answered, however busy this thread's core is
        asked = [Asked(engine, talking.encode(text), 80, seed) for text, seed in zip(texts, (0, 13, 0), strict=True)]
    ends = [each.end() for each in asked]
    assert isinstance(ends[1], Failed) and isinstance(ends[1].error, RuntimeError)
    assert 3 in heard.steps and heard.ends.count("failed") == 1
    for i in (0, 2):
        assert isinstance(ends[i], Finished)
        assert talking.decode(asked[i].tokens) == talking.generate(texts[i], max_new_tokens=80)
    again = Asked(engine, talking.encode("Hello"), 20)
    again.end()
    assert talking.decode(again.tokens) == talking.generate("Hello", max_new_tokens=20)


def test_a_fault_of_the_scheduler_ends_all_requests_and_is_told(engines, caplog):
    class Broken(Heard):
        def ended(self, reason: str, tokens: int, first: float | None, seconds: float) -> None:
            raise RuntimeError("out of order")

    model = stub()
    model.program.gate.clear()
    engine = engines(model, listener=Broken())
    asked = [Asked(engine, b"Hello", 3) for _ in range(4)]
    model.program.gate.set()
    ends = [each.end() for each in asked]
    assert isinstance(ends[0], Finished)
    assert all(isinstance(end.error, SchedulerError) for end in ends[1:])
    with pytest.raises(SchedulerError, match="started again"):
        Asked(engine, b"Hello", 3)
    assert engine.status == "failed" and (engine.waiting, engine.running) == (0, 0)
    assert any(record.exc_info and "the scheduler failed" in record.message for record in caplog.records)
    http = Http(engine)
    status, document = http.ask("/health")
    assert (status, document["status"]) == (503, "failed")
    status, document = http.complete()
    assert (status, document["error"]["type"]) == (500, "server_error")


def test_requests_that_come_while_others_are_looked_through(engines):
    """The scheduler looks at those that wait while more come and are cancelled."""
    engine = engines(stub(), waiting=1 << 20)
    blocker = Asked(engine, b"Hello", 2000)

    def ask() -> None:
        for _ in range(300):
            Asked(engine, b"Hello", 1).ticket.cancel()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(blocker.end(), Finished)
    assert engine.status == "ok"


def test_what_is_left_at_the_end_is_told(engines):
    model = stub()
    model.program.gate.clear()
    engine = engines(model)
    asked = [Asked(engine, b"Hello", 3) for _ in range(3)]
    closing = threading.Thread(target=engine.close, args=(0.05,))
    closing.start()
    while not engine._ended:
        threading.Event().wait(0.01)
    assert engine.status == "closing"
    model.program.gate.set()
    assert all(isinstance(each.end().error, ClosedError) for each in asked)
    closing.join(60)
    assert not closing.is_alive()


def test_who_waited_too_long_is_told(engines):
    engine = engines(stub(say=lambda fed: threading.Event().wait(0.002) or letter(fed)))
    asked = [Asked(engine, b"Hello", 1000, seconds=0.1) for _ in range(2)]
    assert all(isinstance(each.end().error, LateError) for each in asked)


# What a model takes


def test_more_tokens_than_positions_are_refused_at_once(engines, talking):
    config = {"eos_token_id": 2}
    bounds = dataclasses.replace(native(talking).program.description.bounds, positions=64)
    model = native(talking, bounds=bounds, config=config)
    assert model.context_length == 64
    assert native(talking, bounds=bounds).context_length == 64 < talker.CONTEXT
    engine = engines(model)
    other = Asked(engine, talking.encode("Hello"), 50).begun()
    with pytest.raises(GenerationError, match="context holds 64"):
        Asked(engine, talking.encode("Hello"), 60)
    assert isinstance(other.end(), Finished)


def served(model: Any, most_tokens: int | None = None, seconds: float = 60.0) -> Served:
    return Served(model, "stub", most_tokens, seconds, 0, "lbllm-stub")


def test_without_a_context_answers_are_bounded():
    document = {"model": "stub", "prompt": "Hello"}
    unbounded = stub(slots=None)
    assert unbounded.context_length is None
    answer = CompletionAnswer.parse(served(unbounded), document)
    assert answer.request.sampling.max_new_tokens == UNBOUNDED_TOKENS
    with pytest.raises(RequestError, match="at most 4096"):
        CompletionAnswer.parse(served(unbounded), {**document, "max_tokens": 10**12})
    longer = CompletionAnswer.parse(served(unbounded, 10_000), {**document, "max_tokens": 9000})
    assert longer.request.sampling.max_new_tokens == 9000
    assert CompletionAnswer.parse(served(stub(slots=100)), document).request.sampling.max_new_tokens == 95


# HTTP


class Http:
    """Asks an application without sockets."""

    def __init__(self, engine: Engine, seconds: float = 60.0):
        self.metrics = Metrics()
        self.app = front.application(
            front.Front(served(engine.model, seconds=seconds), engine, self.metrics, "", 1 << 20)
        )

    def sent(self, path: str, *body: bytes, whole: bool = True, reads: bool = True) -> list[Any]:
        """What is sent to a client that sends a body in parts, perhaps without its end, and perhaps never reads."""
        parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        if whole:
            parts.append({"type": "http.request", "body": b"", "more_body": False})
        sent: list[Any] = []

        async def receive() -> Any:
            if not parts:
                await anyio.sleep_forever()
            return parts.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)
            if not reads:
                await anyio.sleep_forever()

        async def run() -> None:
            scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "headers": []}
            with anyio.fail_after(60):
                await self.app(scope, receive, send)

        anyio.run(run)
        return sent

    def ask(self, path: str, *body: bytes, whole: bool = True) -> tuple[int, Any]:
        head, *rest = self.sent(path, *body, whole=whole)
        return head["status"], json.loads(b"".join(part["body"] for part in rest))

    def complete(self, **fields: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", _completion(**fields))

    def chunks(self, **fields: Any) -> list[Any]:
        """The events of a stream without its end."""
        _, *rest = self.sent("/v1/completions", _completion(stream=True, **fields))
        *events, end, nothing = b"".join(part["body"] for part in rest).decode().split("\n\n")
        assert (end, nothing) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def refused(self, status: int) -> float:
        return self.metrics.registry.get_sample_value("lbllm_refused_total", {"status": str(status)}) or 0.0


def _completion(**fields: Any) -> bytes:
    return json.dumps({"model": "stub", "prompt": "Hello", "max_tokens": 5, "temperature": 0, **fields}).encode()


def test_a_fault_behind_a_request_is_the_servers(engines, monkeypatch, caplog):
    def choose(*_: Any) -> np.ndarray:
        raise GenerationError("the model's logits are no numbers")

    http = Http(engines(stub()))
    assert http.complete()[0] == 200
    monkeypatch.setattr(scheduler, "choose", choose)
    status, document = http.complete()
    assert (status, document["error"]["type"]) == (500, "server_error")
    assert document["error"]["message"] == "the model's logits are no numbers"
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
    monkeypatch.setattr(scheduler, "choose", lambda *_: 1 / 0)
    status, document = http.complete()
    assert status == 500 and "(ZeroDivisionError); its log says more" in document["error"]["message"]
    assert http.refused(500) == 0
    assert http.complete(max_tokens=0)[0] == 400
    assert http.refused(400) == 1


def test_a_body_that_does_not_come_is_waited_for_only_so_long(engines, monkeypatch):
    monkeypatch.setattr(front, "BODY_SECONDS", 0.05)
    http = Http(engines(stub()))
    status, document = http.ask("/v1/completions", b'{"model"', whole=False)
    assert status == 408 and "was not whole after 0.05 seconds" in document["error"]["message"]
    assert http.refused(408) == 1


def test_a_closed_engine_sends_clients_elsewhere(engines):
    engine = engines(stub())
    engine.close(0)
    http = Http(engine)
    status, document = http.complete()
    assert (status, document["error"]["code"]) == (503, "shutting_down")
    assert http.ask("/health")[0] == 503


def test_who_never_reads_is_let_go(engines, monkeypatch):
    monkeypatch.setattr(front, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(front, "SEND_SECONDS", 0.05)
    http = Http(engines(stub()), seconds=0.2)
    assert len(http.sent("/v1/completions", _completion(stream=True), reads=False)) == 1


def test_a_template_that_refuses_is_the_clients_business(engines):
    turns = {"model": "stub", "messages": [{"role": "user", "content": "Hello"}]}
    status, document = Http(engines(stub())).ask("/v1/chat/completions", json.dumps(turns).encode())
    assert (status, document["error"]["param"]) == (400, "messages")
    assert document["error"]["message"].endswith("(no turns here); give other turns, or plain text (/v1/completions)")


SAID = "Zoë zahlt 5 € für 😀."


def spoken(fed: bytes) -> int:
    """The bytes of a text with characters of one to four, over and over, behind a prompt of five."""
    text = SAID.encode()
    return text[(len(fed) - 5) % len(text)]


def test_characters_of_several_tokens_come_whole(engines):
    http = Http(engines(stub(spoken)))
    count = len(SAID.encode())
    pieces = [chunk["choices"][0]["text"] for chunk in http.chunks(max_tokens=2 * count)]
    assert "".join(pieces) == 2 * SAID and "\ufffd" not in "".join(pieces)
    for tokens in range(1, count):
        whole = http.complete(max_tokens=tokens)[1]["choices"][0]["text"]
        assert whole == SAID.encode()[:tokens].decode("utf-8", "replace")
        assert "".join(c["choices"][0]["text"] for c in http.chunks(max_tokens=tokens)) == whole
    stopped = http.complete(max_tokens=count, stop=["r 😀"])[1]["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("Zoë zahlt 5 € fü", "stop")


def test_offsets_are_those_of_the_text_and_the_likeliest_of_one_text_counts(engines):
    http = Http(engines(stub(spoken)))
    data = SAID.encode()
    whole = http.complete(max_tokens=len(data), logprobs=3)[1]["choices"][0]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in http.chunks(max_tokens=len(data), logprobs=3)]
    for found in (
        [whole["logprobs"]],
        [logprobs for logprobs in chunks if logprobs],
    ):
        offsets = [offset for logprobs in found for offset in logprobs["text_offset"]]
        assert offsets == [len(data[:i].decode("utf-8", "ignore")) for i in range(len(data))]
    best = -np.log1p(np.exp(-1.0))  # of two with logits of 2 and 1
    for i, (logprob, top) in enumerate(
        zip(whole["logprobs"]["token_logprobs"], whole["logprobs"]["top_logprobs"], strict=True)
    ):
        assert logprob == pytest.approx(best)
        text = data[i : i + 1].decode("utf-8", "replace")
        assert next(iter(top)) == text and top[text] == pytest.approx(best)
        assert min(top.values()) == scheduler.LEAST_LOGPROB


def test_what_is_impossible_has_a_logarithm_in_json():
    logits = np.array([-np.inf, 3.0, -np.inf, 2.0], np.float32)
    token = scheduler._with_logprobs(0, logits, 3)
    assert token == Token(0, scheduler.LEAST_LOGPROB, token.likeliest)
    assert [i for i, _ in token.likeliest] == [1, 3, 0] and token.likeliest[2][1] == scheduler.LEAST_LOGPROB
    json.dumps(dataclasses.asdict(token), allow_nan=False)
