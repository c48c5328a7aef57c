"""The rule by which a token is drawn from logits, which gives the same token on every machine.

A token's share is an integer, so that sums of shares are exact in whatever order a machine adds; what makes one from a
logit, and a place from a draw, are single operations of fp64 that IEEE 754 defines. Tokens stand side by side in the
order of their logits, the greatest first and equal ones by their number; a draw falls on one of them.

Needs neither torch nor TVM.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

_MOST_BITS = 52
_TERMS = 13

_AT_ONCE = 8192
"""Logits whose intermediate results a core's caches hold."""

POWERS = tuple(math.log(2.0) ** i / math.factorial(i) for i in range(_TERMS))
"""Coefficients of the power series of ``2 ** x``, the constant one first; exact to 2**-52 from -0.5 to 0.5."""


@dataclass(frozen=True)
class Draw:
    """A draw, and what it is from.

    Attributes:
        temperature: logits are divided by it; above 0.
        top_k: only tokens whose logit is at least the k-th greatest; 0 for all.
        top_p: of these only the first ones that together reach this share; 1 for all.
        place: where the draw falls, from 0, which is included, to 1, which is not.
    """

    temperature: float
    top_k: int
    top_p: float
    place: float

    @property
    def scale(self) -> float:
        """What logits are multiplied by to become exponents of 2; finite at any temperature, so that 0 stays 0."""
        return min(math.log2(math.e) / self.temperature, sys.float_info.max)


def share_bits(vocabulary: int) -> int:
    """The greatest logit's share is 2 to this power: so many bits that the sum of all shares has at most 63."""
    return min(_MOST_BITS, 62 - (vocabulary - 1).bit_length())


def shares(logits: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """The shares of logits, int64 ``[N]``: ``2 ** (bits + (logit - greatest) * scale)``, rounded down.

    Args:
        logits: float32 ``[N]``, the greatest of all, which is finite, among them.
        scale: as :attr:`Draw.scale`.
        bits: :func:`share_bits` of all.
    """
    greatest = np.float64(logits.max())
    found = np.empty(len(logits), np.int64)
    for begin in range(0, len(logits), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        with np.errstate(over="ignore"):  # a token that is out of the question is at minus infinity
            exponents = (logits[part].astype(np.float64) - greatest) * scale
        # What is less has no share, and the least exponent has none either.
        np.maximum(exponents, -(bits + 1.0), out=exponents)
        whole = np.floor(exponents + 0.5)
        exponents -= whole
        power = np.full(len(exponents), POWERS[-1])
        for coefficient in POWERS[-2::-1]:
            power *= exponents
            power += coefficient
        power *= 2.0**bits
        found[part] = power.astype(np.int64) >> (-whole).astype(np.int64)
    return found


def drawn(logits: np.ndarray, draw: Draw) -> int:
    """The token on which a draw falls.

    Args:
        logits: float32 ``[V]``, of which the greatest is finite and none is no number.
        draw: which one.
    """
    bits, kept = share_bits(len(logits)), None
    if 0 < draw.top_k < len(logits):
        kept = np.flatnonzero(logits >= np.partition(logits, -draw.top_k)[-draw.top_k])
        logits = logits[kept]
    parts = shares(logits, draw.scale, bits)
    whole = int(parts.sum())
    needed = reaching(whole, draw.top_p)
    place = None if needed < whole else placed(whole, draw.place)
    order = _first(logits, parts, whole, needed if place is None else place + 1)
    reached = np.cumsum(parts[order])
    if place is None:
        place = placed(int(reached[np.searchsorted(reached, needed)]), draw.place)
    # The first token whose cumulative share exceeds the place.
    token = order[np.searchsorted(reached, place, side="right")]
    return int(token if kept is None else kept[token])


def reaching(whole: int, top_p: float) -> int:
    """The least sum of shares, at least 1 and at most the whole, that reaches a share of the whole."""
    return max(1, min(math.ceil(top_p * float(whole)), whole))


def placed(whole: int, place: float) -> int:
    """Where a draw falls among so many shares, from 0 on."""
    return min(int(place * float(whole)), whole - 1)


def _first(logits: np.ndarray, parts: np.ndarray, whole: int, needed: int) -> np.ndarray:
    """The first tokens in their order, so many that their shares reach a sum."""
    # Sorting the whole vocabulary takes longer than many a model's step. Those that are left out here have together no
    # more than half of what is behind the sum.
    large = parts > (whole - needed) // (2 * len(parts))
    likely = np.flatnonzero(logits >= logits[large].min())
    return likely[np.argsort(-logits[likely], kind="stable")]
