"""``merge``: linears that read the same quantized input become one linear with concatenated rows.

q, k and v projections (and gate and up) each read the same activations. One kernel launch over the stacked rows
replaces two or three, and at batch size 1 the launch is a good part of the time. The stacking is written into the graph
as ``aten.cat`` over the original weights, so stored weights keep their own module paths; the executor packs the
concatenation once, when a model is loaded.

Given::

    %q_weight = lbllm.unpack_weight(%q_sign, %q_bitmap, %q_levels, %q_scale, 64, 32)
    %q = aten.linear(%xq, %q_weight)
    %k_weight = lbllm.unpack_weight(%k_sign, %k_bitmap, %k_levels, %k_scale, 64, 32)
    %k = aten.linear(%xq, %k_weight)

Result::

    %sign = aten.cat([%q_sign, %k_sign])
    %bitmap = aten.cat([%q_bitmap, %k_bitmap])
    %levels = aten.cat([%q_levels, %k_levels])
    %scale = aten.cat([%q_scale, %k_scale])
    %weight = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 64, 32)
    %both = aten.linear(%xq, %weight)
    %split = aten.split_with_sizes(%both, [64, 32], -1)
    %q = getitem(%split, 0)
    %k = getitem(%split, 1)

4-bit codes and their scales are stacked in the same way; linears of codes must have one table of levels, as ``ptq``
gives those that it fits together, and that of the first one is read for all.

Linears merge when they share the input node and the scheme, and all or none of them have a bias. Every
output is the same sum as before, to the bit once it is computed in integers, and up to fp32 rounding in the simulation:
each is held against the linear it replaces, on the input that has on the probe. What reads an output now reads a slice
of a wider tensor, and torch may sum a strided tensor (a norm over queries, say) in another order than a dense one:
hence a bound for the whole program instead of ``exact``, wide enough for the moved 4-bit codes that such a difference
can bring about. Needs ``ptq``; put before ``lower``.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..codegen import operators as operators
from ..codegen.operators import Arguments
from ..codegen.operators.lbllm.linears import INT4_WEIGHT, WEIGHT
from .annotate import completed
from .base import Contract, Pass, PassContext, PassResult, bounded
from .contracts import check_replaced
from .ir.annotations import LINEAR
from .ir.program import LAYER, Program, get_attribute
from .ir.rewrite import Node, bias_of, calls, is_call, make_attribute, make_call, operands_of, relax_views
from .ir.scheme import Scheme

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

_STACKED: dict[Any, tuple[str, ...]] = {
    _lbllm.unpack_weight.default: WEIGHT,
    _lbllm.unpack_int4.default: INT4_WEIGHT,
}
"""Simulated weights that can be stacked, and the arguments that hold them."""


@dataclass(frozen=True)
class Merge(Pass):
    """Merges quantized linears that share their input."""

    name: ClassVar[str] = "merge"
    contract: ClassVar[Contract] = bounded(0.5, each=1e-5)  # sums may be taken in another order

    def apply(self, program: Program, context: PassContext) -> PassResult:
        apart, program = program, program.copy()
        rows = []
        replaced: dict[str, Node] = {}
        for linears in _mergeable(program):
            rows.append({"layer": linears[0].meta.get(LAYER), "merged": [_label(n) for n in linears]})
            replaced |= _merge(program, linears)
        program.graph.eliminate_dead_code()
        program.graph.lint()
        program.module.recompile()
        worst = check_replaced(apart, program, replaced, context.probe, self.contract.each)
        merged = sum(len(r["merged"]) for r in rows)
        return PassResult(program, rows, {"linears": merged, "into": len(rows), "worst_linear_error": worst})


def _mergeable(program: Program) -> list[list[Node]]:
    """Sets of two or more linears that can become one, each in graph order."""
    quantized = [node for node in calls(program.graph, _aten.linear.default) if _is_quantized(node)]
    alike = joined_linears(quantized, completed)
    return [s for each in alike for s in _with_one_table(program, each) if len(s) > 1]


def _is_quantized(linear: Node) -> bool:
    x, weight = operands_of(linear)
    return is_call(x, _lbllm.fake_quantize.default) and is_call(weight, *_STACKED)


def _with_one_table(program: Program, linears: Sequence[Node]) -> list[list[Node]]:
    """Linears of one scheme in sets whose codes stand for the same levels; planes have no table."""
    sets: dict[tuple[int, ...], list[Node]] = defaultdict(list)
    for node in linears:
        weight = operands_of(node)[1]
        coded = is_call(weight, _lbllm.unpack_int4.default)
        table = get_attribute(program.module, Arguments(weight).table.target).tolist() if coded else ()
        sets[tuple(table)].append(node)
    return list(sets.values())


def joined_linears(linears: Iterable[Node], scheme_of: Callable[[Node], Scheme]) -> list[list[Node]]:
    """Linears in the sets that become one, each in graph order; stacked experts stay alone.

    Args:
        linears: that are quantized, or will be.
        scheme_of: gives the scheme of one, complete.
    """
    sets: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    for node in linears:
        alone = None if is_call(node, _aten.linear.default) else node
        sets[alone, operands_of(node)[0], scheme_of(node), bias_of(node) is not None].append(node)
    return list(sets.values())


def _merge(program: Program, linears: Sequence[Node]) -> dict[str, Node]:
    """Merges linears; returns what takes the place of each, by its name."""
    graph, first = program.graph, linears[0]
    x, _ = operands_of(first)
    weights = [Arguments(operands_of(n)[1]) for n in linears]
    unpack = operands_of(first)[1].target
    names = _STACKED[unpack]
    sizes = [get_attribute(program.module, getattr(w, names[0]).target).shape[0] for w in weights]

    def stack(attributes: Sequence[Node]) -> Node:
        parts = [make_attribute(graph, a.target, first) for a in attributes]
        return make_call(graph, _aten.cat.default, (parts,), first)

    with graph.inserting_before(first):
        stored = [
            make_attribute(graph, weights[0].table.target, first)
            if name == "table"
            else stack([getattr(w, name) for w in weights])
            for name in names
        ]
        unpacked = (*stored, *weights[0].pick("in_features", "group"))
        matrix = make_call(graph, unpack, unpacked, first)
        bias = None if bias_of(first) is None else stack([bias_of(n) for n in linears])
        arguments = (x, matrix) if bias is None else (x, matrix, bias)
        both = make_call(graph, _aten.linear.default, arguments, first, _merged_meta(linears))
        split = make_call(graph, _aten.split_with_sizes.default, (both, sizes, -1), first)
        parts = [make_call(graph, operator.getitem, (split, i), n) for i, n in enumerate(linears)]
    for node, part in zip(linears, parts, strict=True):
        part.meta = {k: v for k, v in node.meta.items() if k != LINEAR}
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        relax_views(part)
    return {node.name: part for node, part in zip(linears, parts, strict=True)}


def _merged_meta(linears: Sequence[Node]) -> dict[str, object]:
    """The first linear's facts under a path that names all of them: ``layers.0.self_attn.q_proj+k_proj+v_proj``."""
    infos = [n.meta.get(LINEAR) for n in linears]
    if any(i is None for i in infos):
        return {}
    names = [infos[0].path, *(i.path.rpartition(".")[2] for i in infos[1:])]
    return {LINEAR: replace(infos[0], path="+".join(names), scheme=completed(linears[0]))}


def _label(linear: Node) -> str:
    info = linear.meta.get(LINEAR)
    return info.path if info is not None else linear.name
