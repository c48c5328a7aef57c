"""Rows of an int8-per-row table: ``float(row) * scale``, one IEEE multiplication an element."""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from ..spec import EmbeddingSpec
from ..tvm_api import PrimFunc, T


def embedding(spec: EmbeddingSpec) -> PrimFunc:
    """``(rows, scale, ids, out)``: int8 ``[V, K]``, fp32 ``[V]``, int64 ``[B, S]`` to fp32 ``[B, S, K]``.

    An id that is no row of the table gives the nearest one's elements.
    """

    @T.prim_func(s_tir=True)
    def kernel(rows_: T.handle, scale_: T.handle, ids_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch = T.int32()
        length = T.int32()
        rows = T.match_buffer(rows_, (spec.rows, spec.columns), "int8", align=1)
        scale = T.match_buffer(scale_, (spec.rows,), "float32", align=4)
        ids = T.match_buffer(ids_, (batch, length), "int64", align=8)
        out = T.match_buffer(out_, (batch, length, spec.columns), "float32", align=4)
        for b in T.serial(batch):
            for s in T.serial(length):
                row: T.let = T.max(T.min(ids[b, s], T.int64(spec.rows - 1)), T.int64(0))
                for k in T.serial(spec.columns):
                    out[b, s, k] = T.cast(rows[row, k], "float32") * scale[row]

    return kernel
