"""Linears: simulated, W(1+1), 4 bits, int8 per row, and over stacked experts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import reference
from ...format import TABLE_LEVELS, Int4Weight, QuantizedWeight, Weight
from ...sizes import GROUPS, group_count
from ..arguments import Arguments
from ..checks import has_values, require, require_group, require_scales, require_tensor
from ..registry import define
from ..translator import Translator, Value, refusal

WEIGHT = ("sign", "bitmap", "levels", "scale")
"""Arguments of a W(1+1) weight, in the order of :class:`QuantizedWeight`."""

INT8_WEIGHT = ("weight", "w_scale")
"""Arguments of an int8 weight."""

INT4_WEIGHT = ("codes", "table", "w_scale")
"""Arguments of a 4-bit weight, in the order of :class:`Int4Weight`."""


def _unpack(sign: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor, in_features: int, group: int) -> Tensor:
    return QuantizedWeight(sign, bitmap, levels, scale, in_features, group).dequantize()


unpack_weight = define(
    "unpack_weight(Tensor sign, Tensor bitmap, Tensor levels, Tensor scale, int in_features, int group) -> Tensor",
    reference=_unpack,
    shape=lambda sign, bitmap, levels, scale, in_features, group: scale.new_empty(
        (*sign.shape[:-1], in_features), dtype=torch.float32
    ),
    simulates=True,
)

unpack_rows = define(
    "unpack_rows(Tensor weight, Tensor scale) -> Tensor",
    reference=lambda weight, scale: weight.float() * scale.unsqueeze(-1),
    shape=lambda weight, scale: weight.new_empty(weight.shape, dtype=torch.float32),
    simulates=True,
)

unpack_int4 = define(
    "unpack_int4(Tensor codes, Tensor table, Tensor w_scale, int in_features, int group) -> Tensor",
    reference=lambda codes, table, w_scale, in_features, group: Int4Weight(
        codes, table, w_scale, in_features, group
    ).dequantize(),
    shape=lambda codes, table, w_scale, in_features, group: w_scale.new_empty(
        (codes.shape[0], in_features), dtype=torch.float32
    ),
    simulates=True,
)


def _grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = torch.nn.functional.linear(x[start:end], weight[expert])
        start = end
    return out


def _verify_offsets(a: Arguments, rows: Tensor, experts: int) -> None:
    """Rows of tokens are divided among as many experts as there are matrices."""
    require(rows.dim() == 2, a, "tokens are no rows")
    fits = [*a.offsets.shape] == [experts] and a.offsets.dtype in (torch.int32, torch.int64)
    require(fits, a, f"offsets are not {experts} integers")


def _verify_grouped(a: Arguments) -> None:
    require(a.weight.dim() == 3 and a.weight.shape[2] == a.x.shape[-1], a, "weight is not [experts, rows, columns]")
    _verify_offsets(a, a.x, a.weight.shape[0])


def _translate_grouped(t: Translator, a: Arguments) -> Value:
    x, weight = a.x, a.weight
    if t.dtype(x) != "float32" or t.dtype(weight) != "float32":
        raise refusal(a, "experts of another type than float32 have no translation")
    count, (_, rows, columns) = t.shape(x)[0], t.shape(weight)
    kernel = t.kernels.dense(rows, columns, t.rows == 1)
    return t.call_by_expert(kernel, [x], [weight], a.offsets, ([count, rows], "float32"))


grouped_linear = define(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    reference=_grouped,
    shape=lambda x, weight, offsets: x.new_empty((x.shape[0], weight.shape[1])),
    verify=_verify_grouped,
    translate=_translate_grouped,
)


def _translate(t: Translator, a: Arguments) -> Any:
    return t.linear(a.node)


def _verify_input(a: Arguments, *scales: int) -> None:
    """Values are quantized, and a token has one of these numbers of scales."""
    values = a.values
    require(values.dtype in (torch.int8, torch.int16), a, f"values are {values.dtype}, not quantized ones")
    given = require_scales(a, "x_scale", torch.float32, None).shape[-1]
    require(given in scales, a, f"x_scale has {given} scales a token, not {' or '.join(map(str, scales))}")


def _verify_grouped_input(a: Arguments, columns: int) -> None:
    """As :func:`_verify_input`, for weights in groups: a token has one scale, or one for each group or part of one."""
    _verify_input(a, *sorted({1, *(group_count(columns, group) for group in GROUPS if a.group % group == 0)}))


def _verify_bias(a: Arguments, rows: int) -> None:
    if a.bias is not None:
        bias = require_tensor(a, "bias", torch.float32, rows)
        require(bias.dim() == 1, a, f"bias is not [{rows}]")


def _verify_bit(a: Arguments) -> None:
    require_group(a, whole_token=False)
    columns = a.values.shape[-1]
    groups = group_count(columns, a.group)
    _verify_grouped_input(a, columns)
    rows = require_tensor(a, "sign", torch.uint8, None, -(-columns // 8)).shape[-2]
    require_tensor(a, "bitmap", torch.uint8, rows, -(-columns // 8))
    require_scales(a, "scale", torch.float16, rows, groups)
    require_tensor(a, "levels", torch.int8, rows, groups, 4)
    if "bias" in a:
        require(a.sign.dim() == 2, a, "sign is no matrix")
        _verify_bias(a, rows)
    else:
        require(a.sign.dim() == 3, a, "sign is not [experts, rows, bytes]")
        _verify_offsets(a, a.values, a.sign.shape[0])


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


bit_linear = define(
    "bit_linear(Tensor values, Tensor x_scale, Tensor sign, Tensor bitmap, Tensor levels, Tensor scale,"
    " Tensor? bias, int group) -> Tensor",
    reference=_bit_linear,
    shape=lambda values, x_scale, sign, bitmap, levels, scale, bias, group: values.new_empty(
        (*values.shape[:-1], sign.shape[-2]), dtype=torch.float32
    ),
    verify=_verify_bit,
    translate=_translate,
    integer=True,
    kernel=True,
)


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


grouped_bit_linear = define(
    "grouped_bit_linear(Tensor values, Tensor x_scale, Tensor sign, Tensor bitmap, Tensor levels, Tensor scale,"
    " Tensor offsets, int group) -> Tensor",
    reference=_grouped_bit_linear,
    shape=lambda values, x_scale, sign, bitmap, levels, scale, offsets, group: values.new_empty(
        (values.shape[0], sign.shape[-2]), dtype=torch.float32
    ),
    verify=_verify_bit,
    translate=_translate,
    integer=True,
    kernel=True,
)


def _verify_int8(a: Arguments) -> None:
    require_group(a, whole_token=True)
    columns = a.values.shape[-1]
    _verify_input(a, group_count(columns, a.group) if a.group else 1)
    matrix = require_tensor(a, "weight", torch.int8, None, columns)
    require(matrix.dim() == 2, a, "weight is no matrix")
    require_scales(a, "w_scale", torch.float32, matrix.shape[0])
    _verify_bias(a, matrix.shape[0])


int8_linear = define(
    "int8_linear(Tensor values, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, int group) -> Tensor",
    reference=reference.int8_linear,
    shape=lambda values, x_scale, weight, w_scale, bias, group: values.new_empty(
        (*values.shape[:-1], weight.shape[0]), dtype=torch.float32
    ),
    verify=_verify_int8,
    translate=_translate,
    integer=True,
    kernel=True,
)


def verify_int4(a: Arguments, columns: int) -> int:
    """A call has a 4-bit matrix of so many columns; returns its rows."""
    require_group(a, whole_token=False)
    codes = require_tensor(a, "codes", torch.uint8, None, -(-columns // 2))
    require(codes.dim() == 2, a, "codes is no matrix")
    table = require_tensor(a, "table", torch.int8, TABLE_LEVELS)
    require(table.dim() == 1, a, f"table is not [{TABLE_LEVELS}]")
    scale = require_tensor(a, "w_scale", torch.float16, codes.shape[0], group_count(columns, a.group))
    if has_values(scale):
        require(bool(torch.isfinite(scale).all()), a, "w_scale has values that are not finite")
    return codes.shape[0]


def _verify_int4(a: Arguments) -> None:
    rows = verify_int4(a, a.values.shape[-1])
    _verify_grouped_input(a, a.values.shape[-1])
    _verify_bias(a, rows)


def _int4_linear(
    values: Tensor, x_scale: Tensor, codes: Tensor, table: Tensor, w_scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    return reference.int4_linear(values, x_scale, Int4Weight(codes, table, w_scale, values.shape[-1], group), bias)


int4_linear = define(
    "int4_linear(Tensor values, Tensor x_scale, Tensor codes, Tensor table, Tensor w_scale, Tensor? bias, int group)"
    " -> Tensor",
    reference=_int4_linear,
    shape=lambda values, x_scale, codes, table, w_scale, bias, group: values.new_empty(
        (*values.shape[:-1], codes.shape[0]), dtype=torch.float32
    ),
    verify=_verify_int4,
    translate=_translate,
    integer=True,
    kernel=True,
)

WEIGHTS: dict[Any, tuple[Literal["bit", "int4", "int8"], tuple[str, ...]]] = {
    bit_linear.target: ("bit", WEIGHT),
    grouped_bit_linear.target: ("bit", WEIGHT),
    int4_linear.target: ("int4", INT4_WEIGHT),
    int8_linear.target: ("int8", INT8_WEIGHT),
}
"""By integer linear: the kind of its weight, and the arguments that hold it, the scales last."""


def weight_of(a: Arguments, in_features: int) -> Weight:
    """The weight that an integer linear of one matrix multiplies; ``a`` has its tensors."""
    kind, names = WEIGHTS[a.node.target]
    tensors = a.pick(*names)
    if kind == "int8":
        return tensors[0], tensors[1]
    form = QuantizedWeight if kind == "bit" else Int4Weight
    return form(*tensors, in_features=in_features, group=a.group)
