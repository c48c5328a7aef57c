"""Commands and error messages that the documentation shows are those of the program."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from lbllm_compile import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("lbllm-compile", "python", "pip", "pipx", "uv", "make")


def shown(document: Path) -> Iterator[list[str]]:
    """The words of every command in a document's code blocks, comments and pipes left out."""
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^ {4}\S.*\n(?: {4}.*\n)*", prose, re.MULTILINE)
    for line in (line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()):
        words = re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", line.strip())
        program = re.sub(r"[\d.]+$", "", words.split(" ", 1)[0].rsplit("/", 1)[-1])
        if program in PROGRAMS:
            yield shlex.split(words.partition(" | ")[0], comments=True)


def mentioned(document: Path) -> Iterator[list[str]]:
    """The words of every command of this project's that a document names in a sentence."""
    for words in re.findall(r"(?<!`)`(lbllm-compile [^`]+)`", document.read_text(encoding="utf-8")):
        yield shlex.split(words.replace("\\|", "|").partition(" | ")[0])


COMMANDS = [
    pytest.param(words, id=f"{document.name}: {' '.join(words)[:60]}")
    for document in DOCUMENTS
    for words in shown(document)
]
MENTIONED = [
    pytest.param(words, id=f"{document.name}: {' '.join(words)[:60]}")
    for document in DOCUMENTS
    for words in mentioned(document)
]


@functools.cache
def extras() -> frozenset[str]:
    """The extras that pyproject.toml defines."""
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    return frozenset(re.findall(r"^([a-z]+) = \[", section.partition("\n[")[0], re.MULTILINE))


def parse(command: Any, name: str, words: list[str], parent: Any = None, resilient: bool = False) -> Any:
    """Parses a command line as typer does, and starts nothing; gives the command that it is for."""
    context = command.make_context(name, list(words), parent=parent, resilient_parsing=resilient)
    if hasattr(command, "resolve_command") and context._protected_args:
        verb, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        return parse(found, verb, rest, context, resilient)
    return command


def test_there_are_commands_of_every_program() -> None:
    programs = {Path(words[0]).name for param in COMMANDS for words in param.values}
    assert {"lbllm-compile", "python", "pip", "pipx", "uv", "make"} <= programs
    assert len(COMMANDS) > 40 and len(MENTIONED) > 10


@pytest.mark.parametrize("words", COMMANDS)
def test_a_documented_command_is_understood(words: list[str]) -> None:
    program, rest = Path(words[0]).name, words[1:]
    if program == "lbllm-compile":
        parse(get_command(cli.app), program, rest)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= {*targets}
    elif program.startswith("python"):
        understood_module(rest)
    else:
        for named in re.findall(r"\[([a-z,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= extras()


@pytest.mark.parametrize("words", ["run demo-out --promt x", "chart --system x --width 3", "tune export", "inspect"])
def test_a_command_that_is_none_is_seen(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|missing parameter"):
        parse(get_command(cli.app), "lbllm-compile", words.split())


@pytest.mark.parametrize("words", MENTIONED)
def test_a_mentioned_command_has_its_verb_and_options(words: list[str]) -> None:
    root = get_command(cli.app)
    command = parse(root, words[0], words[1:], resilient=True)
    known = {name for owner in (root, command) for parameter in owner.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}
    verb = words[1]
    assert verb.startswith("-") or verb in root.commands or verb.isupper() or Path(verb).suffix


def understood_module(words: list[str]) -> None:
    """``python -m benchmarks.NAME OPTIONS``: the module is there, and it or what it imports has the options."""
    assert words[0] == "-m"
    if not words[1].startswith("benchmarks."):
        assert words[1] in ("venv", "pytest", "tvm.exec.rpc_tracker", "tvm.exec.rpc_server")
        return
    sources = [ROOT / "benchmarks" / f"{words[1].removeprefix('benchmarks.')}.py", ROOT / "benchmarks" / "harness.py"]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in text] == []


def templates() -> Iterator[tuple[str, str]]:
    """Every text in the sources, as a regular expression in which what is put in is open, and its fixed part."""
    for folder in ("lbllm_compile", "passes", "codegen"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.BinOp | ast.JoinedStr | ast.Constant):
                    parts = list(pieces(node))
                    yield (
                        "".join(".*" if part is None else re.escape(part) for part in parts),
                        "".join(filter(None, parts)),
                    )


def pieces(node: ast.AST) -> Iterator[str | None]:
    """The fixed pieces of a text, and None for each that is put in."""
    match node:
        case ast.Constant(value=str() as text):
            yield text
        case ast.JoinedStr(values=values):
            for value in values:
                yield from pieces(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from pieces(left)
            yield from pieces(right)
        case _:
            yield None


def messages() -> list[str]:
    """The messages of docs/troubleshooting.md, the first column of its tables."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`+) ?(.*?) ?\1(?!`)(?: \([^|]*\))? \| ", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", text, re.MULTILINE))
    return [message for _, message in rows]


def test_the_messages_of_troubleshooting_are_in_the_sources() -> None:
    """Each is what one text of the sources becomes, with a third of it, at least, as it stands there."""
    known = [(re.compile(pattern, re.DOTALL), fixed) for pattern, fixed in templates() if len(fixed) > 10]
    found = messages()
    assert len(found) > 40
    strange = [m for m in found if not any(3 * len(fixed) >= len(m) and p.fullmatch(m) for p, fixed in known)]
    assert strange == []
