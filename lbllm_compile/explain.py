"""Explains one linear of an artifact: what the passes made of it, what that cost, and the kernel that computes it.

Everything comes from the artifact's files. Times and shares of the roofline are those that the search for schedules
measured, so they are there where a search on the compiling machine stands behind a schedule.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from safetensors import safe_open
from torch import fx

from lbllm_compile import artifact
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.cache import known_sha256
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.format import LEVELS, QuantizedWeight
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.codegen.spec import LinearSpec, complete
from lbllm_compile.codegen.targets import Target
from lbllm_compile.inspect import linear_rows, read_graph, stored_passes
from lbllm_compile.kernels import TIMES
from lbllm_compile.lowering.executor import linear_spec, quantizer_of
from lbllm_compile.manifest import check_file
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.annotations import LINEAR
from lbllm_compile.passes.ir.program import IN_FEATURES, Program
from lbllm_compile.passes.ir.rewrite import INTEGER_LINEARS
from lbllm_compile.records import MeasuredPass
from lbllm_compile.report import terminal

NEAR = 3
"""Names that a wrong one is answered with."""

SLOWER = 5
"""Candidates of a search that are shown behind the chosen one."""


class ExplainError(LbllmError):
    """The artifact has no such linear, or not what was asked of it."""


@dataclass(frozen=True)
class Explanation:
    """All that an artifact tells of a linear; every part is JSON-able.

    Attributes:
        facts: its path, decoder layer, shape, how it is computed and why.
        passes: what each pass that touched it made of it, and measured of it.
        weights: of its W(1+1) weights: shares of the four levels, density of the bitmap, sizes; empty for others.
        input: how its input is quantized: bits, clip factors, knees, range.
        kernels: one row a token bucket and target: schedule, times, roofline, candidates.
        texts: by kernel, generated text (TIR, assembly) that was asked for.
    """

    facts: Mapping[str, Any]
    passes: Sequence[Mapping[str, Any]]
    weights: Mapping[str, Any]
    input: Mapping[str, Any]
    kernels: Sequence[Mapping[str, Any]]
    texts: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def explain(directory: Path, linear: str, *, tir: bool = False, asm: bool = False) -> Explanation:
    """Explains a linear.

    Args:
        directory: an artifact.
        linear: its module path, or the end of one that only one linear has.
        tir: with its kernels as the artifact keeps them, in TVMScript.
        asm: with the assembly that its kernels compile to; for targets that this machine generates code for.

    Raises:
        ArtifactError: no artifact, or a damaged one.
        ExplainError: no such linear, or no kernel whose text was asked for.
    """
    program = read_graph(directory, "graph.json")
    nodes = {path: n for n in program.graph.nodes if LINEAR in n.meta for path in _paths(n.meta[LINEAR].path)}
    path = _found(directory, linear, list(nodes))
    node = nodes[path]
    report, measured = artifact.read_report(directory), artifact.measured_passes(directory)
    (row,) = [row for row in linear_rows(program) if row["linear"] == node.meta[LINEAR].path]
    tensors = _Tensors(directory)
    weight = node.meta[LINEAR].weight if row["linear"] == path else f"{path}.weight"
    spec = linear_spec(program, node) if node.target in INTEGER_LINEARS else None
    # Without the searches' results, as where the compile took schedules over, there are no times.
    times = report.kernels if report else ()
    kernels = kernels_of(artifact.read_records(directory), times, spec)
    texts = {}
    if tir or asm:
        if not kernels:
            raise ExplainError(
                f"'{path}' has no generated kernel in '{directory}': it is computed by {row['operator']}"
            )
        texts |= _tir(directory, kernels) if tir else {}
        texts |= _assembly(kernels) if asm else {}
    facts = {
        "linear": path,
        "layer": row["layer"],
        "shape": [tensors.rows(weight), row["in"]],
        "node": node.name,
        "merged": [other for other in _paths(row["linear"]) if other != path],
        **{key: row[key] for key in ("role", "operator", "weights", "input", "scheme", "why")},
        "source": dump.source_line(node),
    }
    return Explanation(
        facts,
        _passes(directory, path, row["layer"], measured),
        _weights(tensors, path, node),
        _input(tensors, node, measured),
        kernels,
        texts,
    )


def _paths(path: str) -> list[str]:
    """The module paths in that of a linear, several where ``merge`` has made it of several."""
    first, *others = path.split("+")
    parent = first.rpartition(".")[0]
    return [first, *(f"{parent}.{name}" if parent else name for name in others)]


def _found(directory: Path, linear: str, known: Sequence[str]) -> str:
    if linear in known:
        return linear
    ends = [path for path in known if path.endswith(f".{linear}")]
    if len(ends) == 1:
        return ends[0]
    near = ends or difflib.get_close_matches(linear, known, n=NEAR, cutoff=0.5)
    if not near:  # of the same name in another layer, say
        near = [path for path in known if path.rpartition(".")[2] == linear.rpartition(".")[2]] or list(known)
    more = ", …" if len(near) > NEAR else ""
    which = "several linears" if ends else "no linear"
    raise ExplainError(f"'{directory}' has {which} '{linear}'; near it are {', '.join(near[:NEAR])}{more}")


class _Tensors:
    """The stored weights of an artifact, each file checked before something is read from it, and no other."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files = artifact.listed_files(directory)
        self._checked: set[str] = set()
        self._places = artifact.weight_files(directory)

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def read(self, path: str) -> Any:
        with self._opened(path) as shard:
            return shard.get_tensor(path)

    def rows(self, weight: str) -> int | None:
        """Output features of the linear of a weight."""
        for name in (f"{weight}.sign", f"{weight}.codes", f"{weight}.rows", weight):
            if name in self:
                with self._opened(name) as shard:
                    return shard.get_slice(name).get_shape()[-2]
        return None

    def _opened(self, path: str) -> Any:
        """The file that holds a weight.

        Raises:
            ArtifactError: it is another file than the artifact's.
        """
        name = self._places[path]
        if name not in self._checked:
            check_file(self._directory, name, self._files[name], known_sha256)
            self._checked.add(name)
        return safe_open(str(self._directory / name), framework="pt")


def _passes(directory: Path, path: str, layer: int | None, measured: Sequence[MeasuredPass]) -> list[dict[str, Any]]:
    """What every pass did to a linear: how it is computed from then on where that is new, and what was measured."""
    # A pipeline may name a pass twice; the graphs and the figures of both are in its order.
    figures: dict[str, list[MeasuredPass]] = {}
    for item in measured:
        figures.setdefault(item.name, []).append(item)
    rows: list[dict[str, Any]] = []
    before = ""
    for stored in stored_passes(directory):
        program = read_graph(directory, stored.file)
        now = _computed(program, path)
        told = _told(figures[stored.name].pop(0), path, layer) if figures.get(stored.name) else {}
        if now != before or told:
            rows.append({"pass": stored.name, "becomes": now if now != before else None, "measured": told})
        before = now
    return rows


def _computed(program: Program, path: str) -> str:
    """How a graph computes a linear, e.g. ``lbllm.bit_linear: W(1+1) g64 times A4 per token and 64``."""
    row = next((r for r in linear_rows(program) if path in _paths(r["linear"])), None)
    if row is None:
        node = next((n for n in program.graph.nodes if n.op == "get_attr" and n.target == f"{path}.weight"), None)
        return ", ".join(dump.target_text(user) for user in node.users) if node is not None else ""
    merged = "" if row["linear"] == path else f", as part of {row['linear'].rpartition('.')[2]}"
    return f"{row['operator']}: {row['weights']} weights, {row['input']} input{merged}"


def _told(item: MeasuredPass, path: str, layer: int | None) -> dict[str, Any]:
    """The figures of a pass that name a linear, and those of its decoder layer as a whole."""
    told: dict[str, Any] = {}
    for row in item.rows:
        own = row.get("linear") == path or path in row.get("linears", ()) or path == row.get("site")
        if own or (row.get("linear") is None and layer is not None and row.get("layer") == layer):
            prefix = "" if own else "layer_"
            told |= {f"{prefix}{k}": v for k, v in row.items() if _is_figure(v) and k != "layer"}
    return told


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _weights(tensors: _Tensors, path: str, node: fx.Node) -> dict[str, Any]:
    names = [f"{path}.weight.{field}" for field in WEIGHT]
    if not all(name in tensors for name in names):
        return {}
    info = Arguments(node)
    planes = [tensors.read(name) for name in names]
    weight = QuantizedWeight(*planes, in_features=node.meta[IN_FEATURES], group=info.group)
    codes = weight.codes()
    shares = [float((codes == code).float().mean()) for code in range(LEVELS)]
    values = weight.levels.float() * weight.scale.float().unsqueeze(-1)
    flat = values.flatten(0, -2)
    return {
        "elements": codes.numel(),
        "groups": flat.shape[0],
        "bits_per_weight": weight.stored_bits / codes.numel(),
        "bitmap_density": shares[1] + shares[2],
        "sign_density": shares[2] + shares[3],
        "levels": [
            {
                "level": code,
                "share": shares[code],
                "mean": float(flat[:, code].mean()),
                "lowest": float(flat[:, code].min()),
                "highest": float(flat[:, code].max()),
            }
            for code in range(LEVELS)
        ],
    }


def _input(tensors: _Tensors, node: fx.Node, measured: Sequence[MeasuredPass]) -> dict[str, Any]:
    """How the input is quantized: the factors that clip it, what shapes its codes, and its range before the clip."""
    if node.target not in INTEGER_LINEARS:
        return {}
    quantizer = Arguments(quantizer_of(node))
    told: dict[str, Any] = {"bits": quantizer.bits, "group": quantizer.group}
    for name, operand in (("clip", quantizer.clip), ("knees", quantizer.knees), ("planes", quantizer.plane_scales)):
        if isinstance(operand, fx.Node) and str(operand.target) in tensors:
            told[name] = [round(v, 4) for v in tensors.read(str(operand.target)).tolist()]
            if name == "clip":
                reader = str(operand.target).removesuffix(".input_clip")
                inputs = next(
                    (item.summary.get("input_ranges", {}) for item in measured if item.name == "activate"), {}
                )
                told |= {f"range_{k}": v for k, v in inputs.get(reader, {}).items() if k != "layer"}
    return told


def kernels_of(
    records: Sequence[Mapping[str, Any]], times: Sequence[Mapping[str, Any]], spec: LinearSpec | None
) -> list[dict[str, Any]]:
    """The schedules of a linear's kernels, with what a search measured of them.

    Args:
        records: the artifact's tuning records.
        times: what searches measured: ``spec``, ``tokens`` and ``target`` as there, :data:`TIMES`, and ``candidates``
            and ``discarded`` as :class:`lbllm_compile.codegen.tune.database.Result` has them.
        spec: what the linear computes; None where it stays float.
    """
    times = [row for row in times if spec and _is_of(row, spec)]
    kernels = []
    for record in (r for r in records if spec and _is_of(r, spec)):
        found = next((t for t in times if (t["tokens"], t["target"]) == (record["tokens"], record["target"])), {})
        times_of = {name: found.get(name) for name in TIMES}
        best, _, roofline = times_of.values()
        kernels.append(
            {
                **record,
                **times_of,
                "of_roofline": roofline / best if roofline and best else None,
                "candidates": found.get("candidates", []),
                "discarded": found.get("discarded", []),
            }
        )
    return kernels


def _is_of(record: Mapping[str, Any], spec: LinearSpec) -> bool:
    return complete(record["spec"]) == dataclasses.asdict(spec)


def _tir(directory: Path, kernels: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The text of the kernels as the artifact keeps it, by file."""
    spec = LinearSpec(**kernels[0]["spec"])
    scales = "t" if spec.per_token else "g?"
    name = rf"{spec.kind}_(?:[a-z]+_)?{spec.out_features}x{spec.in_features}_g{spec.group}_a{spec.act_bits}"
    wanted = re.compile(rf"kernels/{name}{scales}{spec.marks}(?:_[\w:]+)?\.(?:py|cu)")
    files = [file for file in artifact.listed_files(directory) if wanted.fullmatch(file)]
    if not files:
        raise ExplainError(f"'{directory}' keeps no text of the kernels of {spec}; compile the model again")
    return {file: artifact.read_file(directory, file).decode("utf-8") for file in sorted(files)}


def _assembly(kernels: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the kernels compile to, by target and number of tokens."""
    texts = {}
    for kernel in kernels:
        target = Target.parse(kernel["target"])
        shown = backend_of(target).assembly(LinearSpec(**kernel["spec"]), kernel["schedule"], target)
        texts[f"{target.name}, {kernel['tokens']} tokens"] = shown
    return texts


def render(found: Explanation) -> list[RenderableType]:
    """An explanation for people."""
    facts = found.facts
    shape = " x ".join(str(size) for size in facts["shape"] if size is not None)
    where = "outside the decoder layers" if facts["layer"] is None else f"decoder layer {facts['layer']}"
    rows = [
        ["is", f"{shape}, {where}; {facts['why']}"],
        ["comes from", facts["source"] or None],
        [
            "is computed by",
            f"{facts['operator']} at %{facts['node']}: {facts['weights']} weights, {facts['input']} input",
        ],
        ["together with", ", ".join(facts["merged"]) or None],
        ["scheme", facts["scheme"] or None],
    ]
    parts: list[RenderableType] = [
        terminal.table(str(facts["linear"]), ["", ""], [row for row in rows if row[1]]),
        Text(),
        terminal.table(
            "What the passes made of it",
            ["pass", "it becomes", "measured"],
            [[r["pass"], r["becomes"] or "", terminal.figure(_worded(r["measured"]))] for r in found.passes],
        ),
    ]
    if found.weights:
        parts += [Text(), *_weights_part(found.weights)]
    if found.input:
        rows = [[name.replace("_", " "), value] for name, value in found.input.items()]
        parts += [Text(), terminal.table("Its input", ["", ""], [[n, terminal.figure(v)] for n, v in rows])]
    if found.kernels:
        parts += [Text(), *_kernels_part(found.kernels)]
    for title, text in found.texts.items():
        parts += [Text(), Text(title, style="bold"), Text(text.rstrip("\n"), no_wrap=True, overflow="ignore")]
    return parts


def _worded(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in figures.items()}


def _weights_part(weights: Mapping[str, Any]) -> list[RenderableType]:
    title = (
        f"Its weights: {weights['elements']} in {weights['groups']} groups, {weights['bits_per_weight']:.3g} bits each;"
        f" {100 * weights['bitmap_density']:.1f} % of the bitmap and {100 * weights['sign_density']:.1f} % of the signs"
        " are set"
    )
    rows = [
        {
            "level": ("lowest", "inner, lower", "inner, upper", "highest")[level["level"]],
            "share": f"{100 * level['share']:.1f} %",
            "": "█" * round(40 * level["share"]),
            "mean": level["mean"],
            "from": level["lowest"],
            "to": level["highest"],
        }
        for level in weights["levels"]
    ]
    return [Text(title, style="bold"), terminal.rows_table("", rows)]


def _kernels_part(kernels: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    rows = []
    for kernel in kernels:
        share = kernel["of_roofline"]
        rows.append(
            {
                "target": kernel["target"],
                "tokens": kernel["tokens"],
                "us": kernel["microseconds"],
                "without a search us": kernel["default_microseconds"],
                "of roofline": None if share is None else f"{100 * share:.0f} %",
                "schedule": kernel["schedule"],
            }
        )
    parts: list[RenderableType] = [terminal.rows_table("Its kernels", rows)]
    for kernel in kernels:
        if kernel["candidates"]:
            parts += [Text(), *_candidates(kernel)]
    return parts


def _candidates(kernel: Mapping[str, Any]) -> list[RenderableType]:
    """The candidates of a search, the fastest first, with what they differ in from the chosen one."""
    chosen, tried, best = kernel["schedule"], kernel["candidates"], kernel["microseconds"]
    rows = []
    for candidate in tried[: SLOWER + 1]:
        other = {k: v for k, v in candidate["schedule"].items() if chosen.get(k) != v}
        is_chosen = candidate["schedule"] == chosen
        slower = candidate["microseconds"] / best - 1 if best else None
        why = "chosen" if is_chosen else f"{100 * slower:.0f} % slower" if slower is not None else None
        rows.append({"us": candidate["microseconds"], "": why, "differs in": other or None})
    left = f"the {SLOWER + 1} fastest" if len(tried) > SLOWER + 1 else ""
    plural = "" if kernel["tokens"] == "1" else "s"
    title = f"{left or len(tried)} candidates for {kernel['tokens']} token{plural} on {kernel['target']}"
    wrong = [Text(f"gave no time: {reason}") for reason in kernel["discarded"]]
    return [Text(title, style="bold"), terminal.rows_table("", rows), *wrong]
