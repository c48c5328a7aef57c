"""What verifications of operators share: shapes, dtypes and ranges of tensors that may be fake ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..sizes import ACTIVATION_BITS, GROUPS
from .arguments import Arguments
from .registry import OperatorError


def require(condition: bool, arguments: Arguments, what: str) -> None:
    """Raises :class:`OperatorError` unless the condition holds."""
    if not condition:
        raise OperatorError(f"'{arguments.node.name}' ({arguments.node.target}): {what}")


def check_types(a: Arguments) -> None:
    """Where an operator takes a tensor, it is given one.

    Raises:
        OperatorError: naming the argument.
    """
    for argument in a.node.target._schema.arguments:
        if isinstance(argument.type, torch.TensorType):
            require(isinstance(getattr(a, argument.name), Tensor), a, f"{argument.name} is no tensor")


def has_values(tensor: Any) -> bool:
    """Whether a tensor's values can be looked at."""
    return isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def require_tensor(a: Arguments, name: str, dtype: torch.dtype, *dimensions: int | None) -> Tensor:
    """The argument of that name, a tensor of a dtype whose last dimensions have the given sizes (None: any)."""
    tensor = getattr(a, name)
    require(tensor.dtype == dtype, a, f"{name} is {tensor.dtype}, not {dtype}")
    sizes = [*tensor.shape][-len(dimensions) :] if dimensions else []
    fits = len(sizes) == len(dimensions) and all(d is None or d == s for d, s in zip(dimensions, sizes, strict=True))
    wanted = ["any" if d is None else d for d in dimensions]
    require(fits, a, f"{name} has the shape {list(tensor.shape)} where [..., {', '.join(map(str, wanted))}] belongs")
    return tensor


def require_scales(a: Arguments, name: str, dtype: torch.dtype, *dimensions: int | None) -> Tensor:
    """:func:`require_tensor` of scales, which are finite and not negative."""
    scales = require_tensor(a, name, dtype, *dimensions)
    if has_values(scales):
        good = bool(torch.isfinite(scales).all()) and not bool((scales < 0).any())
        require(good, a, f"{name} has values that are negative or not finite")
    return scales


def require_group(a: Arguments, whole_token: bool) -> None:
    """``group`` is one of the format's, or 0 where one group may be the whole token."""
    allowed = (0, *GROUPS) if whole_token else GROUPS
    require(a.group in allowed, a, f"groups of {a.group} channels are not one of {allowed}")


def require_bits(a: Arguments, allowed: tuple[int, ...] = ACTIVATION_BITS) -> None:
    """``bits`` is a width that exists."""
    require(a.bits in allowed, a, f"{a.bits} bits are not one of {allowed}")
