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
    __and__ __or__ __xor__ abs add addcdiv addcmul addmm alias all amax amin any arange argmax argmin argsort
    baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_to cat ceil chunk clamp clamp_max clamp_min
    clone constant_pad_nd contiguous copy cos cumsum detach div div_ dropout elu embedding empty_like eq erf exp
    expand expand_as expm1 eye fill flatten flip floor floor_divide full full_like gather ge gelu glu group_norm gt
    hardsigmoid hardswish hardtanh histc index index_add index_add_ index_put index_put_ index_select isfinite isinf
    isnan layer_norm le leaky_relu lift_fresh_copy linear log log1p log2 log_softmax logical_and logical_not
    logical_or logsumexp lt masked_fill masked_fill_ masked_scatter matmul max maximum mean min minimum mish mm
    movedim mul narrow native_layer_norm ne neg new_empty new_full new_ones new_zeros nonzero numel one_hot ones
    ones_like pad permute pow prod reciprocal relu relu6 remainder repeat repeat_interleave reshape rms_norm roll
    round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_add_ scatter_ select
    select_scatter selu sigmoid sign silu sin slice slice_scatter softmax softplus sort split split_with_sizes sqrt
    square squeeze stack std sub sum swapaxes t take_along_dim tanh tensor_split threshold to topk transpose tril
    triu trunc type_as unbind unflatten unsqueeze unsqueeze_ upsample_nearest2d var var_mean view view_as where
    zero_ zeros zeros_like _safe_softmax _softmax _to_copy _unsafe_view conv1d conv2d sym_size sym_numel
"""
"""Operators of the ``aten`` namespace, every overload without an ``out`` argument. Not all have translations."""

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
    if namespace != "aten" or packet not in _ATEN:
        return None
    found = getattr(torch.ops.aten, packet, None)
    if found is None or overload not in found.overloads():
        return None
    target = getattr(found, overload)
    return None if any(a.is_out for a in target._schema.arguments) else target
