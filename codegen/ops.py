"""The ``lbllm::*`` operators of lowered and simulated graphs, as ``torch.library`` definitions.

Importing this module registers them. Their eager implementation *is* the reference (:mod:`.reference`): slow and exact.
A compiled model never runs it for linears and quantizers; its executor binds proven kernels to those nodes instead.

==========================  ===========================================================================================
``observe``                 identity; marks an input whose statistics a calibration pass wants
``unpack_weight``           W(1+1) planes and levels to a float matrix (simulation)
``unpack_rows``             int8-per-row matrix to float (simulation of embedding and lm_head)
``fake_quantize``           quantize and dequantize activations (simulation)
``fake_quantize_kv``        quantize and dequantize keys or values per token and head (simulation)
``grouped_linear``          float linear over stacked experts, tokens sorted by expert (simulation)
``quantize_activation``     float activations to integer values and scales
``bit_linear``              quantized activations times W(1+1) weights
``grouped_bit_linear``      the same for stacked experts, tokens sorted by expert
``int8_linear``             quantized activations times int8-per-row weights
``int8_embedding``          rows of an int8-per-row table
``cached_attention``        attention over a quantized KV cache, which it updates
==========================  ===========================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .format import QuantizedWeight
from .sizes import group_count

NAMESPACE = "lbllm"

_library = torch.library.Library(NAMESPACE, "DEF")

_library.define("observe(Tensor(a) x, str site) -> Tensor(a)")
_library.define(
    "unpack_weight(Tensor sign, Tensor bitmap, Tensor levels, Tensor scale, int in_features, int group) -> Tensor"
)
_library.define("unpack_rows(Tensor weight, Tensor scale) -> Tensor")
_library.define("fake_quantize(Tensor x, Tensor clip, int bits, int group, Tensor? knees=None) -> Tensor")
_library.define("fake_quantize_kv(Tensor x, int bits) -> Tensor")
_library.define("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
_library.define(
    "quantize_activation(Tensor x, Tensor clip, int bits, int group, Tensor? knees=None) -> (Tensor, Tensor)"
)
_library.define(
    "bit_linear(Tensor values, Tensor x_scale, Tensor sign, Tensor bitmap, Tensor levels, Tensor scale,"
    " Tensor? bias, int group) -> Tensor"
)
_library.define(
    "grouped_bit_linear(Tensor values, Tensor x_scale, Tensor sign, Tensor bitmap, Tensor levels, Tensor scale,"
    " Tensor offsets, int group) -> Tensor"
)
_library.define(
    "int8_linear(Tensor values, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, int group) -> Tensor"
)
_library.define("int8_embedding(Tensor weight, Tensor scale, Tensor ids) -> Tensor")
_library.define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_codes, Tensor(b!) key_params,"
    " Tensor(c!) value_codes, Tensor(d!) value_params, Tensor key_mask, SymInt past, float scale, int window,"
    " int bits) -> Tensor"
)


def _implement(name: str):
    """Registers the eager implementation of ``lbllm::name`` for every device."""

    def register(function):
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


@_implement("observe")
def _observe(x: Tensor, site: str) -> Tensor:
    return x.view_as(x)


@_implement("unpack_weight")
def _unpack_weight(sign: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor, in_features: int, group: int) -> Tensor:
    return QuantizedWeight(sign, bitmap, levels, scale, in_features, group).dequantize()


@_implement("unpack_rows")
def _unpack_rows(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float() * scale.unsqueeze(-1)


@_implement("fake_quantize")
def _fake_quantize(x: Tensor, clip: Tensor, bits: int, group: int, knees: Tensor | None = None) -> Tensor:
    values, scale = reference.quantize_activation(x, clip, bits, group, knees)
    return reference.dequantize_activation(values, scale, group).to(x.dtype)


@_implement("fake_quantize_kv")
def _fake_quantize_kv(x: Tensor, bits: int) -> Tensor:
    return reference.dequantize_kv(*reference.quantize_kv(x, bits), bits, x.shape[-1]).to(x.dtype)


@_implement("grouped_linear")
def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        out[start:end] = torch.nn.functional.linear(x[start:end], weight[expert])
        start = end
    return out


@_implement("quantize_activation")
def _quantize_activation(
    x: Tensor, clip: Tensor, bits: int, group: int, knees: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return reference.quantize_activation(x, clip, bits, group, knees)


@_implement("bit_linear")
def _bit_linear(
    values: Tensor,
    x_scale: Tensor,
    sign: Tensor,
    bitmap: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    weight = QuantizedWeight(sign, bitmap, levels, scale, values.shape[-1], group)
    return reference.bit_linear(values, x_scale, weight, bias)


@_implement("grouped_bit_linear")
def _grouped_bit_linear(
    values: Tensor,
    x_scale: Tensor,
    sign: Tensor,
    bitmap: Tensor,
    levels: Tensor,
    scale: Tensor,
    offsets: Tensor,
    group: int,
) -> Tensor:
    out = values.new_zeros((values.shape[0], sign.shape[-2]), dtype=torch.float32)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        weight = QuantizedWeight(sign[expert], bitmap[expert], levels[expert], scale[expert], values.shape[-1], group)
        out[start:end] = reference.bit_linear(values[start:end], x_scale[start:end], weight)
        start = end
    return out


@_implement("int8_linear")
def _int8_linear(
    values: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    return reference.int8_linear(values, x_scale, weight, w_scale, bias, group)


@_implement("int8_embedding")
def _int8_embedding(weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    return weight[ids].float() * scale[ids].unsqueeze(-1)


_library.impl("cached_attention", reference.cached_attention, "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


@_fake("observe")
def _(x, site):
    return x.view_as(x)


@_fake("unpack_weight")
def _(sign, bitmap, levels, scale, in_features, group):
    return scale.new_empty((*sign.shape[:-1], in_features), dtype=torch.float32)


@_fake("unpack_rows")
def _(weight, scale):
    return weight.new_empty(weight.shape, dtype=torch.float32)


@_fake("fake_quantize")
def _(x, clip, bits, group, knees=None):
    return torch.empty_like(x)


@_fake("fake_quantize_kv")
def _(x, bits):
    return torch.empty_like(x)


@_fake("grouped_linear")
def _(x, weight, offsets):
    return x.new_empty((x.shape[0], weight.shape[1]))


@_fake("quantize_activation")
def _(x, clip, bits, group, knees=None):
    groups = group_count(x.shape[-1], group) if group else 1
    return (
        x.new_empty(x.shape, dtype=reference.value_dtype(bits)),
        x.new_empty((*x.shape[:-1], groups), dtype=torch.float32),
    )


@_fake("bit_linear")
def _(values, x_scale, sign, bitmap, levels, scale, bias, group):
    return values.new_empty((*values.shape[:-1], sign.shape[-2]), dtype=torch.float32)


@_fake("grouped_bit_linear")
def _(values, x_scale, sign, bitmap, levels, scale, offsets, group):
    return values.new_empty((values.shape[0], sign.shape[-2]), dtype=torch.float32)


@_fake("int8_linear")
def _(values, x_scale, weight, w_scale, bias, group):
    return values.new_empty((*values.shape[:-1], weight.shape[0]), dtype=torch.float32)


@_fake("int8_embedding")
def _(weight, scale, ids):
    return scale.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32)


@_fake("cached_attention")
def _(
    query,
    key,
    value,
    key_codes,
    key_params,
    value_codes,
    value_params,
    key_mask,
    past,
    scale,
    window,
    bits,
):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
