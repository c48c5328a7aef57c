"""How much memory each phase of a compile holds at most, and how much it keeps in files meanwhile.

Weights are mapped from a file, activations are read from one, and both are dropped from memory after use
(:mod:`.passes.ir.spool`). So most phases hold what belongs to one decoder layer, whatever the number of
layers. Those that hold the whole model say so by their size: writing the calibration text, training all layers
together, timing the original model, and reading a model that is not a directory of safetensors.

The constants were measured by ``python -m benchmarks.memory``; that of training together by ``benchmarks.quality``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lbllm_compile.passes.calibrate.sensitivity import TOKENS
from lbllm_compile.passes.ir.spool import RESIDENT
from lbllm_compile.passes.ptq import HESSIAN_BYTES

LIBRARIES = 700 << 20
"""Python, torch, transformers and TVM themselves, and a captured graph."""

_HESSIANS = 9
"""Float32 ``[K, K]`` that factoring a Hessian holds, the statistic included."""

_CORRECTIONS = 3
"""The same where errors propagate, besides: differences of inputs, their product with the inverse, the result."""

_FIT_BYTES = 24
"""Per weight of the matrices that are fitted as one: the weight, six forms of it while it is compensated."""

_EXPERT_BYTES = 6
"""Per weight of all experts that have been fitted: codes twice while they are stacked, and the dequantized matrices."""

_DISTILL_BYTES = 38
"""Per weight of the layer, as measured; 30 of them are latent and bitmap, two moments of the optimizer for each, and
the matrix in float32 and as bfloat16 in the layer's products."""

_ACTIVATE_BYTES = 14
"""Per weight of the layer: the teacher's, the codes, the matrix, as float32 and bfloat16, and its gradient."""

_TOGETHER_BYTES = 12
"""Per weight of all layers that train together, as measured; 9 of them are the matrix, its gradient and the codes."""

_LEVEL_BYTES = 4 * 4
"""A float32 copy of a group's four levels. Training keeps six: levels, gradient, two moments, the best state and one
being written; a state on disk has four."""

_HEAD_COPIES = 5
"""Float32 copies of the largest matrix outside the layers while it becomes int8 rows and is checked."""

_LOWERED_COPIES = 3
"""Copies of the quantized weights while they are merged, packed and written."""

_SAVED_BY_AUTOGRAD = 3
"""Float32 numbers kept for each input and output channel of a layer's linears and each token of a batch."""

_LOGIT_COPIES = 4
"""Float32 copies of a batch's logits while two models' are compared, or while gradients start from them."""


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is read.

    Attributes:
        parameters: in all.
        largest: weights of the largest tensor outside the decoder layers.
        outputs: rows of the output head; 0 where there is none.
        layers: shapes ``[N, K]`` (or ``[E, N, K]``) of the decoder matrices, by layer.
        whole: whether it has to be read into memory at once.
        artifact: bytes of the compiled weights.
    """

    parameters: int
    largest: int
    outputs: int
    layers: Sequence[Sequence[tuple[int, ...]]]
    whole: bool
    artifact: int

    @property
    def decoder(self) -> int:
        """Weights of all decoder matrices."""
        return sum(_count(shape) for layer in self.layers for shape in layer)


@dataclass(frozen=True)
class Work:
    """What is done to it.

    Attributes:
        tokens: calibration and validation tokens (rows, for a plain module).
        length: tokens of a sequence.
        fit: sequences run at a time in stage 1; 0 where the pipeline lacks it.
        distill, activate: sequences of a batch where layers train, else 0.
        together: sequences of a batch where all layers train together, else 0.
        validate: sequences of a batch where the whole model's output is validated, else 0.
        groups: of levels, in all decoder matrices.
        text: bytes that writing the calibration text takes besides the weights; None where none is written.
        half: whether it is written by bfloat16 weights.
        latents: float32 numbers per weight where all layers train together: 1 where planes follow from a latent, 3
            where it trains, too.
        propagates: whether stage 1 makes up for errors in front of a linear.
    """

    tokens: int
    length: int
    fit: int
    distill: int
    activate: int
    together: int
    validate: int
    groups: int
    text: int | None
    half: bool
    latents: int = 0
    propagates: bool = False


def memory(model: Model, work: Work) -> dict[str, int]:
    """Bytes held resident at most, by phase, in the order of the phases."""
    layer = max((sum(_count(s) for s in shapes) for shapes in model.layers), default=0)
    channels = max((sum(s[-1] + s[-2] for s in shapes) for shapes in model.layers), default=0)
    outside = 4 * model.largest

    def activations(sequences: int) -> int:
        return 4 * channels * sequences * work.length

    def logits(sequences: int) -> int:
        return _LOGIT_COPIES * 4 * sequences * work.length * model.outputs

    phases = {
        # In float32, and as it is stored.
        "reading": 4 * model.parameters if model.whole else outside * 3 // 2,
        "capture and preflight": max(RESIDENT + outside, _training(model, work, layer), _HEAD_COPIES * outside),
    }
    if work.text is not None:
        phases["calibration text"] = (2 if work.half else 4) * model.parameters + work.text
    if work.fit:
        phases["stage 1, ptq"] = _fitting(model, work) + activations(work.fit)
    if work.distill:
        training = _SAVED_BY_AUTOGRAD * activations(work.distill)
        phases["stage 2, distill"] = max(_DISTILL_BYTES * layer + training, RESIDENT + outside + logits(1))
    if work.validate:
        training = _ACTIVATE_BYTES * layer + _SAVED_BY_AUTOGRAD * activations(work.activate)
        phases["stage 3, activate"] = max(training, RESIDENT + outside + logits(work.validate))
    if work.together:
        levels = 6 * _LEVEL_BYTES * work.groups + 4 * work.latents * model.decoder
        recomputed = _SAVED_BY_AUTOGRAD * activations(work.together)
        phases["training all layers together"] = (
            _TOGETHER_BYTES * model.decoder + levels + logits(work.together) + recomputed
        )
    phases["lowering and saving"] = max(_HEAD_COPIES * outside, _LOWERED_COPIES * model.artifact)
    phases["comparison with the original"] = 4 * model.parameters + 2 * model.artifact
    return {name: LIBRARIES + size for name, size in phases.items()}


def spooled(model: Model, work: Work, width: int) -> int:
    """Bytes in files without a name at most: the weights, what is quantized of them, and the chains of activations.

    Args:
        width: channels of the values between two layers.
    """
    chains = 2 * 4 * width * work.tokens
    if work.distill or work.activate:  # what lies in front of each layer, while it is measured which channels matter
        chains += 4 * width * min(work.tokens, TOKENS) * len(model.layers)
    return 4 * model.parameters + 2 * model.artifact + chains


def saved(model: Model, work: Work) -> int:
    """Bytes that a training of all layers keeps in the work directory: what trains, its best state, two moments."""
    latents = model.decoder if work.latents > 1 else 0
    return 4 * (_LEVEL_BYTES * work.groups + 4 * latents) if work.together else 0


def _training(model: Model, work: Work, layer: int) -> int:
    """The rehearsal trains one layer on hardly any tokens."""
    fitting = _fitting(model, work) if work.fit else 0
    return max(fitting, (_DISTILL_BYTES if work.distill else 0) * layer)


def _fitting(model: Model, work: Work) -> int:
    """Fitting the linears behind one observer: a Hessian and the matrices that share it; of experts as many sums as are
    held, the one that those with few tokens share, and what has been fitted."""
    most = 0
    for shapes in model.layers:
        for (*experts, rows, columns), same in Counter(shapes).items():
            square, weights = 4 * columns**2, same * rows * columns
            size = (_HESSIANS + (_CORRECTIONS if work.propagates else 0)) * square + _FIT_BYTES * weights
            if experts:
                held = min(experts[0], max(1, HESSIAN_BYTES // square))
                size += (held + 1) * square + _EXPERT_BYTES * experts[0] * weights
            most = max(most, size)
    return most


def _count(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
