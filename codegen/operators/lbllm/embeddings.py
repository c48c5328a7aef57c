"""Rows of a table, int8 or of 4-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...format import Int4Weight
from ...spec import EmbeddingSpec
from ..arguments import Arguments
from ..checks import require, require_scales, require_tensor
from ..registry import define
from ..translator import Translator, Value, flat
from .linears import verify_int4


def _rows(weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    return weight[ids].float() * scale[ids].unsqueeze(-1)


def _verify(a: Arguments) -> None:
    rows = require_tensor(a, "weight", torch.int8, None, None)
    require(rows.dim() == 2, a, "weight is no matrix")
    require_scales(a, "scale", torch.float32, rows.shape[0])


def _translate(t: Translator, a: Arguments) -> Any:
    return _taken(t, a.ids, EmbeddingSpec(*t.shape(a.weight)), a.pick("weight", "scale"))


def _taken(t: Translator, ids: Value, spec: EmbeddingSpec, table: Sequence[Value]) -> Any:
    """The rows of a table, whose tensors are as the kernel of ``spec`` takes them."""
    sizes = t.shape(ids)
    if t.dtype(ids) != "int64":
        ids = t.emit(t.op.astype(ids, "int64"))
    matrix = flat(t, ids)[0] if sizes else t.reshape(ids, [1, 1])
    found = t.call(t.kernels.embedding(spec), [*table, matrix], ([*t.shape(matrix), spec.columns], "float32"))
    return t.reshape(found, [*sizes, spec.columns])


int8_embedding = define(
    "int8_embedding(Tensor weight, Tensor scale, Tensor ids) -> Tensor",
    reference=_rows,
    shape=lambda weight, scale, ids: scale.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32),
    verify=_verify,
    translate=_translate,
    integer=True,
)


def _int4_rows(codes: Tensor, table: Tensor, w_scale: Tensor, ids: Tensor, in_features: int, group: int) -> Tensor:
    rows = Int4Weight(codes, table, w_scale, in_features, group).rows(ids.flatten()).dequantize()
    return rows.reshape(*ids.shape, in_features)


def _verify_int4(a: Arguments) -> None:
    require(a.in_features > 0, a, f"a row cannot have {a.in_features} columns")
    verify_int4(a, a.in_features)


def _translate_int4(t: Translator, a: Arguments) -> Any:
    spec = EmbeddingSpec(t.shape(a.codes)[0], a.in_features, a.group)
    return _taken(t, a.ids, spec, a.pick("codes", "table", "w_scale"))


int4_embedding = define(
    "int4_embedding(Tensor codes, Tensor table, Tensor w_scale, Tensor ids, int in_features, int group) -> Tensor",
    reference=_int4_rows,
    shape=lambda codes, table, w_scale, ids, in_features, group: w_scale.new_empty(
        (*ids.shape, in_features), dtype=torch.float32
    ),
    verify=_verify_int4,
    translate=_translate_int4,
    integer=True,
)
