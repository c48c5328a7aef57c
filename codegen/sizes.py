"""The sizes the format allows, for modules that only describe work and need no torch."""

from __future__ import annotations

GROUPS = (32, 64, 128, 256)
"""Group sizes, in input columns."""

ACTIVATION_BITS = (4, 8, 16)
"""Bits of a quantized activation."""

KV_BITS = (4, 8, 16)
"""Bits of a cached key or value."""


def group_count(in_features: int, group: int) -> int:
    """Number of groups along ``K``, the short tail included."""
    return -(-in_features // group)
