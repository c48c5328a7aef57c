"""The end of stage 3: levels and clip factors tuned on the whole model's output.

Layer by layer, every layer comes closer to the float one, and the output can still drift from it, because a layer does
not know which of its errors matter behind it. So the layers' results are taken as proposals: of levels and clip
factors, each trained or as they came, the pair whose output is closest to the float model's on held-out sequences is
kept. From there the levels and clip factors of all layers train together, for a few steps, against the float model's
output; planes stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .chains import parameters_of
from .layers import Activations, Stage, Values
from .precision import Precision, restored
from .simulate import LevelWeight, Lifted
from .training import Group, Outcome, train

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Scalar distance of a student's output from the teacher's, differentiable in the second."""


@dataclass(frozen=True)
class Whole:
    """A quantized program as layers, to be run end to end.

    Attributes:
        layers: the lifted decoder layers.
        epilogue: what follows them.
        result: name of the program's output.
        training, validation: values behind the prologue.
        teacher_training, teacher_validation: the float model's values behind its last layer.
        divergence: what to lower.
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
    precision: Precision

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
        return self.divergence(target.float(), self.output(self.training[index], parameters).float())

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
    before = whole.validate(parameters(whole, {}))
    best = Start({}, "levels as before, clips at 1", before, before)
    if not trained:
        return best
    for with_levels, with_clips in ((True, False), (False, True), (True, True)):
        kept = {path: t for path, t in trained.items() if (with_clips if path in clips else with_levels)}
        reached = whole.validate(parameters(whole, kept))
        if reached < best.divergence:
            name = f"levels {'trained' if with_levels else 'as before'}, clips {'trained' if with_clips else 'at 1'}"
            best = Start(kept, name, before, reached)
    return best


def train_together(
    whole: Whole,
    levels: Mapping[str, LevelWeight],
    logits: Mapping[str, Tensor],
    factors: Callable[[Tensor], Tensor],
    *,
    level_rate: float,
    clip_rate: float,
    highest: float,
    steps: int,
    before: float,
    generator: torch.Generator,
) -> Outcome:
    """Trains the levels and clip factors of all layers on the model's output, in place; the state that validates best
    is kept.

    Args:
        levels: every weight by path, where training starts.
        logits: of the clip factors, by path.
        factors: clip factors of logits.
        level_rate: peak learning rate of levels, in standard deviations of the matrix.
        clip_rate: of logits.
        highest: bound of the logits.
        steps: batches to train on.
        before: divergence where training starts.
    """
    groups = [Group(tuple(logits.values()), clip_rate, high=highest)] if logits else []
    for weight in levels.values():
        groups.append(Group((weight.levels,), level_rate * float(weight.simulate().std())))

    def current() -> dict[str, Tensor]:
        clips = {path: factors(logit) for path, logit in logits.items()}
        return {path: weight.simulate() for path, weight in levels.items()} | clips

    return train(
        groups,
        min(steps, len(whole.training)),
        1,
        lambda index: whole.loss(index, current()),
        lambda: whole.validate(current()),
        generator,
        whole.precision,
        before,
    )


def parameters(whole: Whole, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dequantized weights and clip factors of all layers: those in ``stored``, else as the program has them."""
    return {path: value for lifted in whole.layers for path, value in parameters_of(lifted, stored).items()}


def kl_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over tokens of ``KL(teacher || student)`` in nats, from logits ``[..., V]``."""
    log_p, log_q = teacher.flatten(0, -2).log_softmax(-1), student.flatten(0, -2).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def relative_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """``||student - teacher|| / ||teacher||``."""
    return (student - teacher).norm() / teacher.norm().clamp_min(1e-30)
