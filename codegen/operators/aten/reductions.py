"""Operators that make one element of many, or order many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Translation, Translator, Value, refusal
from .elementwise import is_nan, truth
from .indexing import inside
from .promotion import cast, dtype_of, name_of, tensor
from .shapes import axis_of, count

_aten = torch.ops.aten


def _axes(t: Translator, a: Arguments) -> list[int]:
    """The dimensions that go; all where none is named."""
    given = a.dim if "dim" in a else None
    if given is None or given == []:
        return list(range(len(t.shape(a.self))))
    return [axis_of(t, a.self, d) for d in ([given] if isinstance(given, int) else given)]


def _keeps(a: Arguments) -> bool:
    return bool(a.keepdim) if "keepdim" in a else False


def _reduced(t: Translator, a: Arguments, name: str, x: Value) -> Value:
    axes = _axes(t, a)
    return t.emit(getattr(t.op, name)(x, axes, _keeps(a))) if t.shape(x) else x


def _summand(t: Translator, a: Arguments) -> Value:
    """What is summed: integers in 64 bits, or what the caller asks for."""
    x = a.self
    if a.dtype is not None:
        return cast(t, x, name_of(a.dtype))
    return x if dtype_of(t.dtype(x)).is_floating_point else cast(t, x, "int64")


def _sum(t: Translator, a: Arguments) -> Value:
    return _reduced(t, a, "sum", _summand(t, a))


def _mean(t: Translator, a: Arguments) -> Value:
    x, axes = a.graph.self, _axes(t, a)
    last = axes == [len(t.shape(a.self)) - 1]
    if last and _keeps(a) and getattr(x, "target", None) is _aten.pow.Tensor_Scalar and a.dtype is None:
        power = Arguments(x)
        if power.exponent == 2:
            return t.mean_of_squares(t.value(power.self))
    return _reduced(t, a, "mean", _summand(t, a))


def _variance(t: Translator, a: Arguments) -> Value:
    x, axes, op = a.self, _axes(t, a), t.op
    sizes, kind = t.shape(x), t.dtype(x)
    mean = t.emit(op.mean(x, axes, True))
    off = t.emit(op.subtract(x, mean))
    total = t.emit(op.sum(op.multiply(off, off), axes, _keeps(a)))
    correction = 1 if a.correction is None else a.correction
    freedom = op.subtract(tensor(t, count([sizes[k] for k in axes]), kind), tensor(t, correction, kind))
    return t.emit(op.divide(total, op.maximum(freedom, tensor(t, 0, kind))))


def _most(t: Translator, name: str, x: Value, axes: list[int], keeps: bool) -> Value:
    """The greatest or the smallest elements, and NaN where one of them is.

    TVM's reduction takes NaN for less and more than any number, and begins with the last finite one, so that of
    infinities alone it gives what none of them is.
    """
    kind = t.dtype(x)
    number = cast(t, x, "int8") if kind == "bool" else x
    best = t.emit(getattr(t.op, name)(number, axes, True))
    if dtype_of(kind).is_floating_point:
        infinity = t.variable(tensor(t, -math.inf if name == "max" else math.inf, kind))
        unknown, reached = (
            cast(t, t.emit(t.op.max(cast(t, t.emit(where), "int8"), axes, True)), "bool")
            for where in (is_nan(t, x), t.op.equal(x, best))
        )
        best = t.emit(t.op.where(reached, best, infinity))
        best = t.emit(t.op.where(unknown, t.variable(tensor(t, math.nan, kind)), best))
    return cast(t, best if keeps else t.emit(t.op.squeeze(best, axes)), kind)


def _extreme(name: str) -> Translation:
    """The greatest or the smallest elements."""
    return lambda t, a: _most(t, name, a.self, _axes(t, a), _keeps(a)) if t.shape(a.self) else a.self


def _extreme_and_place(name: str) -> Translation:
    return lambda t, a: [_extreme(name)(t, a), _place(name)(t, a)]


def _place(name: str) -> Translation:
    """Where the greatest or the smallest element stands: the first of several, and of NaN where there is one."""

    def translate(t: Translator, a: Arguments) -> Value:
        x, shape = a.self, t.shape(a.self)
        if a.dim is None or not shape:
            x = t.reshape(x, [count(shape)])
        axis = 0 if a.dim is None else axis_of(t, a.self, a.dim)
        best = _most(t, name, x, [axis], True)
        here = t.emit(t.op.logical_or(t.op.equal(x, best), is_nan(t, x)))
        sizes = t.shape(best)

        def first(v: Any) -> Any:
            k = t.te.reduce_axis((0, v.shape[axis]), "k")
            behind = t.tir.const(1 << 62, "int64")

            def place(*i: Any) -> Any:
                where = v[(*i[:axis], k, *i[axis + 1 :])]
                return t.te.min(t.tir.Select(where, t.tir.Cast("int64", k), behind), axis=k)

            return place

        places = t.compute(sizes, first, here)
        if a.keepdim and shape:
            return places if a.dim is not None else t.reshape(places, [1] * len(shape))
        return t.reshape(places, [] if a.dim is None else [*sizes[:axis], *sizes[axis + 1 :]])

    return translate


def _some(name: str) -> Translation:
    """Whether any or all elements are not zero."""

    def translate(t: Translator, a: Arguments) -> Value:
        return cast(t, _reduced(t, a, name, cast(t, t.emit(truth(t, a.self)), "int8")), "bool")

    return translate


def _normalized(name: str) -> Translation:
    """Exponentials of elements over their sum, or its logarithm."""

    def translate(t: Translator, a: Arguments) -> Value:
        x, op = a.self, t.op
        if "dtype" in a and a.dtype is not None:
            x = cast(t, x, name_of(a.dtype))
        if not dtype_of(t.dtype(x)).is_floating_point or not t.shape(x):
            raise refusal(a, "a softmax of this kind has no translation")
        axis = [axis_of(t, x, a.dim)]
        off = t.emit(op.subtract(x, op.max(x, axis, True)))
        power = t.emit(op.exp(off))
        total = t.emit(op.sum(power, axis, True))
        return t.emit(op.divide(power, total) if name == "softmax" else op.subtract(off, op.log(total)))

    return translate


def _running_sum(t: Translator, a: Arguments) -> Value:
    x = _summand(t, a)
    sizes = t.shape(x)
    if not sizes:
        return x
    axis, zero = axis_of(t, x, a.dim), t.tir.const(0, t.dtype(x))

    def element(v: Any) -> Any:
        k = t.te.reduce_axis((0, v.shape[axis]), "k")

        def total(*i: Any) -> Any:
            return t.te.sum(t.tir.Select(k <= i[axis], v[(*i[:axis], k, *i[axis + 1 :])], zero), axis=k)

        return total

    return t.compute(sizes, element, x)


def _ordered(t: Translator, x: Value, axis: int, first: Any, descending: bool) -> list[Value]:
    """The ``first`` elements in order and their places; of equal ones the earlier comes first."""
    sizes = t.shape(x)
    shape = [*sizes[:axis], first, *sizes[axis + 1 :]]
    lines = [count(sizes[:axis]), sizes[axis], count(sizes[axis + 1 :])]
    kernel = t.kernels.order(t.dtype(x), descending, parallel=t.rows is None)
    order = t.reshape(t.call(kernel, [t.reshape(x, lines)], (lines, "int64")), sizes)

    def value(v: Any, places: Any) -> Any:
        return lambda *i: v[(*i[:axis], inside(t, places[i], v.shape[axis]), *i[axis + 1 :])]

    places = order if first is sizes[axis] else t.compute(shape, lambda v: lambda *i: v[i], order)
    return [t.compute(shape, value, x, places), places]


def _top(t: Translator, a: Arguments) -> list[Value]:
    x = a.self
    axis = axis_of(t, x, a.dim)
    if not t.shape(x) or not (t.surely(t.shape(x)[axis] >= a.k) and t.surely(a.k >= 0)):
        raise refusal(a, "a selection of more elements than there surely are has no translation")
    return _ordered(t, x, axis, a.k, a.largest)


def _sort(t: Translator, a: Arguments) -> list[Value]:
    x = a.self
    if not t.shape(x):
        raise refusal(a, "an order of a tensor without dimensions has no translation")
    axis = axis_of(t, x, a.dim)
    return _ordered(t, x, axis, t.shape(x)[axis], a.descending)


def _histogram(t: Translator, a: Arguments) -> Value:
    x, low, high, bins = a.self, a.min, a.max, a.bins
    kind = t.dtype(x)
    if not dtype_of(kind).is_floating_point:
        raise refusal(a, "a histogram of integers has no translation")
    if low == high:
        raise refusal(a, "a histogram over the range of its elements has no translation")
    size = count(t.shape(x))

    def element(v: Any) -> Any:
        k = t.te.reduce_axis((0, v.shape[0]), "k")
        first, last, number = (t.tir.const(float(n), kind) for n in (low, high, bins))
        zero, one = (t.tir.const(n, kind) for n in (0, 1))

        def counted(i: Any) -> Any:
            where = t.tir.Cast("int64", (v[k] - first) * number / (last - first))
            here = t.tir.all(v[k] >= first, v[k] <= last, t.tir.min(where, bins - 1) == i)
            return t.te.sum(t.tir.Select(here, one, zero), axis=k)

        return counted

    return t.compute((bins,), element, t.reshape(x, [size]))


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.default: _mean,
    _aten.mean.dim: _mean,
    _aten.var.correction: _variance,
    _aten.amax.default: _extreme("max"),
    _aten.amin.default: _extreme("min"),
    _aten.max.default: _extreme("max"),
    _aten.min.default: _extreme("min"),
    _aten.max.dim: _extreme_and_place("max"),
    _aten.min.dim: _extreme_and_place("min"),
    _aten.argmax.default: _place("max"),
    _aten.argmin.default: _place("min"),
    _aten.any.default: _some("max"),
    _aten.any.dim: _some("max"),
    _aten.all.default: _some("min"),
    _aten.all.dim: _some("min"),
    _aten.softmax.int: _normalized("softmax"),
    _aten._softmax.default: _normalized("softmax"),
    _aten.log_softmax.int: _normalized("log_softmax"),
    _aten._log_softmax.default: _normalized("log_softmax"),
    _aten.cumsum.default: _running_sum,
    _aten.histc.default: _histogram,
    _aten.topk.default: _top,
    _aten.sort.default: _sort,
    _aten.sort.stable: _sort,
    _aten.argsort.default: lambda t, a: _sort(t, a)[1],
    _aten.argsort.stable: lambda t, a: _sort(t, a)[1],
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation))
