"""Levels and clip factors tuned on the whole model's output.

Layer by layer, every layer comes closer to the float one, and the output can still drift from it, because a layer does
not know which of its errors matter behind it. So what the layers learned is a proposal: of levels and clip factors,
each trained or as they came, the pair whose output is closest to the float model's on held-out sequences is kept. From
there the levels and clip factors of all layers train together against the float model's output; planes stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import PassContext
from .chains import Chains, parameters_of, weight_of
from .layers import Activations, Layers, Stage, Values
from .precision import Precision, restored
from .program import get_attribute
from .ptq import FIELDS
from .simulate import LOGIT, LevelWeight, Lifted, clip_factors, clip_logits
from .training import Group, Outcome, train

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Scalar distance of a student's output from the teacher's, differentiable in the second."""

MEASURES = {"causal-lm": "kl", "module": "error"}
"""What the distance from the float model is called, by kind of program."""


@dataclass(frozen=True)
class Whole:
    """A quantized program as layers, to be run end to end.

    Attributes:
        layers: the lifted decoder layers.
        epilogue: what follows them.
        result: name of the program's output.
        training, validation: values behind the prologue.
        teacher_training, teacher_validation: the float model's values behind its last layer.
        divergence: distance from the float model's output, on validation.
        objective: the same as training lowers it.
        precision: of matrix products on the training set.
    """

    layers: Sequence[Lifted]
    epilogue: Stage
    result: str
    training: Activations
    validation: Activations
    teacher_training: Activations
    teacher_validation: Activations
    divergence: Divergence
    objective: Divergence
    precision: Precision

    @classmethod
    def of(
        cls,
        layers: Sequence[Lifted],
        teacher: Layers,
        behind_prologue: tuple[Activations, Activations],
        chains: Chains,
        kind: str,
        deviation: float = 0.0,
    ) -> Whole:
        """From lifted layers and a teacher's chains that have passed all layers.

        Args:
            behind_prologue: the student's training and validation values behind the prologue.
            kind: the program's.
            deviation: see :func:`kl_loss`.
        """
        return cls(
            layers,
            teacher.epilogue,
            teacher.results[0],
            *behind_prologue,
            chains.teacher,
            chains.teacher_validation,
            divergence_of(kind),
            divergence_of(kind, deviation),
            chains.precision,
        )

    def output(self, values: Values, parameters: Mapping[str, Tensor]) -> Tensor:
        """The program's output; decoder layers are recomputed in the backward pass, so that one at a time is held."""
        for lifted in self.layers:
            run = checkpoint(lifted.run, values, parameters, use_reentrant=False, preserve_rng_state=False)
            values = {**values, **run}
            values = {name: value for name, value in values.items() if name in lifted.stage.live}
        return self._finish({name: restored(v, self.precision) for name, v in values.items()})

    def _finish(self, values: Values) -> Tensor:
        """The program's output from the values behind its last layer, which may already hold it."""
        return {**values, **self.epilogue.run(values)}[self.result]

    def loss(self, index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Divergence on one training batch."""
        with torch.no_grad():
            target = self._finish(self.teacher_training[index])
        return self.objective(target.float(), self.output(self.training[index], parameters).float())

    @torch.no_grad()
    def validate(self, parameters: Mapping[str, Tensor]) -> float:
        """Mean divergence on held-out sequences, in float32."""
        total = 0.0
        for values, teacher in zip(self.validation, self.teacher_validation, strict=True):
            target = self._finish(teacher)
            total += float(self.divergence(target, self.output(values, parameters)))
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
    clips = {path for lifted in whole.layers for path in lifted.clips}
    before = whole.validate(_parameters(whole, {}))
    best = Start({}, "levels and clips as before", before, before)
    if not trained:
        return best
    for with_levels, with_clips in ((True, False), (False, True), (True, True)):
        kept = {path: t for path, t in trained.items() if (with_clips if path in clips else with_levels)}
        reached = whole.validate(_parameters(whole, kept))
        if reached < best.divergence:
            words = "trained" if with_levels else "as before", "trained" if with_clips else "as before"
            best = Start(kept, f"levels {words[0]}, clips {words[1]}", before, reached)
    return best


@dataclass(frozen=True)
class Together:
    """How to train the levels and clip factors of all layers together.

    Attributes:
        steps: batches to train on.
        every: steps between validations.
        lr_levels: peak learning rate of levels, in standard deviations of their matrix.
        lr_clip: of the clip factors' logits.
        stage: name of the checkpoints.
        title: of the progress bar.
    """

    steps: int
    every: int
    lr_levels: float
    lr_clip: float
    stage: str
    title: str

    def train(
        self, whole: Whole, start: Start, context: PassContext, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Outcome]:
        """Trains from ``start``; returns all stored tensors of the state that validates best, and how it did."""
        stored = {path: get_attribute(layer.stage.module, path) for layer in whole.layers for path in layer.clips}
        stored.update(start.tensors)
        logits = {path: clip_logits(stored[path]) for layer in whole.layers for path in layer.clips}
        levels = {path: LevelWeight.of(weight_of(lay, path, stored)) for lay in whole.layers for path in lay.weights}
        groups = [Group(tuple(logits.values()), self.lr_clip, high=LOGIT)] if logits else []
        for weight in levels.values():
            groups.append(Group((weight.levels,), self.lr_levels * float(weight.simulate().std())))

        def current() -> dict[str, Tensor]:
            clips = {path: clip_factors(logit) for path, logit in logits.items()}
            return {path: weight.simulate() for path, weight in levels.items()} | clips

        with context.progress.task(self.title, max(self.steps, 1)) as task:
            outcome = train(
                groups,
                lambda index: whole.loss(index, current()),
                lambda: whole.validate(current()),
                generator,
                batches=len(whole.training),
                steps=self.steps,
                every=self.every,
                precision=whole.precision,
                before=start.divergence,
                checkpoints=context.checkpoints,
                name=self.stage,
                report=lambda _, latest: task.advance(f"{start.divergence:.4f} -> {latest:.4f}"),
            )
        if outcome.step and self.lr_clip > 0:
            stored.update({path: clip_factors(logit) for path, logit in logits.items()})
        if outcome.step and self.lr_levels > 0:
            folded = {path: weight.fold() for path, weight in levels.items()}
            stored.update({f"{path}.{name}": getattr(w, name) for path, w in folded.items() for name in FIELDS})
        return stored, outcome


def figures(kind: str, start: Start, outcome: Outcome) -> dict[str, Any]:
    """What to report of a training: ``kl_before`` and ``kl_after`` (a plain module's are ``error_...``), ``step``."""
    measure = MEASURES[kind]
    return {f"{measure}_before": start.before, f"{measure}_after": outcome.after, "step": outcome.step}


def improved(summary: Mapping[str, Any]) -> bool:
    """Whether training brought the whole model closer to the float model on held-out data."""
    measure = next(m for m in MEASURES.values() if f"{m}_before" in summary)
    return summary[f"{measure}_after"] < summary[f"{measure}_before"]


def _parameters(whole: Whole, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dequantized weights and clip factors of all layers: those in ``stored``, else as the program has them."""
    return {path: value for lifted in whole.layers for path, value in parameters_of(lifted, stored).items()}


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
    log_p, log_q = teacher.flatten(0, -2).log_softmax(-1), student.flatten(0, -2).log_softmax(-1)
    divergences = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if deviation == 0:
        return divergences.mean()
    with torch.no_grad():
        weights = (_entropy(log_p) * _entropy(log_q)) ** deviation
        weights /= weights.mean().clamp_min(1e-12)
    return (weights * divergences).mean()


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def relative_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """``||student - teacher|| / ||teacher||``."""
    return (student - teacher).norm() / teacher.norm().clamp_min(1e-30)
