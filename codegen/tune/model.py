"""What a schedule not measured yet may take, judged from those that were: a Gaussian process on the logs of the times.

A field's values count by their rank among those of the space, so that prefetch distances of 0, 1024 and 6144 bytes are
equally far apart. The covariance of two schedules mixes a mean over their fields (each field has an effect of its own)
and a product over them (only schedules that agree in everything behave alike). The mixture and the length scale are
those of a small grid under which the measured times are most likely, so a space may be as separable as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTHS = (0.3, 0.6, 1.2)
"""Length scales to choose among, in shares of a field's range."""

PRODUCTS = (0.0, 0.3, 0.7, 1.0)
"""Shares of the product to choose among."""

NOISE = 0.03
"""Standard deviation of a log time between measurements of one schedule, relative to that of all times at most."""

Array = NDArray[np.float64]


def encode(space: Sequence[Any]) -> Array:
    """Schedules as points: ``[schedules, fields]``, ranks in ``[0, 1]``, NaN where a schedule lacks a field.

    Schedules may be of several dataclasses; which one is a field as well.
    """
    rows = [{"": type(schedule).__name__, **dataclasses.asdict(schedule)} for schedule in space]
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = sorted({row[name] for row in rows if name in row})
        # Names have no order: any two are at least one apart.
        step = 1.0 if isinstance(values[0], str) else 1 / max(1, len(values) - 1)
        rank = {value: i * step for i, value in enumerate(values)}
        columns.append([rank[row[name]] if name in row else math.nan for row in rows])
    return np.array(columns, dtype=np.float64).T


def distance(a: Array, b: Array) -> Array:
    """Distances of points per field, ``[a, b, fields]``; a field that only one has is one apart."""
    gaps = np.abs(a[:, None] - b[None])
    neither = np.isnan(a)[:, None] & np.isnan(b)[None]
    return np.where(neither, 0.0, np.where(np.isnan(gaps), 1.0, gaps))


class CostModel:
    """A Gaussian process fitted to measured times.

    Args:
        points: encoded schedules, ``[n, fields]``.
        log_times: the logs of their times, ``[n]``.
    """

    def __init__(self, points: Array, log_times: Array):
        self._points = points
        self._mean = float(log_times.mean())
        self._deviation = float(log_times.std()) or 1.0
        scaled = (log_times - self._mean) / self._deviation
        noise = min(1.0, max(NOISE, NOISE / self._deviation)) ** 2 * np.eye(len(points))
        gaps = distance(points, points)
        best = -math.inf
        for length in LENGTHS:
            for product in PRODUCTS:
                factor = np.linalg.cholesky(_covariance(gaps, length, product) + noise)
                weights = np.linalg.solve(factor.T, np.linalg.solve(factor, scaled))
                likelihood = -0.5 * scaled @ weights - np.log(np.diag(factor)).sum()
                if likelihood > best:
                    best, self._length, self._product = likelihood, length, product
                    self._factor, self._weights = factor, weights

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Means and standard deviations of the log times of other points, ``[m]`` each."""
        covariance = _covariance(distance(points, self._points), self._length, self._product)
        explained = np.linalg.solve(self._factor, covariance.T)
        variance = np.maximum(1.0 - (explained**2).sum(0), 1e-12)
        return self._mean + self._deviation * (covariance @ self._weights), self._deviation * np.sqrt(variance)


def _covariance(gaps: Array, length: float, product: float) -> Array:
    near = np.exp(-0.5 * (gaps / length) ** 2)
    return (1 - product) * near.mean(-1) + product * near.prod(-1)


def expected_gain(mean: Array, deviation: Array, best: float) -> Array:
    """How much each point is expected to lower the best log time (0 if it turns out slower)."""
    ahead = (best - mean) / deviation
    density = np.exp(-0.5 * ahead**2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in ahead])
    return deviation * (ahead * below + density)
