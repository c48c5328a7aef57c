"""Times decoding and prefill of a compiled model against torch and llama.cpp, from the prompt's ids to the logits.

    python -m benchmarks.decode --artifact DIR --original MODEL [--threads 1 2] [--json FILE]
    python -m benchmarks.decode --shape 1.1b      # random weights, rounded to nearest instead of calibrated

Everyone is fed the same token ids, one sequence, and chooses none. *Decoding*: 64 tokens one by one behind a prompt of
32, the median over the tokens of all rounds. *Prefill*: a prompt of 512, the median of the rounds. Torch runs the
original model as transformers' ``generate`` does. Every decoder lives in a process of its own; they take turns, and a
turn starts with a pause, in which the threads of the others stop spinning. The first round does not count. Kernels that
are not tuned for this machine and a number of threads are before.

*Few tokens*: prompts of 2, 8 and 16, for which the native program has a function, with and without it, in turns too.

Memory and loading are those of fresh processes that load a model and decode once. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.threads import in_words
from rich.table import Table

from lbllm_compile.bench import decoding, llama
from lbllm_compile.bench.decoders import LLAMA_CPP, NATIVE, TORCH, TORCH_BF16, Child, Loading
from lbllm_compile.report.terminal import make_progress

from . import harness, subjects
from .decoders import MODULE, WITHOUT_FEW

OWN = NATIVE
"""Name of what is generated."""

KINDS = ("q4_0", "q8_0", "q2_k", "tq2_0")
"""File types of llama.cpp to compare with."""

SMALL_KIND = "q2_k"
"""The one whose memory is compared: two bits a weight, in files of the type that is in use."""

TORCH_BITS = {"torch fp32": (TORCH, 32.0), "torch bf16": (TORCH_BF16, 16.0)}
"""Kinds of torch's decoders and bits of their weights, by name."""

PACKAGES = ("torch", "transformers", "apache-tvm")

FILE_TYPE = f"{LLAMA_CPP} "
"""Start of the names of llama.cpp's decoders."""


@dataclass(frozen=True)
class Settings(decoding.Settings):
    """How much to measure.

    Attributes:
        few: tokens of the prompts that are timed with and without the function for few tokens.
    """

    few: tuple[int, ...] = (2, 8, 16)
    rounds: int = 20
    processes: int = 5


QUICK = Settings(steps=4, prefill=64, few=(2,), rounds=1, processes=1, pause=0.0, warm=False)
"""A smoke test."""


def contenders(subject: subjects.Subject) -> dict[str, tuple[str, str, float]]:
    """By name: kind and source for :class:`.decoders.Loading`, and bits of a decoder weight."""
    found = {OWN: ("native", subject.native, subject.bits)}
    found |= {name: (kind, subject.original, bits) for name, (kind, bits) in TORCH_BITS.items()}
    return found | {f"{FILE_TYPE}{k}": (LLAMA_CPP, file["path"], file["bits"]) for k, file in subject.gguf.items()}


def loadings(subject: subjects.Subject, settings: Settings, threads: int) -> dict[str, Loading]:
    """What loads every contender, by name."""
    found = contenders(subject)
    return {name: Loading(kind, source, settings.capacity, threads) for name, (kind, source, _) in found.items()}


def speeds(subject: subjects.Subject, settings: Settings, threads: int) -> list[dict[str, Any]]:
    """Tokens per second of every contender, in turns."""
    times = decoding.in_turns(loadings(subject, settings, threads), settings, make_progress(harness.CONSOLE))
    return [
        result(name, bits, times[name], settings.prefill, subject.gguf.get(name.removeprefix(FILE_TYPE)))
        for name, (_, _, bits) in contenders(subject).items()
    ]


def few_tokens(subject: subjects.Subject, settings: Settings, threads: int) -> list[dict[str, Any]]:
    """Milliseconds of prompts of a few tokens, medians, with and without the function for few tokens."""
    seconds: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        kinds = (OWN, WITHOUT_FEW)
        capacity = settings.prompt + max(settings.few)
        asked = {kind: Loading(kind, subject.native, capacity, threads) for kind in kinds}
        children = {kind: stack.enter_context(Child(loading, MODULE)) for kind, loading in asked.items()}
        for index in range(settings.rounds + settings.warm):
            for kind, child in children.items():
                time.sleep(settings.pause)
                for tokens in settings.few:
                    child.ask({"prompt": tokens, "steps": 0})  # warms the threads, and what this length alone uses
                    taken = child.ask({"prompt": tokens, "steps": 0})["prefill"]
                    if index >= settings.warm:
                        seconds.setdefault((kind, tokens), []).append(taken)
    found = []
    for tokens in settings.few:
        few, many = (1e3 * statistics.median(seconds[kind, tokens]) for kind in kinds)
        found.append({"tokens": tokens, "milliseconds": few, "without": many, "speedup": many / few})
    return found


def result(
    name: str, bits: float, times: decoding.Times, prefill: int, file: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One row of the results, JSON-able.

    Args:
        name: the contender's.
        bits: of a decoder weight.
        times: of the contender.
        prefill: tokens of a long prompt.
        file: of llama.cpp, as :class:`.subjects.Subject` has it.
    """
    steps = [second for taken in times.rounds for second in taken]
    rounds = sorted(len(taken) / sum(taken) for taken in times.rounds)
    return {
        "contender": name,
        "bits_per_decoder_weight": bits,
        **({"tensor_types": file["shares"]} if file else {}),
        "decode_tokens_per_second": 1 / statistics.median(steps),
        "slowest_round_tokens_per_second": rounds[0],
        "fastest_round_tokens_per_second": rounds[-1],
        "prefill_tokens_per_second": prefill / statistics.median(times.prefill),
        "decoded": len(steps),
        "prompts": len(times.prefill),
    }


def processes(subject: subjects.Subject, settings: Settings, threads: int) -> list[dict[str, Any]]:
    """Memory and loading of what is generated and of llama.cpp's smallest usual type, in fresh processes.

    Bytes and seconds are medians. ``bare`` is the process with all its packages before it loads the model;
    ``first_logits_seconds`` is loading and the short prompt, because mapped weights are read when they are used.
    """
    found = []
    small = {
        name: dataclasses.replace(loading, capacity=settings.prompt + settings.steps)
        for name, loading in loadings(subject, settings, threads).items()
        if name in (OWN, FILE_TYPE + SMALL_KIND)
    }
    for name, measured in decoding.fresh_processes(small, settings, make_progress(harness.CONSOLE)).items():
        medians = {field: statistics.median(m[field] for m in measured) for field in measured[0]}
        found.append({"contender": name, "processes": len(measured), **medians})
    return found


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much faster what is generated is than each other contender, and than the fastest of llama.cpp's types.

    Returns:
        For ``decode`` and ``prefill``: ``multiples`` by contender, and where llama.cpp takes part ``fastest``, its
        fastest type, and ``over_fastest``.
    """
    found = {}
    for what in ("decode", "prefill"):
        speed = {row["contender"]: row[f"{what}_tokens_per_second"] for row in results}
        multiples = {name: speed[OWN] / value for name, value in speed.items()}
        found[what] = {"multiples": multiples}
        types = [name for name in speed if name.startswith(FILE_TYPE)]
        if types:
            fastest = max(types, key=lambda name: speed[name])
            found[what] |= {"fastest": fastest, "over_fastest": multiples[fastest]}
    return found


def machine() -> dict[str, Any]:
    """What is measured on, and with which versions."""
    from lbllm_compile.codegen.targets import host

    facts: dict[str, Any] = {"cpu": host.cpu_name(), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    return facts if llama.missing() else facts | llama.facts()


def _print_speeds(run: Mapping[str, Any], settings: Settings) -> None:
    table = Table(title=f"{in_words(run['threads'])}: tokens per second (native's as a multiple)", title_justify="left")
    for column in (
        "",
        "bits per decoder weight",
        f"decode, {settings.steps} behind {settings.prompt}",
        "rounds",
        f"prefill of {settings.prefill}",
    ):
        table.add_column(column, justify="right" if column else "left")
    for row in run["results"]:
        name = row["contender"]
        cells = [f"{row['bits_per_decoder_weight']:.2f}"]
        for what in ("decode", "prefill"):
            cells.append(f"{row[f'{what}_tokens_per_second']:.1f} ({run['ratios'][what]['multiples'][name]:.2f})")
        slowest, fastest = row["slowest_round_tokens_per_second"], row["fastest_round_tokens_per_second"]
        table.add_row(name, *cells[:2], f"{slowest:.1f} to {fastest:.1f}", cells[2])
    harness.CONSOLE.print(table)


def _print_few(run: Mapping[str, Any]) -> None:
    table = Table(title=f"{in_words(run['threads'])}: milliseconds of a prompt of few tokens", title_justify="left")
    for column in ("tokens", "with their function", "without it", "times faster"):
        table.add_column(column, justify="right")
    for row in run["few"]:
        cells = (f"{row['milliseconds']:.2f}", f"{row['without']:.2f}", f"{row['speedup']:.2f}")
        table.add_row(str(row["tokens"]), *cells)
    harness.CONSOLE.print(table)


def _print_processes(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="fresh processes: MB resident, and milliseconds with files in the cache", title_justify="left")
    for column in ("", "before loading", "decoding", "peak", "load", "load and prompt"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        sizes = [f"{row[f] / 1e6:.0f}" if f in row else "-" for f in ("bare_resident", "resident", "peak")]
        times = [f"{1e3 * row[f]:.0f}" for f in ("load_seconds", "first_logits_seconds")]
        table.add_row(row["contender"], *sizes, *times)
    harness.CONSOLE.print(table)


def _print_verdicts(runs: Sequence[Mapping[str, Any]]) -> None:
    for run in runs:
        for what, found in run["ratios"].items():
            if "fastest" in found:
                verdict = f"{found['over_fastest']:.2f} times {found['fastest']}, the fastest of llama.cpp's types"
                harness.CONSOLE.print(f"{in_words(run['threads'])}, {what}: {verdict}")


def _settings(options: argparse.Namespace) -> Settings:
    return QUICK if options.quick else Settings(rounds=options.rounds)


def _wish(options: argparse.Namespace, kinds: Sequence[str], threads: int) -> subjects.Wish:
    artifact, original = str(options.artifact), options.original
    if options.shape:
        artifact, original = "", options.shape
    trials = 0 if options.quick else options.trials
    return subjects.Wish(artifact, original, options.group, trials, tuple(kinds), threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("demo-out"), metavar="DIR", help="what a compile wrote")
    parser.add_argument("--original", default="examples/smollm2.py", metavar="MODEL", help="what it was compiled from")
    parser.add_argument("--shape", choices=sorted(subjects.SHAPES), help="random weights instead of an artifact")
    parser.add_argument("--group", type=int, default=64, help="columns per group of random weights")
    parser.add_argument("--trials", type=int, default=16, help="schedules to try per kernel that is not tuned here")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="rounds that count")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--quick", action="store_true", help="check that everything runs; the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    options = parser.parse_args()
    settings = _settings(options)
    absent = llama.missing()
    document: dict[str, Any] = {"machine": machine(), "absent": absent, "runs": []}
    try:
        with tempfile.TemporaryDirectory(prefix="lbllm-decode-") as folder:
            kinds = () if absent else KINDS
            for threads in sorted(options.threads):
                subject = subjects.make(_wish(options, kinds, threads), Path(folder))
                document |= {"original": options.shape or subject.original, "parameters": subject.parameters}
                results = speeds(subject, settings, threads)
                few = few_tokens(subject, settings, threads)
                run = {"threads": threads, "results": results, "ratios": ratios(results), "few": few}
                document["runs"].append(run)
                _print_speeds(run, settings)
                _print_few(run)
            document["processes"] = processes(subject, settings, threads)
    except LbllmError as error:
        sys.exit(str(error))
    _print_processes(document["processes"])
    if absent:
        harness.CONSOLE.print(f"llama.cpp left out: {absent}")
    _print_verdicts(document["runs"])
    harness.write_json(document, options.json)


if __name__ == "__main__":
    main()
