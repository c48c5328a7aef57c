"""Gives every linear layer one form, and removes what tracing leaves behind.

Later passes look for two operators only: ``aten.linear`` with a ``[N, K]`` weight and, for stacked experts,
``lbllm.grouped_linear`` with an ``[E, N, K]`` weight. Models write the same thing in many ways: GPT-2's Conv1D is
``addmm`` with a ``[K, N]`` weight, transformers runs experts through a grouped matrix product. Weights stored the other
way round are transposed once, under the same path.

Given::

    %w: f32[768, 3072] = weight transformer.h.0.mlp.c_fc.weight
    %y = aten.addmm(%bias, %x, %w)
    %e: f32[4, 64, 96] = weight model.layers.0.mlp.experts.down_proj
    %t = aten.transpose.int(%e, -2, -1)
    %z = transformers.grouped_mm_fallback(%h, %t, %offsets)

Result::

    %w: f32[3072, 768] = weight transformer.h.0.mlp.c_fc.weight
    %y = aten.linear(%x, %w, %bias)
    %e: f32[4, 64, 96] = weight model.layers.0.mlp.experts.down_proj
    %z = lbllm.grouped_linear(%h, %e, %offsets)

Attention that is written out in operators becomes one call (:mod:`.ir.attention`).

A weight computed from parameters alone, by weight normalization or a merged adapter, is computed once. Bodies of
``no_grad`` and disabled ``autocast`` blocks move into the graph, and everything ``cleanup`` removes goes.
Sums may be taken in another order, hence the bound. No preconditions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..codegen import operators as operators
from ..codegen.operators import Arguments
from ..codegen.operators.arguments import parameters
from .base import Contract, Pass, PassContext, PassError, PassResult, bounded
from .cleanup import clean
from .contracts import describe
from .ir.attention import AttentionError, join_attention
from .ir.program import Program, copy_module, get_attribute, set_attribute
from .ir.rewrite import LINEARS, ancestors, calls, is_node, make_attribute, swaps_last
from .ir.spool import spooled

aten = torch.ops.aten
lbllm = torch.ops.lbllm

_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default, aten.bmm.default})
_GROUPED = {
    "transformers::grouped_mm_fallback": ("input", "weight", "offs"),
    "aten::_grouped_mm": ("self", "mat2", "offs"),
}
"""Products of stacked matrices, and how they name what a linear of stacked experts takes."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """See the module's description."""

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = bounded(1e-5)

    def apply(self, program: Program, context: PassContext) -> PassResult:
        before = len(program.graph.nodes)
        module = _inline_blocks(program.module)
        clean(module)
        _compute_weights(module)
        rewritten = _rewrite_products(module)
        clean(module)
        result = program.with_module(module)
        joined = _join_attention(result, context) if program.kind == "causal-lm" else 0
        clean(module)
        module.graph.lint()
        removed = before - len(module.graph.nodes)
        return PassResult(result, summary={"linears": rewritten, "attentions": joined, "removed": removed})


def _join_attention(program: Program, context: PassContext) -> int:
    try:
        return join_attention(program, context.probe)
    except AttentionError as error:
        raise PassError(f"{describe(error.node)} ends an attention that cannot be told: {error}") from error


def _inline_blocks(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the module in which ``no_grad`` and disabled ``autocast`` bodies are part of the graph."""
    module = copy_module(module)
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        if name == "wrap_with_autocast":
            _, dtype, enabled, _, body, *arguments = node.args
            if enabled and dtype is not torch.float32:
                raise PassError(
                    f"'{node.name}' runs in {dtype} by torch.autocast; remove the autocast block, the compiler works in"
                    " float32"
                )
        else:
            _, body, *arguments = node.args
        _inline(module, node, get_attribute(module, body.target), arguments)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _inline(module: fx.GraphModule, call: fx.Node, body: fx.GraphModule, arguments: list[fx.Node]) -> None:
    body = _inline_blocks(body)
    values: dict[fx.Node, fx.Node] = {}
    rest = iter(arguments)
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = next(rest)
        elif inner.op == "output":
            results = fx.node.map_arg(inner.args[0], lambda n: values[n])
        else:
            if inner.op == "get_attr":
                set_attribute(module, str(inner.target), get_attribute(body, str(inner.target)))
            with module.graph.inserting_before(call):
                values[inner] = module.graph.node_copy(inner, lambda n: values[n])
    for user in list(call.users):
        user.replace_all_uses_with(results[Arguments(user).index])
        module.graph.erase_node(user)
    module.graph.erase_node(call)


_WEIGHT_OPERAND = {
    aten.linear.default: "weight",
    aten.addmm.default: "mat2",
    aten.mm.default: "mat2",
    aten.matmul.default: "other",
    aten.bmm.default: "mat2",
}
"""Which argument of a product is its weight, where it has one."""


@torch.no_grad()
def _compute_weights(module: fx.GraphModule) -> None:
    """Stores weights that are functions of parameters as parameters of their own."""
    stored: dict[fx.Node, str] = {}
    for node in calls(module.graph, *_WEIGHT_OPERAND):
        weight = getattr(Arguments(node), _WEIGHT_OPERAND[node.target])
        if not is_node(weight) or _operand(weight) is not None:
            continue
        needed = ancestors(weight)
        origins = {n.op for n in needed}
        if "placeholder" in origins or "get_attr" not in origins:
            continue
        if weight not in stored:
            stored[weight] = _free_path(module, node, needed, set(stored.values()))
            set_attribute(module, stored[weight], spooled(_evaluate(module, needed)))
        with module.graph.inserting_before(node):
            computed = make_attribute(module.graph, stored[weight], weight)
        computed.meta["val"] = weight.meta["val"]
        node.replace_input_with(weight, computed)
        module.graph.eliminate_dead_code()


def _free_path(module: fx.GraphModule, product: fx.Node, needed: Sequence[fx.Node], taken: set[str]) -> str:
    """``<module path>.weight``, numbered where other nodes than ``needed`` read that."""
    stack = list(product.meta.get("nn_module_stack", {}).values())
    path = f"{stack[-1][0]}.weight" if stack and stack[-1][0] else f"{product.name}_weight"
    inside = set(needed)
    read = {n.target for n in module.graph.nodes if n.op == "get_attr" and set(n.users) - inside}
    numbered = itertools.chain([path], (f"{path}_{number}" for number in itertools.count(2)))
    return next(p for p in numbered if p not in read | taken)


def _evaluate(module: fx.GraphModule, steps: Sequence[fx.Node]) -> torch.Tensor:
    """The value of the last of some nodes, which depend on parameters and each other only."""
    values: dict[fx.Node, Any] = {}
    for step in steps:
        arguments, options = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
        is_weight = step.op == "get_attr"
        values[step] = get_attribute(module, step.target) if is_weight else step.target(*arguments, **options)
    return values[steps[-1]]


@dataclass(frozen=True)
class _Operand:
    """A weight as an operand: the ``get_attr`` behind it, and whether its last two dimensions are swapped."""

    node: fx.Node
    swapped: bool


def _operand(node: object) -> _Operand | None:
    """Sees a weight through transposes of its last two dimensions."""
    swapped = False
    while isinstance(node, fx.Node) and swaps_last(node):
        swapped, node = not swapped, Arguments(node).self
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return _Operand(node, swapped)


def _rewrite_products(module: fx.GraphModule) -> int:
    """Rewrites every matrix product with a weight; returns how many linears the graph then has."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.addmm.default:
            _rewrite_addmm(module, node)
        elif node.target in _PRODUCTS:
            _rewrite_product(module, node)
        elif getattr(node.target, "_schema", None) is not None and node.target._schema.name in _GROUPED:
            _rewrite_grouped(module, node)
    module.recompile()
    return sum(n.target in LINEARS for n in module.graph.nodes)


def _rewrite_addmm(module: fx.GraphModule, node: fx.Node) -> None:
    product = Arguments(node)
    bias, x, weight = product.self, product.mat1, _operand(product.mat2)
    if weight is None or _rank(weight.node) != 2 or product.beta != 1 or product.alpha != 1:
        return
    with module.graph.inserting_before(node):
        matrix = _rows(module, weight)
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and _rank(bias) == 1:
            result = _call(module, node, aten.linear.default, x, matrix, bias)
        else:
            rows = _call(module, node, aten.linear.default, x, matrix)
            result = _call(module, node, aten.add.Tensor, rows, bias)
    _replace(module, node, result)


def _rewrite_product(module: fx.GraphModule, node: fx.Node) -> None:
    left, right = Arguments(node).pick("self", _WEIGHT_OPERAND[node.target])
    weight = _operand(right)
    if weight is not None and _rank(weight.node) == 2:
        with module.graph.inserting_before(node):
            result = _call(module, node, aten.linear.default, left, _rows(module, weight))
        _replace(module, node, result)
        return
    if weight is not None and _rank(weight.node) == 3 and _rank(left) == 3:
        _rewrite_batched(module, node, left, weight)
        return
    weight = _operand(left)
    if weight is not None and _rank(weight.node) == 2 and _rank(right) == 2:
        # W @ x is (x^T @ W^T)^T, a linear over the columns of x with the weight as it lies.
        with module.graph.inserting_before(node):
            columns = _call(module, right, aten.t.default, right)
            product = _call(module, node, aten.linear.default, columns, _rows(module, _flip(weight)))
            result = _call(module, node, aten.t.default, product)
        columns.meta["val"], product.meta["val"] = right.meta["val"].t(), node.meta["val"].t()
        _replace(module, node, result)


def _rewrite_batched(module: fx.GraphModule, node: fx.Node, x: fx.Node, weight: _Operand) -> None:
    """``[E, M, K] @ [E, K, N]`` as stacked experts, each of which has ``M`` tokens."""
    value, product = x.meta["val"], node.meta["val"]
    experts, width = product.shape[0], product.shape[2]
    with module.graph.inserting_before(node):
        matrices = _rows(module, weight)
        tokens = _call(module, node, aten.sym_size.int, x, 1)
        flat = _call(module, node, aten.flatten.using_ints, x, 0, 1)
        ends = _call(module, node, aten.arange.start, 1, experts + 1)
        offsets = _call(module, node, aten.mul.Tensor, ends, tokens)
        rows = _call(module, node, lbllm.grouped_linear.default, flat, matrices, offsets)
        result = _call(module, node, aten.view.default, rows, [experts, tokens, width])
    tokens.meta["val"], flat.meta["val"], rows.meta["val"] = value.shape[1], value.flatten(0, 1), product.flatten(0, 1)
    ends.meta["val"] = offsets.meta["val"] = value.new_empty((experts,), dtype=torch.int64)
    _replace(module, node, result)


def _rewrite_grouped(module: fx.GraphModule, node: fx.Node) -> None:
    arguments = Arguments(node)
    x, matrices, offsets = arguments.pick(*_GROUPED[node.target._schema.name])
    others = parameters(node.target).keys() - {*_GROUPED[node.target._schema.name]}
    weight = _operand(matrices)
    if weight is None or _rank(weight.node) != 3 or offsets is None:
        return
    if any(getattr(arguments, name) is not None for name in others):
        return
    with module.graph.inserting_before(node):
        result = _call(module, node, lbllm.grouped_linear.default, x, _rows(module, weight), offsets)
    _replace(module, node, result)


def _rank(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _flip(weight: _Operand) -> _Operand:
    return _Operand(weight.node, not weight.swapped)


def _rows(module: fx.GraphModule, weight: _Operand) -> fx.Node:
    """The weight as ``[..., N, K]``; one stored as ``[..., K, N]`` is transposed in the module.

    A product multiplies by ``[..., K, N]``, so a weight seen through a swap lies right already. Where others read the
    weight as it was, the transposed one gets a path of its own.
    """
    if weight.swapped:
        return weight.node
    source = str(weight.node.target)
    readers = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == source]
    shared = sum(len(n.users) for n in readers) > 1 or hasattr(module, f"{source}_transposed")
    path = f"{source}_transposed" if shared else source
    set_attribute(module, path, spooled(get_attribute(module, source).mT))
    node = module.graph.get_attr(path)
    node.meta = dict(weight.node.meta)
    if isinstance(node.meta.get("val"), torch.Tensor):
        node.meta["val"] = node.meta["val"].mT.contiguous()
    return node


def _call(module: fx.GraphModule, origin: fx.Node, target: object, *arguments: object) -> fx.Node:
    """A call in the place and with the provenance of ``origin``."""
    node = module.graph.call_function(target, arguments)
    node.meta = dict(origin.meta)
    return node


def _replace(module: fx.GraphModule, node: fx.Node, result: fx.Node) -> None:
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
