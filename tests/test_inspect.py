"""What ``inspect`` shows of an artifact: a page, graphs and their differences, and graphs for other programs."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import networkx
import pytest
import rtn
import stages
import zoo
from graphs import token_inputs
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.codegen.backend import backend_named
from lbllm_compile.codegen.format import unpack_plane
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import Program, get_attribute
from lbllm_compile.passes.ir.sizes import Names
from lbllm_compile.passes.pipeline import PassRecord
from rich.console import Console
from test_cli import layered
from typer.testing import CliRunner

from lbllm_compile import artifact, cli, explain, frontend, inspect
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.records import CompileReport, MeasuredPass
from lbllm_compile.report import graph, network, overview, terminal

FRONT, BEHIND = "canonicalize,annotate", "head{group=32},merge,lower,cache,cleanup"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a small language model with round-to-nearest weights, and a report of its passes and kernels."""
    program = frontend.capture(zoo.user_model("llama"))
    context = PassContext(probe=token_inputs(vocabulary=zoo.VOCABULARY))
    history: list[tuple[str, Program]] = []
    records: list[PassRecord] = []

    def note(record: PassRecord, before: Program, after: Program) -> None:
        history.append((record.name, after))
        records.append(dataclasses.replace(record, index=len(history)))

    program, _ = pipeline.run(program, pipeline.parse(FRONT), context, note)
    simulated = rtn.simulate(program)
    row = {"linear": DOWN, "layer": 1, "error": 0.0625}
    note(PassRecord(0, "ptq", "ptq", 1.0, 0.5, 9, 12, "calibrating", 0.25, [row]), program, simulated)
    note(PassRecord(0, "activate", "activate", 1.0, 0.5, 9, 12, "calibrating", 0.25), simulated, simulated)
    program, _ = pipeline.run(simulated, pipeline.parse(BEHIND), context, note)
    directory = tmp_path_factory.mktemp("inspected") / "small"
    specs = requirements(program).linears
    kernels = [tuned(spec)[0] for spec in specs]
    digest = artifact.save(
        program,
        directory,
        lock={},
        history=history,
        passes=[MeasuredPass.of(record) for record in records],
        records=kernels,
        sources={name_of(spec): f"# of {spec}" for spec in specs},
    )
    report = CompileReport(directory, records, [], {}, 0, {"all": 61.0}, 9)
    assert artifact.write_report(digest, report)
    return directory


DOWN = "model.layers.1.mlp.down_proj"

TIMES: dict[str, Any] = {
    "microseconds": 10.0,
    "default_microseconds": 15.0,
    "roofline_microseconds": 8.0,
    "discarded": ["rows=4: it timed out"],
}


def name_of(spec: LinearSpec) -> str:
    return f"{spec.kind}_{spec.out_features}x{spec.in_features}_g{spec.group}_a{spec.act_bits}_0.py"


def tuned(spec: LinearSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tuning record of the first schedule for one token, and with what a search measured."""
    space, target = backend_named("cpu").space(), Target.parse("cpu:avx2")
    schedules = space.implementations(spec, target)[0].schedules(space.buckets[0])[:2]
    first, second = (dataclasses.asdict(schedule) for schedule in schedules)
    tried = [{"schedule": first, "microseconds": 10.0}, {"schedule": second, "microseconds": 12.5}]
    record = {"spec": dataclasses.asdict(spec), "tokens": "1", "target": target.name, "threads": 1, "schedule": first}
    return record, {**record, **TIMES, "candidates": tried}


def after(directory: Path, name: str) -> Program:
    return inspect.read_graph(directory, next(p.file for p in inspect.stored_passes(directory) if p.name == name))


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
    before, cached = (after(compiled, name) for name in ("annotate", "cache"))
    names = ("input_ids", "attention_mask", "position_ids")
    assert {shapes(before)[name] for name in names} == {"i64[batch, length]"}
    assert shapes(cached)["attention_mask"] == "i64[batch, total]"
    assert re.fullmatch(r"u8\[batch, \d+, capacity, \d+\]", shapes(cached)["kv_0_key_codes"])
    for program in (before, cached):
        last = next(n for n in program.graph.nodes if n.op == "output").args[0]
        assert last.meta["shape"] == f"f32[batch, length, {zoo.VOCABULARY}]"
    assert not any("?" in n.meta.get("shape", "") for n in cached.graph.nodes)


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


def test_a_size_that_a_tensors_values_choose_is_left_open() -> None:
    names = Names({}, SIZES)
    assert names.text("f32[u0, 48]", "f32[u0, 48]") == "f32[?, 48]"


def test_a_graph_for_the_sizes_of_its_probe_alone_keeps_them() -> None:
    text = """
        %ids = input input_ids
        %mask = input attention_mask
        %x = aten.view(%ids, [18])
        return %x
    """
    program = parse(text)
    kept, _ = pipeline.run(program, pipeline.parse("cleanup"), PassContext(probe=token_inputs()))
    assert next(n for n in kept.graph.nodes if n.name == "x").meta["shape"] == "i64[18]"


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
    text = shown(overview.Model(overview.stretches(layered(5, negate=3), [])))
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
    assert "no graph of a pass '99'" in refused(str(compiled), "--pass", "99")


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


# One linear


def explained(*args: str) -> str:
    result = CliRunner().invoke(cli.app, ["explain", *args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_linear_is_explained(compiled: Path) -> None:
    text = explained(str(compiled), DOWN)
    assert re.search(r"is +\d+ x \d+, decoder layer 1; in decoder layer 1", text)
    assert re.search(
        r"is computed by +lbllm\.bit_linear at %\w+: W\(1\+1\) g32 weights, A4 per token and 32 input", text
    )
    assert re.search(r"annotate +aten\.linear: float weights, float input", text)
    assert re.search(r"ptq +aten\.linear: W\(1\+1\) g32, simulated weights, .* error 0\.0625", text)
    assert re.search(r"lower +lbllm\.bit_linear: W\(1\+1\) g32 weights, A4 per token and 32 input", text)
    assert "merge" not in text.partition("What the passes made of it")[2].partition("Its weights")[0]
    assert re.search(r"clip +0\.95, 0\.9", text)
    assert re.search(r"cpu:avx2 +1 +- +- +- +chains", text)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PassRecord]:
    """An artifact whose inputs ``activate`` has quantized, in several files of weights, and what it told."""
    history: list[tuple[str, Program]] = []
    around = dataclasses.replace(stages.context(), probe=stages.batches(1)[0])
    program, records = pipeline.run(
        stages.quantized(),
        pipeline.parse(f"activate{{group=32,steps=0}},{BEHIND}"),
        around,
        lambda record, before, after: history.append((record.name, after)),
    )
    directory = tmp_path_factory.mktemp("calibrated") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "SHARD_BYTES", 5000)
        passes = [MeasuredPass.of(record) for record in records]
        artifact.save(program, directory, lock={}, history=history, passes=passes)
    return directory, records[0]


def test_the_range_of_an_input_is_what_activate_saw(calibrated: tuple[Path, PassRecord]) -> None:
    directory, record = calibrated
    seen = record.summary["input_ranges"][DOWN]
    told = explain.explain(directory, DOWN).input
    assert {name: told[f"range_{name}"] for name in ("low", "high", "peak")} == {
        k: seen[k] for k in seen if k != "layer"
    }
    assert re.search(rf"range peak +{seen['peak']:.4g}", explained(str(directory), DOWN))


def test_files_of_a_linear_alone_are_read(calibrated: tuple[Path, PassRecord], tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(calibrated[0], directory)
    places = artifact.weight_files(directory)
    own = {name for path, name in places.items() if path.startswith(f"{DOWN}.")}
    other = next(name for name in places.values() if name not in own)
    (directory / other).write_bytes(b"")
    whole = explain.explain(calibrated[0], DOWN)
    assert explain.explain(directory, DOWN) == whole and whole.weights
    damaged = directory / sorted(own)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    result = CliRunner().invoke(cli.app, ["explain", str(directory), DOWN])
    assert result.exit_code == 2 and damaged.name in result.stderr


def test_what_a_search_measured_is_explained(compiled: Path) -> None:
    found = explain.explain(compiled, DOWN)
    record, searched = tuned(LinearSpec(**found.kernels[0]["spec"]))
    (kernel,) = explain.kernels_of(
        [record, {**record, "spec": {"kind": "bit"}}], [searched], LinearSpec(**record["spec"])
    )
    text = shown(*explain.render(dataclasses.replace(found, kernels=[kernel])))
    assert re.search(r"cpu:avx2 +1 +10 +15 +80 %", text)
    assert "2 candidates for 1 token on cpu:avx2" in text and "25 % slower" in text
    assert "gave no time: rows=4: it timed out" in text


def test_an_explanation_counts_levels_and_bits(compiled: Path) -> None:
    document = json.loads(explained(str(compiled), "layers.1.mlp.down_proj", "--json"))
    weights, levels = document["weights"], document["weights"]["levels"]
    assert document["facts"]["linear"] == DOWN and sum(level["share"] for level in levels) == pytest.approx(1)
    stored = artifact.load(compiled).program
    planes = [get_attribute(stored.module, f"{DOWN}.weight.{name}") for name in ("sign", "bitmap")]
    rows, columns = document["facts"]["shape"]
    for name, plane in zip(("sign", "bitmap"), planes, strict=True):
        assert weights[f"{name}_density"] == pytest.approx(float(unpack_plane(plane, columns).float().mean()))
        assert plane.shape[0] == rows
    assert levels[0]["mean"] < levels[1]["mean"] < levels[2]["mean"] < levels[3]["mean"]
    assert weights["bits_per_weight"] == pytest.approx(weights["groups"] * 48 / weights["elements"] + 2, rel=0.1)


def test_merged_linears_name_each_other(compiled: Path) -> None:
    document = json.loads(explained(str(compiled), "model.layers.0.self_attn.k_proj", "--json"))
    assert document["facts"]["merged"] == [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    merge = next(row for row in document["passes"] if row["pass"] == "merge")
    assert merge["becomes"].endswith("as part of q_proj+k_proj+v_proj")


def test_a_pass_that_is_named_twice_tells_both_its_figures(compiled: Path, tmp_path: Path) -> None:
    program = artifact.load(compiled).program
    rows = [[{"linear": DOWN, "layer": 1, "error": error}] for error in (0.5, 0.25)]
    passes = [MeasuredPass("finetune", "finetune", "calibrating", told, {}) for told in rows]
    artifact.save(program, tmp_path / "twice", lock={}, history=[("finetune", program)] * 2, passes=passes)
    found = explain.explain(tmp_path / "twice", DOWN).passes
    assert [row["measured"] for row in found] == [{"error": 0.5}, {"error": 0.25}]


def test_the_text_and_the_assembly_of_kernels(compiled: Path) -> None:
    text = explained(str(compiled), DOWN, "--tir")
    assert len(re.findall(r"^kernels/bit_\w+_0\.py\n# of LinearSpec", text, re.MULTILINE)) == 1
    assert ".globl" in explained(str(compiled), DOWN, "--asm")
    head = json.loads(explained(str(compiled), "lm_head", "--tir", "--json"))
    assert head["weights"] == {} and [name.startswith("kernels/int8_") for name in head["texts"]] == [True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.dwn_proj", f"no linear 'model.layers.1.mlp.dwn_proj'; near it are {DOWN}"),
        ("mlp.down_proj", "several linears 'mlp.down_proj'; near it are model.layers.0.mlp.down_proj, "),
        ("model.layers.99.mlp.down_proj", "near it are model.layers."),
        ("zzz", "no linear 'zzz'; near it are "),
    ],
)
def test_near_names_are_told(compiled: Path, name: str, expected: str) -> None:
    result = CliRunner().invoke(cli.app, ["explain", str(compiled), name])
    assert result.exit_code == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1
