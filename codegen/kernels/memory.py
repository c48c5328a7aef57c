"""Memory in which a kernel works while a call, or one round of a loop, lasts, and what it asks for ahead of time."""

from __future__ import annotations

import math
from typing import Any

from ..sizes import ALIGNMENT
from ..tvm_api import T, tvm_ffi

STACK_BYTES = 4 << 10
"""Most bytes of a buffer on the stack of a kernel that is called alone. Launches of many kernels, whose stack has the
buffers of all of them, keep smaller ones there (:data:`~..program.launch.STACK_BYTES`)."""


def scratch(elements: int, dtype: str) -> Any:
    """A buffer, aligned to :data:`~..sizes.ALIGNMENT` bytes, on the stack unless it is large.

    What LLVM finds on the stack it keeps in registers where it can. Whatever has another scope than TVM's default, or
    takes a kilobyte, TVM would take from its pool of workspaces, by two calls in every round of the loop around it.

    Args:
        elements: how many.
        dtype: of one element.
    """
    size = tvm_ffi.dtype(dtype).itemsize
    if elements * size > STACK_BYTES:
        return T.alloc_buffer((elements,), dtype)
    # A buffer of vectors is aligned to their size, one of scalars to 16 bytes.
    lanes = ALIGNMENT // size
    kept = {"disable_lower_builtin": True}
    vectors = T.alloc_buffer((math.ceil(elements / lanes),), f"{dtype}x{lanes}", annotations=kept)
    return T.decl_buffer((elements,), dtype, data=vectors.data)


def prefetch_line(buffer: Any, *place: Any) -> None:
    """Asks for the cache line of an element."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[place]), 0, 3, 1))
