"""How much of a schedule space the search has to measure: one exhaustive measurement, then the search on its times.

    python -m benchmarks.tuner [--shape 4096x11008] [--tokens 1] [--target cpu] [--share 0.1] [--times FILE.json]

Every schedule of the space is compiled, checked and timed once, and the times are stored in the file, which a later
run with the same shape takes from there. The search is then run on the stored times, many times with different
seeds, so that its result says something about the search and nothing about the noise of a measurement. For comparison
the same number of trials is spent at random, and on an additive model: one effect per value of each field, fitted to
the logs of the times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.backend import bucket_named
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target, host
from lbllm_compile.codegen.tune.measure import Measurer, Outcome, Request
from lbllm_compile.codegen.tune.search import BATCH, search, spread
from lbllm_compile.codegen.tune.tuner import TIMING_SECONDS

CLOSE = 1.05
"""Times within this factor of the best count as found."""

Times = dict[Any, float]
Strategy = Callable[[Sequence[Any], Times, int, int], tuple[float, int]]


def measure_all(spec: LinearSpec, target: Target, tokens: str, space: Sequence[Any], seconds: float) -> list[Outcome]:
    """One outcome per schedule."""
    outcomes: list[Outcome] = []
    with Measurer() as measurer:
        for start in range(0, len(space), BATCH):
            forms = [dataclasses.asdict(schedule) for schedule in space[start : start + BATCH]]
            outcomes += measurer.measure(Request(spec, target.name, tokens, forms, seconds))
            print(f"\r{len(outcomes)} of {len(space)} schedules measured", end="", file=sys.stderr)
    print(file=sys.stderr)
    return outcomes


def stored_times(args: argparse.Namespace, spec: LinearSpec, target: Target, space: Sequence[Any]) -> Times:
    """The times of the file, measured first where it has none of this space."""
    file = Path(args.times)
    name = f"{spec} {target.name} {args.tokens}"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    if name not in stored or len(stored[name]) != len(space):
        outcomes = measure_all(spec, target, args.tokens, space, args.seconds)
        stored[name] = [o.microseconds for o in outcomes]
        file.write_text(json.dumps(stored, indent=1))
    return {s: math.inf if time is None else time for s, time in zip(space, stored[name], strict=True)}


def model_search(space: Sequence[Any], times: Times, trials: int, seed: int) -> tuple[float, int]:
    """The tuner's own search."""

    def measure(batch: list[Any]) -> list[Outcome]:
        return [Outcome(times[s] if times[s] < math.inf else None) for s in batch]

    found = search(space, measure, trials, seed=seed)
    assert found
    return found.microseconds, found.trials


def random_search(space: Sequence[Any], times: Times, trials: int, seed: int) -> tuple[float, int]:
    """The default, and others at random."""
    others = random.Random(seed).sample(list(space[1:]), trials - 1)
    return min(times[s] for s in (space[0], *others)), trials


def additive_search(space: Sequence[Any], times: Times, trials: int, seed: int) -> tuple[float, int]:
    """Half the trials spread over the space, the rest on what a ridge regression on the fields' values ranks first."""
    fields = [{"": type(s).__name__, **dataclasses.asdict(s)} for s in space]
    names = sorted({(name, value) for row in fields for name, value in row.items()}, key=str)
    indicators = np.array([[row.get(name) == value for name, value in names] for row in fields], dtype=float)
    index = {s: i for i, s in enumerate(space)}
    known = [index[s] for s in spread(space, max(BATCH, trials // 2), seed)]
    while len(known) < trials:
        finite = [i for i in known if times[space[i]] < math.inf]
        logs = np.log([times[space[i]] for i in finite])
        chosen = indicators[finite]
        effects = np.linalg.solve(chosen.T @ chosen + 0.1 * np.eye(len(names)), chosen.T @ (logs - logs.mean()))
        predicted = indicators @ effects
        predicted[known] = math.inf
        known += [int(i) for i in predicted.argsort()[: min(BATCH, trials - len(known))]]
    return min(times[space[i]] for i in known), len(known)


STRATEGIES: dict[str, Strategy] = {"search": model_search, "additive": additive_search, "random": random_search}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="4096x11008", help="OUTxIN")
    parser.add_argument("--tokens", default="1", help="token bucket")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.1, help="trials, as a share of the space")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5 * TIMING_SECONDS, help="how long each schedule is timed")
    parser.add_argument("--times", default="tuner-times.json", help="measured times, reused")
    args = parser.parse_args()
    try:
        target = Target.parse(args.target)
        rows, columns = (int(n) for n in args.shape.split("x"))
        spec = LinearSpec("bit", rows, columns, args.group, args.act_bits)
        bucket = bucket_named(args.tokens, cpu.BUCKETS)
        space = [schedule for one in cpu.implementations(spec, target) for schedule in one.schedules(bucket)]
        times = stored_times(args, spec, target, space)
    except (LbllmError, ValueError) as error:
        print(f"tuner: {error}", file=sys.stderr)
        return 2
    best, trials = min(times.values()), max(BATCH, round(args.share * len(space)))
    print(f"{spec}, {args.tokens} tokens, {target.name}, {host.cpu_name()}")
    print(f"{len(space)} schedules; best {best:.1f} us, default {times[space[0]]:.1f} us; {trials} trials each")
    print("           found (best = 1)      within 5 %   trials")
    for name, strategy in STRATEGIES.items():
        results = [strategy(space, times, trials, seed) for seed in range(args.seeds)]
        ratios = [time / best for time, _ in results]
        close = sum(ratio <= CLOSE for ratio in ratios) / len(ratios)
        mean = sum(count for _, count in results) / len(results)
        print(f"{name:9}  mean {np.mean(ratios):.3f} worst {max(ratios):.3f}   {100 * close:3.0f} %       {mean:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
