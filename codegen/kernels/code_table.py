"""Activation quantization with knees or plane scales: a table of 16 values for every group, and the entry next to each
input.

The tables of :data:`TOGETHER` groups of a token are made at once, a lane for each, because one takes some hundred
operations that wait for one another. An input then meets 15 thresholds, in vectors too, and no division: the thresholds
are multiplied by the scale, not the inputs divided by it. As in :mod:`.quantize`, no product is an operand of a sum,
except products and sums of integers that fp32 holds exactly, which LLVM may contract.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from typing import Any

from ..reference import CORE_CODES, INT4_MAX, INT8_MAX, PLANES, RANGE_MIN, TAIL_CODES
from ..sizes import group_count
from ..tvm_api import PrimFunc, T
from .memory import scratch
from .quantize import Ranges

CODES = CORE_CODES + 2 * TAIL_CODES

TOGETHER = 16
"""Groups whose tables are made at once."""


def _float(value: float) -> Any:
    return T.float32(value)


def _wide(value: Any) -> Any:
    return T.broadcast(value, TOGETHER)


def _number(value: float) -> Any:
    return _wide(_float(value))


def _knee_tables(high: Any, low: Any, scale: Any, knees: Any) -> list[Any]:
    """The entries of the groups' tables by code, :func:`..reference.knee_table`."""
    top, bottom = T.Bind(high / scale), T.Bind(low / scale)
    upper = T.Bind(T.min(top * _wide(knees[1]), _number(INT8_MAX)))
    lower = T.Bind(T.max(bottom * _wide(knees[0]), _number(-INT8_MAX)))
    step = T.Bind(T.max(upper - lower, _number(RANGE_MIN)) / _number(CORE_CODES - 1))
    zero = T.Bind(T.max(T.min(T.nearbyint(_number(0) - lower / step), _number(CORE_CODES - 1)), _number(0)))
    top, bottom = T.Bind(T.nearbyint(top)), T.Bind(T.nearbyint(bottom))
    core = [T.Bind(T.min(T.max(T.nearbyint((_number(code) - zero) * step), bottom), top)) for code in range(CORE_CODES)]

    def tail(inner: Any, end: Any, outward: int) -> Any:
        sum_of_ends = inner * _number(TAIL_CODES - outward) + end * _number(outward)
        return T.Bind(T.nearbyint(sum_of_ends / _number(TAIL_CODES)))

    below = [tail(core[0], bottom, outward) for outward in range(TAIL_CODES, 0, -1)]
    return [*below, *core, *(tail(core[-1], top, outward) for outward in range(1, TAIL_CODES + 1))]


def _plane_tables(high: Any, low: Any, scale: Any, plane_scales: Any) -> list[Any]:
    """The entries of the groups' tables by code, :func:`..reference.plane_table`."""
    top, bottom = T.Bind(high / scale), T.Bind(low / scale)
    step = T.Bind(T.max(top - bottom, _number(RANGE_MIN)) / _number(INT4_MAX))
    nearest = T.nearbyint(_number(0) - bottom / step)
    zero = T.Bind(T.cast(T.max(T.min(nearest, _number(INT4_MAX)), _number(0)), f"int32x{TOGETHER}"))
    # The place of the code of zero, summed up as the others are, without a look-up for every lane.
    offset = _number(0)
    for plane in range(PLANES):
        has = (zero >> _wide(T.int32(plane)) & _wide(T.int32(1))) == _wide(T.int32(1))
        offset = T.Bind(T.Select(has, offset + _wide(plane_scales[plane]), offset))
    entries = []
    for code in range(CODES):
        place = _float(0)
        for plane in (plane for plane in range(PLANES) if code >> plane & 1):
            place = place + plane_scales[plane]
        value = T.nearbyint((_wide(place) - offset) * step)
        entries.append(T.Bind(T.max(T.min(value, _number(INT8_MAX)), _number(-INT8_MAX))))
    return entries


class _Tables:
    """Tables of up to :data:`TOGETHER` groups, inside a kernel.

    Args:
        planes: plane scales shape them, else knees.
    """

    def __init__(self, planes: bool):
        self._make = _plane_tables if planes else _knee_tables
        self._lanes = T.ramp(0, 1, TOGETHER)
        self.highs, self.lows, self.scales = (scratch(TOGETHER, "float32") for _ in range(3))
        self._entries = scratch(CODES * TOGETHER, "float32")
        self._thresholds = scratch((CODES - 1) * TOGETHER, "float32")

    def clear(self) -> None:
        """Lanes without a group have an empty range."""
        for ends in (self.highs, self.lows):
            T.buffer_store(ends, _number(0), [self._lanes])

    def make(self, shape: Any) -> None:
        """Makes the tables of the ranges in ``highs`` and ``lows``, and their ``scales``."""
        high, low = T.Bind(self.highs[self._lanes]), T.Bind(self.lows[self._lanes])
        largest = T.max(T.max(high, _number(0) - low), _number(RANGE_MIN))
        scale = T.Bind(largest / _number(INT8_MAX))
        T.buffer_store(self.scales, scale, [self._lanes])
        entries = self._make(high, low, scale, shape)
        for code, entry in enumerate(entries):
            T.buffer_store(self._entries, entry, [T.ramp(code * TOGETHER, 1, TOGETHER)])
        for code in range(CODES - 1):
            middle = (entries[code + 1] + entries[code]) * _number(0.5) * scale
            T.buffer_store(self._thresholds, middle, [T.ramp(code * TOGETHER, 1, TOGETHER)])

    def value_of(self, x: Any, group: Any, lanes: int) -> Any:
        """The int8 values of a vector (or, for one lane, a scalar) of the group in one of the lanes."""

        def of_code(buffer: Any, code: int) -> Any:
            value = buffer[code * TOGETHER + group]
            return T.broadcast(value, lanes) if lanes > 1 else value

        x = T.Bind(x)
        value = of_code(self._entries, 0)
        for code in range(CODES - 1):
            above = of_code(self._entries, code + 1)
            value = T.Bind(T.Select(x > of_code(self._thresholds, code), above, value))
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
    width = group or columns
    groups = group_count(columns, width)
    full, tail = columns // width, columns % width
    loop = T.parallel if parallel else T.serial

    def quantize_groups(x, clip, shape, values, scales, ranges, tables, m, first, together, count) -> None:
        """``together`` groups of ``count`` channels, from group ``first`` on."""
        vectors, rest = count // lanes, count % lanes
        tables.clear()
        with T.serial(together) as g:
            high, low = ranges.of(x, clip, m, (first + g) * width, count)
            T.buffer_store(tables.highs, high, [g])
            T.buffer_store(tables.lows, low, [g])
        tables.make(shape)
        with T.serial(together) as g:
            start = T.Bind((first + g) * width)
            T.buffer_store(scales, tables.scales[g], [m, first + g])
            with T.serial(vectors) as i:
                where = T.ramp(start + i * lanes, 1, lanes)
                T.buffer_store(values, tables.value_of(x[m, where], g, lanes), [m, where])
            with T.serial(rest) as i:
                where = start + vectors * lanes + i
                T.buffer_store(values, tables.value_of(x[m, where], g, 1), [m, where])

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, clip_: T.handle, shape_: T.handle, values_: T.handle, scales_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m_count = T.int32()
        x = T.match_buffer(x_, (m_count, columns), "float32", align=4)
        clip = T.match_buffer(clip_, (2,), "float32", align=4)
        shape = T.match_buffer(shape_, (shapes,), "float32", align=4)
        values = T.match_buffer(values_, (m_count, columns), "int8", align=1)
        scales = T.match_buffer(scales_, (m_count, groups), "float32", align=4)
        for m in loop(m_count):
            ranges = T.meta_var(Ranges(lanes))
            tables = T.meta_var(_Tables(planes))
            for c in T.serial(full // TOGETHER):
                quantize_groups(x, clip, shape, values, scales, ranges, tables, m, c * TOGETHER, TOGETHER, width)
            if full % TOGETHER > 0:
                first = T.meta_var(full - full % TOGETHER)
                quantize_groups(x, clip, shape, values, scales, ranges, tables, m, first, full % TOGETHER, width)
            if tail > 0:
                quantize_groups(x, clip, shape, values, scales, ranges, tables, m, full, 1, tail)

    return kernel
