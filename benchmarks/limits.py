"""Python's side of ``limits.c``: compiled on first use, checked against the reference, timed in the same process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.targets import host
from lbllm_compile.codegen.threads import thread_count
from torch import Tensor

SOURCE = Path(__file__).with_name("limits.c")
FLAGS = ("-O3", "-march=native", "-pthread", "-shared", "-fPIC")
NEEDED = frozenset({"avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bitalg"})
"""CPU features the twins are written for."""

KERNELS = {"lut8": 0, "popcount": 1, "gemm": 2}
GROUPS = (64, 128)
"""Groups the twins take."""

PREFETCHES = (0, 1024, 3072, 6144)
"""Prefetch distances to try, in bytes."""

HOT_BYTES = 8 << 20
"""What the read bandwidth is measured over where caches help: more than an L2, less than an L3 holds."""

COLD_BYTES = 1 << 30
"""The same where they do not."""


def missing() -> str:
    """Why there are no limits on this machine, empty if there are."""
    lacks = NEEDED - host.cpu_flags()
    if lacks:
        return f"the C twins need {', '.join(sorted(lacks))}"
    return "" if shutil.which("cc") else "no C compiler (cc) was found"


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled twins, their threads started.

    Raises:
        LbllmError: they cannot be compiled here.
    """
    if why := missing():
        raise LbllmError(why)
    source = SOURCE.read_bytes()
    digest = hashlib.sha256(source + " ".join((*FLAGS, host.cpu_name())).encode()).hexdigest()[:16]
    built = cache_directory() / "benchmarks" / f"limits-{digest}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        fresh = built.with_suffix(f".{os.getpid()}")
        done = subprocess.run(["cc", *FLAGS, "-o", fresh, SOURCE], capture_output=True, text=True)
        if done.returncode:
            raise LbllmError(f"cc cannot compile {SOURCE.name}: {done.stderr.strip()[-500:]}")
        fresh.replace(built)
    loaded = ctypes.CDLL(str(built))
    loaded.limits_bandwidth.restype = loaded.limits_dot_peak.restype = ctypes.c_double
    loaded.limits_start(thread_count())
    return loaded


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def times(
    kernel: str,
    group: int,
    values: Tensor,
    x_scale: Tensor,
    packed: Sequence[Tensor],
    out: Tensor,
    calls: int,
    prefetch: int,
) -> list[float]:
    """Seconds of each of ``calls`` calls of a twin, over the copies in ``packed`` in turn.

    Args:
        kernel: one of :data:`KERNELS`.
        group: one of :data:`GROUPS`.
        values: int8 ``[M, K]``; ``M`` is 1 but for ``"gemm"``.
        x_scale: fp32 ``[M, K / group]``.
        packed: weights as the family's :meth:`pack` gives them (lut8's for ``"gemm"``).
        out: fp32 ``[M, N]``.
        calls: how many.
        prefetch: distance in bytes, 0 for none; ``"gemm"`` ignores it.

    Raises:
        LbllmError: the twin does not take this shape.
    """
    (m, k), n = values.shape, out.shape[1]
    found = (ctypes.c_double * calls)()
    copies = (ctypes.c_void_p * len(packed))(*(p.data_ptr() for p in packed))
    status = library().limits_time(
        KERNELS[kernel], n, k, group, m, prefetch, _pointer(values), _pointer(x_scale), copies, len(packed),
        _pointer(out), calls, found,
    )  # fmt: skip
    if status:
        raise LbllmError(f"the C twins take groups of {GROUPS} that divide the columns and rows in 32s, not {n}x{k}")
    return list(found)


def bandwidth(cold: bool) -> float:
    """Bytes per second that all threads together read, from DRAM or from the last-level cache."""
    size = COLD_BYTES if cold else HOT_BYTES
    buffer = torch.ones(size + 64, dtype=torch.uint8)
    start = ctypes.c_void_p(-(-buffer.data_ptr() // 64) * 64)
    repeats = 2 if cold else 64
    rates = [library().limits_bandwidth(start, ctypes.c_size_t(size), repeats) for _ in range(4)]
    return max(rates)


def dot_peak() -> float:
    """8-bit multiply-adds per second of all threads together."""
    return max(library().limits_dot_peak(ctypes.c_long(2_000_000)) for _ in range(3))
