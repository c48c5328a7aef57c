"""Operators that are layers of a network."""

from __future__ import annotations

import torch

from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Translator, Value, flat, refusal

_aten = torch.ops.aten


def _layer_norm(t: Translator, a: Arguments) -> Value:
    if a.weight is None or a.bias is None:
        raise refusal(a, "a layer norm without weight and bias has no translation")
    axes = list(range(-len(a.normalized_shape), 0))
    return t.emit(t.op.nn.layer_norm(a.input, a.weight, a.bias, axes, a.eps))


def _embedding(t: Translator, a: Arguments) -> Value:
    return t.emit(t.op.take(a.weight, a.indices, 0))


def _linear(t: Translator, a: Arguments) -> Value:
    x, weight = a.input, a.weight
    if t.dtype(x) != "float32" or t.dtype(weight) != "float32" or len(t.shape(weight)) != 2:
        raise refusal(a, "a linear of this kind has no translation")
    rows, columns = t.shape(weight)
    matrix, leading, count = flat(t, x)
    kernel = t.kernels.dense(rows, columns, t.length == 1)
    result = t.call(kernel, [matrix, weight], ([count, rows], "float32"))
    result = t.reshape(result, [*leading, rows])
    return result if a.bias is None else t.emit(t.op.add(result, a.bias))


register(Operator(_aten.layer_norm.default, _layer_norm))
register(Operator(_aten.embedding.default, _embedding))
register(Operator(_aten.linear.default, _linear))
