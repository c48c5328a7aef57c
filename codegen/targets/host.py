"""This machine's CPU: its flags, its name and the kernel families it runs."""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
from pathlib import Path

from . import arm, generic, x86

NEEDED_FLAGS = {**x86.CPU_FLAGS, **arm.CPU_FLAGS}
"""CPU flags that a kernel family needs, the families of each architecture best first."""

TILE_REQUEST = (158, 0x1023, 18)
"""The system call that asks Linux for tile registers: ``arch_prctl``, ``ARCH_REQ_XCOMP_PERM``, and the number of the
tiles' state. It gives 0 where they are granted."""


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of ``/proc/cpuinfo``; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """CPU feature flags under Linux's names; empty where the system does not tell."""
    if platform.system() == "Darwin":
        names = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"],
            capture_output=True,
            text=True,
            errors="replace",
        )
        return frozenset(name.lower() for name in names.stdout.split())
    info = _cpuinfo()
    return frozenset(info.get("flags", info.get("Features", "")).split())


def cpu_name() -> str:
    """The CPU's marketing name with its family and model, because virtual machines give one name to several
    generations; its part number where Linux gives no name (ARM), or else the architecture."""
    info = _cpuinfo()
    if "CPU part" in info:
        return f"ARM implementer {info.get('CPU implementer', '?')} part {info['CPU part']}"
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    return name


@functools.cache
def grants_tiles() -> bool:
    """Asks the system for this CPU's tile registers, once in a process and for all its threads.

    Linux grants them to a process that asks, because they make the state of every thread 8 KB larger; without that,
    their first use ends the process.

    Returns:
        Whether it may use them.
    """
    if x86.TILES not in cpu_flags() or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(*TILE_REQUEST) == 0


@functools.cache
def families() -> tuple[str, ...]:
    """Kernel families this CPU runs, best first; the portable one is always there."""
    flags = cpu_flags()
    found = (family for family, needed in NEEDED_FLAGS.items() if needed <= flags)
    return (*(f for f in found if x86.TILES not in NEEDED_FLAGS[f] or grants_tiles()), generic.FAMILY)
