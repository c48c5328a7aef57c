"""Runs a lowered program with its stored weights and everything else float: weight-only quantization, W(1+1)A16KV16.

What the weights alone are worth, and what any engine must give that computes with the same weights in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import operators as operators
from ...codegen import reference
from ...codegen.errors import LbllmError
from ...codegen.operators.lbllm.linears import weight_of
from .program import IN_FEATURES, Program, Runner
from .rewrite import Node, computed, has_role, is_call

_lbllm = torch.ops.lbllm


class WeightOnlyError(LbllmError):
    """A graph has an integer operator of which no float form is known."""


@torch.no_grad()
def run(program: Program, inputs: Mapping[str, Any]) -> Tensor:
    """The output of a lowered program on whole sequences, its activations and its KV state left in float32.

    Args:
        program: with integer operators, with or without a KV state.
        inputs: values by placeholder, like :meth:`Program.run`; without past.

    Raises:
        WeightOnlyError: an integer operator has no float form.
    """
    return _WeightOnly(program.module).run(*program.arguments(inputs))


class _WeightOnly(Runner):
    """Evaluates integer operators on float inputs and dequantized weights."""

    def evaluate(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().evaluate(n)
        if is_call(n, _lbllm.quantize_activation.default):
            return computed(n, self.env).x.float(), None
        if is_call(n, _lbllm.bit_linear.default, _lbllm.int4_linear.default):
            given = computed(n, self.env)
            return torch.nn.functional.linear(given.values, _dequantized(n, given), given.bias)
        if is_call(n, _lbllm.grouped_bit_linear.default):
            given = computed(n, self.env)
            return _lbllm.grouped_linear(given.values, _dequantized(n, given), given.offsets)
        if is_call(n, _lbllm.int8_linear.default):
            given = computed(n, self.env)
            return torch.nn.functional.linear(given.values, _lbllm.unpack_rows(given.weight, given.w_scale), given.bias)
        if is_call(n, _lbllm.cached_attention.default):
            return _attention(computed(n, self.env))
        if has_role(n, "kernel"):
            raise WeightOnlyError(f"'{n.name}' calls {n.target}, of which no float form is known")
        return super().evaluate(n)


def _dequantized(node: Node, given: Any) -> Tensor:
    return weight_of(given, node.meta[IN_FEATURES]).dequantize()


def _attention(given: Any) -> Tensor:
    options = ("key_mask", "past", "scale", "window", "softcap", "sinks", "slopes", "counted", "chunk")
    return reference.visible_attention(*given.pick("query", "key", "value", *options))
