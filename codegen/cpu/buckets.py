"""The ranges of token counts that CPU kernels are made for."""

from __future__ import annotations

from ..backend import Bucket

ONE, FEW, MANY = Bucket("1", 1, 1, 1), Bucket("2-16", 2, 16, 8), Bucket("17+", 17, 2048, 64)

BUCKETS = (ONE, FEW, MANY)
