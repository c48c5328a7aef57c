"""What a compile tells when it is done: the passes, what they measured layer by layer, and the speed and size sheet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lbllm_compile.passes.pipeline import PassRecord
from lbllm_compile.records import NOT_MEASURED, CompileReport, MeasuredPass, Verdict
from lbllm_compile.report import terminal

if TYPE_CHECKING:
    from lbllm_compile.preflight import Rehearsal


def compile_report(report: CompileReport, *, times: bool = False) -> list[RenderableType]:
    """The end of a compile for people."""
    parts: list[RenderableType] = [terminal.pass_table(report.records, times=times)]
    parts += [part for table in budget_tables(report.records) for part in (Text(), table)]
    for table in layer_tables(report.records):
        parts += [Text(), table]
    if report.verdicts:
        parts += [Text(), verdict_table(report.verdicts)]
    if report.fallback:
        parts += [Text(), fallback_table(report.fallback)]
    if times:
        phases = [[phase, terminal.duration(seconds)] for phase, seconds in report.seconds.items()]
        phases.append(["in all", terminal.duration(sum(report.seconds.values()))])
        phases.append(["peak memory", terminal.size(report.peak_memory)])
        parts += [Text(), terminal.table("Time and memory", ["phase", ""], phases)]
    if report.resumed:
        parts += [Text(), Text(f"Taken over from an interrupted compile: {report.resumed} finished pieces of work.")]
    return [*parts, Text(), sheet(report.sheet)]


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """Whether the stages that trained did their part."""
    rows = [[v.stage, "ok" if v.passed else "NOT MET", v.text] for v in verdicts]
    return terminal.table("What training achieved", ["", "", ""], rows)


def fallback_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Which linears stay float because their kernels are slower (:func:`lbllm_compile.fallback.applied`)."""
    cells = [
        [
            ", ".join(row["linears"]),
            row["shape"],
            row["microseconds"],
            row["dense_microseconds"],
            "SLOWER: stays float" if row["slower"] else "quantized",
        ]
        for row in rows
    ]
    columns = ["linear", "shape", "quantized, µs a token", "float, µs a token", ""]
    return terminal.table("Quantized or float, the faster (--fallback dense)", columns, cells)


def budget_tables(passes: Iterable[PassRecord | MeasuredPass]) -> list[Table]:
    """What every ``budget`` came to: bits per weight of the decoder layers' linears, and divergence behind stage 1."""
    titles = {"bits": "bits per weight", "predicted": "divergence, predicted", "measured": "divergence, measured"}
    tables = []
    for item in passes:
        if item.name == "budget":
            rows = [[title, item.summary[name]] for name, title in titles.items() if name in item.summary]
            tables += [terminal.table(f"What {item.text} chose", ["", ""], rows)] if rows else []
    return tables


def layer_tables(passes: Iterable[PassRecord | MeasuredPass], layer: int | None = None) -> list[Table]:
    """What the calibrating passes measured, by decoder layer: errors of layers or linears, flip rates of planes.

    Args:
        layer: of this layer alone.
    """
    calibrating = [item for item in passes if item.contract == "calibrating"]
    found = [(i.text, [r for r in by_layer(i.rows) if layer in (None, r["layer"])]) for i in calibrating]
    return [terminal.rows_table(f"{text}, by decoder layer", rows) for text, rows in found if rows]


def by_layer(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a decoder layer from rows per linear or per layer: figures averaged, ``before`` in front of ``after``.

    Rows that name no layer, and what is no figure, are left out; times go with ``--time-passes``, not here.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("layer") is not None:
            groups.setdefault(row["layer"], []).append(row)
    result = []
    for layer, group in sorted(groups.items()):
        names = [k for k in group[0] if k not in ("layer", "seconds") and all(_is_figure(r.get(k)) for r in group)]
        names.sort(key=lambda name: {"before": 0, "after": 1}.get(name, 2))
        means = {name: sum(row[name] for row in group) / len(group) for name in names}
        result.append({"layer": layer, **means})
    return result


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sheet(figures: Mapping[str, Any]) -> Table:
    """The speed and size sheet of :func:`lbllm_compile.sheet.measure`: before, after, and what to know about it."""
    rest = dict(figures)

    def take(name: str) -> Any:
        return rest.pop(name, None)

    rows: list[Sequence[Any]] = []
    before, after = take("bytes_original"), take("bytes_compiled")
    if before and after:
        note = f"{before / after:.1f} times smaller; the original in 16 bit"
        rows.append(["weights", terminal.size(before), terminal.size(after), note])
    if decoder := take("bytes_decoder"):
        rows.append(["", "", terminal.size(decoder), "of them decoder linears"])
    scopes = (("bits_per_weight", "decoder linears, as stored"), ("bits_per_weight_file", "all weights, as stored"))
    bits = [(figure, scope) for name, scope in scopes if (figure := take(name)) is not None]
    rows += [["" if i else "bits per weight", "", _text(figure), scope] for i, (figure, scope) in enumerate(bits)]
    text = take("text")
    if "ppl" in rest:
        rows.append(["perplexity", _text(take("ppl_teacher")), _text(take("ppl")), f"{text}"])
        rows.append(["KL divergence", "", _text(take("kld_mean")), "mean, compiled from original"])
        agreement = take("top1_agreement")
        rows.append(["same top token", "", "" if agreement is None else f"{100 * agreement:.1f} %", ""])
    if "relative_error" in rest:
        rows.append(["relative error", "", _text(take("relative_error")), "of the output, on held-out inputs"])
    before, after = take("decode_original"), take("decode_compiled")
    if before and after:
        faster = after / before
        verdict = f"{faster:.2f} times as fast" if faster >= 1 else f"SLOWER: {faster:.2f} times as fast"
        rows.append(["tokens/s", _text(before), _text(after), f"{verdict}; greedy decoding, original in eager torch"])
    if left_out := take(NOT_MEASURED):
        rows.append([f"{left_out}", "", "not measured", "as --no-sheet asked"])
    rows += [[name.replace("_", " "), "", _text(value), ""] for name, value in rest.items()]
    return terminal.table("Speed and size", ["", "original", "compiled", ""], rows)


def _text(value: Any) -> str:
    return "" if value is None else terminal.figure(value)


def rehearsal(result: Rehearsal) -> list[RenderableType]:
    """What a preflight found."""
    rows = [[step.name, terminal.duration(step.seconds)] for step in result.steps]
    verdict = (
        f"One of {result.layers} decoder layers went through every pass and its kernels."
        if result.complete
        else "No decoder layer can be cut out of this model; the passes up to annotate went through."
    )
    return [terminal.table("Preflight", ["step", "time"], rows), Text(verdict)]


def pass_line(record: PassRecord) -> str:
    """One line a finished pass, e.g. ``pass 4 ptq: 48.2 s, 2354 -> 2384 nodes, calibrating, change 0.31``."""
    error = "bit-equal" if record.error == 0 else f"change {terminal.figure(record.error)}"
    return (
        f"pass {record.index} {record.text}: {terminal.duration(record.seconds + record.check_seconds)},"
        f" {record.nodes_before} -> {record.nodes_after} nodes, {record.contract}, {error}"
    )
