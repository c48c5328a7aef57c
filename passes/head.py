"""``head``: the token embedding and the output head become int8 per row, or 4-bit codes.

They are not W(1+1): in a small model they hold most of the bytes, and both are sensitive. One int8 matrix with an fp32
scale a row costs 8 bits a weight and almost nothing in quality; the head's input is quantized to 8 bits per group, so
that it runs on an integer kernel. Where ``annotate`` kept the head float, the embedding stays float with it, tied or
not. ``bits=16`` leaves both in the model's own dtype.

With ``bits=4`` the head has 4-bit codes of 16 levels that are fitted to it, and an fp16 scale per row and group. All of
a head is read for every token, so about half the bytes are. The codes are fitted to the inputs that the head gets from
the quantized layers on calibration text (:mod:`.calibrate.coded`); weights rounded to the next level would cost five
times as much in divergence. Of an embedding a token reads one row only. It keeps its int8 rows; ``embedding=4`` makes
the file smaller, and an embedding that is tied to the head then reads the head's codes.

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

With ``bits=4`` the head reads these instead, and the look-up stays at its rows::

    %codes: u8[100, 288] = weight model.embed_tokens.weight.codes
    %table: i8[16] = weight model.embed_tokens.weight.table
    %code_scale: f16[100, 9] = weight model.embed_tokens.weight.code_scale
    %decoded = lbllm.unpack_int4(%codes, %table, %code_scale, 576, 64)

Needs ``annotate`` (which linear is the head). A program without token embedding and head (a plain module) stays as it
is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..codegen import operators as operators
from ..codegen.format import quantize_rows
from ..codegen.operators import Arguments, first_argument, set_argument
from ..codegen.sizes import DEFAULT_GROUP, GROUPS
from .annotate import computes_output
from .base import CALIBRATING, Contract, Count, Pass, PassContext, PassError, PassResult, Rate
from .calibrate.coded import fit_int4, head_hessians
from .calibrate.fit import factor
from .calibrate.int4 import quantize_int4
from .contracts import describe
from .ir.annotations import LINEAR, linears
from .ir.program import Program, get_attribute, prune_attributes, set_attribute
from .ir.rewrite import Node, calls, make_attribute, make_call, moves, operands_of, same_storage


@dataclass(frozen=True)
class Head(Pass):
    """Quantizes the token embedding and the output head to int8 rows or 4-bit codes.

    Attributes:
        bits: of the head: 8, 4, or 16 to leave both as they are.
        group: channels per scale of the head's quantized input, where its scheme has none; 0 for one scale a token. Of
            a 4-bit head also the columns per scale of its weights, and never 0.
        embedding: bits of a token embedding beside a 4-bit head: 8 or 4.
        sequences: calibration sequences to whose inputs a 4-bit head is fitted, at most; 0 fits it to weights alone.
        damp: share of the mean diagonal that is added to the diagonal of their Hessian.
    """

    name: ClassVar[str] = "head"
    contract: ClassVar[Contract] = CALIBRATING

    bits: Literal[4, 8, 16] = 8
    group: int = DEFAULT_GROUP
    embedding: Literal[4, 8] = 8
    sequences: Count = 32
    damp: Rate = 0.01

    def __post_init__(self) -> None:
        if self.bits == 4 and self.group not in GROUPS:
            raise PassError(f"head{{bits=4}} needs groups of one of {GROUPS} columns, not of {self.group}")
        if self.embedding == 4 and self.bits != 4:
            raise PassError("head{embedding=4} goes with bits=4 alone; an embedding beside an int8 head has int8 rows")

    def rehearsal(self) -> Pass:
        return replace(self, sequences=min(1, self.sequences))

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if self.bits == 16:
            return PassResult(program, summary={"bits": 16, "matrices": 0})
        if self.bits == 4 and self.sequences and not context.calibration:
            raise PassError(
                "head{bits=4} needs calibration batches; give a calibration text, or fit the head to its weights alone"
                " with head{bits=4,sequences=0}"
            )
        given, program = program, program.copy()
        sites = [*([] if _keeps_head(program) else _token_embeddings(program)), *_head_linears(program)]
        sites = [(node, weight) for node, weight in sites if not _kept_float(program, weight)]
        names = _canonical_names(program, [weight for _, weight in sites])
        unpacked: dict[tuple[str, int], Node] = {}
        rows: list[dict[str, Any]] = []
        matrices = {path: get_attribute(program.module, path) for path in names.values()}
        hessians = self._hessians(given, context, sites, names)
        for node, weight in sites:
            path = names[weight.target]
            key = path, self._bits_of(node)
            if key not in unpacked:
                _check(program, path, matrices[path], node)
                rows.append({"path": path, "bits": key[1], "shape": list(matrices[path].shape)})
                unpacked[key], measured = self._quantize(program, *key, matrices[path], node, hessians.get(path))
                rows[-1] |= measured
            node.replace_input_with(weight, unpacked[key])
            if node.target is torch.ops.aten.linear.default:
                self._quantize_input(program, node)
        program.graph.eliminate_dead_code()
        prune_attributes(program.module)
        program.graph.lint()
        program.module.recompile()
        return PassResult(program, rows=rows, summary={"bits": self.bits, "matrices": len(rows)})

    def _bits_of(self, node: Node) -> int:
        """Bits of the matrix that a linear or a look-up reads."""
        return self.embedding if self.bits == 4 and node.target is torch.ops.aten.embedding.default else self.bits

    def _hessians(
        self, program: Program, context: PassContext, sites: list[tuple[Node, Node]], names: dict[str, str]
    ) -> dict[str, Tensor]:
        """Hessians of the inputs of 4-bit heads by the path of their matrix: the mean where several heads share it."""
        if self.bits != 4 or not self.sequences:
            return {}
        inputs: dict[str, set[str]] = {}
        for node, weight in sites:
            if node.target is torch.ops.aten.linear.default:
                inputs.setdefault(names[weight.target], set()).add(operands_of(node)[0].name)
        found = head_hessians(program, context, set().union(*inputs.values()), self.sequences) if inputs else {}
        return {path: torch.stack([found[name] for name in sorted(nodes)]).mean(0) for path, nodes in inputs.items()}

    def _quantize(
        self, program: Program, path: str, bits: int, matrix: Tensor, like: Node, hessian: Tensor | None
    ) -> tuple[Node, dict[str, float]]:
        """Stores a quantized form of the matrix whose path is ``path``.

        Returns:
            The node that unpacks it, in front of all others; and what the fit measured.
        """
        measured: dict[str, float] = {}
        if bits == 8:
            rows, scale = quantize_rows(matrix)
            tensors, sizes, unpack = {"rows": rows, "row_scale": scale}, (), torch.ops.lbllm.unpack_rows.default
        else:
            if hessian is None:
                coded = quantize_int4(matrix, self.group)
            else:
                coded, error = fit_int4(matrix, factor(hessian, self.group, self.damp), self.group)
                measured["output_error"] = error
            tensors = {"codes": coded.packed, "table": coded.table, "code_scale": coded.scale}
            sizes, unpack = (coded.in_features, coded.group), torch.ops.lbllm.unpack_int4.default
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        for name, tensor in tensors.items():
            set_attribute(program.module, f"{path}.{name}", tensor)
        with program.graph.inserting_before(first):
            parts = [make_attribute(program.graph, f"{path}.{name}", like) for name in tensors]
            return make_call(program.graph, unpack, (*parts, *sizes), like), measured

    def _quantize_input(self, program: Program, node: Node) -> None:
        info = node.meta[LINEAR]
        path, group = f"{info.path}.input_clip", info.scheme.act_group
        if self.bits == 4 and group not in (None, 0, self.group):
            raise PassError(
                f"the input of {describe(node)} has groups of {group} in its scheme, which do not go with the"
                f" {self.group} of its 4-bit weights; use head{{group={group}}} or act-group=0"
            )
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


def _check(program: Program, path: str, matrix: Tensor, like: Node) -> None:
    """Refuses a weight that cannot be quantized.

    Raises:
        PassError: it is no matrix, or something else reads it.
    """
    if matrix.dim() != 2:
        raise PassError(f"the weight of {describe(like)} has {matrix.dim()} dimensions; only matrices can be quantized")
    readers = (n for n in program.graph.nodes if n.op == "get_attr" and n.target == path)
    if any(set(n.users) - _users(n) for n in readers):
        raise PassError(
            f"the weight '{path}' of {describe(like)} is also used by another operation, so it cannot be quantized;"
            " use head{bits=16}"
        )


def _users(weight: Node) -> set[Node]:
    """Users of a weight that can take it unpacked: look-ups and linears, as their weight."""
    readers = calls(weight.graph, torch.ops.aten.embedding.default, torch.ops.aten.linear.default)
    return {n for n in readers if n in weight.users and Arguments(n).weight is weight}
