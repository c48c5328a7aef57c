"""What the CPU benchmarks share: alternating measurements, one child process a thread count, tables and plots.

Everything that is compared runs in one process and takes turns. A turn starts with a pause, in which the threads of the
others stop spinning, and with calls that do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lbllm_compile.bench.turns import environment

OWN = ("lut8", "popcount")
"""Contenders that are generated."""

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 160)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shapes: ``(rows, columns, group)`` of the matrices.
        tokens: values of M.
        quick: a smoke test: first guesses of schedules, one round, few calls.
    """

    shapes: tuple[tuple[int, int, int], ...]
    tokens: tuple[int, ...]
    quick: bool


def result(
    contender: Any, times: Sequence[float], rows: int, columns: int, group: int, tokens: int, **more: Any
) -> dict[str, Any]:
    """One row of the results, JSON-able."""
    median = statistics.median(times)
    return {
        "shape": f"{rows}x{columns}",
        "group": group,
        "tokens": tokens,
        **more,
        "contender": contender.name,
        "microseconds": 1e6 * median,
        "fifth_percentile_microseconds": 1e6 * sorted(times)[len(times) // 20],
        "calls": len(times),
        "weight_bytes": contender.bytes,
        "gigabytes_per_second": contender.bytes / median / 1e9,
        "gigamacs_per_second": rows * columns * tokens / median / 1e9,
    }


def machine(quick: bool) -> dict[str, Any]:
    """What this machine can do, measured in this process, and what it is."""
    import torch
    from lbllm_compile.codegen.targets import host
    from lbllm_compile.codegen.threads import thread_count
    from lbllm_compile.codegen.tvm_api import VERSION

    from . import contenders, limits

    facts: dict[str, Any] = {
        "cpu": host.cpu_name(),
        "threads": thread_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tvm": VERSION,
        "absent": contenders.absent(),
    }
    if not limits.missing():
        facts["cached_gigabytes_per_second"] = limits.bandwidth(cold=False) / 1e9
        if not quick:
            facts["memory_gigabytes_per_second"] = limits.bandwidth(cold=True) / 1e9
        facts["peak_gigamacs_per_second"] = limits.dot_peak() / 1e9
    return facts


def shape(text: str) -> tuple[int, int, int]:
    """``NxK`` or ``NxK:GROUP``."""
    size, _, group = text.partition(":")
    rows, _, columns = size.partition("x")
    return int(rows), int(columns), int(group or 128)


def main(
    description: str,
    module: str,
    settings: Settings,
    measure: Callable[[Settings], Iterable[dict[str, Any]]],
    column: str,
) -> None:
    """Runs a benchmark from its command line.

    Args:
        description: for ``--help``.
        module: name of the benchmark's module, to start its children.
        settings: defaults.
        measure: yields results, in a process of one thread count.
        column: the field that the columns of the tables differ in.
    """
    from lbllm_compile.codegen.errors import LbllmError

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape, default=settings.shapes, metavar="NxK:GROUP")
    parser.add_argument("--tokens", nargs="+", type=int, default=settings.tokens, metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--quick", action="store_true", help="check that everything runs; the times mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a roofline (needs matplotlib)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = Settings(tuple(options.shapes), tuple(options.tokens), options.quick)
    try:
        if options.child:
            _measure_here(chosen, measure)
            return
        documents = [measure_with(threads, module, sys.argv[1:]) for threads in options.threads]
    except LbllmError as error:
        sys.exit(str(error))
    for document in documents:
        document["ratios"] = _ratios(document["results"], column)
        _print(document, column)
    write_json(documents, options.json)
    if options.plot:
        from .roofline import draw

        draw(documents, options.plot)


def write_json(document: Any, path: Path | None) -> None:
    """Writes a benchmark's results to a file, or to stdout where none is named."""
    text = json.dumps(document, indent=1)
    if path:
        path.write_text(text + "\n")
    else:
        print(text)


def _measure_here(settings: Settings, measure: Callable[[Settings], Iterable[dict[str, Any]]]) -> None:
    import torch
    from lbllm_compile.codegen.threads import in_words, thread_count

    torch.set_num_threads(thread_count())
    document = {"machine": machine(settings.quick), "results": []}
    with torch.no_grad():
        for row in measure(settings):
            document["results"].append(row)
            CONSOLE.print(
                f"[dim]{in_words(thread_count())} {row['shape']} M={row['tokens']} {row.get('cache', '')} "
                f"{row['contender']}: {row['microseconds']:.1f} us[/dim]"
            )
    print(json.dumps(document))


def measure_with(threads: int, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The document of a child process with so many threads."""
    command = [sys.executable, "-m", module, *arguments, "--child"]
    done = subprocess.run(command, env=environment(threads), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _ratios(results: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """For every matrix and column: each contender's time as a multiple of the fastest generated kernel's."""
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in results:
        cases.setdefault((row["shape"], row["group"], row[column]), {})[row["contender"]] = row["microseconds"]
    found = []
    for (matrix, group, value), times in cases.items():
        own = min(time for name, time in times.items() if name in OWN)
        multiples = {name: time / own for name, time in times.items()}
        found.append({"shape": matrix, "group": group, column: value, "multiples": multiples})
    return found


def _print(document: dict[str, Any], column: str) -> None:
    from lbllm_compile.codegen.threads import in_words

    facts, results = document["machine"], document["results"]
    figures = [f"{k.replace('_', ' ')}: {v:.0f}" for k, v in facts.items() if k.endswith("per_second")]
    CONSOLE.print(f"[bold]{facts['cpu']}, {in_words(facts['threads'])}[/bold]; " + ", ".join(figures))
    for matrix, group in dict.fromkeys((row["shape"], row["group"]) for row in results):
        rows = [row for row in results if (row["shape"], row["group"]) == (matrix, group)]
        values = list(dict.fromkeys(row[column] for row in rows))
        title = f"{matrix}, group {group}: microseconds (multiple of the fastest generated kernel)"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for value in values:
            table.add_column(f"{column} {value}", justify="right")
        multiples = {case[column]: case["multiples"] for case in document["ratios"] if case["shape"] == matrix}
        for name in dict.fromkeys(row["contender"] for row in rows):
            times = {row[column]: row["microseconds"] for row in rows if row["contender"] == name}
            cells = [f"{times[v]:.1f} ({multiples[v][name]:.2f})" if v in times else "-" for v in values]
            table.add_row(name, *cells)
        CONSOLE.print(table)
    for reason in facts["absent"]:
        CONSOLE.print(f"left out: {reason}")
