"""Looks into an artifact: its graph after any pass, what that pass changed, and a table of its linears.

Only the stored graphs are read (and checked against the manifest), not the weights, so this is quick and works for
artifacts of any target.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, fx

from lbllm_compile import artifact
from lbllm_compile.codegen.errors import LbllmError, suggestion
from lbllm_compile.codegen.operators import Arguments, first_argument
from lbllm_compile.passes.ir import dump, graph_json
from lbllm_compile.passes.ir.annotations import LINEAR
from lbllm_compile.passes.ir.program import Program, set_attribute
from lbllm_compile.passes.ir.scheme import codebook_of
from lbllm_compile.report import graph, network, overview, summary, terminal

FORMATS = ("txt", "json", "dot")
"""What a graph can be written as: the text of :mod:`.passes.ir.dump`, networkx' node-link JSON, Graphviz."""

_FILE = re.compile(r"passes/(\d{3})_([a-z0-9-]+)\.json")
_DIMENSION = re.compile(r"[\w*+-]+(?=\]$)")


class InspectError(LbllmError):
    """There is nothing of that name to look at."""


@dataclass(frozen=True)
class StoredPass:
    """One ``passes/NNN_name.json`` of an artifact, by its place in it."""

    index: int
    name: str
    file: str


class _NoWeights(Mapping[str, Tensor]):
    """Stands for the weights of a graph that is only looked at: whatever is asked for is there, and empty."""

    def __getitem__(self, key: str) -> Tensor:
        return torch.empty(0, device="meta")

    def __contains__(self, key: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def stored_passes(directory: Path) -> list[StoredPass]:
    """The graphs of an artifact, in pipeline order.

    Raises:
        ArtifactError: the directory is no artifact.
    """
    matches = [m for name in sorted(artifact.listed_files(directory)) if (m := _FILE.fullmatch(name))]
    return [StoredPass(int(m.group(1)), m.group(2), m.group()) for m in matches]


def read_graph(directory: Path, file: str) -> Program:
    """A stored graph without its weights.

    Raises:
        ArtifactError: the file is missing, truncated or altered.
        InspectError: it uses what a stored graph may not use.
    """
    content = artifact.read_file(directory, file)
    try:
        module = graph_json.loads(content, _NoWeights())
    except graph_json.GraphFormatError as error:
        raise InspectError(f"'{directory / file}' is damaged: {error}") from error
    for node in module.graph.nodes:
        if node.op == "get_attr" and (known := dump.read_shape(node.meta.get("shape", ""))):
            dtype, sizes = known
            value = torch.empty([size for size in sizes if isinstance(size, int)], dtype=dtype, device="meta")
            set_attribute(module, str(node.target), value)
    return Program(module, name=Path(file).stem)


@dataclass(frozen=True)
class Shown:
    """A graph of an artifact, and the one that changes are marked against.

    Attributes:
        title: what it is.
        passes: the passes whose work it shows.
    """

    title: str
    after: Program
    before: Program | None
    passes: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, name: str | None = None, diff: tuple[str, str] | None = None) -> Shown:
        """The graph after a pass, against the one before it; with ``diff`` that after the second of two passes,
        against that after the first; with neither the graph that runs.

        Raises:
            ArtifactError: no artifact, or a damaged one.
            InspectError: no such pass.
        """
        passes = stored_passes(directory)
        names = tuple(p.name for p in passes)
        if diff is not None:
            first, last = (_position(directory, names, item) for item in diff)
            before, after = (read_graph(directory, passes[i].file) for i in (first, last))
            return cls(f"From {names[first]} to {names[last]}", after, before, names[first + 1 : last + 1])
        if name is None:
            return cls("The graph that runs", read_graph(directory, "graph.json"), None, names)
        position = _position(directory, names, name)
        before = read_graph(directory, passes[position - 1].file) if position else None
        return cls(f"After {names[position]}", read_graph(directory, passes[position].file), before, (names[position],))


def _position(directory: Path, names: Sequence[str], name: str) -> int:
    """Where a pass stands among those of an artifact, by its name or its number from 1."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and 1 <= int(name) <= len(names):
        return int(name) - 1
    raise InspectError(
        f"'{directory}' has no graph of a pass '{name}'{suggestion(name, names)}; it has {', '.join(names)}"
    )


def look(
    directory: Path,
    name: str | None = None,
    layer: int | None = None,
    *,
    diff: tuple[str, str] | None = None,
    grep: str | None = None,
) -> tuple[list[RenderableType], dict[str, Any]]:
    """What ``lbllm-compile inspect`` shows: a page on the artifact; or, once anything is asked for, a graph, its
    linears, and what the passes it shows measured.

    Args:
        directory: an artifact.
        name: show the graph after this pass, changes marked; None shows the graph that runs.
        layer: show this decoder layer alone.
        diff: show what changed from the graph after the first of these passes to that after the second.
        grep: show the nodes alone whose line this regular expression finds.

    Returns:
        The view for people, and the same as a JSON-able document.

    Raises:
        ArtifactError: no artifact, or a damaged one.
        InspectError: no such pass, no such layer, or no regular expression.
    """
    pattern = _pattern(grep)
    shown = Shown.of(directory, name, diff)
    measured = [item for item in artifact.measured_passes(directory) if item.name in shown.passes]
    rows = [row for row in linear_rows(shown.after) if layer is None or row["layer"] == layer]
    report = artifact.read_report(directory)
    document = {
        "directory": str(directory),
        "passes": [p.name for p in stored_passes(directory)],
        "pass": name,
        "diff": diff,
        "nodes": len(shown.after.graph.nodes),
        "linears": rows,
        "measured": [dataclasses.asdict(item) for item in measured],
    }
    if all(value is None for value in (name, layer, diff, pattern)):
        named = dataclasses.replace(shown.after, name=directory.resolve().name)
        parts = overview.page(named, rows, shown.passes, measured, report)
        return parts, document if report is None else {**document, "report": report.to_json()}
    blocks = _blocks(directory, shown, layer)
    blocks = graph.changes(blocks) if diff is not None else blocks
    blocks = graph.matching(blocks, pattern) if pattern else blocks
    whole = pattern is None and diff is None
    parts = [graph.render(blocks, f"{shown.title}: {graph.summary(shown.after, shown.before)}", whole=whole)]
    if whole:
        for table in [terminal.rows_table("Linears", rows), *summary.layer_tables(measured, layer)]:
            parts += [Text(), table]
    lines = [{"layers": list(b.layers), "lines": [{"sign": m.sign, "text": m.text} for m in b.marks]} for b in blocks]
    return parts, {**document, "graph": lines}


def written(directory: Path, form: str, name: str | None = None, layer: int | None = None) -> str:
    """A graph of an artifact as text for other programs.

    Args:
        directory: an artifact.
        form: one of :data:`FORMATS`.
        name: the graph after this pass; None is the graph that runs.
        layer: this decoder layer alone.

    Raises:
        ArtifactError: no artifact, or a damaged one.
        InspectError: no such form, pass or layer.
    """
    if form not in FORMATS:
        raise InspectError(f"--format cannot be '{form}'{suggestion(form, FORMATS)}; choose {', '.join(FORMATS)}")
    shown = Shown.of(directory, name)
    _blocks(directory, shown, layer)
    if form == "txt":
        return dump.render(shown.after, f"{shown.title.lower()}, of {directory.name}", layer=layer)
    nodes = network.graph_of(shown.after, layer)
    return network.to_json(nodes) if form == "json" else network.to_dot(nodes)


def _blocks(directory: Path, shown: Shown, layer: int | None) -> list[graph.Block]:
    try:
        return graph.blocks(shown.after, shown.before, layer=layer)
    except ValueError as error:
        raise InspectError(f"{error} in '{directory}'") from error


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise InspectError(f"--grep cannot be '{text}': it is no regular expression ({error})") from error


def linear_rows(program: Program) -> list[dict[str, Any]]:
    """One row a linear of an annotated graph: what it is and how it is computed in this graph."""
    rows = []
    for node in program.graph.nodes:
        if LINEAR not in node.meta or not node.all_input_nodes:
            continue
        info = node.meta[LINEAR]
        rows.append(
            {
                "linear": info.path,
                "layer": info.layer,
                "role": info.role,
                "in": _last_dimension(first_argument(node)),
                "out": _last_dimension(node),
                "operator": dump.target_text(node),
                "weights": _weights_text(node),
                "input": _input_text(first_argument(node)),
                "scheme": str(info.scheme),
                "why": info.reason,
            }
        )
    return rows


def _last_dimension(node: fx.Node) -> int | str | None:
    match = _DIMENSION.search(node.meta.get("shape", ""))
    if match is None:
        return None
    return int(match.group()) if match.group().isdigit() else match.group()


def _weights_text(node: fx.Node) -> str:
    names = {"lbllm.bit_linear", "lbllm.grouped_bit_linear"}
    if dump.target_text(node) in names:
        return f"W(1+1) g{Arguments(node).group}"
    if dump.target_text(node) == "lbllm.int8_linear":
        return "int8 per row"
    if dump.target_text(node) == "lbllm.int4_linear":
        return f"int4 g{Arguments(node).group}"
    operators = {dump.target_text(n): n for n in node.all_input_nodes}
    if "lbllm.unpack_weight" in operators:
        return f"W(1+1) g{Arguments(operators['lbllm.unpack_weight']).group}, simulated"
    if "lbllm.unpack_int4" in operators:
        return f"int4 g{Arguments(operators['lbllm.unpack_int4']).group}, simulated"
    return "int8 per row, simulated" if "lbllm.unpack_rows" in operators else "float"


def _input_text(node: fx.Node) -> str:
    """How the input of a linear is represented: ``A4 per token and 64`` and the like."""
    source = next(iter(node.all_input_nodes), node) if dump.target_text(node).endswith("getitem") else node
    if dump.target_text(source) not in ("lbllm.fake_quantize", "lbllm.quantize_activation"):
        return "float"
    bits, group = Arguments(source).pick("bits", "group")
    codebook = codebook_of(source)
    table = "" if codebook == "none" else f", {codebook}"
    return f"A{bits} per token" + (f" and {group}" if group else "") + table
