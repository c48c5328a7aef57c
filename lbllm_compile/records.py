"""What a compile tells of itself: of every pass, of its stages, of the result, and what it took."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from lbllm_compile.codegen.targets import host
from lbllm_compile.codegen.threads import in_words, thread_count
from lbllm_compile.passes.pipeline import PassRecord

ORIGINAL_BYTES = 2
"""Bytes of one weight of an original model, whenever a size is compared with it: models are published in 16 bit."""

NOT_MEASURED = "not_measured"
"""What a sheet calls that which its compile was asked not to measure."""


@dataclass(frozen=True)
class MeasuredPass:
    """What a pass of the compile measured: all but times, so that the same compile gives the same bytes.

    Attributes:
        name, text: the pass, and as pipeline text.
        contract: as declared, in words.
        rows: figures per layer or per linear.
        summary: figures of the whole pass.
    """

    name: str
    text: str
    contract: str
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    @classmethod
    def of(cls, record: PassRecord) -> MeasuredPass:
        """What an artifact keeps of a pass."""
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in record.rows]
        return cls(record.name, record.text, record.contract, rows, dict(record.summary))


@dataclass(frozen=True)
class Verdict:
    """Whether a stage did its part, and the figures that say so, in a sentence."""

    stage: str
    passed: bool
    text: str


@dataclass(frozen=True)
class CompileReport:
    """What a compile did.

    Attributes:
        out: the artifact.
        records: one per pass.
        verdicts: whether the stages that trained did their part.
        sheet: sizes, perplexities and speeds, see :func:`lbllm_compile.sheet.measure`.
        resumed: finished pieces taken over from an interrupted compile.
        seconds: wall time by phase.
        peak_memory: most bytes this process has held resident.
        command: the command line that asks for the same, empty where it is not known.
        machine: what it ran on.
        kernels: what searches measured of the schedules in use, see :func:`lbllm_compile.kernels.measured`.
        fallback: what was measured to choose linears that stay float, see :func:`lbllm_compile.fallback.applied`.
    """

    out: Path
    records: Sequence[PassRecord]
    verdicts: Sequence[Verdict]
    sheet: Mapping[str, Any]
    resumed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    command: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    kernels: Sequence[Mapping[str, Any]] = ()
    fallback: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def from_json(cls, out: Path, document: Any) -> CompileReport:
        """Reads what :meth:`to_json` gave, written as JSON.

        Args:
            out: where the artifact is now.
            document: parsed JSON of any kind.

        Raises:
            ValueError: it is no such report.
        """
        stored = _Stored.model_validate(document)
        records = [PassRecord(**dict(item)) for item in stored.passes]
        verdicts = [Verdict(**dict(item)) for item in stored.stages]
        kernels = [item.model_dump(exclude_unset=True) for item in stored.kernels]
        fallback = [item.model_dump(exclude_unset=True) for item in stored.fallback]
        took = stored.resumed, stored.seconds, stored.peak_memory
        return cls(out, records, verdicts, stored.sheet, *took, stored.command, stored.machine, kernels, fallback)

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "passes": [dataclasses.asdict(r) for r in self.records],
            "sheet": dict(self.sheet),
            "stages": [dataclasses.asdict(v) for v in self.verdicts],
            "resumed": self.resumed,
            "seconds": dict(self.seconds),
            "peak_memory": self.peak_memory,
            "command": self.command,
            "machine": dict(self.machine),
            "kernels": [dict(item) for item in self.kernels],
            "fallback": [dict(item) for item in self.fallback],
        }


class _StoredPass(BaseModel):
    index: int
    name: str
    text: str
    seconds: float
    check_seconds: float
    nodes_before: int
    nodes_after: int
    contract: str
    error: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


class _StoredVerdict(BaseModel):
    stage: str
    passed: bool
    text: str


class _StoredCandidate(BaseModel):
    schedule: dict[str, Any]
    microseconds: float


class _StoredKernel(BaseModel, extra="allow"):
    spec: dict[str, Any]
    tokens: str
    target: str
    threads: int
    schedule: dict[str, Any]
    microseconds: float
    default_microseconds: float | None = None
    roofline_microseconds: float | None = None
    candidates: list[_StoredCandidate] = []
    discarded: list[str] = []


class _StoredFallback(BaseModel, extra="allow"):
    linears: list[str]
    shape: str
    microseconds: float
    dense_microseconds: float
    slower: bool


class _Stored(BaseModel):
    passes: list[_StoredPass]
    sheet: dict[str, Any]
    stages: list[_StoredVerdict]
    resumed: int
    seconds: dict[str, float]
    peak_memory: int
    command: str = ""
    machine: dict[str, str] = {}
    kernels: list[_StoredKernel] = []
    fallback: list[_StoredFallback] = []


class Clock:
    """Wall time by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def machine() -> dict[str, str]:
    """What this process runs on."""
    return {"CPU": f"{host.cpu_name()}, {in_words(thread_count())} for kernels", "system": platform.platform()}
