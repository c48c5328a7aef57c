"""Tuning results on disk: JSON lines that people can read, safe under concurrent writers.

Every line is ``{"key": {...}, "schedule": {...}, "microseconds": ..., "trials": ..., "sought": ...}``, with
``"default_microseconds"``, ``"roofline_microseconds"``, ``"candidates"`` and ``"discarded"`` where they are known.
Writers append under a lock; of two lines with one key the later counts. A line that is no record (a crash cut it, a
disk garbled it) is skipped with a warning.

``seeds.jsonl`` beside this file holds results that ship with the package, in the same form. What the user's own file
says comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..cache import write_atomically
from ..errors import LbllmError
from ..spec import LinearSpec, complete
from ..targets import Target, host
from ..threads import shares_work

FILE_NAME = "tuning.jsonl"
SEEDS = Path(__file__).with_name("seeds.jsonl")
LOCK_SECONDS = 60.0
"""How long a writer waits for another."""

ENOUGH_TRIALS = 16
"""Candidates a search must have been allowed to measure for its result to count against another's on time alone: what
the least thorough preset allows."""


class TuningFileError(LbllmError):
    """A file of tuning results cannot be read, or a line of it is no result."""


@dataclass(frozen=True)
class Key:
    """Everything a best schedule depends on.

    Attributes:
        spec: shape, group, activation bits, granularity and bias.
        tokens: name of the token bucket.
        target: canonical target.
        features: LLVM architecture and features of the target.
        cpu: name of the CPU measured on; for a remote device, the key it is registered under.
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
        return cls.on(host.cpu_name(), spec, tokens, target, threads, tvm, version)

    @classmethod
    def on(cls, cpu: str, spec: LinearSpec, tokens: str, target: Target, threads: int, tvm: str, version: int) -> Key:
        """The key of a measurement on the CPU of that name."""
        features = " ".join((target.arch, *target.features))
        return cls(spec, tokens, target.name, features, cpu, threads, tvm, version)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Key:
        """A key from its JSON form.

        Raises:
            TypeError, ValueError, LbllmError: the fields are not a key's.
        """
        _check_types(cls, fields, {"spec": dict})
        return cls(**{**fields, "spec": spec_from_fields(fields["spec"])})


@dataclass(frozen=True)
class Result:
    """A search's outcome.

    Attributes:
        schedule: the fields of the best schedule.
        microseconds: its time per call, in the search's measurement.
        trials: candidates measured.
        sought: candidates the search was allowed to measure, or did until its time was over; one that may measure more
            does not take this result.
        default_microseconds: time of the schedule that is used without a search, in the same measurement.
        roofline_microseconds: the least time that the machine's measured bandwidth and dot products allow.
        candidates: the fastest ones, ``{"schedule", "microseconds"}`` each, this schedule among them.
        discarded: what went wrong with candidates that gave no time.
    """

    schedule: dict[str, Any]
    microseconds: float
    trials: int
    sought: int
    default_microseconds: float | None = None
    roofline_microseconds: float | None = None
    candidates: tuple[Mapping[str, Any], ...] = ()
    discarded: tuple[str, ...] = ()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Result:
        """A result from its JSON form; fields of a key are ignored.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or no sensible value.
        """
        schedule, trials, sought = fields["schedule"], fields["trials"], fields["sought"]
        check_schedule(schedule)
        if any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in (trials, sought)):
            raise ValueError("trials and sought must be positive whole numbers")
        default, roofline = (
            None if fields.get(name) is None else _positive(fields[name])
            for name in ("default_microseconds", "roofline_microseconds")
        )
        candidates = tuple(_candidate(item) for item in fields.get("candidates", ()))
        discarded = tuple(str(text) for text in fields.get("discarded", ()))
        times = _positive(fields["microseconds"]), trials, sought, default, roofline
        return cls(dict(schedule), *times, candidates, discarded)

    def line(self, key: Key) -> str:
        """The line that stores this result, without the line break."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, ())}
        return json.dumps({"key": dataclasses.asdict(key), **fields}, sort_keys=True)

    def beats(self, other: Result) -> bool:
        """Whether this result is to be kept rather than ``other``, of the same key.

        A search of :data:`ENOUGH_TRIALS` counts more than one that was stopped earlier; else the faster counts.
        """
        enough, other_enough = self.sought >= ENOUGH_TRIALS, other.sought >= ENOUGH_TRIALS
        return enough if enough != other_enough else self.microseconds < other.microseconds


@dataclass(frozen=True)
class Merged:
    """What an import did.

    Attributes:
        added: results of keys that had none.
        replaced: results better than the stored ones.
        kept: results that were no better than the stored ones.
    """

    added: int
    replaced: int
    kept: int


class Database:
    """Results by key in one file, on top of the shipped ones.

    Args:
        directory: where the file lies; made if missing.
        seeds: the shipped results.
    """

    def __init__(self, directory: Path, seeds: Path = SEEDS):
        self.path = directory / FILE_NAME
        self._lock = FileLock(directory / f"{FILE_NAME}.lock", timeout=LOCK_SECONDS)
        self._known: dict[Key, Result] = {}
        self._read_to = 0
        self._seeds = seeds

    def find(self, key: Key) -> Result | None:
        """The latest result of a key, other processes' included; else the shipped one."""
        self._read_new()
        return self._known.get(key) or _shipped(self._seeds).get(key)

    def ships(self, key: Key) -> bool:
        """Whether a key's result is a shipped one."""
        self._read_new()
        return key not in self._known and key in _shipped(self._seeds)

    def guess(self, key: Key) -> Result | None:
        """A result of the same linear, tokens, target and schedule space, but another CPU, TVM or number of threads.

        The same CPU comes first, then the same number of threads, then own results before shipped ones. One thread is
        no guess for several, nor several for one: it is another question whether to share the work at all.
        """
        self._read_new()

        def alike(other: Key) -> bool:
            if shares_work(other.threads) != shares_work(key.threads):
                return False
            same = dataclasses.replace(other, features=key.features, cpu=key.cpu, tvm=key.tvm, threads=key.threads)
            return same == key

        found = [
            (other.cpu == key.cpu, other.threads == key.threads, own, result)
            for own, pool in ((True, self._known), (False, _shipped(self._seeds)))
            for other, result in pool.items()
            if alike(other)
        ]
        return max(found, key=lambda entry: entry[:-1])[-1] if found else None

    def add(self, key: Key, result: Result) -> None:
        """Stores a result. A folder that cannot be written costs a warning, not the result: it is kept in memory."""
        try:
            self._append([result.line(key)])
        except OSError as error:
            warnings.warn(
                f"tuning results cannot be stored in {self.path} ({error}); set LBLLM_CACHE_DIR to a writable folder",
                stacklevel=2,
            )
        self._known[key] = result

    def merge(self, results: Iterable[tuple[Key, Result]]) -> Merged:
        """Takes over results of elsewhere, each where it beats what is stored; nothing stored gets lost.

        Raises:
            OSError: the file cannot be written.
        """
        counts = {"added": 0, "replaced": 0, "kept": 0}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:  # no other writer between the comparison and the append
            self._read_new()
            best: dict[Key, Result] = {}
            for key, result in results:
                present = best.get(key) or self._known.get(key)
                if present is None or result.beats(present):
                    counts["added" if present is None else "replaced"] += 1
                    best[key] = result
                else:
                    counts["kept"] += 1
            self._append([result.line(key) for key, result in best.items()])
            self._known |= best
        return Merged(**counts)

    def export(self, file: Path, target: str | None = None) -> int:
        """Writes the latest result of every key, sorted, so that :meth:`merge` can take them over elsewhere.

        Args:
            file: replaced if it exists.
            target: canonical target; None for all.

        Returns:
            How many results were written; without any the file is left alone.

        Raises:
            OSError: the file cannot be written.
        """
        self._read_new()
        chosen = {key: result for key, result in self._known.items() if target in (None, key.target)}
        lines = sorted(result.line(key) for key, result in chosen.items())
        if lines:
            write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
        return len(lines)

    def _append(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a writer died within a line
                    text = f"\n{text}"
            file.write(text.encode())
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
                key, result = parse_line(line)
            except ValueError:
                warnings.warn(f"skipped a damaged line of the tuning database {self.path}", stacklevel=3)
                continue
            self._known[key] = result


def parse_line(line: bytes) -> tuple[Key, Result]:
    """The record of a line.

    Raises:
        ValueError: it is none, with the reason.
    """
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise TypeError("it is not a JSON object")
        return Key.from_fields(record["key"]), Result.from_fields(record)
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (TypeError, RecursionError, LbllmError, ValueError) as error:
        raise ValueError(str(error)) from error


def read_results(file: Path) -> list[tuple[Key, Result]]:
    """Every result of an exported file.

    Raises:
        TuningFileError: the file cannot be read, holds nothing, or a line is no result.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise TuningFileError(f"cannot read the tuning results '{file}': {error.strerror or error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(parse_line(line))
        except ValueError as error:
            raise TuningFileError(
                f"line {number} of '{file}' is not a tuning result ({error}); export it again, nothing was imported"
            ) from error
    if not found:
        raise TuningFileError(f"'{file}' holds no tuning results; write some with 'lbllm-compile tune export FILE'")
    return found


@functools.cache
def _shipped(file: Path) -> dict[Key, Result]:
    """The seeds; a package's data file is trusted to be whole."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return dict(parse_line(line) for line in lines if line.strip())


def spec_from_fields(fields: Any) -> LinearSpec:
    """A linear from its JSON form.

    Raises:
        ValueError, LbllmError: it is none.
    """
    if isinstance(fields, dict):
        fields = complete(fields)
    _check_types(LinearSpec, fields, {"kind": str})
    return LinearSpec(**fields)


def check_schedule(fields: Any) -> None:
    """Checks that a schedule's JSON form is an object of plain values; whether a target has it is another question.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(fields, dict) or not all(isinstance(v, (int, str)) for v in fields.values()):
        raise ValueError("the schedule must be an object of plain values")


def _candidate(fields: Any) -> dict[str, Any]:
    check_schedule(fields["schedule"])
    return {"schedule": fields["schedule"], "microseconds": _positive(fields["microseconds"])}


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError("times must be positive numbers")
    return float(value)


_JSON_TYPES: dict[str, type] = {"str": str, "int": int, "bool": bool}


def _check_types(kind: type, fields: Any, special: Mapping[str, type]) -> None:
    """Checks that an object has a dataclass's fields with values of their types; ``special`` are not plain ones."""
    expected = {
        f.name: special[f.name] if f.name in special else _JSON_TYPES[str(f.type)] for f in dataclasses.fields(kind)
    }
    if not isinstance(fields, dict) or fields.keys() != expected.keys():
        raise ValueError(f"the fields of a {kind.__name__} are {', '.join(expected)}")
    for name, wanted in expected.items():
        # bool is a kind of int to Python, not to JSON
        if not isinstance(fields[name], wanted) or isinstance(fields[name], bool) != (wanted is bool):
            raise ValueError(f"{name} must be {wanted.__name__}")
