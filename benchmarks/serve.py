"""Times a server: tokens a second of several requests at once against one at a time.

    python -m benchmarks.serve --artifact DIR [--at-once 8] [--threads 1 2] [--json FILE]

A server in a process of its own answers over loopback. Every request asks for the same number of tokens, greedy,
behind a prompt of its own; a turn sends as many requests as are answered at once, either all together or one after the
other, and the two take turns. The first round does not count. Figures are medians over the rounds: tokens of answers a
second, from the first request sent to the last answer received, so prompts and HTTP are in them. Run it on an otherwise
idle machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.targets import host
from lbllm_compile.codegen.threads import in_words

from . import harness

WORDS = ("the", "river", "bends", "where", "old", "stones", "keep", "warm", "and", "children", "count", "boats")
"""Prompts are made of these."""


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        at_once: requests in work together.
        prompt: words of a prompt.
        tokens: of an answer.
        rounds: that count.
    """

    at_once: int
    prompt: int = 32
    tokens: int = 64
    rounds: int = 10


@contextmanager
def served(artifact: Path, at_once: int, threads: int) -> Iterator[tuple[str, int]]:
    """The address of a server, which ends with the block."""
    arguments = ["serve", str(artifact), "--port", "0", "--name", "model", "--together", str(at_once), "--api-key", ""]
    command = [sys.executable, "-m", "lbllm_compile", *arguments]
    process = subprocess.Popen(command, env=harness.environment(threads), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving model at http://([^:]+):(\d+)/v1", line):
                yield found.group(1), int(found.group(2))
                return
        raise LbllmError(f"the server ended: {''.join(said).strip()}")
    finally:
        process.terminate()
        process.communicate()


def ask(address: tuple[str, int], prompt: str, tokens: int) -> int:
    """One request; how many tokens it was answered with."""
    fields = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    connection = http.client.HTTPConnection(*address, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    if "error" in answer:
        raise LbllmError(f"the server refused: {answer['error']['message']}")
    return answer["usage"]["completion_tokens"]


def speed(address: tuple[str, int], settings: Settings, workers: int, round_: int) -> float:
    """Tokens a second of a turn with so many requests in work together."""

    def one(number: int) -> int:
        # no two prompts begin alike, so that none is known from another
        words = [WORDS[(7 * number + 5 * round_ + 3 * i + workers) % len(WORDS)] for i in range(settings.prompt)]
        return ask(address, f"{round_} {workers} {number} {' '.join(words)}", settings.tokens)

    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        counts = list(pool.map(one, range(settings.at_once)))
        return sum(counts) / (time.perf_counter() - start)


def measure(artifact: Path, settings: Settings, threads: int, quick: bool) -> dict[str, Any]:
    """Both ways to ask, in turns."""
    speeds: dict[int, list[float]] = {1: [], settings.at_once: []}
    with served(artifact, settings.at_once, threads) as address:
        for round_ in range(settings.rounds + (not quick)):
            for workers, found in speeds.items():
                time.sleep(0.0 if quick else harness.PAUSE_SECONDS)
                value = speed(address, settings, workers, round_)
                if quick or round_:
                    found.append(value)
            harness.CONSOLE.print(f"[dim]{in_words(threads)}, round {round_} of {settings.rounds}[/dim]")
    results = [
        {
            "at_once": workers,
            "tokens_per_second": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "rounds": len(found),
        }
        for workers, found in speeds.items()
    ]
    ratio = results[-1]["tokens_per_second"] / results[0]["tokens_per_second"]
    return {
        "threads": threads,
        "prompt": settings.prompt,
        "tokens": settings.tokens,
        "results": results,
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("demo-out"), metavar="DIR", help="what a compile wrote")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="requests in work together")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--quick", action="store_true", help="check that everything runs; the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    options = parser.parse_args()
    if options.at_once < 2:
        parser.error("--at-once compares with one at a time; use at least 2")
    settings = Settings(options.at_once, tokens=8, rounds=1) if options.quick else Settings(options.at_once)
    document: dict[str, Any] = {"cpu": host.cpu_name(), "artifact": options.artifact.name, "runs": []}
    try:
        for threads in sorted(options.threads):
            run = measure(options.artifact, settings, threads, options.quick)
            document["runs"].append(run)
            shown = ", ".join(f"{r['at_once']} at once: {r['tokens_per_second']:.1f} tokens/s" for r in run["results"])
            harness.CONSOLE.print(f"{in_words(threads)}: {shown} ({run['ratio']:.2f} times)")
    except LbllmError as error:
        sys.exit(str(error))
    harness.write_json(document, options.json)


if __name__ == "__main__":
    main()
