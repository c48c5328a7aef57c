"""Rows of a table, int8 or of 4-bit codes: ``float(level) * scale``, one IEEE multiplication an element."""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from ..format import TABLE_LEVELS
from ..sizes import group_count
from ..spec import EmbeddingSpec
from ..tvm_api import PrimFunc, T


def embedding(spec: EmbeddingSpec) -> PrimFunc:
    """The kernel of a look-up; an id that is no row of the table gives the nearest one's elements.

    Returns:
        ``(rows, scale, ids, out)``: int8 ``[V, K]``, fp32 ``[V]``, int64 ``[B, S]`` to fp32 ``[B, S, K]``; of 4-bit
        codes ``(codes, levels, scale, ids, out)``: uint8 ``[V, ceil(K / 2)]``, int8 ``[16]``, fp16 ``[V, G]``, the
        same.
    """
    return _of_codes(spec) if spec.group else _of_rows(spec)


def _of_rows(spec: EmbeddingSpec) -> PrimFunc:
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


def _of_codes(spec: EmbeddingSpec) -> PrimFunc:
    columns, group = spec.columns, spec.group
    groups = group_count(columns, group)

    @T.prim_func(s_tir=True)
    def kernel(codes_: T.handle, levels_: T.handle, scale_: T.handle, ids_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch = T.int32()
        length = T.int32()
        codes = T.match_buffer(codes_, (spec.rows, (columns + 1) // 2), "uint8", align=1)
        levels = T.match_buffer(levels_, (TABLE_LEVELS,), "int8", align=1)
        scale = T.match_buffer(scale_, (spec.rows, groups), "float16", align=2)
        ids = T.match_buffer(ids_, (batch, length), "int64", align=8)
        out = T.match_buffer(out_, (batch, length, columns), "float32", align=4)
        for b in T.serial(batch):
            for s in T.serial(length):
                row: T.let = T.max(T.min(ids[b, s], T.int64(spec.rows - 1)), T.int64(0))
                for k in T.serial(columns):
                    code: T.let = T.shift_right(codes[row, k // 2], T.cast(k % 2 * 4, "uint8")) & T.uint8(15)
                    level: T.let = T.cast(levels[T.cast(code, "int32")], "float32")
                    out[b, s, k] = level * T.cast(scale[row, k // group], "float32")

    return kernel
