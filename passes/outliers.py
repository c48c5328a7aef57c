"""``outliers``: the loudest channels of every decoder linear's input move to its end, where ``ptq`` leaves them 8 bits.

A few channels of an input are many times as loud as the others and take most of a 4-bit code's range. BWA (ACL 2025
Findings 459, arXiv 2504.05352) keeps outlier channels at a higher precision; that they are the ones with the largest
mean square, permuted last, with int8 weights and activations, is as in Atom (arXiv 2310.19102). This pass only permutes
the columns of the linears, and what computes their input. Where that is elementwise work on the outputs of linears, as
in a gated MLP, their rows are permuted and nothing is left to do at run time; else the input is gathered.

Given::

    %q = aten.linear(%x, %q_weight)
    %act = aten.silu(%gate)
    %h = aten.mul.Tensor(%act, %up)
    %d = aten.linear(%h, %d_weight)

Result::

    %order: i64[576] = weight model.layers.0.self_attn.q_proj.input_order
    %gathered = aten.index_select(%x, -1, %order)
    %q = aten.linear(%gathered, %q_weight)
    %act = aten.silu(%gate)
    %h = aten.mul.Tensor(%act, %up)
    %d = aten.linear(%h, %d_weight)

How many channels that are is in the linears' schemes, for ``ptq``. The rows say where an input's order went, and which
inputs stay as they are. The result is what later passes imitate: their teacher. Needs ``annotate``, before ``observe``,
and calibration batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..codegen.operators import Arguments
from .annotate import decoder_linears
from .base import Contract, Count, Pass, PassContext, PassError, PassResult, Positive, Share, bounded
from .calibrate.moments import measure
from .calibrate.precision import Precision
from .ir.annotations import LINEAR
from .ir.annotations import linears as annotated_linears
from .ir.program import Program, get_attribute, set_attribute
from .ir.rewrite import UNPACKED, Node, calls, is_call, make_attribute, make_call, moves
from .ir.spool import spooled
from .observe import nothing_to_quantize

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

ORDER = "input_order"
"""The channels of a linear's input in the order in which it is gathered, beside the linear."""

_CHANNELWISE = frozenset(
    {
        _aten.mul.Tensor,
        _aten.add.Tensor,
        _aten.sub.Tensor,
        _aten.div.Tensor,
        _aten.neg.default,
        _aten.pow.Tensor_Scalar,
        _aten.square.default,
        _aten.silu.default,
        _aten.gelu.default,
        _aten.relu.default,
        _aten.sigmoid.default,
        _aten.tanh.default,
        _aten.to.dtype,
        _aten.clamp.default,
    }
)
"""Operators whose result's channel is computed from the same channel of their operands, besides those that move nothing
within a token."""


@dataclass(frozen=True)
class Outliers(Pass):
    """Puts the loudest channels of inputs last.

    Attributes:
        columns: channels of an input that are outliers, at most; 0 for none.
        share: at most this share of an input's channels, so that narrow inputs have fewer.
        sequences: calibration sequences to measure on, at most.
        precision: of the matrix products on the calibration set.
    """

    columns: Count = 128
    share: Share = 0.03125
    sequences: Positive = 64
    precision: Precision = "auto"

    name: ClassVar[str] = "outliers"
    contract: ClassVar[Contract] = bounded(1e-4)  # sums over channels are taken in another order
    sets_teacher: ClassVar[bool] = True

    def count(self, channels: int) -> int:
        """Outliers among so many channels."""
        return min(self.columns, int(self.share * channels))

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if calls(program.graph, _lbllm.observe.default, *UNPACKED):
            raise PassError("the program is observed or quantized already; move 'outliers' in front of 'observe'")
        if nothing_to_quantize(self.name, program, context):
            return PassResult(program, summary={"inputs": 0})
        if self.columns and not context.calibration:
            raise PassError("outliers needs calibration batches; give a calibration text")
        coded = next(
            (info.path for _, info in annotated_linears(program) if info.role == "decoder" and info.scheme.bits), None
        )
        if coded is not None:
            raise PassError(
                f"'{coded}' has 4-bit codes, beside which no channels keep 8 bits; leave out bits=4, or"
                " the pass 'outliers'"
            )
        program = program.copy()
        rows: list[dict[str, Any]] = []
        wanted: dict[Node, Sequence[Node]] = {}
        for source, linears in decoder_linears(program.graph).items():
            reason = self.left(program, linears)
            if reason is None:
                wanted[source] = linears
            else:
                rows.append({"site": linears[0].meta[LINEAR].path, "left": reason})
        names = {source.name: -1 for source in wanted}
        statistics = measure(program, context, names, self.sequences, self.precision) if names else {}
        for source, linears in wanted.items():
            if source.name in statistics:
                rows.append(self._move(program, source, linears, statistics[source.name].square))
            else:
                rows.append({"site": linears[0].meta[LINEAR].path, "left": "no layer reads it"})
        program.graph.lint()
        program.module.recompile()
        moved = [row for row in rows if "outliers" in row]
        absorbed = sum("into" in row for row in moved)
        summary = {"inputs": len(rows), "moved": len(moved), "absorbed": absorbed}
        return PassResult(program, rows, summary)

    def left(self, program: Program, linears: Sequence[Node]) -> str | None:
        """Why the channels of the linears' input stay where they are; None if they move."""
        if any(is_call(node, _lbllm.grouped_linear.default) for node in linears):
            return "stacked experts read it"
        if not self.count(_channels(program, linears)):
            return "no channels are asked for" if not self.columns else "it has too few channels"
        if any(reader not in linears for path in _paths(linears) for reader in _readers(program.graph, path)):
            return "other operations use a weight behind it"
        return None

    def _move(self, program: Program, source: Node, linears: Sequence[Node], square: Tensor) -> dict[str, Any]:
        """Moves the outliers of one input, whose channels have these mean squares, to its end; returns its row."""
        count, first = self.count(len(square)), linears[0].meta[LINEAR]
        order = order_of(square, count)
        found = producers(program, source, linears)
        if isinstance(found, str):
            path = f"{first.path}.{ORDER}"
            set_attribute(program.module, path, order)
            with program.graph.inserting_before(linears[0]):
                attribute = make_attribute(program.graph, path, linears[0])
                gathered = make_call(program.graph, _aten.index_select.default, (source, -1, attribute), linears[0])
            for linear in linears:
                linear.replace_input_with(source, gathered)
            where = {"gathered": found}
        else:
            for path in found:
                _permute(program, path, order, 0)
            where = {"into": ", ".join(found)}
        for path in _paths(linears):
            _permute(program, path, order, -1)
        for linear in linears:
            info = linear.meta[LINEAR]
            linear.meta[LINEAR] = replace(info, scheme=replace(info.scheme, outliers=count))
        loud = float(square[order[-count:]].sum() / square.sum().clamp_min(1e-30))
        return {"site": first.path, "outliers": count, "share_of_square": loud, **where}


def order_of(square: Tensor, count: int) -> Tensor:
    """The channels ``[K]`` with the ``count`` loudest last, both parts in their old order; int64."""
    loud = torch.zeros(len(square), dtype=torch.bool)
    loud[square.argsort(descending=True, stable=True)[:count]] = True
    return torch.cat([(~loud).nonzero(), loud.nonzero()]).flatten()


def producers(program: Program, source: Node, linears: Sequence[Node]) -> list[str] | str:
    """The weights whose first dimension is the channels of ``source``, where permuting them permutes nothing else; else
    why there are none, in words."""
    module, channels = program.module, _channels(program, linears)
    seen: set[Node] = set()
    paths: dict[str, set[Node]] = {}
    pending = [source]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, _aten.linear.default):
            weights = [w for w in Arguments(node).pick("weight", "bias") if w is not None]
            if any(w.op != "get_attr" for w in weights):
                return "a linear with a computed weight computes it"
            outputs = len(get_attribute(module, weights[0].target))
            if outputs not in (1, channels):
                return "a linear of another width is part of it"
            for weight in weights if outputs == channels else ():  # a single output is the same for all channels
                paths.setdefault(weight.target, set()).add(node)
        elif node.op == "get_attr":
            value = get_attribute(module, node.target)
            if value.dim() == 1 and len(value) == channels:
                paths.setdefault(node.target, set()).update(node.users)
            elif value.dim() and value.shape[-1] != 1:
                return "a weight of another shape is part of it"
        elif node.op == "call_function" and (node.target in _CHANNELWISE or moves(node, "aliases", "copies")):
            pending += node.all_input_nodes
        else:
            return "its channels are not computed one by one from those of linears"
    for node in seen:
        if node.op != "get_attr" and any(user not in seen and user not in linears for user in node.users):
            return "something else reads what computes it"
    for path, readers in paths.items():
        if set(_readers(program.graph, path)) - readers:
            return "other operations use a weight that computes it"
    return list(paths) or "nothing computes it"


def _channels(program: Program, linears: Sequence[Node]) -> int:
    return get_attribute(program.module, linears[0].meta[LINEAR].weight).shape[-1]


def _paths(linears: Iterable[Node]) -> list[str]:
    """The weights of linears, each once."""
    return list(dict.fromkeys(node.meta[LINEAR].weight for node in linears))


def _readers(graph: fx.Graph, path: str) -> list[Node]:
    """What reads a weight."""
    return [user for n in graph.nodes if n.op == "get_attr" and n.target == path for user in n.users]


def _permute(program: Program, path: str, order: Tensor, dim: int) -> None:
    weight = get_attribute(program.module, path)
    set_attribute(program.module, path, spooled(weight.index_select(dim, order.to(weight.device))))
