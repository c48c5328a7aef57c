"""x86 targets: kernel family to LLVM architecture and features, and the CPU flags it needs."""

from __future__ import annotations

MACHINES = ("x86_64", "AMD64")
"""The architecture, as :func:`platform.machine` names it."""

TRIPLE = "x86_64-linux-gnu"
"""What LLVM compiles for on machines of another architecture."""

ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "avx512-amx": ("x86-64-v4", ("+avx512vnni", "+avx512bitalg", "+amx-tile", "+amx-int8", "-prefer-256-bit")),
    "avx512-vpopcnt": ("x86-64-v4", ("+avx512vnni", "+avx512bitalg", "-prefer-256-bit")),
    "avx512-vnni": ("x86-64-v4", ("+avx512vnni", "-prefer-256-bit")),
    "avx-vnni": ("x86-64-v3", ("+avxvnni",)),
    "avx2": ("x86-64-v3", ()),
}
"""LLVM ``mcpu`` and ``mattr`` per family, best first."""

ONE_TOKEN = {"avx512-amx": "avx512-vpopcnt"}
"""Families whose kernels for one token are another one's: what was measured of these holds for them."""

TILES = "amx_tile"
"""The flag of tile registers, which a process must ask for, see :func:`.host.grants_tiles`."""

_AVX512_VNNI = frozenset(
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "bmi2", "fma", "f16c"}
)
_AVX512_VPOPCNT = _AVX512_VNNI | {"avx512_bitalg"}
_AVX2 = frozenset({"avx2", "bmi1", "bmi2", "fma", "f16c", "movbe"})

CPU_FLAGS: dict[str, frozenset[str]] = {
    "avx512-amx": _AVX512_VPOPCNT | {TILES, "amx_int8"},
    "avx512-vpopcnt": _AVX512_VPOPCNT,
    "avx512-vnni": _AVX512_VNNI,
    "avx-vnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
}
"""Flags, as Linux names them, that a CPU must have to run a family."""
