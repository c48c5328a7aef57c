"""Linears that stay float: fp32 dot products, in vectors along the columns.

Sums are taken in another order than torch takes them; no other kernel has to agree with this one bit for bit.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from typing import Any

from ..tvm_api import PrimFunc, T
from .memory import scratch

ROWS = 4
"""Rows of the matrix that share each load of a token."""

TOKENS = 4
"""Tokens that share each load of a row, where their number is not known to be one."""


def dense(rows: int, columns: int, lanes: int, one_token: bool) -> PrimFunc:
    """``(x, weight, out)``: fp32 ``[M, K]`` and ``[N, K]`` to ``x @ weight.T``, fp32 ``[M, N]``.

    Args:
        rows, columns: ``N`` and ``K``.
        lanes: fp32 lanes of the target's vectors.
        one_token: ``M`` is 1.
    """
    height, tokens = min(ROWS, rows), 1 if one_token else TOKENS
    whole = columns // lanes * lanes
    pairs = [(m, r) for m in range(tokens) for r in range(height)]

    def at(start: Any) -> Any:
        return T.ramp(start, 1, lanes)

    def clear(sums) -> None:
        for i in range(len(pairs)):
            T.buffer_store(sums, T.broadcast(T.float32(0), lanes), [at(i * lanes)])

    def add_products(x, weight, sums, first_token, last_token, first_row, k) -> None:
        tokens_ = [T.Bind(x[T.min(first_token + m, last_token), at(k)]) for m in range(tokens)]
        rows_ = [T.Bind(weight[first_row + r, at(k)]) for r in range(height)]
        for i, (m, r) in enumerate(pairs):
            T.buffer_store(sums, sums[at(i * lanes)] + tokens_[m] * rows_[r], [at(i * lanes)])

    def store(x, weight, sums, out, first_token, last_token, first_row) -> None:
        for i, (m, r) in enumerate(pairs):
            token = T.Bind(T.min(first_token + m, last_token))
            with T.serial(lanes - 1) as lane:
                T.buffer_store(sums, sums[i * lanes] + sums[i * lanes + lane + 1], [i * lanes])
            with T.serial(columns - whole) as k:
                product = x[token, whole + k] * weight[first_row + r, whole + k]
                T.buffer_store(sums, sums[i * lanes] + product, [i * lanes])
            T.buffer_store(out, sums[i * lanes], [token, first_row + r])

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, weight_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        count = T.int32()
        x = T.match_buffer(x_, (count, columns), "float32", align=4)
        weight = T.match_buffer(weight_, (rows, columns), "float32", align=4)
        out = T.match_buffer(out_, (count, rows), "float32", align=4)
        # The last tile of rows, and of tokens, begins or ends where the matrix does: some are computed twice.
        for tile in T.parallel((rows + height - 1) // height):
            first_row: T.let = T.min(tile * height, rows - height)
            sums = scratch(len(pairs) * lanes, "float32")
            for group in T.serial((count + tokens - 1) // tokens):
                clear(sums)
                for step in T.serial(whole // lanes):
                    add_products(x, weight, sums, group * tokens, count - 1, first_row, step * lanes)
                store(x, weight, sums, out, group * tokens, count - 1, first_row)

    return kernel
