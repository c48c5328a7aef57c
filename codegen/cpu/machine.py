"""A compiled program in this machine's memory."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import tvm_runtime
from ..sizes import ALIGNMENT


class CpuMachine:
    """A program that TVM's virtual machine runs on arrays. Implements :class:`..backend.Machine`.

    Args:
        file: the shared library of a program.

    Raises:
        KernelError: TVM's runtime or the library cannot be loaded.
    """

    def __init__(self, file: Path):
        self._machine = tvm_runtime.Machine(file)

    def function(self, name: str) -> Callable[..., Any]:
        return self._machine.function(name)

    def tensor(self, array: np.ndarray) -> Any:
        return self._machine.tensor(array)

    def tuple(self, arrays: Sequence[np.ndarray]) -> Any:
        return self._machine.tuple(arrays)

    def array(self, tensor: Any) -> np.ndarray:
        return tvm_runtime.array(tensor)

    def zeros(self, size: int) -> np.ndarray:
        return aligned(size)

    def mapped(self, file: Path) -> np.ndarray:
        """A file's bytes, mapped; asks for large pages."""
        # Copy on write: the kernels' interface wants memory that could be written.
        with file.open("rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(mapping, np.uint8)


def aligned(size: int) -> np.ndarray:
    """``size`` zero bytes at an aligned address."""
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]
