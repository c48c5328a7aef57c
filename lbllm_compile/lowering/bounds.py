"""How far the inputs of a language model may reach: the rows of the tables that they index.

Kernels look rows up without an error, so what is fed to them is checked before (:class:`InputBounds`). Inputs are
followed through what does not change or only shifts them; an index that is computed in another way stays inside its
table by the clamping of its translation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lbllm_compile.codegen.operators import Arguments, first_argument
from lbllm_compile.codegen.operators.registry import Way
from lbllm_compile.native.language import InputBounds
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import Node, calls, constant, is_call, is_constant, is_node, moves

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

_CONVERSIONS = (_aten.to.dtype, _aten._to_copy.default)
_MOVES: tuple[Way, ...] = ("aliases", "copies", "reshapes", "permutes", "repeats", "selects")

_SLOTS = "past"
"""The source of positions that count slots from the past ones on."""


@dataclass(frozen=True)
class Lookup:
    """Rows of a table of weights, taken at positions that an input of the model gives.

    Attributes:
        node: the operator.
        source: the input; ``"past"`` where the model counts positions itself.
        rows: values that the input may have, from 0 on.
    """

    node: Node
    source: str
    rows: int


def input_bounds(program: Program) -> InputBounds:
    """The bounds of a language model's ``input_ids`` and ``position_ids``, and of positions that it counts itself."""
    rows: dict[str, int] = {}
    for found in lookups(program):
        rows[found.source] = min(found.rows, rows.get(found.source, found.rows))
    return InputBounds(rows.get("input_ids"), rows.get("position_ids"), rows.get(_SLOTS))


def lookups(program: Program) -> Iterator[Lookup]:
    """Where rows of the program's tables are taken at positions that come from an input unchanged, or shifted."""
    for node in calls(program.graph, *_LOOKUPS):
        for table, index, axis in _LOOKUPS[node.target](Arguments(node)):
            source, shift = _source(index)
            if source is not None and is_constant(table):
                yield Lookup(node, source, constant(program.module, table).shape[axis] - shift)


def _indexed(a: Arguments) -> list[tuple[Node, Node, int]]:
    return [(a.self, index, axis) for axis, index in enumerate(a.indices) if index is not None]


_LOOKUPS = {
    _aten.embedding.default: lambda a: [(a.weight, a.indices, 0)],
    _lbllm.int8_embedding.default: lambda a: [(a.weight, a.ids, 0)],
    _lbllm.int4_embedding.default: lambda a: [(a.codes, a.ids, 0)],
    _aten.index_select.default: lambda a: [(a.self, a.index, a.dim)],
    _aten.index.Tensor: _indexed,
}
"""Operators that take rows of a table: the table, the indices and the axis, for each pair of them."""


def _source(index: Node) -> tuple[str | None, int]:
    """The input that an index is, and the number that is added to it; None where it is computed in another way."""
    shift = 0
    while is_node(index) and index.op != "placeholder":
        if index.op != "call_function":
            return None, 0
        a = Arguments(index)
        if is_call(index, *_CONVERSIONS) or moves(index, *_MOVES):
            index = first_argument(index)
        elif is_call(index, _aten.add.Tensor) and isinstance(a.other, int):
            shift += a.other * a.alpha
            index = a.self
        elif is_call(index, _aten.add.Tensor) and a.alpha == 1 and _is_past(a.other):
            first = _first(a.self)
            return (None, 0) if first is None else (_SLOTS, shift + first)
        else:
            return None, 0
    return (str(index.target), shift) if is_node(index) else (None, 0)


def _is_past(node: Node) -> bool:
    return is_node(node) and node.op == "placeholder" and node.target == "past"


def _first(positions: Node) -> int | None:
    """The number from which a range counts one by one; None where it counts otherwise, or is no range."""
    if not is_call(positions, _aten.arange.default, _aten.arange.start, _aten.arange.start_step):
        return None
    a = Arguments(positions)
    first = getattr(a, "start", 0)
    return first if isinstance(first, int) and getattr(a, "step", 1) == 1 else None
