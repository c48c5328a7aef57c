"""CUDA kernel of ``quantize_activation``: one warp a group, or one thread block a token where the token is one group.

Maxima and minima are exact in any order; everything behind them is element-wise fp32 with explicit rounding
(``__fmul_rn``, ``__fdiv_rn``, ``rintf``), so the result equals :func:`..reference.quantize_activation` bit for bit.
Values are written as ``int8 [M, pitch(K)]`` with zeros behind column ``K``, as :mod:`.dp4a` reads them.

With knees or plane scales a warp's lanes hold the table of its group, one entry and one threshold each, and look codes
up in each other's registers.
"""

# pyright: reportInvalidTypeForm=false
# (annotations of TVMScript functions are calls)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import KernelError
from ..reference import CORE_CODES, INT4_MAX, INT8_MAX, PLANES, RANGE_MAX, RANGE_MIN, TAIL_CODES
from ..spec import QuantizeSpec
from ..tvm_api import PrimFunc, T
from .dp4a import pitch
from .limits import WARP

ALL_LANES = 0xFFFFFFFF

CODES = CORE_CODES + 2 * TAIL_CODES
"""Entries of a table."""


@dataclass(frozen=True)
class QuantizeSchedule:
    """How a quantizer is cut.

    Attributes:
        warps: warps of a thread block; a block works on one token.
    """

    warps: int = 8


def quantize_schedules(spec: QuantizeSpec) -> list[QuantizeSchedule]:
    """Every valid schedule, the default first.

    Raises:
        KernelError: there is no CUDA kernel for ``spec``.
    """
    if spec.bits == 16:
        raise KernelError("CUDA kernels take 4-bit and 8-bit activations; compile with --act-bits 4 or 8")
    useful = -(-spec.in_features // (spec.group or 2 * WARP))
    return [QuantizeSchedule(w) for w in (8, 4, 16, 2, 1) if w <= useful] or [QuantizeSchedule(1)]


def _call(name: str, *args):
    return T.call_pure_extern("float32", name, *args)


def _warp_reduce(function: str, value, step: int):
    """Combines a lane's value with that of the lane ``step`` away."""
    other = T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), value, step, WARP, WARP)
    return _call(function, value, other)


def _high(maximum, factor):
    return _call("fminf", _call("fmaxf", _call("__fmul_rn", maximum, factor), T.float32(0)), T.float32(RANGE_MAX))


def _low(minimum, factor):
    return _call("fmaxf", _call("fminf", _call("__fmul_rn", minimum, factor), T.float32(0)), T.float32(-RANGE_MAX))


def _local(dtype: str = "float32") -> Any:
    return T.alloc_buffer((1,), dtype, scope="local")


def _set(register: Any, value: Any) -> None:
    T.buffer_store(register, value, [0])


def _of_lane(register: Any, lane: Any) -> Any:
    """What another lane of the warp has in a register."""
    return T.tvm_warp_shuffle(T.uint32(ALL_LANES), register[0], lane, WARP, WARP)


def _clamped(value: Any, low: float, high: float) -> Any:
    return _call("fminf", _call("fmaxf", value, T.float32(low)), T.float32(high))


def _integer(value: Any, dtype: str = "int32") -> Any:
    return T.cast(T.call_pure_extern("int32", "__float2int_rn", value), dtype)


def _scale_of_8_bits(high: Any, low: Any) -> Any:
    """The scale of which the larger end of a range is the greatest int8 multiple."""
    peak = _call("fmaxf", _call("fmaxf", high, -low), T.float32(RANGE_MIN))
    return _call("__fdiv_rn", peak, T.float32(INT8_MAX))


class _UniformCodes:
    """Values that are evenly spaced over a range, inside a kernel.

    Args:
        bits: 4 or 8.
    """

    def __init__(self, bits: int):
        self._bits = bits
        self.scale, self._zero = _local(), _local()

    def make(self, high: Any, low: Any, lane: Any, shape: Any) -> None:
        """Sets ``scale`` for a range; ``lane`` and ``shape`` do not matter."""
        if self._bits == 8:
            _set(self.scale, _scale_of_8_bits(high, low))
            return
        span = _call("fmaxf", _call("__fsub_rn", high, low), T.float32(RANGE_MIN))
        _set(self.scale, _call("__fdiv_rn", span, T.float32(INT4_MAX)))
        _set(self._zero, _clamped(_call("rintf", _call("__fdiv_rn", -low, self.scale[0])), 0, INT4_MAX))

    def value_of(self, x: Any) -> Any:
        """The int8 value of an input."""
        rounded = _call("rintf", _call("__fdiv_rn", x, self.scale[0]))
        if self._bits == 8:
            return _integer(_clamped(rounded, -INT8_MAX, INT8_MAX), "int8")
        code = _clamped(_call("__fadd_rn", rounded, self._zero[0]), 0, INT4_MAX)
        return _integer(_call("__fsub_rn", code, self._zero[0]), "int8")


class _TableCodes:
    """Values of a table of 16, which a warp holds twice, inside a kernel.

    Args:
        planes: plane scales shape it, else knees.
    """

    def __init__(self, planes: bool):
        self._entry_of = self._of_planes if planes else self._of_knees
        self.scale, self._entry, self._threshold, self._code = _local(), _local(), _local(), _local("int32")

    def make(self, high: Any, low: Any, lane: Any, shape: Any) -> None:
        """Makes the table of a range, and sets its ``scale``; ``shape`` is what shapes it."""
        _set(self.scale, _scale_of_8_bits(high, low))
        top, bottom = (T.Bind(_call("__fdiv_rn", end, self.scale[0])) for end in (high, low))
        _set(self._entry, self._entry_of(top, bottom, lane % CODES, shape))
        both = _call("__fadd_rn", _of_lane(self._entry, (lane + 1) % WARP), self._entry[0])
        _set(self._threshold, _call("__fmul_rn", _call("__fmul_rn", both, T.float32(0.5)), self.scale[0]))

    def value_of(self, x: Any) -> Any:
        """The int8 value of an input, which the whole warp has to ask for at once."""
        _set(self._code, T.int32(0))
        step = CODES // 2
        while step:
            threshold = T.Bind(_of_lane(self._threshold, self._code[0] + (step - 1)))
            _set(self._code, T.Select(x > threshold, self._code[0] + step, self._code[0]))
            step //= 2
        return _integer(_of_lane(self._entry, self._code[0]), "int8")

    @staticmethod
    def _of_knees(top: Any, bottom: Any, code: Any, knees: Any) -> Any:
        """An entry of :func:`..reference.knee_table`. Outside the core it lies between the core's end and the range's,
        inside at the core's."""
        upper = _call("fminf", _call("__fmul_rn", top, knees[1]), T.float32(INT8_MAX))
        lower = T.Bind(_call("fmaxf", _call("__fmul_rn", bottom, knees[0]), T.float32(-INT8_MAX)))
        span = _call("fmaxf", _call("__fsub_rn", upper, lower), T.float32(RANGE_MIN))
        step = T.Bind(_call("__fdiv_rn", span, T.float32(CORE_CODES - 1)))
        zero = _clamped(_call("rintf", _call("__fdiv_rn", -lower, step)), 0, CORE_CODES - 1)
        top, bottom = T.Bind(_call("rintf", top)), T.Bind(_call("rintf", bottom))
        place = T.cast(T.max(T.min(code - TAIL_CODES, CORE_CODES - 1), 0), "float32")
        rounded = _call("rintf", _call("__fmul_rn", _call("__fsub_rn", place, zero), step))
        core = T.Bind(_call("fminf", _call("fmaxf", rounded, bottom), top))
        outward = T.Bind(T.cast(T.max(T.max(TAIL_CODES - code, code - (TAIL_CODES + CORE_CODES - 1)), 0), "float32"))
        end = T.Select(code < TAIL_CODES, bottom, top)
        inner = _call("__fmul_rn", core, _call("__fsub_rn", T.float32(TAIL_CODES), outward))
        sum_of_ends = _call("__fadd_rn", inner, _call("__fmul_rn", end, outward))
        return _call("rintf", _call("__fdiv_rn", sum_of_ends, T.float32(TAIL_CODES)))

    @staticmethod
    def _of_planes(top: Any, bottom: Any, code: Any, plane_scales: Any) -> Any:
        """An entry of :func:`..reference.plane_table`."""
        span = _call("fmaxf", _call("__fsub_rn", top, bottom), T.float32(RANGE_MIN))
        step = T.Bind(_call("__fdiv_rn", span, T.float32(INT4_MAX)))
        zero = T.Bind(_integer(_clamped(_call("rintf", _call("__fdiv_rn", -bottom, step)), 0, INT4_MAX)))

        def place(of: Any) -> Any:
            found: Any = T.float32(0)
            for plane in range(PLANES):
                found = T.Bind(T.Select((of >> plane & 1) == 1, _call("__fadd_rn", found, plane_scales[plane]), found))
            return found

        value = _call("rintf", _call("__fmul_rn", _call("__fsub_rn", place(code), place(zero)), step))
        return _clamped(value, -INT8_MAX, INT8_MAX)


def _codes(spec: QuantizeSpec) -> _UniformCodes | _TableCodes:
    return _TableCodes(spec.planes) if spec.tabled else _UniformCodes(spec.bits)


def quantize(spec: QuantizeSpec, schedule: QuantizeSchedule) -> PrimFunc:
    """The quantizer of ``spec``, per group or per token.

    Returns:
        ``(clip, scale, shape, values, x, tokens)``: fp32 ``[2]``, fp32 ``[M, G]``, fp32 with what shapes a table (not
        read without one), int8 ``[M, pitch(K)]``, fp32 ``[M, K]``, int32.
    """
    return _quantize_groups(spec, schedule) if spec.group else _quantize_token(spec, schedule)


def _quantize_groups(spec: QuantizeSpec, schedule: QuantizeSchedule) -> PrimFunc:
    k, group, warps = spec.in_features, spec.group, schedule.warps
    width, groups = pitch(k), spec.scales
    elements, padded_groups = group // WARP, pitch(k) // group

    @T.prim_func(s_tir=True)
    def kernel(
        clip: T.Buffer((2,), "float32"),
        scale_: T.handle,
        shape: T.Buffer((spec.shape_size,), "float32"),
        values_: T.handle,
        x_: T.handle,
        tokens: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        scale = T.match_buffer(scale_, (tokens, groups), "float32")
        values = T.match_buffer(values_, (tokens, width), "int8")
        x = T.match_buffer(x_, (tokens, k), "float32")
        token = T.launch_thread("blockIdx.x", tokens)
        warp = T.launch_thread("threadIdx.y", warps)
        lane = T.launch_thread("threadIdx.x", WARP)
        loaded = T.alloc_buffer((elements,), "float32", scope="local")
        bounds = T.alloc_buffer((2,), "float32", scope="local")
        codes = T.meta_var(_codes(spec))
        for turn in T.serial(-(-padded_groups // warps)):
            g: T.let = turn * warps + warp
            if g < padded_groups:
                bounds[0] = T.float32(0)
                bounds[1] = T.float32(0)
                for i in T.unroll(elements):
                    column: T.let = g * group + i * WARP + lane
                    loaded[i] = T.float32(0)
                    if column < k:
                        loaded[i] = x[token, column]
                    bounds[0] = _call("fmaxf", bounds[0], loaded[i])
                    bounds[1] = _call("fminf", bounds[1], loaded[i])
                for step in T.unroll(5):
                    bounds[0] = _warp_reduce("fmaxf", bounds[0], 1 << step)
                    bounds[1] = _warp_reduce("fminf", bounds[1], 1 << step)
                bounds[0] = _high(bounds[0], clip[0])
                bounds[1] = _low(bounds[1], clip[1])
                codes.make(bounds[0], bounds[1], lane, shape)
                for i in T.unroll(elements):
                    values[token, g * group + i * WARP + lane] = codes.value_of(loaded[i])
                if lane == 0 and g < groups:
                    scale[token, g] = codes.scale[0]

    return kernel


def _quantize_token(spec: QuantizeSpec, schedule: QuantizeSchedule) -> PrimFunc:
    k, warps = spec.in_features, schedule.warps
    width, threads = pitch(k), WARP * schedule.warps
    turns = -(-width // threads)

    @T.prim_func(s_tir=True)
    def kernel(
        clip: T.Buffer((2,), "float32"),
        scale_: T.handle,
        shape: T.Buffer((spec.shape_size,), "float32"),
        values_: T.handle,
        x_: T.handle,
        tokens: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        scale = T.match_buffer(scale_, (tokens, 1), "float32")
        values = T.match_buffer(values_, (tokens, width), "int8")
        x = T.match_buffer(x_, (tokens, k), "float32")
        token = T.launch_thread("blockIdx.x", tokens)
        warp = T.launch_thread("threadIdx.y", warps)
        lane = T.launch_thread("threadIdx.x", WARP)
        maxima = T.alloc_buffer((warps,), "float32", scope="shared")
        minima = T.alloc_buffer((warps,), "float32", scope="shared")
        bounds = T.alloc_buffer((2,), "float32", scope="local")
        codes = T.meta_var(_codes(spec))
        loaded = T.alloc_buffer((1,), "float32", scope="local")
        bounds[0] = T.float32(0)
        bounds[1] = T.float32(0)
        for turn in T.serial(turns):
            column: T.let = turn * threads + warp * WARP + lane
            if column < k:
                bounds[0] = _call("fmaxf", bounds[0], x[token, column])
                bounds[1] = _call("fminf", bounds[1], x[token, column])
        for step in T.unroll(5):
            bounds[0] = _warp_reduce("fmaxf", bounds[0], 1 << step)
            bounds[1] = _warp_reduce("fminf", bounds[1], 1 << step)
        if lane == 0:
            maxima[warp] = bounds[0]
            minima[warp] = bounds[1]
        T.tvm_storage_sync("shared")
        for other in T.unroll(warps):
            bounds[0] = _call("fmaxf", bounds[0], maxima[other])
            bounds[1] = _call("fminf", bounds[1], minima[other])
        bounds[0] = _high(bounds[0], clip[0])
        bounds[1] = _low(bounds[1], clip[1])
        codes.make(bounds[0], bounds[1], lane, shape)
        for turn in T.serial(turns):
            column: T.let = turn * threads + warp * WARP + lane
            loaded[0] = T.float32(0)
            if column < k:
                loaded[0] = x[token, column]
            # Of a warp all columns are inside or none.
            if column < width:
                values[token, column] = codes.value_of(loaded[0])
        if warp == 0 and lane == 0:
            scale[token, 0] = codes.scale[0]

    return kernel
