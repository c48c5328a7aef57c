"""Operators that make one element of many."""

from __future__ import annotations

import torch

from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Translator, Value

_aten = torch.ops.aten


def _mean(t: Translator, a: Arguments) -> Value:
    x, dimensions = a.graph.self, list(a.dim)
    if a.keepdim and dimensions == [-1] and getattr(x, "target", None) is _aten.pow.Tensor_Scalar:
        power = Arguments(x)
        if power.exponent == 2:
            return t.mean_of_squares(t.value(power.self))
    return t.emit(t.op.mean(a.self, dimensions, a.keepdim))


register(Operator(_aten.mean.dim, _mean))
