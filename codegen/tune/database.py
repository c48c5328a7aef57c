"""Tuning results on disk: JSON lines that people can read, safe under concurrent writers.

Every line is ``{"key": {...}, "schedule": {...}, "microseconds": ..., "trials": ..., "sought": ...}``. Writers append
under a lock; of two lines with one key the later counts. A line that is no record (a crash cut it, a disk garbled it)
is skipped with a warning.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..spec import LinearSpec
from ..targets import Target, host

FILE_NAME = "tuning.jsonl"
LOCK_SECONDS = 60.0
"""How long a writer waits for another."""


@dataclass(frozen=True)
class Key:
    """Everything a best schedule depends on.

    Attributes:
        spec: shape, group, activation bits, granularity and bias.
        tokens: name of the token bucket.
        target: canonical target.
        features: LLVM architecture and features of the target.
        cpu: name of the CPU measured on.
        threads: size of the thread pool.
        tvm: TVM's version.
        version: the schedule spaces' version.
    """

    spec: LinearSpec
    tokens: str
    target: str
    features: str
    cpu: str
    threads: int
    tvm: str
    version: int

    @classmethod
    def here(cls, spec: LinearSpec, tokens: str, target: Target, threads: int, tvm: str, version: int) -> Key:
        """The key of a measurement on this machine."""
        features = " ".join((target.arch, *target.features))
        return cls(spec, tokens, target.name, features, host.cpu_name(), threads, tvm, version)

    def text(self) -> str:
        """The key as canonical JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Result:
    """A search's outcome.

    Attributes:
        schedule: the fields of the best schedule.
        microseconds: its time per call, in the search's measurement.
        trials: candidates measured.
        sought: candidates the search was allowed to measure; one that may measure more does not take this result.
    """

    schedule: dict[str, Any]
    microseconds: float
    trials: int
    sought: int


class Database:
    """Results by key in one file.

    Args:
        directory: where the file lies; made if missing.
    """

    def __init__(self, directory: Path):
        self.path = directory / FILE_NAME
        self._lock = FileLock(directory / f"{FILE_NAME}.lock", timeout=LOCK_SECONDS)
        self._known: dict[str, Result] = {}
        self._read_to = 0

    def find(self, key: Key) -> Result | None:
        """The latest result of a key, other processes' included."""
        self._read_new()
        return self._known.get(key.text())

    def add(self, key: Key, result: Result) -> None:
        """Stores a result. A folder that cannot be written costs a warning, not the result: it is kept in memory."""
        self._known[key.text()] = result
        try:
            self._append(key, result)
        except OSError as error:
            warnings.warn(
                f"tuning results cannot be stored in {self.path} ({error}); set LBLLM_CACHE_DIR to a writable folder",
                stacklevel=2,
            )

    def _append(self, key: Key, result: Result) -> None:
        line = json.dumps({"key": dataclasses.asdict(key), **dataclasses.asdict(result)}, sort_keys=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a writer died within a line
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def _read_new(self) -> None:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):  # another process may be writing it
                break
            self._read_to += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                key = json.dumps(record["key"], sort_keys=True)
                result = Result(
                    dict(record["schedule"]),
                    float(record["microseconds"]),
                    int(record["trials"]),
                    int(record["sought"]),
                )
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"skipped a damaged line of the tuning database {self.path}", stacklevel=3)
                continue
            self._known[key] = result
