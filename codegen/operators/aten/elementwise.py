"""Operators that compute every element from the elements at its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Translation, Translator, Value, refusal

_aten = torch.ops.aten


def _unary(name: str) -> Translation:
    """An operator of one tensor, by its name among those of programs."""
    return lambda t, a: t.emit(getattr(t.op, name)(a.self))


def _operands(t: Translator, a: Arguments) -> tuple[Value, Value]:
    """Both operands as tensors; a number becomes a constant of the other operand's dtype."""
    found = [a.self, a.other]
    tensors = [v for v in found if t.is_tensor(v)]
    if not tensors:
        raise refusal(a, "arithmetic on sizes has no translation")
    kind = t.dtype(tensors[0])
    left, right = (v if t.is_tensor(v) else t.constant(v, kind) for v in found)
    return left, right


def _binary(name: str) -> Translation:
    def translate(t: Translator, a: Arguments) -> Value:
        if a.node.kwargs.keys() - {"alpha"} or a.node.kwargs.get("alpha", 1) != 1:
            raise refusal(a, "this form of the operator has no translation")
        left, right = _operands(t, a)
        if t.dtype(left) != t.dtype(right):
            raise refusal(a, "operands of different types have no translation")
        return t.emit(getattr(t.op, name)(left, right))

    return translate


_plain_add = _binary("add")


def _add(t: Translator, a: Arguments) -> Value:
    """An addition, which a linear takes over where its result is added to a tensor of the same shape."""
    joined = t.add_to_linear(a.node)
    return _plain_add(t, a) if joined is None else joined


def _power(t: Translator, a: Arguments) -> Value:
    x, exponent = a.self, a.exponent
    if exponent not in (2, 3):
        return t.emit(t.op.power(x, t.constant(float(exponent), t.dtype(x))))
    result = t.emit(t.op.multiply(x, x))
    return t.emit(t.op.multiply(result, x)) if exponent == 3 else result


def _logistic(t: Translator, x: Value) -> Value:
    """``1 + exp(-x)``."""
    return t.op.add(t.constant(1.0, t.dtype(x)), t.op.exp(t.op.negative(x)))


def _sigmoid(t: Translator, a: Arguments) -> Value:
    x = a.self
    return t.emit(t.op.divide(t.constant(1.0, t.dtype(x)), _logistic(t, x)))


def _silu(t: Translator, a: Arguments) -> Value:
    x = a.self
    return t.emit(t.op.divide(x, _logistic(t, x)))


def _gelu(t: Translator, a: Arguments) -> Value:
    x, op = a.self, t.op

    def number(value: float) -> Any:
        return t.constant(value, t.dtype(x))

    if a.approximate == "tanh":
        cube = op.multiply(op.multiply(x, x), x)
        inner = op.add(x, op.multiply(cube, number(0.044715)))
        gate = op.tanh(op.multiply(inner, number((2 / math.pi) ** 0.5)))
    else:
        gate = op.erf(op.multiply(x, number(0.5**0.5)))
    half = op.multiply(x, number(0.5))
    return t.emit(op.multiply(half, op.add(gate, number(1.0))))


def _cast(t: Translator, a: Arguments) -> Value:
    x = a.self
    kind = None if a.dtype is None else str(a.dtype).removeprefix("torch.")
    return x if kind in (None, t.dtype(x)) else t.emit(t.op.astype(x, kind))


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    _aten.add.Tensor: _add,
    _aten.sub.Tensor: _binary("subtract"),
    _aten.mul.Tensor: _binary("multiply"),
    _aten.div.Tensor: _binary("divide"),
    _aten.neg.default: _unary("negative"),
    _aten.rsqrt.default: _unary("rsqrt"),
    _aten.cos.default: _unary("cos"),
    _aten.sin.default: _unary("sin"),
    _aten.exp.default: _unary("exp"),
    _aten.tanh.default: _unary("tanh"),
    _aten.relu.default: lambda t, a: t.emit(t.op.nn.relu(a.self)),
    _aten.sigmoid.default: _sigmoid,
    _aten.silu.default: _silu,
    _aten.gelu.default: _gelu,
    _aten.pow.Tensor_Scalar: _power,
    _aten.to.dtype: _cast,
    _aten._to_copy.default: _cast,
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation))
