"""Operators that take elements from where other tensors say, or put them there.

torch raises where an index is outside. A program cannot, so what is read or written is the nearest place inside; token
ids and positions, which a user decides, are checked before the program is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import Arguments
from ..checks import require
from ..registry import Operator, Verification, register
from ..translator import Size, Translation, Translator, Value, broadcast, ensure, permuted, refusal
from .creation import filled
from .promotion import cast, dtype_number
from .shapes import axis_of, count

_aten = torch.ops.aten


def inside(t: Translator, index: Any, size: Size, wraps: bool = False) -> Any:
    """A scalar index as one within the dimension; negative ones count from the end where ``wraps``."""
    size = t.tir.Cast("int64", size)
    index = t.tir.Cast("int64", index)
    if wraps:
        index = t.tir.Select(index < 0, index + size, index)
    return t.tir.max(t.tir.min(index, size - 1), t.tir.const(0, "int64"))


def _ensure_filled(t: Translator, *sizes: Size) -> None:
    """There is a place in every dimension that is looked into."""
    ensure(t, "a dimension that an index is for is not empty", *(size >= 1 for size in sizes))


def _ensure_within(t: Translator, index: Sequence[Size], sizes: Sequence[Size], axis: int | None = None) -> None:
    """An index of elements is nowhere longer than what it is for, save along the dimension that it tells."""
    within = [p <= q for k, (p, q) in enumerate(zip(index, sizes, strict=False)) if k != axis]
    ensure(t, f"an index of {list(index)} is within a tensor of {list(sizes)}", len(index) == len(sizes), *within)


def _rows(t: Translator, table: Value, indices: Value, axis: int, wraps: bool = False) -> Value:
    """Slices of a table along an axis; the dimensions of the indices take that axis' place."""
    sizes, places = t.shape(table), t.shape(indices)
    _ensure_filled(t, sizes[axis])
    behind = axis + len(places)
    shape = [*sizes[:axis], *places, *sizes[axis + 1 :]]

    def element(v: Any, which: Any) -> Any:
        def row(*i: Any) -> Any:
            return v[(*i[:axis], inside(t, which[tuple(i[axis:behind])], v.shape[axis], wraps), *i[behind:])]

        return row

    return t.compute(shape, element, table, indices)


def _embedding(t: Translator, a: Arguments) -> Value:
    return _rows(t, a.weight, a.indices, 0)


def _index_select(t: Translator, a: Arguments) -> Value:
    axis = axis_of(t, a.self, a.dim)
    return _rows(t, a.self, a.index, axis)


def _gather(t: Translator, a: Arguments) -> Value:
    x, index, axis = a.self, a.index, axis_of(t, a.self, a.dim)
    _ensure_within(t, t.shape(index), t.shape(x), axis)
    _ensure_filled(t, *t.shape(x)[axis : axis + 1])

    def element(v: Any, which: Any) -> Any:
        return lambda *i: v[(*i[:axis], inside(t, which[i], v.shape[axis]), *i[axis + 1 :])]

    return t.compute(t.shape(index), element, x, index)


@dataclass(frozen=True)
class _Indices:
    """Index tensors that stand for dimensions of another tensor.

    Attributes:
        axes: the dimensions.
        tensors: one for each, all of one shape.
        places: that shape.
        first: where its dimensions begin among those of what is indexed.
        shape: of what is indexed.
    """

    axes: list[int]
    tensors: list[Value]
    places: list[Size]
    first: int
    shape: list[Size]

    @classmethod
    def of(cls, t: Translator, a: Arguments) -> _Indices:
        """Those of a call, whose ``indices`` has None for dimensions that stay whole."""
        sizes, given = t.shape(a.self), list(a.indices)
        if any(i is not None and t.dtype(i) in ("bool", "uint8") for i in given):
            raise refusal(a, "as many elements as a mask says have no translation")
        axes = [k for k, i in enumerate(given) if i is not None]
        _ensure_filled(t, *(sizes[k] for k in axes))
        if len(axes) == 1:
            tensors, places = [given[axes[0]]], t.shape(given[axes[0]])
        else:
            total = cast(t, given[axes[0]], "int64")
            for k in axes[1:]:
                total = t.emit(t.op.add(total, cast(t, given[k], "int64")))
            places = t.shape(total)
            tensors = [broadcast(t, given[k], places) for k in axes]
        first = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
        rest = [sizes[k] for k in range(len(sizes)) if k not in axes]
        return cls(axes, tensors, places, first, [*rest[:first], *places, *rest[first:]])


def _index(t: Translator, a: Arguments) -> Value:
    x, indices = a.self, _Indices.of(t, a)
    if len(indices.axes) == 1:
        return _rows(t, x, indices.tensors[0], indices.axes[0], wraps=True)
    rank, first, behind = len(t.shape(x)), indices.first, indices.first + len(indices.places)

    def element(v: Any, *which: Any) -> Any:
        def found(*i: Any) -> Any:
            others = iter([*i[:first], *i[behind:]])
            looked_up = {
                k: inside(t, w[i[first:behind]], v.shape[k], True) for k, w in zip(indices.axes, which, strict=True)
            }
            return v[tuple(looked_up[k] if k in looked_up else next(others) for k in range(rank))]

        return found

    return t.compute(indices.shape, element, x, *indices.tensors)


def _written(t: Translator, x: Value, places: Value, rows: Value, adds: bool) -> Value:
    """``x [N, W]`` with ``rows [P, W]`` at, or added at, ``places [P]``."""
    kernel = t.kernels.scatter(t.dtype(x), adds, parallel=t.rows is None)
    return t.call(kernel, [x, places, rows], (t.shape(x), t.dtype(x)))


def _index_put(t: Translator, a: Arguments) -> Value:
    x, indices, sizes = a.self, _Indices.of(t, a), t.shape(a.self)
    rank, first = len(sizes), indices.first
    order = [*indices.axes, *(k for k in range(rank) if k not in indices.axes)]
    table, rest = [sizes[k] for k in indices.axes], [sizes[k] for k in order[len(indices.axes) :]]

    def place(*given: Any) -> Any:
        sides, which = given[: len(table)], given[len(table) :]

        def flat(*i: Any) -> Any:
            found: Any = t.tir.const(0, "int64")
            for side, w in zip(sides, which, strict=True):
                found = found * side + inside(t, w[i], side, True)
            return found

        return flat

    places = t.compute(indices.places, place, *table, *indices.tensors)
    values = broadcast(t, cast(t, a.values, t.dtype(x)), indices.shape)
    placed = range(first, first + len(indices.places))
    values = permuted(t, values, [*placed, *(k for k in range(len(indices.shape)) if k not in placed)])
    rows = t.reshape(values, [count(indices.places), count(rest)])
    flat_x = t.reshape(permuted(t, x, order), [count(table), count(rest)])
    written = _written(t, flat_x, t.reshape(places, [count(indices.places)]), rows, bool(a.accumulate))
    return permuted(t, t.reshape(written, [*table, *rest]), [order.index(k) for k in range(rank)])


def _index_rows(adds: bool) -> Translation:
    """Slices of a tensor along a dimension, replaced or added to."""

    def translate(t: Translator, a: Arguments) -> Value:
        x, index, source = a.self, a.index, cast(t, a.source, t.dtype(a.self))
        if adds and a.alpha != 1:
            source = t.emit(t.op.multiply(source, t.constant(dtype_number(a.alpha, t.dtype(x)), t.dtype(x))))
        axis, rank = axis_of(t, x, a.dim), max(len(t.shape(x)), 1)
        order = [axis, *(k for k in range(rank) if k != axis)]
        sizes = [t.shape(x)[k] for k in order]
        many = count(t.shape(index))
        given = [t.shape(source)[k] for k in order] if len(t.shape(source)) == len(t.shape(x)) else []
        fits = [p == q for p, q in zip(given, [many, *sizes[1:]], strict=False)]
        ensure(t, "a tensor has a slice for every index", len(t.shape(index)) <= 1, len(given) == len(sizes), *fits)
        _ensure_filled(t, sizes[0])
        rows = t.reshape(permuted(t, source, order), [many, count(sizes[1:])])
        places = t.reshape(cast(t, index, "int64"), [many])
        written = _written(t, t.reshape(permuted(t, x, order), [sizes[0], count(sizes[1:])]), places, rows, adds)
        return permuted(t, t.reshape(written, sizes), [order.index(k) for k in range(rank)])

    return translate


def _scatter(adds: bool) -> Translation:
    """Elements that go where an index of the same shape says along a dimension."""

    def translate(t: Translator, a: Arguments) -> Value:
        x, index, axis = a.self, a.index, axis_of(t, a.self, a.dim)
        sizes, shape, kind = t.shape(x), t.shape(a.index), t.dtype(x)
        _ensure_within(t, shape, sizes, axis)
        _ensure_filled(t, *sizes[axis : axis + 1])

        def place(*given: Any) -> Any:
            sides, which = given[: len(sizes)], given[len(sizes)]

            def flat(*i: Any) -> Any:
                found: Any = t.tir.const(0, "int64")
                for k, side in enumerate(sides):
                    found = found * side + (inside(t, which[i], side) if k == axis else t.tir.Cast("int64", i[k]))
                return found

            return flat

        if "src" in a:
            _ensure_within(t, shape, t.shape(a.src))
            # Of the source as many elements are taken as there are indices.
            source = t.compute(shape, lambda v: lambda *i: v[i], cast(t, a.src, kind))
        else:
            source = filled(t, shape, a.value, kind)
        places = t.reshape(t.compute(shape, place, *sizes, index), [count(shape)])
        flat_x = t.reshape(x, [count(sizes), 1])
        return t.reshape(_written(t, flat_x, places, t.reshape(source, [count(shape), 1]), adds), sizes)

    return translate


def _verify_dim(*names: str) -> Verification:
    def verify(a: Arguments) -> None:
        rank = max(a.self.dim(), 1)
        for name in names:
            require(-rank <= getattr(a, name) < rank, a, f"{name} is {getattr(a, name)} of {rank} dimensions")

    return verify


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    _aten.embedding.default: _embedding,
    _aten.index_select.default: _index_select,
    _aten.gather.default: _gather,
    _aten.index.Tensor: _index,
    _aten.index_put.default: _index_put,
    _aten.index_add.default: _index_rows(adds=True),
    _aten.index_copy.default: _index_rows(adds=False),
    _aten.scatter.value: _scatter(adds=False),
    _aten.scatter.src: _scatter(adds=False),
    _aten.scatter_add.default: _scatter(adds=True),
}

_VERIFICATIONS: dict[Callable[..., Any], Verification] = {
    _aten.index_select.default: _verify_dim("dim"),
    _aten.gather.default: _verify_dim("dim"),
    _aten.index_add.default: _verify_dim("dim"),
    _aten.index_copy.default: _verify_dim("dim"),
    _aten.scatter.value: _verify_dim("dim"),
    _aten.scatter.src: _verify_dim("dim"),
    _aten.scatter_add.default: _verify_dim("dim"),
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation, _VERIFICATIONS.get(_target)))
