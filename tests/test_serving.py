"""``serve`` with the real ``openai`` client over loopback, with clients that misbehave, and under load."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import runtime_only
import talker
from typer.testing import CliRunner

from lbllm_compile import cli
from lbllm_compile.runtime import CompiledModel, opening

ROOT = Path(__file__).resolve().parent.parent
KEY = "sesame"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, CompiledModel]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        directory = tmp_path_factory.mktemp("made") / "talker"
        yield directory, talker.make(directory)


class Server:
    """A server in a process of its own, in which torch and TVM's compiler cannot be imported."""

    def __init__(self, directory: Path, *options: str, key: str = KEY):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LBLLM_API_KEY": key}
        command = runtime_only.command("serve", str(directory), "--port", "0", *options)
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.url = self._address()
        threading.Thread(target=self._listen, daemon=True).start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def _address(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"serving \S+ at (http://[\d.:]+)/v1", line):
                return found.group(1)
        raise AssertionError("".join(self.said))

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said += self.process.stderr

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def idle(self) -> None:
        """Waits until nothing is in work."""
        end = time.monotonic() + 60
        while self.metric("lbllm_running") or self.metric("lbllm_waiting"):
            assert time.monotonic() < end
            time.sleep(0.02)

    def socket(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)


@contextmanager
def serving(directory: Path, *options: str, key: str = KEY) -> Iterator[Server]:
    server = Server(directory, *options, key=key)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(artifact: tuple[Path, CompiledModel]) -> Iterator[Server]:
    with serving(artifact[0], "--together", "8", "--waiting", "100", "--max-body", "20000") as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def expected(model: CompiledModel, text: str, tokens: int, **options: Any) -> str:
    return str(model.generate(text, chat=True, max_new_tokens=tokens, **options))


def posted(server: Server, body: bytes, path: str = "/v1/completions", key: str = KEY) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, body, headers), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# Answers


def test_a_chat_is_what_run_gives(server, client, artifact):
    answer = client.chat.completions.create(model="talker", messages=asked("Hello"), max_tokens=30, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == expected(artifact[1], "Hello", 30)
    assert (choice.finish_reason, choice.message.role, answer.object) == ("length", "assistant", "chat.completion")
    prompt = len("<user>Hello\n<assistant>")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 30)
    assert answer.usage.total_tokens == prompt + 30


def test_a_stream_is_the_same_answer_in_pieces(client, artifact):
    stream = client.chat.completions.create(
        model="talker",
        messages=asked("Hello"),
        max_completion_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected(artifact[1], "Hello", 30)
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 30
    assert len({c.id for c in chunks}) == 1


def test_completions_continue_text_or_tokens(client, artifact):
    model = artifact[1]
    wanted = model.generate("Once upon", max_new_tokens=12)
    for prompt in ("Once upon", ["Once upon"], model.encode("Once upon")):
        answer = client.completions.create(model="talker", prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == wanted
    stream = client.completions.create(model="talker", prompt="Once upon", max_tokens=12, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in stream) == wanted


def test_stop_strings_end_answers(client, artifact):
    whole = expected(artifact[1], "Hello", 40)
    stop = [whole[20:23], whole[7:10]]
    wanted = whole[: min(whole.find(text) for text in stop)]
    options = {"model": "talker", "messages": asked("Hello"), "max_tokens": 40, "temperature": 0, "stop": stop}
    answer = client.chat.completions.create(**options)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (wanted, "stop")
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_again(client, artifact):
    def draw(seed: int | None) -> str:
        answer = client.chat.completions.create(
            model="talker", messages=asked("Hello"), max_tokens=25, temperature=1.5, top_p=0.9, seed=seed,
            extra_body={"top_k": 20},
        )  # fmt: skip
        return answer.choices[0].message.content

    wanted = expected(artifact[1], "Hello", 25, temperature=1.5, top_p=0.9, top_k=20, seed=7)
    assert draw(7) == draw(7) == wanted
    assert draw(8) != wanted
    assert draw(None) != draw(None)


def test_logprobs_are_those_of_the_model(client, artifact):
    model = artifact[1]
    prompt = model.encode("Hello", chat=True)
    answer = client.chat.completions.create(
        model="talker", messages=asked("Hello"), max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    session = model.session(1)
    logits = session.step(np.array([prompt]))
    for entry in content:
        exact = logits[0].astype(np.float64)
        exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
        order = np.argsort(-exact, kind="stable")[:3]
        assert entry.logprob == pytest.approx(exact[order[0]], abs=1e-9)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(exact[order].tolist(), abs=1e-9)
        assert [top.token for top in entry.top_logprobs] == [model.tokenizer.decode([i]) for i in order]
        assert bytes(entry.bytes).decode() == entry.token
        logits = session.step(np.array([[order[0]]]))
    plain = client.completions.create(model="talker", prompt="Once", max_tokens=4, temperature=0, logprobs=2)
    found = plain.choices[0].logprobs
    assert "".join(found.tokens) == plain.choices[0].text
    assert found.text_offset == [0, 1, 2, 3] and [len(top) for top in found.top_logprobs] == [2] * 4


def test_a_conversation_is_read_once(server, client, artifact):
    turns = asked("Tell me everything about it. " * 4)
    first = client.chat.completions.create(model="talker", messages=turns, max_tokens=20, temperature=0)
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, *asked("And then?")]
    second = client.chat.completions.create(model="talker", messages=turns, max_tokens=20, temperature=0)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens + 19  # the last token of an answer is not fed
    text = artifact[1].tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert second.choices[0].message.content == artifact[1].generate(text, max_new_tokens=20)
    # another continuation of the same beginning
    turns[-1]["content"] = "Why?"
    third = client.chat.completions.create(model="talker", messages=turns, max_tokens=20, temperature=0)
    assert third.usage.prompt_tokens_details.cached_tokens >= cached
    text = artifact[1].tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert third.choices[0].message.content == artifact[1].generate(text, max_new_tokens=20)


def test_roles_and_parts_of_messages(client, artifact):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = client.chat.completions.create(model="talker", messages=messages, max_tokens=9, temperature=0)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = artifact[1].tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert answer.choices[0].message.content == artifact[1].generate(text, max_new_tokens=9)


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["talker"]
    assert client.models.retrieve("talker").owned_by == "lbllm-compile"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert json.loads(server.get("/health"))["status"] == "ok"
    before = server.metric("lbllm_generated_tokens_total")
    client.completions.create(model="talker", prompt="Once", max_tokens=7, temperature=0)
    server.idle()
    assert server.metric("lbllm_generated_tokens_total") == before + 7
    assert server.metric('lbllm_requests_total{ended="length"}') > 0


# Errors


@pytest.mark.parametrize(
    ("changes", "param", "code", "said"),
    [
        ({"n": 2}, "n", "unsupported_parameter", "n = 2 is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "not supported"),
        ({"temperature": -1.0}, "temperature", "invalid_value", "greater than or equal to 0"),
        ({"top_p": 0.0}, "top_p", "invalid_value", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"max_tokens": 1000}, "messages", "context_length_exceeded", "context holds 512 tokens"),
        ({"top_logprobs": 3}, "top_logprobs", None, "given with logprobs"),
        ({"stop": [""]}, None, None, "a stop string is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "invalid_value", "messages.0"),
        ({"messages": []}, "messages", "invalid_value", "at least 1 item"),
        ({"extra_body": {"beam": 3}}, "beam", "unknown_parameter", "there is no parameter beam"),
        ({"store": True}, "store", "unsupported_parameter", "store = true is not supported"),
        ({"stop": list("abcde")}, "stop", None, "5 stop strings were given; use at most 4"),
        ({"messages": [{**asked("Hello")[0], "name": "Zoë"}]}, "messages.0.name", "invalid_value", "messages.0.name"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, changes, param, code, said):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "talker", "messages": asked("Hello"), **changes})
    body = refused.value.body
    assert said in body["message"] and body["code"] == code and body["type"] == "invalid_request_error"
    if param is not None:
        assert body["param"] == param


def test_what_changes_nothing_is_taken(client):
    answer = client.chat.completions.create(
        model="talker", messages=asked("Hello"), max_tokens=3, n=1, presence_penalty=0, frequency_penalty=0.0,
        user="somebody", response_format={"type": "text"}, logit_bias={}, store=False, stop=["\n"] * 4,
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 3


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 15000, 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"{}", 400, "model: field required"),
        (b'{"model": "talker", "prompt": []}', 400, "the prompt is empty"),
        (b'{"model": "talker", "prompt": [1, 999]}', 400, "outside the vocabulary"),
        (b'{"model": "talker", "prompt": ["a", "b"]}', 400, "send one a request"),
        (b'{"model": "talker", "prompt": "\\ud800"}', 400, "surrogate"),
        (b'{"model": "other", "prompt": "a"}', 404, "there is no model 'other'"),
        (b'{"model": "\\ud800", "prompt": "a"}', 404, "there is no model '\\ud800'"),
        (b'{"model": "talker", "prompt": "a", "\\udcff": 1}', 400, "the request: input should be a valid string"),
        (
            b'{"model": "talker", "prompt": "a", "stream": true, "stream_options": {"\\udcff": 1}}',
            400,
            "there is no stream option ?",
        ),
        (b'{"model": "talker", "prompt": "' + b"a" * 20000 + b'"}', 413, "more than 20000 bytes"),
    ],
)
def test_malformed_requests(server, body, status, said):
    got, document = posted(server, body)
    assert got == status
    assert said in document["error"]["message"]
    assert set(document["error"]) == {"message", "type", "param", "code"}


def test_other_addresses_and_methods(server):
    assert posted(server, b"{}", "/v1/embeddings")[0] == 404
    with pytest.raises(urllib.error.HTTPError) as refused:
        request = urllib.request.Request(
            f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, method="GET"
        )
        urllib.request.urlopen(request)
    assert refused.value.code == 405
    assert "Method Not Allowed" in json.loads(refused.value.read())["error"]["message"]


def test_the_key_is_asked_for(server):
    for key in ("", "wrong", KEY + "x"):
        status, document = posted(server, b"{}", key=key)
        assert (status, document["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


# Clients that go, break off and dawdle


def long(prompt: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "talker", "prompt": prompt, "max_tokens": 480, "temperature": 0, **more}


def raw(server: Server, document: Any) -> bytes:
    body = json.dumps(document).encode()
    head = ("POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_cancels(server, client, stream):
    before = server.metric('lbllm_requests_total{ended="cancelled"}')
    gone = 0
    for attempt in range(20):
        with server.socket() as connection:
            connection.sendall(raw(server, long(f"Hello {attempt}", stream=stream)))
            if stream:
                connection.recv(10)
            else:
                time.sleep(0.01)
        server.idle()
        gone = server.metric('lbllm_requests_total{ended="cancelled"}') - before
        if gone:
            break
    assert gone > 0
    answer = client.completions.create(model="talker", prompt="Once", max_tokens=5, temperature=0)
    assert answer.usage.completion_tokens == 5


def test_broken_and_slow_clients_do_not_disturb_others(server, client, artifact):
    wanted = artifact[1].generate("Once upon", max_new_tokens=60)
    sockets = []
    for kind in ("silent", "half a head", "half a body", "rubbish", "never reads"):
        connection = server.socket()
        whole = raw(server, long(stream=True))
        sent = {"silent": b"", "half a head": whole[:30], "half a body": whole[:-9], "rubbish": b"\x16\x03\x01\x00" * 9}
        connection.sendall(sent.get(kind, whole))
        sockets.append(connection)
    slow = server.socket()
    slow_request = raw(server, long("Once upon", max_tokens=60))
    for i in range(0, len(slow_request), 16):
        slow.sendall(slow_request[i : i + 16])
        time.sleep(0.005)
    answer = client.completions.create(model="talker", prompt="Once upon", max_tokens=60, temperature=0)
    assert answer.choices[0].text == wanted
    received = b""
    while b"usage" not in received:
        received += slow.recv(20)
    assert json.dumps(wanted)[1:-1].encode() in received or wanted.encode() in received
    for connection in [*sockets, slow]:
        connection.close()
    server.idle()


def test_too_many_requests_are_told_to_come_back(artifact):
    with serving(artifact[0], "--together", "1", "--waiting", "2") as server:

        def ask(number: int) -> int:
            return posted(server, json.dumps(long(f"Hello {number}")).encode())[0]

        with ThreadPoolExecutor(12) as pool:
            statuses = list(pool.map(ask, range(12)))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        server.idle()
        assert server.metric('lbllm_refused_total{status="429"}') == statuses.count(429)
        with pytest.raises(openai.RateLimitError), ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda i: server.client.completions.create(**long(f"Again {i}")), range(12)))


def test_limits_of_tokens_and_time(artifact):
    options = ("--max-tokens", "400", "--timeout", "0.002")
    with serving(artifact[0], *options, key="") as server:
        status, document = posted(server, json.dumps(long()).encode(), key="")
        assert status == 400 and "this server gives at most 400" in document["error"]["message"]
        status, document = posted(server, json.dumps(long(max_tokens=400)).encode(), key="")
        assert (status, document["error"]["code"]) == (504, "timeout")
        stream = server.client.completions.create(**long(max_tokens=400), stream=True)
        with pytest.raises(openai.APIError, match="was not finished in"):
            list(stream)
        assert server.metric('lbllm_refused_total{status="504"}') == 0
        assert server.metric('lbllm_refused_total{status="400"}') == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(artifact, number):
    with serving(artifact[0]) as server:
        wanted = artifact[1].generate("Hello", max_new_tokens=480)
        stream = server.client.completions.create(**long(), stream=True)
        text = next(stream).choices[0].text
        server.process.send_signal(number)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == wanted
        assert server.process.wait(60) == 0
        with pytest.raises(OSError):
            server.socket()


def asked_at_once(server: Server, requests: int) -> tuple[ThreadPoolExecutor, list[Future[tuple[int, Any]]]]:
    """Long requests, more than are answered together, once all have been heard; the first ones may have ended then."""

    def ask(number: int) -> tuple[int, Any]:
        try:
            return posted(server, json.dumps(long(f"Hello {number}")).encode())
        except (OSError, ValueError) as error:  # the connection was broken off
            return 0, error

    pool = ThreadPoolExecutor(requests)
    answers = [pool.submit(ask, number) for number in range(requests)]
    heard = 0.0
    while heard < requests:
        time.sleep(0.01)
        ended = sum(answer.done() for answer in answers)
        heard = ended + server.metric("lbllm_running") + server.metric("lbllm_waiting")
    return pool, answers


def test_who_waits_when_the_grace_ends_is_told(artifact):
    with serving(artifact[0], "--together", "1", "--grace", "0.1") as server:
        pool, answers = asked_at_once(server, 40)
        server.process.send_signal(signal.SIGTERM)
        with pool:
            told = [answer.result(60) for answer in answers]
        late = [document["error"] for status, document in told if status == 503]
        assert {status for status, _ in told} <= {200, 503} and len(late) > 1
        assert {error["code"] for error in late} == {"shutting_down"}
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(artifact, second):
    with serving(artifact[0], "--together", "1", "--grace", "100000") as server:
        pool, answers = asked_at_once(server, 40)
        server.process.send_signal(signal.SIGTERM)
        while True:  # until the first has been heard
            try:
                server.socket().close()
            except OSError:
                break
            time.sleep(0.01)
        server.process.send_signal(second)
        assert server.process.wait(60) == 0
        with pool:
            assert sum(answer.result(60)[0] != 200 for answer in answers) > 1


# Load


def answers_under_load(server: Server, model: CompiledModel, requests: int, together: int) -> None:
    """Asks different things in different ways at once; every answer must be that of its own question."""
    generator = random.Random(0)
    shared = "Here is what everyone knows. "
    questions = [
        (shared * generator.randint(0, 3) + "".join(generator.choices("abcdef ", k=generator.randint(1, 30))), n)
        for n in (generator.randint(1, 16) for _ in range(150))
    ]
    wanted = [str(model.generate(text, max_new_tokens=tokens)) for text, tokens in questions]
    plan = [generator.randrange(len(questions)) for _ in range(requests)]

    def ask(number: int, question: int) -> bool:
        text, tokens = questions[question]
        options: dict[str, Any] = {"model": "talker", "prompt": text, "max_tokens": tokens, "temperature": 0}
        if number % 3 == 0:
            stream = server.client.completions.create(**options, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream) == wanted[question]
        return server.client.completions.create(**options).choices[0].text == wanted[question]

    with ThreadPoolExecutor(together) as pool:
        right = list(pool.map(ask, range(requests), plan))
    assert right == [True] * requests


def test_no_answer_is_lost_or_mixed_up(server, artifact):
    answers_under_load(server, artifact[1], 300, 32)
    assert server.metric('lbllm_step_sequences_bucket{le="1.0"}') < server.metric("lbllm_step_sequences_count")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_answer_of_ten_thousand_is_lost_or_mixed_up(server, artifact):
    answers_under_load(server, artifact[1], 10_000, 32)


def test_the_benchmark_runs(artifact, tmp_path):
    results = tmp_path / "results.json"
    arguments = ["--artifact", str(artifact[0]), "--at-once", "3", "--threads", "1", "--quick", "--json", str(results)]
    arguments += ["--types"]  # of llama.cpp's server, which may be here, none
    environment = {**os.environ, "LBLLM_API_KEY": "another"}  # which the benchmark's own server does not ask for
    command = [sys.executable, "-m", "benchmarks.serve", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(results.read_text())["runs"]
    assert [(row["server"], row["at_once"]) for row in run["results"]] == [("lbllm-compile", 1), ("lbllm-compile", 3)]
    assert all(row["tokens_per_second"] > 0 for row in run["results"])
    assert run["ratios"].keys() == {"lbllm-compile"} and not run["times_as_fast"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "there is no port 70000"),
        (["--together", "0"], "0 is too little for --together; use at least 1"),
        (["--waiting", "0"], "0 is too little for --waiting; use at least 1"),
        (["--max-tokens", "0"], "0 is too little for --max-tokens; use at least 1"),
        (["--max-body", "-5"], "-5 is too little for --max-body; use at least 1"),
        (["--prefix-cache", "-1"], "-1 is too little for --prefix-cache; use at least 0"),
        (["--timeout", "0"], "--timeout cannot be 0; use more than 0"),
        (["--timeout", "nan"], "--timeout cannot be nan; use more than 0"),
        (["--grace", "-1"], "--grace cannot be -1; use 0 to"),
        (["--grace", "inf"], "--grace cannot be inf; use 0 to"),
        (["--host", "256.0.0.1"], "there is no address '256.0.0.1'"),
        (["--threads", "0"], "0 threads cannot compute"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(artifact, options, said):
    result = CliRunner().invoke(cli.app, ["serve", str(artifact[0]), *options], prog_name="lbllm-compile")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_target_that_is_not_served_is_told_before_the_model_is_opened(artifact, monkeypatch):
    monkeypatch.setattr(opening, "find", None)
    options = ["--port", "0", "--target", "cuda:sm_90"]
    result = CliRunner().invoke(cli.app, ["serve", str(artifact[0]), *options], prog_name="lbllm-compile")
    assert result.exit_code == 2
    assert "programs on cuda:sm_90 are not served; `run` and `chat` take them" in result.stderr


def test_an_address_in_use_is_named(artifact):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli.app, ["serve", str(artifact[0]), "--port", port], prog_name="lbllm-compile")
    assert result.exit_code == 2
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in result.stderr


def test_without_its_packages_the_extra_is_named(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "lbllm_compile.serve.server", raising=False)
    result = CliRunner().invoke(cli.app, ["serve", str(artifact[0])], prog_name="lbllm-compile")
    assert result.exit_code == 2
    assert "pip install 'lbllm-compile[serve]'" in result.stderr
