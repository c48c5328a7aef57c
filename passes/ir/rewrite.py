"""Small helpers that rewriting passes share: find calls, make nodes that keep their provenance, fold constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from ...codegen import operators
from ...codegen.operators import Arguments, first_argument
from ...codegen.operators.registry import Way
from .program import LAYER, get_attribute

Node: TypeAlias = Any
"""An ``fx.Node``. torch types its arguments as a union of twenty types, which knowing the operator does not narrow."""

LINEARS = (torch.ops.aten.linear.default, torch.ops.lbllm.grouped_linear.default)
"""The two forms of a linear after ``canonicalize``: of one matrix, and of stacked experts."""

INTEGER_LINEARS = (
    torch.ops.lbllm.bit_linear.default,
    torch.ops.lbllm.grouped_bit_linear.default,
    torch.ops.lbllm.int4_linear.default,
    torch.ops.lbllm.int8_linear.default,
)
"""What ``lower`` makes of linears; they run as kernels."""

UNPACKED = (
    torch.ops.lbllm.unpack_weight.default,
    torch.ops.lbllm.unpack_int4.default,
    torch.ops.lbllm.unpack_rows.default,
)
"""Simulated weights of linears: W(1+1), 4-bit, int8 per row."""

PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", LAYER)
"""Meta keys that a node made for another one inherits: where in the user's model it belongs."""


def calls(graph: fx.Graph, *targets: Callable[..., Any]) -> list[Node]:
    """The calls of any of ``targets``, in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def calls_of_role(graph: fx.Graph, role: Literal["simulates", "integer", "kernel"]) -> list[Node]:
    """The calls of operators with a role (see :class:`~...codegen.operators.Operator`), in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and has_role(n, role)]


def has_role(node: Node, role: Literal["simulates", "integer", "kernel"]) -> bool:
    """Whether the operator that a node calls is known, by now, to have a role."""
    known = operators.find(node.target)
    return known is not None and getattr(known, role)


def is_node(value: Any) -> bool:
    """Whether an argument is a node rather than a number, a list or None."""
    return isinstance(value, fx.Node)


def is_stored(value: Any) -> bool:
    """Whether an argument is a weight."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def is_call(value: Any, *targets: Callable[..., Any]) -> bool:
    """Whether ``value`` is a node that calls one of ``targets``."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def moves(value: Any, *ways: Way) -> bool:
    """Whether ``value`` is a node that only moves the elements of its first argument, in one of ``ways``."""
    known = operators.find(value.target) if is_node(value) and value.op == "call_function" else None
    return known is not None and known.moves in ways


def operands_of(linear: Node) -> tuple[Node, Node]:
    """What a float linear, of one matrix or of stacked experts, multiplies: the input and the weight."""
    return first_argument(linear), Arguments(linear).weight


def computed(node: Node, values: Mapping[Node, Any]) -> Arguments:
    """The arguments of a call by name, with the values that an interpreter has for the nodes among them."""
    return Arguments(node, lambda argument: fx.node.map_arg(argument, values.__getitem__))


def bias_of(linear: Node) -> Node | None:
    """The bias of a linear of any kind; stacked experts have none."""
    return getattr(Arguments(linear), "bias", None)


def table_shape(quantizer: Node) -> list[Node]:
    """What shapes the codes of a quantizer, simulated or not: knees or plane scales; nothing where they are uniform."""
    return [shape for shape in Arguments(quantizer).pick("knees", "plane_scales") if shape is not None]


def quantizer_arguments(quantizer: Node) -> tuple[Any, ...]:
    """The arguments of a quantizer, simulated or not, as far as they are given."""
    given = list(Arguments(quantizer).pick("x", "clip", "bits", "group", "knees", "plane_scales"))
    while given[-1] is None:
        given.pop()
    return tuple(given)


def make_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    like: Node,
    meta: Mapping[str, Any] | None = None,
) -> Node:
    """A new call at the graph's insertion point, with the provenance of ``like`` and ``meta`` on top."""
    node = graph.call_function(target, args)
    node.meta = {k: like.meta[k] for k in PROVENANCE if k in like.meta}
    node.meta.update(meta or {})
    return node


def make_attribute(graph: fx.Graph, path: str, like: Node) -> Node:
    """A new ``get_attr`` at the graph's insertion point; its tensor must already be set on the module."""
    node = graph.create_node("get_attr", path)
    node.meta = {k: like.meta[k] for k in PROVENANCE if k in like.meta}
    return node


def replace_call(node: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
    """Puts a call of ``target`` in the place of ``node``, with all of its meta; ``node`` is erased."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def become_reshape(view: Node) -> None:
    """Makes a view a reshape, which copies where it must; it calls its arguments otherwise."""
    view.args, view.kwargs = tuple(Arguments(view).pick("self", "size")), {}
    view.target = torch.ops.aten.reshape.default


def relax_views(node: Node) -> None:
    """Turns views of a value, whose memory layout a rewrite has changed, into reshapes, which copy where they must."""
    for user in list(node.users):
        if is_call(user, torch.ops.aten.view.default):
            become_reshape(user)
        if moves(user, "aliases", "reshapes", "permutes", "repeats", "selects"):
            relax_views(user)


def ancestors(node: Node) -> list[Node]:
    """``node`` and everything it is computed from, in graph order."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return [n for n in node.graph.nodes if n in found]


def constant(module: torch.nn.Module, value: Any) -> Any:
    """The value of an expression over weights only: a ``get_attr`` node, a concatenation of such, a number, None.

    Raises:
        ValueError: the expression depends on an input; the message names the node.
    """
    if not is_node(value):
        return value
    if value.op == "get_attr":
        return get_attribute(module, value.target)
    if is_call(value, torch.ops.aten.cat.default):
        joined = Arguments(value)
        return torch.cat([constant(module, v) for v in joined.tensors], joined.dim)
    raise ValueError(f"'{value.name}' is not a weight")


def is_constant(value: Any) -> bool:
    """Whether :func:`constant` can tell the value."""
    if not is_node(value):
        return True
    if is_call(value, torch.ops.aten.cat.default):
        return all(is_constant(v) for v in Arguments(value).tensors)
    return value.op == "get_attr"


_SWAPS = frozenset({torch.ops.aten.t.default, torch.ops.aten.numpy_T.default, torch.ops.aten.mT.default})


def swaps_last(node: Node) -> bool:
    """Whether a node swaps the last two dimensions of its operand and does nothing else."""
    if not is_node(node) or node.op != "call_function":
        return False
    if node.target in _SWAPS:
        return True
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    rank = value.dim()
    if node.target is torch.ops.aten.transpose.int:
        swap = Arguments(node)
        return {swap.dim0 % rank, swap.dim1 % rank} == {rank - 2, rank - 1}
    if node.target is torch.ops.aten.permute.default:
        return [dim % rank for dim in Arguments(node).dims] == [*range(rank - 2), rank - 1, rank - 2]
    return False


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory seen the same way (tied weights)."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


REPEAT: tuple[Way, ...] = ("aliases", "copies", "reshapes", "repeats", "selects")
"""How the operators move elements that a grouped-query repeat of keys or values is made of."""


def before_repeat(user: Node, source: Node) -> tuple[Node, Node]:
    """The keys or values behind a grouped-query repeat: ``(their user, their node)``.

    A repeat is a chain of shape operations that holds an ``expand`` of an ``unsqueeze`` (or a ``repeat_interleave``);
    without one, ``source`` itself is what attention caches.
    """
    found = user, source
    current, expanded = source, False
    while moves(current, *REPEAT):
        parent = Arguments(current).self
        expanded = expanded or is_call(current, torch.ops.aten.expand.default)
        opened = is_call(current, torch.ops.aten.unsqueeze.default) and expanded
        if opened or is_call(current, torch.ops.aten.repeat_interleave.self_int):
            return current, parent
        current = parent
    return found
