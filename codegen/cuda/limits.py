"""What a multiprocessor of each architecture holds, and how many warps of a kernel that lets be there at once.

The limits are those of the table "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming
Guide (13.0); how registers and shared memory are handed out follows ``cuda_occupancy.h`` of the CUDA toolkit, which
``tests/test_cuda_bounds.py`` compiles and compares with.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 1 << 16
"""32-bit registers of a multiprocessor, and the most of a thread block."""

MOST_REGISTERS = 255
"""Of a thread."""

PARTITIONS = 4
"""Parts of a multiprocessor, each with its scheduler and its share of the registers."""

WARP = 32
"""Lanes of a warp."""

BLOCK_SHARED_BYTES = 48 << 10
"""Shared memory of a thread block that every device has without being asked for more."""

_REGISTER_UNIT = 256
"""A warp gets a multiple of so many registers."""


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds.

    Attributes:
        warps, blocks: resident at once.
        shared_bytes: shared memory.
        reserved_bytes: shared memory that the system takes of every block.
        shared_unit: a block gets a multiple of so many bytes.
    """

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024
    shared_unit: int = 128


LIMITS = {
    "sm_75": Limits(32, 16, 64 << 10, reserved_bytes=0, shared_unit=256),
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_86": Limits(48, 16, 100 << 10),
    "sm_87": Limits(48, 16, 164 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_103": Limits(64, 32, 228 << 10),
    "sm_110": Limits(48, 24, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
    "sm_121": Limits(48, 24, 100 << 10),
}
"""By architecture."""


MULTIPROCESSORS = {
    "sm_75": 72,
    "sm_80": 108,
    "sm_86": 84,
    "sm_87": 16,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_103": 148,
    "sm_110": 20,
    "sm_120": 188,
    "sm_121": 48,
}
"""By architecture: of its largest device (Titan RTX, A100, A40, Jetson AGX Orin, L40S, H200, B200, B300, Jetson Thor,
RTX PRO 6000, DGX Spark). Not checked against their datasheets: they decide how many thread blocks share work, never
what is computed."""


def resident_blocks(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """Thread blocks of a kernel that a multiprocessor holds at once.

    Args:
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block.
    """
    limits = LIMITS[arch]
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    # The hardware checks a block as if each partition had a warp of it.
    if registers > MOST_REGISTERS or of_warp * -(-warps // PARTITIONS) * PARTITIONS > REGISTERS:
        return 0
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps if of_warp else limits.blocks
    taken = -(-(shared_bytes + limits.reserved_bytes) // limits.shared_unit) * limits.shared_unit
    by_shared = limits.shared_bytes // taken if taken else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of the warps that a multiprocessor could hold which it holds of a kernel, see :func:`resident_blocks`."""
    blocks = resident_blocks(arch, threads, registers, shared_bytes)
    return blocks * -(-threads // WARP) / LIMITS[arch].warps
