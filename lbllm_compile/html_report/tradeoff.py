"""Artifacts held against each other: how small, how fast and how close to its original each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbllm_compile import artifact
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.html_report import page
from lbllm_compile.records import NOT_MEASURED


class TradeoffError(LbllmError):
    """An artifact cannot be held against others."""


@dataclass(frozen=True)
class Candidate:
    """One artifact.

    Attributes:
        name: of its directory, with as many of the folders above it as tell it from the others.
        directory: where it is.
        figures: its speed and size sheet.
        lock: what made it.
        machine: what it was measured on.
        error: distance from its original.
        beaten_by: names of artifacts that are no larger, no slower and no farther from theirs, and better in one of it.
    """

    name: str
    directory: Path
    figures: dict[str, Any]
    lock: dict[str, Any]
    machine: str
    error: float
    beaten_by: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.figures["bytes_compiled"]

    @property
    def speed(self) -> float | None:
        return self.figures.get("decode_compiled")


@dataclass(frozen=True)
class Tradeoff:
    """Artifacts to choose from, and what keeps their figures from being compared, in sentences."""

    candidates: Sequence[Candidate]
    measure: str
    warnings: Sequence[str]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"name": c.name, "bytes": c.bytes, "speed": c.speed, "error": c.error, "measure": self.measure}
            for c in self.candidates
        ]


MEASURES = {"kld_mean": "mean KL divergence from the original", "relative_error": "relative error of the output"}
"""Distances that sheets have, by their names there."""


def compare(directories: Sequence[Path]) -> Tradeoff:
    """Reads what the compiles of artifacts measured.

    Raises:
        ArtifactError: one is no artifact, or its report is damaged.
        TradeoffError: one has no report of its compile, or they measured different things.
    """
    reports = {}
    for directory in directories:
        report = artifact.read_report(directory)
        if report is None:
            raise TradeoffError(f"'{directory}' has no {artifact.REPORT} of its compile; compile the model again")
        if NOT_MEASURED in report.sheet:
            raise TradeoffError(
                f"'{directory}' was compiled with --no-sheet, so it has no figures to compare; compile it without"
            )
        reports[directory] = report
    key = next((k for k in MEASURES if all(r.sheet.get(k) is not None for r in reports.values())), None)
    if key is None:
        raise TradeoffError("the artifacts were not measured alike: language models only compare with language models")
    names = _names(list(reports))
    found = [
        Candidate(
            name=names[directory],
            directory=directory,
            figures=dict(report.sheet),
            lock=artifact.read_lock(directory),
            machine=report.machine.get("CPU", "unknown"),
            error=float(report.sheet[key]),
        )
        for directory, report in reports.items()
    ]
    ranked = [_ranked(candidate, found) for candidate in found]
    return Tradeoff(ranked, MEASURES[key], _warnings(ranked))


def render(tradeoff: Tradeoff) -> str:
    """The page about several artifacts."""
    return page.fill("tradeoff.html.j2", {"tradeoff": tradeoff.to_json()}, tradeoff=tradeoff)


def _ranked(candidate: Candidate, others: Sequence[Candidate]) -> Candidate:
    def goals(item: Candidate) -> tuple[float, float, float]:
        return item.bytes, -(item.speed or 0.0), item.error

    own = goals(candidate)
    better = [
        other.name
        for other in others
        if all(a <= b for a, b in zip(goals(other), own, strict=True)) and goals(other) != own
    ]
    return Candidate(**{**vars(candidate), "beaten_by": tuple(better)})


def _warnings(found: Sequence[Candidate]) -> list[str]:
    warnings = []
    if len({c.figures.get("text") for c in found}) > 1:
        warnings.append("The artifacts were scored on different texts, so their errors cannot be compared strictly.")
    if len({c.machine for c in found}) > 1:
        warnings.append("The artifacts were measured on different machines, so their speeds cannot be compared.")
    if len({c.figures.get("bytes_original") for c in found}) > 1:
        warnings.append("The artifacts come from different originals; each error is against its own.")
    return warnings


def _names(directories: Sequence[Path]) -> dict[Path, str]:
    """Shortest ends of paths that tell directories apart."""
    whole = {directory: directory.resolve().parts for directory in directories}
    for count in range(1, max(len(parts) for parts in whole.values())):
        names = {directory: "/".join(parts[-count:]) for directory, parts in whole.items()}
        if len(set(names.values())) == len(names):
            return names
    return {directory: str(directory) for directory in directories}
