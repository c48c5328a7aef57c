"""``finetune``: levels and clip factors of all layers, tuned together against the float model's output.

The stages before train one layer at a time, and no layer knows which of its errors matter to the output. Here the whole
model runs, its decoder layers recomputed in the backward pass, and the levels (through their int8 rounding) and the
clip factors of the activations, where the program has any, follow the divergence of its output from the float model's.
Sign planes and bitmaps stay as they are. This step is beyond the paper, whose training ends with the layers
(LBLLM, arXiv 2604.19167); EfficientQAT (arXiv 2407.11062) tunes step sizes end to end in the same way.

Given::

    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)

Result::

    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)      # other levels

The state with the lowest divergence on held-out sequences is kept, the starting state included. With ``deviation``
above 0, tokens of which float and quantized model are unsure weigh more.

Needs ``ptq`` before it, the float program as ``context.teacher``, calibration and validation batches; the whole model's
weights in memory, and the output of one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .alignment import Together, Whole, best_start, figures
from .base import CALIBRATING, Contract, Pass, PassContext, PassError, PassResult
from .chains import Chains, paired_layers, with_tensors
from .precision import Precision
from .program import Program
from .simulate import lift

STREAM = 3 << 20
"""Generator stream of this pass."""


@dataclass(frozen=True)
class Finetune(Pass):
    """Tunes levels and clip factors end to end.

    Attributes:
        steps: of training.
        batch: sequences per step.
        lr_levels: peak learning rate of levels, in standard deviations of the matrix; 0 keeps the levels.
        lr_clip: of the clip factors' logits; 0 keeps the factors.
        deviation: how much more a token weighs the less sure both models are; 0 weighs all alike.
        every: steps between validations, after each of which the training can be resumed.
        precision: of the matrix products on the calibration set.
    """

    steps: int = 40
    batch: int = 4
    lr_levels: float = 5e-3
    lr_clip: float = 5e-2
    deviation: float = 0.0
    every: int = 20
    precision: Precision = "auto"

    name: ClassVar[str] = "finetune"
    contract: ClassVar[Contract] = CALIBRATING

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if not any(n.target is torch.ops.lbllm.unpack_weight.default for n in program.graph.nodes):
            raise PassError("finetune needs quantized weights; run 'ptq' before it")
        teacher, student = paired_layers(self.name, program, context)
        chains = Chains.start(program, teacher.prologue, context, self.batch, self.precision)
        for layer in teacher.layers:
            chains.teach(layer)
        layers = [lift(layer) for layer in student.layers]
        behind_prologue = chains.student, chains.student_validation
        whole = Whole.of(layers, teacher, behind_prologue, chains, program.kind, self.deviation)
        # A pipeline may tune twice, before and after the activations are quantized.
        stage = f"{self.name}-{'activations' if any(layer.clips for layer in layers) else 'weights'}"
        done = context.checkpoints.load(stage, 1)
        if done is None:
            together = Together(
                steps=self.steps,
                every=self.every,
                lr_levels=self.lr_levels,
                lr_clip=self.lr_clip,
                stage=stage,
                title="finetune: training on the whole model's output",
            )
            start = best_start(whole, {})
            tensors, outcome = together.train(whole, start, context, context.generator(STREAM))
            done = tensors, {"layers": len(layers), **figures(program.kind, start, outcome)}
            context.checkpoints.save(stage, 1, *done)
        tensors, summary = done
        return PassResult(with_tensors(program, tensors), (), summary)
