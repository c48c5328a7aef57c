"""Operands of different types: what torch computes in, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND
from torch._prims_common import elementwise_dtypes

from ..arguments import Arguments
from ..translator import Translator, Value, refusal

ARITHMETIC = KIND.DEFAULT
"""The result has the highest of the operands' types; numbers count by their kind alone."""

FLOAT = KIND.INT_TO_FLOAT
"""The same, but integers become floats."""

BOOL = KIND.ALWAYS_BOOL
"""What is computed in the highest type is a truth value."""


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name in programs, e.g. ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name."""
    return getattr(torch, name)


def promoted(t: Translator, a: Arguments, kind: KIND, operands: Sequence[Any]) -> tuple[list[Value], str]:
    """Operands as tensors of the type that torch computes in, and the type of its result.

    Args:
        t: the translator.
        a: the call, for messages.
        kind: how the operator promotes, as torch says.
        operands: tensors, sizes and numbers; at least one tensor.

    Returns:
        ``(tensors, dtype)``.

    Raises:
        UntranslatableError: there is no tensor, or torch computes in complex numbers.
    """
    if not any(t.is_tensor(v) for v in operands):
        raise refusal(a, "arithmetic without tensors has no translation")
    computed, result = elementwise_dtypes(*(_stand_in(t, v) for v in operands), type_promotion_kind=kind)
    if computed.is_complex:
        raise refusal(a, "arithmetic on complex numbers has no translation")
    return [_operand(t, v, name_of(computed)) for v in operands], name_of(result)


def _operand(t: Translator, operand: Any, dtype: str) -> Value:
    """:func:`tensor`, in which zero is no constant: TVM takes what is multiplied by that for zero, whatever it is."""
    x = tensor(t, operand, dtype)
    is_zero = isinstance(operand, (bool, int, float)) and operand == 0
    return t.variable(x) if is_zero and dtype_of(dtype).is_floating_point else x


def _stand_in(t: Translator, operand: Any) -> Any:
    """What torch is asked about: a tensor without elements in memory for a tensor, an int for a size."""
    if t.is_tensor(operand):
        return torch.empty((1,) * len(t.shape(operand)), dtype=dtype_of(t.dtype(operand)), device="meta")
    return operand if isinstance(operand, (bool, int, float)) else 1


def tensor(t: Translator, operand: Any, dtype: str) -> Value:
    """A tensor, a size or a number as a tensor of a dtype."""
    if t.is_tensor(operand):
        return cast(t, operand, dtype)
    if isinstance(operand, (bool, int, float)):
        return t.constant(dtype_number(operand, dtype), dtype)
    return t.compute((), lambda size: lambda: t.tir.Cast(dtype, size), operand)


def dtype_number(number: bool | int | float, dtype: str) -> bool | int | float:
    """A number as one that a tensor of the dtype holds."""
    kind = dtype_of(dtype)
    if kind == torch.bool:
        return bool(number)
    return float(number) if kind.is_floating_point else int(number)


def cast(t: Translator, x: Value, dtype: str) -> Value:
    """A tensor as one of a dtype."""
    return x if t.dtype(x) == dtype else t.emit(t.op.astype(x, dtype))
