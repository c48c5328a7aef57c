"""Rows of an int8 table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import EmbeddingSpec
from ..arguments import Arguments
from ..checks import require, require_scales, require_tensor
from ..registry import define
from ..translator import Translator, flat


def _rows(weight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    return weight[ids].float() * scale[ids].unsqueeze(-1)


def _verify(a: Arguments) -> None:
    rows = require_tensor(a, "weight", torch.int8, None, None)
    require(rows.dim() == 2, a, "weight is no matrix")
    require_scales(a, "scale", torch.float32, rows.shape[0])


def _translate(t: Translator, a: Arguments) -> Any:
    rows, scale, ids = a.pick("weight", "scale", "ids")
    spec, sizes = EmbeddingSpec(*t.shape(rows)), t.shape(ids)
    if t.dtype(ids) != "int64":
        ids = t.emit(t.op.astype(ids, "int64"))
    matrix = flat(t, ids)[0] if sizes else t.reshape(ids, [1, 1])
    found = t.call(t.kernels.embedding(spec), [rows, scale, matrix], ([*t.shape(matrix), spec.columns], "float32"))
    return t.reshape(found, [*sizes, spec.columns])


int8_embedding = define(
    "int8_embedding(Tensor weight, Tensor scale, Tensor ids) -> Tensor",
    reference=_rows,
    shape=lambda weight, scale, ids: scale.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32),
    verify=_verify,
    translate=_translate,
    integer=True,
)
