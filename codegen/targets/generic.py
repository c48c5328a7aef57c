"""The portable target: plain TIR for whatever CPU LLVM's defaults describe."""

from __future__ import annotations

import platform

FAMILY = "generic"

LANES = 4
"""32-bit lanes of the vectors the portable quantizer uses: 128 bits, which every SIMD unit has."""


def architecture() -> tuple[str, tuple[str, ...]]:
    """LLVM ``mcpu`` and ``mattr``: the common base of this machine's architecture."""
    return ("x86-64-v2", ()) if platform.machine() in ("x86_64", "AMD64") else ("", ())
