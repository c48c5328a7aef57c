"""Kernels of linears for several tokens: which there are, the one to take first first."""

from __future__ import annotations

from collections.abc import Sequence

from ..spec import LinearSpec
from ..tvm_api import PrimFunc
from . import dp4a, mma
from .dp4a import DEFAULT_TILE, GemmSchedule
from .mma import MmaSchedule

ManySchedule = GemmSchedule | MmaSchedule


def gemm_schedules(spec: LinearSpec, tokens: int | None = None) -> Sequence[ManySchedule]:
    """Every valid schedule of a linear's kernels for several tokens: those for tensor cores, and behind all of them
    those of :mod:`.dp4a`, so that what spills has other tiles of tensor cores first.

    Args:
        tokens: only those whose tile has so many; tiles of any size, that of 64 tokens first, where ``None``.

    Raises:
        KernelError: there is no CUDA kernel for ``spec``.
    """
    wanted = DEFAULT_TILE if tokens is None else tokens
    found = [*mma.mma_schedules(spec, wanted), *dp4a.gemm_schedules(spec, wanted)]
    return [s for s in found if tokens is None or s.tokens >= tokens]


def gemm(spec: LinearSpec, schedule: ManySchedule) -> PrimFunc:
    """A linear's kernel for several tokens."""
    return mma.mma_gemm(spec, schedule) if isinstance(schedule, MmaSchedule) else dp4a.gemm(spec, schedule)
