"""Proof, sweeps and whole models on a GPU, each part a process of its own, in one JSON; ``cuda_all.sh`` starts it.

A part that fails, or takes longer than its share of the time, is recorded with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda_timing
from .cuda_timing import Bench

SECONDS = 450
"""Of all parts together."""

KILLED = 9
"""Seconds that a part which took too long has to end by itself."""

TESTS = "tests"


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: of its results.
        seconds: that it may take at most.
        command: what is started, behind the interpreter; the file for its results comes last.
    """

    name: str
    seconds: int
    command: tuple[str, ...]


def parts(folder: Path, quick: bool) -> list[Part]:
    """What is run, the proof first."""
    options = ("--packed", str(folder), *(["--quick"] if quick else []), "--json")
    names = {"prove": 90, "gemv": 90, "gemm": 150, "decode": 210}
    found = [Part(name, seconds, ("-m", f"benchmarks.cuda_{name}", *options)) for name, seconds in names.items()]
    junit = "--junit-xml"
    return [*found, Part(TESTS, 120, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests", junit))]


def run(folder: Path, quick: bool = False, chosen: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the parts.

    Args:
        folder: what was packed.
        quick: a smoke test.
        chosen: names of parts; all by default.

    Raises:
        LbllmError: this machine has no GPU.
    """
    began = time.monotonic()
    with cuda_timing.present_device() as driver:
        document: dict[str, Any] = {"machine": Bench(driver).facts(), "parts": {}, "failed": {}, "seconds": {}}
    with tempfile.TemporaryDirectory(prefix="lbllm-cuda-all-") as place:
        for part in parts(folder, quick):
            if chosen and part.name not in chosen:
                continue
            left, start = SECONDS - (time.monotonic() - began), time.monotonic()
            if left < 1:
                document["failed"][part.name] = f"not begun: the {SECONDS} s of all parts are over"
                continue
            result = Path(place) / f"{part.name}.json"
            reason = _run(part, result, min(part.seconds, left))
            document["seconds"][part.name] = round(time.monotonic() - start, 1)
            if reason:
                document["failed"][part.name] = reason
            if result.is_file():
                text = result.read_text(encoding="utf-8", errors="replace")
                document["parts"][part.name] = text if part.name == TESTS else json.loads(text)
            print(f"{part.name}: {reason or 'done'} ({document['seconds'][part.name]} s)", file=sys.stderr, flush=True)
    return document


def _run(part: Part, result: Path, seconds: float) -> str:
    """Runs a part; returns why it failed, empty where it did not."""
    process = subprocess.Popen(
        [sys.executable, *part.command, str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.communicate(timeout=KILLED)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        return f"stopped: it took longer than {seconds:.0f} s"
    if process.returncode == 0:
        return ""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return f"exit code {process.returncode}: {' | '.join(lines[-3:])[:600] or 'some of it failed, see its results'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="check that everything runs; the times mean nothing")
    parser.add_argument("--parts", nargs="+", default=(), metavar="NAME", help="of prove, gemv, gemm, decode, tests")
    options = parser.parse_args()
    document = run(options.folder, options.quick, options.parts)
    cuda_timing.write(document, options.out)
    print(f"wrote {options.out}", file=sys.stderr)
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    cuda_timing.ended(main)
