"""Operators that move elements and change none, and those on sizes."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import UntranslatableError
from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Size, Translation, Translator, Value, refusal

_aten = torch.ops.aten


def _same(t: Translator, a: Arguments) -> Any:
    return a.self


def _size(t: Translator, a: Arguments) -> Size:
    return t.shape(a.self)[a.dim]


def _item(t: Translator, a: Arguments) -> Any:
    return a.value[a.index]


def _reshape(t: Translator, a: Arguments) -> Value:
    x, sizes = a.self, a.shape if a.node.target is _aten.reshape.default else a.size
    if -1 in [s for s in sizes if isinstance(s, int)]:
        sizes = infer(t.shape(x), sizes)
    return t.reshape(x, sizes)


def infer(old: Sequence[Size], new: Sequence[Size]) -> list[Size]:
    """``new`` with its one -1 replaced, so that it has as many elements as ``old``; equal symbols cancel.

    Raises:
        UntranslatableError: it cannot be told.
    """
    symbols = [d for d in old if not isinstance(d, int)]
    for size in (d for d in new if not isinstance(d, int)):
        match = next((i for i, d in enumerate(symbols) if d.same_as(size)), None)
        if match is None:
            raise UntranslatableError(f"a reshape from {list(old)} to {list(new)} cannot be solved")
        symbols.pop(match)
    elements = math.prod(d for d in old if isinstance(d, int))
    missing, rest = divmod(elements, math.prod(d for d in new if isinstance(d, int) and d != -1))
    if rest:
        raise UntranslatableError(f"a reshape from {list(old)} to {list(new)} cannot be solved")
    for symbol in symbols:
        missing = symbol if missing == 1 else symbol * missing
    return [missing if isinstance(d, int) and d == -1 else d for d in new]


def _transpose(t: Translator, a: Arguments) -> Value:
    axes = list(range(len(t.shape(a.self))))
    axes[a.dim0], axes[a.dim1] = axes[a.dim1], axes[a.dim0]
    return t.emit(t.op.permute_dims(a.self, axes))


def _permute(t: Translator, a: Arguments) -> Value:
    return t.emit(t.op.permute_dims(a.self, list(a.dims)))


def _unsqueeze(t: Translator, a: Arguments) -> Value:
    return t.emit(t.op.expand_dims(a.self, a.dim))


def _expand(t: Translator, a: Arguments) -> Value:
    old, sizes = t.shape(a.self), a.size
    old = [1] * (len(sizes) - len(old)) + old
    kept = [o if isinstance(s, int) and s == -1 else s for o, s in zip(old, sizes, strict=True)]
    return t.emit(t.op.broadcast_to(a.self, kept))


def _cut(t: Translator, x: Value, axis: int, start: Size, end: Size) -> Value:
    axis %= len(t.shape(x))
    return t.emit(t.op.strided_slice(x, [axis], [start], [end], assume_inbound=True))


def _slice(t: Translator, a: Arguments) -> Value:
    x, start, end = a.self, a.start or 0, a.end
    size = t.shape(x)[a.dim]
    if a.step != 1:
        raise refusal(a, "a slice with steps has no translation")
    if end is None or (isinstance(end, int) and end >= sys.maxsize):
        end = size
    if isinstance(start, int) and start < 0:
        start = size + start
    if isinstance(end, int) and end < 0:
        end = size + end
    if isinstance(end, int) and isinstance(size, int):
        end = min(end, size)
    if isinstance(start, int) and start == 0 and end is size:
        return x
    return _cut(t, x, a.dim, start, end)


def _parts(t: Translator, x: Value, sizes: Sequence[int], axis: int) -> list[Value]:
    found, start = [], 0
    for size in sizes:
        found.append(_cut(t, x, axis, start, start + size))
        start += size
    return found


def _split_sizes(t: Translator, a: Arguments) -> list[Value]:
    return _parts(t, a.self, a.split_sizes, a.dim)


def _known_size(t: Translator, a: Arguments) -> int:
    """The size of the dimension that is split."""
    size = t.shape(a.self)[a.dim]
    if not isinstance(size, int):
        raise refusal(a, "a split of a dynamic dimension has no translation")
    return size


def _pieces(t: Translator, a: Arguments, each: int) -> list[Value]:
    """Pieces of ``each`` elements, and a shorter last one."""
    size = _known_size(t, a)
    return _parts(t, a.self, [min(each, size - i) for i in range(0, size, each)], a.dim)


def _split(t: Translator, a: Arguments) -> list[Value]:
    return _pieces(t, a, a.split_size)


def _chunk(t: Translator, a: Arguments) -> list[Value]:
    return _pieces(t, a, -(-_known_size(t, a) // a.chunks))


def _cat(t: Translator, a: Arguments) -> Value:
    return t.emit(t.op.concat(a.tensors, a.dim))


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    operator.getitem: _item,
    _aten.sym_size.int: _size,
    _aten.reshape.default: _reshape,
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.expand.default: _expand,
    _aten.slice.Tensor: _slice,
    _aten.split_with_sizes.default: _split_sizes,
    _aten.split.Tensor: _split,
    _aten.chunk.default: _chunk,
    _aten.cat.default: _cat,
    _aten.contiguous.default: _same,
    _aten.clone.default: _same,
    _aten.alias.default: _same,
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation))
