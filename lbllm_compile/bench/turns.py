"""Measurements in turns, so that a machine that slows down slows down everyone that is compared."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PAUSE_SECONDS = 0.1
"""Longer than any of the thread pools spins; a turn starts with it."""

WARM_CALLS = 3
"""Calls of a turn that do not count."""

FEWEST_CALLS = 20
"""Least calls behind a median."""

MOST_CALLS = 200
"""Of a turn."""

ROUNDS = 5
FEWEST_TO_COMPARE = 3
"""Values of either side that quartiles say something about."""

TURN_SECONDS = 0.05
"""How long a turn's calls take, where the calls of all rounds are more than the fewest."""

Runs = Callable[[int], list[float]]
"""Makes so many calls and gives the seconds of each."""


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements and how far they lie apart.

    Attributes:
        median, lower, upper: of the values; the quartiles below and above it.
        count: of the values.
    """

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, lower, upper, len(values))

    def meets(self, other: Spread) -> bool:
        """Whether the middle halves of both overlap."""
        return self.lower <= other.upper and other.lower <= self.upper

    def apart(self, other: Spread) -> bool:
        """Whether both are of :data:`FEWEST_TO_COMPARE` values or more, and their middle halves do not overlap."""
        return min(self.count, other.count) >= FEWEST_TO_COMPARE and not self.meets(other)


def timed(calls: Sequence[Callable[[], object]]) -> Runs:
    """Makes Python calls in turn, going on where it stopped."""
    turns = itertools.cycle(calls)

    def run(count: int) -> list[float]:
        times = []
        for call in itertools.islice(turns, count):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    return run


def alternate(runs: Mapping[str, Runs], quick: bool = False) -> dict[str, list[float]]:
    """Times contenders in turns.

    Args:
        runs: by name.
        quick: one short round, to see that everything runs.

    Returns:
        Seconds of every call that counts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds = 1 if quick else ROUNDS
    fewest = 2 if quick else -(-FEWEST_CALLS // rounds)
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.0 if quick else PAUSE_SECONDS)
            warm = min(run(1 if quick else WARM_CALLS))
            times[name] += run(max(fewest, 0 if quick else min(MOST_CALLS, int(TURN_SECONDS / warm))))
    return times


def environment(threads: int) -> dict[str, str]:
    """Environment variables of a child process that imports what this one can and uses so many threads."""
    count = str(threads)
    counts = {"TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    return os.environ | counts | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
