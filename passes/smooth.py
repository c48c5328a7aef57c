"""``smooth``: moves per-channel scales and offsets to where quantization does not see them; the float model stays the
same.

Four bits per activation leave fifteen steps for a group of channels, and one loud channel takes them all. Three
rewrites even channels out without a cost at run time:

* The input of a linear that a norm computes is divided by ``s``, channel by channel, in the norm's weight (and bias),
  and the linear's columns are multiplied by ``s`` (SmoothQuant, arXiv 2211.10438).
* The input of a linear that is a product with another linear's output, as in a gated MLP, is divided by ``s`` in that
  linear's rows.
* The mean key of every head is subtracted from all keys. Attention's softmax does not see it: every score of a query
  moves by the same amount (SageAttention, arXiv 2410.02367). It is measured behind the rotary embedding, where slow
  frequencies keep large constant parts.

``s`` is ``rms ** strength`` of the channel over the calibration set, scaled to a geometric mean of 1.

Given::

    %n = aten.mul.Tensor(%norm_weight, %x)
    %q = aten.linear(%n, %q_weight)
    %key = aten.transpose.int(%heads, 1, 2)  # model.layers.0.self_attn
    %out = aten.scaled_dot_product_attention(%query, %key, %value)

Result::

    %n = aten.mul.Tensor(%norm_weight, %x)  # norm_weight / s
    %q = aten.linear(%n, %q_weight)  # q_weight * s
    %key = aten.transpose.int(%heads, 1, 2)  # model.layers.0.self_attn
    %mean: f32[2, 1, 16] = weight model.layers.0.self_attn.key_mean
    %centered = aten.sub.Tensor(%key, %mean)
    %out = aten.scaled_dot_product_attention(%query, %centered, %value)

Inputs that no rewrite applies to stay as they are; the rows say which. Needs ``annotate``, before ``observe``, and
calibration batches. The result is what later passes imitate: their teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..codegen.operators import Arguments
from .annotate import decoder_linears
from .base import Contract, Pass, PassContext, PassError, PassResult, Positive, Share, bounded
from .calibrate.moments import measure
from .calibrate.precision import Precision
from .ir.annotations import LINEAR
from .ir.attention import ATTENTIONS, AttentionCall
from .ir.program import Program, get_attribute, set_attribute
from .ir.rewrite import UNPACKED, Node, ancestors, before_repeat, calls, is_call, make_attribute, make_call
from .ir.spool import spooled
from .observe import nothing_to_quantize

QUIET = 1e-3
"""Smallest rms of a channel that counts, relative to the site's mean: a dead channel must not get an endless scale."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Smooth(Pass):
    """Evens out the channels of activations and centers keys.

    Attributes:
        strength: 0 leaves the scales as they are; 1 makes all channels of an input equally loud.
        center_keys: subtract the mean key.
        sequences: calibration sequences to measure on, at most.
        precision: of the matrix products on the calibration set.
    """

    strength: Share = 0.25
    center_keys: bool = True
    sequences: Positive = 64
    precision: Precision = "auto"

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = bounded(1e-4)
    sets_teacher: ClassVar[bool] = True

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if not context.calibration:
            raise PassError("smooth needs calibration batches; give a calibration text")
        if calls(program.graph, torch.ops.lbllm.observe.default, *UNPACKED):
            raise PassError("the program is observed or quantized already; move 'smooth' in front of 'observe'")
        program = program.copy()
        graph = program.graph
        nothing_to_quantize(self.name, program, context)
        sites = decoder_linears(graph)
        folds = {source: _fold_of(program, source, linears) for source, linears in sites.items()}
        keys = _keys(graph) if self.center_keys and program.kind == "causal-lm" else {}
        wanted = {s.name: -1 for s, fold in folds.items() if isinstance(fold, Fold) and self.strength > 0}
        wanted |= {key.name: 1 for key in keys}
        statistics = measure(program, context, wanted, self.sequences, self.precision)
        rows: list[dict[str, Any]] = []
        for source, linears in sites.items():
            fold, row = folds[source], {"site": linears[0].meta[LINEAR].path}
            if isinstance(fold, Fold) and source.name in statistics:
                scale = _scale(statistics[source.name].square, self.strength)
                fold.apply(program.module, scale)
                for path in dict.fromkeys(n.meta[LINEAR].weight for n in linears):
                    set_attribute(program.module, path, spooled(get_attribute(program.module, path) * scale))
                rows.append({**row, "into": fold.name, "lowest": float(scale.min()), "highest": float(scale.max())})
            else:
                rows.append({**row, "left": fold if isinstance(fold, str) else "strength is 0"})
        centered = [key for key in keys if key.name in statistics]
        for key in centered:
            _center(program, key, keys[key], statistics[key.name].mean)
        program.module.recompile()
        smoothed = sum("into" in row for row in rows)
        return PassResult(program, rows, {"inputs": len(rows), "smoothed": smoothed, "centered_keys": len(centered)})


@dataclass(frozen=True)
class Fold:
    """Where the inverse scale of an input goes.

    Attributes:
        name: the weight it goes into, in words for the report.
        weights: ``get_attr`` nodes (or expressions over weights) to divide: of a norm ``[K]``, of a linear the rows.
    """

    name: str
    weights: tuple[Node, ...]

    def apply(self, module: fx.GraphModule, scale: Tensor) -> None:
        """Divides the weights by ``scale [K]``."""
        for node in self.weights:
            value = _value(module, node)
            path = next(n.target for n in ancestors(node) if n.op == "get_attr")
            set_attribute(module, path, spooled(value / (scale if value.dim() == 1 else scale.unsqueeze(-1))))
            if node.op != "get_attr":
                with node.graph.inserting_before(node):
                    node.replace_all_uses_with(make_attribute(node.graph, path, node))
                node.graph.eliminate_dead_code()


def _fold_of(program: Program, source: Node, linears: Sequence[Node]) -> Fold | str:
    """Where the input's inverse scale can go, or why nowhere."""
    channels = get_attribute(program.module, linears[0].meta[LINEAR].weight).shape[-1]
    if set(source.users) != set(linears):
        return "also read by something that is not quantized"
    while is_call(source, _aten.view.default, _aten.reshape.default) and len(Arguments(source).self.users) == 1:
        source = Arguments(source).self
    if is_call(source, _aten.layer_norm.default) and Arguments(source).weight is not None:
        weights = tuple(w for w in Arguments(source).pick("weight", "bias") if w is not None)
        return _owned(program, weights, channels) or "other values use the norm's weight"
    if is_call(source, _aten.mul.Tensor):
        factors = Arguments(source).pick("self", "other")
        for operand, other in (factors, factors[::-1]):
            if _is_weight(operand) and isinstance(other, fx.Node):
                return _owned(program, (operand,), channels) or "other values use the norm's weight"
        for operand in factors:
            if is_call(operand, _aten.linear.default) and LINEAR in operand.meta and len(operand.users) == 1:
                weights = tuple(w for w in Arguments(operand).pick("weight", "bias") if w is not None)
                return _owned(program, weights, channels) or "other values use the weight of the linear in front"
    return "neither a norm nor a product with a linear computes it"


def _owned(program: Program, weights: Sequence[Node], channels: int) -> Fold | None:
    """A fold into weights that nothing else reads, with a value or a row for every channel."""
    graph = program.graph
    for weight in weights:
        if _value(program.module, weight).shape[0] != channels:
            return None
        paths = {n.target for n in ancestors(weight) if n.op == "get_attr"}
        readers = [u for n in graph.nodes if n.op == "get_attr" and n.target in paths for u in n.users]
        if len(paths) != 1 or len(readers) != 1 or len(weight.users) != 1:
            return None
    first = next(n.target for n in ancestors(weights[0]) if n.op == "get_attr")
    return Fold(first, tuple(weights))


def _is_weight(value: Any) -> bool:
    """Whether a node is one weight, or arithmetic on one weight and numbers (Gemma's norms use ``1 + weight``)."""
    if not isinstance(value, fx.Node):
        return False
    found = ancestors(value)
    weights = [n for n in found if n.op == "get_attr"]
    return len(weights) == 1 and all(
        n.op == "get_attr" or is_call(n, _aten.add.Tensor, _aten.to.dtype, _aten._to_copy.default) for n in found
    )


def _value(module: fx.GraphModule, node: Node) -> Tensor:
    """The value of an expression over weights."""
    if node.op == "get_attr":
        return get_attribute(module, node.target)
    args = fx.node.map_arg(node.args, lambda n: _value(module, n))
    return node.target(*args, **node.kwargs)


def _scale(square: Tensor, strength: float) -> Tensor:
    """``rms ** strength`` with a geometric mean of 1, from mean squares ``[K]``."""
    rms = square.sqrt()
    scale = rms.clamp_min(QUIET * float(rms.mean().clamp_min(1e-30))).pow(strength)
    return scale / scale.log().mean().exp()


def _keys(graph: fx.Graph) -> dict[Node, list[Node]]:
    """Keys before they are repeated for grouped queries, and the nodes on the way to attention that read them.

    Where scores are capped or compared with sinks, what centered keys take from all of a query's scores would count.
    """
    found: dict[Node, list[Node]] = {}
    for attention in calls(graph, *ATTENTIONS):
        call = AttentionCall.of(attention)
        if not call.shifts:
            continue
        user, source = before_repeat(attention, call.key)
        if user not in found.setdefault(source, []):
            found[source].append(user)
    return found


def _center(program: Program, key: Node, users: Sequence[Node], mean: Tensor) -> None:
    """Subtracts the mean ``[H, D]`` from keys ``[B, H, S, D]``."""
    graph = program.graph
    layer = next((p for p, _ in reversed(list(key.meta.get("nn_module_stack", {}).values()))), key.name)
    path = f"{layer}.key_mean"
    set_attribute(program.module, path, mean.unsqueeze(1).contiguous())
    with graph.inserting_after(key):
        attribute = make_attribute(graph, path, key)
    with graph.inserting_after(attribute):
        centered = make_call(graph, _aten.sub.Tensor, (key, attribute), key)
    for user in users:
        user.replace_input_with(key, centered)
