"""Complex numbers, as rotary embeddings use them: a program has their real and imaginary parts as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Complex, Translation, Translator, Value, ensure, refusal
from .promotion import dtype_number, dtype_of

_aten = torch.ops.aten


def by_parts(translate: Translation) -> Translation:
    """The translation for complex numbers of an operator that does the same to both parts of ``self``."""

    def translated(t: Translator, a: Arguments) -> Complex:
        return Complex(translate(t, a.through(_real)), translate(t, a.through(_imaginary)))

    return translated


def of_real(translate: Translation) -> Translation:
    """The translation for complex numbers of an operator that only looks at a shape."""
    return lambda t, a: translate(t, a.through(_real))


def _real(value: Any) -> Any:
    return value.real if isinstance(value, Complex) else value


def _imaginary(value: Any) -> Any:
    return value.imaginary if isinstance(value, Complex) else value


def _view_as_complex(t: Translator, a: Arguments) -> Complex:
    *shape, parts = t.shape(a.self)
    ensure(t, "a complex number has two parts", parts == 2)
    if t.dtype(a.self) not in ("float32", "float64"):
        raise refusal(a, "complex numbers of this precision have no translation")

    def part(number: int) -> Value:
        return t.compute(shape, lambda v: lambda *i: v[(*i, number)], a.self)

    return Complex(part(0), part(1))


def _view_as_real(t: Translator, a: Arguments) -> Value:
    number = a.self
    if not isinstance(number, Complex):
        raise refusal(a, "the parts of what is no complex number have no translation")

    def element(real: Any, imaginary: Any) -> Any:
        return lambda *i: t.tir.Select(i[-1] == 0, real[i[:-1]], imaginary[i[:-1]])

    return t.compute([*t.shape(number.real), 2], element, number.real, number.imaginary)


def _polar(t: Translator, a: Arguments) -> Complex:
    return Complex(*(t.emit(t.op.multiply(a.abs, part(a.angle))) for part in (t.op.cos, t.op.sin)))


def multiplied(t: Translator, a: Arguments) -> Complex:
    """A product of complex numbers, or of one and real numbers."""
    x, y = (a.self, a.other) if isinstance(a.self, Complex) else (a.other, a.self)
    op, kind = t.op, t.dtype(x.real)
    if isinstance(y, Complex):
        if t.dtype(y.real) != kind:
            raise refusal(a, "a product of complex numbers of different precision has no translation")
        real = op.subtract(op.multiply(x.real, y.real), op.multiply(x.imaginary, y.imaginary))
        imaginary = op.add(op.multiply(x.real, y.imaginary), op.multiply(x.imaginary, y.real))
        return Complex(t.emit(real), t.emit(imaginary))
    if t.is_tensor(y):
        if dtype_of(t.dtype(y)).is_floating_point and t.dtype(y) != kind:
            raise refusal(a, "a product of numbers of different precision has no translation")
        factor = t.emit(op.astype(y, kind))
    elif isinstance(y, (bool, int, float)):
        factor = t.constant(dtype_number(y, kind), kind)
    else:
        raise refusal(a, "a product of complex numbers and a size has no translation")
    return Complex(t.emit(op.multiply(x.real, factor)), t.emit(op.multiply(x.imaginary, factor)))


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    _aten.view_as_complex.default: _view_as_complex,
    _aten.view_as_real.default: _view_as_real,
    _aten.polar.default: _polar,
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation, on_complex=_view_as_real if _translation is _view_as_real else None))
