"""What ``inspect`` shows of an artifact: a page, graphs and their differences, and graphs for other programs."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import networkx
import pytest
import rtn
import zoo
from graphs import token_inputs
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.sizes import Names
from lbllm_compile.passes.pipeline import PassRecord
from rich.console import Console
from test_cli import layered
from typer.testing import CliRunner

from lbllm_compile import artifact, cli, frontend, inspect
from lbllm_compile.records import CompileReport, MeasuredPass
from lbllm_compile.report import graph, network, overview, terminal

FRONT, BEHIND = "canonicalize,annotate", "head{group=32},merge,lower,cache,cleanup"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a small language model with round-to-nearest weights, and a report of its passes."""
    program = frontend.capture(zoo.user_model("llama"))
    context = PassContext(probe=token_inputs(vocabulary=zoo.VOCABULARY))
    history: list[tuple[str, Program]] = []
    records: list[PassRecord] = []

    def note(record: PassRecord, before: Program, after: Program) -> None:
        history.append((record.name, after))
        records.append(dataclasses.replace(record, index=len(history)))

    program, _ = pipeline.run(program, pipeline.parse(FRONT), context, note)
    program, _ = pipeline.run(rtn.simulate(program), pipeline.parse(BEHIND), context, note)
    directory = tmp_path_factory.mktemp("inspected") / "small"
    digest = artifact.save(
        program, directory, lock={}, history=history, passes=[MeasuredPass.of(record) for record in records]
    )
    assert artifact.write_report(digest, CompileReport(directory, records, [], {}, 0, {"all": 61.0}, 9))
    return directory


def shown(*parts: Any, width: int = 120, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    for part in parts:
        console.print(part, crop=False)
    return stream.getvalue()


def run(*args: str) -> str:
    result = CliRunner().invoke(cli.app, ["inspect", *args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*args: str) -> str:
    result = CliRunner().invoke(cli.app, ["inspect", *args])
    assert result.exit_code == 2
    return result.stderr


def shapes(program: Program) -> dict[str, str]:
    return {str(n.target): n.meta["shape"] for n in program.graph.nodes if n.op == "placeholder" and "shape" in n.meta}


# Sizes


def test_sizes_that_inputs_choose_have_names(compiled: Path) -> None:
    before, after = (inspect.read_graph(compiled, f"passes/{name}.json") for name in ("002_annotate", "006_cache"))
    names = ("input_ids", "attention_mask", "position_ids")
    assert {shapes(before)[name] for name in names} == {"i64[batch, length]"}
    assert shapes(after)["attention_mask"] == "i64[batch, total]"
    assert re.fullmatch(r"u8\[batch, \d+, capacity, \d+\]", shapes(after)["kv_0_key_codes"])
    for program in (before, after):
        last = next(n for n in program.graph.nodes if n.op == "output").args[0]
        assert last.meta["shape"] == f"f32[batch, length, {zoo.VOCABULARY}]"
    assert not any("?" in n.meta.get("shape", "") for n in after.graph.nodes)


SIZES = {"batch": (2, 11), "length": (16, 5), "total": (16, 6), "past": (0, 1), "capacity": (16, 8)}


@given(
    st.sampled_from([(name,) for name in SIZES if name != "past"] + [("batch", "length"), ("batch", "total")]),
    st.integers(1, 300),
)
def test_a_multiple_of_sizes_is_told_from_two_probes(which: tuple[str, ...], factor: int) -> None:
    here, there = factor, factor
    for name in which:
        here, there = here * SIZES[name][0], there * SIZES[name][1]
    expected = "*".join(which) if factor == 1 else f"{factor}*{'*'.join(which)}"
    assert Names({}, SIZES).text(f"f32[{here}, 7]", f"f32[{there}, 7]") == f"f32[{expected}, 7]"


def test_other_sizes_are_told_or_left_open() -> None:
    names = Names({}, SIZES)
    assert names.text("f32[17, 48]", "f32[6, 48]") == "f32[length+1, 48]"
    assert names.text("i64[]", "i64[]") == "i64[]"
    assert names.text("f32[4]", "f32[121]") == "f32[?]"


def test_a_graph_for_the_sizes_of_its_probe_alone_keeps_them() -> None:
    text = """
        %ids = input input_ids
        %mask = input attention_mask
        %x = aten.view(%ids, [18])
        return %x
    """
    program = parse(text)
    after, _ = pipeline.run(program, pipeline.parse("cleanup"), PassContext(probe=token_inputs()))
    assert next(n for n in after.graph.nodes if n.name == "x").meta["shape"] == "i64[18]"


# The page


def test_the_first_page_is_a_page(compiled: Path) -> None:
    text = run(str(compiled))
    assert len(text.splitlines()) < 60 and "%" not in text.partition("The model")[0]
    assert "small: 2 decoder layers" in text and "The compile took 1:01" in text
    for line in ("Passes", "Inputs and state", "The model", "decoder layers 0-1 (2 alike)"):
        assert line in text
    assert re.search(r"attention_mask +i64\[batch, total\]", text)
    assert re.search(r"kv_\*_key_codes +u8\[batch, \d+, capacity, \d+\] +2 ", text)
    assert re.search(r"self_attn\.q_proj\+k_proj\+v_proj .*bit_linear.* W\(1\+1\) g32 +A4 per token and 32", text)
    assert text.count("mlp.down_proj") == 1


def test_what_differs_between_layers_is_shown() -> None:
    text = shown(overview.model(layered(5, negate=3), []))
    assert "decoder layers 0-2, 4 (4 alike)" in text
    assert re.search(r"decoder layer 3: as decoder layer 0, but +\n.*mm, relu, neg", text)


def test_stages_are_summed_up_by_their_worst_layer(compiled: Path) -> None:
    rows = [{"layer": i, "before": 0.4, "after": after} for i, after in enumerate((0.1, 0.3))]
    measured = [MeasuredPass("distill", "distill", "calibrating", rows, {})]
    program = inspect.read_graph(compiled, "graph.json")
    text = shown(*overview.page(program, inspect.linear_rows(program), [], measured, None))
    assert re.search(r"distill +of outputs +0\.4 +0\.2 +0\.3 +1\b", text)


# Graphs


def test_a_difference_shows_what_changed_alone(compiled: Path) -> None:
    text = run(str(compiled), "--diff", "annotate", "merge", "--layer", "0")
    assert text.startswith("From annotate to merge: ")
    assert re.search(r"^  - .*aten\.linear.*q_proj$", text, re.MULTILINE)
    assert re.search(r"^  \+ .*lbllm\.unpack_weight", text, re.MULTILINE)
    assert re.search(r"… \d+ nodes? as before", text) and "Linears" not in text
    document = json.loads(run(str(compiled), "--diff", "1", "2", "--json"))
    assert document["diff"] == ["1", "2"] and document["graph"] == []
    assert "nothing to show" in run(str(compiled), "--diff", "cache", "cache")


def test_only_nodes_that_are_asked_for(compiled: Path) -> None:
    text = run(str(compiled), "--grep", r"cached_attention\(")
    assert text.count("cached_attention(") == 1 and "decoder layer 0  (1 alike)" in text
    assert all("cached_attention" in line for line in text.splitlines() if "%" in line)
    assert "it is no regular expression" in refused(str(compiled), "--grep", "(")
    assert "--pass and --diff contradict" in refused(str(compiled), "--pass", "lower", "--diff", "1", "2")
    assert "without --diff, --grep" in refused(str(compiled), "--format", "dot", "--grep", "x")
    assert "--format cannot be 'jsn' (did you mean 'json'?)" in refused(str(compiled), "--format", "jsn")
    assert "no graph of a pass '9'" in refused(str(compiled), "--pass", "9")


def test_a_text_is_read_back(compiled: Path) -> None:
    text = run(str(compiled), "--pass", "lower", "--format", "txt")
    assert dump.render(parse(text)) == text.partition("\n")[2].removeprefix("")
    layer = run(str(compiled), "--format", "txt", "--layer", "1")
    assert "decoder layer 1:" in layer and "decoder layer 0:" not in layer


def test_networkx_reads_the_json(compiled: Path) -> None:
    program = inspect.read_graph(compiled, "graph.json")
    found = networkx.node_link_graph(json.loads(run(str(compiled), "--format", "json")), edges="edges")
    assert set(found) == {node.name for node in program.graph.nodes} and found.is_directed()
    for node in program.graph.nodes:
        assert set(found.predecessors(node.name)) == {operand.name for operand in node.all_input_nodes}
    state = found.nodes["kv_0_key_codes"]
    assert state["kind"] == "state" and state["shape"].startswith("u8[batch, ")
    layer = network.graph_of(program, layer=1)
    assert {facts["layer"] for _, facts in layer.nodes(data=True)} >= {1} and len(layer) < len(found)


def test_graphviz_gets_clusters(compiled: Path) -> None:
    text = run(str(compiled), "--format", "dot")
    program = inspect.read_graph(compiled, "graph.json")
    assert text.startswith('digraph "graph" {') and text.count("{") == text.count("}")
    assert text.count("subgraph cluster_") == 2
    assert text.count("[label=") == sum(node.op != "get_attr" for node in program.graph.nodes)


def test_a_terminal_folds_long_lines_and_a_pipe_does_not(compiled: Path) -> None:
    program = inspect.read_graph(compiled, "graph.json")
    view = graph.view(program)
    folded, piped = (shown(view, width=60, terminal=terminal) for terminal in (True, False))
    assert max(map(len, folded.splitlines())) <= 60 < max(map(len, piped.splitlines()))
    assert sum("%" in line and " = " in line for line in piped.splitlines()) == len(
        [mark for block in graph.blocks(program) for mark in block.marks if " = " in mark.text]
    )
    assert "".join(folded.split()) == "".join(piped.split())


def test_layers_that_are_nearly_alike_show_their_difference() -> None:
    text = shown(graph.view(layered(3, negate=2)))
    last = text.partition("decoder layer 2")[2].splitlines()
    assert last[0] == "  as decoder layer 0, but:"
    assert [line.strip() for line in last[1:3]] == [
        "… 3 nodes as in decoder layer 0",
        "%neg_default = aten.neg(%relu_default_2)",
    ]


def test_a_pager_is_for_terminals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read(terminal_output: bool) -> tuple[str, str]:
        stream, paged = io.StringIO(), tmp_path / f"paged-{terminal_output}"
        monkeypatch.setenv("PAGER", f"tee {paged}")
        monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
        console = Console(file=stream, force_terminal=terminal_output, color_system=None)
        with terminal.pager(console):
            console.print("long")
        return stream.getvalue(), paged.read_text() if paged.exists() else ""

    assert read(True) == ("", "long\n")
    assert read(False) == ("long\n", "")
