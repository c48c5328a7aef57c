"""Attention, as models write it and over a quantized KV cache, and what simulates that quantization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...sizes import KV_BITS
from ...spec import AttentionSpec
from ..arguments import Arguments
from ..checks import require, require_bits, require_tensor
from ..registry import define
from ..translator import Translator

STATE = ("key_codes", "key_params", "value_codes", "value_params")
"""Arguments that are the KV state of one attention."""


def _fake_quantize_kv(x: Tensor, bits: int) -> Tensor:
    return reference.dequantize_kv(*reference.quantize_kv(x, bits), bits, x.shape[-1]).to(x.dtype)


fake_quantize_kv = define(
    "fake_quantize_kv(Tensor x, int bits) -> Tensor",
    reference=_fake_quantize_kv,
    shape=lambda x, bits: torch.empty_like(x),
    verify=lambda a: require_bits(a, KV_BITS),
)


def _shape(query, key, value, *rest):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _verify_heads(a: Arguments) -> None:
    """Queries, keys and values fit each other, and so does what every head has a number of."""
    for name in ("query", "key", "value"):
        require(getattr(a, name).dim() == 4, a, f"{name} is not [batch, heads, tokens, channels]")
    heads, shared = a.query.shape[1], a.key.shape[1]
    require(heads % shared == 0 and a.value.shape[1] == shared, a, f"{heads} heads cannot share {shared} of the keys'")
    require(a.query.shape[-1] == a.key.shape[-1], a, "queries and keys differ in their channels")
    require(0.0 <= a.softcap < math.inf, a, f"scores cannot be bounded by {a.softcap}")
    if a.sinks is not None:
        require_tensor(a, "sinks", torch.float32, heads)


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale, float softcap=0.0,"
    " Tensor? sinks=None) -> Tensor",
    reference=reference.attention,
    shape=None,
    verify=_verify_heads,
)


def _verify_cached(a: Arguments) -> None:
    require_bits(a, KV_BITS)
    require(a.window >= 0, a, f"a window of {a.window} tokens is less than none")
    require(a.chunk >= 0, a, f"a chunk of {a.chunk} tokens is less than none")
    _verify_heads(a)
    batch, shared, new, _ = a.key.shape
    for tensor, codes, params in ((a.key, *STATE[:2]), (a.value, *STATE[2:])):
        # what one key or value is stored as
        sample = torch.zeros((1, tensor.shape[-1]))
        for name, stored in zip((codes, params), reference.quantize_kv(sample, a.bits), strict=True):
            state = require_tensor(a, name, stored.dtype, shared, None, stored.shape[-1])
            require(state.dim() == 4 and state.shape[0] == batch, a, f"{name} is not the state of {batch} sequences")
            require(state.shape[2] >= a.past + new, a, f"{name} has no room for {a.past + new} tokens")
    require([*a.key_mask.shape] == [batch, a.past + new], a, f"key_mask is not [{batch}, {a.past + new}]")
    if a.slopes is not None:
        require_tensor(a, "slopes", torch.float32, a.query.shape[1])


def _translate(t: Translator, a: Arguments) -> Any:
    query, key, value, mask = a.pick("query", "key", "value", "key_mask")
    state = a.pick(*STATE)
    heads, _, width = t.shape(query)[1:]
    sinks, slopes = a.sinks, a.slopes
    spec = AttentionSpec(
        heads,
        t.shape(key)[1],
        width,
        t.shape(value)[3],
        a.bits,
        a.window,
        a.scale,
        a.softcap,
        sinks is not None,
        slopes is not None,
        a.counted,
        a.chunk,
    )
    if a.bits == 16:
        state = [state[0], state[0], state[2], state[2]]
    output = ([*t.shape(query)[:3], spec.value_width], "float32")
    # Within a launch that is there anyway, heads are worth sharing out even for one token.
    kernel = t.kernels.attention(spec, t.length, parallel=t.rows is None or t.blocks)
    # A kernel that reads one of them takes both.
    heads_own = [slopes if sinks is None else sinks, sinks if slopes is None else slopes] if spec.per_head else []
    past = [a.past] if t.is_tensor(a.past) else []
    return t.call(kernel, [query, key, value, *state, mask, *past, *heads_own], output)


cached_attention = define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_codes, Tensor(b!) key_params,"
    " Tensor(c!) value_codes, Tensor(d!) value_params, Tensor key_mask, SymInt past, float scale, int window,"
    " int bits, float softcap=0.0, Tensor? sinks=None, Tensor? slopes=None, bool counted=False, int chunk=0) -> Tensor",
    reference=reference.cached_attention,
    shape=_shape,
    verify=_verify_cached,
    translate=_translate,
    updates=STATE,
)
