"""The command from end to end on the tiny example: a pass of one's own changes what runs, and nobody is phoned."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lbllm_compile.passes import registry
from lbllm_compile.passes.base import CALIBRATING, Contract, Pass, PassContext, PassResult
from lbllm_compile.passes.program import Program
from test_driver import SMALL
from typer.testing import CliRunner

import lbllm_compile
from lbllm_compile import cli, recipe

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny_llama.py"
PIPELINE = "canonicalize,annotate,observe,ptq,activate{{steps=0}},head,{}merge,lower,cache,cleanup"


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


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache of its own, a small preset, the pass, and no network."""

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"the network was asked for: {args}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(recipe.PRESETS, "quick", SMALL)
    points = [Point("negate-head", "test:NegateHead", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    for function in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, function, refuse)
    for function in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, function, refuse)


def command(*args: str) -> Any:
    """Runs the command; its JSON document."""
    result = CliRunner().invoke(cli.app, [*args, "--json"], prog_name="lbllm-compile")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_pass_that_negates_the_head_changes_what_run_prints() -> None:
    texts = {}
    for out, extra in (("plain", ""), ("negated", "negate-head,")):
        report = command(str(EXAMPLE), "--preset", "quick", "--pipeline", PIPELINE.format(extra), "--out", out)
        assert ("negate-head" in [p["name"] for p in report["passes"]]) == bool(extra)
        texts[out] = command("run", out, "--prompt", "Hello", "--max-tokens", "8")["text"]
    assert texts["plain"] != texts["negated"]
    plain, negated = (lbllm_compile.load(out) for out in texts)
    ids = torch.tensor([plain.encode("Hello")])
    assert torch.equal(negated.logits(ids), -plain.logits(ids))


def test_compile_run_and_eval_need_no_network() -> None:
    report = command(str(EXAMPLE), "--preset", "quick", "--out", "out")
    assert {verdict["stage"] for verdict in report["stages"]} == {"stage 2", "stage 3"}
    assert command("run", "out", "--prompt", "Hello", "--max-tokens", "4")["prompt_tokens"] == 5
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    assert command("eval", "out", "--text", "text.txt", "--seq-len", "64")["kld_mean"] > 0
