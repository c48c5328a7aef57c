"""One option for every item, exactly: the multiple-choice knapsack problem.

Items are taken one after the other. Of the ways to choose for the items so far those are kept that no other beats in
both weight and value (Nemhauser and Ullmann, Management Science 15, 1969), and of these the ones from which the
fractional problem of the items to come, a lower bound, could still reach something better than a choice that is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-9
"""Relative: what sums in another order may differ by, and by how much a capacity may be exceeded for that reason."""


def choose(weights: Sequence[Sequence[float]], values: Sequence[Sequence[float]], capacity: float) -> list[int] | None:
    """The options of the least total value whose total weight is at most ``capacity``.

    Args:
        weights, values: of every item's options; finite.
        capacity: of all together.

    Returns:
        The index of an option of every item; None where even the lightest options are too heavy.
    """
    options = [(np.array(w, float), np.array(v, float)) for w, v in zip(weights, values, strict=True)]
    room = capacity + ROUNDING * abs(capacity)
    bounds = _Bounds(options)
    known = bounds.known(room)
    if known is None:
        return None
    limit = known + ROUNDING * sum(float(np.abs(own).max()) for _, own in options)
    weight, value = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, int]] = []
    for index, (own_weights, own_values) in enumerate(options):
        heavier, worse = ((old[:, None] + own).ravel() for old, own in ((weight, own_weights), (value, own_values)))
        open_ones = np.flatnonzero(worse + bounds.behind(index + 1, room - heavier) <= limit)
        order = open_ones[np.lexsort((worse[open_ones], heavier[open_ones]))]
        best = np.minimum.accumulate(worse[order])
        kept = order[worse[order] < np.concatenate(([np.inf], best[:-1]))]
        weight, value = heavier[kept], worse[kept]
        steps.append((kept, len(own_weights)))
    chosen: list[int] = []
    position = len(value) - 1  # values fall with the weight
    for kept, count in reversed(steps):
        position, option = divmod(int(kept[position]), count)
        chosen.append(option)
    return chosen[::-1]


class _Bounds:
    """What the last items can reach where options may be mixed: from the lightest options up, along the lower convex
    hulls, the steps that gain most for their weight first."""

    def __init__(self, options: Sequence[tuple[np.ndarray, np.ndarray]]):
        hulls = [_hull(*option) for option in options]
        self._lightest = _sums_of_last([weights[0] for weights, _ in hulls])
        self._values = _sums_of_last([values[0] for _, values in hulls])
        lengths = np.array([len(weights) - 1 for weights, _ in hulls], int)
        owner = np.repeat(np.arange(len(hulls)), lengths)
        added = np.concatenate([np.diff(weights) for weights, _ in hulls] or [np.zeros(0)])
        gained = np.concatenate([np.diff(values) for _, values in hulls] or [np.zeros(0)])
        order = np.argsort(gained / added, kind="stable")
        self._owner, self._added, self._gained = owner[order], added[order], gained[order]

    def behind(self, first: int, room: np.ndarray) -> np.ndarray:
        """The least value of the items from ``first`` on within ``room``, by bound; infinite where there is none."""
        ours = self._owner >= first
        ends = np.concatenate(([0.0], np.cumsum(self._added[ours])))
        reached = np.concatenate(([0.0], np.cumsum(self._gained[ours])))
        spare = room - self._lightest[first]
        found = self._values[first] + np.interp(spare, ends, reached)
        return np.where(spare < 0, np.inf, found)

    def known(self, room: float) -> float | None:
        """The value of a choice that fits: steps are taken as long as they fit, each item's in their order."""
        spare = room - self._lightest[0]
        if spare < 0:
            return None
        value, stopped = self._values[0], set()
        for owner, added, gained in zip(self._owner, self._added, self._gained, strict=True):
            if owner in stopped or added > spare:
                stopped.add(owner)
                continue
            spare, value = spare - added, value + gained
        return float(value)


def _sums_of_last(numbers: Sequence[float]) -> np.ndarray:
    """The sums of all numbers from each position on, and 0 behind the last."""
    return np.concatenate((np.cumsum(np.array(numbers, float)[::-1])[::-1], [0.0]))


def _hull(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower convex hull of an item's options, from the lightest to the one of the least value."""
    points: list[tuple[float, float]] = []
    for weight, value in sorted(zip(weights.tolist(), values.tolist(), strict=True)):
        if points and value >= points[-1][1]:
            continue
        while len(points) > 1:
            (w0, v0), (w1, v1) = points[-2:]
            if (v1 - v0) * (weight - w0) < (value - v0) * (w1 - w0):
                break
            points.pop()
        points.append((weight, value))
    first, second = zip(*points, strict=True)
    return np.array(first), np.array(second)
