"""``ptq``, the first stage: decoder weights become W(1+1) planes and levels, or codes, fitted to the observed inputs.

Layers are walked in order. Within a layer the graph is run up to each observer on the already quantized chain, so every
linear is fitted to the inputs it will really get; its quantized form then takes part in computing the next observer's
input. The fit is Hessian-weighted expectation maximization with GPTQ compensation (:mod:`.calibrate.fit`). The
observers are consumed.

Given::

    %observe = lbllm.observe(%x, "model.layers.0.self_attn.q_proj") {stat="hessian"}
    %q = aten.linear(%observe, %q_weight)

Result::

    %sign: u8[64, 72] = weight model.layers.0.self_attn.q_proj.weight.sign
    %bitmap: u8[64, 72] = weight model.layers.0.self_attn.q_proj.weight.bitmap
    %levels: i8[64, 9, 4] = weight model.layers.0.self_attn.q_proj.weight.levels
    %scale: f16[64, 9] = weight model.layers.0.self_attn.q_proj.weight.scale
    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)
    %q = aten.linear(%x, %w)

The former weight ``<path>.weight`` becomes a module that holds ``sign``, ``bitmap``, ``levels`` and ``scale``
(:mod:`lbllm_compile.codegen.format`). Stacked experts get one Hessian each, from the tokens routed to them; those that
few tokens reached share the one of all experts' tokens. As many Hessians are held at a time as ``HESSIAN_BYTES`` allow,
and for the next ones the inputs, which are in a file, are read again.

A linear whose scheme has ``bits=4`` gets 4-bit codes instead, an fp16 scale per row and group, and 16 int8 levels that
are those of all such linears with the same input and scheme, so that these can be merged (:mod:`.calibrate.coded`)::

    %codes: u8[64, 288] = weight model.layers.0.self_attn.q_proj.weight.codes
    %table: i8[16] = weight model.layers.0.self_attn.q_proj.weight.table
    %code_scale: f16[64, 9] = weight model.layers.0.self_attn.q_proj.weight.code_scale
    %w = lbllm.unpack_int4(%codes, %table, %code_scale, 576, 64)
    %q = aten.linear(%x, %w)

With ``propagate``, a linear's weight first moves to make up for the errors of what is quantized in front of it: by that
share of the way to the weight whose outputs on the quantized model's inputs are closest to those of the float model,
``W E[x x_q^T] E[x_q x_q^T]^-1`` (quantization error propagation, QEP, arXiv 2504.09629). The float model then runs
beside the quantized one. Stacked experts, which see other tokens in the two, stay as they are.

Where a linear has outliers, the pass ``outliers`` has put them last. These columns make up for the errors of all others
and become int8 rows, ``<path>.weight.outliers.rows`` and ``.row_scale``: a linear of their own, behind a slice of the
input, whose product is added.

Needs ``observe`` and calibration batches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..codegen import levels as level_rules
from ..codegen import operators as operators
from ..codegen.format import QuantizedWeight
from ..codegen.operators import Arguments, set_argument
from ..codegen.operators.lbllm.linears import WEIGHT
from ..codegen.progress import warn
from ..codegen.sizes import DEFAULT_GROUP, GROUPS
from .annotate import decoder_linears
from .base import CALIBRATING, Contract, Pass, PassContext, PassError, PassResult, Positive, Share
from .calibrate.coded import CodedFit, fit_int4
from .calibrate.fit import Factor, Fit, FitError, Init, factor, fit
from .calibrate.layers import (
    CODED,
    LAYER_SEQUENCES,
    Activations,
    Stage,
    Values,
    calibration_batches,
    segments,
    set_weight,
    split,
    stored_codes,
    stored_weight,
)
from .calibrate.precision import Precision
from .ir.annotations import LINEAR
from .ir.annotations import linears as annotated_linears
from .ir.program import Program, discard_attributes, get_attribute, prune_attributes, set_attribute
from .ir.rewrite import make_attribute, make_call, operands_of
from .ir.scheme import Scheme
from .ir.spool import mapped, release, trim
from .observe import STAT, nothing_to_quantize

BATCH = 8
"""Sequences run at a time."""

OUTLIERS = "outliers"
"""What is behind a weight's path in those of its columns that have 8 bits, and behind a linear's in theirs."""

ROWS = ("rows", "row_scale")
"""Tensors of int8 rows, as ``head`` names them."""

HESSIAN_BYTES = 4 << 30
"""Most that the Hessians of stacked experts take which are held at a time, where more than one is needed."""

OUTER_BLOCKS = 4
"""Blocks of columns in which outer products are added up; the blocks below the diagonal, 6 of 16, are not computed."""

_lbllm = torch.ops.lbllm


@dataclass(frozen=True)
class Ptq(Pass):
    """Fits W(1+1) weights and 4-bit codes to the calibration inputs, layer by layer.

    Attributes:
        group: input columns per group, of linears whose scheme has none.
        init: how a W(1+1) group's levels are found: by expectation maximization, or as an even grid over its range
            (``rtn``).
        damp: added to the Hessian's diagonal, relative to its mean; raised tenfold where the Hessian is still singular.
        compensate: let later columns make up for the errors of earlier ones (GPTQ).
        rounds: rounds of compensation and level refit per W(1+1) group.
        propagate: how far a weight moves to make up for the errors in its inputs, 0 to 1. Errors are then reported from
            the weight that it moved to.
        outliers: leave columns that the pass ``outliers`` has put last 8 bits, instead of four levels as all others.
        sequences: calibration sequences to fit to, at most.
        precision: of the layers' matrix products; statistics and fits are float32.
    """

    group: int = DEFAULT_GROUP
    init: Init = "em"
    damp: float = 0.01
    compensate: bool = True
    rounds: int = 1
    propagate: Share = 0.0
    outliers: bool = True
    sequences: Positive = LAYER_SEQUENCES
    precision: Precision = "auto"

    name: ClassVar[str] = "ptq"
    contract: ClassVar[Contract] = CALIBRATING

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if self.group not in GROUPS:
            raise PassError(f"ptq: group cannot be {self.group}; choose one of {', '.join(map(str, GROUPS))}")
        if nothing_to_quantize(self.name, program, context):
            return PassResult(program, summary={"linears": 0})
        self._check(program, context)
        if not self.outliers:
            program = _without_outliers(program)
        layers = split(program)
        batches = calibration_batches(program, context.calibration, BATCH, self.sequences)
        chain = Activations(batches, context.device)
        chain.advance(layers.prologue)
        floats = FloatChain(layers.layers, chain.fork()) if self.propagate else None
        stored: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        with context.progress.task("stage 1: fitting planes and levels", len(layers.layers)) as task:
            for index, layer in enumerate(layers.layers):
                done = context.checkpoints.load(self.name, index)
                tensors, metrics = self._layer(layer, chain, done, floats and floats.layer(index, self.precision))
                if done is None:
                    context.checkpoints.save(self.name, index, tensors, metrics)
                stored.update(mapped(tensors.items()))
                trim()
                rows += [{"layer": index, **row} for row in metrics["linears"]]
                task.advance(f"error {_mean_error(metrics['linears']):.4f}")
        quantized = rewrite(program, stored, self.group)
        fallbacks = sum(row.get("fallback_experts", 0) for row in rows)
        summary = {"linears": len(rows), "mean_error": _mean_error(rows), "fallback_experts": fallbacks}
        if fallbacks:
            warn(
                context.progress,
                "few tokens",
                f"{fallbacks} experts saw too few calibration tokens; they share the Hessian of their layer",
            )
        return PassResult(quantized, rows, summary)

    def _check(self, program: Program, context: PassContext) -> None:
        if not context.calibration:
            raise PassError("ptq needs calibration batches; give a calibration text")
        linears = decoder_linears(program.graph)
        if not linears or any(source.target is not _lbllm.observe.default for source in linears):
            raise PassError("ptq needs observers in front of all decoder linears; run 'observe' before it")
        if self.propagate and any(source.meta[STAT] != "hessian" for source in linears):
            raise PassError("ptq: propagate needs the Hessians of inputs; use observe{stat=hessian}")
        for node in (n for users in linears.values() for n in users):
            weight = get_attribute(program.module, node.meta[LINEAR].weight)
            finite = bool(torch.isfinite(weight).all())
            release()
            if not finite:
                raise PassError(
                    f"the weight '{node.meta[LINEAR].weight}' holds NaN or infinite values; check the model"
                )

    def _layer(
        self,
        layer: Stage,
        chain: Activations,
        done: tuple[dict[str, Tensor], dict[str, Any]] | None,
        floats: Iterator[Activations] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fits one layer and moves the chain past it; with ``done`` it only moves the chain, the same way.

        Args:
            floats: the float model's values behind each part of the layer, if errors propagate.
        """
        observed = {s.name: users for s, users in decoder_linears(layer.module.graph).items()}
        observers = [n for n in layer.module.graph.nodes if n.name in observed]
        tensors: dict[str, Tensor] = {} if done is None else dict(done[0])
        metrics: dict[str, Any] = {"linears": []} if done is None else done[1]
        if done is not None:
            _check_stored(metrics["linears"], [n for users in observed.values() for n in users], self.group)
        parts = segments(layer, observers)
        for position, part in enumerate(parts):
            statistics = {o.name: Statistic.of(o, observed[o.name]) for o in observers if o.name in part.outputs}
            originals = next(floats).read(list(statistics)) if floats is not None else iter(())
            visit = None if done is not None else functools.partial(_collect, statistics, originals)
            chain.advance(part, visit, self.precision)
            for statistic in statistics.values():
                if done is None:
                    found, figures = self.fit_behind(layer.module, statistic, chain)
                    tensors.update(found)
                    metrics["linears"] += figures
                for node in statistic.linears:
                    path = node.meta[LINEAR].weight
                    scheme = weight_scheme(node, self.group)
                    weight = dequantized(tensors, path, scheme, _in_features(layer.module, path))
                    for later in parts[position + 1 :]:
                        if any(n.op == "get_attr" and n.target == path for n in later.module.graph.nodes):
                            set_weight(later, path, weight)
        for part in parts:
            # A graph and its module refer to each other: the layer's dequantized weights would stay until Python looks.
            discard_attributes(part.module)
        return tensors, metrics

    def fit_behind(
        self, module: fx.GraphModule, statistic: Statistic, chain: Activations
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Fits the linears behind one observer; matrices that share a Hessian and a scheme are fitted as one."""
        alike: dict[Scheme, list[str]] = {}
        for node in statistic.linears:
            paths = alike.setdefault(weight_scheme(node, self.group), [])
            if node.meta[LINEAR].weight not in paths:
                paths.append(node.meta[LINEAR].weight)
        hessian = None if statistic.offsets is not None else statistic.hessian(0)
        differences = statistic.take_differences()
        if hessian is not None:
            statistic.sums.clear()
        tensors: dict[str, Tensor] = {}
        figures: list[dict[str, Any]] = []
        for index, (scheme, paths) in enumerate(alike.items()):
            weights = [get_attribute(module, path) for path in paths]
            start = time.perf_counter()
            if hessian is None:
                fits, extra = self._fit_experts(weights, statistic, scheme, chain)
            else:
                factored = factor(hessian, _group(scheme), self.damp, scheme.outliers)
                if index == len(alike) - 1:
                    del hessian
                if differences is not None:
                    correction = error_correction(factored, differences)
                    given = (weight.to(correction.device).float() for weight in weights)
                    weights = [torch.addmm(weight, weight, correction, alpha=self.propagate) for weight in given]
                found, extra = self._fit_rows(weights, factored, scheme)
                fits = [[f] for f in found]
            seconds = (time.perf_counter() - start) / len(paths)
            for path, weight, parts in zip(paths, weights, fits, strict=True):
                tensors.update({f"{path}.{name}": tensor.cpu() for name, tensor in _stored(parts, weight, scheme)})
                norm = sum(float(p.norm.double().sum()) for p in parts)
                error = sum(float(p.error.double().sum()) for p in parts)
                row = {
                    "linear": path.removesuffix(".weight"),
                    "shape": [*weight.shape[:-1], weight.shape[-1] - scheme.outliers],
                    "scheme": str(scheme),
                }
                figures.append({**row, "error": error / norm if norm > 0 else 0.0, "seconds": seconds, **extra})
        return tensors, figures

    def _fit_rows(
        self, weights: Sequence[Tensor], factored: Factor, scheme: Scheme
    ) -> tuple[list[Fit | CodedFit], dict[str, Any]]:
        """Fits matrices ``[N_i, K]`` with the same inputs."""
        together = torch.cat(list(weights)).to(factored.root.device)
        whole: Fit | CodedFit
        if scheme.bits == 4:
            whole = fit_int4(together, factored, _group(scheme), compensate=self.compensate)
        else:
            whole = fit(
                together,
                factored,
                _group(scheme),
                init=self.init,
                compensate=self.compensate,
                rounds=self.rounds,
                rule=level_rules.get(scheme.levels),
            )
        fits: list[Fit | CodedFit] = []
        start = 0
        for weight in weights:
            fits.append(whole.rows(start, start + weight.shape[0]))
            start += weight.shape[0]
        return fits, {"damp": factored.damp, "dead_columns": int(factored.dead.sum())}

    def _fit_experts(
        self, weights: Sequence[Tensor], statistic: Statistic, scheme: Scheme, chain: Activations
    ) -> tuple[list[list[Fit | CodedFit]], dict[str, Any]]:
        """Fits stacked matrices ``[E, N_i, K]``, expert by expert; those with too few tokens last."""
        experts, width = weights[0].shape[0], weights[0].shape[-1]
        few = {expert for expert in range(experts) if statistic.count(expert) < width}
        fitted: dict[int, list[Fit | CodedFit]] = {}
        damp, dead = 0.0, 0

        def fit_one(expert: int, factored: Factor) -> None:
            nonlocal damp, dead
            fitted[expert], extra = self._fit_rows([w[expert] for w in weights], factored, scheme)
            damp, dead = max(damp, extra["damp"]), dead + extra["dead_columns"]

        shared = Pool(statistic)
        for window in statistic.windows(width):
            statistic.hold(window, chain)
            if few:
                shared.add()
            for expert in sorted({*window} - few):
                fit_one(expert, factor(statistic.hessian(expert), _group(scheme), self.damp))
        if few:
            factored = factor(shared.hessian(), _group(scheme), self.damp)
            for expert in sorted(few):
                fit_one(expert, factored)
        fits = [[fitted[expert][i] for expert in range(experts)] for i in range(len(weights))]
        return fits, {"damp": damp, "dead_columns": dead, "fallback_experts": len(few)}


@dataclass
class Statistic:
    """What one observer has seen.

    Attributes:
        site: name of the observer node.
        kind: ``hessian`` or ``absmax``.
        linears: the calls that read it.
        offsets: for stacked experts, the name of the node with the end of each expert's tokens; else None.
        experts: number of experts; 1 for plain linears.
        held: the experts whose sums are held; the others are only counted.
        differences: sum of ``(x - x_q) x_q^T`` over the float model's inputs ``x`` and the quantized one's ``[K, K]``,
            where errors propagate.
    """

    site: str
    kind: str
    linears: list[fx.Node]
    offsets: str | None
    experts: int
    sums: list[Tensor | None] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    held: range = range(1)
    differences: Tensor | None = None

    @classmethod
    def of(cls, observer: fx.Node, linears: list[fx.Node]) -> Statistic:
        routes = {Arguments(n).offsets.name if n.target is _lbllm.grouped_linear.default else None for n in linears}
        if len(routes) > 1:
            raise PassError(f"the linears behind '{observer.name}' route their tokens differently")
        offsets = routes.pop()
        experts = linears[0].meta[LINEAR].experts if offsets is not None else 1
        empty: list[Tensor | None] = [None] * experts
        return cls(observer.name, observer.meta[STAT], linears, offsets, experts, empty, [0] * experts)

    def add(self, values: Values) -> None:
        """Takes in one batch."""
        x = values[self.site].flatten(0, -2).float()
        if self.offsets is None:
            self._add(0, x)
            self.counts[0] += len(x)
            return
        self.held = self.windows(x.shape[1])[0]
        self._add_held(values)
        ends = values[self.offsets].tolist()
        self.counts = [c + end - start for c, start, end in zip(self.counts, [0, *ends[:-1]], ends, strict=True)]

    def add_difference(self, values: Values, originals: Values) -> None:
        """Takes in the same batch of the float model, too."""
        if self.offsets is not None:
            return
        x, original = (given[self.site].flatten(0, -2).float() for given in (values, originals))
        if self.differences is None:
            self.differences = x.new_zeros((x.shape[1], x.shape[1]))
        self.differences.addmm_((original - x).t(), x)

    def take_differences(self) -> Tensor | None:
        """The mean of ``(x - x_q) x_q^T``, which is not kept; None where errors do not propagate."""
        total, self.differences = self.differences, None
        return None if total is None else total.div_(self.counts[0])

    def windows(self, width: int) -> list[range]:
        """Runs of experts whose sums over inputs of ``width`` channels are held at a time."""
        size = 4 * width * (1 if self.kind == "absmax" else width)
        step = max(1, HESSIAN_BYTES // size)
        return [range(start, min(start + step, self.experts)) for start in range(0, self.experts, step)]

    def hold(self, window: range, chain: Activations) -> None:
        """Holds the sums of these experts instead of others; ``chain`` has the inputs."""
        if window == self.held:
            return
        self.held, self.sums = window, [None] * self.experts
        assert self.offsets is not None
        for values in chain.read((self.site, self.offsets)):
            self._add_held(values)

    def _add_held(self, values: Values) -> None:
        x = values[self.site].flatten(0, -2)
        ends = values[self.offsets].tolist()
        for expert in self.held:
            self._add(expert, x[ends[expert - 1] if expert else 0 : ends[expert]].float())

    def _add(self, expert: int, x: Tensor) -> None:
        if not len(x):
            return
        total = self.sums[expert]
        if self.kind == "absmax":
            peak = x.abs().amax(0)
            self.sums[expert] = peak if total is None else torch.maximum(total, peak)
        else:
            if total is None:
                total = self.sums[expert] = x.new_zeros((x.shape[1], x.shape[1]))
            _add_outer_products(total, x)

    def count(self, expert: int) -> int:
        """Tokens seen by an expert."""
        return self.counts[expert]

    def hessian(self, expert: int) -> Tensor:
        """Mean outer product of an expert's inputs ``[K, K]``; for ``absmax`` the squared peaks on the diagonal."""
        total = self.sums[expert]
        if total is None:
            raise FitError(f"no calibration token reached '{self.linears[0].meta[LINEAR].path}'")
        return torch.diag(total.square()) if self.kind == "absmax" else _symmetric(total) / self.counts[expert]


class Pool:
    """The Hessian of all experts' inputs together."""

    def __init__(self, statistic: Statistic):
        self._statistic = statistic
        self._total: Tensor | None = None

    def add(self) -> None:
        """Takes in the experts whose sums are held."""
        seen = [t for t in self._statistic.sums if t is not None]
        if not seen:
            return
        if self._total is None:
            self._total = torch.zeros_like(seen[0])
        # a block of rows at a time: stacked whole, the sums would be there twice
        step = -(-len(self._total) // len(seen))
        for start in range(0, len(self._total), step):
            rows = slice(start, start + step)
            block = torch.stack([t[rows] for t in seen])
            if self._statistic.kind == "absmax":
                self._total[rows] = torch.maximum(self._total[rows], block.amax(0))
            else:
                self._total[rows] += block.sum(0)

    def hessian(self) -> Tensor:
        """``[K, K]``, as :meth:`Statistic.hessian`."""
        if self._total is None:
            raise FitError(f"no calibration token reached '{self._statistic.linears[0].meta[LINEAR].path}'")
        if self._statistic.kind == "absmax":
            return torch.diag(self._total.square())
        return _symmetric(self._total) / sum(self._statistic.counts)


def _add_outer_products(total: Tensor, x: Tensor) -> None:
    """Adds ``x^T x`` to ``total``, in the blocks on and above the diagonal only: it is symmetric."""
    k = x.shape[1]
    step = -(-k // OUTER_BLOCKS)
    for start in range(0, k, step):
        total[start : start + step, start:].addmm_(x[:, start : start + step].t(), x[:, start:])


def _symmetric(total: Tensor) -> Tensor:
    """The whole matrix from its upper triangle."""
    return total.triu().add_(total.triu(1).t())


def _collect(statistics: Mapping[str, Statistic], originals: Iterator[Values], values: Values) -> None:
    """Takes in one batch, and the float model's next one if there are any."""
    original = next(originals, None)
    for statistic in statistics.values():
        statistic.add(values)
        if original is not None:
            statistic.add_difference(values, original)


def error_correction(factored: Factor, differences: Tensor) -> Tensor:
    """What a weight is multiplied by ``[K, K]`` to get its way to the one that makes up for errors in its inputs:
    ``E[(x - x_q) x_q^T] H^-1``.

    Args:
        factored: the Hessian ``H`` of the quantized model's inputs.
        differences: mean of ``(x - x_q) x_q^T``, in the matrix's order of columns.
    """
    found = torch.empty_like(differences)
    found[:, factored.order] = differences[:, factored.order] @ factored.inverse.t() @ factored.inverse
    return found


@dataclass(frozen=True)
class FloatChain:
    """The float model, run beside the quantized one.

    Attributes:
        layers: with their observers.
        chain: its values, in front of the first layer at the start.
    """

    layers: Sequence[Stage]
    chain: Activations

    def layer(self, index: int, precision: Precision) -> Iterator[Activations]:
        """Moves past the parts of the next layer, one at a time; gives the values behind each."""
        graph = self.layers[index].module.graph
        for part in segments(self.layers[index], [*decoder_linears(graph)]):
            self.chain.advance(part, precision=precision)
            yield self.chain


def _mean_error(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["error"] for row in rows) / max(len(rows), 1)


def weight_scheme(linear: fx.Node, group: int) -> Scheme:
    """How the weight of a decoder linear is quantized: as its scheme says, in groups of ``group`` where it has none."""
    scheme = linear.meta[LINEAR].scheme
    return Scheme(group=scheme.group or group, levels=scheme.levels, outliers=scheme.outliers, bits=scheme.bits)


def _without_outliers(program: Program) -> Program:
    """The program with linears that have no outliers; the order of channels stays."""
    program = program.copy()
    for node, info in annotated_linears(program):
        node.meta[LINEAR] = replace(info, scheme=replace(info.scheme, outliers=0))
    return program


def _group(scheme: Scheme) -> int:
    assert scheme.group is not None
    return scheme.group


def _stored(parts: Sequence[Fit | CodedFit], weight: Tensor, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """What is stored of fits of a weight, one for each of its matrices: names behind its path, and tensors."""
    first = parts[0]
    if isinstance(first, CodedFit):
        yield from zip(CODED, (first.weight.packed, first.weight.table, first.weight.scale), strict=True)
        return
    codes, levels = (torch.stack([getattr(p, name) for p in parts]) for name in ("codes", "levels"))
    shape = (*weight.shape[:-1], -1)
    quantized = QuantizedWeight.from_codes(
        codes.reshape(shape),
        levels.reshape(*shape, levels.shape[-1]),
        _group(scheme),
        level_rules.get(scheme.levels).quantize,
    )
    yield from ((name, getattr(quantized, name)) for name in WEIGHT)
    if scheme.outliers:
        yield from zip((f"{OUTLIERS}.{name}" for name in ROWS), (first.kept, first.kept_scale), strict=True)


def dequantized(tensors: Mapping[str, Tensor], path: str, scheme: Scheme, in_features: int) -> Tensor:
    """The matrix that stored tensors of a linear stand for, outliers last; float32.

    Args:
        tensors: as :meth:`Ptq.fit_behind` gives them.
        path: of the weight.
        scheme: see :func:`weight_scheme`.
        in_features: its columns.
    """
    if scheme.bits == 4:
        return stored_codes(tensors, path, _group(scheme), in_features).dequantize()
    main = stored_weight(tensors, path, _group(scheme), in_features - scheme.outliers).dequantize()
    if not scheme.outliers:
        return main
    rows = _lbllm.unpack_rows(*(tensors[f"{path}.{OUTLIERS}.{name}"] for name in ROWS))
    return torch.cat([main, rows], -1)


def _check_stored(rows: Sequence[Mapping[str, Any]], linears: Sequence[fx.Node], group: int) -> None:
    """Checks that a finished layer was fitted as its linears' schemes say."""
    stored = {row["linear"]: row["scheme"] for row in rows}
    for node in linears:
        path = node.meta[LINEAR].weight.removesuffix(".weight")
        wanted = str(weight_scheme(node, group))
        if stored.get(path) != wanted:
            raise PassError(
                f"the finished layer of '{path}' was fitted with {stored.get(path)}, not {wanted}; pass --fresh to"
                " start over"
            )


def _in_features(module: torch.nn.Module, path: str) -> int:
    return get_attribute(module, path).shape[-1]


def rewrite(program: Program, stored: Mapping[str, Tensor], group: int) -> Program:
    """Replaces observed float weights by ``lbllm.unpack_weight`` of the stored planes and levels, or
    ``lbllm.unpack_int4`` of the stored codes.

    Args:
        group: input columns per group, of linears whose scheme has none.

    Raises:
        PassError: a weight to replace is used by something else than decoder linears.
    """
    program = program.copy()
    graph, module = program.graph, program.module
    unpacked: dict[str, fx.Node] = {}
    for observer, linears in decoder_linears(graph).items():
        scheme = weight_scheme(linears[0], group)
        columns = get_attribute(module, linears[0].meta[LINEAR].weight).shape[-1] - scheme.outliers
        main, loud = _cut(observer, columns, scheme.outliers) if scheme.outliers else (Arguments(observer).x, None)
        for linear in linears:
            path, (x, weight) = linear.meta[LINEAR].weight, operands_of(linear)
            if path not in unpacked:
                readers = [u for n in graph.nodes if n.op == "get_attr" and n.target == path for u in n.users]
                others = [u for u in readers if LINEAR not in u.meta or u.meta[LINEAR].role != "decoder"]
                if others:
                    raise PassError(f"the weight '{path}' is also used by '{others[0].name}'; exclude it by keep_dense")
                own = weight_scheme(linear, group)
                coded = own.bits == 4
                unpack = _lbllm.unpack_int4.default if coded else _lbllm.unpack_weight.default
                with graph.inserting_before(weight):
                    names = CODED if coded else WEIGHT
                    parts = tuple(make_attribute(graph, f"{path}.{name}", linear) for name in names)
                    unpacked[path] = make_call(graph, unpack, (*parts, columns, own.group), linear)
            linear.replace_input_with(x, main)
            set_argument(linear, "weight", unpacked[path])
            if loud is not None:
                _add_outliers(linear, loud)
        graph.erase_node(observer)
    for path in unpacked:
        for node in [n for n in graph.nodes if n.op == "get_attr" and n.target == path]:
            graph.erase_node(node)
        known = [*WEIGHT, *CODED, *(f"{OUTLIERS}.{name}" for name in ROWS)]
        for name in [name for name in known if f"{path}.{name}" in stored]:
            set_attribute(module, f"{path}.{name}", stored[f"{path}.{name}"])
    prune_attributes(module)
    module.recompile()
    return program.with_module(module)


def _cut(observer: fx.Node, columns: int, outliers: int) -> tuple[fx.Node, fx.Node]:
    """The first ``columns`` channels of what an observer reads, and the outliers behind them."""
    graph, x = observer.graph, Arguments(observer).x
    with graph.inserting_before(observer):
        main = make_call(graph, torch.ops.aten.slice.Tensor, (x, -1, 0, columns), observer)
        loud = make_call(graph, torch.ops.aten.slice.Tensor, (x, -1, columns, columns + outliers), observer)
    return main, loud


def _add_outliers(linear: fx.Node, loud: fx.Node) -> None:
    """Adds to a linear the product of the outliers of its input with their int8 columns."""
    graph, info = linear.graph, linear.meta[LINEAR]
    path = f"{info.weight}.{OUTLIERS}"
    own = replace(
        info,
        path=f"{info.path}.{OUTLIERS}",
        weight=path,
        role="outliers",
        reason="the loudest channels",
        scheme=Scheme(),
    )
    with graph.inserting_after(linear):
        total = make_call(graph, torch.ops.aten.add.Tensor, (linear, linear), linear)
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    with graph.inserting_before(total):
        rows = [make_attribute(graph, f"{path}.{name}", linear) for name in ROWS]
        matrix = make_call(graph, _lbllm.unpack_rows.default, tuple(rows), linear)
        meta = {LINEAR: own, **({"val": linear.meta["val"]} if "val" in linear.meta else {})}
        product = make_call(graph, torch.ops.aten.linear.default, (loud, matrix), linear, meta)
    total.args = (linear, product)
