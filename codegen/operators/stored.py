"""What a stored graph may call: functions without side effects, found by name and in no other way."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from . import registry

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "operator.getitem": operator.getitem,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
}

_ATEN_NAMES = """
    __and__ __or__ __xor__ _safe_softmax add addcdiv addcmul addmm all any baddbmm bmm ceil clamp_max clamp_min
    conv1d conv2d copy cos div div_ elu eq erf exp expm1 eye floor ge glu group_norm gt hardsigmoid hardswish
    hardtanh index index_add_ index_put index_put_ isfinite isinf isnan le leaky_relu log log1p log2 logsumexp lt
    masked_fill_ masked_scatter max min mish mm mul narrow native_layer_norm ne neg nonzero numel one_hot pad pow
    prod relu6 remainder repeat_interleave round rsub scatter scatter_ scatter_add_ select select_scatter selu sin
    slice slice_scatter softplus sort split sqrt square std sub sum swapaxes sym_size take_along_dim tanh
    tensor_split threshold to unsqueeze_ upsample_nearest2d var var_mean view where zero_
"""
"""Operators of the ``aten`` namespace of which a stored graph may call every overload without an ``out`` argument, also
those without a home in the registry. What has a home there needs no entry."""

_ATEN = frozenset(_ATEN_NAMES.split())


def name_of(target: Any) -> str | None:
    """The name under which a call's target is stored, e.g. ``aten.add.Tensor``; None for one that has none."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return next((name for name, function in _FUNCTIONS.items() if function is target), None)


def resolve(name: str) -> Callable[..., Any] | None:
    """The function that a stored name means; None for one that no stored graph may call.

    Raises:
        OperatorError: an installed package has it, and cannot be imported.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    if namespace == registry.NAMESPACE:
        known = registry.named(name)
        return None if known is None else known.target
    packet, _, overload = rest.partition(".")
    if namespace != "aten":
        return None
    found = getattr(torch.ops.aten, packet, None)
    if found is None or overload not in found.overloads():
        return None
    target = getattr(found, overload)
    if registry.find(target) is not None:
        return target
    return target if packet in _ATEN and not any(a.is_out for a in target._schema.arguments) else None
