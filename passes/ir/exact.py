"""Runs a simulated program in the integer arithmetic it stands for.

A simulated linear is a float matrix product of dequantized activations and weights. Its rounding differs from that of
the kernels, which sum integers exactly, by about 1e-7: enough to move one 4-bit activation in a million to the next
code, and through thirty layers one moved code becomes another answer. So wherever a simulated program is compared with
what it is lowered to, it is run like this: activations and weights stay integers and scales, and every linear between
them is evaluated by :mod:`...codegen.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import reference
from ...codegen.format import Int4Weight, QuantizedWeight, Weight
from ...codegen.operators import Arguments
from ...codegen.operators.lbllm.linears import INT4_WEIGHT, WEIGHT
from .program import Program, Runner
from .rewrite import LINEARS, UNPACKED, bias_of, computed, is_call, operands_of

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm


@torch.no_grad()
def run(program: Program, inputs: Mapping[str, Any], seen: Callable[[str, Any], None] | None = None) -> Tensor:
    """The program's output on a mapping from placeholder to value, like :meth:`Program.run`.

    Args:
        program: simulated or not.
        inputs: values by placeholder.
        seen: told the name and the value of every node.
    """
    return _Exact(program.module, seen).run(*program.arguments(inputs))


class _Exact(Runner):
    """Evaluates linears between ``fake_quantize`` and a simulated weight by the reference."""

    def __init__(self, module: fx.GraphModule, seen: Callable[[str, Any], None] | None = None):
        super().__init__(module)
        self._seen = seen
        self._activations: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._weights: dict[fx.Node, Weight] = {}

    def evaluate(self, n: fx.Node) -> Any:
        value = self._value(n)
        if self._seen is not None:
            self._seen(n.name, value)
        return value

    def _value(self, n: fx.Node) -> Any:
        if is_call(n, _lbllm.fake_quantize.default):
            given = computed(n, self.env)
            pair = reference.quantize_activation(*given.pick("x", "clip", "bits", "group", "knees", "plane_scales"))
            self._activations[n] = pair
            return reference.dequantize_activation(*pair, given.group).to(given.x.dtype)
        if is_call(n, _lbllm.unpack_weight.default):
            weight = self._weights[n] = QuantizedWeight(*computed(n, self.env).pick(*WEIGHT, "in_features", "group"))
            return None if all(_is_quantized_linear(user) for user in n.users) else weight.dequantize()
        if is_call(n, _lbllm.unpack_int4.default):
            weight = self._weights[n] = Int4Weight(*computed(n, self.env).pick(*INT4_WEIGHT, "in_features", "group"))
            return None if all(_is_quantized_linear(user) for user in n.users) else weight.dequantize()
        if is_call(n, _lbllm.unpack_rows.default):
            rows, scale = self._weights[n] = tuple(computed(n, self.env).pick("weight", "scale"))
            return None if all(_is_quantized_linear(user) for user in n.users) else _lbllm.unpack_rows(rows, scale)
        if _is_quantized_linear(n):
            return self._linear(n)
        return super().evaluate(n)

    def _linear(self, n: fx.Node) -> Tensor:
        x, matrix = operands_of(n)
        values, scale = self._activations[x]
        weight = self._weights[matrix]
        if n.target is _lbllm.grouped_linear.default:
            planes = (weight.sign, weight.bitmap, weight.levels, weight.scale)
            offsets = self.env[Arguments(n).offsets]
            out = _lbllm.grouped_bit_linear(values, scale, *planes, offsets, weight.group)
        else:
            bias = bias_of(n)
            bias = self.env[bias] if isinstance(bias, fx.Node) else None
            out = reference.linear(values, scale, weight, bias, Arguments(x).group)
        return out.to(n.meta["val"].dtype) if "val" in n.meta else out


def _is_quantized_linear(node: fx.Node) -> bool:
    """Whether both operands of a linear are simulated integers."""
    return (
        is_call(node, *LINEARS)
        and is_call(operands_of(node)[0], _lbllm.fake_quantize.default)
        and is_call(operands_of(node)[1], *UNPACKED)
    )
