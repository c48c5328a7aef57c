"""Removes what computes nothing: dead nodes, assertions, aliases, conversions to what a tensor already is.

Given::

    %same = aten.to.dtype(%x, torch.float32)  # of float32 already
    %whole = aten.slice.Tensor(%same, 0, 0, 9223372036854775807)
    %checked = aten._assert_tensor_metadata(%x)
    %y = aten.mul.Tensor(%whole, %whole)

Result::

    %y = aten.mul.Tensor(%x, %x)

Weights that no node names any more are dropped too. Outputs stay bit-equal. No preconditions; ``canonicalize`` does the
same at the start of a pipeline, so that patterns need not look through such nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..codegen.operators import Arguments, first_argument
from .base import EXACT, Contract, Pass, PassContext, PassResult
from .ir.program import Program, prune_attributes

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)
_IDENTITIES = frozenset(
    {aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}
)
_CONVERSIONS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
_END = 2**63 - 1


@dataclass(frozen=True)
class Cleanup(Pass):
    """See the module's description."""

    name: ClassVar[str] = "cleanup"
    contract: ClassVar[Contract] = EXACT

    def apply(self, program: Program, context: PassContext) -> PassResult:
        result = program.copy()
        removed = clean(result.module)
        return PassResult(result, summary={"removed": removed})


def clean(module: fx.GraphModule) -> int:
    """Removes assertions, no-ops, dead nodes and unused weights in place; returns how many nodes went."""
    graph = module.graph
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif _is_no_op(node):
            node.replace_all_uses_with(first_argument(node))
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    prune_attributes(module)
    module.recompile()
    return before - len(graph.nodes)


def _is_impure(node: fx.Node) -> bool:
    """Whether a node without users must stay: inputs, the output, and operators that write to an argument."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _is_no_op(node: fx.Node) -> bool:
    if node.target in _IDENTITIES:
        return True
    if node.target in _CONVERSIONS:
        keeps = _keeps(node, lambda value: (value.dtype, value.device, value.layout))
        return keeps and getattr(Arguments(node), "memory_format", None) is None
    if node.target is aten.dropout.default:
        dropout = Arguments(node)
        return dropout.p == 0.0 or dropout.train is False
    if node.target is aten.slice.Tensor:
        cut = Arguments(node)
        return cut.start in (0, None) and cut.end in (None, _END) and cut.step == 1
    if node.target is aten.expand.default:
        return all(size == -1 for size in Arguments(node).size)
    return False


def _keeps(node: fx.Node, facts: Callable[[torch.Tensor], object]) -> bool:
    """Whether input and output agree in ``facts``, as far as the shapes propagated at capture tell."""
    before, after = first_argument(node).meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return facts(before) == facts(after)
