"""What an operator without a translation is made of: operators that have one, by torch's own decompositions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from lbllm_compile.codegen import operators
from lbllm_compile.codegen.errors import UntranslatableError
from lbllm_compile.codegen.program.queries import surely_equal
from lbllm_compile.passes.ir.rewrite import Node

Meaning = tuple[str, list[Any]] | Any
"""What a node's value is: dtype and dimensions of a tensor, or a size."""

_EXAMPLES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59)
"""Values of symbols while a decomposition is traced; a trace that depends on them is not used."""


def may_decompose(target: Any) -> bool:
    """Whether torch says what an operator is made of, for some arguments at least."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in decomposition_table or target._can_decompose()


def decompose(node: Node, meanings: Mapping[Node, Meaning]) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph that computes what a node computes, for tensors of its inputs' types and shapes.

    Args:
        node: calls an operator of torch's.
        meanings: of every node among its arguments; a dimension is an int or an expression over symbols.

    Returns:
        The graph, whose placeholders are the node's inputs in order, and the constants that its ``get_attr`` nodes
        name.

    Raises:
        UntranslatableError: torch has no decomposition, or one that fits these sizes only.
    """
    refused = UntranslatableError(f"the operator {node.target} has no translation", node)
    if not may_decompose(node.target):
        raise refused
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    sizes = _Sizes(environment)
    inputs = node.all_input_nodes
    with mode, torch.no_grad():
        values = [_example(meanings[n], sizes) for n in inputs]

        def call(*arguments: Any) -> Any:
            given = dict(zip(inputs, arguments, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
            return node.target(*args, **kwargs)

        table = {t: f for t, f in decomposition_table.items() if t is node.target or not _translated(t)}
        try:
            traced = make_fx(call, decomposition_table=table)(*values)
        except Exception as error:  # torch raises many types; each means that there is no decomposition
            raise refused from error
    if environment.guards or any(n.target is node.target for n in traced.graph.nodes):
        raise refused
    return traced.graph, {n.target: getattr(traced, n.target) for n in traced.graph.nodes if n.op == "get_attr"}


def _translated(target: Any) -> bool:
    known = operators.find(target)
    return known is not None and known.translate is not None


class _Sizes:
    """Symbols of torch for dimensions; surely equal ones have one."""

    def __init__(self, environment: ShapeEnv):
        self._environment = environment
        self._known: list[tuple[Any, Any]] = []

    def __call__(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        for known, symbol in self._known:
            if surely_equal(known, size):
                return symbol
        number = len(self._known)
        hint, source = _EXAMPLES[number % len(_EXAMPLES)], ConstantSource(f"size_{number}")
        expression = self._environment.create_symbol(hint, source, DimDynamic.DYNAMIC, constraint_dim=None)
        symbol = self._environment.create_symintnode(expression, hint=hint, source=source)
        self._known.append((size, symbol))
        return symbol


def _example(meaning: Meaning, sizes: _Sizes) -> Any:
    if not isinstance(meaning, tuple):
        return sizes(meaning)
    dtype, shape = meaning
    return torch.empty([sizes(d) for d in shape], dtype=getattr(torch, dtype))
