"""Looks into an artifact: its graph after any pass, what that pass changed, and a table of its linears.

Only the stored graphs are read (and checked against the manifest), not the weights, so this is quick and works for
artifacts of any target.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, fx

from lbllm_compile import artifact
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.operators import Arguments, first_argument
from lbllm_compile.passes.ir import dump, graph_json
from lbllm_compile.passes.ir.annotations import LINEAR
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import activation_knees
from lbllm_compile.passes.registry import suggestion
from lbllm_compile.report import graph, summary, terminal

_FILE = re.compile(r"passes/(\d{3})_([a-z0-9-]+)\.json")
_DIMENSION = re.compile(r"[\w*+]+(?=\]$)")


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
        return Program(graph_json.loads(content, _NoWeights()), name=Path(file).stem)
    except graph_json.GraphFormatError as error:
        raise InspectError(f"'{directory / file}' is damaged: {error}") from error


def look(
    directory: Path, name: str | None = None, layer: int | None = None
) -> tuple[list[RenderableType], dict[str, Any]]:
    """What ``lbllm-compile inspect`` shows: a graph, its linears, and what the passes (or the one named) measured.

    Args:
        directory: an artifact.
        name: show the graph after this pass, changes marked; None shows the graph that runs.
        layer: show this decoder layer alone.

    Returns:
        The view for people, and the same as a JSON-able document.

    Raises:
        ArtifactError: no artifact, or a damaged one.
        InspectError: no such pass, no such layer.
    """
    passes = stored_passes(directory)
    measured = [item for item in artifact.measured_passes(directory) if name in (None, item.name)]
    before: Program | None = None
    if name is None:
        after, title = read_graph(directory, "graph.json"), "The graph that runs"
    else:
        position = next((i for i, p in enumerate(passes) if p.name == name), None)
        if position is None:
            known = [p.name for p in passes]
            raise InspectError(
                f"'{directory}' has no graph of a pass '{name}'{suggestion(name, known)}; it has {', '.join(known)}"
            )
        after, title = read_graph(directory, passes[position].file), f"After {name}"
        before = read_graph(directory, passes[position - 1].file) if position else None
    try:
        view = graph.view(after, before, title=f"{title}: {graph.summary(after, before)}", layer=layer)
    except ValueError as error:
        raise InspectError(f"{error} in '{directory}'") from error
    rows = [row for row in linear_rows(after) if layer is None or row["layer"] == layer]
    document = {
        "directory": str(directory),
        "passes": [p.name for p in passes],
        "pass": name,
        "nodes": len(after.graph.nodes),
        "linears": rows,
        "measured": [dataclasses.asdict(item) for item in measured],
        "graph": [
            {"layers": list(b.layers), "lines": [{"sign": m.sign, "text": m.text} for m in b.marks]}
            for b in graph.blocks(after, before, layer=layer)
        ],
    }
    parts: list[RenderableType] = [view, Text(), terminal.rows_table("Linears", rows)]
    report = artifact.read_report(directory)
    if report is None or name is not None or layer is not None:
        for table in summary.layer_tables(measured, layer):
            parts += [Text(), table]
        return parts, document
    parts += [Text(), *summary.compile_report(report, times=True)]
    return parts, {**document, "report": report.to_json()}


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
    operators = {dump.target_text(n): n for n in node.all_input_nodes}
    if "lbllm.unpack_weight" in operators:
        return f"W(1+1) g{Arguments(operators['lbllm.unpack_weight']).group}, simulated"
    return "int8 per row, simulated" if "lbllm.unpack_rows" in operators else "float"


def _input_text(node: fx.Node) -> str:
    """How the input of a linear is represented: ``A4 per token and 64`` and the like."""
    source = next(iter(node.all_input_nodes), node) if dump.target_text(node).endswith("getitem") else node
    if dump.target_text(source) not in ("lbllm.fake_quantize", "lbllm.quantize_activation"):
        return "float"
    bits, group = Arguments(source).pick("bits", "group")
    knees = ", knees" if activation_knees(source) else ""
    return f"A{bits} per token" + (f" and {group}" if group else "") + knees
