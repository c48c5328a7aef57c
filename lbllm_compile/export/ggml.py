"""GGML's types of matrices: what each has of a W(1+1) weight, and its bytes.

===================  ======  =========================================================================================
``q8_0``             8.5     a group's int8 levels and its float16 scale: every W(1+1) weight to the bit
``f32``              32      every W(1+1) weight to the bit
``f16``, ``bf16``    16      rounded to 11 and 8 significant bits
``q5_1``, ``q4_1``   6, 5    32 or 16 even steps from a least number on, fitted to each 32 weights
``q4_0``             4.5     16 even steps around zero, fitted to each 32 weights
===================  ======  =========================================================================================

The second column is bits a weight. In a block of the last three there are at most four different weights, so a fit need
not cut the range from the least to the largest weight evenly, as quantizers of arbitrary weights do: step and start are
searched so that the levels that occur in the block lie close to steps, weighted by how often each occurs. ``q5_0`` is
not among them because ``q4_1`` is smaller and comes closer, and types of fewer bits have no four free levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lbllm_compile.codegen.format import LEVELS, Int4Weight, QuantizedWeight
from lbllm_compile.export.original import ExportError

BLOCK = 32
"""Weights of a block, which share one scale."""

_AT_ONCE = 1 << 15
"""Blocks that are fitted together: what the search holds of them fits a CPU's cache."""

_ROUNDS = 2
"""Of fitting a step to codes, and codes to that step, behind the search."""


@dataclass(frozen=True)
class Steps:
    """Even steps as weights: a code times a step, and a start where there is one.

    Attributes:
        bits: of a code.
        start: whether a block has a least number of its own; without one, the middle code is zero.
    """

    bits: int
    start: bool

    @property
    def largest(self) -> int:
        """Code."""
        return (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        """The code of zero, where a block has no start of its own."""
        return 0 if self.start else 1 << (self.bits - 1)


@dataclass(frozen=True)
class Type:
    """A type that W(1+1) matrices can be written in.

    Attributes:
        name: GGML's.
        bits: a weight, scales included.
        exact: whether it has W(1+1) weights as they are.
        dtype: the floating-point type it is; None for blocks.
        steps: of blocks that weights are fitted to.
    """

    name: str
    bits: float
    exact: bool = False
    dtype: str | None = None
    steps: Steps | None = None


TYPES = {
    "q8_0": Type("Q8_0", 8.5, exact=True),
    "f32": Type("F32", 32, exact=True, dtype="float32"),
    "f16": Type("F16", 16, dtype="float16"),
    "bf16": Type("BF16", 16, dtype="bfloat16"),
    "q5_1": Type("Q5_1", 6, steps=Steps(5, start=True)),
    "q4_1": Type("Q4_1", 5, steps=Steps(4, start=True)),
    "q4_0": Type("Q4_0", 4.5, steps=Steps(4, start=False)),
}
"""By the names that users give them."""

OF_DTYPE = {kind.dtype: kind.name for kind in TYPES.values() if kind.dtype}
"""GGML's names of the dtypes of plain weights."""

DTYPE_OF = {name: dtype for dtype, name in OF_DTYPE.items()}
"""The dtypes by GGML's names."""


def integer_blocks(integers: Tensor, scale: Tensor) -> Tensor:
    """``Q8_0`` blocks, uint8 ``[..., K / 32 * 34]``: each a float16 scale and 32 int8 numbers.

    Args:
        integers: int8 ``[..., K]``, ``K`` a multiple of 32.
        scale: float16 ``[..., K / 32]``.
    """
    numbers = integers.contiguous().view(torch.uint8).unflatten(-1, (-1, BLOCK))
    return torch.cat([_bytes(scale), numbers], -1).flatten(-2)


def exact_blocks(weight: QuantizedWeight | Int4Weight) -> Tensor:
    """A W(1+1) or 4-bit matrix whose ``K`` is a multiple of 32 as ``Q8_0`` blocks."""
    count = weight.in_features // BLOCK
    return integer_blocks(
        weight.integer_levels(), weight.scale.repeat_interleave(weight.group // BLOCK, -1)[..., :count]
    )


def read_blocks(stored: Tensor, name: str) -> Tensor:
    """The float32 weights of blocks of a type, by GGML's name of it."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[name]))


def nbytes(count: int, name: str) -> int:
    """Bytes of so many weights of a type, by GGML's name of it."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return count // block * size


def file_type(name: str) -> int:
    """llama.cpp's number of files most of whose matrices have a type, by GGML's name of it."""
    import gguf

    return gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]


def fitted_blocks(path: str, weight: QuantizedWeight, steps: Steps) -> Tensor:
    """A W(1+1) matrix as blocks of even steps, uint8 ``[..., K / 32 * bytes of a block]``.

    Args:
        path: of the matrix, for the message.
        weight: ``[..., N, K]``, ``K`` a multiple of 32.
        steps: what the type's codes are.

    Raises:
        ExportError: a step or a start is too large for float16.
    """
    count, per_group = weight.in_features // BLOCK, weight.group // BLOCK
    codes = weight.codes().unflatten(-1, (count, BLOCK))
    values = (weight.levels.float() * weight.scale.float().unsqueeze(-1)).repeat_interleave(per_group, -2)
    values = values[..., :count, :].reshape(-1, LEVELS).T.contiguous()
    packed = [
        _packed(path, values[:, part], codes.reshape(-1, BLOCK)[part], steps)
        for part in _parts(values.shape[1], _AT_ONCE)
    ]
    return torch.cat(packed).view(*codes.shape[:-2], -1)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _packed(path: str, values: Tensor, codes: Tensor, steps: Steps) -> Tensor:
    """Blocks ``uint8 [B, bytes]`` of levels ``fp32 [4, B]`` and the level of each weight, ``uint8 [B, 32]``."""
    often = torch.stack([(codes == level).sum(-1) for level in range(LEVELS)]).float()
    step, start = (_half(path, part) for part in fit(values, often, steps))
    of_level = _codes(values, step.float(), start.float(), steps).add_(steps.zero).to(torch.uint8)
    numbers = of_level.T.contiguous().gather(-1, codes.long())
    halves = numbers.unflatten(-1, (2, BLOCK // 2))
    parts = [_bytes(step), *([_bytes(start)] if steps.start else [])]
    if steps.bits > 4:
        parts.append(torch.from_numpy(np.packbits((numbers >> 4).numpy(), axis=-1, bitorder="little")))
    return torch.cat([*parts, (halves[:, 0] & 15) | (halves[:, 1] << 4)], -1)


def fit(values: Tensor, often: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Step and start, ``fp32 [B]`` each, with which codes come close to some numbers in weighted least squares.

    Every way of laying a whole number of steps between the ends of what occurs is tried, where there is no start
    between zero and the number furthest from it, also in halves of steps; the best is refined.

    Args:
        values: ``fp32 [P, B]``.
        often: how often each occurs, ``fp32 [P, B]``; zero for numbers that need not be met.
        steps: what codes there are.
    """
    occurs = often > 0
    if steps.start:
        start = values.masked_fill(~occurs, torch.inf).amin(0)
        spans = values.masked_fill(~occurs, -torch.inf).amax(0) - start
        counts = torch.arange(1, steps.largest + 1, dtype=torch.float32)
    else:
        used = values.masked_fill(~occurs, 0.0)
        spans = used.gather(0, used.abs().argmax(0, keepdim=True)).squeeze(0)
        start = torch.zeros_like(spans)
        # A step may be negative: there is one code more on one side of zero.
        counts = torch.cat([-torch.arange(1, steps.zero + 0.75, 0.5), torch.arange(1, steps.zero - 0.25, 0.5)])
    found = torch.zeros_like(spans), start, torch.full_like(spans, torch.inf)
    for count in counts:
        found = _better(found, _refined(values, often, spans / count, start, steps))
    for _ in range(_ROUNDS):
        found = _better(found, _refined(values, often, found[0], found[1], steps))
    return found[0], found[1]


_Fit = tuple[Tensor, Tensor, Tensor]
"""Step, start and squared error of each block."""


def _better(one: _Fit, other: _Fit) -> _Fit:
    """Of each block the fit with the smaller error."""
    better = other[2] < one[2]
    step, start, error = (torch.where(better, new, old) for new, old in zip(other, one, strict=True))
    return step, start, error


def _codes(values: Tensor, step: Tensor, start: Tensor, steps: Steps) -> Tensor:
    """How many steps from zero or the start the nearest codes are, as float numbers; none where the step is zero."""
    inverse = torch.where(step == 0, 0.0, 1 / step)
    return (values - start).mul_(inverse).round_().clamp_(-steps.zero, steps.largest - steps.zero)


def _refined(values: Tensor, often: Tensor, step: Tensor, start: Tensor, steps: Steps) -> _Fit:
    """The best step and start for the codes that a step and a start give, and their error with these codes."""
    codes = _codes(values, step, start, steps)
    weighted = codes * often
    squares, products = (weighted * codes).sum(0), (weighted * values).sum(0)
    if steps.start:
        total, sums, means = often.sum(0), weighted.sum(0), (often * values).sum(0)
        spread = total * squares - sums * sums
        step = torch.where(spread > 0, (total * products - sums * means) / spread, step)
        start = (means - step * sums) / total
    else:
        step = torch.where(squares > 0, products / squares, step)
    return step, start, codes.mul_(step).add_(start).sub_(values).square_().mul_(often).sum(0)


def _half(path: str, numbers: Tensor) -> Tensor:
    half = numbers.half()
    if not bool(torch.isfinite(half).all()):
        raise ExportError(f"the weight '{path}' is too large for blocks with float16 steps; use --type q8_0")
    return half


def _bytes(numbers: Tensor) -> Tensor:
    """float16 numbers ``[...]`` as bytes ``[..., 2]``."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)
