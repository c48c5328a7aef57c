"""Operators that make tensors of a number, and of sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..arguments import Arguments
from ..registry import Operator, register
from ..translator import Size, Translation, Translator, Value, broadcast, refusal
from .promotion import name_of, tensor
from .shapes import greater

_aten = torch.ops.aten


def _dtype_of(a: Arguments, otherwise: str) -> str:
    return otherwise if a.dtype is None else name_of(a.dtype)


def filled(t: Translator, sizes: Sequence[Size], value: Any, dtype: str) -> Value:
    """A tensor of these sizes, of one number."""
    number = t.variable(tensor(t, value, dtype))
    return broadcast(t, t.reshape(number, []) if t.shape(number) else number, sizes)


def _default_dtype(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return name_of(torch.get_default_dtype()) if isinstance(value, float) else "int64"


def _full(t: Translator, a: Arguments) -> Value:
    kind = t.dtype(a.fill_value) if t.is_tensor(a.fill_value) else _default_dtype(a.fill_value)
    return filled(t, a.size, a.fill_value, _dtype_of(a, kind))


def _constant(value: int) -> Translation:
    def translate(t: Translator, a: Arguments) -> Value:
        return filled(t, a.size, value, _dtype_of(a, name_of(torch.get_default_dtype())))

    return translate


def _full_like(t: Translator, a: Arguments) -> Value:
    return filled(t, t.shape(a.self), a.fill_value, _dtype_of(a, t.dtype(a.self)))


def _constant_like(value: int) -> Translation:
    return lambda t, a: filled(t, t.shape(a.self), value, _dtype_of(a, t.dtype(a.self)))


def _new_full(t: Translator, a: Arguments) -> Value:
    return filled(t, a.size, a.fill_value, _dtype_of(a, t.dtype(a.self)))


def _new_constant(value: int) -> Translation:
    return lambda t, a: filled(t, a.size, value, _dtype_of(a, t.dtype(a.self)))


def _fill(t: Translator, a: Arguments) -> Value:
    return filled(t, t.shape(a.self), a.value, t.dtype(a.self))


def _scalar_tensor(t: Translator, a: Arguments) -> Value:
    return t.variable(tensor(t, a.s, _dtype_of(a, name_of(torch.get_default_dtype()))))


def _arange(t: Translator, a: Arguments) -> Value:
    start, end = (a.start if "start" in a else 0), a.end
    step = a.step if "step" in a else 1
    if not isinstance(step, (int, float)):
        raise refusal(a, "a range in dynamic steps has no translation")
    floats = any(isinstance(v, float) for v in (start, end, step))
    dtype = _dtype_of(a, name_of(torch.get_default_dtype()) if floats else "int64")
    if floats:
        if not all(isinstance(v, (int, float)) for v in (start, end, step)):
            raise refusal(a, "a range of floats to a dynamic end has no translation")
        size: Any = math.ceil((end - start) / step)
    elif step == 1:
        size = greater(t, end - start, 0)
    elif step > 0:
        size = greater(t, (end - start + step - 1) // step, 0)
    else:
        size = greater(t, (start - end - step - 1) // -step, 0)

    if floats:
        first, by = (t.tir.const(v, "float64") for v in (start, step))
        return t.compute((size,), lambda: lambda i: t.tir.Cast(dtype, first + t.tir.Cast("float64", i) * by))
    return t.compute(
        (size,), lambda first, by: lambda i: t.tir.Cast(dtype, first + t.tir.Cast("int64", i) * by), start, step
    )


_TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    _aten.full.default: _full,
    _aten.zeros.default: _constant(0),
    _aten.ones.default: _constant(1),
    _aten.full_like.default: _full_like,
    _aten.zeros_like.default: _constant_like(0),
    _aten.ones_like.default: _constant_like(1),
    _aten.new_full.default: _new_full,
    _aten.new_zeros.default: _new_constant(0),
    _aten.new_ones.default: _new_constant(1),
    # What is in memory that nobody has written is not for a program to give.
    _aten.empty_like.default: _constant_like(0),
    _aten.new_empty.default: _new_constant(0),
    _aten.fill.Scalar: _fill,
    _aten.fill.Tensor: _fill,
    _aten.scalar_tensor.default: _scalar_tensor,
    _aten.arange.default: _arange,
    _aten.arange.start: _arange,
    _aten.arange.start_step: _arange,
}

for _target, _translation in _TRANSLATIONS.items():
    register(Operator(_target, _translation))
