"""Sizes that the format allows and that kernels count on, and other limits, for modules that need no torch."""

from __future__ import annotations

GROUPS = (32, 64, 128, 256)
"""Group sizes, in input columns."""

DEFAULT_GROUP = 64
"""The group size where none is given."""

PLANES = 4
"""Binary planes that a 4-bit code is made of."""

ACTIVATION_BITS = (4, 8, 16)
"""Bits of a quantized activation."""

KV_BITS = (4, 8, 16)
"""Bits of a cached key or value."""

ALIGNMENT = 64
"""Bytes to which packed weights and working memory are aligned."""

CAPACITY_MULTIPLE = 16
"""Capacities of KV caches are multiples of this: attention kernels read blocks of keys whole."""

BATCH, LENGTH, TOTAL, CAPACITY, ROWS = "batch", "length", "total", "capacity", "rows"
"""Names of sizes that inputs choose: sequences, new tokens, past and new tokens, slots of the KV state, sequences that
this has room for."""

WEIGHTS, STATE, FIXED_STATE = "weights", "state", "fixed_state"
"""Names of a program's blocks of bytes: weights, KV state and, where it has some, state of fixed size."""

PAST = "past"
"""The input of a lowered graph that is the number of past tokens."""

MIN_CAPACITY = 64
"""Tokens that a fresh KV cache has room for at least."""

MAX_SEED = 2**32 - 1
"""Largest seed: behind it, the generators of :meth:`PassContext.generator` would run out of 64 bits."""

MOST_ELEMENTS = 2**31 - 1
"""Elements of the largest tensor that kernels can index, because their indices have 32 bits."""


def group_count(in_features: int, group: int) -> int:
    """Number of groups along ``K``, the short tail included."""
    return -(-in_features // group)


def product_group(group: int, act_group: int) -> int:
    """Columns of one integer accumulator: as many as have one scale of the weights and one of the activations.

    Args:
        group: columns per scale of the weights; 0 where they have one a row, and ``act_group`` may be anything.
        act_group: channels per scale of the activations, a divisor of ``group``; 0 where a token has one scale.
    """
    return act_group or group


def matrix_bytes(out_features: int, in_features: int, group: int) -> int:
    """Bytes of a W(1+1) matrix as stored: two planes, four int8 levels and an fp16 scale a group, padding included."""
    return out_features * (2 * -(-in_features // 8) + 6 * group_count(in_features, group))


def int8_bytes(out_features: int, in_features: int) -> int:
    """Bytes of int8 rows as stored, with an fp32 scale each."""
    return out_features * (in_features + 4)


def int4_bytes(out_features: int, in_features: int, group: int) -> int:
    """Bytes of a 4-bit matrix as stored: two codes a byte, an fp16 scale a group, and 16 int8 levels."""
    return out_features * (-(-in_features // 2) + 2 * group_count(in_features, group)) + 16


def capacity_for(tokens: int) -> int:
    """Slots of a KV cache that is to have room for so many tokens."""
    return -(-max(tokens, MIN_CAPACITY) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
