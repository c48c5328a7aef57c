"""The kernels of a program that read rows of a table, int8 or of 4-bit codes."""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
# pyright: reportInvalidTypeForm=false
from ...format import TABLE_LEVELS
from ...sizes import group_count
from ...spec import EmbeddingSpec
from ...tvm_api import PrimFunc, T
from ..floats import multiply, signed_half_as_float

THREADS = 256


def embedding(spec: EmbeddingSpec, tokens: int) -> PrimFunc:
    """``(rows, scale, ids, out)``: int8 ``[V, K]``, fp32 ``[V]``, int64 ``[1, S]`` to fp32 ``[1, S, K]``; of 4-bit
    codes ``(codes, levels, scale, ids, out)``: uint8 ``[V, ceil(K / 2)]``, int8 ``[16]``, fp16 ``[V, G]``, the same.

    One multiplication an element. An id that is no row of the table gives the nearest one's elements.
    """
    return _of_codes(spec, tokens) if spec.group else _of_rows(spec, tokens)


def _of_rows(spec: EmbeddingSpec, tokens: int) -> PrimFunc:
    blocks = -(-spec.columns // THREADS)

    @T.prim_func(s_tir=True)
    def kernel(
        ids: T.Buffer((1, tokens), "int64"),
        out: T.Buffer((1, tokens, spec.columns), "float32"),
        rows: T.Buffer((spec.rows, spec.columns), "int8"),
        scale: T.Buffer((spec.rows,), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", tokens * blocks)
        thread = T.launch_thread("threadIdx.x", THREADS)
        token: T.let = block // blocks
        column: T.let = block % blocks * THREADS + thread
        if column < spec.columns:
            row: T.let = T.max(T.min(ids[0, token], T.int64(spec.rows - 1)), T.int64(0))
            out[0, token, column] = multiply(T.cast(rows[row, column], "float32"), scale[row])

    return kernel


def _of_codes(spec: EmbeddingSpec, tokens: int) -> PrimFunc:
    columns, blocks = spec.columns, -(-spec.columns // THREADS)

    @T.prim_func(s_tir=True)
    def kernel(
        codes: T.Buffer((spec.rows, (columns + 1) // 2), "uint8"),
        ids: T.Buffer((1, tokens), "int64"),
        levels: T.Buffer((TABLE_LEVELS,), "int8"),
        out: T.Buffer((1, tokens, columns), "float32"),
        scale: T.Buffer((spec.rows, group_count(columns, spec.group)), "uint16"),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", tokens * blocks)
        thread = T.launch_thread("threadIdx.x", THREADS)
        token: T.let = block // blocks
        column: T.let = block % blocks * THREADS + thread
        if column < columns:
            row: T.let = T.max(T.min(ids[0, token], T.int64(spec.rows - 1)), T.int64(0))
            byte: T.let = T.cast(codes[row, column // 2], "int32")
            code: T.let = T.bitwise_and(T.shift_right(byte, column % 2 * 4), 15)
            level: T.let = T.cast(levels[code], "float32")
            out[0, token, column] = multiply(level, signed_half_as_float(scale[row, column // spec.group]))

    return kernel
