"""The process that compiles, checks and times candidates, so that one that crashes or hangs costs only itself.

Requests and replies are JSON, a line each, on the standard streams; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import prove
from ..errors import KernelError
from ..kernels import cpu
from ..spec import LinearSpec
from ..targets import Target
from ..threads import thread_count
from ..tvm_api import compile_functions
from .measure import Outcome, Request

COLD_BYTES = 48 << 20
"""Weights are cycled over copies of this many bytes in all, as a decoder's layers are; more than most L2 caches."""

MOST_COPIES = 256
FEWEST_CALLS = 5
CHECKED_COUNTS = 3
"""Token counts a candidate is checked at before it is timed; the proof of the winner checks all."""


@functools.lru_cache(maxsize=1)
def _cases(spec: LinearSpec) -> list[prove.LinearCase]:
    return prove.linear_cases(spec)


def time_kernel(function: Any, case: prove.LinearCase, packed: torch.Tensor, tokens: int, seconds: float) -> float:
    """Microseconds per call over cycled copies of the weights: the fifth percentile, which other load hardly moves."""
    copies = [packed.clone() for _ in range(max(1, min(MOST_COPIES, COLD_BYTES // packed.numel())))]
    repeats = -(-tokens // case.values.shape[0])
    values = case.values.repeat(repeats, 1)[:tokens].contiguous()
    x_scale = case.x_scale.repeat(repeats, 1)[:tokens].contiguous()
    out = torch.empty(tokens, case.expected.shape[1])
    times = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST_CALLS or time.perf_counter() < end:
        weights = copies[len(times) % len(copies)]
        start = time.perf_counter()
        function(values, x_scale, weights, out)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 20] * 1e6


def measure(request: Request) -> list[Outcome]:
    """Compiles, checks and times every candidate of a request."""
    target = Target.parse(request.target)
    candidates = cpu.implementations(request.spec, target)
    bucket = cpu.bucket_named(request.bucket)
    schedules = [cpu.schedule_from(schedule) for schedule in request.schedules]

    def compiled(schedule: cpu.Schedule) -> Any:
        try:
            function = cpu.of_layout(candidates, schedule.layout).function(schedule)
            return compile_functions({"candidate": function}, target.llvm)
        except KernelError as error:
            return error

    # Nothing is timed while these threads run. TVM lets go of Python's lock while it compiles.
    with ThreadPoolExecutor(thread_count()) as pool:
        libraries = list(pool.map(compiled, schedules))
    cases = _cases(request.spec)
    layouts = {
        layout: [cpu.of_layout(candidates, layout).pack(case.weight, case.bias) for case in cases]
        for layout in dict.fromkeys(schedule.layout for schedule in schedules)
    }
    counts = prove.token_counts(bucket.lowest, bucket.highest)[-CHECKED_COUNTS:]
    outcomes = []
    for schedule, library in zip(schedules, libraries, strict=True):
        packed = layouts[schedule.layout]
        if isinstance(library, KernelError):
            outcomes.append(Outcome(None, str(library)))
            continue
        function = library["candidate"]
        failures = (prove.linear_failure(function, p, case, counts) for case, p in zip(cases, packed, strict=True))
        failure = next(filter(None, failures), None)
        if failure:
            outcomes.append(Outcome(None, failure))
            continue
        outcomes.append(Outcome(time_kernel(function, cases[0], packed[0], bucket.probe, request.seconds)))
    return outcomes


def main() -> None:
    """Answers requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        outcomes = measure(Request.from_json(line))
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]), file=replies)


if __name__ == "__main__":
    main()
