"""The first page on an artifact: how it was made, what goes in, and the model with like decoder layers shown once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch import fx

from lbllm_compile.codegen.sizes import BATCH, CAPACITY
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.annotations import LINEAR
from lbllm_compile.passes.ir.program import LAYER, PER_TOKEN, STATE, Program
from lbllm_compile.records import CompileReport, MeasuredPass
from lbllm_compile.report import graph, summary, terminal

WIDE = 110
"""Columns of a terminal from which modules are shown with their operators."""

MOST_OPERATORS = 5
"""Operators of a module that are named."""

_NUMBER = re.compile(r"\d+")
_UNTOLD = {"getitem", "aten.sym_size.int"}
"""Operators that compute nothing worth a word."""


@dataclass(frozen=True)
class Part:
    """A module within a decoder layer, or outside them: all its nodes.

    Attributes:
        name: its path, in a decoder layer without what leads to the layer.
        nodes: how many nodes it has, weights not counted.
        operators: what they call, without overloads: this project's own first, then in order of first appearance.
        linear: of a linear its row (:func:`lbllm_compile.inspect.linear_rows`), without what names the layer.
    """

    name: str
    nodes: int
    operators: tuple[str, ...]
    linear: tuple[tuple[str, Any], ...] = ()

    def cells(self, wide: bool) -> list[Any]:
        """What a table shows of it: number of nodes and operators where it is wide, in and out, weights, input."""
        text = ", ".join(self.operators[:MOST_OPERATORS]) + (", …" if len(self.operators) > MOST_OPERATORS else "")
        row = dict(self.linear)
        sizes = f"{row['in']} → {row['out']}" if row else ""
        return [*([self.nodes, text] if wide else []), sizes, row.get("weights", ""), row.get("input", "")]


@dataclass(frozen=True)
class Stretch:
    """Modules of one decoder layer and of all ``layers`` that are like it, or of what lies outside (no layers)."""

    layers: tuple[int, ...]
    parts: tuple[Part, ...]


def page(
    program: Program,
    linears: Sequence[Mapping[str, Any]],
    passes: Sequence[str],
    measured: Sequence[MeasuredPass],
    report: CompileReport | None,
) -> list[RenderableType]:
    """The page.

    Args:
        program: the graph that runs; weights are not needed.
        linears: its rows (:func:`lbllm_compile.inspect.linear_rows`).
        passes: the names of the passes that made it.
        measured: what they measured.
        report: of the compile, where the artifact has one.
    """
    parts: list[RenderableType] = [_heading(program, linears), Text(), _pipeline(passes, measured, report)]
    parts += [part for table in summary.budget_tables(measured) for part in (Text(), table)]
    if stages := _stages(measured):
        parts += [Text(), terminal.rows_table("What the stages measured", stages)]
    parts += [Text(), inputs(program), Text(), Model(stretches(program, linears))]
    if report is not None:
        if report.verdicts:
            parts += [Text(), summary.verdict_table(report.verdicts)]
        if report.fallback:
            parts += [Text(), summary.fallback_table(report.fallback)]
        parts += [Text(), summary.sheet(report.sheet), Text(), Text(_took(report))]
    return parts


def _heading(program: Program, linears: Sequence[Mapping[str, Any]]) -> Text:
    layers = {node.meta.get(LAYER) for node in program.graph.nodes} - {None}
    plural = "" if len(layers) == 1 else "s"
    counts = f"{len(layers)} decoder layer{plural}, {len(linears)} linears, {len(program.graph.nodes)} nodes"
    return Text.assemble((program.name, "bold"), f": {counts}")


def _pipeline(passes: Sequence[str], measured: Sequence[MeasuredPass], report: CompileReport | None) -> Table:
    """The passes, as far as the artifact tells of them."""
    columns = ["#", "pass", "contract", "probe's error", "nodes", "time"]
    if report is not None:
        rows = [
            [
                r.index,
                r.text,
                r.contract,
                "bit-equal" if r.error == 0 else r.error,
                f"{r.nodes_before} → {r.nodes_after}",
                terminal.duration(r.seconds + r.check_seconds),
            ]
            for r in report.records
        ]
        return terminal.table("Passes", columns, rows)
    told = [(item.text, item.contract) for item in measured] or [(name, None) for name in passes]
    return terminal.table("Passes", columns[:3], [[index, *item] for index, item in enumerate(told, 1)])


def _stages(measured: Iterable[MeasuredPass]) -> list[dict[str, Any]]:
    """Of every calibrating pass that measured errors of layers: their mean before and after it, and the worst."""
    found = []
    for item in measured:
        rows = summary.by_layer(item.rows)
        name = next((n for n in ("after", "error") if rows and all(n in row for row in rows)), None)
        if item.contract != "calibrating" or name is None:
            continue
        before = [row["before"] for row in rows if "before" in row]
        figures = [row[name] for row in rows]
        worst = rows[figures.index(max(figures))]
        found.append(
            {
                "pass": item.name,
                "error": "of outputs" if name == "after" else "of weights",
                "before": sum(before) / len(before) if before else None,
                "after": sum(row[name] for row in rows) / len(rows),
                "worst": worst[name],
                "in layer": worst["layer"],
            }
        )
    return found


def _took(report: CompileReport) -> str:
    peak = f", {terminal.size(report.peak_memory)} of memory at most" if report.peak_memory else ""
    return f"The compile took {terminal.duration(sum(report.seconds.values()))}{peak}."


def inputs(program: Program) -> Table:
    """What the graph takes: its inputs, and its state with like tensors as one row."""
    rows: list[list[Any]] = []
    states: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.placeholders():
        if STATE in node.meta:
            states.setdefault((_NUMBER.sub("*", str(node.target)), state_shape(node)), []).append(node)
        else:
            rows.append([str(node.target), node.meta.get("shape", "int"), None, None])
    for (name, shape), nodes in states.items():
        spec = nodes[0].meta[STATE]
        size = len(nodes) * spec.heads * math.prod(spec.tail) * spec.dtype.itemsize
        per = "a token" if spec.kind == PER_TOKEN else "a sequence"
        rows.append([name, shape, len(nodes), f"{terminal.size(size)} {per}"])
    return terminal.table("Inputs and state", ["", "", "tensors", "together"], rows)


def state_shape(node: fx.Node) -> str:
    """Dtype and shape of a state, e.g. ``u8[batch, 3, capacity, 32]``; the second size are its heads or channels."""
    spec = node.meta[STATE]
    slots = (CAPACITY,) if spec.kind == PER_TOKEN else ()
    return dump.sizes_text(spec.dtype, (BATCH, spec.heads, *slots, *spec.tail))


@dataclass(frozen=True)
class Model:
    """The modules in graph order; of decoder layers that are nearly alike what differs.

    Attributes:
        stretches: of the program.
    """

    stretches: Sequence[Stretch]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        columns = ["", *(["nodes", "operators"] if wide else []), "in → out", "weights", "input"]
        rows: list[list[Any]] = []
        first: Stretch | None = None
        for stretch in self.stretches:
            indent, parts = "", stretch.parts
            if stretch.layers:
                indent = "  "
                title, parts = _title(stretch, first)
                rows.append([title, *[""] * (len(columns) - 1)])
                first = first or stretch
            rows += [[f"{indent}{part.name}", *part.cells(wide)] for part in parts]
        yield terminal.table("The model", columns, rows)


def _title(stretch: Stretch, first: Stretch | None) -> tuple[str, tuple[Part, ...]]:
    """The heading of a decoder layer, and its parts to show: those that the first one shown does not have."""
    alike = f" ({len(stretch.layers)} alike)" if len(stretch.layers) > 1 else ""
    title = f"decoder layer{'s' if alike else ''} {graph.ranges(stretch.layers)}{alike}"
    if first is None:
        return title, stretch.parts
    own = tuple(part for part in stretch.parts if part not in first.parts)
    gone = [part.name for part in first.parts if part.name not in {p.name for p in stretch.parts}]
    title += f": as decoder layer {first.layers[0]}"
    title += f" without {', '.join(gone)}" if gone else ""
    return title + (", but" if own else ""), own


def stretches(program: Program, linears: Sequence[Mapping[str, Any]]) -> list[Stretch]:
    """The modules of a program, stretch by stretch, like decoder layers folded into the first of them."""
    rows = {row["linear"]: row for row in linears}
    result: list[Stretch] = []
    places: dict[int | None, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            layer = node.meta.get(LAYER)
            # What stands behind the decoder layers is a stretch of its own.
            behind = layer is None and any(key is not None and key >= 0 for key in places)
            places.setdefault(-1 if behind else layer, []).append(node)
    for layer, nodes in places.items():
        number = layer if layer is not None and layer >= 0 else None
        parts = _parts(nodes, number, rows)
        alike = next((i for i, s in enumerate(result) if s.layers and s.parts == parts), None)
        if number is None or alike is None:
            result.append(Stretch(() if number is None else (number,), parts))
        else:
            result[alike] = replace(result[alike], layers=(*result[alike].layers, number))
    return result


def _parts(nodes: Iterable[fx.Node], layer: int | None, rows: Mapping[str, Mapping[str, Any]]) -> tuple[Part, ...]:
    by_module: dict[str, list[fx.Node]] = {}
    for node in nodes:
        by_module.setdefault(dump.module_path(node), []).append(node)
    parts = (_part(path, own, layer, rows) for path, own in by_module.items())
    return tuple(part for part in parts if part.operators)


def _part(path: str, nodes: Sequence[fx.Node], layer: int | None, rows: Mapping[str, Mapping[str, Any]]) -> Part:
    called = [text for node in nodes if (text := dump.target_text(node)) not in _UNTOLD]
    called.sort(key=lambda text: not text.startswith("lbllm."))
    operators = tuple(dict.fromkeys(re.sub(r"^(?:aten|lbllm)\.|(?<=\w)\.\w+$", "", text) for text in called))
    own = [rows[info.path] for node in nodes if (info := node.meta.get(LINEAR)) and info.path in rows]
    name = own[0]["linear"] if len(own) == 1 else path
    facts = tuple((key, own[0][key]) for key in ("in", "out", "weights", "input", "scheme")) if len(own) == 1 else ()
    return Part(_within(name, layer) or "(the model itself)", len(nodes), operators, facts)


def _within(path: str, layer: int | None) -> str:
    """A module's path from its decoder layer on."""
    if layer is None:
        return path
    match = re.fullmatch(rf"(?:.*?\.)??{layer}(?:\.(.*))?", path)
    return (match[1] or "(the layer itself)") if match else path
