"""How long one token takes on GPUs that are not at hand: a prediction, not a measurement.

A roofline over what is known of the kernels (:mod:`.bounds`). It assumes that

* a linear takes as long as the slowest of three: its bytes at :data:`COPY_SHARE` of the memory's rated bandwidth, its
  *alu* instructions and its *fma* instructions at :data:`LANES` lanes of a pipe in every clock of every multiprocessor
  (table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide for 32-bit integers; the dot
  product of bytes is taken to run at the rate of integer products);
* a multiply-add of the one-token kernels takes :data:`PIPES` instructions, which was counted in their main loops;
* every launch of the step's graph costs :data:`GAP_S` besides, and nothing overlaps it, as it may from sm_90 on;
* a decoder layer is :data:`LAYER_LAUNCHES` launches, as with a KV state of few slots, and a step has
  :data:`STEP_LAUNCHES` besides;
* what is not a linear, attention over a context, norms, activation functions, hides in those gaps, and so does waiting
  for memory: every kernel keeps enough of it in flight, whatever its occupancy.

So it is what a step cannot be faster than with these kernels, launched one behind the end of the other, and it has not
been held against a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..backend import Prediction
from ..spec import LinearSpec
from .bounds import bytes_moved

COPY_SHARE = 0.9
"""Of the rated bandwidth, what copying reaches."""

LANES = 64
"""Of one pipe in a multiprocessor: instructions of threads a clock, of *alu* and of *fma* each."""

GAP_S = 1.3e-6
"""Seconds from one kernel of a graph to the next, as Hazy Research measured it on an H100 ("Look Ma, No Bubbles!")."""

PIPES = {
    "bit": {"alu": 9 / 16, "fma": 4 / 16},
    "int4": {"alu": 12 / 8, "fma": 2 / 8},
    "int8": {"alu": 0.0, "fma": 4 / 16},
}
"""Instructions a multiply-add by kind of linear and pipe: two masks, three shifts and four permutations for the codes
of 16 weights, and four dot products; of 8 weights of 4 bits three masks, three shifts and six permutations, and two dot
products."""

LAYER_LAUNCHES = 5
"""Of a decoder layer: its four linears, of which some are merged, and its attention."""

STEP_LAUNCHES = 3
"""Besides those of the layers: the embedding, the head, the choice of the next token."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its datasheet.

    Attributes:
        arch: its architecture.
        multiprocessors: how many it has.
        clock: of them, in Hz, boosted.
        bandwidth: of its memory, in bytes a second.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float


GPUS = (
    Gpu("H200", "sm_90", 132, 1.98e9, 4.8e12),
    Gpu("H100", "sm_90", 132, 1.98e9, 3.35e12),
    Gpu("A100", "sm_80", 108, 1.41e9, 2.039e12),
    Gpu("L4", "sm_89", 58, 2.04e9, 3.0e11),
    Gpu("RTX 4090", "sm_89", 128, 2.52e9, 1.008e12),
    Gpu("T4", "sm_75", 40, 1.59e9, 3.2e11),
)
"""From NVIDIA's datasheets: H200 SXM, H100 SXM5, A100 SXM4 of 80 GB, L4, GeForce RTX 4090, T4."""


def linear_seconds(spec: LinearSpec, gpu: Gpu) -> dict[str, float]:
    """What one token of a linear takes, by what it may wait for."""
    products = spec.out_features * spec.in_features
    rate = gpu.multiprocessors * gpu.clock * LANES
    return {
        "bandwidth": bytes_moved(spec, 1) / (COPY_SHARE * gpu.bandwidth),
        **{pipe: products * count / rate for pipe, count in PIPES[spec.kind].items()},
    }


def predict(linears: Mapping[LinearSpec, int], layers: int, gpus: Sequence[Gpu] = GPUS) -> list[Prediction]:
    """How long a token of a model takes on each GPU.

    Args:
        linears: how many of each there are.
        layers: decoder layers.

    Returns:
        What its :attr:`~..backend.Prediction.limit` waits for is ``"bandwidth"``, ``"alu"`` or ``"fma"``.

    Raises:
        KernelError: there is no CUDA kernel for one of them.
    """
    result = []
    for gpu in gpus:
        waits: dict[str, float] = {}
        for spec, count in linears.items():
            times = linear_seconds(spec, gpu)
            limit = max(times, key=lambda name: times[name])
            waits[limit] = waits.get(limit, 0.0) + count * times[limit]
        most = max(waits, key=lambda name: waits[name], default="bandwidth")
        gaps = GAP_S * (LAYER_LAUNCHES * layers + STEP_LAUNCHES)
        result.append(Prediction(gpu.name, sum(waits.values()) + gaps, gaps, most))
    return result
