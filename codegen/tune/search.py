"""What to measure next: a spread of the space first, then what a model of the times promises most of.

The search ends after ``trials`` measurements or, once the spread is done, when the best is close enough to what the
machine can do, or :data:`PATIENCE` measurements in a row were no better.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measure import Outcome
from .model import Array, CostModel, distance, encode, expected_gain

BATCH = 4
"""Candidates measured at once: they are compiled side by side."""

SPREAD_SHARE = 1 / 3
"""Share of the trials spent on the spread."""

PATIENCE = 16
"""Measurements without a better candidate that end the search."""

BETTER = 0.98
"""A candidate must take at most this share of the best time to count as progress."""

FAILURE = 200
"""Characters of what went wrong with a candidate that are kept."""

_FOLDERS = re.compile(r"(?<![\w.])(?:/[^\s/'\"(),:]+)+/")
"""The folders of an absolute path."""

FAILED = 4.0
"""A candidate that gives no time enters the model as that many times the slowest one."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        schedule: the best candidate.
        microseconds: its time.
        trials: candidates measured.
        failures: what went wrong with candidates that gave no time.
        times: of all candidates that gave one, the fastest first.
        complete: the search ended by itself, not by its deadline.
    """

    schedule: Any
    microseconds: float
    trials: int
    failures: tuple[str, ...]
    times: Mapping[Any, float]
    complete: bool


def spread(space: Sequence[Any], count: int, seed: int = 0) -> list[Any]:
    """``count`` schedules far from each other, the first (the best guess) among them.

    Each is the one farthest from its nearest predecessor; ``seed`` decides between equals.
    """
    return [space[i] for i in _spread(encode(space), count, seed)]


def _spread(points: Array, count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    jitter = np.array([generator.random() for _ in points])
    # Distances are sums of ranks, at least 1e-3 apart in any space that is searched.
    gaps = distance(points, points[:1]).sum(-1)[:, 0]
    chosen = [0]
    while len(chosen) < min(count, len(points)):
        order = gaps + 1e-3 * jitter
        order[chosen] = -1
        chosen.append(int(order.argmax()))
        gaps = np.minimum(gaps, distance(points, points[chosen[-1:]]).sum(-1)[:, 0])
    return chosen


def _promising(points: Array, measured: dict[int, float], count: int) -> list[int]:
    """The indices of up to ``count`` points worth measuring, given the times of others.

    Each is the one that promises most if those before it take what the model says.
    """
    slowest = max(time for time in measured.values() if time < math.inf)
    known = {i: math.log(min(time, FAILED * slowest)) for i, time in measured.items()}
    chosen: list[int] = []
    while len(chosen) < count and len(known) < len(points):
        indices = list(known)
        model = CostModel(points[indices], np.array([known[i] for i in indices]))
        mean, deviation = model.predict(points)
        gain = expected_gain(mean, deviation, min(known.values()))
        gain[indices] = -1
        best = int(gain.argmax())
        chosen.append(best)
        known[best] = float(mean[best])
    return chosen


def _brief(failure: str) -> str:
    """What went wrong, in one line that can be kept: without folders, which are this machine's and often gone."""
    return _FOLDERS.sub("", failure.strip().partition("\n")[0])[:FAILURE]


def search(
    space: Sequence[Any],
    measure: Callable[[list[Any]], list[Outcome]],
    trials: int,
    deadline: float = math.inf,
    close_enough: Callable[[], bool] = lambda: False,
    seed: int = 0,
) -> Found | None:
    """Searches a space for the fastest schedule.

    Args:
        space: valid schedules, a good guess first.
        measure: measures a few.
        trials: most measurements.
        deadline: :func:`time.monotonic` time after which no batch is started.
        close_enough: asked after the spread and each later batch whether the best is good enough to stop.
        seed: decides between equally good choices of what to measure.

    Returns:
        The best, or None if no candidate gave a time.
    """
    points = encode(space)
    times: dict[int, float] = {}
    failures: list[str] = []
    since_better = 0
    first = _spread(points, max(BATCH, round(SPREAD_SHARE * trials)), seed)
    complete = True
    while len(times) < min(trials, len(space)):
        best = min(times.values(), default=math.inf)
        waiting = [i for i in first if i not in times]
        count = min(BATCH, trials - len(times))
        if not waiting and (since_better >= PATIENCE or close_enough()):
            break
        if times and time.monotonic() >= deadline:
            complete = False
            break
        if waiting:
            batch = waiting[:count]
        elif best < math.inf:
            batch = _promising(points, times, count)
        else:  # nothing has worked yet
            batch = [i for i in range(len(space)) if i not in times][:count]
        for i, outcome in zip(batch, measure([space[i] for i in batch]), strict=True):
            times[i] = math.inf if outcome.microseconds is None else outcome.microseconds
            since_better = 0 if times[i] <= BETTER * best else since_better + 1
            best = min(best, times[i])
            if outcome.failure:
                failures.append(f"{space[i]}: {_brief(outcome.failure)}")
    ranked = [i for i in sorted(times, key=times.__getitem__) if times[i] < math.inf]
    if not ranked:
        return None
    ranking = {space[i]: times[i] for i in ranked}
    return Found(space[ranked[0]], times[ranked[0]], len(times), tuple(failures), ranking, complete)
