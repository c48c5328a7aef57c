"""``head``: the token embedding and the output head become int8 per row.

They are not W(1+1): in a small model they hold most of the bytes, and both are sensitive. One int8 matrix with an fp32
scale a row costs 8 bits a weight and almost nothing in quality; the head's input is quantized to 8 bits per group, so
that it runs on an integer kernel. Where ``annotate`` kept the head float, the embedding stays float with it, tied or
not. ``bits=16`` leaves both in the model's own dtype.

Given::

    %embedding = aten.embedding(%embed_weight, %input_ids)
    %hidden = aten.rms_norm(%embedding, [576])
    %logits = aten.linear(%hidden, %embed_weight)

Result::

    %rows: i8[100, 576] = weight model.embed_tokens.weight.rows
    %row_scale: f32[100] = weight model.embed_tokens.weight.row_scale
    %unpacked = lbllm.unpack_rows(%rows, %row_scale)
    %embedding = aten.embedding(%unpacked, %input_ids)
    %hidden = aten.rms_norm(%embedding, [576])
    %clip: f32[2] = weight lm_head.input_clip
    %quantized = lbllm.fake_quantize(%hidden, %clip, 8, 64)
    %logits = aten.linear(%quantized, %unpacked)

Needs ``annotate`` (which linear is the head). A program without token embedding and head (a plain module) stays as it
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..codegen import operators as operators
from ..codegen.format import quantize_rows
from ..codegen.operators import Arguments, first_argument, set_argument
from ..codegen.sizes import DEFAULT_GROUP
from .annotate import computes_output
from .base import CALIBRATING, Contract, Pass, PassContext, PassError, PassResult
from .contracts import describe
from .ir.annotations import LINEAR, linears
from .ir.program import Program, get_attribute, prune_attributes, set_attribute
from .ir.rewrite import Node, calls, make_attribute, make_call, moves, operands_of, same_storage


@dataclass(frozen=True)
class Head(Pass):
    """Quantizes the token embedding and the output head to int8 rows.

    Attributes:
        bits: 8, or 16 to leave both as they are.
        group: channels per scale of the head's quantized input, where its scheme has none; 0 for one scale a token.
    """

    name: ClassVar[str] = "head"
    contract: ClassVar[Contract] = CALIBRATING

    bits: Literal[8, 16] = 8
    group: int = DEFAULT_GROUP

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if self.bits == 16:
            return PassResult(program, summary={"bits": 16, "matrices": 0})
        program = program.copy()
        sites = [*([] if _keeps_head(program) else _token_embeddings(program)), *_head_linears(program)]
        sites = [(node, weight) for node, weight in sites if not _kept_float(program, weight)]
        names = _canonical_names(program, [weight for _, weight in sites])
        unpacked: dict[str, Node] = {}
        for node, weight in sites:
            path = names[weight.target]
            if path not in unpacked:
                unpacked[path] = _quantize(program, path, weight, node)
            node.replace_input_with(weight, unpacked[path])
            if node.target is torch.ops.aten.linear.default:
                self._quantize_input(program, node)
        program.graph.eliminate_dead_code()
        prune_attributes(program.module)
        program.graph.lint()
        program.module.recompile()
        rows = [{"path": path, "shape": list(get_attribute(program.module, f"{path}.rows").shape)} for path in unpacked]
        return PassResult(program, rows=rows, summary={"bits": 8, "matrices": len(rows)})

    def _quantize_input(self, program: Program, node: Node) -> None:
        info = node.meta[LINEAR]
        path, group = f"{info.path}.input_clip", info.scheme.act_group
        set_attribute(program.module, path, torch.ones(2))
        with program.graph.inserting_before(node):
            clip = make_attribute(program.graph, path, node)
            hidden, _ = operands_of(node)
            arguments = (hidden, clip, 8, self.group if group is None else group)
            quantized = make_call(program.graph, torch.ops.lbllm.fake_quantize.default, arguments, node)
        set_argument(node, "input", quantized)


def _token_embeddings(program: Program) -> list[tuple[Node, Node]]:
    """Look-ups of the placeholder ``input_ids`` in a weight: ``(call, weight)``."""
    found = []
    for node in calls(program.graph, torch.ops.aten.embedding.default):
        weight, ids = Arguments(node).pick("weight", "indices")
        while moves(ids, "aliases", "copies", "reshapes"):
            ids = first_argument(ids)
        if ids.op == "placeholder" and ids.target == "input_ids" and weight.op == "get_attr":
            found.append((node, weight))
    return found


def _head_linears(program: Program) -> list[tuple[Node, Node]]:
    """Linears that ``annotate`` called the output head: ``(call, weight)``."""
    found = []
    for node in calls(program.graph, torch.ops.aten.linear.default):
        info = node.meta.get(LINEAR)
        if info is None or info.role != "head":
            continue
        _, weight = operands_of(node)
        if weight.op != "get_attr":
            raise PassError(f"the head {describe(node)} is quantized already; run 'head' once")
        found.append((node, weight))
    return found


def _keeps_head(program: Program) -> bool:
    """Whether ``annotate`` kept a linear float that computes the output."""
    return any(info.role == "dense" and info.layer is None and computes_output(node) for node, info in linears(program))


def _kept_float(program: Program, weight: Node) -> bool:
    """Whether ``annotate`` kept a linear with this very tensor float."""
    tensor = get_attribute(program.module, weight.target)
    kept = (operands_of(node)[1] for node, info in linears(program) if info.role == "dense")
    return any(same_storage(get_attribute(program.module, other.target), tensor) for other in kept)


def _canonical_names(program: Program, weights: list[Node]) -> dict[str, str]:
    """One path for every set of weights that share their memory: the one that is used first."""
    chosen: list[tuple[Tensor, str]] = []
    names: dict[str, str] = {}
    for node in weights:
        tensor = get_attribute(program.module, node.target)
        path = next((p for t, p in chosen if same_storage(t, tensor)), None)
        if path is None:
            path = node.target
            chosen.append((tensor, path))
        names[node.target] = path
    return names


def _quantize(program: Program, path: str, weight: Node, like: Node) -> Node:
    """Replaces the tensor at ``path`` by rows and scales; returns the node that unpacks them, in front of all users."""
    graph = program.graph
    matrix = get_attribute(program.module, weight.target)
    if matrix.dim() != 2:
        raise PassError(f"the weight of {describe(like)} has {matrix.dim()} dimensions; only matrices can be int8 rows")
    if any(n.op == "get_attr" and n.target == path and set(n.users) - _int8_users(n) for n in graph.nodes):
        raise PassError(
            f"the weight '{path}' of {describe(like)} is also used by another operation, so it cannot become int8 rows;"
            " use head{bits=16}"
        )
    rows, scale = quantize_rows(matrix)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        rows_node = make_attribute(graph, f"{path}.rows", like)
        scale_node = make_attribute(graph, f"{path}.row_scale", like)
        unpacked = make_call(graph, torch.ops.lbllm.unpack_rows.default, (rows_node, scale_node), like)
    set_attribute(program.module, f"{path}.rows", rows)
    set_attribute(program.module, f"{path}.row_scale", scale)
    return unpacked


def _int8_users(weight: Node) -> set[Node]:
    """Users of a weight that can take it unpacked from int8 rows: look-ups and linears, as their weight."""
    readers = calls(weight.graph, torch.ops.aten.embedding.default, torch.ops.aten.linear.default)
    return {n for n in readers if n in weight.users and Arguments(n).weight is weight}
