"""CUDA kernel of ``quantize_activation``: one warp a group, or one thread block a token where the token is one group.

Maxima and minima are exact in any order; everything behind them is element-wise fp32 with explicit rounding
(``__fmul_rn``, ``__fdiv_rn``, ``rintf``), so the result equals :func:`..reference.quantize_activation` bit for bit.
Values are written as ``int8 [M, pitch(K)]`` with zeros behind column ``K``, as :mod:`.dp4a` reads them.
"""

# pyright: reportInvalidTypeForm=false
# (annotations of TVMScript functions are calls)

from __future__ import annotations

from dataclasses import dataclass

from ..errors import KernelError
from ..reference import INT4_MAX, INT8_MAX, RANGE_MAX, RANGE_MIN
from ..spec import QuantizeSpec
from ..tvm_api import PrimFunc, T
from .dp4a import pitch
from .limits import WARP

ALL_LANES = 0xFFFFFFFF


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
    if spec.tabled:
        raise KernelError("CUDA kernels take activations without knees and plane scales; compile with --recipe lbllm")
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


def _scale(high, low, bits: int):
    if bits == 4:
        span = _call("fmaxf", _call("__fsub_rn", high, low), T.float32(RANGE_MIN))
        return _call("__fdiv_rn", span, T.float32(INT4_MAX))
    peak = _call("fmaxf", _call("fmaxf", high, -low), T.float32(RANGE_MIN))
    return _call("__fdiv_rn", peak, T.float32(INT8_MAX))


def _zero(low, scale, bits: int):
    if bits == 8:
        return T.float32(0)
    zero = _call("rintf", _call("__fdiv_rn", -low, scale))
    return _call("fminf", _call("fmaxf", zero, T.float32(0)), T.float32(INT4_MAX))


def _value(x, scale, zero, bits: int):
    rounded = _call("rintf", _call("__fdiv_rn", x, scale))
    if bits == 8:
        clamped = _call("fminf", _call("fmaxf", rounded, T.float32(-INT8_MAX)), T.float32(INT8_MAX))
    else:
        code = _call("fminf", _call("fmaxf", _call("__fadd_rn", rounded, zero), T.float32(0)), T.float32(INT4_MAX))
        clamped = _call("__fsub_rn", code, zero)
    return T.cast(T.call_pure_extern("int32", "__float2int_rn", clamped), "int8")


def quantize(spec: QuantizeSpec, schedule: QuantizeSchedule) -> PrimFunc:
    """The quantizer of ``spec``: per group or per token."""
    return _quantize_groups(spec, schedule) if spec.group else _quantize_token(spec, schedule)


def _quantize_groups(spec: QuantizeSpec, schedule: QuantizeSchedule) -> PrimFunc:
    k, group, bits, warps = spec.in_features, spec.group, spec.bits, schedule.warps
    width, groups = pitch(k), spec.scales
    elements, padded_groups = group // WARP, pitch(k) // group

    @T.prim_func(s_tir=True)
    def kernel(
        clip: T.Buffer((2,), "float32"),
        scale_: T.handle,
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
        size = T.alloc_buffer((1,), "float32", scope="local")
        zero = T.alloc_buffer((1,), "float32", scope="local")
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
                size[0] = _scale(bounds[0], bounds[1], bits)
                zero[0] = _zero(bounds[1], size[0], bits)
                for i in T.unroll(elements):
                    values[token, g * group + i * WARP + lane] = _value(loaded[i], size[0], zero[0], bits)
                if lane == 0 and g < groups:
                    scale[token, g] = size[0]

    return kernel


def _quantize_token(spec: QuantizeSpec, schedule: QuantizeSchedule) -> PrimFunc:
    k, bits, warps = spec.in_features, spec.bits, schedule.warps
    width, threads = pitch(k), WARP * schedule.warps
    turns = -(-width // threads)

    @T.prim_func(s_tir=True)
    def kernel(
        clip: T.Buffer((2,), "float32"),
        scale_: T.handle,
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
        size = T.alloc_buffer((1,), "float32", scope="local")
        zero = T.alloc_buffer((1,), "float32", scope="local")
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
        size[0] = _scale(bounds[0], bounds[1], bits)
        zero[0] = _zero(bounds[1], size[0], bits)
        for turn in T.serial(turns):
            column: T.let = turn * threads + warp * WARP + lane
            loaded[0] = T.float32(0)
            if column < k:
                loaded[0] = x[token, column]
            if column < width:
                values[token, column] = _value(loaded[0], size[0], zero[0], bits)
        if warp == 0 and lane == 0:
            scale[token, 0] = size[0]

    return kernel
