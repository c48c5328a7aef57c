"""Chooses how coarsely each linear is quantized, under a limit on bits or on divergence.

Linears that read the same input share a choice, because kernels and quantizers do: an entry of ``choices``, a setting
or ``dense``. What the choice of one costs is worked out layer by layer on calibration tokens:

* its weights are fitted as ``ptq`` fits them, to the float model's inputs, and the layer is run with them: the *actual
  error* behind the layer,
* channels of that error weigh what the *gradient* of the model's output says (:mod:`.calibrate.sensitivity`),
* and the whole is *measured* once: with the middle choice (the worst one where the middle one is all but exact), alone
  in the float model, the divergence of the model's output. The other choices cost in proportion to their errors.

Costs add up to a good approximation (HIGGS, arXiv 2411.17525), so the best choice for all is a knapsack problem, which
is solved exactly (:mod:`.calibrate.knapsack`): with ``bits`` the least divergence within them, with ``max_kl`` the
fewest bits. Then the model that this gives is fitted and measured as a whole; under ``max_kl`` costs are scaled by what
that shows, the choice is made once more, and where it is another, that model is measured, too.

An entry of ``choices`` with ``bits=4`` gives 4-bit codes, which cost twice the bits of W(1+1) and hardly any quality:
where a model is sensitive.

With ``over=model`` embedding and head are chosen, too, together, because an embedding may be tied to the head: for the
head the entries of ``choices`` that have ``bits``, and ``dense``. What each form costs is measured outright, as the
divergence of the float model with it alone, and what counts are all matrices of the model as they are stored, one that
is tied once (twice where its readers get two forms of it).

What ``annotate`` was told of a linear stands: a linear whose scheme has a group keeps it, a head whose scheme has bits
keeps these, one that is dense stays so, and all count. The graph stays as it is; what was chosen is in the linears'
schemes, which later passes follow and dumps show.

Given::

    %q = aten.linear(%x, %w) {path="model.layers.0.self_attn.q_proj", role="decoder"}

Result::

    %q = aten.linear(%x, %w) {path="model.layers.0.self_attn.q_proj", role="decoder", scheme="group=128"}

and with ``over=model``::

    %logits = aten.linear(%h, %embed) {path="lm_head", role="head", scheme="bits=4 group=64 embedding=4"}

Comes behind ``annotate`` (and ``smooth``), before ``observe``; needs calibration batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ..codegen.progress import warn
from ..codegen.sizes import DEFAULT_GROUP
from .annotate import decoder_linears
from .base import EXACT, Contract, Pass, PassCheckpoints, PassContext, PassError, PassResult, Rate
from .calibrate import knapsack
from .calibrate.alignment import divergence_of
from .calibrate.layers import (
    Activations,
    Layers,
    Stage,
    Values,
    calibration_batches,
    finish,
    segments,
    set_weight,
    split,
)
from .calibrate.precision import Precision, matrix_products
from .calibrate.sensitivity import channel_weights, first_tokens
from .calibrate.training import reconstruction
from .choices import (
    CHOICES,
    Option,
    Site,
    decoder_weights,
    head_site,
    kept_bits,
    outside_bits,
    sites,
    with_choice,
    with_schemes,
)
from .head import FITTED, Head, outside_matrices
from .ir import scheme as schemes
from .ir.annotations import LINEAR, linears
from .ir.program import LAYER, Program, copy_module, get_attribute, set_attribute
from .ir.rewrite import UNPACKED, calls, constant, make_attribute
from .ir.scheme import Entry
from .ir.spool import release, trim
from .observe import Observe, nothing_to_quantize
from .ptq import BATCH, Ptq, Statistic, dequantized, weight_scheme

MEASURED_TOKENS = 1024
"""Calibration tokens on which the divergence of the model's output is measured."""

MEASURABLE = 1e-3
"""The least error whose divergence is taken for that of others in proportion, as a share of the largest error: what an
all but exact fit does to the output is lost in rounding."""

_UNLIMITED = 1e300
"""A divergence that every choice keeps within."""


@dataclass(frozen=True)
class Budget(Pass):
    """Chooses the schemes of linears under a limit; see the module's description.

    Attributes:
        bits: most bits per weight, as stored, on average over what is chosen for; 0 sets no limit.
        max_kl: most divergence of the output from the float model's, as it is behind ``ptq`` with float activations:
            of a language model the mean KL divergence in nats, of another module the relative error; 0 sets no limit.
            Exactly one of the two is set.
        over: what is chosen for, and counted: the linears of the decoder ``layers``, or all matrices of the ``model``,
            the output head and the token embedding among them.
        choices: what linears may become, as entries of a scheme (:mod:`.ir.scheme`), each a choice for the linears that
            its pattern matches. Those with ``bits`` are for output heads, with ``bits=4`` and no ``embedding`` for the
            linears of decoder layers, too; ``dense`` leaves a head and the token embedding float as well.
        precision: of the layers' matrix products; fits and divergences are float32.
    """

    bits: Rate = 0.0
    max_kl: Rate = 0.0
    over: Literal["layers", "model"] = "layers"
    choices: str = CHOICES
    precision: Precision = "auto"

    name: ClassVar[str] = "budget"
    contract: ClassVar[Contract] = EXACT

    def __post_init__(self) -> None:
        schemes.parse(self.choices)

    def rehearsal(self) -> Pass:
        """The fewest bits, whatever they cost: what one layer takes says nothing of whether the model meets a limit."""
        return replace(self, bits=0.0, max_kl=_UNLIMITED) if self.bits or self.max_kl else self

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if bool(self.bits) == bool(self.max_kl):
            raise PassError("budget needs a limit; set bits or max_kl, and not both")
        if nothing_to_quantize(self.name, program, context):
            return PassResult(program, summary={"linears": 0})
        if not context.calibration:
            raise PassError("budget needs calibration batches; give a calibration text")
        if any(info.scheme.outliers for _, info in linears(program)):
            raise PassError("budget does not count the channels that keep 8 bits; leave 'outliers' out, or budget")
        entries = schemes.parse(self.choices)
        found, heads = sites(program, entries), self._heads(program, entries)
        kept, weights = kept_bits(program), decoder_weights(program)
        if self.over == "model":
            kept += 0 if heads else outside_bits(program)
            weights += sum(matrix.numel() for matrix in outside_matrices(program).values())
        self._check([*found, *heads], kept, weights)
        batches = tuple(first_tokens(calibration_batches(program, context.calibration, 1)))
        head = Head() if self.over == "model" else None
        costs = Costs.of(program, replace(context, calibration=batches), self.precision, head)
        table = [*costs.table(found), *(costs.of_head(program, site) for site in heads)]
        found += heads
        chosen = self._choose(found, table, kept, weights, 1.0)
        predicted = sum(row[index] for row, index in zip(table, chosen, strict=True))
        measured = costs.measured(with_choice(program, found, chosen))
        if self.max_kl and predicted > 0:
            scale, first = measured / predicted, chosen
            chosen = self._choose(found, table, kept, weights, scale)
            predicted = scale * sum(row[index] for row, index in zip(table, chosen, strict=True))
            if chosen != first:
                measured = costs.measured(with_choice(program, found, chosen), "again-")
        if self.max_kl and measured > self.max_kl:
            warn(
                context.progress,
                None,
                f"budget: the model diverges by {measured:.3g}, more than max_kl={self.max_kl:g}, within which its"
                f" choices' costs add up to {predicted:.3g}; give a smaller limit",
            )
        bits = kept + sum(site.options[index].bits for site, index in zip(found, chosen, strict=True))
        summary = {"bits": bits / weights, "predicted": predicted, "measured": measured}
        return PassResult(with_choice(program, found, chosen), _rows(found, table, chosen), summary)

    def _heads(self, program: Program, entries: Sequence[Entry]) -> list[Site]:
        """What is to be chosen outside the decoder layers: the output heads, in one, or nothing."""
        site = head_site(program, entries) if self.over == "model" else None
        if site is not None and self.max_kl == _UNLIMITED:
            # The smallest one will be taken, whatever the others would cost.
            site = replace(site, options=site.options[:1])
        return [] if site is None else [site]

    def _check(self, found: Sequence[Site], kept: int, weights: int) -> None:
        """Refuses bits that no choice meets, before the work."""
        fewest = (kept + sum(site.options[0].bits for site in found)) / weights
        if self.bits and self.bits < fewest:
            raise PassError(
                f"budget: bits={self.bits:g} cannot be met: the smallest choice for every linear takes {fewest:.4g}"
                " bits a weight; allow more, or give choices with larger groups"
            )

    def _choose(
        self, found: Sequence[Site], table: Sequence[Sequence[float]], kept: int, weights: int, scale: float
    ) -> list[int]:
        """The index of an option of every site.

        Args:
            table: divergence of every option.
            kept: bits of linears that are not to be chosen for.
            weights: of all linears of the decoder layers.
            scale: what the divergences are multiplied by.

        Raises:
            PassError: no choice keeps within the limit.
        """
        bits = [[option.bits for option in site.options] for site in found]
        costs = [[scale * cost for cost in row] for row in table]
        if self.bits:
            chosen = knapsack.choose(bits, costs, self.bits * weights - kept)
        else:
            chosen = knapsack.choose(costs, bits, self.max_kl)
        if chosen is None:
            least = sum(min(row) for row in costs)
            raise PassError(
                f"budget: max_kl={self.max_kl:g} cannot be met: the best choice for every linear gives {least:.3g};"
                " allow more, or add 'dense' to the choices"
            )
        return chosen


def _rows(found: Sequence[Site], table: Sequence[Sequence[float]], chosen: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for site, costs, index in zip(found, table, chosen, strict=True):
        for path, scheme in site.options[index].schemes.items():
            row = {"layer": site.layer, "linear": path, "scheme": str(scheme), "together": len(site.paths)}
            rows.append({**row, "divergence": costs[index], "least": min(costs), "most": max(costs)})
    return rows


@dataclass(frozen=True)
class Costs:
    """Works out what choices cost.

    Attributes:
        layers: of the float program, with observers.
        chain: values behind the prologue, of all tokens.
        tokens: on which divergences are measured, batch by batch.
        short: values behind the prologue, of these.
        ends: the float program's values behind the last layer, of these.
        channels: what errors behind layers weigh, by output.
        context: has the calibration tokens.
        precision: of matrix products.
        kind: the program's.
        head: quantizes embedding and head; None where they stay float.
    """

    layers: Layers
    chain: Activations
    tokens: Sequence[Mapping[str, Any]]
    short: Activations
    ends: Activations
    channels: Mapping[str, Tensor]
    context: PassContext
    precision: Precision
    kind: str
    head: Head | None = None

    @classmethod
    def of(cls, program: Program, context: PassContext, precision: Precision, head: Head | None = None) -> Costs:
        layers = split(Observe().apply(program, context).program)
        layers = replace(layers, epilogue=layers.epilogue.on(context.device))
        done = context.checkpoints.load("budget-channels", 0)
        channels = channel_weights(program, split(program), context, precision) if done is None else done[0]
        if done is None:
            context.checkpoints.save("budget-channels", 0, channels, {})
        few = tuple(first_tokens(context.calibration, MEASURED_TOKENS))
        tokens = calibration_batches(program, few, BATCH)
        chain = Activations(calibration_batches(program, context.calibration, BATCH), context.device)
        short = Activations(tokens, context.device)
        for values in (chain, short):
            values.advance(layers.prologue)
        ends = short.fork()
        with context.progress.task("running the float model", len(layers.layers)) as task:
            for layer in layers.layers:
                ends.advance(layer)
                task.advance()
        return cls(layers, chain, tokens, short, ends, channels, context, precision, program.kind, head)

    def table(self, found: Sequence[Site]) -> list[list[float]]:
        """The divergence that every option of every site causes alone; finished layers are checkpoints."""
        chain, short = self.chain.fork(), self.short.fork()
        by_paths = {site.paths: site for site in found}
        checkpoints, costs = self.context.checkpoints, {}
        with self.context.progress.task("budget: what choices cost", len(self.layers.layers)) as task:
            for index, layer in enumerate(self.layers.layers):
                behind = chain.fork()
                behind.advance(layer, precision=self.precision)
                done = checkpoints.load(Budget.name, index)
                if done is None:
                    rows = self._layer(index, by_paths, chain, behind, short)
                    done = {}, {"costs": [[list(paths), row] for paths, row in rows.items()]}
                    checkpoints.save(Budget.name, index, *done)
                costs |= {tuple(paths): row for paths, row in done[1]["costs"]}
                chain = behind
                short.advance(layer)
                trim()
                task.advance()
        return [costs[site.paths] for site in found]

    def of_head(self, program: Program, site: Site) -> list[float]:
        """The divergence that every form of head and embedding causes alone; finished forms are checkpoints.

        Args:
            program: the float one.
            site: of the heads.
        """
        head, checkpoints = self.head or Head(), self.context.checkpoints
        hessians: Mapping[str, Tensor] | None = None
        costs: list[float] = []
        with self.context.progress.task("budget: what forms of the head cost", len(site.options)) as task:
            for index, option in enumerate(site.options):
                done = checkpoints.load(f"{Budget.name}-head", index)
                if done is None:
                    divergence = 0.0
                    if option.quantizes:
                        if hessians is None and any(scheme.bits in FITTED for scheme in option.schemes.values()):
                            hessians = head.hessians(program, self.context)
                        trial = head.quantized(with_schemes(program, option.schemes), hessians or {})
                        divergence = self._of(trial.program)
                    done = {}, {"divergence": divergence}
                    checkpoints.save(f"{Budget.name}-head", index, *done)
                costs.append(done[1]["divergence"])
                trim()
                task.advance()
        return costs

    def _layer(
        self,
        index: int,
        found: Mapping[tuple[str, ...], Site],
        chain: Activations,
        behind: Activations,
        short: Activations,
    ) -> dict[tuple[str, ...], list[float]]:
        """The divergence of every option of a layer's sites, by their linears' paths.

        Args:
            chain, behind: the float model's values in front of the layer and behind it.
            short: those in front of it, of the tokens on which divergences are measured.
        """
        layer = self.layers.layers[index]
        costs = {}
        for nodes, statistic, inputs in self._observed(layer, chain):
            site = found[tuple(node.meta[LINEAR].path for node in nodes)]

            def tried(
                option: Option, nodes: list[fx.Node] = nodes, seen: Statistic = statistic, at: Activations = inputs
            ) -> Stage:
                return _with_weights(layer, self._fitted(layer, nodes, seen, option, at))

            errors, divergence, measured = [], 0.0, site.measured
            for position, option in enumerate(site.options):
                if not option.quantizes:
                    errors.append(0.0)
                    continue
                trial = tried(option)
                errors.append(self._error(trial, chain, behind))
                if position == measured:
                    divergence = self._alone(index, trial, short)
                trial.discard()
            worst = max(range(len(errors)), key=errors.__getitem__)
            if errors[measured] < MEASURABLE * errors[worst]:
                measured = worst
                trial = tried(site.options[worst])
                divergence = self._alone(index, trial, short)
                trial.discard()
            reference = errors[measured]
            costs[site.paths] = [divergence * error / reference if reference > 0 else 0.0 for error in errors]
            release()
        return costs

    def _observed(self, layer: Stage, chain: Activations) -> Iterator[tuple[list[fx.Node], Statistic, Activations]]:
        """The linears behind each observer of a layer, what it saw of the float model's inputs, and the values then."""
        behind = decoder_linears(layer.module.graph)
        inputs = chain.fork()
        for part in segments(layer, list(behind)):
            seen = [observer for observer in behind if observer.name in part.outputs]
            statistics = [Statistic.of(observer, behind[observer]) for observer in seen]

            def visit(values: Values, here: Sequence[Statistic] = statistics) -> None:
                for statistic in here:
                    statistic.add(values)

            inputs.advance(part, visit, self.precision)
            for observer, statistic in zip(seen, statistics, strict=True):
                yield behind[observer], statistic, inputs

    def _fitted(
        self, layer: Stage, nodes: Sequence[fx.Node], statistic: Statistic, option: Option, inputs: Activations
    ) -> dict[str, Tensor]:
        """The dequantized weights of an option, fitted as ``ptq`` fits them, by path."""
        for node in nodes:
            info = node.meta[LINEAR]
            node.meta[LINEAR] = replace(info, scheme=option.schemes[info.path])
        quantized = [node for node in nodes if not node.meta[LINEAR].scheme.dense]
        # The fit drops the sums of what it is given.
        own = replace(statistic, linears=quantized, sums=list(statistic.sums))
        tensors, _ = Ptq(precision=self.precision).fit_behind(layer.module, own, inputs)
        weights = {}
        for node in quantized:
            path, scheme = node.meta[LINEAR].weight, weight_scheme(node, DEFAULT_GROUP)
            columns = get_attribute(layer.module, path).shape[-1]
            weights[path] = dequantized(tensors, path, scheme, columns)
        return weights

    @torch.no_grad()
    def _error(self, trial: Stage, chain: Activations, behind: Activations) -> float:
        """The error behind a layer with other weights, see :func:`.training.reconstruction`."""
        moved = trial.on(chain.device)
        errors = []
        for values, after in zip(chain, behind, strict=True):
            with matrix_products(self.precision, chain.device):
                outputs = moved.run(values)
            targets = {name: after[name] for name in trial.outputs if name in self.channels and name in after}
            weights = {name: self.channels[name].to(chain.device) for name in targets}
            errors.append(float(reconstruction(outputs, targets, weights)))
        if moved is not trial:
            moved.discard()
        return sum(errors) / len(errors)

    def _alone(self, index: int, trial: Stage, short: Activations) -> float:
        """The divergence of the float model's output where one layer has other weights."""
        values = short.fork()
        for stage in (trial, *self.layers.layers[index + 1 :]):
            values.advance(stage)
        return self._divergence(self.layers, values)

    @torch.no_grad()
    def _divergence(self, layers: Layers, behind: Activations) -> float:
        """The mean divergence of outputs from the float model's, from values behind the last layer."""
        divergence = divergence_of(self.kind)
        found = [
            float(divergence(finish(self.layers, target).float(), finish(layers, values).float()))
            for target, values in zip(self.ends, behind, strict=True)
        ]
        return sum(found) / len(found)

    def measured(self, program: Program, prefix: str = "") -> float:
        """The divergence of a float program's output where its linears are quantized as their schemes say.

        Args:
            prefix: of the checkpoints' names, which differs where the schemes do.
        """
        kept = PassCheckpoints(self.context.checkpoints, f"{Budget.name}-{prefix}")
        context = replace(self.context, checkpoints=kept)
        observed = Observe().apply(program, context).program
        fitted = Ptq(precision=self.precision).apply(observed, context).program
        return self._of(fitted if self.head is None else self.head.apply(fitted, context).program)

    def _of(self, program: Program) -> float:
        """The mean divergence of a program's output from the float model's."""
        layers = split(_unpacked_outside(program))
        layers = replace(layers, epilogue=layers.epilogue.on(self.context.device))
        values = Activations(self.tokens, self.context.device)
        for stage in (layers.prologue, *layers.layers):
            values.advance(stage)
        return self._divergence(layers, values)


def _unpacked_outside(program: Program) -> Program:
    """The program with the matrices outside the decoder layers dequantized: computed, they would be among the values
    that every layer hands on."""
    program = program.copy()
    for node in calls(program.graph, *UNPACKED):
        if node.meta.get(LAYER) is None:
            path = f"{node.name}_dequantized"
            set_attribute(program.module, path, node.target(*(constant(program.module, part) for part in node.args)))
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(make_attribute(program.graph, path, node))
            program.graph.erase_node(node)
    program.module.recompile()
    return program


def _with_weights(stage: Stage, weights: Mapping[str, Tensor]) -> Stage:
    """A stage with other weights in the place of some."""
    changed = replace(stage, module=copy_module(stage.module))
    for path, weight in weights.items():
        set_weight(changed, path, weight)
    return changed
