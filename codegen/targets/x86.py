"""x86 targets: kernel family to LLVM architecture and features, and the CPU flags it needs."""

from __future__ import annotations

MACHINES = ("x86_64", "AMD64")
"""The architecture, as :func:`platform.machine` names it."""

TRIPLE = "x86_64-linux-gnu"
"""What LLVM compiles for on machines of another architecture."""

ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "avx512-vpopcnt": ("x86-64-v4", ("+avx512vnni", "+avx512bitalg", "-prefer-256-bit")),
    "avx512-vnni": ("x86-64-v4", ("+avx512vnni", "-prefer-256-bit")),
    "avx-vnni": ("x86-64-v3", ("+avxvnni",)),
    "avx2": ("x86-64-v3", ()),
}
"""LLVM ``mcpu`` and ``mattr`` per family, best first."""

_AVX512_VNNI = frozenset(
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "bmi2", "fma", "f16c"}
)
_AVX2 = frozenset({"avx2", "bmi1", "bmi2", "fma", "f16c", "movbe"})

CPU_FLAGS: dict[str, frozenset[str]] = {
    "avx512-vpopcnt": _AVX512_VNNI | {"avx512_bitalg"},
    "avx512-vnni": _AVX512_VNNI,
    "avx-vnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
}
"""Flags, as Linux names them, that a CPU must have to run a family."""
