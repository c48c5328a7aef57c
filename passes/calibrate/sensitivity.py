"""How strongly the float model's output depends on each channel behind its decoder layers.

A layer that is trained by itself does not know which of its errors matter behind it. In some models a few channels of
the residual stream are so large that a percent of them hides all the others, while the norms behind scale them down; in
others the large channels are the ones that count. The gradient of the output tells one from the other: to second order,
an error ``d`` behind a layer costs ``(g * d)^2 / 2`` nats of divergence, summed over channels, where ``g`` is the
gradient of the log-likelihood of a token drawn from the model's own distribution. The expectation of ``g^2`` is the
diagonal of the Fisher information, which BRECQ (arXiv 2102.05426, equation 10) weighs the errors of its blocks with;
here it is averaged over tokens.

The model runs forward and backward a layer and a sequence at a time; what lies between is kept in files.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import PassContext, PassError
from ..ir.program import CPU, Program
from ..ir.spool import release
from .layers import Activations, Layers, Stage, Values, calibration_batches, finish
from .precision import Precision, matrix_products, restored
from .simulate import lift
from .training import squares, targets_of

STREAM = 4 << 20
"""Generator stream of the drawn tokens."""

TOKENS = 4096
"""Calibration tokens (rows, for a plain module) to take gradients at."""

ROWS = 32
"""Tokens whose probabilities are computed at a time."""


def channel_weights(program: Program, layers: Layers, context: PassContext, precision: Precision) -> dict[str, Tensor]:
    """What an error in each channel behind each layer weighs, see :func:`.training.reconstruction`.

    Args:
        program: a program; its kind and its inputs count.
        layers: of the float program.
        context: has the calibration batches, of which the first ``TOKENS`` tokens count.
        precision: of the layers' matrix products.

    Returns:
        Float32 ``[C]`` on the CPU for every floating-point output ``[..., C]`` of a layer, by name.

    Raises:
        PassError: a gradient is infinite or no number.
    """
    chain = Activations(first_tokens(calibration_batches(program, context.calibration, 1)), context.device)
    chain.advance(layers.prologue)
    weights: dict[str, Tensor] = {}
    with context.progress.task("measuring which channels matter", 2 * len(layers.layers)) as task:
        before: list[Activations] = []
        names: list[list[str]] = []
        for layer in layers.layers:
            before.append(chain.fork())
            chain.advance(layer, precision=precision)
            names.append(list(targets_of(chain[0], layer.outputs)))
            task.advance()
        generator = context.generator(STREAM)
        wanted = frozenset(itertools.chain(*names))
        gradients = Activations(_behind_all(program.kind, layers, chain, wanted, precision, generator), context.device)
        for index in reversed(range(len(before))):
            weights |= {name: _weights(chain, gradients, name).cpu() for name in names[index]}
            wanted -= frozenset(names[index])
            if wanted:
                stage, chain = layers.layers[index], before[index]
                gradients = Activations(_in_front_of(stage, chain, gradients, wanted, precision), context.device)
            release()
            task.advance()
    return weights


def first_tokens(batches: Sequence[Mapping[str, Any]], count: int = TOKENS) -> Iterator[Mapping[str, Any]]:
    """The first batches that have ``count`` tokens (rows, for a plain module) together, or all."""
    tokens = 0
    for batch in batches:
        if tokens >= count:
            return
        yield batch
        tensor = next(value for value in batch.values() if isinstance(value, Tensor))
        tokens += tensor.shape[:-1].numel() if tensor.is_floating_point() else tensor.numel()


def _behind_all(
    kind: str,
    layers: Layers,
    chain: Activations,
    wanted: Collection[str],
    precision: Precision,
    generator: torch.Generator,
) -> Iterator[Values]:
    """For each batch, the gradients with respect to the wanted values behind the last layer, by name."""
    moved = dataclasses.replace(layers, epilogue=layers.epilogue.on(chain.device))
    gradient = _of_drawn_tokens if kind == "causal-lm" else _of_noise
    for batch in chain:
        values = _leaves(batch, wanted)
        with torch.enable_grad(), matrix_products(precision, chain.device):
            output = restored(finish(moved, values), precision)
        yield _gradients([output], [gradient(output.detach(), generator)], values)
    if moved.epilogue is not layers.epilogue:
        moved.epilogue.discard()


def _of_drawn_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient, in logits ``[..., V]``, of the negative log-likelihood of tokens drawn from them."""
    gradient = torch.empty_like(logits)
    for rows, out in zip(logits.flatten(0, -2).split(ROWS), gradient.flatten(0, -2).split(ROWS), strict=True):
        torch.softmax(rows, -1, out=out)
        where = torch.rand((len(out), 1), generator=generator).to(out.device)
        drawn = torch.searchsorted(out.cumsum(-1), where).clamp_max(out.shape[-1] - 1)
        out.scatter_add_(-1, drawn, out.new_full(drawn.shape, -1.0))
    return gradient


def _of_noise(output: Tensor, generator: torch.Generator) -> Tensor:
    """The same for a plain module, whose output is taken for the mean of a normal distribution."""
    return torch.randn(output.shape, generator=generator).to(output)


def _in_front_of(
    stage: Stage, inputs: Activations, gradients: Activations, wanted: Collection[str], precision: Precision
) -> Iterator[Values]:
    """The gradients with respect to the wanted values in front of a layer, from those behind it."""
    lifted = lift(stage).on(inputs.device)  # an operator of experts has a gradient only there
    parameters = lifted.constants()
    for batch, behind in zip(inputs, gradients, strict=True):
        values = _leaves(batch, wanted)
        with torch.enable_grad(), matrix_products(precision, inputs.device):
            run = lifted.run(values, parameters)
        outputs = {name: restored(value, precision) for name, value in run.items() if name in behind}
        around = {name: value for name, value in behind.items() if name not in outputs}
        through = _gradients(list(outputs.values()), [behind[name] for name in outputs], values)
        yield {name: sum(g[name] for g in (around, through) if name in g) for name in {**around, **through}}
    if inputs.device != CPU:
        lifted.discard()


def _leaves(values: Values, wanted: Collection[str]) -> Values:
    return {name: value.detach().requires_grad_() if name in wanted else value for name, value in values.items()}


def _gradients(outputs: Sequence[Tensor], behind: Sequence[Tensor], values: Values) -> Values:
    """Gradients with respect to what ``outputs`` depend on among ``values``, by name."""
    pairs = [(output, gradient) for output, gradient in zip(outputs, behind, strict=True) if output.requires_grad]
    inputs = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.requires_grad}
    if not pairs or not inputs:
        return {}
    found = torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [g for _, g in pairs], allow_unused=True)
    return {name: gradient for name, gradient in zip(inputs, found, strict=True) if gradient is not None}


def _weights(chain: Activations, gradients: Activations, name: str) -> Tensor:
    """The weights of one output, such that an output of zeros has error 1."""
    costs, shares, tokens = 0.0, 0.0, 0
    for values, behind in zip(chain, gradients, strict=True):
        value = values[name].float()
        size = squares(value)
        cost = behind[name].float().square() * size if name in behind else torch.zeros_like(value)
        costs = costs + cost.flatten(0, -2).sum(0)
        shares = shares + (value.square() / size).flatten(0, -2).sum(0)
        tokens += value[..., 0].numel()
    assert isinstance(costs, Tensor) and isinstance(shares, Tensor)
    zeros = float((costs * shares).sum()) / tokens
    if not math.isfinite(zeros):
        raise PassError(f"the gradients behind '{name}' left the range of numbers; train with precision=float32")
    return costs / zeros if zeros > 0 else torch.ones_like(costs)
