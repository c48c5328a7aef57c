"""Orders: places of elements from the smallest to the greatest, by merging ordered runs of twice the length each time.

Of equal elements the earlier comes first. NaN is above everything, as in torch.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from typing import Any

from ..tvm_api import PrimFunc, T
from .memory import scratch

DOUBLINGS = 31
"""Runs get longer so many times at most: kernels count elements in 32 bits."""


def order(dtype: str, descending: bool, parallel: bool) -> PrimFunc:
    """``(x, places)``: ``[A, N, B]`` and int64 ``[A, N, B]``, places along ``N``.

    Args:
        dtype: of ``x``.
        descending: the greatest comes first.
        parallel: shares out what is ordered among the threads.
    """
    loop = T.parallel if parallel else T.serial
    kind, floats = "int8" if dtype == "bool" else dtype, dtype.startswith(("float", "bfloat"))

    def comes_before(p: Any, q: Any) -> Any:
        """Whether an element must stand before another one, whichever comes first."""
        ahead = p > q if descending else p < q
        if not floats:
            return ahead
        first, second = (p, q) if descending else (q, p)
        return T.Or(ahead, T.And(T.isnan(first), T.Not(T.isnan(second))))

    def merge(x, here, there, left, right, a, b, first, middle, end, last) -> None:
        """Merges two ordered runs, ``here[first:middle]`` and ``here[middle:end]``, into ``there``."""
        T.buffer_store(left, first, [0])
        T.buffer_store(right, middle, [0])
        with T.serial(end - first) as k:
            i, j = T.Bind(here[T.min(left[0], last)]), T.Bind(here[T.min(right[0], last)])
            p, q = (T.Bind(T.cast(x[a, place, b], kind)) for place in (i, j))
            take_right = T.And(right[0] < end, T.Or(left[0] >= middle, comes_before(q, p)))
            with T.If(take_right):
                with T.Then():
                    T.buffer_store(there, j, [first + k])
                    T.buffer_store(right, right[0] + 1, [0])
                with T.Else():
                    T.buffer_store(there, i, [first + k])
                    T.buffer_store(left, left[0] + 1, [0])

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, places_: T.handle):
        T.func_attr({"tirx.noalias": True})
        outer = T.int32()
        count = T.int32()
        inner = T.int32()
        x = T.match_buffer(x_, (outer, count, inner), dtype)
        places = T.match_buffer(places_, (outer, count, inner), "int64")
        # A function of one tensor that gives one is looked at as if it might be a reshape, which takes a block.
        with T.sblock("root"):
            for line in loop(outer * inner):
                a: T.let = line // inner
                b: T.let = line % inner
                here = T.alloc_buffer((count,), "int32")
                there = T.alloc_buffer((count,), "int32")
                left = scratch(1, "int32")
                right = scratch(1, "int32")
                for i in T.serial(count):
                    here[i] = i
                for doubling in T.serial(DOUBLINGS):
                    if T.shift_left(T.int32(1), doubling) < count:
                        width: T.let = T.shift_left(T.int32(1), doubling)
                        for run in T.serial((count + width - 1) // width // 2):
                            first: T.let = run * 2 * width
                            middle: T.let = first + width
                            end: T.let = T.min(middle + width, count)
                            merge(x, here, there, left, right, a, b, first, middle, end, count - 1)
                            for i in T.serial(end - first):
                                here[first + i] = there[first + i]
                for i in T.serial(count):
                    places[a, i, b] = T.cast(here[i], "int64")

    return kernel
