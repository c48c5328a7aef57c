"""Rows of a tensor that are replaced, or added to, where places say."""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from ..tvm_api import PrimFunc, T

COLUMNS = 64
"""Columns that a thread writes at a time."""


def scatter(dtype: str, adds: bool, parallel: bool) -> PrimFunc:
    """``(x, places, rows, out)``: ``[N, W]``, int64 ``[P]``, ``[P, W]`` and ``[N, W]``.

    Rows are written in ascending order, so of several for one place the last one is left. A place outside is taken for
    the nearest one.

    Args:
        dtype: of ``x``, ``rows`` and ``out``.
        adds: rows are added to what is there.
        parallel: shares columns out among the threads.
    """
    loop = T.parallel if parallel else T.serial

    def written(old, new):
        return old + new if adds else new

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, places_: T.handle, rows_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        count = T.int32()
        width = T.int32()
        writes = T.int32()
        x = T.match_buffer(x_, (count, width), dtype)
        places = T.match_buffer(places_, (writes,), "int64")
        rows = T.match_buffer(rows_, (writes, width), dtype)
        out = T.match_buffer(out_, (count, width), dtype)
        for part in loop((width + COLUMNS - 1) // COLUMNS):
            first: T.let = part * COLUMNS
            columns: T.let = T.min(COLUMNS, width - first)
            for row in T.serial(count):
                for column in T.serial(columns):
                    out[row, first + column] = x[row, first + column]
            for i in T.serial(writes):
                row: T.let = T.cast(T.max(T.min(places[i], T.cast(count - 1, "int64")), T.int64(0)), "int32")
                for column in T.serial(columns):
                    out[row, first + column] = written(out[row, first + column], rows[i, first + column])

    return kernel
