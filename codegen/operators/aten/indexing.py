"""Operators that take elements from where other tensors say.

torch raises where an index is outside. A program cannot, so what is read is the nearest place inside; token ids and
positions, which a user decides, are checked before the program is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..arguments import Arguments
from ..checks import require
from ..registry import Operator, Verification, register
from ..translator import Size, Translation, Translator, Value, refusal
from .promotion import cast
from .shapes import axis_of

_aten = torch.ops.aten


def inside(t: Translator, index: Any, size: Size, wraps: bool = False) -> Any:
    """A scalar index as one within the dimension; negative ones count from the end where ``wraps``."""
    size = t.tir.Cast("int64", size)
    index = t.tir.Cast("int64", index)
    if wraps:
        index = t.tir.Select(index < 0, index + size, index)
    return t.tir.max(t.tir.min(index, size - 1), t.tir.const(0, "int64"))


def _rows(t: Translator, table: Value, indices: Value, axis: int, wraps: bool = False) -> Value:
    """Slices of a table along an axis; the dimensions of the indices take that axis' place."""
    sizes, places = t.shape(table), t.shape(indices)
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

    def element(v: Any, which: Any) -> Any:
        return lambda *i: v[(*i[:axis], inside(t, which[i], v.shape[axis]), *i[axis + 1 :])]

    return t.compute(t.shape(index), element, x, index)


def _index(t: Translator, a: Arguments) -> Value:
    x, given = a.self, list(a.indices)
    if any(i is not None and t.dtype(i) in ("bool", "uint8") for i in given):
        raise refusal(a, "as many elements as a mask says have no translation")
    axes = [k for k, i in enumerate(given) if i is not None]
    together = axes == list(range(axes[0], axes[-1] + 1))
    if len(axes) == 1:
        return _rows(t, x, given[axes[0]], axes[0], wraps=True)
    total = cast(t, given[axes[0]], "int64")
    for k in axes[1:]:
        total = t.emit(t.op.add(total, cast(t, given[k], "int64")))
    places, sizes = t.shape(total), t.shape(x)
    spread = [t.emit(t.op.broadcast_to(given[k], places)) for k in axes]
    first = axes[0] if together else 0
    rest = [k for k in range(len(sizes)) if k not in axes]
    shape = [sizes[k] for k in rest if k < first or not together]
    shape = [*shape, *places, *(sizes[k] for k in rest if k > first)] if together else [*places, *shape]

    def element(v: Any, *which: Any) -> Any:
        def found(*i: Any) -> Any:
            where = tuple(i[first : first + len(places)])
            others = iter([*i[:first], *i[first + len(places) :]])
            looked_up = {k: inside(t, w[where], v.shape[k], True) for k, w in zip(axes, which, strict=True)}
            return v[tuple(looked_up[k] if k in looked_up else next(others) for k in range(len(sizes)))]

        return found

    return t.compute(shape, element, x, *spread)


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
}

_VERIFICATIONS: dict[Callable[..., Any], Verification] = {
    _aten.index_select.default: _verify_dim("dim"),
    _aten.gather.default: _verify_dim("dim"),
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation, _VERIFICATIONS.get(_target)))
