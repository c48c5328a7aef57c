"""Teacher and student side by side: what every training shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...codegen.format import QuantizedWeight
from ...codegen.operators.lbllm.linears import WEIGHT
from ..base import PassContext, PassError
from ..ir.program import CPU, Program, get_attribute, set_attribute
from ..ir.spool import mapped, trim
from .layers import Activations, Layers, Stage, Values, calibration_batches, split, stored_weight
from .precision import Precision
from .sensitivity import channel_weights
from .simulate import Lifted, lift
from .training import reconstruction, targets_of


def paired_layers(name: str, program: Program, context: PassContext) -> tuple[Layers, Layers]:
    """The decoder layers of the teacher and of the program, which must match.

    Raises:
        PassError: there is no teacher, no calibration or validation batch, or the programs differ in their layers; the
            message names the pass ``name``.
    """
    if context.teacher is None:
        raise PassError(f"{name} needs the float program to imitate; run 'annotate' in the same pipeline")
    if not context.calibration or not context.validation:
        raise PassError(f"{name} needs calibration and validation batches; give a longer calibration text")
    teacher, student = split(context.teacher), split(program)
    if [s.outputs for s in teacher.layers] != [s.outputs for s in student.layers]:
        raise PassError(
            f"{name}: the layers of the program no longer match the float program's; move it before 'merge'"
        )
    return teacher, student


@dataclass
class Chains:
    """Activations of the float model and of the quantized one, on training and on held-out sequences.

    Attributes:
        teacher, student: on the calibration set.
        teacher_validation, student_validation: on the validation set.
        untrained_validation: the program as it came, on the validation set.
        precision: of the layers' matrix products on the calibration set.
        weights: of the layers' outputs in reconstruction errors, see :mod:`.sensitivity`; needed where layers train.
    """

    teacher: Activations
    student: Activations
    teacher_validation: Activations
    student_validation: Activations
    untrained_validation: Activations
    precision: Precision
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        program: Program,
        teacher: Layers,
        student: Layers,
        context: PassContext,
        batch: int,
        precision: Precision,
        chosen: Callable[[int], Sequence[int]] = range,
        held_out: int | None = None,
        sequences: int | None = None,
    ) -> Chains:
        """Runs the prologues on batches of ``batch`` sequences.

        Args:
            chosen: of so many training batches, the ones to use; all by default.
            held_out: validation batches to use, the first ones; all by default.
            sequences: of the calibration set that the training batches are made of, at most; all by default.
        """
        batches = calibration_batches(program, context.calibration, batch, sequences)
        batches = [batches[index] for index in chosen(len(batches))]
        validation = calibration_batches(program, context.validation, batch)[:held_out]
        chains = [Activations(source, context.device) for source in (batches, batches, validation, validation)]
        for chain, layers in zip(chains, (teacher, student) * 2, strict=True):
            chain.advance(layers.prologue)
        return cls(*chains, chains[-1].fork(), precision)

    def teach(self, teacher: Stage) -> None:
        """Moves the teacher past a layer; its outputs are the targets from now on."""
        self.teacher.advance(teacher, precision=self.precision)
        self.teacher_validation.advance(teacher)

    def pass_untrained(self, lifted: Lifted) -> float:
        """Moves the program as it came past a layer; returns its reconstruction error there, on held-out sequences."""
        self.untrained_validation.advance(lifted.bind(parameters_of(lifted, {})))
        return self._mean_error(lifted, self.untrained_validation)

    def learn(self, lifted: Lifted, parameters: Mapping[str, Tensor]) -> None:
        """Moves the student past a layer with its final parameters."""
        bound = lifted.bind(parameters)
        self.student.advance(bound, precision=self.precision)
        self.student_validation.advance(bound)

    def training_error(self, lifted: Lifted, parameters: Mapping[str, Tensor], index: int) -> Tensor:
        """Reconstruction error of a layer that has not been passed yet, on a training batch; differentiable."""
        outputs = lifted.run(self.student[index], parameters)
        return reconstruction(outputs, targets_of(self.teacher[index], lifted.stage.outputs), self.weights)

    @torch.no_grad()
    def validation_error(self, lifted: Lifted, parameters: Mapping[str, Tensor]) -> float:
        """Mean reconstruction error of a layer that has not been passed yet, on held-out sequences."""
        outputs = (lifted.run(values, parameters) for values in self.student_validation)
        return self._mean_error(lifted, outputs)

    def _mean_error(self, lifted: Lifted, outputs: Iterable[Values]) -> float:
        names = lifted.stage.outputs
        pairs = zip(outputs, self.teacher_validation, strict=True)
        errors = [float(reconstruction(o, targets_of(t, names), self.weights)) for o, t in pairs]
        return sum(errors) / len(errors)


@dataclass(frozen=True)
class Trained:
    """What training layer by layer gives.

    Attributes:
        tensors: of all layers, by path.
        rows: of figures, one a layer.
        channel_weights: what errors in the layers' outputs weighed, on the CPU.
    """

    tensors: Mapping[str, Tensor]
    rows: Sequence[Mapping[str, Any]]
    channel_weights: Mapping[str, Tensor]


def train_layers(
    name: str,
    title: str,
    program: Program,
    pair: tuple[Layers, Layers],
    chains: Chains,
    context: PassContext,
    train: Callable[[Lifted, Stage, int], tuple[dict[str, Tensor], dict[str, Any]]],
) -> Trained:
    """Walks teacher and student layers in order, trains those that no checkpoint holds, and moves the chains on.

    Args:
        name: stage name of the checkpoints.
        title: of the progress bar.
        program: the program that trains.
        pair: the layers of the float program and of this one.
        train: gives a layer's stored tensors, on any device, and figures (``after`` among them) for the lifted student
            and the teacher, both on the context's device, and the layer's index.
    """
    stored: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    weights = _weights(name, program, pair[0], chains.precision, context)
    chains.weights = {output: weight.to(context.device) for output, weight in weights.items()}
    layers = list(zip(*(each.layers for each in pair), strict=True))
    with context.progress.task(title, len(layers)) as task:
        for index, stages in enumerate(layers):
            teacher, student = (stage.on(context.device) for stage in stages)
            lifted = lift(student)
            chains.teach(teacher)
            before = chains.pass_untrained(lifted)
            done = context.checkpoints.load(name, index)
            if done is None:
                found, metrics = train(lifted, teacher, index)
                done = {path: t.cpu() for path, t in found.items()}, metrics
                context.checkpoints.save(name, index, *done)
            tensors, metrics = done
            chains.learn(lifted, parameters_of(lifted, tensors))
            if context.device != CPU:
                teacher.discard()
                lifted.discard()
            stored.update(mapped(tensors.items()))
            trim()
            rows.append({"layer": index, "before": before, **metrics})
            task.advance(f"error {before:.4f} -> {metrics['after']:.4f}")
    return Trained(stored, rows, weights)


def _weights(
    name: str, program: Program, teacher: Layers, precision: Precision, context: PassContext
) -> dict[str, Tensor]:
    """The weights of the layers' outputs, on the CPU."""
    stage = f"{name}.channels"
    done = context.checkpoints.load(stage, 0)
    if done is None:
        done = channel_weights(program, teacher, context, precision), {}
        context.checkpoints.save(stage, 0, *done)
    return done[0]


def layer_errors(
    name: str, program: Program, context: PassContext, batch: int, count: int | None = None
) -> list[dict[str, Any]]:
    """How far each layer of a program is from the float one, measured as where layers train: on held-out sequences,
    each program on its own activations. Nothing where no pass before has measured which channels matter. Kept as a
    checkpoint, so that a resumed compile reports the same figures.

    Args:
        name: of the pass that asks.
        program: as the pass leaves it.
        batch: sequences at a time.
        count: how many batches of them, the first ones of the held-out set; all by default.

    Returns:
        A row ``layer``, ``after`` for each layer.
    """
    if not context.channel_weights:
        return []
    stage = f"{name}.layers"
    done = context.checkpoints.load(stage, 0)
    if done is None:
        done = {}, {"rows": _layer_errors(name, program, context, batch, count)}
        context.checkpoints.save(stage, 0, *done)
    return done[1]["rows"]


def _layer_errors(
    name: str, program: Program, context: PassContext, batch: int, count: int | None
) -> list[dict[str, Any]]:
    teacher, student = paired_layers(name, program, context)
    chains = Chains.start(program, teacher, student, context, batch, "float32", lambda batches: (), count)
    chains.weights = {output: weight.to(context.device) for output, weight in context.channel_weights.items()}
    rows = []
    with context.progress.task("measuring the layers", len(teacher.layers)) as task:
        for index, stages in enumerate(zip(teacher.layers, student.layers, strict=True)):
            original, own = (stage.on(context.device) for stage in stages)
            lifted = lift(own)
            chains.teach(original)
            rows.append({"layer": index, "after": chains.pass_untrained(lifted)})
            if context.device != CPU:
                original.discard()
                lifted.discard()
            trim()
            task.advance(f"error {rows[-1]['after']:.4f}")
    return rows


def with_tensors(program: Program, tensors: Mapping[str, Tensor]) -> Program:
    """The same program with other tensors at some paths."""
    program = program.copy()
    for path, tensor in tensors.items():
        set_attribute(program.module, path, tensor)
    return program


def weight_of(lifted: Lifted, path: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """A layer's W(1+1) weight: from ``tensors`` where they have it, else as the program stores it."""
    weight = lifted.stored(path)
    if f"{path}.{WEIGHT[0]}" not in tensors:
        return weight
    return stored_weight(tensors, path, weight.group, weight.in_features)


def parameters_of(lifted: Lifted, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's dequantized weights, ranges and vectors: those in ``tensors``, else as the program stores them."""
    device = lifted.stage.device
    parameters = {path: weight_of(lifted, path, tensors).on(device).dequantize() for path in lifted.weights}
    parameters |= lifted.constants()
    parameters |= {path: get_attribute(lifted.stage.module, path) for path in lifted.ranges}
    return parameters | {path: tensors[path].to(device) for path in lifted.ranges + lifted.vectors if path in tensors}
