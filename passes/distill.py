"""``distill``, the second stage: layer by layer, weights learn to reproduce the float model.

Unit of training is one decoder layer; activations stay in full precision, unless ``activate`` came before: then weights
train under quantized activations, and clip factors stay as they are. The teacher is the float layer on the float chain
of activations; the student is the quantized layer on the quantized chain, so later layers learn to make up for earlier
ones. Latent weights, relaxed bitmaps and levels train together (LBLLM, arXiv 2604.19167, stage "WAT"), through
the int8 rounding of the levels. The graph stays as it is: only planes, levels and scales change; weights of
4-bit codes stay as they were fitted.

Given::

    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)
    %q = aten.linear(%x, %w)

Result::

    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)  # of other values
    %q = aten.linear(%x, %w)

An error behind a layer weighs by how strongly the float model's output depends on the channel it is in
(:mod:`.calibrate.sensitivity`). The state that reconstructs held-out sequences best is kept, the starting state
included: no layer ends worse than it began. Three errors are reported per layer, all on held-out sequences and
against the float model: ``before``, of the program as it came; ``start``, of the untrained layer behind trained ones;
``after``, of the trained layer there.

Needs ``ptq`` before it, the float program as ``context.teacher``, calibration and validation batches.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..codegen.operators.lbllm.linears import WEIGHT
from .base import CALIBRATING, Contract, Count, Pass, PassContext, PassError, PassResult, Positive, Rate, Share
from .calibrate.chains import Chains, paired_layers, train_layers, with_tensors
from .calibrate.layers import LAYER_SEQUENCES, Stage
from .calibrate.precision import Precision
from .calibrate.simulate import LatentWeight, Lifted, flips
from .calibrate.training import Group, step_scale, train_epochs
from .ir.program import Program, get_attribute
from .ir.rewrite import UNPACKED, calls
from .ir.spool import release
from .observe import nothing_to_quantize

STREAM = 1 << 20
"""First generator stream of this pass; layer ``i`` uses ``STREAM + i``."""


@dataclass(frozen=True)
class Distill(Pass):
    """Trains the quantized weights of each layer to reproduce the float layer.

    Attributes:
        epochs: passes over the calibration sequences; 0 leaves the weights as they are.
        batch: sequences per step.
        lr_weight: peak learning rate of latent weights, in standard deviations of the matrix.
        lr_bitmap: of relaxed bitmaps.
        lr_levels: of levels, in standard deviations of the matrix.
        freeze: share of the steps after which planes no longer change and only levels train.
        sequences: calibration sequences to train on, at most.
        precision: of the matrix products on the calibration set.
    """

    epochs: Count = 2
    batch: Positive = 2
    lr_weight: Rate = 1e-2
    lr_bitmap: Rate = 3e-3
    lr_levels: Rate = 1e-2
    freeze: Share = 0.85
    sequences: Positive = LAYER_SEQUENCES
    precision: Precision = "auto"

    name: ClassVar[str] = "distill"
    contract: ClassVar[Contract] = CALIBRATING

    def rehearsal(self) -> Distill:
        return dataclasses.replace(self, epochs=min(self.epochs, 1))

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if nothing_to_quantize(self.name, program, context):
            return PassResult(program)
        if not calls(program.graph, *UNPACKED):
            raise PassError("distill needs quantized weights; run 'ptq' before it")
        pair = paired_layers(self.name, program, context)
        chains = Chains.start(program, *pair, context, self.batch, self.precision, sequences=self.sequences)
        trained = train_layers(
            self.name,
            "stage 2: training weights",
            program,
            pair,
            chains,
            context,
            lambda lifted, teacher, index: self._train(lifted, teacher, chains, context, index),
        )
        summary = {
            "layers": len(trained.rows),
            "mean_before": sum(r["before"] for r in trained.rows) / len(trained.rows),
            "mean_after": sum(r["after"] for r in trained.rows) / len(trained.rows),
        }
        return PassResult(with_tensors(program, trained.tensors), trained.rows, summary, trained.channel_weights)

    def _train(
        self, lifted: Lifted, teacher: Stage, chains: Chains, context: PassContext, index: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Trains one layer; returns its packed weights and figures."""
        start = time.perf_counter()
        packed = {path: lifted.stored(path) for path in lifted.weights}
        # Columns of outliers, which are last, do not train.
        originals = {path: get_attribute(teacher.module, path)[..., : packed[path].in_features] for path in packed}
        latents = {path: LatentWeight.of(packed[path], originals[path], lifted.rules[path]) for path in lifted.weights}
        scale = step_scale(self.epochs * len(chains.student))
        groups = []
        for path, latent in latents.items():
            deviation = float(originals[path].float().std()) * scale
            groups.append(Group((latent.latent,), self.lr_weight * deviation, self.freeze))
            groups.append(Group((latent.bitmap,), self.lr_bitmap * scale, self.freeze, 0.0, 1.0))
            groups.append(Group((latent.parameters,), self.lr_levels * deviation))
        release()

        fixed = {path: get_attribute(lifted.stage.module, path) for path in lifted.ranges} | lifted.constants()

        def parameters() -> dict[str, Tensor]:
            return {path: latent.simulate() for path, latent in latents.items()} | fixed

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
        tensors: dict[str, Tensor] = {}
        signs, bitmaps, count = 0, 0, 0
        for path, latent in latents.items():
            weight = latent.fold() if outcome.step else packed[path]
            tensors.update({f"{path}.{name}": getattr(weight, name) for name in WEIGHT})
            changed = flips(packed[path], weight)
            signs, bitmaps, count = signs + changed[0], bitmaps + changed[1], count + originals[path].numel()
        metrics = {
            "start": outcome.before,
            "after": outcome.after,
            "step": outcome.step,
            "curve": dict(outcome.curve),
            **({"sign_flips": signs / count, "bitmap_flips": bitmaps / count} if count else {}),
            "seconds": time.perf_counter() - start,
        }
        return tensors, metrics


def layers_better(rows: Sequence[Mapping[str, Any]], share: float) -> int:
    """Number of layers whose planes changed and whose held-out error fell by at least ``share``.

    Args:
        rows: of :func:`with_planes`.
        share: of the error before.
    """
    return sum(
        row["after"] <= (1 - share) * row["before"] and row["sign_flips"] + row["bitmap_flips"] > 0 for row in rows
    )


def with_planes(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of layers that have planes; in one of 4-bit codes alone nothing trains."""
    return [row for row in rows if "sign_flips" in row]
