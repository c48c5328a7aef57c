"""Sizes that the format allows and that kernels count on, and other limits, for modules that need no torch."""

from __future__ import annotations

GROUPS = (32, 64, 128, 256)
"""Group sizes, in input columns."""

DEFAULT_GROUP = 64
"""The group size where none is given."""

ACTIVATION_BITS = (4, 8, 16)
"""Bits of a quantized activation."""

KV_BITS = (4, 8, 16)
"""Bits of a cached key or value."""

ALIGNMENT = 64
"""Bytes to which packed weights and working memory are aligned."""

CAPACITY_MULTIPLE = 16
"""Capacities of KV caches are multiples of this: attention kernels read blocks of keys whole."""

BATCH, LENGTH, TOTAL, CAPACITY = "batch", "length", "total", "capacity"
"""Names of sizes that inputs choose: sequences, new tokens, past and new tokens, slots of the KV state."""

MIN_CAPACITY = 64
"""Tokens that a fresh KV cache has room for at least."""

MAX_SEED = 2**32 - 1
"""Largest seed: behind it, the generators of :meth:`PassContext.generator` would run out of 64 bits."""

MOST_ELEMENTS = 2**31 - 1
"""Elements of the largest tensor that kernels can index, because their indices have 32 bits."""


def group_count(in_features: int, group: int) -> int:
    """Number of groups along ``K``, the short tail included."""
    return -(-in_features // group)
