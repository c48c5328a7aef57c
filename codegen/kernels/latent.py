"""The formulas of ``codegen/latent.py`` as fused kernels, one pass over the elements each.

One thread: torch's own threads are at work between these calls, and two pools on the same cores wait for each other.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
import functools
from typing import Any

from ..targets import Target
from ..tvm_api import PrimFunc, T, compile_functions
from .memory import scratch

LANES = 16
"""fp32 elements handled at once; LLVM splits them where vectors are shorter. Divides every group size."""


def _all(value: Any) -> Any:
    return T.broadcast(value, LANES)


def _lanes(start: Any) -> Any:
    return T.ramp(start, 1, LANES)


class _Unit:
    """Levels and scale of one unit, in every lane."""

    def __init__(self, levels: Any, scales: Any, u: Any):
        scale = T.Bind(scales[u])
        self.levels = [_all(T.Bind(levels[u, i])) for i in range(4)]
        self.scale = _all(scale)
        # Zero where the group is all zeros; its latents then lie on no side.
        self.reciprocal = _all(T.Bind(T.Select(scale > T.float32(0), T.float32(1) / scale, T.float32(0))))

    def middle(self, low: int, high: int) -> Any:
        return (self.levels[low] + self.levels[high]) * _all(T.float32(0.5))


def _clear(sums: Any) -> None:
    for level in range(4):
        T.buffer_store(sums, _all(T.float32(0)), [_lanes(level * LANES)])


def _add(sums: Any, level: int, values: Any) -> None:
    where = _lanes(level * LANES)
    T.buffer_store(sums, sums[where] + values, [where])


def _store(sums: Any, result: Any, u: Any) -> None:
    """Sums of the lanes, in their order, to the unit's four levels."""
    with T.serial(4) as level:
        T.buffer_store(result, T.float32(0), [u, level])
        with T.serial(LANES) as lane:
            T.buffer_store(result, result[u, level] + sums[level * LANES + lane], [u, level])


def latent_forward(group: int) -> PrimFunc:
    """``(latent, bitmap, levels, scales, out)``: the matrix of latent weights.

    ``latent``, ``bitmap``, ``out`` fp32 ``[U, group]``; ``levels`` fp32 ``[U, 4]``; ``scales`` fp32 ``[U]``.
    """

    def unit_forward(latent: Any, bitmap: Any, levels: Any, scales: Any, out: Any, u: Any) -> None:
        unit = _Unit(levels, scales, u)
        l0, l1, l2, l3 = unit.levels
        with T.serial(group // LANES) as i:
            where = _lanes(i * LANES)
            value = T.Bind(latent[u, where] * unit.reciprocal)
            inner_value = T.Select(value > unit.middle(1, 2), l2, l1)
            outer_value = T.Select(value > unit.middle(0, 3), l3, l0)
            inner = bitmap[u, where] > _all(T.float32(0.5))
            T.buffer_store(out, T.Select(inner, inner_value, outer_value) * unit.scale, [u, where])

    @T.prim_func(s_tir=True)
    def kernel(latent_: T.handle, bitmap_: T.handle, levels_: T.handle, scales_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        units = T.int32()
        latent = T.match_buffer(latent_, (units, group), "float32", align=4)
        bitmap = T.match_buffer(bitmap_, (units, group), "float32", align=4)
        levels = T.match_buffer(levels_, (units, 4), "float32", align=4)
        scales = T.match_buffer(scales_, (units,), "float32", align=4)
        out = T.match_buffer(out_, (units, group), "float32", align=4)
        for u in T.serial(units):
            unit_forward(latent, bitmap, levels, scales, out, u)

    return kernel


def latent_backward(group: int) -> PrimFunc:
    """``(grad, latent, bitmap, levels, scales, grad_latent, grad_bitmap, grad_levels)``: the gradients of
    :func:`latent_forward`, shapes as there."""

    def unit_backward(
        grad: Any,
        latent: Any,
        bitmap: Any,
        levels: Any,
        scales: Any,
        grad_latent: Any,
        grad_bitmap: Any,
        grad_levels: Any,
        sums: Any,
        u: Any,
    ) -> None:
        unit = _Unit(levels, scales, u)
        l0, l1, l2, l3 = unit.levels
        zero = _all(T.float32(0))
        _clear(sums)
        with T.serial(group // LANES) as i:
            where = _lanes(i * LANES)
            g = T.Bind(grad[u, where])
            value = T.Bind(latent[u, where] * unit.reciprocal)
            inner = bitmap[u, where] > _all(T.float32(0.5))
            inner_upper = value > unit.middle(1, 2)
            outer_upper = value > unit.middle(0, 3)
            pull = T.Select(inner_upper, l2, l1) - T.Select(outer_upper, l3, l0)
            T.buffer_store(grad_bitmap, pull * unit.scale * g, [u, where])
            middle = T.Bind(T.Select(inner, unit.middle(1, 2), unit.middle(0, 3)))
            # A pair whose levels changed places during training has a negative width.
            width = T.Bind(T.Select(inner, T.max(l2 - l1, l1 - l2), T.max(l3 - l0, l0 - l3)))
            above = T.Select(value > middle - width, g, zero)
            T.buffer_store(grad_latent, T.Select(value < middle + width, above, zero), [u, where])
            of_inner, of_outer = T.Bind(T.Select(inner, g, zero)), T.Bind(T.Select(inner, zero, g))
            _add(sums, 0, T.Select(outer_upper, zero, of_outer))
            _add(sums, 1, T.Select(inner_upper, zero, of_inner))
            _add(sums, 2, T.Select(inner_upper, of_inner, zero))
            _add(sums, 3, T.Select(outer_upper, of_outer, zero))
        _store(sums, grad_levels, u)

    @T.prim_func(s_tir=True)
    def kernel(
        grad_: T.handle,
        latent_: T.handle,
        bitmap_: T.handle,
        levels_: T.handle,
        scales_: T.handle,
        grad_latent_: T.handle,
        grad_bitmap_: T.handle,
        grad_levels_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        units = T.int32()
        grad = T.match_buffer(grad_, (units, group), "float32", align=4)
        latent = T.match_buffer(latent_, (units, group), "float32", align=4)
        bitmap = T.match_buffer(bitmap_, (units, group), "float32", align=4)
        levels = T.match_buffer(levels_, (units, 4), "float32", align=4)
        scales = T.match_buffer(scales_, (units,), "float32", align=4)
        grad_latent = T.match_buffer(grad_latent_, (units, group), "float32", align=4)
        grad_bitmap = T.match_buffer(grad_bitmap_, (units, group), "float32", align=4)
        grad_levels = T.match_buffer(grad_levels_, (units, 4), "float32", align=4)
        sums = scratch(4 * LANES, "float32")
        for u in T.serial(units):
            unit_backward(grad, latent, bitmap, levels, scales, grad_latent, grad_bitmap, grad_levels, sums, u)

    return kernel


def codes_forward(group: int) -> PrimFunc:
    """``(codes, levels, out)``: ``uint8 [U, group]`` into ``fp32 [U, 4]`` gives ``fp32 [U, group]``."""

    @T.prim_func(s_tir=True)
    def kernel(codes_: T.handle, levels_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        units = T.int32()
        codes = T.match_buffer(codes_, (units, group), "uint8", align=1)
        levels = T.match_buffer(levels_, (units, 4), "float32", align=4)
        out = T.match_buffer(out_, (units, group), "float32", align=4)
        for u in T.serial(units):
            l0, l1, l2, l3 = [_all(T.Bind(levels[u, i])) for i in range(4)]
            for i in T.serial(group // LANES):
                where = _lanes(i * LANES)
                code = T.Bind(T.cast(codes[u, where], f"int32x{LANES}"))
                low = T.Select(code == _all(0), l0, l1)
                high = T.Select(code == _all(2), l2, l3)
                out[u, where] = T.Select(code < _all(2), low, high)

    return kernel


def codes_backward(group: int) -> PrimFunc:
    """``(grad, codes, grad_levels)``: sums of ``fp32 [U, group]`` over the elements of each of four codes."""

    def add_vector(grad: Any, codes: Any, sums: Any, u: Any, i: Any) -> None:
        where = _lanes(i * LANES)
        code = T.Bind(T.cast(codes[u, where], f"int32x{LANES}"))
        g = T.Bind(grad[u, where])
        for level in range(4):
            _add(sums, level, T.Select(code == _all(level), g, _all(T.float32(0))))

    @T.prim_func(s_tir=True)
    def kernel(grad_: T.handle, codes_: T.handle, grad_levels_: T.handle):
        T.func_attr({"tirx.noalias": True})
        units = T.int32()
        grad = T.match_buffer(grad_, (units, group), "float32", align=4)
        codes = T.match_buffer(codes_, (units, group), "uint8", align=1)
        grad_levels = T.match_buffer(grad_levels_, (units, 4), "float32", align=4)
        sums = scratch(4 * LANES, "float32")
        for u in T.serial(units):
            _clear(sums)
            for i in T.serial(group // LANES):
                add_vector(grad, codes, sums, u, i)
            _store(sums, grad_levels, u)

    return kernel


@functools.cache
def latent_kernels(group: int) -> Any:
    """The four functions of this module for a group size, compiled for this machine, by name."""
    functions = (latent_forward, latent_backward, codes_forward, codes_backward)
    return compile_functions({f.__name__: f(group) for f in functions}, Target.parse("cpu").llvm)
