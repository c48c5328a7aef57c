"""The training loop of the calibrating stages: AdamW, warm-up and cosine decay, the best state on validation kept."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...codegen.errors import FormatError
from ...codegen.progress import Task
from ..base import Checkpoints, PassError
from ..ir.spool import mapped, release
from .layers import Values
from .precision import Precision, matrix_products

WARMUP = 0.03
"""Share of the steps in which the learning rate rises."""

FINAL = 0.05
"""Learning rate at the end, relative to its peak."""

REFERENCE_STEPS = 48
"""Steps that the stages' learning rates are stated for."""

LARGEST_SCALE = 2.0
"""Most by which a short training raises its learning rates."""

KEEP = 4
"""Steps of a long training between two states that survive a kill."""

POINTS = 32
"""Points that a curve of training losses has at most."""

EPSILON = 1e-6
"""Smallest squared norm of a target token, relative to the batch's mean."""


class DivergenceError(PassError):
    """A training left the range of numbers."""


@dataclass(frozen=True)
class Group:
    """Tensors that share a learning rate.

    Attributes:
        tensors: what trains.
        rate: peak learning rate; with 0 the tensors stay as they are.
        until: share of the steps after which they are frozen.
        low, high: bounds kept after every step.
    """

    tensors: tuple[Tensor, ...]
    rate: float
    until: float = 1.0
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        before, after: validation loss at the start, and of the state that was kept.
        step: the one that state was reached at; 0 for the start.
        curve: for plots, see :meth:`Curve.figures`; empty where nothing trained.
    """

    before: float
    after: float
    step: int
    curve: Mapping[str, Any] = field(default_factory=dict)


class Curve:
    """The losses of a training of ``steps`` steps: validations, and means over at most :data:`POINTS` runs of steps.

    Losses are kept to five digits, which is more than a plot shows.
    """

    def __init__(self, steps: int, before: float):
        self._steps, self._run = steps, -(-steps // POINTS)
        self._losses: list[float] = []
        self._points: dict[str, list[tuple[int, float]]] = {"validation": [], "training": []}
        self._add("validation", 0, before)

    def step(self, number: int, loss: float) -> None:
        """Notes the training loss of a step; the first is number 1."""
        self._losses.append(loss)
        if number % self._run == 0 or number == self._steps:
            self._add("training", number, sum(self._losses) / len(self._losses))
            self._losses.clear()

    def validated(self, number: int, loss: float) -> None:
        """Notes the validation loss behind so many steps."""
        self._add("validation", number, loss)

    def figures(self) -> dict[str, list[list[float]]]:
        """Both curves as ``[step, loss]``, JSON-able."""
        return {name: [[*point] for point in points] for name, points in self._points.items()}

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs."""
        return {"losses": [*self._losses], **self.figures()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state` was taken."""
        self._losses = [*state["losses"]]
        self._points = {name: [(step, loss) for step, loss in state[name]] for name in self._points}

    def _add(self, name: str, number: int, loss: float) -> None:
        if math.isfinite(loss):  # a validation may leave the range of numbers; JSON has none for that
            self._points[name].append((number, float(f"{loss:.5g}")))


def train(
    groups: Sequence[Group],
    loss: Callable[[int], Tensor],
    validate: Callable[[], float],
    generator: torch.Generator,
    *,
    batches: int,
    steps: int,
    every: int,
    precision: Precision = "auto",
    before: float | None = None,
    checkpoints: Checkpoints | None = None,
    name: str = "",
    report: Callable[[float], None] = lambda latest: None,
) -> Outcome:
    """Trains tensors in place and leaves them in the state that validated best, the starting state included.

    Args:
        groups: what trains, and how fast.
        loss: training loss of a batch, by index.
        validate: loss on held-out data with the present values.
        generator: decides the order of the batches.
        batches: number of training batches; each is one step, in a new random order every time they are through.
        steps: of training.
        every: steps between validations; the first and the last state are validated in any case.
        precision: of the matrix products in ``loss``; parameters and validation are float32 in any case.
        before: what ``validate`` gives at the start, where it is known.
        checkpoints: where the state of the training is kept every ``KEEP`` steps, as piece 0 of ``name``.
        report: called with the loss of the latest validation after every step, those of a resumed training included.

    Raises:
        DivergenceError: the training diverged.
    """
    if before is None:
        with torch.no_grad():
            before = validate()
    groups = [g for g in groups if g.rate > 0]
    if not groups or not steps:
        return Outcome(before, before, 0)
    tensors = [t for g in groups for t in g.tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    # One for each tensor, run as soon as the tensor's gradient is there, so that a layer's gradients never meet.
    optimizers = [
        [torch.optim.AdamW([t], g.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True) for t in g.tensors]
        for g in groups
    ]
    every_optimizer = [optimizer for own in optimizers for optimizer in own]
    hooks = [
        tensor.register_post_accumulate_grad_hook(functools.partial(_step, optimizer))
        for tensor, optimizer in zip(tensors, every_optimizer, strict=True)
    ]
    kept = list(mapped((str(i), t) for i, t in enumerate(tensors)).values())
    best, at, first = before, 0, 0
    latest, curve = before, Curve(steps, before)
    state = checkpoints.load(name, 0) if checkpoints is not None else None
    if state is not None:
        first, best, at, latest = _restore(every_optimizer, tensors, kept, *state)
        curve.restore(state[1]["curve"])
        for _ in range(first):
            report(latest)
    for step, batch in itertools.islice(enumerate(_order(batches, steps, generator)), first, None):
        share = step / steps
        for group, own in zip(groups, optimizers, strict=True):
            for optimizer in own:
                optimizer.param_groups[0]["lr"] = group.rate * _rate(step, steps) * (share < group.until)
        try:
            with matrix_products(precision, tensors[0].device):
                value = loss(batch)
        except FormatError as error:
            raise _diverged(step) from error
        if not value.isfinite():
            raise _diverged(step)
        curve.step(step + 1, float(value.detach()))
        value.backward()
        with torch.no_grad():
            for group in groups:
                if group.low is not None or group.high is not None:
                    for tensor in group.tensors:
                        tensor.clamp_(group.low, group.high)
            if (step + 1) % every == 0 or step + 1 == steps:
                latest = validate()
                curve.validated(step + 1, latest)
                if latest < best:
                    best, at = latest, step + 1
                    for copy, tensor in zip(kept, tensors, strict=True):
                        copy.copy_(tensor)
                    release()
        if checkpoints is not None and (step + 1) % KEEP == 0 and step + 1 < steps:
            figures = {"step": step + 1, "best": best, "at": at, "latest": latest, "curve": curve.state()}
            checkpoints.save(name, 0, _state(every_optimizer, tensors, kept), figures)
        report(latest)
    for hook, optimizer in zip(hooks, every_optimizer, strict=True):
        hook.remove()
        # Optimizers refer to themselves: what they hold would stay in memory until Python looks for cycles.
        optimizer.state.clear()
        optimizer.param_groups.clear()
    for copy, tensor in zip(kept, tensors, strict=True):
        tensor.requires_grad_(False).copy_(copy)
    return Outcome(before, best, at, curve.figures())


def _step(optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
    optimizer.step()
    tensor.grad = None


def _diverged(step: int) -> DivergenceError:
    return DivergenceError(
        f"the training diverged after {step} steps; lower its learning rates (lr_levels and the others)"
    )


def train_epochs(
    groups: Sequence[Group],
    loss: Callable[[int], Tensor],
    validate: Callable[[], float],
    generator: torch.Generator,
    batches: int,
    epochs: int,
    precision: Precision,
    begin: Callable[[int], AbstractContextManager[Task]],
) -> Outcome:
    """:func:`train` for so many passes over the batches, validating after each.

    Args:
        begin: begins a progress bar of so many steps, which is told the held-out error of the latest validation.
    """
    steps = epochs * batches
    with torch.no_grad():
        before = validate()
    with begin(max(steps, 1)) as task:
        return train(
            groups,
            loss,
            validate,
            generator,
            batches=batches,
            steps=steps,
            every=batches,
            precision=precision,
            before=before,
            report=lambda latest: task.advance(f"error {latest:.4f}, {before:.4f} at first"),
        )


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW remembers of a tensor."""


def _state(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Sequence[Tensor], kept: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Everything a training needs to go on where it was."""
    state = {f"tensor.{i}": t.detach() for i, t in enumerate(tensors)}
    state.update({f"kept.{i}": t for i, t in enumerate(kept)})
    for i, (optimizer, tensor) in enumerate(zip(optimizers, tensors, strict=True)):
        state.update({f"{moment}.{i}": optimizer.state[tensor][moment] for moment in _MOMENTS})
    return {name: tensor.cpu() for name, tensor in state.items()}


def _restore(
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    state: Mapping[str, Tensor],
    figures: Mapping[str, Any],
) -> tuple[int, float, int, float]:
    """Undoes :func:`_state`; returns the next step, the best loss, its step and the latest loss."""
    with torch.no_grad():
        for i, (optimizer, tensor, copy) in enumerate(zip(optimizers, tensors, kept, strict=True)):
            tensor.copy_(state[f"tensor.{i}"])
            copy.copy_(state[f"kept.{i}"])
            optimizer.state[tensor] = {
                moment: state[f"{moment}.{i}"].to(tensor.device, copy=True) for moment in _MOMENTS
            }
    return figures["step"], figures["best"], figures["at"], figures["latest"]


def step_scale(steps: int) -> float:
    """Factor on learning rates that are stated for ``REFERENCE_STEPS`` steps.

    The way a parameter can go grows with the number of steps; falling with their square root leaves long trainings more
    of it than short ones, and lowers their noise.
    """
    return min((REFERENCE_STEPS / max(steps, 1)) ** 0.5, LARGEST_SCALE)


def _order(batches: int, steps: int, generator: torch.Generator) -> list[int]:
    """The batch of every step."""
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()
    return order[:steps]


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay."""
    warmup = max(round(WARMUP * steps), 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * share))


def reconstruction(outputs: Mapping[str, Any], targets: Values, weights: Mapping[str, Tensor]) -> Tensor:
    """How far a layer's outputs ``[..., C]`` are from the float layer's.

    Mean over tokens of ``sum_c weights[c] (output - target)[c]^2 / ||target||^2``, averaged over the outputs. As
    errors are relative to a token's size, the few tokens with massive activations cannot dominate the rest.

    Args:
        outputs: by name.
        targets: by name; those that count.
        weights: float32 ``[C]`` by name, see :mod:`.sensitivity`.
    """
    errors = []
    for name, target in targets.items():
        target = target.float()
        squared = (outputs[name].float() - target).square()
        errors.append((squared * weights[name] / squares(target)).sum(-1).mean())
    return torch.stack(errors).mean()


def squares(values: Tensor) -> Tensor:
    """Squared norms ``[..., 1]`` of tokens; those near zero are lifted to a small share of the mean."""
    found = values.square().sum(-1, keepdim=True)
    return found.clamp_min(EPSILON * found.mean())


def targets_of(values: Mapping[str, Any], names: Sequence[str]) -> Values:
    """The floating-point tensors among a stage's outputs: what a student imitates."""
    return {n: values[n] for n in names if isinstance(values[n], Tensor) and values[n].is_floating_point()}
