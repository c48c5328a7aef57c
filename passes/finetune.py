"""``finetune``: levels, clip factors and norms of all layers, tuned together against the float model's output.

The stages before train one layer at a time, and no layer knows which of its errors matter to the output. Here the whole
model runs, its decoder layers recomputed in the backward pass, and the levels (through their int8 rounding), clip
factors and knees, where activations have any, and the layers' weights of norms and biases follow the divergence of its
output from the float model's. Sign planes and bitmaps stay as they are, and so do weights of 4-bit codes. This step is
beyond the paper, whose training ends with the layers (LBLLM, arXiv 2604.19167); EfficientQAT (arXiv 2407.11062) tunes
step sizes end to end in the same way.

With ``planes=nearest`` planes change, too: an element takes the level that is nearest to its float weight, which was
moved to where that is the level it came with, and so takes another as soon as levels have moved far enough. This is how
the planes of DB-LLM's flexible dual binarization follow their scales (arXiv 2402.11960). With ``lr_weight`` the weights
behind the planes train as well, straight through the choice of levels.

Given::

    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)
    %q = aten.linear(%x, %w)

Result::

    %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)  # of other levels
    %q = aten.linear(%x, %w)

The state with the lowest divergence on held-out sequences is kept, the starting state included. With ``deviation``
above 0, tokens of which float and quantized model are unsure weigh more (:func:`.calibrate.alignment.kl_loss`).

Needs ``ptq`` before it, the float program as ``context.teacher``, calibration and validation batches; the whole model's
weights in memory, and the output of one batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from .base import CALIBRATING, Contract, Count, Pass, PassContext, PassError, PassResult, Positive, Rate
from .calibrate.alignment import Planes, Together, Whole
from .calibrate.chains import layer_errors, paired_layers, with_tensors
from .calibrate.layers import calibration_batches
from .calibrate.precision import Precision
from .calibrate.training import step_scale
from .ir.program import Program
from .ir.rewrite import UNPACKED, calls
from .observe import nothing_to_quantize

STREAM = 3 << 20
"""Generator stream of this pass."""


@dataclass(frozen=True)
class Finetune(Pass):
    """Tunes levels, clip factors, norms and biases end to end.

    Learning rates are scaled to the number of steps (:func:`.training.step_scale`).

    Attributes:
        steps: of training.
        repeats: how often a calibration batch is used at most: where they are few, there are fewer steps.
        batch: sequences per step.
        lr_levels: peak learning rate of levels, in standard deviations of the matrix; 0 keeps the levels.
        lr_clip: of the clip factors' logits; 0 keeps the factors.
        lr_knees: of the knees' logits, where activations have knees; 0 keeps the knees.
        lr_norms: of the weights of norms and of biases inside decoder layers, in root mean squares of each, so that one
            of zeros stays; 0 keeps them all.
        planes: ``frozen``, or ``nearest`` where elements take the level nearest to their weight.
        lr_weight: peak learning rate of the weights behind planes that change, in standard deviations of the matrix;
            with 0 planes change with levels alone.
        deviation: how much more a token weighs the less sure both models are; 0 weighs all alike.
        every: steps between validations.
        precision: of the matrix products on the calibration set.
    """

    steps: Count = 40
    repeats: Positive = 3
    batch: Positive = 4
    lr_levels: Rate = 5e-3
    lr_clip: Rate = 5e-2
    lr_knees: Rate = 2e-2
    lr_norms: Rate = 2e-3
    planes: Planes = "frozen"
    lr_weight: Rate = 0.0
    deviation: Rate = 0.0
    every: Positive = 32
    precision: Precision = "auto"

    name: ClassVar[str] = "finetune"
    contract: ClassVar[Contract] = CALIBRATING

    def rehearsal(self) -> Finetune:
        return dataclasses.replace(self, steps=min(self.steps, 1))

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if nothing_to_quantize(self.name, program, context):
            return PassResult(program)
        if not calls(program.graph, *UNPACKED):
            raise PassError("finetune needs quantized weights; run 'ptq' before it")
        if self.lr_weight and self.planes == "frozen":
            raise PassError("finetune: lr_weight trains the weights behind planes that change; add planes=nearest")
        pair = paired_layers(self.name, program, context)
        batches = len(calibration_batches(program, context.calibration, self.batch))
        steps = min(self.steps, self.repeats * batches)
        if steps < self.steps:
            context.progress.note(
                f"finetune: {steps} steps, not {self.steps}, so that no calibration batch is used more than"
                f" {self.repeats} times; more calibration data lets it train longer"
            )

        def start() -> Whole:
            generator = context.generator(STREAM + 1)
            return Whole.start(program, pair, context, self.batch, steps, self.precision, generator, self.deviation)

        scale = step_scale(steps)
        together = Together(
            steps=steps,
            every=self.every,
            lr_levels=self.lr_levels * scale,
            lr_clip=self.lr_clip * scale,
            lr_knees=self.lr_knees * scale,
            lr_norms=self.lr_norms * scale,
            planes=self.planes,
            lr_weight=self.lr_weight * scale,
            title="finetune: training on the whole model's output",
            stream=STREAM,
        )
        tensors, summary = together.run(program.kind, start, context, {})
        trained = with_tensors(program, tensors)
        return PassResult(trained, layer_errors(self.name, trained, context, self.batch), summary)
