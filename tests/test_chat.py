"""``chat`` and ``run`` on artifacts with and without a chat template."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import runtime_only
import talker
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from lbllm_compile import chat, cli
from lbllm_compile.native.generate import AnswerText
from lbllm_compile.runtime import CompiledModel, GenerationError, Sampling
from lbllm_compile.runtime.opening import open_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompiledModel]:
    directory = tmp_path_factory.mktemp("made") / "talker"
    return directory, talker.make(directory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompiledModel]:
    directory = tmp_path_factory.mktemp("plain") / "talker"
    return directory, talker.make(directory, template=None)


def command(*args: str, typed: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(args), input=typed, prog_name="lbllm-compile")


# Stop strings


@given(text=st.text("abc", max_size=20), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_in_front_of_the_first_stop_string(text: str, stop: list[str]) -> None:
    answer = AnswerText(lambda ids: "".join(map(chr, ids)), stop)
    pieces: list[str] = []
    for i, c in enumerate(text):
        pieces.append(answer.push(ord(c)))
        complete = [s for s in stop if s in text[: i + 1]]
        assert answer.stopped == bool(complete)
        if answer.stopped:
            # the first one to be complete ends it, even where a longer one began before
            assert "".join(pieces) == text[: min(text.find(s) for s in complete)]
            return
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + answer.end() == text


def test_a_stop_string_may_be_far_longer_than_the_answer() -> None:
    """The work for a token grows with what is held back, not with the stop string."""
    answer = AnswerText(lambda ids: "".join(map(chr, ids)), ["ab" * (1 << 19), "b" * (1 << 20)])
    pieces = [answer.push(ord(c)) for c in "xababxbbbx"]
    assert pieces == ["x", "", "", "", "", "ababx", "", "", "", "bbbx"]
    assert answer.end() == "" and not answer.stopped


def test_a_stop_string_of_no_characters_is_refused(artifact: tuple[Path, CompiledModel]) -> None:
    result = command("run", str(artifact[0]), "--prompt", "Hello", "--stop", "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "lbllm-compile: a stop string is empty; give at least one character\n"


def test_run_stops_at_the_first_of_its_stop_strings(artifact: tuple[Path, CompiledModel]) -> None:
    directory, model = artifact
    whole = model.generate("Hello", chat=True, max_new_tokens=40)
    assert isinstance(whole, str)
    late, early = whole[20:23], whole[7:10]
    result = command("run", str(directory), "--prompt", "Hello", "--max-tokens", "40", "--stop", late, "--stop", early)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == whole[: min(whole.find(late), whole.find(early))] + "\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--threads", "0"], "0 threads cannot compute; ask for at least 1"),
        (["--target", "cpu:avx1"], "unknown target 'cpu:avx1'"),
        (["--target", "cuda"], "cuda"),
    ],
)
@pytest.mark.parametrize("verb", [["run", "--prompt", "a"], ["chat"]], ids=["run", "chat"])
def test_what_cannot_run_here_is_refused(
    artifact: tuple[Path, CompiledModel], verb: list[str], options: list[str], expected: str
) -> None:
    result = command(*verb, str(artifact[0]), *options)
    assert result.exit_code == 2
    assert expected in result.stderr and result.stderr.count("\n") == 1


def test_threads_are_those_of_the_kernels(
    artifact: tuple[Path, CompiledModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbllm_compile.codegen.threads import thread_count

    monkeypatch.setenv("TVM_NUM_THREADS", str(thread_count()))
    asked = thread_count()
    result = command("run", str(artifact[0]), "--prompt", "Hello", "--max-tokens", "3", "--threads", str(asked))
    assert result.exit_code == 0, result.stderr
    monkeypatch.setattr("lbllm_compile.runtime.opening.open_model", lambda *_, **__: pytest.exit)
    command("run", str(artifact[0]), "--prompt", "Hello", "--threads", str(asked + 3))
    assert thread_count() == asked + 3


# Conversations


def told(directory: Path, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
    """What a chat prints, and what it tells beside, when these lines are typed."""
    result = command("chat", str(directory), *options, typed="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def expected(model: CompiledModel, turns: list[tuple[str, str]], tokens: int) -> str:
    text = model.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
    )
    return str(model.generate(text, max_new_tokens=tokens))


def test_an_answer_is_that_to_the_whole_conversation(artifact: tuple[Path, CompiledModel]) -> None:
    directory, model = artifact
    turns = [("system", "Be brief."), ("user", "Hello there")]
    first = expected(model, turns, 20)
    turns += [("assistant", first), ("user", "Why?")]
    second = expected(model, turns, 20)
    lines = ("Hello there", "Why?", "", "/reset", "Why?", "/exit", "not read")
    out, notes = told(directory, *lines, options=("--system", "Be brief.", "--max-tokens", "20"))
    third = expected(model, [turns[0], ("user", "Why?")], 20)
    assert out == f"{first}\n{second}\n{third}\n"
    # of the second prompt only what is new was read: not the system prompt and the first turn
    known = len("<system>Be brief.\n<user>Hello there\n<assistant>" + first)
    whole = known + len("\n<user>Why?\n<assistant>")
    assert "[20 tokens, " in notes and " tokens/s" in notes
    assert f"{whole - known + 1} of {whole} prompt tokens read" in notes


def test_commands(artifact: tuple[Path, CompiledModel]) -> None:
    directory, model = artifact
    lines = ("/help", "/system", "/system Sing.", "/system", "/sing", "//slash", "/quit")
    out, notes = told(directory, *lines, options=("--max-tokens", "5"))
    assert out == expected(model, [("system", "Sing."), ("user", "/slash")], 5) + "\n"
    for text in (chat.HELP, "there is no system prompt", "begins anew", "\nSing.\n", "there is no command /sing"):
        assert text in notes


def test_what_the_context_does_not_hold_is_said(artifact: tuple[Path, CompiledModel]) -> None:
    directory, model = artifact
    lines = ["x" * 150, "y" * 150, "z" * 150, "w" * 600, "Why?"]
    out, notes = told(directory, *lines, options=("--max-tokens", "60", "--system", "Hm."))
    answers = out.splitlines()
    assert len(answers) == 4
    assert answers[2] == expected(
        model, [("system", "Hm."), ("user", lines[1]), ("assistant", answers[1]), ("user", lines[2])], 60
    )
    assert "the oldest 2 turns no longer fit the context and were left out" in notes
    assert "the message takes 6" in notes and "shorten it, or ask for fewer with --max-tokens" in notes


def test_answers_that_leave_no_room_are_refused(artifact: tuple[Path, CompiledModel]) -> None:
    result = command("chat", str(artifact[0]), "--max-tokens", str(talker.CONTEXT), typed="Hello\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"the model's context holds {talker.CONTEXT}" in result.stderr


def test_input_must_be_utf8(artifact: tuple[Path, CompiledModel]) -> None:
    result = command("chat", str(artifact[0]), "--max-tokens", "3", typed="ok\ngrün\n".encode("latin-1"))
    assert result.exit_code == 2
    assert "line 2 of standard input is not UTF-8 text (byte 2)" in result.stderr


def test_without_a_template_messages_are_continued_as_text(plain: tuple[Path, CompiledModel]) -> None:
    directory, model = plain
    out, notes = told(directory, "Hello", "Why?", "/system Sing.", options=("--max-tokens", "9"))
    assert out == "".join(f"{model.generate(text, max_new_tokens=9)}\n" for text in ("Hello", "Why?"))
    assert "the model has no chat template: it continues each message" in notes
    assert "it can have no system prompt" in notes
    result = command("chat", "nowhere", "--system", "\udcff", typed="Hello\n")
    assert result.exit_code == 2 and "is not UTF-8 text" in result.stderr  # before anything is looked for
    result = command("chat", str(directory), "--system", "Sing.", typed="Hello\n")
    assert result.exit_code == 2 and "no --system prompt" in result.stderr


class Interrupting(io.StringIO):
    """Where an answer goes; Ctrl-C is pressed at the third piece."""

    pressed = False

    def write(self, text: str) -> int:
        written = super().write(text)
        if len(self.getvalue()) == 3 and not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return written


def test_an_interrupt_ends_the_answer_and_keeps_the_conversation(artifact: tuple[Path, CompiledModel]) -> None:
    directory, model = artifact
    out, notes = Interrupting(), []
    conversation = chat.Conversation(open_model(directory), Sampling(20))
    before = signal.getsignal(signal.SIGINT)
    chat.talk(conversation, iter(["Hello there", "Why?"]), out, notes.append)
    first = expected(model, [("user", "Hello there")], 3)
    second = expected(model, [("user", "Hello there"), ("assistant", first), ("user", "Why?")], 20)
    assert out.getvalue() == f"{first}\n{second}\n"
    assert notes[0].startswith("[3 tokens") and notes[0].endswith("interrupted]")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_keeps_the_conversation(artifact: tuple[Path, CompiledModel]) -> None:
    conversation = chat.Conversation(open_model(artifact[0]), Sampling(5))
    list(conversation.answer("Hello"))
    turns = list(conversation.turns)
    with pytest.raises(GenerationError, match="no such role"):
        conversation.turns = [{"role": "nobody", "content": ""}]
        list(conversation.answer("Why?"))
    conversation.turns = turns
    with pytest.raises(ZeroDivisionError):
        list(conversation.answer("Why?", lambda: bool(1 // 0)))
    assert conversation.turns == turns
    fresh = chat.Conversation(open_model(artifact[0]), Sampling(5))
    list(fresh.answer("Hello"))
    assert list(conversation.answer("Why?")) == list(fresh.answer("Why?"))


def test_chat_needs_neither_torch_nor_the_compiler(artifact: tuple[Path, CompiledModel]) -> None:
    directory, model = artifact
    command = runtime_only.command("chat", str(directory), "--max-tokens", "6")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, input="Hello\n", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected(model, [("user", "Hello")], 6) + "\n"
