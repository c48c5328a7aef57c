"""``lower``: simulated linears become integer operators, the ones that generated kernels implement.

Up to here a quantized linear is float arithmetic over values that happen to lie on a grid. After this pass it is what
runs: activations become integers with scales once per distinct input, and every linear consumes them with its packed
planes. The integer part is exact on every target; only the fp32 sum over groups is rounded, in one fixed order.

Given::

    %xq = lbllm.fake_quantize(%x, %clip, 4, 64)
    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)
    %y = aten.linear(%xq, %w, %bias)

Result::

    %quantized = lbllm.quantize_activation(%x, %clip, 4, 64)
    %values = getitem(%quantized, 0)
    %x_scale = getitem(%quantized, 1)
    %y = lbllm.bit_linear(%values, %x_scale, %sign, %bitmap, %levels, %scale, %bias, 64)

Likewise ``lbllm.grouped_linear`` (stacked experts) becomes ``lbllm.grouped_bit_linear``, and linears and look-ups over
``lbllm.unpack_rows`` become ``lbllm.int8_linear`` and ``lbllm.int8_embedding``, those over ``lbllm.unpack_int4`` become
``lbllm.int4_linear`` and ``lbllm.int4_embedding``. Linears and experts that ``annotate`` kept float stay the operators
they are.

Needs ``ptq`` and ``activate``: a decoder linear that is not quantized, or whose input is not, is an error, as is a
leftover observer.

What is checked: the whole program, run in integer arithmetic before and after (:mod:`.ir.exact`), must not change by a
bit. And every lowered linear, on the input that its simulated one got on the probe, must give the float result up to
fp32 rounding (1e-4), so that what the stages trained is what runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..codegen import levels as level_rules
from ..codegen import operators as operators
from ..codegen import reference
from ..codegen.errors import FormatError
from ..codegen.format import Int4Weight, QuantizedWeight
from ..codegen.operators import Arguments
from ..codegen.operators.arguments import parameters
from ..codegen.operators.lbllm.linears import INT4_WEIGHT, WEIGHT, WEIGHTS
from .annotate import completed
from .base import EXACT, Contract, Pass, PassContext, PassError, PassResult
from .contracts import describe
from .ir.annotations import LINEAR, linears
from .ir.program import IN_FEATURES, Program, Runner, get_attribute
from .ir.rewrite import (
    LINEARS,
    UNPACKED,
    Node,
    bias_of,
    calls,
    calls_of_role,
    computed,
    constant,
    is_call,
    is_stored,
    make_call,
    operands_of,
    quantizer_arguments,
    replace_call,
)
from .outliers import ORDER

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

_EMBEDDINGS = {
    _lbllm.unpack_rows.default: (_lbllm.int8_embedding.default, ("weight", "scale"), ()),
    _lbllm.unpack_int4.default: (_lbllm.int4_embedding.default, INT4_WEIGHT, ("in_features", "group")),
}
"""What look-ups in simulated matrices become, and the arguments of these that are before the indices and behind."""

_STORED_IN: dict[Any, tuple[str, ...]] = {
    **{target: names for target, (_, names) in WEIGHTS.items()},
    _lbllm.int8_embedding.default: ("weight", "scale"),
    _lbllm.int4_embedding.default: INT4_WEIGHT,
    _lbllm.quantize_activation.default: ("clip", "knees", "plane_scales"),
    _aten.index_select.default: ("index",),
}
"""Arguments of lowered operators that are tensors which passes made."""

_CHECKED_ROWS = 4
"""Tokens of the probe on which linears are compared."""

_LINEAR_BOUND = 1e-4
"""Largest relative error between a simulated linear and its integer form on the same input."""


@dataclass(frozen=True)
class Lower(Pass):
    """Replaces simulated quantization by integer operators.

    Attributes:
        target: what kernels will be generated for, e.g. ``cpu`` or ``cuda:sm_80``; empty for the compile's target. The
            graph is the same for every target; the program's metadata remembers it.
    """

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = EXACT

    target: str = ""

    def apply(self, program: Program, context: PassContext) -> PassResult:
        simulated, program = program, program.copy()
        graph = program.graph
        if calls_of_role(graph, "integer"):
            raise PassError("the graph has integer operators already; run 'lower' once")
        _check_quantized(graph)
        counts: dict[str, int] = {}
        lowered: dict[str, Node] = {}
        for node in calls(graph, _aten.embedding.default):
            lookup = Arguments(node)
            if is_call(lookup.weight, *_EMBEDDINGS):
                target, names, sizes = _EMBEDDINGS[lookup.weight.target]
                table = Arguments(lookup.weight)
                replace_call(node, target, (*table.pick(*names), lookup.indices, *table.pick(*sizes)))
                counts[target._opname] = counts.get(target._opname, 0) + 1
        for quantizer in calls(graph, _lbllm.fake_quantize.default):
            _lower_input(program, quantizer, counts, lowered)
        graph.eliminate_dead_code()
        leftover = calls_of_role(graph, "simulates")
        if leftover:
            raise PassError(f"{describe(leftover[0])} has no integer form; remove the pass that made it")
        for node, info in linears(program):
            node.meta[LINEAR] = replace(info, scheme=completed(node))
        graph.lint()
        program.module.recompile()
        error = _check_linears(simulated, program, lowered, context.probe)
        result = program.with_module(program.module, target=self.target or context.target)
        return PassResult(result, summary={**counts, "worst_linear_error": error})


def _check_quantized(graph: fx.Graph) -> None:
    """Refuses observers and decoder linears that are not fully quantized."""
    for node in calls(graph, _lbllm.observe.default):
        raise PassError(f"the observer {describe(node)} is still in the graph; put 'ptq' between 'observe' and 'lower'")
    for node in calls(graph, *LINEARS):
        x, weight = operands_of(node)
        quantized = is_call(weight, *UNPACKED)
        info = node.meta.get(LINEAR)
        if not quantized and info is not None and info.role == "decoder":
            raise PassError(f"the weight of {describe(node)} is not quantized; put 'ptq' before 'lower'")
        if quantized and not is_call(x, _lbllm.fake_quantize.default):
            raise PassError(f"the input of {describe(node)} is not quantized; put 'activate' before 'lower'")


def _lower_input(program: Program, quantizer: Node, counts: dict[str, int], lowered: dict[str, Node]) -> None:
    """Lowers one simulated activation quantizer and every linear that reads it; notes the new node by the old name."""
    graph = program.graph
    group, given = Arguments(quantizer).group, quantizer_arguments(quantizer)
    with graph.inserting_before(quantizer):
        pair = make_call(graph, _lbllm.quantize_activation.default, given, quantizer)
        values = make_call(graph, operator.getitem, (pair, 0), quantizer)
        scale = make_call(graph, operator.getitem, (pair, 1), quantizer)
    counts["quantize_activation"] = counts.get("quantize_activation", 0) + 1
    for linear in list(quantizer.users):
        target, arguments = _integer_form(linear, quantizer, group)
        in_features = _in_features(program, operands_of(linear)[1])
        counts[target._opname] = counts.get(target._opname, 0) + 1
        name = linear.name
        new = lowered[name] = replace_call(linear, target, (values, scale, *arguments))
        new.meta[IN_FEATURES] = pair.meta[IN_FEATURES] = in_features
        dtype = new.meta["val"].dtype if "val" in new.meta else torch.float32
        if dtype != torch.float32:
            with graph.inserting_after(new):
                cast = make_call(graph, _aten.to.dtype, (new, dtype), new)
            new.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)


def _in_features(program: Program, weight: Node) -> int:
    """``K`` of an unpacked weight."""
    if is_call(weight, _lbllm.unpack_rows.default):
        return get_attribute(program.module, Arguments(weight).weight.target).shape[1]
    return Arguments(weight).in_features


def _integer_form(linear: Node, quantizer: Node, group: int) -> tuple[torch._ops.OpOverload, tuple[object, ...]]:
    """The integer operator for one user of a quantizer, and its arguments behind values and scale.

    Raises:
        PassError: the user is not a quantized linear, or the groups of input and weight disagree.
    """
    is_linear = is_call(linear, *LINEARS)
    if not is_linear or operands_of(linear)[0] is not quantizer:
        raise PassError(f"{describe(linear)} reads a quantized input but is not a quantized linear")
    weight = operands_of(linear)[1]
    if is_call(weight, _lbllm.unpack_rows.default):
        return _lbllm.int8_linear.default, (*Arguments(weight).pick("weight", "scale"), bias_of(linear), group)
    if not is_call(weight, *UNPACKED):
        raise PassError(f"the weight of {describe(linear)} is not quantized but its input is; put 'ptq' before 'lower'")
    weight_group = Arguments(weight).group
    if group and weight_group % group:
        raise PassError(
            f"the input of {describe(linear)} has groups of {group}, which are no parts of its weight's of"
            f" {weight_group}; use activate{{group={weight_group}}} or activate{{group=0}}"
        )
    if is_call(weight, _lbllm.unpack_int4.default):
        return _lbllm.int4_linear.default, (*Arguments(weight).pick(*INT4_WEIGHT), bias_of(linear), weight_group)
    planes = Arguments(weight).pick(*WEIGHT)
    if linear.target is _lbllm.grouped_linear.default:
        return _lbllm.grouped_bit_linear.default, (*planes, Arguments(linear).offsets, weight_group)
    return _lbllm.bit_linear.default, (*planes, bias_of(linear), weight_group)


class _Comparison(Runner):
    """Runs a simulated program and gives each lowered linear the same input as its simulated one."""

    def __init__(self, simulated: Program, program: Program, lowered: Mapping[str, Node]):
        super().__init__(simulated.module)
        self.program, self.lowered = program, lowered
        self.worst = 0.0
        self.inputs: dict[Node, tuple[Tensor, Tensor]] = {}

    def evaluate(self, n: Node) -> Any:
        result = super().evaluate(n)
        if is_call(n, _lbllm.fake_quantize.default):
            given = computed(n, self.env)
            rows = given.x.reshape(-1, given.x.shape[-1])[:_CHECKED_ROWS].float()
            options = given.pick("clip", "bits", "group", "knees", "plane_scales")
            self.inputs[n] = reference.quantize_activation(rows, *options)
        elif n.name in self.lowered:
            self._compare(n, result)
        return result

    def _compare(self, n: Node, simulated: Tensor) -> None:
        new = self.lowered[n.name]
        values, scale = self.inputs[operands_of(n)[0]]
        given: dict[str, Any] = {"values": values, "x_scale": scale}
        if new.target is _lbllm.grouped_bit_linear.default:
            given["offsets"] = self.env[Arguments(n).offsets].clamp_max(len(values))
        read = Arguments(new, lambda value: constant(self.program.module, value))
        output = new.target(*(given[name] if name in given else getattr(read, name) for name in parameters(new.target)))
        expected = simulated.reshape(-1, simulated.shape[-1])[: len(values)].float()
        error = float((output - expected).norm() / expected.norm().clamp_min(1e-30))
        if not error <= _LINEAR_BOUND:
            raise PassError(
                f"the integer form of {describe(n)} differs from its simulation by {error:.2g} on the same input;"
                " report this"
            )
        self.worst = max(self.worst, error)


def _check_linears(
    simulated: Program, program: Program, lowered: Mapping[str, Node], probe: Mapping[str, Any]
) -> float:
    """Compares every lowered linear with its simulated one on the probe; returns the largest relative error."""
    if not probe or not lowered:
        return 0.0
    comparison = _Comparison(simulated, program, lowered)
    with torch.no_grad():
        comparison.run(*simulated.arguments(probe))
    return comparison.worst


def stored_weights(program: Program) -> dict[str, QuantizedWeight]:
    """Every W(1+1) matrix of a lowered program under its original path, e.g. ``model.layers.0.mlp.up_proj.weight``.

    Raises:
        FormatError: a matrix is computed, or its size is not known; naming the linear.
    """
    found: dict[str, QuantizedWeight] = {}
    for node, path, parts in _stored_parts(program):
        if IN_FEATURES not in node.meta:
            raise FormatError(f"{describe(node)} does not say how many columns its weight has")
        tensors: list[Any] = [get_attribute(program.module, n.target) for n in parts]
        found[path] = QuantizedWeight(*tensors, in_features=node.meta[IN_FEATURES], group=Arguments(node).group)
    return found


def planes_of_heads(program: Program) -> set[str]:
    """Paths of the W(1+1) matrices of a lowered program that output heads read; the others are of decoder layers."""
    found = _stored_parts(program)
    return {path for node, path, _ in found if LINEAR in node.meta and node.meta[LINEAR].role == "head"}


def stored_int4(program: Program) -> dict[str, Int4Weight]:
    """Every 4-bit matrix of a lowered program under its original path, e.g. ``lm_head.weight``; those of merged linears
    have one table.

    Raises:
        FormatError: a matrix is computed, or its size is not known; naming the node that reads it.
    """
    found: dict[str, Int4Weight] = {}
    for node in calls(program.graph, _lbllm.int4_embedding.default, _lbllm.int4_linear.default):
        a = Arguments(node)
        in_features = node.meta.get(IN_FEATURES) if node.target is _lbllm.int4_linear.default else a.in_features
        if in_features is None:
            raise FormatError(f"{describe(node)} does not say how many columns its weight has")
        for parts in _merged_parts(node, INT4_WEIGHT, ("table",)):
            tensors = (get_attribute(program.module, part.target) for part in parts)
            found[parts[0].target.removesuffix(".codes")] = Int4Weight(*tensors, in_features=in_features, group=a.group)
    return found


def coded_linears(program: Program) -> set[str]:
    """Paths of the 4-bit matrices of a lowered program that linears of decoder layers read; the others are of heads and
    embeddings."""
    found = calls(program.graph, _lbllm.int4_linear.default)
    return {
        parts[0].target.removesuffix(".codes")
        for node in found
        if LINEAR in node.meta and node.meta[LINEAR].role == "decoder"
        for parts in _merged_parts(node, INT4_WEIGHT, ("table",))
    }


def readers(program: Program) -> dict[str, list[tuple[Node, str]]]:
    """What reads each stored tensor of a lowered program, by its path: operators, with the names of their arguments.

    Those of merged linears read what is concatenated for them. Only what passes made is told: what this package's
    operators read, and the orders of ``outliers``.
    """
    found: dict[str, list[tuple[Node, str]]] = {}
    for node in program.graph.nodes:
        if not is_call(node, *_STORED_IN):
            continue
        for name in _STORED_IN[node.target]:
            value = getattr(Arguments(node), name)
            for part in Arguments(value).tensors if is_call(value, _aten.cat.default) else [value]:
                if not isinstance(part, fx.Node) or part.op != "get_attr":
                    continue
                if name != "index" or str(part.target).endswith(f".{ORDER}"):
                    found.setdefault(str(part.target), []).append((node, name))
    return found


def check_weights(program: Program) -> None:
    """Checks every W(1+1) and 4-bit matrix of a lowered program against the format and its scheme's level rule.

    Raises:
        FormatError: naming the weight and what it breaks.
    """
    weights = stored_weights(program)
    for node, path, _ in _stored_parts(program):
        weights[path].validate(path)
        info = node.meta.get(LINEAR)
        if info is not None:
            level_rules.get(info.scheme.levels).check(weights[path].levels, path)
    for path, weight in stored_int4(program).items():
        weight.validate(path)


def _stored_parts(program: Program) -> Iterator[tuple[Node, str, tuple[Node, ...]]]:
    """A lowered linear, the path of its matrix and the ``get_attr`` nodes of its tensors, for each that was merged.

    Raises:
        FormatError: they are no such nodes, or not as many of each tensor.
    """
    for node in calls(program.graph, _lbllm.bit_linear.default, _lbllm.grouped_bit_linear.default):
        for parts in _merged_parts(node, WEIGHT):
            yield node, parts[0].target.removesuffix(".sign"), parts


def _merged_parts(node: Node, names: Sequence[str], shared: Sequence[str] = ()) -> Iterator[tuple[Node, ...]]:
    """The ``get_attr`` nodes of a call's stored matrices, one of each argument for each matrix that was merged.

    Args:
        names: of the arguments that hold them.
        shared: those of which there is one for all.

    Raises:
        FormatError: they are no such nodes, or not as many of each tensor.
    """
    given = [(name, getattr(Arguments(node), name)) for name in names]
    columns = [
        Arguments(a).tensors if is_call(a, _aten.cat.default) and name not in shared else [a] for name, a in given
    ]
    stored = all(isinstance(column, (list, tuple)) and all(map(is_stored, column)) for column in columns)
    counts = {len(column) for name, column in zip(names, columns, strict=True) if name not in shared} if stored else {}
    if len(counts) != 1:
        raise FormatError(f"the weights of {describe(node)} are not stored matrices")
    (count,) = counts
    rows = [list(c) * count if name in shared else c for name, c in zip(names, columns, strict=True)]
    yield from zip(*rows, strict=True)
