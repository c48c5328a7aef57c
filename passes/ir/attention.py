"""Attention in a graph: which calls compute it, and attention written out in operators made one call.

Many models compute attention step by step: a product of queries and keys, a scale, maybe a bound (soft cap) by a
hyperbolic tangent, masks and biases added or filled in, maybe a column of sinks, a softmax, a product with the values;
with heads as a dimension of their own or folded into the batch. :func:`join_attention` finds such chains and puts one
call in their place: torch's own operator where it can compute the attention, ``lbllm.attention`` where scores are
capped or sinks take a share.

Given::

    %turned = aten.transpose.int(%k, 2, 3)
    %product = aten.matmul(%q, %turned)
    %scaled = aten.mul.Tensor(%product, 0.25)
    %low = aten.div.Tensor(%scaled, 50.0)
    %bent = aten.tanh(%low)
    %capped = aten.mul.Tensor(%bent, 50.0)
    %scores = aten.add.Tensor(%capped, %mask)
    %shares = aten.softmax.int(%scores, -1)
    %y = aten.matmul(%shares, %v)

Result::

    %y = lbllm.attention(%q, %k, %v, %mask, 0.25, 50.0)

A chain of another kind stays as it is. One that is replaced has computed the same on the probe.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import operators as operators
from ...codegen.operators import Arguments, first_argument
from .program import Program, Runner, get_attribute
from .rewrite import Node, calls, is_call, is_node, make_call, moves, relax_views, swaps_last

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

ATTENTIONS = (_aten.scaled_dot_product_attention.default, _lbllm.attention.default)
"""The calls that compute attention over a whole sequence."""

MASKED = -1e4
"""A score with this or less added to it, or in its place, hides a key."""

TOLERANCE = 1e-4
"""Largest relative difference between attention written out and the call in its place."""

_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_SOFTMAXES = (_aten.softmax.int, _aten._softmax.default)
_CONVERSIONS = (_aten.to.dtype, _aten._to_copy.default, _aten.type_as.default)


class AttentionError(ValueError):
    """A chain that looks like attention and computes something else; ``node`` is its last product."""

    def __init__(self, node: fx.Node, difference: float):
        super().__init__(f"its attention differs from what it was found to be by {difference:.2g} on the probe")
        self.node = node


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one of :data:`ATTENTIONS`; ``mask`` is None where there is none."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float | None
    softcap: float = 0.0
    sinks: Node | None = None
    dropout: float = 0.0
    causal: bool = False
    grouped: bool = False

    @classmethod
    def of(cls, node: Node) -> AttentionCall:
        a = Arguments(node)
        if node.target is _lbllm.attention.default:
            return cls(a.query, a.key, a.value, a.mask, a.scale, a.softcap, a.sinks, grouped=True)
        flags = a.dropout_p, a.is_causal, a.enable_gqa
        return cls(a.query, a.key, a.value, a.attn_mask, a.scale, 0.0, None, *flags)

    @property
    def shifts(self) -> bool:
        """Whether the same number added to all scores of a query changes nothing."""
        return not self.softcap and self.sinks is None


@dataclass(frozen=True)
class _Step:
    """Something done to scores that a mask can do as well.

    Attributes:
        kind: ``add`` (an operand, times ``number``), ``scale`` (by ``number``), ``times`` (a stored mask of ones and
            zeros, which leaves what is shown as it is), ``hide`` and ``keep`` (``number`` where a condition holds, or
            where it does not).
        rank: dimensions of the scores: 4, or 3 where heads are part of the batch.
    """

    kind: str
    operand: Node | None
    number: float
    rank: int


@dataclass(frozen=True)
class _Scores:
    """Scores ``bound * tanh(scale * query @ keys)``, or ``scale * query @ keys`` where there is no bound, and steps."""

    query: Node
    keys: Node
    scale: float = 1.0
    bound: float | None = None
    steps: tuple[_Step, ...] = ()
    sinks: Node | None = None

    def scaled(self, factor: float, rank: int) -> _Scores:
        steps = (*self.steps, _Step("scale", None, factor, rank)) if self.steps else ()
        if self.bound is None:
            return dataclasses.replace(self, scale=self.scale * factor, steps=steps)
        return dataclasses.replace(self, bound=self.bound * factor, steps=steps)

    def after(self, kind: str, operand: Node, number: float, rank: int) -> _Scores:
        return dataclasses.replace(self, steps=(*self.steps, _Step(kind, operand, number, rank)))


def join_attention(program: Program, probe: Mapping[str, Any]) -> int:
    """Replaces attention that is written out in operators, in place.

    Args:
        program: a language model whose nodes have the shapes of capture (``meta["val"]``).
        probe: inputs on which both ways must agree.

    Returns:
        How many there were.

    Raises:
        AttentionError: a chain that looks like attention computes something else.
    """
    module, joined = program.module, {}
    for softmax in calls(program.graph, *_SOFTMAXES):
        found = _Finder(module).attention(softmax)
        if found is not None:
            product, result = found
            joined[product] = result
    if not joined:
        return 0
    comparison = _Comparison(module, {new.name: old.name for old, new in joined.items()})
    with torch.no_grad():
        comparison.run(*program.arguments(probe))
    for old, new in joined.items():
        difference = comparison.differences[old.name]
        if not difference <= TOLERANCE:
            raise AttentionError(old, difference)
        old.replace_all_uses_with(new)
        relax_views(new)
    program.graph.eliminate_dead_code()
    module.recompile()
    return len(joined)


class _Comparison(Runner):
    """Runs a graph that holds values twice and measures how far the second is from the first."""

    def __init__(self, module: fx.GraphModule, pairs: Mapping[str, str]):
        super().__init__(module)
        self._new, self._kept = set(pairs), {old: new for new, old in pairs.items()}
        self._values: dict[str, Tensor] = {}
        self.differences: dict[str, float] = {}

    def evaluate(self, n: fx.Node) -> Any:
        value = super().evaluate(n)
        if n.name in self._new:
            self._values[n.name] = value
        if n.name in self._kept:
            new = self._values.pop(self._kept[n.name])
            # A query that sees nothing may be anything, and then is in both.
            both = torch.isfinite(new) & torch.isfinite(value)
            alike = torch.equal(torch.isfinite(new), torch.isfinite(value)) and new.shape == value.shape
            norm = value[both].norm().clamp_min(1e-30)
            self.differences[n.name] = float((new - value)[both].norm() / norm) if alike else float("inf")
        return value


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if is_node(node) else None
    return value if isinstance(value, Tensor) else None


def _rank(node: Any) -> int:
    value = _value(node)
    return -1 if value is None else value.dim()


def _sizes(value: Tensor) -> list[str]:
    # Symbols are compared as text: comparing them as numbers would fix them to those of the example.
    return [str(size) for size in value.shape]


def _spreads(node: Any) -> bool:
    """Whether a node does what stands between a weight and its expansion over a batch."""
    return is_call(node, *_CONVERSIONS) or moves(node, "aliases", "copies", "reshapes", "repeats")


def _through(node: Node) -> Node | None:
    """What a node copies, or folds the leading dimensions of; None where it does something else."""
    if not _spreads(node):
        return None
    source = first_argument(node)
    before, after = _value(source), _value(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if not moves(node, "reshapes", "repeats"):
        return source
    old, new = _sizes(before), _sizes(after)
    same = old == new if moves(node, "repeats") else min(len(old), len(new)) > 2 and old[-2:] == new[-2:]
    return source if same else None


def _with_heads(node: Node | None) -> Node | None:
    """A value ``[B, H, ., .]`` that a node has as it is or with the first two dimensions folded into one."""
    while node is not None and _rank(node) != 4:
        node = _through(node)
    return node


def _is_part_of_weight(node: Any) -> bool:
    """Whether a node is a weight, or a slice of one."""
    while _spreads(node) or moves(node, "selects"):
        node = first_argument(node)
    return is_node(node) and node.op == "get_attr"


def _factors(product: Node) -> tuple[Node, Node]:
    """What a matrix product multiplies."""
    a = Arguments(product)
    return a.self, a.other if is_call(product, _aten.matmul.default) else a.mat2


class _Finder:
    """Recognizes attention around a softmax."""

    def __init__(self, module: fx.GraphModule):
        self.module, self.graph = module, module.graph

    def attention(self, softmax: Node) -> tuple[Node, Node] | None:
        """The product that ends the attention of a softmax, and the call, in front of it, that computes the same."""
        rank = _rank(softmax)
        if rank not in (3, 4) or Arguments(softmax).dim not in (-1, rank - 1):
            return None
        behind = self._behind(softmax)
        scores = self._scores(Arguments(softmax).self)
        if behind is None or scores is None:
            return None
        product, drops_last = behind
        query, value = _with_heads(scores.query), _with_heads(_factors(product)[1])
        if query is None or value is None or drops_last != (scores.sinks is not None):
            return None
        heads = _value(query).shape[1]  # type: ignore[union-attr]
        sinks = None if scores.sinks is None else self._per_head(scores.sinks, heads)
        if not isinstance(heads, int) or (scores.sinks is not None and sinks is None):
            return None
        scale = scores.scale * (1.0 if scores.bound is None else scores.bound)
        softcap = scores.bound or 0.0
        plain = not softcap and sinks is None
        if softcap < 0 or (not plain and not scores.steps):
            return None
        with self.graph.inserting_before(product):
            key = self._keys(scores.keys, product)
            if key is None:
                return None
            mask = self._mask(scores.steps, heads, product)
            if plain:
                result = make_call(self.graph, ATTENTIONS[0], (query, key, value, mask), product)
                result.kwargs = {"scale": scale}
            else:
                rest = (scale, softcap) if sinks is None else (scale, softcap, sinks)
                result = make_call(self.graph, ATTENTIONS[1], (query, key, value, mask, *rest), product)
            if _rank(product) == 3:
                result = self._folded(result, product)
        result.meta["val"] = product.meta["val"]
        return product, result

    def _behind(self, softmax: Node) -> tuple[Node, bool] | None:
        """The product with the values, and whether the last column of shares is dropped on the way."""
        node, drops_last = softmax, False
        while len(node.users) == 1:
            (user,) = node.users
            if is_call(user, *_PRODUCTS):
                left, right = _factors(user)
                return (user, drops_last) if left is node and right is not node else None
            if is_call(user, _aten.slice.Tensor) and Arguments(user).dim in (-1, _rank(node) - 1):
                ends = Arguments(user).pick("start", "end", "step")
                if drops_last or ends not in ([0, -1, 1], [None, -1, 1]):
                    return None
                drops_last = True
            elif _through(user) is not node:
                return None
            node = user
        return None

    def _scores(self, node: Any) -> _Scores | None:
        """What a node is as scores."""
        if not is_node(node) or node.op != "call_function":
            return None
        inner = _through(node)
        if inner is not None:
            return self._scores(inner)
        rank = _rank(node)
        if is_call(node, *_PRODUCTS):
            return _Scores(*_factors(node)) if rank in (3, 4) else None
        if is_call(node, _aten.baddbmm.default):
            a = Arguments(node)
            product = _Scores(a.batch1, a.batch2, float(a.alpha))
            return product.after("add", a.self, float(a.beta), rank) if a.beta else product
        if is_call(node, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar):
            return self._scaled(node, rank)
        if is_call(node, _aten.tanh.default):
            scores = self._scores(Arguments(node).self)
            fits = scores is not None and not scores.steps and scores.bound is None
            return dataclasses.replace(scores, bound=1.0) if scores is not None and fits else None
        if is_call(node, _aten.add.Tensor) and Arguments(node).alpha == 1:
            terms = Arguments(node).pick("self", "other")
            for one, other in (terms, terms[::-1]):
                scores = self._scores(one)
                if scores is not None and is_node(other) and scores.sinks is None:
                    return scores.after("add", other, 1.0, rank)
            return None
        if is_call(node, _aten.sub.Tensor) and Arguments(node).alpha == 1:
            of, maximum = Arguments(node).pick("self", "other")
            return self._scores(of) if self._is_maximum(maximum, of) else None
        if is_call(node, _aten.maximum.default, _aten.max.other):
            lowest = self._number(Arguments(node).other)
            return self._scores(Arguments(node).self) if lowest is not None and lowest <= MASKED else None
        if is_call(node, _aten.cat.default):
            return self._with_sinks(node, rank)
        return self._filled(node, rank)

    def _scaled(self, node: Node, rank: int) -> _Scores | None:
        divides = is_call(node, _aten.div.Tensor, _aten.div.Scalar)
        factors = Arguments(node).pick("self", "other")
        for one, other in (factors,) if divides else (factors, factors[::-1]):
            factor = self._number(other)
            scores = None if factor is None else self._scores(one)
            if factor and scores is not None and scores.sinks is None:
                return scores.scaled(1.0 / factor if divides else factor, rank)
        for one, other in () if divides else (factors, factors[::-1]):
            if _is_part_of_weight(other) and (scores := self._scores(one)) is not None and scores.sinks is None:
                return scores.after("times", other, 1.0, rank)
        return None

    def _filled(self, node: Node, rank: int) -> _Scores | None:
        """Scores of which some are replaced by a number that hides them."""
        if is_call(node, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor):
            (of, condition, given), kind = Arguments(node).pick("self", "mask", "value"), "hide"
        elif is_call(node, _aten.where.self, _aten.where.ScalarOther):
            (condition, of, given), kind = Arguments(node).pick("condition", "self", "other"), "keep"
            if self._scores(of) is None:
                of, given, kind = given, of, "hide"
        elif is_call(node, _aten.where.ScalarSelf):
            (condition, given, of), kind = Arguments(node).pick("condition", "self", "other"), "hide"
        else:
            return None
        number, scores = self._number(given), self._scores(of)
        if number is None or number > MASKED or scores is None or scores.sinks is not None:
            return None
        return scores.after(kind, condition, number, rank)

    def _with_sinks(self, node: Node, rank: int) -> _Scores | None:
        parts = Arguments(node).tensors
        if len(parts) != 2 or Arguments(node).dim not in (-1, rank - 1):
            return None
        scores = self._scores(parts[0])
        if scores is None or scores.sinks is not None or str(_value(parts[1]).shape[-1]) != "1":  # type: ignore[union-attr]
            return None
        return dataclasses.replace(scores, sinks=parts[1])

    def _is_maximum(self, node: Any, of: Node) -> bool:
        """Whether a node is the maximum of another over its last dimension, which a softmax does not notice."""
        last = (-1, _rank(of) - 1)
        if is_call(node, _aten.amax.default):
            most = Arguments(node)
            return most.self is of and len(most.dim) == 1 and most.dim[0] in last and most.keepdim
        if not is_call(node, operator.getitem) or Arguments(node).index != 0:
            return False
        if not is_call(Arguments(node).value, _aten.max.dim):
            return False
        most = Arguments(Arguments(node).value)
        return most.self is of and most.dim in last and most.keepdim

    def _number(self, value: Any) -> float | None:
        """A number, given as such or as a weight with one element."""
        while _spreads(value):
            value = first_argument(value)
        if is_node(value) and value.op == "get_attr":
            tensor = get_attribute(self.module, value.target)
            return float(tensor) if isinstance(tensor, Tensor) and tensor.numel() == 1 else None
        if is_call(value, _aten.scalar_tensor.default):
            value = Arguments(value).s
        elif is_call(value, _aten.full.default):
            value = Arguments(value).fill_value
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def _per_head(self, node: Node, heads: int) -> Node | None:
        """The weight ``[H]`` that a node spreads over batch and queries."""
        while _spreads(node):
            node = first_argument(node)
        value = _value(node)
        fits = node.op == "get_attr" and value is not None and _sizes(value) == [str(heads)]
        return node if fits else None

    def _keys(self, node: Node, like: Node) -> Node | None:
        """Keys ``[B, H, T, D]`` of a second operand ``[..., D, T]``."""
        current: Node | None = node
        while current is not None:
            if swaps_last(current):
                return _with_heads(Arguments(current).self)
            current = _through(current)
        other = _with_heads(node)
        if other is None:
            return None
        keys = make_call(self.graph, _aten.transpose.int, (other, 2, 3), like)
        keys.meta["val"] = other.meta["val"].transpose(2, 3)
        return keys

    def _mask(self, steps: tuple[_Step, ...], heads: int, like: Node) -> Node | None:
        """What steps after the scores add to them, float and of no more than four dimensions."""
        mask: Node | None = None
        for step in steps:
            operand = (
                step.operand if step.rank == 4 or step.operand is None else self._opened(step.operand, heads, like)
            )
            if step.kind == "scale":
                mask = make_call(self.graph, _aten.mul.Tensor, (mask, step.number), like)
            elif step.kind == "times":
                mask = mask and make_call(self.graph, _aten.mul.Tensor, (mask, operand), like)
            elif step.kind == "add":
                if step.number != 1.0:
                    operand = make_call(self.graph, _aten.mul.Tensor, (operand, step.number), like)
                mask = operand if mask is None else make_call(self.graph, _aten.add.Tensor, (mask, operand), like)
            else:
                shown = 0.0 if mask is None else mask
                hides = step.kind == "hide"
                pair = (step.number, shown) if hides else (shown, step.number)
                overload = _aten.where.ScalarSelf if hides else _aten.where.ScalarOther
                target = _aten.where.Scalar if mask is None else overload
                mask = make_call(self.graph, target, (operand, *pair), like)
        return mask

    def _opened(self, node: Node, heads: int, like: Node) -> Node:
        """What is added to scores ``[B * H, S, T]`` as what is added to ``[B, H, S, T]``."""
        value = _value(node)
        if value is None or value.dim() < 3 or str(value.shape[0]) == "1":
            return node
        found = _with_heads(node)
        if found is not None:
            return found
        sizes = [
            size if isinstance(size, int) else make_call(self.graph, _aten.sym_size.int, (node, dim), like)
            for dim, size in enumerate(value.shape)
            if dim > 0
        ]
        return make_call(self.graph, _aten.reshape.default, (node, [-1, heads, *sizes]), like)

    def _folded(self, node: Node, product: Node) -> Node:
        """``[B, H, S, D]`` as ``[B * H, S, D]``."""
        width = product.meta["val"].shape[-1]
        length = make_call(self.graph, _aten.sym_size.int, (node, 2), product)
        return make_call(self.graph, _aten.reshape.default, (node, [-1, length, width]), product)
