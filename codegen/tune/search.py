"""What to measure next: a spread of the space first, then the neighbours of the best.

A neighbour differs in one field. The search ends after ``trials`` measurements, when every neighbour of the best has
been measured, or when :data:`PATIENCE` measurements in a row were no better.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .measure import Outcome

BATCH = 4
"""Candidates measured at once: they share one compile."""

PATIENCE = 8
"""Measurements without a better candidate that end the search, once the spread is done."""

BETTER = 0.98
"""A candidate must take at most this share of the best time to count as progress."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        schedule: the best candidate.
        microseconds: its time.
        trials: candidates measured.
        failures: what went wrong with candidates that gave no time.
    """

    schedule: Any
    microseconds: float
    trials: int
    failures: tuple[str, ...]


def neighbours(schedule: Any, space: Sequence[Any]) -> list[Any]:
    """The schedules of the space that differ from one in a single field."""
    fields = dataclasses.asdict(schedule)
    return [
        other
        for other in space
        if type(other) is type(schedule)
        and sum(fields[name] != value for name, value in dataclasses.asdict(other).items()) == 1
    ]


def spread(space: Sequence[Any], count: int) -> list[Any]:
    """``count`` schedules over the whole space, the first (the best guess) among them."""
    count = min(count, len(space))
    return [space[i * len(space) // count] for i in range(count)]


def search(
    space: Sequence[Any],
    measure: Callable[[list[Any]], list[Outcome]],
    trials: int,
    deadline: float = math.inf,
) -> Found | None:
    """Searches a space for the fastest schedule.

    Args:
        space: valid schedules, a good guess first.
        measure: measures a few.
        trials: most measurements.
        deadline: :func:`time.monotonic` time after which no batch is started.

    Returns:
        The best, or None if no candidate gave a time.
    """
    times: dict[Any, float] = {}
    failures: list[str] = []
    since_better = 0
    initial = spread(space, max(1, trials // 2))
    queue = list(initial)
    while queue and len(times) < trials and (not times or time.monotonic() < deadline):
        batch = queue[: min(BATCH, trials - len(times))]
        for schedule, outcome in zip(batch, measure(batch), strict=True):
            best = min(times.values(), default=math.inf)
            times[schedule] = math.inf if outcome.microseconds is None else outcome.microseconds
            since_better = 0 if times[schedule] <= BETTER * best else since_better + 1
            if outcome.failure:
                failures.append(f"{schedule}: {outcome.failure}")
        queue = [schedule for schedule in initial if schedule not in times]
        if queue:
            continue
        if since_better >= PATIENCE:
            break
        ranked = sorted(times, key=times.__getitem__)
        near = [n for schedule in ranked[:2] for n in neighbours(schedule, space)]
        queue = [n for n in dict.fromkeys(near) if n not in times]
    best = min(times, key=times.__getitem__, default=None)
    if best is None or times[best] == math.inf:
        return None
    return Found(best, times[best], len(times), tuple(failures))
