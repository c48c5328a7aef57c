"""``head``: the token embedding and the output head become int8 per row, 4-bit codes, or the head W(1+1).

In a small model they hold most of the bytes, and both are sensitive. One int8 matrix with an fp32 scale a row costs 8
bits a weight and almost nothing in quality; the head's input is quantized to 8 bits per group, so that it runs on an
integer kernel. Where ``annotate`` kept the head float, the embedding stays float with it, tied or not. ``bits=16``
leaves both in the model's own dtype. A head whose scheme has ``bits`` has the form that this says instead, with its
``group`` and ``embedding``, whatever the options are: ``budget`` chooses it so.

With ``bits=4`` the head has 4-bit codes of 16 levels that are fitted to it, and an fp16 scale per row and group. All of
a head is read for every token, so about half the bytes are. The codes are fitted to the inputs that the head gets from
the quantized layers on calibration text (:mod:`.calibrate.coded`); weights rounded to the next level would cost five
times as much in divergence. Of an embedding a token reads one row only. It keeps its int8 rows; ``embedding=4`` makes
the file smaller, and an embedding that is tied to the head then reads the head's codes.

With ``bits=2`` the head has two planes and four levels a group, as the linears of the decoder layers have, fitted as
``ptq`` fits them (:mod:`.calibrate.fit`) to the same inputs; its own input keeps its 8 bits.

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

and with ``bits=2`` these::

    %sign: u8[100, 72] = weight model.embed_tokens.weight.sign
    %bitmap: u8[100, 72] = weight model.embed_tokens.weight.bitmap
    %levels: i8[100, 9, 4] = weight model.embed_tokens.weight.levels
    %scale: f16[100, 9] = weight model.embed_tokens.weight.scale
    %planes = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)

Needs ``annotate`` (which linear is the head). A program without token embedding and head (a plain module) stays as it
is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..codegen import operators as operators
from ..codegen.format import quantize_rows
from ..codegen.operators import Arguments, first_argument, set_argument
from ..codegen.operators.lbllm.linears import WEIGHT
from ..codegen.sizes import DEFAULT_GROUP, GROUPS, int4_bytes, int8_bytes, matrix_bytes
from .annotate import computes_output
from .base import CALIBRATING, Contract, Count, Pass, PassContext, PassError, PassResult, Rate
from .calibrate.coded import fit_int4, fit_planes, head_hessians
from .calibrate.fit import factor
from .calibrate.int4 import quantize_int4
from .calibrate.layers import CODED
from .contracts import describe
from .ir.annotations import LINEAR, linears
from .ir.program import Program, get_attribute, prune_attributes, set_attribute
from .ir.rewrite import Node, calls, make_attribute, make_call, moves, operands_of, same_storage
from .ir.scheme import Scheme

FITTED = (2, 4)
"""Bits of heads that are fitted to their inputs."""


@dataclass(frozen=True)
class Form:
    """How a matrix is stored.

    Attributes:
        bits: 8 (int8 rows), 4 (codes), 2 (W(1+1)) or 16 (as it is).
        group: columns per scale, or per group of levels; 0 for int8 rows and for what stays as it is.
    """

    bits: int
    group: int

    def bytes(self, rows: int, columns: int) -> int:
        """Of a matrix of this form, which is quantized."""
        if self.bits == 8:
            return int8_bytes(rows, columns)
        return (int4_bytes if self.bits == 4 else matrix_bytes)(rows, columns, self.group)


@dataclass(frozen=True)
class Site:
    """A look-up or a head, and the matrix that it reads.

    Attributes:
        node: the call.
        weight: the node of its weight.
        path: of the matrix: the one that is used first, where several share their memory.
        form: what the matrix becomes for this reader.
    """

    node: Node
    weight: Node
    path: str
    form: Form

    @property
    def is_linear(self) -> bool:
        return self.node.target is torch.ops.aten.linear.default


@dataclass(frozen=True)
class Head(Pass):
    """Quantizes the token embedding and the output head.

    Attributes:
        bits: of a head whose scheme has none: 8, 4, 2, or 16 to leave head and embedding as they are.
        group: channels per scale of an int8 head's quantized input, where its scheme has none; 0 for one scale a token.
            Of a head of 4 or 2 bits also the columns per group of its weights, and never 0.
        embedding: bits of a token embedding beside a head of 4 or 2 bits: 8 or 4.
        sequences: calibration sequences to whose inputs a head of 4 or 2 bits is fitted, at most; 0 fits it to weights
            alone.
        damp: share of the mean diagonal that is added to the diagonal of their Hessian.
    """

    name: ClassVar[str] = "head"
    contract: ClassVar[Contract] = CALIBRATING

    bits: Literal[2, 4, 8, 16] = 8
    group: int = DEFAULT_GROUP
    embedding: Literal[4, 8] = 8
    sequences: Count = 32
    damp: Rate = 0.01

    def __post_init__(self) -> None:
        if self.bits in FITTED and self.group not in GROUPS:
            raise PassError(f"head{{bits={self.bits}}} needs groups of one of {GROUPS} columns, not of {self.group}")
        if self.embedding == 4 and self.bits not in FITTED:
            raise PassError(
                "head{embedding=4} goes with bits=4 or bits=2; an embedding beside an int8 head has int8 rows"
            )

    def rehearsal(self) -> Pass:
        return replace(self, sequences=min(1, self.sequences))

    def apply(self, program: Program, context: PassContext) -> PassResult:
        sites = self.sites(program)
        fitted = sorted({site.form.bits for site in sites if site.is_linear} & set(FITTED))
        if fitted and self.sequences and not context.calibration:
            raise PassError(
                f"head{{bits={fitted[0]}}} needs calibration batches; give a calibration text, or fit the head to its"
                f" weights alone with head{{bits={fitted[0]},sequences=0}}"
            )
        return self.quantized(program, self.hessians(program, context) if fitted else {})

    def quantized(self, program: Program, hessians: Mapping[str, Tensor]) -> PassResult:
        """The program with quantized embedding and head.

        Args:
            program: an annotated one.
            hessians: see :meth:`hessians`; a matrix without one is fitted to its weights alone.
        """
        if not self.sites(program):
            return PassResult(program, summary={"bits": self.bits, "matrices": 0})
        program = program.copy()
        sites = self.sites(program)
        of_heads = {(site.path, site.form) for site in sites if site.is_linear}
        unpacked: dict[tuple[str, Form], Node] = {}
        rows: list[dict[str, Any]] = []
        matrices = {site.path: get_attribute(program.module, site.path) for site in sites}
        for site in sites:
            key, node = (site.path, site.form), site.node
            if key not in unpacked:
                _check(program, site.path, matrices[site.path], node)
                rows.append({"path": site.path, "bits": site.form.bits, "shape": list(matrices[site.path].shape)})
                hessian = hessians.get(site.path) if key in of_heads else None
                unpacked[key], measured = self._quantize(program, site, matrices[site.path], hessian)
                rows[-1] |= measured
            node.replace_input_with(site.weight, unpacked[key])
            if site.is_linear:
                self._quantize_input(program, node, site.form)
        program.graph.eliminate_dead_code()
        prune_attributes(program.module)
        program.graph.lint()
        program.module.recompile()
        bits = next((site.form.bits for site in sites if site.is_linear), self.bits)
        return PassResult(program, rows=rows, summary={"bits": bits, "matrices": len(rows)})

    def sites(self, program: Program) -> list[Site]:
        """What the pass quantizes of an annotated program, look-ups first.

        Raises:
            PassError: a head is quantized already, or heads over one matrix want two forms of as many bits.
        """
        heads = _head_linears(program)
        found = [*([] if _keeps_head(program) else _token_embeddings(program)), *heads]
        found = [(node, weight) for node, weight in found if not _kept_float(program, weight)]
        names, linear = _canonical_names(program, [weight for _, weight in found]), {node for node, _ in heads}
        beside = self.form_beside([node.meta[LINEAR].scheme for node, _ in heads])
        made = [
            Site(node, weight, names[weight.target], self.form(node.meta[LINEAR].scheme) if node in linear else beside)
            for node, weight in found
        ]
        made = [site for site in made if site.form.bits != 16]
        groups: dict[tuple[str, int], Site] = {}
        for site in made:
            other = groups.setdefault((site.path, site.form.bits), site)
            if other.form != site.form:
                raise PassError(
                    f"{describe(other.node)} and {describe(site.node)} read one matrix with {site.form.bits} bits, in"
                    f" groups of {other.form.group} and of {site.form.group}; give both the same group"
                )
        return made

    def sizes(self, program: Program) -> dict[str, int]:
        """Bytes of what the pass stores of the matrices that it quantizes, by path; one that is stored in two forms
        takes both."""
        forms = {(site.path, site.form) for site in self.sites(program)}
        found: dict[str, int] = {}
        for path, form in forms:
            rows, columns = get_attribute(program.module, path).shape
            found[path] = found.get(path, 0) + form.bytes(rows, columns)
        return found

    def form(self, scheme: Scheme) -> Form:
        """What the matrix of a head with this scheme becomes."""
        bits = scheme.bits or self.bits
        return Form(bits, (scheme.group or self.group or DEFAULT_GROUP) if bits in FITTED else 0)

    def form_beside(self, heads: Sequence[Scheme]) -> Form:
        """What the matrix of a token embedding becomes beside heads with these schemes."""
        scheme = next((scheme for scheme in heads if scheme.bits), None)
        bits, embedding = (self.bits, self.embedding) if scheme is None else (scheme.bits, scheme.embedding or 8)
        if bits not in FITTED or embedding == 8:
            return Form(16 if bits == 16 else 8, 0)
        groups = (form.group for form in map(self.form, heads) if form.bits in FITTED)
        return Form(4, next(groups, self.group or DEFAULT_GROUP))

    def hessians(self, program: Program, context: PassContext) -> dict[str, Tensor]:
        """Hessians of the inputs of heads by the path of their matrix: the mean where several heads share it. Empty
        where ``sequences`` is 0.

        Args:
            program: an annotated one, which computes the inputs.
            context: has the calibration set.
        """
        inputs: dict[str, set[str]] = {}
        for site in self.sites(program) if self.sequences else ():
            if site.is_linear:
                inputs.setdefault(site.path, set()).add(operands_of(site.node)[0].name)
        found = head_hessians(program, context, set().union(*inputs.values()), self.sequences) if inputs else {}
        return {path: torch.stack([found[name] for name in sorted(nodes)]).mean(0) for path, nodes in inputs.items()}

    def _quantize(
        self, program: Program, site: Site, matrix: Tensor, hessian: Tensor | None
    ) -> tuple[Node, dict[str, float]]:
        """Stores a site's form of its matrix.

        Returns:
            The node that unpacks it, in front of all others; and what the fit measured.
        """
        bits, group, columns = site.form.bits, site.form.group, matrix.shape[-1]
        measured: dict[str, float] = {}
        if bits == 8:
            rows, scale = quantize_rows(matrix)
            tensors, sizes, unpack = {"rows": rows, "row_scale": scale}, (), torch.ops.lbllm.unpack_rows.default
        elif bits == 4:
            if hessian is None:
                coded = quantize_int4(matrix, group)
            else:
                fitted = fit_int4(matrix, factor(hessian, group, self.damp), group)
                coded, measured["output_error"] = fitted.weight, fitted.relative_error
            tensors = dict(zip(CODED, (coded.packed, coded.table, coded.scale), strict=True))
            sizes, unpack = (columns, group), torch.ops.lbllm.unpack_int4.default
        else:
            inputs = torch.eye(columns) if hessian is None else hessian
            weight, error = fit_planes(matrix, factor(inputs, group, self.damp), group)
            if hessian is not None:
                measured["output_error"] = error
            tensors = {name: getattr(weight, name) for name in WEIGHT}
            sizes, unpack = (columns, group), torch.ops.lbllm.unpack_weight.default
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        for name, tensor in tensors.items():
            set_attribute(program.module, f"{site.path}.{name}", tensor)
        with program.graph.inserting_before(first):
            parts = [make_attribute(program.graph, f"{site.path}.{name}", site.node) for name in tensors]
            return make_call(program.graph, unpack, (*parts, *sizes), site.node), measured

    def _quantize_input(self, program: Program, node: Node, form: Form) -> None:
        info = node.meta[LINEAR]
        path, group = f"{info.path}.input_clip", info.scheme.act_group
        if form.group and group not in (None, 0, form.group):
            raise PassError(
                f"the input of {describe(node)} has groups of {group} in its scheme, which do not go with the"
                f" {form.group} of its {form.bits}-bit weights; use head{{group={group}}} or act-group=0"
            )
        set_attribute(program.module, path, torch.ones(2))
        with program.graph.inserting_before(node):
            clip = make_attribute(program.graph, path, node)
            hidden, _ = operands_of(node)
            arguments = (hidden, clip, 8, (form.group or self.group) if group is None else group)
            quantized = make_call(program.graph, torch.ops.lbllm.fake_quantize.default, arguments, node)
        set_argument(node, "input", quantized)


def outside_matrices(program: Program) -> dict[str, Tensor]:
    """All matrices of an annotated float program but those of the decoder layers' linears, by path, each once where
    several share their memory: of token embeddings, of other linears, and what stays float whatever is chosen, such as
    learned positions."""
    weights = [weight for _, weight in _token_embeddings(program)]
    weights += [operands_of(node)[1] for node, info in linears(program) if info.layer is None]
    found = {path: get_attribute(program.module, path) for path in _canonical_names(program, weights).values()}
    inside = {info.weight for _, info in linears(program) if info.layer is not None}
    known = [*found.values(), *(get_attribute(program.module, path) for path in inside)]
    for path, tensor in program.parameters():
        is_matrix = tensor.dim() == 2 and tensor.is_floating_point()
        if is_matrix and not any(same_storage(tensor, other) for other in known):
            found[path] = tensor
            known.append(tensor)
    return dict(sorted(found.items()))


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
