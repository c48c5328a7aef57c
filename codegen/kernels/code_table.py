"""Activation quantization with knees or plane scales: a table of 16 values for every group, and the entry next to each
input.

The table takes some hundred scalar operations a group. An input then meets 15 thresholds, in vectors, and no division:
the thresholds are multiplied by the scale, not the inputs divided by it. As in :mod:`.quantize`, no product is an
operand of a sum, except products and sums of integers that fp32 holds exactly, which LLVM may contract.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from typing import Any

from ..reference import CORE_CODES, INT4_MAX, INT8_MAX, PLANES, RANGE_MIN, TAIL_CODES
from ..sizes import group_count
from ..tvm_api import PrimFunc, T
from .memory import scratch
from .quantize import Ranges

CODES = CORE_CODES + 2 * TAIL_CODES


def _float(value: float) -> Any:
    return T.float32(value)


def _store_knee_table(table: Any, high: Any, low: Any, scale: Any, knees: Any) -> None:
    """The group's table, :func:`..reference.knee_table`."""
    limit, intervals = _float(INT8_MAX), _float(CORE_CODES - 1)
    top, bottom = T.Bind(high / scale), T.Bind(low / scale)
    upper, lower = T.Bind(T.min(top * knees[1], limit)), T.Bind(T.max(bottom * knees[0], -limit))
    step = T.Bind(T.max(upper - lower, _float(RANGE_MIN)) / intervals)
    zero = T.Bind(T.max(T.min(T.nearbyint(-lower / step), intervals), _float(0)))
    top, bottom = T.Bind(T.nearbyint(top)), T.Bind(T.nearbyint(bottom))
    for code in range(CORE_CODES):
        value = T.nearbyint((_float(code) - zero) * step)
        T.buffer_store(table, T.min(T.max(value, bottom), top), [TAIL_CODES + code])
    for end, inner, outward in ((bottom, TAIL_CODES, -1), (top, TAIL_CODES + CORE_CODES - 1, 1)):
        for j in range(1, TAIL_CODES + 1):
            sum_of_ends = table[inner] * _float(TAIL_CODES - j) + end * _float(j)
            T.buffer_store(table, T.nearbyint(sum_of_ends / _float(TAIL_CODES)), [inner + outward * j])


def _places(plane_scales: Any) -> Any:
    """Where codes lie, :func:`..reference.plane_places`."""
    places = scratch(CODES, "float32")
    for code in range(CODES):
        total = _float(0)
        for plane in (plane for plane in range(PLANES) if code >> plane & 1):
            total = total + plane_scales[plane]
        T.buffer_store(places, total, [code])
    return places


def _store_plane_table(table: Any, high: Any, low: Any, scale: Any, places: Any) -> None:
    """The group's table, :func:`..reference.plane_table`."""
    limit, intervals = _float(INT8_MAX), _float(INT4_MAX)
    top, bottom = T.Bind(high / scale), T.Bind(low / scale)
    step = T.Bind(T.max(top - bottom, _float(RANGE_MIN)) / intervals)
    zero = T.Bind(T.max(T.min(T.nearbyint(-bottom / step), intervals), _float(0)))
    offset = T.Bind(places[T.cast(zero, "int32")])
    for code in range(CODES):
        value = T.nearbyint((places[code] - offset) * step)
        T.buffer_store(table, T.max(T.min(value, limit), -limit), [code])


def _store_thresholds(thresholds: Any, table: Any, scale: Any) -> None:
    for code in range(CODES - 1):
        T.buffer_store(thresholds, (table[code + 1] + table[code]) * _float(0.5) * scale, [code])


def _value_of(x: Any, table: Any, thresholds: Any, lanes: int) -> Any:
    """The int8 values of a vector (or, for one lane, a scalar)."""

    def wide(value: Any) -> Any:
        return T.broadcast(value, lanes) if lanes > 1 else value

    x = T.Bind(x)
    value = wide(table[0])
    for code in range(CODES - 1):
        value = T.Bind(T.Select(x > wide(thresholds[code]), wide(table[code + 1]), value))
    suffix = f"x{lanes}" if lanes > 1 else ""
    return T.cast(T.cast(value, "int32" + suffix), "int8" + suffix)


def quantizer(columns: int, group: int, lanes: int, parallel: bool, planes: bool = False) -> PrimFunc:
    """Quantizes ``x [M, K]`` to ``values [M, K]`` and ``scale [M, G]``, by ``clip`` and what shapes its table.

    Args:
        columns: ``K``.
        group: channels per scale and table, 0 for the whole token.
        lanes: fp32 lanes of the target's vectors.
        parallel: split the tokens over the thread pool.
        planes: ``plane_scales [4]`` shape the table, else ``knees [2]``.
    """
    shapes = PLANES if planes else 2
    store_table = _store_plane_table if planes else _store_knee_table
    width = group or columns
    groups = group_count(columns, width)
    full, tail = columns // width, columns % width
    loop = T.parallel if parallel else T.serial

    def quantize_group(x, clip, shape, values, scales, ranges, table, thresholds, m, g, count) -> None:
        start = T.Bind(g * width)
        vectors, rest = count // lanes, count % lanes
        high, low = ranges.of(x, clip, m, start, count)
        scale = T.Bind(T.max(T.max(high, -low), _float(RANGE_MIN)) / _float(INT8_MAX))
        T.buffer_store(scales, scale, [m, g])
        store_table(table, high, low, scale, shape)
        _store_thresholds(thresholds, table, scale)
        with T.serial(vectors) as i:
            where = T.ramp(start + i * lanes, 1, lanes)
            T.buffer_store(values, _value_of(x[m, where], table, thresholds, lanes), [m, where])
        with T.serial(rest) as i:
            where = start + vectors * lanes + i
            T.buffer_store(values, _value_of(x[m, where], table, thresholds, 1), [m, where])

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, clip_: T.handle, shape_: T.handle, values_: T.handle, scales_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m_count = T.int32()
        x = T.match_buffer(x_, (m_count, columns), "float32", align=4)
        clip = T.match_buffer(clip_, (2,), "float32", align=4)
        given = T.match_buffer(shape_, (shapes,), "float32", align=4)
        values = T.match_buffer(values_, (m_count, columns), "int8", align=1)
        scales = T.match_buffer(scales_, (m_count, groups), "float32", align=4)
        for m in loop(m_count):
            ranges = T.meta_var(Ranges(lanes))
            shape = T.meta_var(_places(given) if planes else given)
            table = scratch(CODES, "float32")
            thresholds = scratch(CODES - 1, "float32")
            for g in T.serial(full):
                quantize_group(x, clip, shape, values, scales, ranges, table, thresholds, m, g, width)
            if tail > 0:
                quantize_group(x, clip, shape, values, scales, ranges, table, thresholds, m, full, tail)

    return kernel
