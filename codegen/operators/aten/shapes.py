"""Operators that move elements and change none, and those on sizes."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import UntranslatableError
from ..arguments import Arguments
from ..registry import Operator, Way, register
from ..translator import Size, Translation, Translator, Value, broadcast, ensure, permuted, refusal
from .complex_numbers import by_parts, of_real
from .promotion import ARITHMETIC, cast, promoted, tensor

_aten = torch.ops.aten


def _same(t: Translator, a: Arguments) -> Any:
    return a.self


def _size(t: Translator, a: Arguments) -> Size:
    return t.shape(a.self)[a.dim]


def _elements(t: Translator, a: Arguments) -> Size:
    return count(t.shape(a.self))


def count(sizes: Sequence[Size]) -> Size:
    """The product of some sizes."""
    result: Any = 1
    for size in sizes:
        result = size if isinstance(result, int) and result == 1 else result * size
    return result


def _item(t: Translator, a: Arguments) -> Any:
    return a.value[a.index]


def _on_sizes(formula: Callable[..., Any]) -> Translation:
    """Arithmetic on sizes and numbers."""

    def translate(t: Translator, a: Arguments) -> Size:
        operands = [getattr(a, name) for name in ("value", "a", "b") if name in a]
        if any(t.is_tensor(v) for v in operands):
            raise refusal(a, "Python's arithmetic on tensors has no translation")
        if formula in (operator.floordiv, operator.mod):
            ensure(t, "a divisor is not zero", operands[1] > 0)
        return formula(*operands)

    return translate


def _sym_max(t: Translator, a: Arguments) -> Size:
    return greater(t, a.a, a.b)


def _sym_min(t: Translator, a: Arguments) -> Size:
    return lesser(t, a.a, a.b)


def greater(t: Translator, x: Size, y: Size) -> Size:
    """The greater one of two sizes."""
    if isinstance(x, int) and isinstance(y, int):
        return max(x, y)
    if t.surely(x >= y):
        return x
    return y if t.surely(y >= x) else t.tir.max(x, y)


def lesser(t: Translator, x: Size, y: Size) -> Size:
    """The smaller one of two sizes."""
    if isinstance(x, int) and isinstance(y, int):
        return min(x, y)
    if t.surely(x <= y):
        return x
    return y if t.surely(y <= x) else t.tir.min(x, y)


def axis_of(t: Translator, x: Value, dim: int) -> int:
    """A dimension counted from the front."""
    return dim % max(len(t.shape(x)), 1)


def _reshape(t: Translator, a: Arguments) -> Value:
    return reshaped(t, a.self, a.shape if a.node.target is _aten.reshape.default else a.size)


def reshaped(t: Translator, x: Value, sizes: Sequence[Size]) -> Value:
    """A value in another shape, of which one dimension may be -1."""
    if -1 in [s for s in sizes if isinstance(s, int)]:
        sizes = infer(t, t.shape(x), sizes)
    return t.reshape(x, sizes)


def infer(t: Translator, old: Sequence[Size], new: Sequence[Size]) -> list[Size]:
    """``new`` with its one -1 replaced, so that it has as many elements as ``old``.

    Raises:
        UntranslatableError: it cannot be told.
    """
    given = [d for d in new if not (isinstance(d, int) and d == -1)]
    missing = t.quotient(count(old), count(given))
    if missing is None:
        raise UntranslatableError(f"a reshape from {list(old)} to {list(new)} cannot be solved")
    return [missing if isinstance(d, int) and d == -1 else d for d in new]


def _like(t: Translator, a: Arguments) -> Value:
    return t.reshape(a.self, t.shape(a.other))


def _flatten(t: Translator, a: Arguments) -> Value:
    x = a.self
    sizes = t.shape(x)
    if not sizes:
        return t.reshape(x, [1])
    first, last = axis_of(t, x, a.start_dim), axis_of(t, x, a.end_dim)
    return t.reshape(x, [*sizes[:first], count(sizes[first : last + 1]), *sizes[last + 1 :]])


def _unflatten(t: Translator, a: Arguments) -> Value:
    x, sizes = a.self, t.shape(a.self)
    axis = axis_of(t, x, a.dim)
    parts = infer(t, [sizes[axis]], a.sizes) if -1 in [s for s in a.sizes if isinstance(s, int)] else a.sizes
    return t.reshape(x, [*sizes[:axis], *parts, *sizes[axis + 1 :]])


def _squeeze(t: Translator, a: Arguments) -> Value:
    x, sizes = a.self, t.shape(a.self)
    given = [a.dim] if "dim" in a and isinstance(a.dim, int) else a.dim if "dim" in a else range(len(sizes))
    gone = {axis_of(t, x, d) for d in given}
    return t.reshape(x, [s for i, s in enumerate(sizes) if i not in gone or not (isinstance(s, int) and s == 1)])


def _transpose(t: Translator, a: Arguments) -> Value:
    axes = list(range(len(t.shape(a.self))))
    if axes:
        axes[a.dim0], axes[a.dim1] = axes[a.dim1], axes[a.dim0]
    return permuted(t, a.self, axes)


def _swap_last(t: Translator, a: Arguments) -> Value:
    axes = list(range(len(t.shape(a.self))))
    return permuted(t, a.self, [*axes[:-2], *reversed(axes[-2:])])


def _permute(t: Translator, a: Arguments) -> Value:
    return permuted(t, a.self, [axis_of(t, a.self, d) for d in a.dims])


def _movedim(t: Translator, a: Arguments) -> Value:
    x = a.self
    listed = [[d] if isinstance(d, int) else d for d in a.pick("source", "destination")]
    source, destination = ([axis_of(t, x, d) for d in dims] for dims in listed)
    rest = iter(i for i in range(len(t.shape(x))) if i not in source)
    places = dict(zip(destination, source, strict=True))
    return permuted(t, x, [places[i] if i in places else next(rest) for i in range(len(t.shape(x)))])


def _unsqueeze(t: Translator, a: Arguments) -> Value:
    return t.emit(t.op.expand_dims(a.self, a.dim))


def _expand(t: Translator, a: Arguments) -> Value:
    sizes = a.size
    old = [1] * (len(sizes) - len(t.shape(a.self))) + t.shape(a.self)
    return broadcast(t, a.self, [o if isinstance(s, int) and s == -1 else s for o, s in zip(old, sizes, strict=True)])


def _expand_like(t: Translator, a: Arguments) -> Value:
    return broadcast(t, a.self, t.shape(a.other))


def _repeat(t: Translator, a: Arguments) -> Value:
    x, repeats = a.self, a.repeats
    sizes = [1] * (len(repeats) - len(t.shape(x))) + t.shape(x)
    shape = [s if isinstance(r, int) and r == 1 else s * r for s, r in zip(sizes, repeats, strict=True)]
    ensure(t, "a tensor is repeated no negative number of times", *(r >= 0 for r in repeats))
    source = t.reshape(x, sizes)
    if all(isinstance(s, int) and s == 1 for s in sizes):
        return broadcast(t, source, shape)

    return t.compute(
        shape,
        lambda v: lambda *i: v[tuple(t.tir.floormod(p, s) for p, s in zip(i, v.shape, strict=True))],
        source,
    )


def _repeat_interleave(t: Translator, a: Arguments) -> Value:
    x, repeats = a.self, a.repeats
    if a.dim is None:
        x = t.reshape(x, [count(t.shape(x))])
    axis, sizes = axis_of(t, x, a.dim or 0), t.shape(x)
    if not isinstance(repeats, int) or repeats == 0:
        raise refusal(a, "as many repetitions as a tensor or a size says have no translation")
    wide = t.emit(t.op.expand_dims(x, axis + 1))
    wide = broadcast(t, wide, [*sizes[: axis + 1], repeats, *sizes[axis + 1 :]])
    return t.reshape(wide, [*sizes[:axis], sizes[axis] * repeats, *sizes[axis + 1 :]])


def cut(t: Translator, x: Value, axis: int, start: Size, end: Size) -> Value:
    """The part of a value from ``start`` to ``end``, which lie within the dimension."""
    return t.emit(t.op.strided_slice(x, [axis], [start], [end], assume_inbound=True))


def within(t: Translator, place: Size, size: Size) -> Size:
    """A place in a dimension as torch reads it: negative ones count from the end, and none is outside."""
    if isinstance(place, int) and place >= sys.maxsize:
        return size
    if isinstance(place, int) and place < 0:
        return greater(t, size + place, 0)
    if isinstance(place, int) or t.surely(place >= 0):
        return lesser(t, place, size)
    if t.surely(place < 0):
        return greater(t, size + place, 0)
    return lesser(t, greater(t, t.tir.if_then_else(place < 0, place + size, place), 0), size)


def _slice(t: Translator, a: Arguments) -> Value:
    x, axis = a.self, axis_of(t, a.self, a.dim)
    sizes = t.shape(x)
    start = within(t, 0 if a.start is None else a.start, sizes[axis])
    end = greater(t, within(t, sys.maxsize if a.end is None else a.end, sizes[axis]), start)
    whole = isinstance(start, int) and start == 0 and t.surely(end == sizes[axis])
    if a.step == 1:
        return x if whole else cut(t, x, axis, start, end)
    steps = (end - start + a.step - 1) // a.step
    shape = [*sizes[:axis], steps, *sizes[axis + 1 :]]

    return t.compute(
        shape, lambda v, begin: lambda *i: v[(*i[:axis], begin + i[axis] * a.step, *i[axis + 1 :])], x, start
    )


def _narrow(t: Translator, a: Arguments) -> Value:
    x, axis = a.self, axis_of(t, a.self, a.dim)
    size = t.shape(x)[axis]
    start = within(t, a.start, size)
    ensure(t, "a part of a dimension lies within it", a.length >= 0, start + a.length <= size)
    return cut(t, x, axis, start, start + a.length)


def _select(t: Translator, a: Arguments) -> Value:
    x, axis, index = a.self, axis_of(t, a.self, a.dim), a.index
    sizes = t.shape(x)
    if isinstance(index, int):
        inside = t.surely(sizes[axis] > index) if index >= 0 else t.surely(sizes[axis] >= -index)
        if not inside and isinstance(sizes[axis], int):
            raise refusal(a, f"the place {index} is outside a dimension of {sizes[axis]}")
    ensure(t, "a dimension of which a place is taken is not empty", sizes[axis] >= 1)
    last = sizes[axis] - 1
    place = lesser(t, within(t, index, sizes[axis]), last)
    shape = [*sizes[:axis], *sizes[axis + 1 :]]

    return t.compute(shape, lambda v, where: lambda *i: v[(*i[:axis], where, *i[axis:])], x, place)


def _parts(t: Translator, x: Value, sizes: Sequence[int], axis: int) -> list[Value]:
    found, start = [], 0
    for size in sizes:
        found.append(cut(t, x, axis, start, start + size))
        start += size
    return found


def _split_sizes(t: Translator, a: Arguments) -> list[Value]:
    whole = _known_size(t, a)
    if not all(isinstance(s, int) and s >= 0 for s in a.split_sizes) or sum(a.split_sizes) != whole:
        raise refusal(a, f"parts of {a.split_sizes} are no split of {whole}")
    return _parts(t, a.self, a.split_sizes, axis_of(t, a.self, a.dim))


def _known_size(t: Translator, a: Arguments) -> int:
    """The size of the dimension that is split."""
    size = t.shape(a.self)[a.dim]
    if not isinstance(size, int):
        raise refusal(a, "a split of a dynamic dimension has no translation")
    return size


def _pieces(t: Translator, a: Arguments, each: int) -> list[Value]:
    """Pieces of ``each`` elements, and a shorter last one."""
    size = _known_size(t, a)
    return _parts(t, a.self, [min(each, size - i) for i in range(0, size, each)], axis_of(t, a.self, a.dim))


def _split(t: Translator, a: Arguments) -> list[Value]:
    return _pieces(t, a, a.split_size)


def _chunk(t: Translator, a: Arguments) -> list[Value]:
    return _pieces(t, a, -(-_known_size(t, a) // a.chunks))


def _unbind(t: Translator, a: Arguments) -> list[Value]:
    x, axis = a.self, axis_of(t, a.self, a.dim)
    sizes = t.shape(x)
    parts = _pieces(t, a, 1)
    return [t.reshape(part, [*sizes[:axis], *sizes[axis + 1 :]]) for part in parts]


def _joinable(t: Translator, a: Arguments) -> list[Value]:
    """The tensors of one type; those that torch leaves out of a concatenation left out."""
    tensors, result = promoted(t, a, ARITHMETIC, a.tensors)
    return [cast(t, v, result) for v in tensors]


def _cat(t: Translator, a: Arguments) -> Value:
    tensors = [v for v in _joinable(t, a) if t.shape(v) != [0]]
    if not tensors:
        raise refusal(a, "a concatenation of nothing has no translation")
    return _joined(t, tensors, axis_of(t, tensors[0], a.dim))


def _joined(t: Translator, tensors: list[Value], axis: int) -> Value:
    first, *others = (t.shape(v) for v in tensors)
    for other in others:
        fits = [p == q for k, (p, q) in enumerate(zip(first, other, strict=False)) if k != axis]
        ensure(t, "tensors that are joined agree in their other dimensions", len(first) == len(other), *fits)
    return tensors[0] if len(tensors) == 1 else t.emit(t.op.concat(tensors, axis))


def _stack(t: Translator, a: Arguments) -> Value:
    tensors = _joinable(t, a)
    axis = a.dim % (len(t.shape(tensors[0])) + 1)
    return _joined(t, [t.emit(t.op.expand_dims(v, axis)) for v in tensors], axis)


def _flip(t: Translator, a: Arguments) -> Value:
    x = a.self
    turned = {axis_of(t, x, d) for d in a.dims}

    def element(v: Any) -> Any:
        def places(i: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(v.shape[k] - 1 - p if k in turned else p for k, p in enumerate(i))

        return lambda *i: v[places(i)]

    return t.compute(t.shape(x), element, x)


def _roll(t: Translator, a: Arguments) -> Value:
    x, dims = a.self, list(a.dims)
    if not dims:
        rolled = _rolled(t, t.reshape(x, [count(t.shape(x))]), {0: a.shifts[0]})
        return t.reshape(rolled, t.shape(x))
    return _rolled(t, x, dict(zip((axis_of(t, x, d) for d in dims), a.shifts, strict=True)))


def _rolled(t: Translator, x: Value, shifts: dict[int, Size]) -> Value:
    def element(v: Any, *by: Any) -> Any:
        moved = dict(zip(shifts, by, strict=True))

        def places(i: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(t.tir.floormod(p - moved[k], v.shape[k]) if k in moved else p for k, p in enumerate(i))

        return lambda *i: v[places(i)]

    return t.compute(t.shape(x), element, x, *shifts.values())


def _pad(t: Translator, a: Arguments) -> Value:
    x, sizes, pad = a.self, t.shape(a.self), list(a.pad)
    front = [0] * len(sizes)
    wide = list(sizes)
    for k in range(len(pad) // 2):
        before, behind = pad[2 * k : 2 * k + 2]
        front[-1 - k] = before
        wide[-1 - k] = sizes[-1 - k] + before + behind
        ensure(t, "no more is cut off than there is", wide[-1 - k] >= 0)
    fill = t.variable(tensor(t, a.value, t.dtype(x)))

    def element(v: Any, filling: Any, *offsets: Any) -> Any:
        def padded(*i: Any) -> Any:
            places = [p - f for p, f in zip(i, offsets, strict=True)]
            inside = [c for p, s in zip(places, v.shape, strict=True) for c in (p >= 0, p < s)]
            return t.tir.if_then_else(t.tir.all(*inside), v[tuple(places)], filling())

        return padded

    return t.compute(wide, element, x, fill, *front)


def _triangle(keeps: Callable[[Any, Any], Any]) -> Translation:
    """The part of matrices above or below a diagonal; zeros elsewhere."""

    def translate(t: Translator, a: Arguments) -> Value:
        x, diagonal = a.self, a.diagonal
        zero = t.tir.const(0, t.dtype(x))

        def element(v: Any, offset: Any) -> Any:
            return lambda *i: t.tir.Select(keeps(i[-1] - i[-2], offset), v[i], zero)

        return t.compute(t.shape(x), element, x, diagonal)

    return translate


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    operator.getitem: _item,
    operator.add: _on_sizes(operator.add),
    operator.sub: _on_sizes(operator.sub),
    operator.mul: _on_sizes(operator.mul),
    operator.floordiv: _on_sizes(operator.floordiv),
    operator.mod: _on_sizes(operator.mod),
    operator.neg: _on_sizes(operator.neg),
    torch.sym_max: _sym_max,
    torch.sym_min: _sym_min,
    _aten.sym_size.int: _size,
    _aten.sym_numel.default: _elements,
    _aten.reshape.default: _reshape,
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.view_as.default: _like,
    _aten.flatten.using_ints: _flatten,
    _aten.unflatten.int: _unflatten,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
    _aten.transpose.int: _transpose,
    _aten.t.default: _swap_last,
    _aten.permute.default: _permute,
    _aten.movedim.int: _movedim,
    _aten.movedim.intlist: _movedim,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.expand.default: _expand,
    _aten.broadcast_to.default: _expand,
    _aten.expand_as.default: _expand_like,
    _aten.repeat.default: _repeat,
    _aten.repeat_interleave.self_int: _repeat_interleave,
    _aten.slice.Tensor: _slice,
    _aten.narrow.default: _narrow,
    _aten.select.int: _select,
    _aten.split_with_sizes.default: _split_sizes,
    _aten.split.Tensor: _split,
    _aten.chunk.default: _chunk,
    _aten.unbind.int: _unbind,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.flip.default: _flip,
    _aten.roll.default: _roll,
    _aten.constant_pad_nd.default: _pad,
    _aten.tril.default: _triangle(lambda column, diagonal: column <= diagonal),
    _aten.triu.default: _triangle(lambda column, diagonal: column >= diagonal),
    _aten.contiguous.default: _same,
    _aten.clone.default: _same,
    _aten.alias.default: _same,
    _aten.detach.default: _same,
    _aten.lift_fresh_copy.default: _same,
}

_WAYS: dict[Way, tuple[Callable[..., Any], ...]] = {
    "aliases": (_aten.alias.default, _aten.detach.default),
    "copies": (_aten.contiguous.default, _aten.clone.default, _aten.lift_fresh_copy.default),
    "reshapes": (
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.view_as.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unsqueeze.default,
    ),
    "permutes": (
        _aten.transpose.int,
        _aten.t.default,
        _aten.permute.default,
        _aten.movedim.int,
        _aten.movedim.intlist,
        _aten.flip.default,
        _aten.roll.default,
    ),
    "repeats": (
        _aten.expand.default,
        _aten.broadcast_to.default,
        _aten.expand_as.default,
        _aten.repeat.default,
        _aten.repeat_interleave.self_int,
    ),
    "selects": (_aten.slice.Tensor, _aten.narrow.default, _aten.select.int),
    "splits": (_aten.split_with_sizes.default, _aten.split.Tensor, _aten.chunk.default, _aten.unbind.int),
}
_MOVES: dict[Callable[..., Any], Way] = {target: way for way, targets in _WAYS.items() for target in targets}

_SIZES = {_aten.sym_size.int, _aten.sym_numel.default}

_OTHERS = {*_WAYS["splits"], _aten.cat.default, _aten.stack.default, _aten.constant_pad_nd.default}
"""Operators that give several tensors, take several, or a number to put there."""


def _on_complex(target: Callable[..., Any], translation: Translation) -> Translation | None:
    if target in _SIZES:
        return of_real(translation)
    moves = isinstance(target, torch._ops.OpOverload) and target not in _OTHERS
    return by_parts(translation) if moves else None


for _target, _translation in _TRANSLATIONS.items():
    _moves = _MOVES.get(_target)
    register(Operator(_target, _translation, on_complex=_on_complex(_target, _translation), moves=_moves))
