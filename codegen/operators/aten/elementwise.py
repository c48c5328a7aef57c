"""Operators that compute every element from the elements at its place.

Operands of different types become what torch makes of them (:mod:`.promotion`). An operator that torch defines by
others is not here: it is translated as those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...errors import UntranslatableError
from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Translation, Translator, Value, broadcast, refusal
from .complex_numbers import by_parts, multiplied
from .promotion import ARITHMETIC, BOOL, FLOAT, cast, dtype_of, name_of, promoted, tensor

_aten = torch.ops.aten

Formula = Callable[..., Any]
"""Makes an expression of a translator and tensors of one type."""


def _elementwise(formula: Formula, *names: str, kind: Any = ARITHMETIC) -> Translation:
    """An operator of the arguments of these names, which promotes them in a way."""

    def translate(t: Translator, a: Arguments) -> Value:
        operands, result = promoted(t, a, kind, a.pick(*names))
        return cast(t, t.emit(formula(t, *operands)), result)

    return translate


def _named(name: str) -> Formula:
    """An operator by its name among those of programs."""
    return lambda t, *x: getattr(t.op, name)(*x)


def _unary(formula: Formula | str, kind: Any = ARITHMETIC) -> Translation:
    return _elementwise(_named(formula) if isinstance(formula, str) else formula, "self", kind=kind)


def _binary(formula: Formula | str, kind: Any = ARITHMETIC) -> Translation:
    return _elementwise(_named(formula) if isinstance(formula, str) else formula, "self", "other", kind=kind)


def number(t: Translator, value: float, x: Value) -> Any:
    """A number of a tensor's type."""
    return tensor(t, value, t.dtype(x))


def _is_float(t: Translator, x: Value) -> bool:
    return dtype_of(t.dtype(x)).is_floating_point


def _is_bool(t: Translator, x: Value) -> bool:
    return t.dtype(x) == "bool"


def is_nan(t: Translator, x: Value) -> Any:
    """Whether elements are NaN. TVM takes ``x != x`` for false, and gives false for NaN beside any number, too."""
    return t.op.isnan(t.variable(x)) if _is_float(t, x) else t.op.not_equal(x, x)


def _differs(t: Translator, x: Value, y: Value) -> Any:
    """Whether elements are not equal; NaN never is."""
    different = t.op.not_equal(x, y)
    return t.op.logical_or(different, t.op.logical_or(is_nan(t, x), is_nan(t, y))) if _is_float(t, x) else different


def truth(t: Translator, x: Value) -> Any:
    """Whether elements are not zero, as NaN is not."""
    return x if _is_bool(t, x) else _differs(t, x, number(t, 0, x))


def _scaled(t: Translator, a: Arguments, name: str) -> Value:
    """An addition or a subtraction of ``alpha`` times the second operand."""
    (left, right), result = promoted(t, a, ARITHMETIC, a.pick("self", "other"))
    if _is_bool(t, left):
        if name == "subtract" or a.alpha not in (1, True):
            raise refusal(a, "this arithmetic on truth values has no translation")
        return t.emit(t.op.logical_or(left, right))
    if a.alpha != 1:
        right = t.emit(_multiply(t, right, tensor(t, a.alpha, t.dtype(right))))
    return cast(t, t.emit(getattr(t.op, name)(left, right)), result)


def _add(t: Translator, a: Arguments) -> Value:
    """An addition, which a linear takes over where its result is added to a tensor of the same shape."""
    joined = t.add_to_linear(a.node)
    return _scaled(t, a, "add") if joined is None else joined


def _multiply(t: Translator, x: Value, y: Value) -> Any:
    return t.op.logical_and(x, y) if _is_bool(t, x) else t.op.multiply(x, y)


def _safe(t: Translator, x: Value, divisor: Value, divide: Formula, at_minus_one: Formula) -> Any:
    """A division of integers that no divisor stops: it is not made by zero, and by minus one only in other words."""
    x, divisor = t.variable(x), t.variable(divisor)
    zero, one = (number(t, value, x) for value in (0, 1))
    none = odd = t.op.equal(divisor, zero)
    minus = t.op.equal(divisor, number(t, -1, x)) if dtype_of(t.dtype(x)).is_signed else None
    if minus is not None:
        odd = t.op.logical_or(none, minus)
    usual = _choose(t, none, zero, divide(x, _choose(t, odd, one, divisor)))
    return usual if minus is None else _choose(t, minus, at_minus_one(x), usual)


def _by_scalars(t: Translator, formula: Callable[[Any, Any], Any], x: Any, y: Any) -> Value:
    """What has no operator of its own: a formula of the scalars of two tensors, which are brought to one shape."""
    shape = t.shape(t.emit(t.op.add(x, y)))
    same = [broadcast(t, t.variable(v), shape) for v in (x, y)]
    return t.compute(shape, lambda p, q: lambda *i: formula(p[i], q[i]), *same)


def _choose(t: Translator, condition: Any, x: Any, y: Any) -> Any:
    """Elements of ``x`` where the condition holds, else of ``y``."""
    return t.op.where(condition, t.variable(x), t.variable(y))


def _truncated_remainder(t: Translator, x: Value, y: Value) -> Any:
    """C's ``fmod`` of floats."""
    names = {"float32": "fmodf", "float64": "fmod"}
    if t.dtype(y) not in names:
        raise UntranslatableError("a remainder of floats of this type has no translation")
    kind = t.dtype(y)
    return _by_scalars(t, lambda p, q: t.tir.call_pure_extern(kind, names[kind], p, q), x, y)


def _floor_divide(t: Translator, x: Value, y: Value) -> Any:
    """The quotient, rounded down; of floats as Python computes it, so that ``y * q + remainder`` is ``x``."""
    op = t.op
    if not _is_float(t, x):
        return _safe(t, x, y, op.floor_divide, op.negative)
    zero, one = number(t, 0, x), number(t, 1, x)
    rest = _truncated_remainder(t, x, y)
    quotient = op.divide(op.subtract(x, rest), y)
    against = op.logical_and(op.not_equal(rest, zero), op.logical_xor(op.less(rest, zero), op.less(y, zero)))
    quotient = _choose(t, against, op.subtract(quotient, one), quotient)
    below = op.floor(quotient)
    nearest = _choose(t, op.greater(op.subtract(quotient, below), number(t, 0.5, x)), op.add(below, one), below)
    return _choose(t, op.equal(y, zero), op.divide(x, y), nearest)


def _truncated_divide(t: Translator, x: Value, y: Value) -> Any:
    op = t.op
    if _is_float(t, x):
        return op.trunc(op.divide(x, y))
    return _safe(t, x, y, lambda p, q: _by_scalars(t, t.tir.truncdiv, p, q), op.negative)


def _remainder(t: Translator, x: Value, y: Value) -> Any:
    """What is left of a division that is rounded down: it has the divisor's sign."""
    op, zero = t.op, number(t, 0, x)
    if not _is_float(t, x):
        return _safe(t, x, y, op.floor_mod, lambda v: op.multiply(v, zero))
    rest = _truncated_remainder(t, x, y)
    against = op.logical_and(op.not_equal(rest, zero), op.logical_xor(op.less(rest, zero), op.less(y, zero)))
    return _choose(t, against, op.add(rest, y), rest)


def _fmod(t: Translator, x: Value, y: Value) -> Any:
    if _is_float(t, x):
        return _truncated_remainder(t, x, y)
    zero = number(t, 0, x)
    return _safe(t, x, y, lambda p, q: _by_scalars(t, t.tir.truncmod, p, q), lambda v: t.op.multiply(v, zero))


def _rounded_divide(t: Translator, a: Arguments) -> Value:
    if a.rounding_mode is None:
        return _divide(t, a)
    return _binary(_floor_divide if a.rounding_mode == "floor" else _truncated_divide)(t, a)


_divide = _binary("divide", FLOAT)


def _power(t: Translator, a: Arguments) -> Value:
    exponent = a.exponent
    if not t.is_tensor(exponent) and isinstance(exponent, (int, float)) and float(exponent) in (0, 1, 2, 3):
        (x, _), result = promoted(t, a, ARITHMETIC, (a.self, exponent))
        power = number(t, 1, x) if exponent == 0 else x
        for _ in range(int(exponent) - 1):
            power = t.emit(_multiply(t, power, x))
        if exponent == 0:
            power = broadcast(t, t.variable(power), t.shape(x))
        return cast(t, power, result)
    (x, y), result = promoted(t, a, ARITHMETIC, (a.self, exponent))
    if not _is_float(t, x):
        raise refusal(a, "this power of integers has no translation")
    special = {0.5: t.op.sqrt, -0.5: t.op.rsqrt, -1.0: lambda v: t.op.divide(number(t, 1, v), v)}
    if isinstance(exponent, float) and exponent in special:
        return cast(t, t.emit(special[exponent](x)), result)
    return cast(t, t.emit(t.op.power(x, y)), result)


def _logistic(t: Translator, x: Value) -> Value:
    """``1 + exp(-x)``."""
    return t.op.add(number(t, 1.0, x), t.op.exp(t.op.negative(x)))


def _sigmoid(t: Translator, x: Value) -> Any:
    return t.op.divide(number(t, 1.0, x), _logistic(t, x))


def _silu(t: Translator, x: Value) -> Any:
    return t.op.divide(x, _logistic(t, x))


def _gelu(t: Translator, a: Arguments) -> Value:
    (x,), result = promoted(t, a, ARITHMETIC, [a.self])
    op = t.op
    if a.approximate == "tanh":
        cube = op.multiply(op.multiply(x, x), x)
        inner = op.add(x, op.multiply(cube, number(t, 0.044715, x)))
        gate = op.tanh(op.multiply(inner, number(t, (2 / math.pi) ** 0.5, x)))
    else:
        gate = op.erf(op.multiply(x, number(t, 0.5**0.5, x)))
    half = op.multiply(x, number(t, 0.5, x))
    return cast(t, t.emit(op.multiply(half, op.add(gate, number(t, 1.0, x)))), result)


def _reciprocal(t: Translator, x: Value) -> Any:
    return t.op.divide(number(t, 1.0, x), x)


def _log1p(t: Translator, x: Value) -> Any:
    """``log(1 + x)``, exact near zero too: what the sum rounds away is the quotient's to mend."""
    op, one = t.op, number(t, 1.0, x)
    total = op.add(x, one)
    lost = op.subtract(total, one)
    mended = op.multiply(op.log(total), op.divide(x, lost))
    small = op.equal(lost, number(t, 0.0, x))
    return _choose(t, op.logical_or(small, op.isinf(x)), _choose(t, small, x, op.log(total)), mended)


def _expm1(t: Translator, x: Value) -> Any:
    """``exp(x) - 1``, exact near zero too: ``tanh(x / 2) * (exp(x) + 1)``."""
    op = t.op
    near = op.multiply(op.tanh(op.multiply(x, number(t, 0.5, x))), op.add(op.exp(x), number(t, 1.0, x)))
    small = op.less(op.abs(x), number(t, 1.0, x))
    return _choose(t, small, near, op.subtract(op.exp(x), number(t, 1.0, x)))


def _whole(name: str) -> Formula:
    """A rounding, which leaves integers as they are."""
    return lambda t, x: getattr(t.op, name)(x) if _is_float(t, x) else t.op.add(x, number(t, 0, x))


def _sign(t: Translator, x: Value) -> Any:
    zero, one, minus = (number(t, v, x) for v in (0, 1, -1))
    return _choose(t, t.op.greater(x, zero), one, _choose(t, t.op.less(x, zero), minus, zero))


def _greater_of(t: Translator, x: Value, y: Value) -> Any:
    """The greater one; NaN where either is."""
    return _choose(t, t.op.logical_or(t.op.greater(x, y), is_nan(t, x)), x, y)


def _less_of(t: Translator, x: Value, y: Value) -> Any:
    """The smaller one; NaN where either is."""
    return _choose(t, t.op.logical_or(t.op.less(x, y), is_nan(t, x)), x, y)


def _clamp(t: Translator, a: Arguments) -> Value:
    bounds = {choose: v for choose, v in ((_greater_of, a.min), (_less_of, a.max)) if v is not None}
    (x, *limits), result = promoted(t, a, ARITHMETIC, [a.self, *bounds.values()])
    for choose, limit in zip(bounds, limits, strict=True):
        x = t.emit(choose(t, x, limit))
    return cast(t, x, result)


def _bits(name: str) -> Formula:
    """An operator on bits, or on truth values."""
    return lambda t, *x: getattr(t.op, ("logical_" if _is_bool(t, x[0]) else "bitwise_") + name)(*x)


def _logical(name: str, *names: str) -> Translation:
    """An operator on truth values: every operand by itself is whether it is not zero."""

    def translate(t: Translator, a: Arguments) -> Value:
        return t.emit(getattr(t.op, f"logical_{name}")(*(truth(t, v) for v in a.pick(*names))))

    return translate


def _is_infinite(t: Translator, x: Value) -> Any:
    if not _is_float(t, x):
        return t.op.not_equal(x, x)
    return t.op.equal(t.op.abs(x), number(t, math.inf, x))


def _is_finite(t: Translator, x: Value) -> Any:
    if not _is_float(t, x):
        return t.op.equal(x, x)
    return t.op.less(t.op.abs(x), number(t, math.inf, x))


def _where(t: Translator, a: Arguments) -> Value:
    (left, right), result = promoted(t, a, ARITHMETIC, a.pick("self", "other"))
    return cast(t, t.emit(_choose(t, truth(t, a.condition), left, right)), result)


def _masked_fill(t: Translator, a: Arguments) -> Value:
    x = a.self
    return t.emit(_choose(t, truth(t, a.mask), tensor(t, a.value, t.dtype(x)), x))


def _cast(t: Translator, a: Arguments) -> Value:
    x = a.self
    if a.dtype is not None and a.dtype.is_complex:
        raise refusal(a, "complex numbers have no translation")
    return x if a.dtype is None else cast(t, x, name_of(a.dtype))


def _cast_like(t: Translator, a: Arguments) -> Value:
    return cast(t, a.self, t.dtype(a.other))


def _copy(t: Translator, a: Arguments) -> Value:
    """The source as a tensor of the target's shape and type."""
    source = cast(t, a.src, t.dtype(a.self))
    return broadcast(t, source, t.shape(a.self))


def _relu(t: Translator, x: Value) -> Any:
    """What is not below zero: so NaN stays."""
    zero = number(t, 0, x)
    return _choose(t, t.op.less(x, zero), zero, x)


def _keeping_nan(name: str) -> Formula:
    """An operator whose fast form takes NaN for a number."""
    return lambda t, x: _choose(t, is_nan(t, x), x, getattr(t.op, name)(x))


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    _aten.add.Tensor: _add,
    _aten.add.Scalar: lambda t, a: _scaled(t, a, "add"),
    _aten.sub.Tensor: lambda t, a: _scaled(t, a, "subtract"),
    _aten.sub.Scalar: lambda t, a: _scaled(t, a, "subtract"),
    _aten.neg.default: _unary("negative"),
    _aten.reciprocal.default: _unary(_reciprocal, FLOAT),
    _aten.relu.default: _unary(_relu),
    _aten.sigmoid.default: _unary(_sigmoid, FLOAT),
    _aten.silu.default: _unary(_silu),
    _aten.gelu.default: _gelu,
    _aten.abs.default: _unary(lambda t, x: t.op.abs(x) if _is_float(t, x) else t.op.maximum(x, t.op.negative(x))),
    _aten.sign.default: _unary(_sign),
    _aten.log1p.default: _unary(_log1p, FLOAT),
    _aten.expm1.default: _unary(_expm1, FLOAT),
    _aten.isnan.default: _unary(is_nan, BOOL),
    _aten.isinf.default: _unary(_is_infinite, BOOL),
    _aten.isfinite.default: _unary(_is_finite, BOOL),
    _aten.pow.Tensor_Scalar: _power,
    _aten.pow.Tensor_Tensor: _power,
    _aten.pow.Scalar: _power,
    _aten.div.Tensor_mode: _rounded_divide,
    _aten.div.Scalar_mode: _rounded_divide,
    _aten.maximum.default: _binary(_greater_of),
    _aten.minimum.default: _binary(_less_of),
    _aten.clamp.default: _clamp,
    _aten.clamp.Tensor: _clamp,
    _aten.bitwise_not.default: _unary(_bits("not")),
    _aten.logical_not.default: _logical("not", "self"),
    _aten.where.self: _where,
    _aten.where.ScalarOther: _where,
    _aten.where.ScalarSelf: _where,
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.masked_fill.Tensor: _masked_fill,
    _aten.to.dtype: _cast,
    _aten.to.device: _cast,
    _aten.to.dtype_layout: _cast,
    _aten.to.other: _cast_like,
    _aten.type_as.default: _cast_like,
    _aten._to_copy.default: _cast,
    _aten.copy.default: _copy,
}

for _name in ("exp", "tanh", "erf"):
    _TRANSLATIONS[getattr(_aten, _name).default] = _unary(_keeping_nan(_name), FLOAT)
for _name in ("rsqrt", "sqrt", "cos", "sin", "tan", "log"):
    _TRANSLATIONS[getattr(_aten, _name).default] = _unary(_name, FLOAT)
for _name in ("floor", "ceil", "round", "trunc"):
    _TRANSLATIONS[getattr(_aten, _name).default] = _unary(_whole(_name))

_FORMULAS: dict[str, Translation] = {
    "mul": _binary(_multiply),
    "div": _divide,
    "floor_divide": _binary(_floor_divide),
    "remainder": _binary(_remainder),
    "fmod": _binary(_fmod),
    "eq": _binary("equal", BOOL),
    "ne": _binary(_differs, BOOL),
    "lt": _binary("less", BOOL),
    "le": _binary("less_equal", BOOL),
    "gt": _binary("greater", BOOL),
    "ge": _binary("greater_equal", BOOL),
    "bitwise_and": _binary(_bits("and")),
    "bitwise_or": _binary(_bits("or")),
    "bitwise_xor": _binary(_bits("xor")),
    "__and__": _binary(_bits("and")),
    "__or__": _binary(_bits("or")),
    "__xor__": _binary(_bits("xor")),
}
"""Operators with one overload for tensors and one for a number as the second operand, and some for a first one."""

for _name, _translation in _FORMULAS.items():
    for _kind in ("Tensor", "Scalar", "Scalar_Tensor"):
        if _kind in getattr(_aten, _name).overloads():
            _TRANSLATIONS[getattr(getattr(_aten, _name), _kind)] = _translation
_TRANSLATIONS[_aten.floor_divide.default] = _FORMULAS["floor_divide"]

for _name in ("and", "or", "xor"):
    _TRANSLATIONS[getattr(_aten, f"logical_{_name}").default] = _logical(_name, "self", "other")

_ON_COMPLEX: dict[Any, Translation] = {
    _aten.mul.Tensor: multiplied,
    _aten.neg.default: by_parts(_TRANSLATIONS[_aten.neg.default]),
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation, on_complex=_ON_COMPLEX.get(_target)))
