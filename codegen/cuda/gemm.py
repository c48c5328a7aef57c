"""Kernels of linears for several tokens: which there are, the one to take first first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..spec import LinearSpec
from ..tvm_api import PrimFunc
from . import dp4a, mma
from .dp4a import GemmSchedule
from .mma import MmaSchedule

ManySchedule = GemmSchedule | MmaSchedule


def gemm_schedules(spec: LinearSpec, tokens: int | None = None) -> Sequence[ManySchedule]:
    """Every valid schedule of a linear's kernels for several tokens.

    Those for tensor cores and those of :mod:`.dp4a` take turns, so that what is looked at first has both. Tensor cores
    come first from :data:`.mma.FEWEST_TOKENS` tokens on.

    Args:
        tokens: only those whose tile has so many; any number of tokens where ``None``.

    Raises:
        KernelError: there is no CUDA kernel for ``spec``.
    """
    scalar, tensor = dp4a.gemm_schedules(spec), mma.mma_schedules(spec, *(() if tokens is None else (tokens,)))
    turns = (scalar, tensor) if tokens is not None and tokens < mma.FEWEST_TOKENS else (tensor, scalar)
    found = (s for pair in itertools.zip_longest(*turns) for s in pair if s is not None)
    return [s for s in found if tokens is None or s.tokens >= tokens]


def gemm(spec: LinearSpec, schedule: ManySchedule) -> PrimFunc:
    """A linear's kernel for several tokens."""
    return mma.mma_gemm(spec, schedule) if isinstance(schedule, MmaSchedule) else dp4a.gemm(spec, schedule)
