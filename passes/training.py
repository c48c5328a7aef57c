"""The training loop of the layer-wise stages: AdamW, warm-up and cosine decay, the best state on validation kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

EPSILON = 1e-6
"""Smallest squared norm of a target token, relative to the batch's mean."""


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
    """Validation loss before training and of the state that was kept, and the step it was reached at (0: the start)."""

    before: float
    after: float
    step: int


def train(
    groups: Sequence[Group],
    batches: int,
    epochs: int,
    loss: Callable[[int], Tensor],
    validate: Callable[[], float],
    generator: torch.Generator,
    precision: Precision = "auto",
    before: float | None = None,
) -> Outcome:
    """Trains tensors in place and leaves them in the state that validated best, the starting state included.

    Args:
        groups: what trains, and how fast.
        batches: number of training batches; each is one step, in a new random order every epoch.
        epochs: passes over the batches.
        loss: training loss of a batch, by index.
        validate: loss on held-out data with the present values; called at the start and after every epoch.
        generator: decides the order of the batches.
        precision: of the matrix products in ``loss``; parameters and validation are float32 in any case.
        before: what ``validate`` gives at the start, where it is known.
    """
    if before is None:
        with torch.no_grad():
            before = validate()
    groups = [g for g in groups if g.rate > 0]
    steps = batches * epochs
    if not groups or not steps:
        return Outcome(before, before, 0)
    tensors = [t for g in groups for t in g.tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": list(g.tensors), "lr": g.rate} for g in groups], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    best, kept, at = before, [t.detach().clone() for t in tensors], 0
    for step, batch in enumerate(_order(batches, epochs, generator)):
        share = step / steps
        for group, options in zip(groups, optimizer.param_groups, strict=True):
            options["lr"] = group.rate * _rate(step, steps) * (share < group.until)
        with matrix_products(precision):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for group in groups:
                if group.low is not None or group.high is not None:
                    for tensor in group.tensors:
                        tensor.clamp_(group.low, group.high)
            if (step + 1) % batches == 0:
                reached = validate()
                if reached < best:
                    best, at = reached, step + 1
                    for copy, tensor in zip(kept, tensors, strict=True):
                        copy.copy_(tensor)
    for copy, tensor in zip(kept, tensors, strict=True):
        tensor.requires_grad_(False).copy_(copy)
    return Outcome(before, best, at)


def step_scale(steps: int) -> float:
    """Factor on learning rates that are stated for ``REFERENCE_STEPS`` steps.

    The way a parameter can go grows with the number of steps; falling with their square root leaves long trainings more
    of it than short ones, and lowers their noise.
    """
    return min((REFERENCE_STEPS / max(steps, 1)) ** 0.5, LARGEST_SCALE)


def _order(batches: int, epochs: int, generator: torch.Generator) -> Iterator[int]:
    for _ in range(epochs):
        yield from torch.randperm(batches, generator=generator).tolist()


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay."""
    warmup = max(round(WARMUP * steps), 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * share))


def reconstruction(outputs: Mapping[str, Any], targets: Values) -> Tensor:
    """Mean over tokens of ``||output - target||^2 / ||target||^2``, averaged over the layer's outputs.

    Every token counts the same, so the few with massive activations cannot dominate the rest.
    """
    losses = []
    for name, target in targets.items():
        target = target.float()
        square = target.square().sum(-1)
        error = (outputs[name].float() - target).square().sum(-1)
        losses.append((error / square.clamp_min(EPSILON * square.mean())).mean())
    return torch.stack(losses).mean()


def targets_of(values: Mapping[str, Any], names: Sequence[str]) -> Values:
    """The floating-point tensors among a stage's outputs: what a student imitates."""
    return {n: values[n] for n in names if isinstance(values[n], Tensor) and values[n].is_floating_point()}
