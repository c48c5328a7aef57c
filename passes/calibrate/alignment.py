"""Levels, clip factors and norms tuned on the whole model's output.

Layer by layer, every layer comes closer to the float one, and the output can still drift from it, because a layer does
not know which of its errors matter behind it. So what the layers learned is a proposal: of levels and clip factors,
each trained or as they came, the pair whose output is closest to the float model's on held-out sequences is kept. From
there the levels and clip factors of all layers train together against the float model's output, and so may the weights
of norms, and biases. Planes stay frozen, or follow the levels: then each element takes the level next to its latent
weight, which may train, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...codegen.format import QuantizedWeight
from ...codegen.operators.lbllm.linears import WEIGHT
from ..base import PassContext, PassError
from ..ir.program import Program, get_attribute
from ..ir.rewrite import INTEGER_LINEARS, calls
from ..ir.spool import release
from .chains import Chains, parameters_of, weight_of
from .layers import Activations, Layers, Values, finish
from .precision import Precision, restored
from .simulate import (
    KNEE_LOGIT,
    LOGIT,
    LevelWeight,
    Lifted,
    NearestWeight,
    clip_factors,
    clip_logits,
    flips,
    knee_logits,
    knee_shares,
    lift,
)
from .training import Group, Outcome, train

Planes = Literal["frozen", "nearest"]
"""What becomes of planes where all layers train together: nothing, or elements take the level next to their latent."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Scalar distance of a student's output from the teacher's, differentiable in the second."""

_QUANTIZED_HEAD = (torch.ops.lbllm.fake_quantize.default, *INTEGER_LINEARS)

KL_TOKENS = 32
"""Tokens whose probabilities are computed at a time, so that they stay in the processor's cache."""

MEASURES = {"causal-lm": "kl", "module": "error"}
"""What the distance from the float model is called, by kind of program."""


@dataclass(frozen=True)
class Whole:
    """A quantized program as layers, to be run end to end.

    Attributes:
        layers: the lifted decoder layers, on the CPU until all train together.
        teacher: the float program.
        student: the quantized program.
        training, validation: values behind the prologue.
        teacher_training, teacher_validation: the float model's values behind its last layer.
        divergence: distance from the float model's output, on validation.
        objective: the same as training lowers it.
        precision: of matrix products on the training set.
    """

    layers: Sequence[Lifted]
    teacher: Layers
    student: Layers
    training: Activations
    validation: Activations
    teacher_training: Activations
    teacher_validation: Activations
    divergence: Divergence
    objective: Divergence
    precision: Precision

    @classmethod
    def of(cls, pair: tuple[Layers, Layers], chains: Chains, kind: str) -> Whole:
        """From teacher and student, and chains of which the teacher's have passed all layers and the student's none.

        Args:
            kind: the program's.
        """
        device = chains.student.device
        teacher, student = (replace(layers, epilogue=layers.epilogue.on(device)) for layers in pair)
        lifted = [lift(layer) for layer in student.layers]
        values = chains.student, chains.student_validation, chains.teacher, chains.teacher_validation
        return cls(lifted, teacher, student, *values, divergence_of(kind), divergence_of(kind), chains.precision)

    def on(self, device: torch.device) -> Whole:
        """The program with its decoder layers on a device, all of them at once."""
        return replace(self, layers=[layer.on(device) for layer in self.layers])

    @classmethod
    def start(
        cls,
        program: Program,
        pair: tuple[Layers, Layers],
        context: PassContext,
        batch: int,
        steps: int,
        precision: Precision,
        generator: torch.Generator,
        deviation: float = 0.0,
    ) -> Whole:
        """From the program as it is, with the batches of ``batch`` sequences that ``steps`` steps have a use for.

        Args:
            deviation: see :func:`kl_loss`.

        Raises:
            PassError: the program's output head is quantized, which has no gradient.
        """
        teacher, student = pair
        if calls(student.epilogue.module.graph, *_QUANTIZED_HEAD):
            raise PassError("the output head is quantized already; training needs a float one, move it before 'head'")

        def chosen(count: int) -> Sequence[int]:
            return torch.randperm(count, generator=generator)[:steps].tolist()

        chains = Chains.start(program, teacher, student, context, batch, precision, chosen)
        with context.progress.task("running the float model", len(teacher.layers)) as task:
            for layer in teacher.layers:
                chains.teach(layer)
                task.advance()
        whole = cls.of(pair, chains, program.kind)
        return replace(whole, objective=divergence_of(program.kind, deviation))

    def output(self, values: Values, parameters: Mapping[str, Tensor]) -> Tensor:
        """The program's output; decoder layers are recomputed in the backward pass, so that one at a time is held."""
        for lifted in self.layers:
            run = checkpoint(lifted.run, values, parameters, use_reentrant=False, preserve_rng_state=False)
            values = {**values, **run}
            values = {name: value for name, value in values.items() if name in lifted.stage.live}
        return finish(self.student, {name: restored(v, self.precision) for name, v in values.items()})

    def loss(self, index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Divergence on one training batch."""
        with torch.no_grad():
            target = finish(self.teacher, self.teacher_training[index])
        return self.objective(target.float(), self.output(self.training[index], parameters).float())

    @torch.no_grad()
    def validate(self, parameters: Mapping[str, Tensor]) -> float:
        """Mean divergence on held-out sequences, in float32."""
        total = 0.0
        for values, teacher in zip(self.validation, self.teacher_validation, strict=True):
            target = finish(self.teacher, teacher)
            total += float(self.divergence(target, self.output(values, parameters)))
        return total / len(self.validation)

    @torch.no_grad()
    def validate_stored(self, stored: Mapping[str, Tensor]) -> float:
        """What :meth:`validate` gives for stored tensors, on one layer's dequantized weights at a time."""
        chain = self.validation.fork()
        for lifted in self.layers:
            chain.advance(lifted.bind(parameters_of(lifted, stored)))
        total = 0.0
        for values, teacher in zip(chain, self.teacher_validation, strict=True):
            target = finish(self.teacher, teacher)
            total += float(self.divergence(target, finish(self.student, values)))
        release()
        return total / len(self.validation)


@dataclass(frozen=True)
class Start:
    """Where training on the whole model's output begins.

    Attributes:
        tensors: stored tensors by path; what is left out stays as the program has it.
        name: what they are, in words.
        before: divergence of the program as it came.
        divergence: of the program with ``tensors``.
    """

    tensors: Mapping[str, Tensor]
    name: str
    before: float
    divergence: float


def best_start(whole: Whole, trained: Mapping[str, Tensor]) -> Start:
    """Of levels and clip factors, each as they came or as the layers trained them, the pair that validates best.

    Args:
        trained: stored tensors of all layers, ``<path>.sign`` and so on, and clip factors by path; none if the layers
            have not trained.
    """
    ranges = {path for lifted in whole.layers for path in lifted.ranges}
    before = whole.validate_stored({})
    best = Start({}, "levels and clips as before", before, before)
    if not trained:
        return best
    for with_levels, with_clips in ((True, False), (False, True), (True, True)):
        kept = {path: t for path, t in trained.items() if (with_clips if path in ranges else with_levels)}
        reached = whole.validate_stored(kept)
        if reached < best.divergence:
            words = "trained" if with_levels else "as before", "trained" if with_clips else "as before"
            best = Start(kept, f"levels {words[0]}, clips {words[1]}", before, reached)
    return best


@dataclass(frozen=True)
class Together:
    """How to train the levels and clip factors of all layers together.

    Attributes:
        steps: of training.
        every: steps between validations.
        lr_levels: peak learning rate of levels, in standard deviations of their matrix.
        lr_clip: of the clip factors' logits.
        title: of the progress bar.
        stream: generator stream that decides the order of the batches.
        lr_knees: of the knees' logits, where activations have knees.
        lr_norms: of the weights of norms and of biases inside layers, in root mean squares of each; one of zeros stays.
        planes: whether planes change.
        lr_weight: of the latents behind planes that do, in standard deviations of their matrix; with 0 planes change
            with levels alone.
        stage: name of the checkpoints.
    """

    steps: int
    every: int
    lr_levels: float
    lr_clip: float
    title: str
    stream: int
    lr_knees: float = 0.0
    lr_norms: float = 0.0
    planes: Planes = "frozen"
    lr_weight: float = 0.0
    stage: str = "together"

    def run(
        self, kind: str, whole: Callable[[], Whole], context: PassContext, trained: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Trains from the best start, unless a checkpoint holds the result already.

        Args:
            kind: of the program.
            whole: prepares it.
            trained: see :func:`best_start`.

        Returns:
            The stored tensors by path, and figures: ``kl_before`` and ``kl_after`` (a plain module's are
            ``error_...``), what ``start`` was, the ``step`` that is kept, and ``sign_flips`` and ``bitmap_flips``, the
            shares of elements that training gave another bit, where planes may change.
        """
        done = context.checkpoints.load(self.stage, 1)
        if done is None:
            prepared = whole()
            start = best_start(prepared, trained)
            tensors, outcome, flipped = self._train(prepared, start, context)
            measure = MEASURES[kind]
            figures = {f"{measure}_before": start.before, f"{measure}_after": outcome.after}
            figures |= {"start": start.name, "step": outcome.step, **flipped}
            done = tensors, {"layers": len(prepared.layers), **figures}
            done[1]["curve"] = dict(outcome.curve)
            context.checkpoints.save(self.stage, 1, *done)
        return done

    def _train(
        self, whole: Whole, start: Start, context: PassContext
    ) -> tuple[dict[str, Tensor], Outcome, dict[str, float]]:
        stored = {path: get_attribute(layer.stage.module, path) for layer in whole.layers for path in layer.ranges}
        stored.update(start.tensors)
        if not self.steps:
            return stored, Outcome(start.divergence, start.divergence, 0), self._flips({}, {})
        whole = whole.on(context.device)
        stored = {path: tensor.to(context.device) for path, tensor in stored.items()}
        logits = {path: clip_logits(stored[path]) for layer in whole.layers for path in layer.clips}
        knees = {path: knee_logits(stored[path]) for layer in whole.layers for path in layer.knees}
        packed = {path: weight_of(layer, path, stored) for layer in whole.layers for path in layer.weights}
        levels = self._trainable(whole, packed)
        groups = [Group(tuple(logits.values()), self.lr_clip, high=LOGIT)] if logits else []
        if knees:
            groups.append(Group(tuple(knees.values()), self.lr_knees, low=-KNEE_LOGIT, high=KNEE_LOGIT))
        for weight in levels.values():
            deviation = float(weight.simulate().std())
            groups.append(Group((weight.parameters,), self.lr_levels * deviation))
            if isinstance(weight, NearestWeight):
                groups.append(Group((weight.latent,), self.lr_weight * deviation))

        constants = {path: weight for layer in whole.layers for path, weight in layer.constants().items()}
        given = {path: vector for layer in whole.layers for path, vector in layer.stored_vectors().items()}
        vectors = {path: vector.float().clone() for path, vector in given.items()}
        for vector in vectors.values():
            groups.append(Group((vector,), self.lr_norms * float(vector.square().mean().sqrt())))

        def current() -> dict[str, Tensor]:
            ranges = {path: clip_factors(logit) for path, logit in logits.items()}
            ranges |= {path: knee_shares(logit) for path, logit in knees.items()}
            norms = {path: vector.to(given[path].dtype) for path, vector in vectors.items()}
            return {**constants, **{path: weight.simulate() for path, weight in levels.items()}, **ranges, **norms}

        with context.progress.task(self.title, max(self.steps, 1)) as task:
            outcome = train(
                groups,
                lambda index: whole.loss(index, current()),
                lambda: whole.validate(current()),
                context.generator(self.stream),
                batches=len(whole.training),
                steps=self.steps,
                every=self.every,
                precision=whole.precision,
                before=start.divergence,
                checkpoints=context.checkpoints,
                name=self.stage,
                report=lambda latest: task.advance(f"{start.divergence:.4f} -> {latest:.4f}"),
            )
        if outcome.step and self.lr_clip > 0:
            stored.update({path: clip_factors(logit) for path, logit in logits.items()})
        if outcome.step and self.lr_knees > 0:
            stored.update({path: knee_shares(logit) for path, logit in knees.items()})
        if outcome.step and self.lr_norms > 0:
            stored.update({path: vector.to(given[path].dtype) for path, vector in vectors.items()})
        folded = packed
        if outcome.step and max(self.lr_levels, self.lr_weight) > 0:
            folded = {path: weight.fold() for path, weight in levels.items()}
            stored.update({f"{path}.{name}": getattr(w, name) for path, w in folded.items() for name in WEIGHT})
        return {path: tensor.cpu() for path, tensor in stored.items()}, outcome, self._flips(packed, folded)

    def _trainable(
        self, whole: Whole, packed: Mapping[str, QuantizedWeight]
    ) -> dict[str, LevelWeight] | dict[str, NearestWeight]:
        """What trains of each matrix, by path."""
        rules = {path: layer.rules[path] for layer in whole.layers for path in layer.weights}
        if self.planes == "frozen":
            return {path: LevelWeight.of(weight, rules[path]) for path, weight in packed.items()}
        found = {}
        for layer, teacher in zip(whole.layers, whole.teacher.layers, strict=True):
            for path in layer.weights:
                # Columns of outliers, which are last, do not train.
                original = get_attribute(teacher.module, path)[..., : packed[path].in_features]
                found[path] = NearestWeight.of(packed[path], original.to(packed[path].sign.device), rules[path])
        release()
        return found

    def _flips(self, before: Mapping[str, QuantizedWeight], after: Mapping[str, QuantizedWeight]) -> dict[str, float]:
        """Shares of elements with another sign and with another bitmap; nothing where planes are frozen."""
        if self.planes == "frozen":
            return {}
        changed = [(*flips(weight, after[path]), weight.codes().numel()) for path, weight in before.items()]
        signs, bitmaps, count = (sum(column) for column in zip(*changed, strict=True)) if changed else (0, 0, 1)
        return {"sign_flips": signs / count, "bitmap_flips": bitmaps / count}


def divergence_of(kind: str, deviation: float = 0.0) -> Divergence:
    """The distance to lower: :func:`kl_loss` for a language model, :func:`relative_loss` for a plain module."""
    if kind != "causal-lm":
        return relative_loss
    return lambda teacher, student: kl_loss(teacher, student, deviation)


def kl_loss(teacher: Tensor, student: Tensor, deviation: float = 0.0) -> Tensor:
    """Mean over tokens of ``KL(teacher || student)`` in nats, from logits ``[..., V]``.

    Args:
        deviation: with more than 0, a token weighs ``(H(teacher) * H(student)) ** deviation`` (entropies, mean weight
            1): the ambiguous ones count more (in the spirit of DB-LLM's deviation-aware distillation, ACL 2024
            Findings, 8719-8730, whose exact formula is not public).
    """
    return _KlDivergence.apply(teacher.flatten(0, -2), student.flatten(0, -2), deviation)


class _KlDivergence(torch.autograd.Function):
    """:func:`kl_loss` of ``[T, V]``, a few tokens at a time: a vocabulary's worth of floats for every token is the
    largest thing in a training step, and autograd would keep five of them."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, deviation: float) -> Tensor:
        grad = torch.empty_like(student) if ctx.needs_input_grad[1] else None
        divergences, certainties = [], []
        for rows in torch.arange(len(teacher)).split(KL_TOKENS):
            where = slice(int(rows[0]), int(rows[-1]) + 1)
            log_p, log_q = teacher[where].log_softmax(-1), student[where].log_softmax(-1)
            p, q = log_p.exp(), log_q.exp()
            if deviation > 0:
                certainties.append((p * log_p).sum(-1) * (q * log_q).sum(-1))
            if grad is not None:
                torch.sub(q, p, out=grad[where])
            divergences.append(p.mul_(log_p.sub_(log_q)).sum(-1))
        weights = teacher.new_full((len(teacher),), 1.0 / len(teacher))
        if deviation > 0:
            weights = torch.cat(certainties) ** deviation
            weights = weights / weights.sum().clamp_min(1e-12)
        if grad is not None:
            ctx.save_for_backward(grad.mul_(weights.unsqueeze(-1)))
        return (weights * torch.cat(divergences)).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = ctx.saved_tensors
        return None, grad * scale, None


def relative_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """``||student - teacher|| / ||teacher||``."""
    return (student - teacher).norm() / teacher.norm().clamp_min(1e-30)
