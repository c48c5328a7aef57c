"""ARM targets, 64 bit: kernel family to LLVM architecture and features, and the CPU flags it needs."""

from __future__ import annotations

MACHINES = ("aarch64", "arm64")
"""The architecture, as :func:`platform.machine` names it."""

TRIPLE = "aarch64-linux-gnu"
"""What LLVM compiles for on machines of another architecture."""

ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "neon-i8mm": ("", ("+neon", "+dotprod", "+i8mm")),
    "neon-dotprod": ("", ("+neon", "+dotprod")),
}
"""LLVM ``mcpu`` and ``mattr`` per family, best first."""

CPU_FLAGS: dict[str, frozenset[str]] = {
    "neon-i8mm": frozenset({"asimd", "asimddp", "i8mm"}),
    "neon-dotprod": frozenset({"asimd", "asimddp"}),
}
"""Flags, as Linux names them, that a CPU must have to run a family."""
