"""Finds where two programs that should agree part, and cuts the smallest piece out of each that shows it.

Where a pass went wrong, everything behind differs. So the program before runs on a probe, and every node that both
have, under one name and with values of one shape, is computed in the program after from the values that its nearest
such ancestors have *before*. Its error is then its own, or that of what lies between them and it.

A pass may also change a value on purpose and make up for it in what reads it, as where scales move into weights. So a
node that differs is passed over where those that read it come closer to what they were when they are computed through
it than from its value before.

Simulated quantization is computed in the integer arithmetic that it stands for (:mod:`.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import exact
from .compare import relative_error
from .program import LAYER, Program, get_attribute, set_attribute
from .rewrite import Node, has_role
from .spool import Record, Records

_OF_VALUES = ("val", "shape", LAYER)
"""Keys in a node's meta that tell of its value alone."""


@dataclass(frozen=True)
class Parting:
    """The place where two programs part.

    Attributes:
        node: of the program after.
        origin: the node of the program before whose place it takes.
        error: relative error (Frobenius norm) of its value, computed from what the program before has in front of it.
        allowed: the largest that it may have.
        before, after: the piece of each program that computes the value from these, of ``kind="module"``.
        inputs: values of both pieces' placeholders by name.
        counted: places of the elements that the error is of in the flattened value, int64; None for all.
    """

    node: fx.Node
    origin: fx.Node
    error: float
    allowed: float
    before: Program
    after: Program
    inputs: Mapping[str, Any]
    counted: Tensor | None = None

    @property
    def layer(self) -> int | None:
        """The decoder layer, None outside of them or where no pass has said."""
        return self.origin.meta.get(LAYER)


def first_output(value: Any) -> Tensor:
    """What a program gives, or the first of what it gives, as float32."""
    return (value[0] if isinstance(value, (tuple, list)) else value).float()


def difference(before: Tensor, after: Tensor, counted: Tensor | None = None) -> float:
    """The relative error of a value, in which both may have the same infinities (as masks do) and NaNs.

    Args:
        before, after: the value in both programs.
        counted: as in a :class:`Parting`.
    """
    if before.shape == after.shape:
        if counted is not None:
            before, after = before.flatten()[counted], after.flatten()[counted]
        same = ~before.isfinite() & ((before == after) | (before.isnan() & after.isnan()))
        before, after = (value.masked_fill(same, 0) for value in (before, after))
    return relative_error(before, after)


def find(before: Program, after: Program, probe: Mapping[str, Any], allowed: float) -> Parting:
    """The first place where ``after`` is further from ``before`` than is allowed; where no single place is, and errors
    only add up, the one with the largest error.

    Args:
        before, after: programs whose outputs on the probe differ. Nodes that a pass left alone have the names they had.
        probe: inputs by placeholder.
        allowed: the largest relative error of a value; 0 for bit-equal.
    """
    pair = _Pair.of(before, after, probe)
    worst = after.graph.output_node(), 0.0
    for node in list(pair.common):
        error = pair.error(node)
        if error > allowed and not pair.made_up_for(node):
            return pair.cut(node, error, allowed)
        if node in pair.common and error > worst[1]:
            worst = node, error
    return pair.cut(*worst, allowed)


def at(
    before: Program,
    after: Program,
    name: str,
    node: fx.Node,
    probe: Mapping[str, Any],
    allowed: float,
    compared: Callable[[Tensor], Tensor],
) -> Parting:
    """Cuts out ``node`` of the program after and the node called ``name`` before, whose place it takes.

    Args:
        compared: selects the elements of the value that count.
    """
    pair = _Pair.of(before, after, probe, {node: name})
    value = pair.value(name)
    places = compared(torch.arange(value.numel()).reshape(value.shape)).flatten()
    counted = None if len(places) == value.numel() else places
    return pair.cut(node, pair.error(node, counted), allowed, counted)


@dataclass(frozen=True)
class Piece:
    """A node with what computes it from the nearest values of their own (see :func:`pieces`).

    Attributes:
        node: of the whole program.
        program: the piece.
        inputs: values of its placeholders by name.
        value: of the node.
    """

    node: fx.Node
    program: Program
    inputs: Mapping[str, Any]
    value: Tensor


def pieces(program: Program, probe: Mapping[str, Any]) -> tuple[int, Iterator[Piece]]:
    """Every node of a program that has a value of its own, alone with what it takes on a probe.

    Returns:
        How many they are, and them, each cut out when it is asked for.
    """
    pair = _Pair.of(program, program, probe)
    nodes = [node for node in pair.common if node.op != "output"]

    def cut_out() -> Iterator[Piece]:
        for node in nodes:
            cut = pair.after.cut(node, pair.common)
            yield Piece(node, cut, pair.inputs(cut, pair.given[1]), pair.value(pair.common[node]))

    return len(nodes), cut_out()


@dataclass
class _Pair:
    """Two programs, and what the one before computes on a probe.

    Attributes:
        before, after: what pieces are cut from.
        common: nodes of the program after that have one before, by whose name; in graph order, the output last.
        values: of those before, by name.
        given: values of the placeholders of both, by name.
    """

    before: _Pieces
    after: _Pieces
    common: dict[Node, str]
    values: Mapping[str, Record | Tensor]
    given: tuple[Mapping[str, Any], Mapping[str, Any]]

    @classmethod
    def of(
        cls, before: Program, after: Program, probe: Mapping[str, Any], replaced: Mapping[Node, str] | None = None
    ) -> _Pair:
        """
        Args:
            replaced: nodes of the program after that take the place of others, by whose name.
        """
        replaced = replaced or {}
        names, ours = ({n.name for n in _varying(p.graph)} for p in (before, after))
        pairs = {n: n.name for n in after.graph.nodes if n.name in ours & names} | dict(replaced)
        wanted, records = set(pairs.values()), Records()
        values: dict[str, Record | Tensor] = {}
        shapes: dict[str, torch.Size] = {}

        def keep(name: str, value: Any) -> None:
            if name in wanted and isinstance(value, Tensor):
                values[name] = records.put(value)
                shapes[name] = value.shape

        others: dict[str, torch.Size] = {} if after is not before else shapes

        def measure(name: str, value: Any) -> None:
            if isinstance(value, Tensor):
                others[name] = value.shape

        outputs = [p.graph.output_node() for p in (before, after)]
        values[outputs[0].name] = first_output(exact.run(before, probe, keep))
        if after is not before:
            exact.run(after, probe, measure)
        common = {
            node: pairs[node]
            for node in after.graph.nodes
            if node in replaced
            or (node in pairs and pairs[node] in values and shapes[pairs[node]] == others.get(node.name))
        }
        common[outputs[1]] = outputs[0].name
        given = tuple(
            dict(zip([n.name for n in p.placeholders()], p.arguments(probe), strict=True)) for p in (before, after)
        )
        return cls(_Pieces(before), _Pieces(after), common, values, given)

    def value(self, name: str) -> Tensor:
        """What a node before has on the probe."""
        kept = self.values[name]
        return kept if isinstance(kept, Tensor) else kept.read()

    def error(self, node: Node, counted: Tensor | None = None) -> float:
        """Of a common node of the program after, given what the program before has in front of it."""
        piece = self.after.cut(node, self.common)
        found = first_output(exact.run(piece, self.inputs(piece, self.given[1])))
        return difference(first_output(self.value(self.common[node])), found, counted)

    def made_up_for(self, node: Node) -> bool:
        """Whether those that read a node are closer to what they were with its value after; then it is no longer
        common."""
        readers = [n for n in self.common if n is not node and node in self.after.leaves(n, self.common)]
        if not readers:
            return False
        from_before = max(self.error(n) for n in readers)
        common = self.common
        self.common = {n: name for n, name in common.items() if n is not node}
        if max(self.error(n) for n in readers) < from_before:
            return True
        self.common = common
        return False

    def cut(self, node: Node, error: float, allowed: float, counted: Tensor | None = None) -> Parting:
        """The pieces of both programs that compute a common node."""
        theirs = {self.before.nodes[name]: name for name in self.common.values()}
        origin = self.before.nodes[self.common[node]]
        before = self.before.cut(origin, theirs)
        after = self.after.cut(node, self.common)
        inputs = {**self.inputs(before, self.given[0]), **self.inputs(after, self.given[1])}
        return Parting(node, origin, error, allowed, before, after, inputs, counted)

    def inputs(self, piece: Program, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a piece's placeholders, in memory of their own, because a program may change its state."""
        names = [str(n.target) for n in piece.placeholders()]
        return {n: _own(given[n]) if n in given else self.value(n) for n in names}


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _varying(graph: fx.Graph) -> set[Node]:
    """Calls that depend on inputs and give a value of their own: quantized activations, simulated or in codes, are
    computed together with what reads them, and parts of several values with these."""
    varying: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in varying for n in node.all_input_nodes):
            varying.add(node)
    calls = {n for n in varying if isinstance(n.target, torch._ops.OpOverload) and not has_role(n, "simulates")}
    return {n for n in calls if not (has_role(n, "integer") and len(n.target._schema.returns) > 1)}


class _Pieces:
    """Cuts pieces out of a program.

    Attributes:
        nodes: of the program, by name.
    """

    def __init__(self, program: Program):
        self._program = program
        self._order = {n: i for i, n in enumerate(program.graph.nodes)}
        self.nodes: dict[str, Node] = {n.name: n for n in program.graph.nodes}

    def leaves(self, node: Node, known: Mapping[Node, str]) -> set[Node]:
        """The nearest known nodes that a node is computed from."""
        return self._between(node, known)[0]

    def _between(self, node: Node, known: Mapping[Node, str]) -> tuple[set[Node], set[Node]]:
        """The nearest known nodes that a node is computed from, and what lies between them and it, itself included."""
        leaves: set[Node] = set()
        between, pending = {node}, [node]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in known:
                    leaves.add(source)
                elif source not in between:
                    between.add(source)
                    pending.append(source)
        return leaves, between

    def cut(self, node: Node, known: Mapping[Node, str]) -> Program:
        """What computes a node from the nearest known ones.

        Its placeholders are called as ``known`` says, and the program's own by their names.
        """
        leaves, between = self._between(node, known)
        graph, root = fx.Graph(), torch.nn.Module()
        copies: dict[Node, Node] = {}
        for old in sorted(leaves | between, key=self._order.__getitem__):
            if old.op == "output":
                break
            if old in leaves or old.op == "placeholder":
                copies[old] = graph.placeholder(known[old] if old in leaves else old.name)
            else:
                copies[old] = graph.node_copy(old, copies.__getitem__)
            # What passes know of a call is nothing about an input that has its value.
            copies[old].meta = {k: v for k, v in old.meta.items() if old not in leaves or k in _OF_VALUES}
            if old.op == "get_attr":
                set_attribute(root, old.target, get_attribute(self._program.module, old.target))
        graph.output(fx.map_arg(node.args[0], copies.__getitem__) if node.op == "output" else copies[node])
        return Program(fx.GraphModule(root, graph), kind="module", name=self._program.name)
