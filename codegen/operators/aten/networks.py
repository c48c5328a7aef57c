"""Operators that are layers of a network."""

from __future__ import annotations

import torch

from ..arguments import Arguments
from ..checks import require
from ..registry import Operator, register
from ..translator import Size, Translator, Value, ensure, flat, refusal
from .creation import filled
from .promotion import dtype_of

_aten = torch.ops.aten


def _layer_norm(t: Translator, a: Arguments) -> Value:
    x, shape = a.input, list(a.normalized_shape)
    _ensure_last(t, x, shape, a.weight, a.bias)
    weight = filled(t, shape, 1.0, t.dtype(x)) if a.weight is None else a.weight
    bias = filled(t, shape, 0.0, t.dtype(x)) if a.bias is None else a.bias
    return t.emit(t.op.nn.layer_norm(x, weight, bias, list(range(-len(shape), 0)), a.eps))


def _rms_norm(t: Translator, a: Arguments) -> Value:
    x, op = a.input, t.op
    kind = t.dtype(x)
    _ensure_last(t, x, list(a.normalized_shape), a.weight)
    if len(a.normalized_shape) != 1 or kind != "float32":
        raise refusal(a, "an RMS norm over several dimensions has no translation")
    eps = torch.finfo(dtype_of(kind)).eps if a.eps is None else a.eps
    scale = t.emit(op.rsqrt(op.add(t.mean_of_squares(x), t.constant(eps, kind))))
    normed = t.emit(op.multiply(x, scale))
    return normed if a.weight is None else t.emit(op.multiply(normed, a.weight))


def _ensure_last(t: Translator, x: Value, shape: list[Size], *factors: Value | None) -> None:
    """The dimensions that are normalized, and what has elements for them, are of the shape that the call names."""
    for sizes in (t.shape(x)[-len(shape) :], *(t.shape(f) for f in factors if f is not None)):
        fits = [p == q for p, q in zip(sizes, shape, strict=False)]
        ensure(t, f"what is normalized is of {shape}", len(sizes) == len(shape), *fits)


def _product(t: Translator, a: Arguments) -> Value:
    x, y = a.self, a.mat2 if "mat2" in a else a.other
    if dtype_of(t.dtype(x)) != dtype_of(t.dtype(y)):
        raise refusal(a, "a product of different types has no translation")
    left, right = t.shape(x), t.shape(y)
    ensure(t, "the inner sizes of a product agree", left[-1] == right[-2 if len(right) > 1 else 0])
    if a.node.target is _aten.bmm.default:
        ensure(t, "products are of as many matrices", left[0] == right[0])
    return t.emit(t.op.matmul(x, y))


def _linear(t: Translator, a: Arguments) -> Value:
    x, weight = a.input, a.weight
    if t.dtype(x) != "float32" or t.dtype(weight) != "float32" or len(t.shape(weight)) != 2:
        raise refusal(a, "a linear of this kind has no translation")
    rows, columns = t.shape(weight)
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise refusal(a, "a linear by a matrix of dynamic size has no translation")
    matrix, leading, count = flat(t, x)
    kernel = t.kernels.dense(rows, columns, t.rows == 1)
    result = t.call(kernel, [matrix, weight], ([count, rows], "float32"))
    result = t.reshape(result, [*leading, rows])
    return result if a.bias is None else t.emit(t.op.add(result, a.bias))


def _not_at_random(a: Arguments) -> None:
    """Nothing is dropped out: a stored graph gives the same every time."""
    require(not (a.train and a.p) if "train" in a else not a.dropout_p, a, "it drops values out at random")


register(Operator(_aten.dropout.default, verify=_not_at_random))
register(Operator(_aten.scaled_dot_product_attention.default, verify=_not_at_random))
register(Operator(_aten.layer_norm.default, _layer_norm))
register(Operator(_aten.rms_norm.default, _rms_norm))
register(Operator(_aten.linear.default, _linear))
for _target in (_aten.matmul.default, _aten.mm.default, _aten.bmm.default):
    register(Operator(_target, _product))
