"""What a report tells, gathered from an artifact's files alone, so that it can be told wherever the artifact is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lbllm_compile import artifact
from lbllm_compile.codegen.cache import known_sha256
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.explain import kernels_of
from lbllm_compile.html_report import weights
from lbllm_compile.html_report.weights import WeightStatistics
from lbllm_compile.inspect import linear_rows, read_graph, stored_passes
from lbllm_compile.lowering.executor import linear_spec
from lbllm_compile.manifest import check_files
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.annotations import LINEAR
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import INTEGER_LINEARS, is_call
from lbllm_compile.passes.lower import readers
from lbllm_compile.records import CompileReport, MeasuredPass
from lbllm_compile.report import graph

_lbllm = torch.ops.lbllm

_STEP = re.compile(r"layers?\.\d+\.|h\.\d+\.|blocks?\.\d+\.")


@dataclass(frozen=True)
class Kernel:
    """What a linear of the graph that runs is computed by.

    Attributes:
        linear: module path; those of merged linears joined by ``+``.
        layer: decoder layer, or None outside of them.
        spec: what its kernel computes; None where it stays float.
        schedules: one row a token bucket and target, see :func:`lbllm_compile.explain.kernels_of`.
    """

    linear: str
    layer: int | None
    spec: LinearSpec | None
    schedules: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StoredGraph:
    """A graph of the artifact: after the pass ``name``, or the one that runs; changes marked against the one before."""

    name: str
    nodes: int
    blocks: Sequence[graph.Block]


@dataclass(frozen=True)
class Contents:
    """All that a report is made from.

    Attributes:
        directory, digest: the artifact, and its manifest's SHA-256.
        program: contents of ``program.json``.
        config: the model's configuration.
        lock: contents of ``lbllm.lock``.
        files: bytes of each file, by name.
        tensors: bytes of the stored weights, by path.
        parts: see :func:`parts_of`.
        report: what the compile took and gave, where that is known.
        measured: what the passes measured.
        linears: rows of :func:`lbllm_compile.inspect.linear_rows` of the graph that runs.
        kernels: one for each of them.
        weights: statistics of the W(1+1) matrices.
        clips: see :func:`.weights.clip_factors`.
        graphs: after every pass.
    """

    directory: Path
    digest: str
    program: Mapping[str, Any]
    config: Mapping[str, Any]
    lock: Mapping[str, Any]
    files: Mapping[str, int]
    tensors: Mapping[str, int]
    parts: Mapping[str, str]
    report: CompileReport | None
    measured: Sequence[MeasuredPass]
    linears: Sequence[Mapping[str, Any]]
    kernels: Sequence[Kernel]
    weights: Sequence[WeightStatistics]
    clips: Mapping[str, tuple[float, float]]
    graphs: Sequence[StoredGraph]


def gather(directory: Path, progress: Progress | None = None) -> Contents:
    """Reads and checks an artifact.

    Args:
        directory: an artifact.
        progress: told about each graph.

    Raises:
        ArtifactError: it is truncated, altered, foreign or of another version.
        InspectError: a graph of it is damaged.
    """
    listed, digest = check_files(directory, known_sha256)
    shards = [name for name in listed if name.endswith(".safetensors")]
    shapes = _Shapes(directory, shards)
    report, measured = artifact.read_report(directory), artifact.measured_passes(directory)
    program = Program(graph_json.loads(artifact.read_file(directory, "graph.json"), shapes))
    matrices = [row for item in measured if item.name == "ptq" for row in item.rows]
    return Contents(
        directory=directory,
        digest=digest,
        program=artifact.read_object(directory, "program.json"),
        config=artifact.read_object(directory, "config.json"),
        lock=artifact.read_lock(directory),
        files={name: entry["bytes"] for name, entry in listed.items()},
        tensors=shapes.sizes(),
        parts=parts_of(program),
        report=report,
        measured=measured,
        linears=linear_rows(program),
        kernels=_kernels(program, artifact.read_records(directory), report.kernels if report else ()),
        weights=weights.statistics(directory, shards, matrices),
        clips=weights.clip_factors(directory, shards),
        graphs=_graphs(directory, progress or NoProgress()),
    )


_PARTS = {"sign": "sign planes", "bitmap": "bitmaps", "levels": "levels", "scale": "group scales"}
"""What the arguments of W(1+1) linears hold."""

_TABLES = {
    _lbllm.int8_embedding.default: ("int8", "embedding"),
    _lbllm.int8_linear.default: ("int8", "head"),
    _lbllm.int4_embedding.default: ("4-bit", "embedding"),
    _lbllm.int4_linear.default: ("4-bit", "head"),
    _lbllm.bit_linear.default: ("W(1+1)", "head"),
}
"""Operators that read the embedding or the head: in what form, and which of the two."""


def parts_of(program: Program) -> dict[str, str]:
    """What each quantized tensor of a lowered program is a part of, by its path, e.g. ``"sign planes"`` or ``"int8
    embedding"``; the parts in the order of a report."""
    planes: dict[str, str] = {}
    codes: dict[str, str] = {}
    outliers: dict[str, str] = {}
    tables: dict[str, str] = {}
    orders: dict[str, str] = {}
    users: dict[str, set[str]] = {}
    for path, read in readers(program).items():
        for node, name in read:
            role = node.meta[LINEAR].role if LINEAR in node.meta else ""
            if is_call(node, _lbllm.bit_linear.default, _lbllm.grouped_bit_linear.default) and role != "head":
                planes[path] = _PARTS[name]
            elif role == "outliers":
                outliers[path] = "int8 outlier columns"
            elif is_call(node, _lbllm.int4_linear.default) and role == "decoder":
                codes[path] = "4-bit codes" if name == "codes" else "scales and levels of codes"
            elif is_call(node, *_TABLES):
                form, user = _TABLES[node.target]
                tables[path] = form
                users.setdefault(form, set()).add(user)
            elif name == "index":
                orders[path] = "orders of inputs with outliers"
    named = {path: f"{form} {' and '.join(sorted(users[form]))}" for path, form in tables.items()}
    return {**planes, **codes, **outliers, **named, **orders}


def short_name(path: str) -> str:
    """A linear's name within its decoder layer: ``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    return _STEP.split(path)[-1]


def _kernels(
    program: Program, records: Sequence[Mapping[str, Any]], times: Sequence[Mapping[str, Any]]
) -> list[Kernel]:
    kernels = []
    for node in program.graph.nodes:
        if LINEAR not in node.meta or not node.all_input_nodes:
            continue
        spec = linear_spec(program, node) if node.target in INTEGER_LINEARS else None
        info = node.meta[LINEAR]
        kernels.append(Kernel(info.path, info.layer, spec, kernels_of(records, times, spec)))
    return kernels


def _graphs(directory: Path, progress: Progress) -> list[StoredGraph]:
    before: Program | None = None
    passes, graphs = stored_passes(directory), []
    with progress.task("reading the graphs of the passes", len(passes)) as task:
        for stored in passes:
            after = read_graph(directory, stored.file)
            graphs.append(StoredGraph(stored.name, len(after.graph.nodes), graph.blocks(after, before)))
            before = after
            task.advance(stored.name)
    return graphs


class _Shapes(Mapping[str, Tensor]):
    """The weights of an artifact as tensors without values."""

    def __init__(self, directory: Path, shards: Sequence[str]):
        self._tensors: dict[str, Tensor] = {}
        for name in shards:
            with safe_open(str(directory / name), framework="pt") as file:
                for path in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(path)
                    self._tensors[path] = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")

    def sizes(self) -> dict[str, int]:
        return {path: t.numel() * t.element_size() for path, t in self._tensors.items()}

    def __getitem__(self, path: str) -> Tensor:
        return self._tensors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the names that safetensors has for them."""
