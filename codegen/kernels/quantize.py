"""Activation quantization: one pass for the range, one for the values, vectorized with explicit lanes.

Every operation is a plain IEEE fp32 operation in the reference's order. Nothing here multiplies and then adds, so there
is nothing for LLVM to contract.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from typing import Any

from ..reference import INT4_MAX, INT8_MAX, INT16_MAX, RANGE_MAX, RANGE_MIN
from ..sizes import group_count
from ..tvm_api import PrimFunc, T
from .memory import scratch


def _float(value: float) -> Any:
    return T.float32(value)


def _scale_of(high: Any, low: Any, bits: int) -> Any:
    if bits == 4:
        return T.max(high - low, _float(RANGE_MIN)) / _float(INT4_MAX)
    return T.max(T.max(high, -low), _float(RANGE_MIN)) / _float(INT8_MAX if bits == 8 else INT16_MAX)


def _values_of(x: Any, scale: Any, zero: Any, bits: int, lanes: int) -> Any:
    """Quantized values of a vector (or, for one lane, a scalar)."""

    def wide(value: Any) -> Any:
        return T.broadcast(value, lanes) if lanes > 1 else value

    suffix = f"x{lanes}" if lanes > 1 else ""
    rounded = T.nearbyint(x / wide(scale))
    if bits == 4:
        shifted = rounded + wide(zero)
        rounded = T.max(T.min(shifted, wide(_float(INT4_MAX))), wide(_float(0))) - wide(zero)
    else:
        limit = INT8_MAX if bits == 8 else INT16_MAX
        rounded = T.max(T.min(rounded, wide(_float(limit))), wide(_float(-limit)))
    narrow = "int16" if bits == 16 else "int8"
    return T.cast(T.cast(rounded, "int32" + suffix), narrow + suffix)


class Ranges:
    """Finds the clipped ranges of groups, inside a kernel.

    Args:
        lanes: fp32 lanes of the target's vectors.
    """

    def __init__(self, lanes: int):
        self.lanes = lanes
        self._highs, self._lows = (scratch(lanes, "float32") for _ in range(2))
        self._high, self._low = (scratch(1, "float32") for _ in range(2))

    def of(self, x: Any, clip: Any, m: Any, start: Any, count: int) -> tuple[Any, Any]:
        """``hi`` and ``lo`` of ``count`` channels of token ``m`` from ``start`` on, as the reference clips them."""
        lanes, vectors, rest = self.lanes, count // self.lanes, count % self.lanes
        highs, lows, high, low = self._highs, self._lows, self._high, self._low
        # Zero takes part in the range, as in the reference, which clamps the bounds to it.
        T.buffer_store(highs, T.broadcast(_float(0), lanes), [T.ramp(0, 1, lanes)])
        T.buffer_store(lows, T.broadcast(_float(0), lanes), [T.ramp(0, 1, lanes)])
        with T.serial(vectors) as i:
            chunk = T.Bind(x[m, T.ramp(start + i * lanes, 1, lanes)])
            T.buffer_store(highs, T.max(highs[T.ramp(0, 1, lanes)], chunk), [T.ramp(0, 1, lanes)])
            T.buffer_store(lows, T.min(lows[T.ramp(0, 1, lanes)], chunk), [T.ramp(0, 1, lanes)])
        self._reduce(highs, high, T.max)
        self._reduce(lows, low, T.min)
        with T.serial(rest) as i:
            T.buffer_store(high, T.max(high[0], x[m, start + vectors * lanes + i]), [0])
            T.buffer_store(low, T.min(low[0], x[m, start + vectors * lanes + i]), [0])
        top = T.Bind(T.min(high[0] * clip[0], _float(RANGE_MAX)))
        bottom = T.Bind(T.max(low[0] * clip[1], _float(-RANGE_MAX)))
        return top, bottom

    def _reduce(self, vector: Any, result: Any, combine: Any) -> None:
        """``result[0]``: the extreme of a vector, half against half."""
        half = self.lanes // 2
        while half > 1:
            lower, upper = (T.ramp(start, 1, half) for start in (0, half))
            T.buffer_store(vector, combine(vector[lower], vector[upper]), [lower])
            half //= 2
        T.buffer_store(result, combine(vector[0], vector[1]), [0])


def quantizer(columns: int, group: int, bits: int, lanes: int, parallel: bool) -> PrimFunc:
    """Quantizes ``x [M, K]`` to ``values [M, K]`` and ``scale [M, G]``.

    Args:
        columns: ``K``.
        group: channels per scale, 0 for the whole token.
        bits: 4, 8 or 16.
        lanes: fp32 lanes of the target's vectors.
        parallel: split the tokens over the thread pool.
    """
    width = group or columns
    groups = group_count(columns, width)
    full, tail = columns // width, columns % width
    dtype = "int16" if bits == 16 else "int8"
    loop = T.parallel if parallel else T.serial

    def quantize_group(x, clip, values, scales, ranges, m, g, count) -> None:
        start = T.Bind(g * width)
        vectors, rest = count // lanes, count % lanes
        top, bottom = ranges.of(x, clip, m, start, count)
        scale = T.Bind(_scale_of(top, bottom, bits))
        zero = T.Bind(T.min(T.nearbyint(-bottom / scale), _float(INT4_MAX)))
        T.buffer_store(scales, scale, [m, g])
        with T.serial(vectors) as i:
            where = T.ramp(start + i * lanes, 1, lanes)
            T.buffer_store(values, _values_of(x[m, where], scale, zero, bits, lanes), [m, where])
        with T.serial(rest) as i:
            where = start + vectors * lanes + i
            T.buffer_store(values, _values_of(x[m, where], scale, zero, bits, 1), [m, where])

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, clip_: T.handle, values_: T.handle, scales_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m_count = T.int32()
        x = T.match_buffer(x_, (m_count, columns), "float32", align=4)
        clip = T.match_buffer(clip_, (2,), "float32", align=4)
        values = T.match_buffer(values_, (m_count, columns), dtype, align=1)
        scales = T.match_buffer(scales_, (m_count, groups), "float32", align=4)
        for m in loop(m_count):
            ranges = T.meta_var(Ranges(lanes))
            for g in T.serial(full):
                quantize_group(x, clip, values, scales, ranges, m, g, width)
            if tail > 0:
                quantize_group(x, clip, values, scales, ranges, m, full, tail)

    return kernel
