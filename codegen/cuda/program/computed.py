"""Kernels that are loops like any other here: orders, rows that are written, float linears.

Where a CPU walks through elements, threads compute each by itself: the place of an element in an order is the number of
those before it, and a row that is written is the sum of all that go there. Functions have symbolic sizes.
"""

from __future__ import annotations

from typing import Any

from ...tvm_api import PrimFunc, symbolic_dimension, te, tirx


def order(dtype: str, descending: bool) -> PrimFunc:
    """``(x, places)``: ``[A, N, B]`` and int64 ``[A, N, B]``, places along ``N``.

    Of equal elements the earlier comes first. NaN is above everything.

    Args:
        dtype: of ``x``.
        descending: the greatest comes first.
    """
    sizes = [symbolic_dimension(name) for name in ("outer", "count", "inner")]
    x = te.placeholder(sizes, dtype, "x")
    other, element = (te.reduce_axis((0, sizes[1]), name) for name in ("other", "element"))
    floats = dtype.startswith(("float", "bfloat"))

    def value(a: Any, i: Any, b: Any) -> Any:
        return tirx.Cast("int8", x[a, i, b]) if dtype == "bool" else x[a, i, b]

    def before(a: Any, i: Any, b: Any) -> Any:
        p, q = value(a, other, b), value(a, i, b)
        ahead, same = p > q if descending else p < q, tirx.EQ(p, q)
        if floats:
            # A negated comparison is another one to TVM, which of NaN would be wrong.
            above, below = (p, q) if descending else (q, p)
            ahead = tirx.any(ahead, tirx.all(tirx.isnan(above), tirx.Not(tirx.isnan(below))))
            same = tirx.any(same, tirx.all(tirx.isnan(p), tirx.isnan(q)))
        found = tirx.any(ahead, tirx.all(same, other < i))
        return te.sum(tirx.Select(found, _number(1), _number(0)), axis=other)

    ranks = te.compute(sizes, before, "ranks")

    def place(a: Any, k: Any, b: Any) -> Any:
        return te.sum(tirx.Select(tirx.EQ(ranks[a, element, b], k), element, _number(0)), axis=element)

    return te.create_prim_func([x, te.compute(sizes, place, "places")])


def scatter(dtype: str, adds: bool) -> PrimFunc:
    """``(x, places, rows, out)``: ``[N, W]``, int64 ``[P]``, ``[P, W]`` and ``[N, W]``.

    Of several rows for one place the last is left. A place outside is taken for the nearest one.

    Args:
        dtype: of ``x``, ``rows`` and ``out``.
        adds: rows are added to what is there.
    """
    count, width, writes = (symbolic_dimension(name) for name in ("count", "width", "writes"))
    x = te.placeholder((count, width), dtype, "x")
    places, rows = te.placeholder((writes,), "int64", "places"), te.placeholder((writes, width), dtype, "rows")
    write = te.reduce_axis((0, writes), "write")

    def here(n: Any) -> Any:
        return tirx.EQ(tirx.Max(tirx.Min(places[write], count - 1), _number(0)), n)

    if adds:

        def added(n: Any, w: Any) -> Any:
            return te.sum(tirx.Select(here(n), rows[write, w], tirx.const(0, dtype)), axis=write)

        total = te.compute((count, width), added, "added")
        out = te.compute((count, width), lambda n, w: x[n, w] + total[n, w], "out")
        return te.create_prim_func([x, places, rows, out])
    last = te.compute((count,), lambda n: te.max(tirx.Select(here(n), write, _number(-1)), axis=write), "last")
    out = te.compute(
        (count, width),
        lambda n, w: tirx.if_then_else(last[n] >= 0, rows[tirx.Max(last[n], _number(0)), w], x[n, w]),
        "out",
    )
    return te.create_prim_func([x, places, rows, out])


def dense(rows: int, columns: int) -> PrimFunc:
    """``(x, weight, out)``: fp32 ``[M, K]`` and ``[N, K]`` to ``x @ weight.T``, fp32 ``[M, N]``."""
    count = symbolic_dimension("count")
    x, weight = te.placeholder((count, columns), name="x"), te.placeholder((rows, columns), name="weight")
    k = te.reduce_axis((0, columns), "k")
    out = te.compute((count, rows), lambda m, n: te.sum(x[m, k] * weight[n, k], axis=k), "out")
    return te.create_prim_func([x, weight, out])


def dense_by_expert(experts: int, rows: int, columns: int) -> PrimFunc:
    """``(x, weight, offsets, out)``: as :func:`dense`, with a matrix for each expert, fp32 ``[E, N, K]``.

    Rows lie sorted by expert, and those of expert ``e`` end at ``offsets[e]``, int32 ``[E]``. What is behind those of
    the last one becomes zero.
    """
    count = symbolic_dimension("count")
    x, weight = te.placeholder((count, columns), name="x"), te.placeholder((experts, rows, columns), name="weight")
    offsets = te.placeholder((experts,), "int32", "offsets")
    k, e = te.reduce_axis((0, columns), "k"), te.reduce_axis((0, experts), "e")

    def ended(m: Any) -> Any:
        over = tirx.Cast("int64", offsets[e]) <= m
        return te.sum(tirx.Select(over, _number(1), _number(0)), axis=e)

    expert = te.compute((count,), ended, "expert")

    def product(m: Any, n: Any) -> Any:
        return te.sum(x[m, k] * weight[tirx.Min(expert[m], _number(experts - 1)), n, k], axis=k)

    total = te.compute((count, rows), product, "total")
    zero = tirx.const(0, "float32")
    out = te.compute((count, rows), lambda m, n: tirx.Select(expert[m] < experts, total[m, n], zero), "out")
    return te.create_prim_func([x, weight, offsets, out])


def _number(value: int) -> Any:
    return tirx.const(value, "int64")
