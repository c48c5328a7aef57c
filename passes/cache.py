"""``cache``: attention gets an explicit, quantized KV state, so that the graph can decode token by token.

A captured graph computes attention over one whole sequence. This pass replaces every scaled dot-product attention, with
the grouped-query repeat and the simulated KV quantization in front of it, by ``lbllm.cached_attention``, which appends
new keys and values to a state and attends over all of it. The graph then serves a prefill (``past = 0``) and every
decode step (``S`` new tokens behind ``past`` old ones, ``attention_mask [B, past + S]``).

Given::

    %mask = aten.__and__.Tensor(%causal, %attended)
    %kq = lbllm.fake_quantize_kv(%k, 4)
    %vq = lbllm.fake_quantize_kv(%v, 4)
    %y = aten.scaled_dot_product_attention(%q, %kq, %vq, %mask, scale=0.125)

Result::

    %past = input past
    %key_codes = state kv_0_key_codes {kind="per_token", heads=2, tail=(32,), dtype=torch.uint8}
    %key_params = state kv_0_key_params {kind="per_token", heads=2, tail=(2,), dtype=torch.float16}
    %value_codes = state kv_0_value_codes {kind="per_token", heads=2, tail=(32,), dtype=torch.uint8}
    %value_params = state kv_0_value_params {kind="per_token", heads=2, tail=(2,), dtype=torch.float16}
    %y = lbllm.cached_attention(%q, %k, %v, %key_codes, %key_params, %value_codes, %value_params,
                                %attention_mask, %past, 0.125, 0, 4)

The operator has its own mask: causal, a sliding window, chunks, padding, and a bias that grows with the distance
(ALiBi). So what the graph's mask *means* must be known, and it
is not guessed from its shape in the graph: the mask's sub-graph is evaluated on probe inputs (several batch sizes,
lengths and paddings, lengths beyond every integer that occurs in it) and must equal one of the masks the operator can
make, at every query that is not padding. Anything else is refused. The repeat is proved the same way; where heads are
repeated in another order, the state keeps them repeated, and that is said.

A short causal convolution over the sequence (LFM2's) gets a state as well, of a fixed size: its last inputs (see
:mod:`.ir.convolution`). That nothing else passes from token to token, such as a recurrence, is tried on the probe: a
token decoded behind the others must get the values it has within its sequence (:mod:`.ir.decoding`).

Sizes and positions: what the graph reads from ``attention_mask``'s length outside masks becomes ``input_ids``' length.
Positions that it counts itself, up to that length, go on behind the past ones (there a padding token has a position as
well); so do rows that it takes from the front of a stored table. A plain module (``kind="module"``) stays as it is.

Runs on lowered and simulated graphs alike; the probe batch of the context gives head sizes. Outputs stay bit-equal
where torch computes attention the same way; where it rounds otherwise, low-bit activations spread that through a deep
model (see ``lower``), so the contract's bound only catches wreckage. What is held to a narrow one is every attention by
itself, against the one it replaces, on the inputs that has on the probe. Where the graph simulates no bits of keys and
values, this is where they are rounded first, and the bound is that of their bits; the summary tells which one held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..codegen import operators as operators
from ..codegen import reference
from ..codegen.operators import Arguments, first_argument, set_argument
from ..codegen.progress import warn
from .base import Contract, Pass, PassContext, PassError, PassResult, bounded
from .contracts import check_replaced, describe
from .ir.attention import ATTENTIONS, MASKED, AttentionCall
from .ir.convolution import cache_convolutions
from .ir.decoding import step_errors
from .ir.program import LAYER, STATE, Program, StateSpec, get_attribute, set_attribute
from .ir.rewrite import (
    INTEGER_LINEARS,
    LINEARS,
    REPEAT,
    Node,
    ancestors,
    calls,
    calls_of_role,
    is_call,
    is_constant,
    is_node,
    make_attribute,
    make_call,
    moves,
    relax_views,
    replace_call,
)

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

_DIRECT_WINDOW = 4096
"""Windows up to here are probed with sequences longer than the window; larger ones by substituting a small one."""

_PROBES = ((1, 1), (1, 6), (2, 7), (3, 12), (2, 23))
"""Batch sizes and lengths at which every mask is evaluated."""

_RANGES = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)

_LONG = 521
"""Length at which a bias is evaluated, too: one that is rounded to fewer bits bends before."""


@dataclass(frozen=True)
class _Alibi:
    """A bias that grows with the distance: slopes ``[H]``, and what a place is (``reference.attention_places``)."""

    slopes: Tensor
    counted: bool


_ROUNDING = 0.02
"""Largest relative error of a token's values between a sequence fed at once and in parts."""

_SPREAD = 0.1
"""The same where a last bit that differs may move codes of low-bit activations."""


_KV_ROUNDING = {16: 5e-3, 8: 5e-2, 4: 0.5}
"""Largest relative error of an attention where nothing simulates the bits that keys and values are rounded to."""


@dataclass(frozen=True)
class _Mask:
    """What an attention's mask was proved to mean.

    Attributes:
        window: sliding window in tokens, 0 for none.
        padding: padding is hidden.
        chunk: tokens in a chunk beyond which no query sees, 0 for none.
        alibi: what it adds to the scores, or None.
    """

    window: int
    padding: bool
    chunk: int = 0
    alibi: _Alibi | None = None


@dataclass(frozen=True)
class Cache(Pass):
    """Gives attention a quantized KV state.

    Attributes:
        bits: 4, 8 or 16 bits a key or value; 0 for what the graph simulates (16 where it simulates nothing).
    """

    name: ClassVar[str] = "cache"
    contract: ClassVar[Contract] = bounded(0.5, each=1e-4, of="simulated keys and values")

    bits: Literal[0, 4, 8, 16] = 0

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if program.kind != "causal-lm":
            return PassResult(program, summary={"attentions": 0})
        if any(n.target == "past" for n in program.placeholders()):
            raise PassError("the graph has a KV state already; run 'cache' once")
        plain, program = program, program.copy()
        graph = program.graph
        attentions = calls(graph, *ATTENTIONS)
        if not attentions:
            raise _no_attention(graph)
        inputs = {str(n.target): n for n in program.placeholders()}
        shapes = _shapes(program, context)
        proofs: dict[Node | None, _Mask] = {}
        rows = []
        names = [node.name for node in attentions]
        past, ones = _add_placeholder(graph, "past"), None
        for index, node in enumerate(attentions):
            mask_node = AttentionCall.of(node).mask
            if mask_node not in proofs:
                proofs[mask_node] = _prove_mask(program, node, mask_node)
            mask = proofs[mask_node]
            key_mask = inputs["attention_mask"]
            if not mask.padding:
                ones = ones or _ones_like(graph, key_mask, past)
                key_mask = ones
            bits = self._replace(program, index, node, shapes, mask, key_mask, past)
            row = {"attention": index, "layer": node.meta.get(LAYER), "window": mask.window, "bits": bits}
            rows.append(row | ({"chunk": mask.chunk} if mask.chunk else {}) | ({"alibi": True} if mask.alibi else {}))
        cached = calls(graph, _lbllm.cached_attention.default)
        _say_latent(cached, shapes, context)
        _say_repeated(cached, shapes, context)
        tokens = context.probe["input_ids"].shape[1]
        convolutions = cache_convolutions(graph, shapes, tokens)
        graph.eliminate_dead_code()
        _free_of_length(inputs)
        _count_behind_past(graph, inputs["input_ids"], past)
        graph.lint()
        program.module.recompile()
        _prove_decoding(program, context.probe)
        simulated = bool(calls(plain.graph, _lbllm.fake_quantize_kv.default))
        bound = self.contract.each if simulated else _KV_ROUNDING[rows[0]["bits"]]
        error = _check_attentions(plain, program, names, bound, context.probe)
        figures = {
            "attentions": len(rows),
            "convolutions": convolutions,
            "worst_attention_error": error,
            "attention_error_bound": bound,
        }
        return PassResult(program, rows=rows, summary=figures)

    def _replace(
        self,
        program: Program,
        index: int,
        node: Node,
        shapes: dict[Node, torch.Size],
        mask: _Mask,
        key_mask: Node,
        past: Node,
    ) -> int:
        """Puts the cached operator in the place of attention number ``index``; returns its KV bits."""
        graph, call = program.graph, AttentionCall.of(node)
        if call.dropout != 0.0:
            raise PassError(f"{describe(node)} has dropout; capture the model in eval mode")
        heads = shapes[call.query][1]
        operands = (call.key, call.value)
        sources = [_source(node, n, shapes, heads, call.grouped) for n in operands]
        kept = {shapes[source][1] for source, _ in sources}
        if len(kept) > 1:
            sources = [_source(node, n, shapes, heads, call.grouped, max(kept)) for n in operands]
        (key, key_bits), (value, value_bits) = sources
        if key_bits != value_bits:
            raise PassError(f"{describe(node)} has keys of {key_bits} bits and values of {value_bits}; use the same")
        if self.bits and key_bits and self.bits != key_bits:
            raise PassError(
                f"the graph simulates {key_bits}-bit keys and values at {describe(node)}; use cache{{bits={key_bits}}}"
                f" or activate{{kv={self.bits}}}"
            )
        bits = key_bits or self.bits or 16
        scale = 1.0 / math.sqrt(shapes[call.query][-1]) if call.scale is None else float(call.scale)
        state = []
        for kind, source in (("key", key), ("value", value)):
            specs = _state_specs(shapes[source][1], shapes[source][-1], bits)
            for part, spec in zip(("codes", "params"), specs, strict=True):
                placeholder = _add_placeholder(graph, f"kv_{index}_{kind}_{part}")
                placeholder.meta[STATE] = spec
                state.append(placeholder)
        options: dict[str, Any] = {"softcap": call.softcap, "sinks": call.sinks, "chunk": mask.chunk}
        if mask.alibi:
            slopes = mask.alibi.slopes.expand(heads).contiguous()
            options |= {"slopes": _attribute(program, node, "alibi_slopes", slopes), "counted": mask.alibi.counted}
        arguments = (call.query, key, value, *state, key_mask, past, scale, mask.window, bits)
        cached = replace_call(node, _lbllm.cached_attention.default, arguments)
        cached.kwargs = {name: option for name, option in options.items() if option}
        relax_views(cached)
        return bits


def _check_attentions(
    plain: Program, program: Program, names: list[str], bound: float, probe: Mapping[str, Any]
) -> float:
    """Holds cached attentions against those of these names in the program before, at every query that is no padding."""
    replaced = dict(zip(names, calls(program.graph, _lbllm.cached_attention.default), strict=True))
    queries = probe["attention_mask"].bool()
    return check_replaced(plain, program, replaced, probe, bound, lambda value: value.transpose(1, 2)[queries])


def _say_latent(cached: list[Node], shapes: dict[Node, torch.Size], context: PassContext) -> None:
    """Says how many numbers a token costs where keys and values are made of fewer (DeepSeek's latent attention)."""
    found = []
    for node in cached:
        call = Arguments(node)
        latent = _latent(call.key, call.value, shapes)
        if latent:
            found.append((latent, sum(shapes[n][1] * shapes[n][-1] for n in (call.key, call.value))))
    if found:
        latent, kept = map(sum, zip(*found, strict=True))
        warn(
            context.progress,
            "latent attention",
            f"{len(found)} attentions make keys and values of all heads from few numbers (latent attention); the cache"
            f" keeps them of all heads, {kept / latent:.1f} times as many numbers",
        )


def _say_repeated(cached: list[Node], shapes: dict[Node, torch.Size], context: PassContext) -> None:
    """Says how many numbers a token costs where the state keeps heads that are repetitions of fewer."""
    found = []
    for node in cached:
        chains = [_shaped_from(n, shapes) for n in (Arguments(node).key, Arguments(node).value)]
        kept = [(shapes[c[0]][1], min(shapes[n][1] for n in c if len(shapes[n]) == 4)) for c in chains]
        if any(heads > least for heads, least in kept):
            found.append(max(heads / least for heads, least in kept))
    if found:
        warn(
            context.progress,
            "repeated heads",
            f"{len(found)} attentions repeat the heads of keys or values in an order that is not that of grouped"
            f" queries; the cache keeps them repeated, {max(found):.1f} times as many numbers",
        )


def _shaped_from(node: Node, shapes: dict[Node, torch.Size]) -> list[Node]:
    """Keys or values, and what they were before each operation on shapes alone that made them, as long
    as it has at least four dimensions."""
    chain = [node]
    while moves(chain[-1], *REPEAT) and len(shapes[Arguments(chain[-1]).self]) >= 4:
        chain.append(Arguments(chain[-1]).self)
    return chain


def _latent(key: Node, value: Node, shapes: dict[Node, torch.Size]) -> int | None:
    """Numbers that a token's keys and values are made of, where a part of the keys is the same in all heads and one
    linear makes the rest and the values; None where they are made in another way."""
    if not is_call(key, _aten.cat.default):
        return None
    parts = Arguments(key).tensors
    common = [p for p in parts if _has_one_head(p, shapes)]
    sources = {_linear_behind(n) for n in (value, *(p for p in parts if p not in common))}
    if not common or len(sources) != 1 or None in sources:
        return None
    return shapes[first_argument(sources.pop())][-1] + sum(shapes[p][-1] for p in common)


def _has_one_head(node: Node, shapes: dict[Node, torch.Size]) -> bool:
    """Whether a part of keys ``[B, H, S, D]`` is one head's, repeated."""
    while moves(node, *REPEAT) and len(shapes[node]) > 1 and shapes[node][1] > 1:
        node = Arguments(node).self
    return len(shapes[node]) == 4 and shapes[node][1] == 1


def _linear_behind(node: Node) -> Node | None:
    """The linear of whose output a node is a part."""
    while moves(node, *REPEAT, "permutes", "splits") or is_call(node, operator.getitem):
        node = first_argument(node)
    return node if is_call(node, *LINEARS, *INTEGER_LINEARS) else None


def _no_attention(graph: fx.Graph) -> PassError:
    """Why a language model cannot be cached whose attention was not found."""
    softmaxes = calls(graph, _aten.softmax.int, _aten._softmax.default)
    if not softmaxes:
        return PassError("the graph computes no attention, so there is nothing that a KV cache could keep")
    return PassError(
        f"no attention was found in the graph; what {describe(softmaxes[0])} belongs to is not written in a known way"
    )


def _attribute(program: Program, like: Node, name: str, value: Tensor) -> Node:
    """A weight in front of ``like``, stored once however many nodes read the same."""
    paths = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    path = next(p for p in paths if torch.equal(getattr(program.module, p, value), value))
    set_attribute(program.module, path, value)
    with program.graph.inserting_before(like):
        return make_attribute(program.graph, path, like)


def _state_specs(heads: int, width: int, bits: int) -> tuple[StateSpec, StateSpec]:
    """Codes and parameters of one cached tensor, as ``reference.quantize_kv`` lays them out."""
    codes, params = reference.quantize_kv(torch.zeros(1, width), bits)
    return StateSpec(heads, tuple(codes.shape[1:]), codes.dtype), StateSpec(
        heads, tuple(params.shape[1:]), params.dtype
    )


def _add_placeholder(graph: fx.Graph, name: str) -> Node:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


def _ones_like(graph: fx.Graph, key_mask: Node, past: Node) -> Node:
    """A key mask that hides nothing, for attentions that ignore padding."""
    with graph.inserting_after(past):
        return make_call(graph, _aten.ones_like.default, (key_mask,), past)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the shape of every tensor."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[Node, torch.Size] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


def _shapes(program: Program, context: PassContext) -> dict[Node, torch.Size]:
    """The shape of every tensor at the probe's batch size and length."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    arguments = [
        mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a
        for a in program.arguments(context.probe)
    ]
    recorder = _ShapeRecorder(program.module)
    with mode, torch.no_grad():
        recorder.run(*arguments)
    return recorder.shapes


def _source(
    attention: Node, operand: Node, shapes: dict[Node, torch.Size], heads: int, gqa: bool, least: int = 1
) -> tuple[Node, int]:
    """Keys or values before the grouped-query repeat and the simulated quantization.

    Args:
        attention: their reader, of ``heads`` query heads.
        operand: its keys or values.
        shapes: of every tensor.
        heads: of the queries.
        gqa: whether the attention repeats heads itself.
        least: heads to keep at least; the cache keeps as many of the values as of the keys.

    Returns:
        The node, ``[B, Hkv, S, D]``, and its simulated bits (0: none).

    Raises:
        PassError: what lies between is not a repeat of heads.
    """
    chain = _shaped_from(operand, shapes)
    # What lies further back may be only a part of the chain's shape operations, such as the choice of some heads.
    bases = [n for n in reversed(chain) if len(shapes[n]) == 4 and shapes[n][1] >= least]
    found = next((n for n in bases if _is_repeat(n, operand, chain, shapes, heads, gqa)), None)
    if found is None:
        raise PassError(f"what lies between the keys or values and {describe(attention)} is not a repeat of heads")
    if is_call(found, _lbllm.fake_quantize_kv.default):
        simulated = Arguments(found)
        return simulated.x, simulated.bits
    return found, 0


def _is_repeat(
    base: Node, operand: Node, chain: list[Node], shapes: dict[Node, torch.Size], heads: int, gqa: bool
) -> bool:
    """Evaluates the operations between ``base`` and ``operand`` on numbered elements: whether they repeat heads.

    With ``gqa`` the attention repeats what is still missing itself.
    """
    shape = shapes[base]
    probe = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    values: dict[Node, Any] = {base: probe}

    def evaluate(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [evaluate(v) for v in value]
        if not is_node(value):
            return value
        if value not in values:
            if value in shapes and value not in chain:
                # only its sizes can matter here
                values[value] = torch.empty(shapes[value])
            else:
                values[value] = value.target(*evaluate(value.args), **{k: evaluate(v) for k, v in value.kwargs.items()})
        return values[value]

    result = evaluate(operand)
    if result.shape[1] == 1:
        # One head, which attention takes for every head.
        result, gqa = result.expand(-1, heads, -1, -1), False
    repeated = result.shape[1] if gqa else heads
    expected = probe.repeat_interleave(max(1, repeated // shape[1]), 1)
    return repeated % shape[1] == 0 and torch.equal(result, expected)


def _prove_mask(program: Program, attention: Node, mask: Node | None) -> _Mask:
    """Finds out what a mask means by evaluating it; see the module docstring.

    Raises:
        PassError: it is none of the masks that cached attention can make.
    """
    if mask is None:
        if not AttentionCall.of(attention).causal:
            raise PassError(f"{describe(attention)} is not causal, so it cannot decode token by token")
        return _Mask(window=0, padding=False)
    nodes = ancestors(mask)
    constants = sorted({abs(v) for n in nodes for v in _integers(n) if 1 < abs(v) < 2**31})
    small = [c for c in constants if c <= _DIRECT_WINDOW]
    stored = _stored_lengths(program, nodes)
    sizes = {*_PROBES, *((1 if length > 64 else 2, length) for length in (*(c + 3 for c in small), *stored))}
    bias = _Bias(attention)
    observed = []
    windows = set()
    for probe in _probes(*sorted(sizes, key=lambda size: size[1])):
        length = probe["input_ids"].shape[1]
        try:
            shown, added = _evaluated(program, attention, mask, nodes, probe)
        except (RuntimeError, IndexError):
            if length <= min((_PROBES[-1][1], *stored)):
                raise
            break  # longer than what the model can attend to
        observed.append((probe, shown))
        bias.take(probe, shown, added)
        if length in stored and bool(probe["attention_mask"].all()):
            windows.add(int(shown[0, 0, -1].sum()))
    if bias.slopes is not None:
        for probe in _probes((1, _LONG)):
            with contextlib.suppress(RuntimeError, IndexError):
                bias.take(probe, *_evaluated(program, attention, mask, nodes, probe))
    windows |= {w for c in small for w in (c - 1, c, c + 1)}
    forms = [(0, 0), *((w, 0) for w in sorted(windows) if w > 0)]
    forms += [(0, c) for c in small]
    candidates = [_Mask(window, padding, chunk) for padding in (True, False) for window, chunk in forms]
    fitting = [c for c in candidates if all(_agrees(c, probe, seen) for probe, seen in observed)]
    if not fitting:
        raise PassError(
            f"the mask of {describe(attention)} is neither causal nor a causal sliding window, nor causal in chunks,"
            " with padding, so its keys cannot be cached"
        )
    found = fitting[0]
    for constant in (c for c in constants if c > _DIRECT_WINDOW):
        if not found.window and not found.chunk:
            found = _of_large_number(program, attention, mask, nodes, constant, found)
    return dataclasses.replace(found, alibi=bias.alibi())


def _stored_lengths(program: Program, nodes: list[Node]) -> set[int]:
    """Lengths that masks stored as weights ``[..., T, T]`` are for (GPT-Neo's), where no number tells the window."""
    shapes = (get_attribute(program.module, n.target).shape for n in nodes if n.op == "get_attr")
    return {shape[-1] for shape in shapes if len(shape) >= 2 and shape[-1] == shape[-2] > 1}


def _of_large_number(
    program: Program, attention: Node, mask: Node, nodes: list[Node], constant: int, plain: _Mask
) -> _Mask:
    """A mask whose window or chunk a large integer may be: the one it becomes with 5 and 9 in the integer's place."""
    fitting = ["", "window", "chunk"]
    for size in (5, 9):
        for probe in _probes((2, size + 4)):
            seen, _ = _evaluated(program, attention, mask, nodes, probe, {constant: size})
            fitting = [f for f in fitting if _agrees(_with_size(plain, f, size), probe, seen)]
    if not fitting:
        raise PassError(
            f"the mask of {describe(attention)} depends on the number {constant} in a way that is neither a sliding"
            " window nor a chunk"
        )
    return _with_size(plain, fitting[0], constant)


def _with_size(mask: _Mask, form: str, size: int) -> _Mask:
    return dataclasses.replace(mask, **{form: size}) if form else mask


class _Bias:
    """What a mask adds to the scores of visible keys, which must be nothing or ALiBi.

    A softmax does not see what is added to all of a query's scores, so only differences between keys count.
    """

    def __init__(self, attention: Node):
        self.attention = attention
        self.slopes: Tensor | None = None
        self._counted = [False, True]

    def take(self, probe: dict[str, Tensor], shown: Tensor, added: Tensor | None) -> None:
        """Takes in a mask ``[B, H or 1, S, S]`` at a probe; ``added`` is None where that is nothing.

        Raises:
            PassError: it is a bias of another kind.
        """
        key_mask = probe["attention_mask"]
        length = key_mask.shape[1]
        if length == 1:
            return  # nothing to compare with
        if self.slopes is None and added is not None:
            first = int(shown[0, 0, -1].int().argmax())
            if not bool(key_mask.all()) or first == length - 1:
                raise self._refusal()
            last = added[0, :, -1].double()
            self.slopes = ((last[:, -1] - last[:, first]) / (length - 1 - first)).float()
        if self.slopes is None:
            return
        added = torch.zeros(shown.shape) if added is None else added
        self._counted = [c for c in self._counted if self._agrees(c, key_mask, shown, added.double())]
        if not self._counted:
            raise self._refusal()

    def _agrees(self, counted: bool, key_mask: Tensor, shown: Tensor, added: Tensor) -> bool:
        assert self.slopes is not None
        slopes = self.slopes.double()[:, None, None]
        rest = added - slopes * reference.attention_places(key_mask, counted).double()[:, None, None, :]
        counts = shown & key_mask.bool()[:, None, :, None]
        highest = torch.where(counts, rest, -torch.inf).amax(-1)
        lowest = torch.where(counts, rest, torch.inf).amin(-1)
        size = torch.where(counts, added.abs(), 0.0).amax() + slopes.abs().amax()
        return bool((highest - lowest <= 4e-6 * size).all())

    def alibi(self) -> _Alibi | None:
        return None if self.slopes is None else _Alibi(self.slopes, self._counted[0])

    def _refusal(self) -> PassError:
        return PassError(
            f"the mask of {describe(self.attention)} adds a bias to the scores that is not a slope times the distance"
            " of tokens (ALiBi); cached attention cannot"
        )


def _integers(node: Node) -> Iterator[int]:
    """Integer constants among a node's arguments."""
    pending: list[Any] = [*node.args, *node.kwargs.values()]
    while pending:
        value = pending.pop()
        if isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield value


def _probes(*sizes: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    """Inputs of the given batch sizes and lengths: no padding, left paddings, and holes."""
    for batch, length in sizes:
        generator = torch.Generator().manual_seed(batch * 100_003 + length)
        left = torch.ones(batch, length, dtype=torch.int64)
        for row in range(batch):
            left[row, : (row + 1) * length // (batch + 2)] = 0
        holes = (torch.rand(batch, length, generator=generator) < 0.7).long()
        holes[:, -1] = 1
        for mask in (torch.ones_like(left), left, holes):
            yield {
                "input_ids": torch.zeros_like(mask),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            }


def _evaluated(
    program: Program,
    attention: Node,
    mask: Node,
    nodes: list[Node],
    probe: dict[str, Tensor],
    substitute: dict[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a mask's sub-graph gives: which keys each query sees, ``bool [B, H or 1, S, S]``, and what is added to their
    scores, of the same shape; None where that is nothing."""
    values: dict[Node, Any] = {}

    def load(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return values[value]
        if isinstance(value, (list, tuple)):
            return [load(v) for v in value]
        if substitute and isinstance(value, int) and not isinstance(value, bool) and abs(value) in substitute:
            return substitute[abs(value)] * (1 if value > 0 else -1)
        return value

    with torch.no_grad():
        for node in nodes:
            if node.op == "placeholder":
                if node.target not in probe:
                    raise PassError(f"the mask of {describe(attention)} depends on the input '{node.target}'")
                values[node] = probe[node.target]
            elif node.op == "get_attr":
                values[node] = get_attribute(program.module, node.target)
            else:
                values[node] = node.target(*load(node.args), **{k: load(v) for k, v in node.kwargs.items()})
    result = values[mask]
    batch, length = probe["input_ids"].shape
    result = result.expand(torch.broadcast_shapes(result.shape, (batch, 1, length, length)))
    if result.dtype == torch.bool:
        return result, None
    shown = result > MASKED
    return shown, result if bool(result[shown].any()) else None


def _agrees(mask: _Mask, probe: dict[str, Tensor], seen: Tensor) -> bool:
    """Whether ``seen`` is this mask at every query that is not padding."""
    key_mask = probe["attention_mask"]
    length = key_mask.shape[1]
    keys = key_mask if mask.padding else torch.ones_like(key_mask)
    expected = reference.attention_mask(keys, length, 0, mask.window, mask.chunk)
    queries = key_mask.bool()[:, None, :, None]
    return torch.equal((seen & queries).expand(-1, seen.shape[1], -1, -1), (expected & queries).expand_as(seen))


def _free_of_length(inputs: dict[str, Node]) -> None:
    """Takes the sizes that are left in the graph from ``input_ids``.

    Raises:
        PassError: something else reads the attention mask.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for node in list(mask.users):
        if is_call(node, _aten.sym_size.int):
            set_argument(node, "self", ids)
        elif not is_call(node, _lbllm.cached_attention.default, _aten.ones_like.default) and not _is_last(node, ids):
            raise PassError(
                f"{describe(node)} uses the attention mask outside attention, which a KV cache cannot follow"
            )
    mask.meta.pop("val", None)  # its length is the past's and the new tokens' now, no longer input_ids'


def _count_behind_past(graph: fx.Graph, ids: Node, past: Node) -> None:
    """Lets positions that the graph counts itself, or takes from the front of a stored table, go on behind past tokens.

    Raises:
        PassError: they are counted in a way that cannot be continued.
    """
    for node in calls(graph, *_RANGES):
        a = Arguments(node)
        start, step = getattr(a, "start", 0), getattr(a, "step", 1)
        if "val" in ids.meta and "val" in node.meta:
            counts = str(ids.meta["val"].shape[1]) == str(node.meta["val"].shape[0])
        else:
            counts = _is_length(a.end, ids) and (start, step) == (0, 1)
        if counts and isinstance(start, int) and step == 1:
            _go_on(node, past)
        elif counts or _is_length(a.end, ids):
            raise PassError(
                f"{describe(node)} counts positions from the sequence's length in a way that cannot go on behind past"
                " tokens; the model must take them from position_ids"
            )
    for node in calls(graph, _aten.slice.Tensor):
        a = Arguments(node)
        if a.start in (None, 0) and a.step == 1 and _is_length(a.end, ids) and is_constant(a.self):
            with graph.inserting_before(node):
                slots = make_call(graph, _aten.arange.default, (a.end,), node)
                rows = make_call(graph, _aten.index_select.default, (a.self, a.dim, slots), node)
            rows.meta = dict(node.meta)
            _go_on(slots, past)
            node.replace_all_uses_with(rows)
            graph.erase_node(node)


def _go_on(positions: Node, past: Node) -> None:
    """Lets a range begin ``past`` later."""
    graph = positions.graph
    with graph.inserting_after(positions):
        later = make_call(graph, _aten.add.Tensor, (positions, past), positions)
    later.meta = dict(positions.meta)
    positions.replace_all_uses_with(later, delete_user_cb=lambda user: user is not later)


def _is_last(node: Node, ids: Node) -> bool:
    """Whether a node is the attention mask of the new tokens, ``mask[:, -S:]``."""
    if not is_call(node, _aten.slice.Tensor) or Arguments(node).dim != 1:
        return False
    start, end = Arguments(node).pick("start", "end")
    count = Arguments(start).value if is_call(start, operator.neg) else None
    if is_call(count, _aten.sym_size.int) and Arguments(count).self.target == "attention_mask":
        set_argument(count, "self", ids)
    return _is_length(count, ids) and (end is None or end == sys.maxsize)


def _is_length(size: Any, ids: Node) -> bool:
    """Whether a size is the number of new tokens."""
    return is_call(size, _aten.sym_size.int) and Arguments(size).self is ids and Arguments(size).dim == 1


def _prove_decoding(program: Program, probe: Mapping[str, Tensor]) -> None:
    """Feeds the probe at once, and its last token behind the others: every value of that token must be the same.

    Raises:
        PassError: one is not, because something but attention and convolutions looks at other tokens.
    """
    if probe["input_ids"].shape[1] < 2:
        return
    bound = _SPREAD if calls_of_role(program.graph, "integer") else _ROUNDING
    for node, error in step_errors(program, probe).items():
        if not error <= bound:
            raise PassError(
                f"a token decoded behind others gets another value of {describe(node)} than within its sequence (by"
                f" {error:.2g}): something goes from token to token that is neither attention nor a short convolution,"
                " which a cache cannot follow"
            )
