"""The multiple-choice knapsack: exact against every combination, and fast where there are many items."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.passes.calibrate import knapsack

item = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 10, width=16)), min_size=1, max_size=4)


def total(table, chosen) -> float:
    return sum(row[option] for row, option in zip(table, chosen, strict=True))


def best(weights, values, capacity) -> float | None:
    """The least value of all combinations that fit."""
    every = itertools.product(*(range(len(row)) for row in weights))
    return min((total(values, c) for c in every if total(weights, c) <= capacity), default=None)


@settings(max_examples=300)
@given(st.lists(item, min_size=0, max_size=5), st.integers(-1, 40), st.booleans())
def test_it_is_the_best_of_all_combinations(items, capacity, swapped):
    """Also where the weights are the fractional ones, as under a limit on the divergence."""
    weights, values = ([[pair[side] for pair in row] for row in items] for side in ((1, 0) if swapped else (0, 1)))
    chosen, expected = knapsack.choose(weights, values, capacity), best(weights, values, capacity)
    if expected is None:
        assert chosen is None
    else:
        assert chosen is not None
        assert total(weights, chosen) <= capacity * (1 + knapsack.ROUNDING)
        assert total(values, chosen) == pytest.approx(expected, abs=1e-9)


def test_nothing_to_choose_is_chosen():
    assert knapsack.choose([], [], 0.0) == []
    assert knapsack.choose([], [], -1.0) is None


def test_equal_weights_take_the_better_value():
    assert knapsack.choose([[3, 3, 3]], [[2.0, 1.0, 1.5]], 3) == [1]


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_many_items_stay_exact(share):
    """300 items of as many sizes as there can be: no greedy choice is as good, and none is better than the bound."""
    random = np.random.default_rng(0)
    weights = np.sort(random.integers(1_000_000, 9_000_000, (300, 5)), -1)
    values = -np.sort(-random.random((300, 5)), -1)
    capacity = float(weights[:, 0].sum() + share * (weights[:, -1] - weights[:, 0]).sum())
    chosen = knapsack.choose(weights.tolist(), values.tolist(), capacity)
    assert chosen is not None and total(weights.tolist(), chosen) <= capacity * (1 + knapsack.ROUNDING)
    bounds = knapsack._Bounds([(w.astype(float), v) for w, v in zip(weights, values, strict=True)])
    known = bounds.known(capacity)
    assert known is not None
    assert bounds.behind(0, np.array([capacity]))[0] - 1e-9 <= total(values.tolist(), chosen) <= known + 1e-9
