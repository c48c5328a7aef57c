"""``activate``, the third stage: 4-bit activations and KV cache, with learned clip factors.

Inserts quantizers in front of the decoder linears, one per distinct input, and on keys and values before they are
repeated for grouped queries (keys after the rotary embedding). Ranges are dynamic: a factor scales the range that a
token's group has. These factors and the levels of the weights then train under quantized activations; sign planes and
bitmaps are frozen, because training them there diverges (LBLLM, arXiv 2604.19167, stage "AAR" and table 3), and
weights of 4-bit codes stay as they were fitted. With ``epochs``, each layer trains against the float layer, as in the
paper; with ``steps``, all layers train together against the float model's output.

Given::

    %q = aten.linear(%x, %q_weight)
    %key = aten.transpose.int(%key_heads, 1, 2)
    %value = aten.transpose.int(%value_heads, 1, 2)
    %out = aten.scaled_dot_product_attention(%query, %key, %value)

Result::

    %clip: f32[2] = weight model.layers.0.self_attn.q_proj.input_clip
    %xq = lbllm.fake_quantize(%x, %clip, 4, 64)
    %q = aten.linear(%xq, %q_weight)
    %key = aten.transpose.int(%key_heads, 1, 2)
    %key4 = lbllm.fake_quantize_kv(%key, 4)
    %value = aten.transpose.int(%value_heads, 1, 2)
    %value4 = lbllm.fake_quantize_kv(%value, 4)
    %out = aten.scaled_dot_product_attention(%query, %key4, %value4)

With ``ranges=knees``, four bits are not uniform over the range but in three regions, as in the paper (equation 2): a
core and two tails, which meet at knees that train, too. They stand behind the group, ``fake_quantize(%x, %clip, 4, 0,
%knees)``, and start where the error is smallest on calibration inputs. What is the paper's in them and what is ours is
told at :func:`..codegen.reference.knee_table`. With ``ranges=planes``, as in BWA, a code's four binary planes have
scales in place of 1, 2, 4 and 8 (:func:`..codegen.reference.plane_table`), which are fitted to calibration inputs by
least squares (:mod:`.calibrate.plane_scales`) and not trained: ``fake_quantize(%x, %clip, 4, 0, None, %plane_scales)``.
Either way a linear multiplies int8 values, as with 8-bit activations.

The state that does best on held-out sequences is kept, the untrained one included. Errors of the layers are reported as
by ``distill`` (without ``epochs`` on a couple of held-out batches alone), and the divergence of the whole model's
output, with untrained quantizers and with trained ones.

Needs ``ptq`` before it, the float program as ``context.teacher``, calibration and validation batches.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ..codegen import operators as operators
from ..codegen.operators import Arguments, set_argument
from ..codegen.operators.lbllm.linears import WEIGHT
from ..codegen.reference import UNIFORM_PLANES
from ..codegen.sizes import ACTIVATION_BITS, DEFAULT_GROUP, GROUPS
from .annotate import decoder_linears, shared_scheme
from .base import CALIBRATING, Contract, Count, Pass, PassContext, PassError, PassResult, Positive, Rate
from .calibrate.alignment import Together, Whole
from .calibrate.chains import Chains, Trained, layer_errors, paired_layers, train_layers, with_tensors
from .calibrate.code_tables import fit_code_tables
from .calibrate.knees import UNPLACED
from .calibrate.layers import LAYER_SEQUENCES, Layers, Stage
from .calibrate.precision import Precision
from .calibrate.ranges import input_ranges
from .calibrate.simulate import KNEE_LOGIT, LOGIT, LevelWeight, Lifted, clip_factors, knee_logits, knee_shares
from .calibrate.training import Group, step_scale, train_epochs
from .ir.annotations import LINEAR
from .ir.attention import ATTENTIONS, AttentionCall
from .ir.program import Program, get_attribute, set_attribute
from .ir.rewrite import UNPACKED, before_repeat, calls, is_call, make_attribute, make_call, operands_of, table_shape
from .ir.scheme import Scheme
from .observe import nothing_to_quantize

STREAM = 2 << 20
"""First generator stream of this pass; layer ``i`` uses ``STREAM + i``."""

MEASURED = 1
"""Held-out batches on which the layers are measured where all train together: ``finetune``, which ends the
calibration, measures them on all."""

_lbllm = torch.ops.lbllm


@dataclass(frozen=True)
class Activate(Pass):
    """Quantizes activations and the KV cache and trains clip factors and levels.

    Attributes:
        bits: of the linears' inputs: 4, 8 or 16.
        group: channels per activation scale, where the weights' group is not smaller; 0 for one scale per token. Like
            ``bits`` and ``ranges``, it is for linears whose scheme leaves it open.
        kv: bits of keys and values: 4, 8 or 16.
        epochs: passes over ``sequences`` of the calibration set, layer by layer. On few tokens the layers come closer
            to the float ones while the model's output drifts away, so ``steps`` alone are the default.
        steps: batches on which all layers then train together on the whole model's output.
        batch: sequences per step.
        sequences: calibration sequences that ``epochs`` pass over, at most; ``steps`` take theirs from all.
        ranges: ``clip`` for codes that are uniform over a clipped range, ``knees`` for three uniform regions of it,
            ``planes`` for codes whose binary planes have fitted scales (both for 4 bits only).
        lr_clip: peak learning rate of the clip factors' logits; 0 keeps the factors at 1.
        lr_knees: of the knees' logits; 0 keeps the knees where they started.
        lr_levels: of levels, in standard deviations of the matrix; 0 keeps the levels. Layer by layer, all rates are
            scaled to the number of steps.
        precision: of the matrix products on the calibration set.
    """

    bits: int = 4
    group: int = DEFAULT_GROUP
    kv: int = 4
    epochs: Count = 0
    steps: Count = 8
    batch: Positive = 4
    sequences: Positive = LAYER_SEQUENCES
    ranges: Literal["clip", "knees", "planes"] = "clip"
    lr_clip: Rate = 5e-2
    lr_knees: Rate = 2e-2
    lr_levels: Rate = 5e-3
    precision: Precision = "auto"

    name: ClassVar[str] = "activate"
    contract: ClassVar[Contract] = CALIBRATING

    def rehearsal(self) -> Activate:
        return dataclasses.replace(self, epochs=min(self.epochs, 1), steps=min(self.steps, 1))

    def apply(self, program: Program, context: PassContext) -> PassResult:
        self._check(program)
        dense = nothing_to_quantize(self.name, program, context)
        program = insert_quantizers(program, self.bits, self.group, self.kv, self.ranges)
        if dense:
            return PassResult(program)
        pair = paired_layers(self.name, program, context)
        if any(table_shape(n) for n in calls(program.graph, _lbllm.fake_quantize.default)):
            fit_code_tables(program, context.calibration[0], context.progress)
        together = Together(
            steps=self.steps,
            every=max(self.steps, 1),
            lr_levels=self.lr_levels,
            lr_clip=self.lr_clip,
            lr_knees=self.lr_knees,
            title="stage 3: training on the whole model's output",
            stream=STREAM - 1,
        )
        if self.epochs:
            whole, trained = self._train_layers(program, pair, context)
            tensors, summary = together.run(program.kind, lambda: whole, context, trained.tensors)
        else:

            def start() -> Whole:
                generator = context.generator(STREAM - 2)
                return Whole.start(program, pair, context, self.batch, self.steps, self.precision, generator)

            tensors, summary = together.run(program.kind, start, context, {})
            rows = layer_errors(self.name, with_tensors(program, tensors), context, self.batch, MEASURED)
            trained = Trained({}, rows, {})
        program = with_tensors(program, tensors)
        summary = {**summary, "input_ranges": input_ranges(program, context.calibration[0])}
        return PassResult(program, trained.rows, summary, trained.channel_weights)

    def _train_layers(
        self, program: Program, pair: tuple[Layers, Layers], context: PassContext
    ) -> tuple[Whole, Trained]:
        """Trains layer by layer; returns the whole program as it came, and what the layers learned."""
        teacher, student = pair
        chains = Chains.start(program, teacher, student, context, self.batch, self.precision, sequences=self.sequences)
        behind_prologue = chains.student.fork(), chains.student_validation.fork()
        trained = train_layers(
            self.name,
            "stage 3: training clip factors and levels",
            program,
            pair,
            chains,
            context,
            lambda lifted, layer, index: self._train(lifted, layer, chains, context, index),
        )
        training, validation = behind_prologue
        chains = dataclasses.replace(chains, student=training, student_validation=validation)
        return Whole.of(pair, chains, program.kind), trained

    def _check(self, program: Program) -> None:
        for option, value in (("bits", self.bits), ("kv", self.kv)):
            if value not in ACTIVATION_BITS:
                raise PassError(f"activate: {option} cannot be {value}; choose one of 4, 8, 16")
        if self.ranges != "clip" and self.bits != 4:
            raise PassError(f"activate: {self.bits}-bit activations have no {self.ranges}; use bits=4 or ranges=clip")
        linears = [n for users in decoder_linears(program.graph).values() for n in users]
        if any(is_call(operands_of(n)[0], _lbllm.fake_quantize.default) for n in linears):
            raise PassError("the activations are quantized already; use 'activate' once")
        if not all(is_call(operands_of(n)[1], *UNPACKED) for n in linears):
            raise PassError("activate needs quantized weights; run 'ptq' before it")
        open_ones = [n for n in linears if n.meta[LINEAR].scheme.group is None]
        free = [n for n in open_ones if n.meta[LINEAR].scheme.act_group is None]
        widest = min((Arguments(operands_of(n)[1]).group for n in free), default=max(GROUPS))
        if self.group not in (0, *(g for g in GROUPS if g <= widest)):
            choices = ", ".join(str(g) for g in GROUPS if g <= widest)
            raise PassError(
                f"activate: group cannot be {self.group}; choose {choices}, as the weights have groups of {widest}, or"
                " 0 for per token"
            )

    def _train(
        self, lifted: Lifted, teacher: Stage, chains: Chains, context: PassContext, index: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Trains one layer; returns its packed levels, its clip factors, its knees and figures."""
        start = time.perf_counter()
        packed = {path: lifted.stored(path) for path in lifted.weights}
        levels = {path: LevelWeight.of(weight, lifted.rules[path]) for path, weight in packed.items()}
        logits = {path: torch.full((2,), LOGIT, device=lifted.stage.device) for path in lifted.clips}
        placed = {path: get_attribute(lifted.stage.module, path) for path in lifted.knees}
        knees = {path: knee_logits(shares) for path, shares in placed.items()}
        scale = step_scale(self.epochs * len(chains.student))
        groups = [Group(tuple(logits.values()), self.lr_clip * scale, high=LOGIT)] if logits else []
        if knees:
            groups.append(Group(tuple(knees.values()), self.lr_knees * scale, low=-KNEE_LOGIT, high=KNEE_LOGIT))
        for path, weight in levels.items():
            # Columns of outliers, which are last and loud, have no levels that could train.
            trained = get_attribute(teacher.module, path)[..., : packed[path].in_features]
            deviation = float(trained.float().std())
            groups.append(Group((weight.parameters,), self.lr_levels * deviation * scale))

        constants = lifted.constants()

        def parameters() -> dict[str, Tensor]:
            ranges = {path: clip_factors(logit) for path, logit in logits.items()}
            ranges |= {path: knee_shares(logit) for path, logit in knees.items()}
            return {path: weight.simulate() for path, weight in levels.items()} | ranges | constants

        def loss(index: int) -> Tensor:
            return chains.training_error(lifted, parameters(), index)

        def validate() -> float:
            return chains.validation_error(lifted, parameters())

        outcome = train_epochs(
            groups,
            loss,
            validate,
            context.generator(STREAM + index),
            len(chains.student),
            self.epochs,
            self.precision,
            lambda steps: context.progress.task(f"layer {index}", steps),
        )
        tensors: dict[str, Tensor] = {path: clip_factors(logit) for path, logit in logits.items()}
        trained = outcome.step and self.lr_knees > 0
        tensors.update({path: knee_shares(knees[path]) if trained else shares for path, shares in placed.items()})
        for path, weight in levels.items():
            folded = weight.fold() if outcome.step and self.lr_levels > 0 else packed[path]
            tensors.update({f"{path}.{name}": getattr(folded, name) for name in WEIGHT})
        metrics = {
            "start": outcome.before,
            "after": outcome.after,
            "step": outcome.step,
            "curve": dict(outcome.curve),
            "clips": {path: [round(v, 4) for v in tensors[path].tolist()] for path in lifted.clips},
            **({"knees": {path: [round(v, 4) for v in tensors[path].tolist()] for path in knees}} if knees else {}),
            "seconds": time.perf_counter() - start,
        }
        return tensors, metrics


def insert_quantizers(program: Program, bits: int, group: int, kv_bits: int, ranges: str = "clip") -> Program:
    """Puts quantizers, without clipping, in front of the decoder linears and on a language model's keys and values.

    Args:
        bits, group, ranges: of the quantizers whose linears' schemes leave them open;
            :func:`.code_tables.fit_code_tables` must place knees and fit plane scales. Only 4 bits have any, and where
            the weights' group is smaller than ``group`` it is taken instead.

    Raises:
        PassError: linears that read the same input want different quantizers.
    """
    program = program.copy()
    graph = program.graph
    for source, linears in decoder_linears(graph).items():
        path = linears[0].meta[LINEAR].path
        scheme = quantizer_scheme(shared_scheme(linears), bits, group, ranges)
        factors = {"clip": torch.ones(2)}
        if scheme.codebook == "knees":
            factors["knees"] = torch.full((2,), UNPLACED)
        elif scheme.codebook == "planes":
            factors["plane_scales"] = torch.tensor(UNIFORM_PLANES)
        for name, tensor in factors.items():
            set_attribute(program.module, f"{path}.input_{name}", tensor)
        with graph.inserting_before(linears[0]):
            clip, *rest = [make_attribute(graph, f"{path}.input_{name}", linears[0]) for name in factors]
            table = (None, *rest) if scheme.codebook == "planes" else rest
            arguments = (source, clip, scheme.act_bits, scheme.act_group, *table)
            quantized = make_call(graph, _lbllm.fake_quantize.default, arguments, linears[0])
        for linear in linears:
            set_argument(linear, "x" if linear.target is _lbllm.grouped_linear.default else "input", quantized)
    _quantize_outliers(program, bits)
    if program.kind == "causal-lm":
        _quantize_keys_and_values(graph, kv_bits)
    program.module.recompile()
    return program


def quantizer_scheme(scheme: Scheme, bits: int, group: int, ranges: str) -> Scheme:
    """A quantizer's scheme with these options in place of what it leaves open."""
    bits = scheme.act_bits or bits
    narrower = min(group, scheme.group) if scheme.group else group
    act_group = narrower if scheme.act_group is None else scheme.act_group
    codebook = scheme.codebook or ("none" if ranges == "clip" or bits != 4 else ranges)
    return Scheme(act_bits=bits, act_group=act_group, codebook=codebook)


def _quantize_outliers(program: Program, bits: int) -> None:
    """Puts quantizers of 8 bits, or of ``bits`` where those are more, with one scale a token, in front of the linears
    over outliers; those with the same input share one."""
    graph = program.graph
    quantized: dict[fx.Node, fx.Node] = {}
    for linear in [n for n in graph.nodes if LINEAR in n.meta and n.meta[LINEAR].role == "outliers"]:
        source, _ = operands_of(linear)
        if source not in quantized:
            path = f"{linear.meta[LINEAR].path}.input_clip"
            set_attribute(program.module, path, torch.ones(2))
            with graph.inserting_before(linear):
                clip = make_attribute(graph, path, linear)
                arguments = (source, clip, max(8, bits), 0)
                quantized[source] = make_call(graph, _lbllm.fake_quantize.default, arguments, linear)
        linear.replace_input_with(source, quantized[source])


def _quantize_keys_and_values(graph: fx.Graph, bits: int) -> None:
    quantized: dict[fx.Node, fx.Node] = {}
    for attention in calls(graph, *ATTENTIONS):
        call = AttentionCall.of(attention)
        for operand in (call.key, call.value):
            user, source = before_repeat(attention, operand)
            if source not in quantized:
                with graph.inserting_after(source):
                    node = make_call(graph, _lbllm.fake_quantize_kv.default, (source, bits), source)
                quantized[source] = node
            user.replace_input_with(source, quantized[source])
