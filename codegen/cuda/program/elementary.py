"""The kernel of a program that reads rows of an int8 table."""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
# pyright: reportInvalidTypeForm=false
from ...spec import EmbeddingSpec
from ...tvm_api import PrimFunc, T

THREADS = 256


def embedding(spec: EmbeddingSpec, tokens: int) -> PrimFunc:
    """``(rows, scale, ids, out)``: int8 ``[V, K]``, fp32 ``[V]``, int64 ``[1, S]`` to fp32 ``[1, S, K]``.

    One multiplication an element. An id that is no row of the table gives the nearest one's elements.
    """
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
            out[0, token, column] = T.call_pure_extern(
                "float32", "__fmul_rn", T.cast(rows[row, column], "float32"), scale[row]
            )

    return kernel
