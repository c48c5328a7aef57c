"""The command from end to end on the tiny example: a pass of one's own changes what runs, and nobody is phoned."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lbllm_compile.passes import pipeline, registry
from lbllm_compile.passes.base import CALIBRATING, Contract, Pass, PassContext, PassResult
from lbllm_compile.passes.ir.program import Program
from test_driver import SMALL
from typer.testing import CliRunner

from lbllm_compile import cli, recipe

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny_llama.py"


@dataclass(frozen=True)
class NegateHead(Pass):
    """Negates what the output head computes."""

    name: ClassVar[str] = "negate-head"
    contract: ClassVar[Contract] = CALIBRATING

    def apply(self, program: Program, context: PassContext) -> PassResult:
        after = program.copy()
        output = after.graph.output_node()
        with after.graph.inserting_before(output):
            output.args = (after.graph.call_function(torch.ops.aten.neg.default, output.args),)
        after.module.recompile()
        return PassResult(after)


class Point(EntryPoint):
    def load(self) -> Any:
        return NegateHead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder and a cache of its own, a small preset, the pass, and no network."""

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"the network was asked for: {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(recipe.PRESETS, "quick", SMALL)
        points = [Point("negate-head", "test:NegateHead", registry.ENTRY_POINT_GROUP)]
        patch.setattr(registry, "entry_points", lambda group: points)
        for function in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, function, refuse)
        for function in ("create_connection", "getaddrinfo"):
            patch.setattr(socket, function, refuse)
        yield tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The report of the example's compile, as it comes."""
    return command(str(EXAMPLE), "--preset", "quick", "--out", str(folder / "plain"))


def command(*args: str) -> Any:
    """Runs the command; its JSON document."""
    result = CliRunner().invoke(cli.app, [*args, "--json"], prog_name="lbllm-compile")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def answer(directory: str) -> str:
    """What the command answers a prompt of five tokens with."""
    document = command("run", directory, "--prompt", "Hello", "--max-tokens", "8")
    assert document["prompt_tokens"] == 5
    return document["text"]


@pytest.fixture(scope="module")
def plain_answer(plain: Any) -> str:
    return answer(plain["out"])


def test_compile_load_and_run_need_no_network(plain: Any, plain_answer: str) -> None:
    assert {verdict["stage"] for verdict in plain["stages"]} == {"stage 2", "stage 3"}
    assert answer(plain["out"]) == plain_answer


def test_a_pass_that_negates_the_head_changes_what_run_prints(plain_answer: str, folder: Path) -> None:
    usual = pipeline.render(recipe.passes(recipe.Choices(preset="quick"), "cpu"))
    out = str(folder / "negated")
    report = command(
        str(EXAMPLE), "--pipeline", usual.replace("head,", "head,negate-head,"), "--preset", "quick", "--out", out
    )
    assert [p["name"] for p in report["passes"]].count("negate-head") == 1
    assert answer(out) != plain_answer
