"""What a compile tells when it is done: the passes, what they measured layer by layer, and the speed and size sheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lbllm_compile.passes.pipeline import PassRecord
from lbllm_compile.preflight import Rehearsal
from lbllm_compile.report import terminal


def compile_report(report: Any, *, times: bool = False) -> list[RenderableType]:
    """The end of a compile for people; ``report`` is a :class:`lbllm_compile.driver.CompileReport`."""
    parts: list[RenderableType] = [terminal.pass_table(report.records, times=times)]
    for record in report.records:
        if record.contract == "calibrating" and record.rows:
            parts += [Text(), terminal.rows_table(f"{record.text}, layer by layer", record.rows)]
    if times and report.seconds:
        rows = [[phase, terminal.duration(seconds)] for phase, seconds in report.seconds.items()]
        parts += [Text(), terminal.table("Time", ["phase", "time"], rows)]
    parts += [Text(), sheet(report.sheet)]
    if report.resumed:
        parts.append(Text(f"{report.resumed} finished pieces were taken over from an interrupted compile"))
    return parts


def sheet(figures: Mapping[str, Any]) -> RenderableType:
    """The speed and size sheet: one line a figure."""
    return terminal.table("Speed and size", ["", ""], [[k.replace("_", " "), v] for k, v in figures.items()])


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
