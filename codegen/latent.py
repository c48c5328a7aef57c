"""What latent weights stand for, and the gradients of it: the arithmetic of training.

A unit is one group of one row: ``g`` elements and four levels. Levels are integers in units of the group's scale, so
that the thresholds (half sums of two levels) are exact and a comparison falls as it does for the packed weight. An
element belongs to the inner pair of levels (1, 2) where its relaxed bitmap exceeds 0.5, else to the outer pair (0, 3),
and takes the pair's upper level where its latent exceeds the pair's middle (LBLLM, arXiv 2604.19167, equation 3).

The formulas are plain torch. What training on a CPU calls are fused kernels, one pass over the elements each, which are
held against the formulas on this machine before they are used; other devices compute the formulas.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch
from torch import Tensor

from .errors import DisprovedError
from .format import LEVELS
from .levels import FREE, LevelRule

PROOF_UNITS = 37
"""Units on which the kernels are held against the formulas."""


def stored_levels(levels: Tensor, rule: LevelRule = FREE) -> tuple[Tensor, Tensor]:
    """Levels ``[U, 4]`` as stored under a rule: integers as floats ``[U, 4]``, and their scale ``fp32 [U]``.

    Raises:
        FormatError: a level is not finite, or too large.
    """
    quantized, scale = rule.stored(levels)
    return quantized.float(), scale.float()


def decide(latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What elements ``[U, g]`` pick: whether the inner pair, and of the inner and of the outer pair the upper level.

    ``levels [U, 4]`` and ``scale [U]`` are those of :func:`stored_levels`.
    """
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
    units = _in_units(latent, scale)
    return bitmap > 0.5, units > (l1 + l2) * 0.5, units > (l0 + l3) * 0.5


def matrix_formula(latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """The matrix ``[U, g]``; arguments as for :func:`decide`."""
    inner, inner_upper, outer_upper = decide(latent, bitmap, levels, scale)
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
    picked = torch.where(inner, torch.where(inner_upper, l2, l1), torch.where(outer_upper, l3, l0))
    return picked * scale.unsqueeze(-1)


def gradient_formula(
    grad: Tensor, latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of latent, bitmap and levels from ``grad [U, g]``, that of the matrix.

    The latent's is ``grad`` within a pair's width of the pair's middle, else 0; the bitmap's is ``grad`` times what the
    inner pair gives more than the outer; a level's is the sum of ``grad`` over the elements that use it.
    """
    inner, inner_upper, outer_upper = decide(latent, bitmap, levels, scale)
    l0, l1, l2, l3 = (v.unsqueeze(-1) for v in levels.unbind(-1))
    pull = torch.where(inner_upper, l2, l1) - torch.where(outer_upper, l3, l0)
    middle = torch.where(inner, (l1 + l2) * 0.5, (l0 + l3) * 0.5)
    # A pair whose levels changed places during training has a negative width.
    width = torch.where(inner, (l2 - l1).abs(), (l3 - l0).abs())
    units = _in_units(latent, scale)
    grad_latent = torch.where((units > middle - width) & (units < middle + width), grad, 0.0)
    codes = torch.where(inner, 1 + inner_upper.to(torch.uint8), 3 * outer_upper.to(torch.uint8))
    return grad_latent, pull * scale.unsqueeze(-1) * grad, level_gradient_formula(grad, codes)


def level_gradient_formula(grad: Tensor, codes: Tensor) -> Tensor:
    """``[U, 4]``: the sum of ``grad [U, g]`` over the elements of each of the codes ``[U, g]``."""
    return torch.stack([(grad * (codes == level)).sum(-1) for level in range(LEVELS)], -1)


def _in_units(latent: Tensor, scale: Tensor) -> Tensor:
    return latent * torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale)).unsqueeze(-1)


def matrix(latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """:func:`matrix_formula`, fused; all fp32 and contiguous."""
    if latent.device.type != "cpu":
        return matrix_formula(latent, bitmap, levels, scale)
    out = torch.empty_like(latent)
    _kernels(latent.shape[-1])["latent_forward"](latent, bitmap, levels, scale, out)
    return out


def gradients(
    grad: Tensor, latent: Tensor, bitmap: Tensor, levels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gradient_formula`, fused; the sums of level gradients may be taken in another order."""
    if latent.device.type != "cpu":
        return gradient_formula(grad, latent, bitmap, levels, scale)
    grads = torch.empty_like(latent), torch.empty_like(bitmap), torch.empty_like(levels)
    _kernels(latent.shape[-1])["latent_backward"](grad.contiguous(), latent, bitmap, levels, scale, *grads)
    return grads


def pick(codes: Tensor, values: Tensor) -> Tensor:
    """Of the values ``fp32 [U, 4]`` of every unit those that ``codes uint8 [U, g]`` name, fused."""
    if values.device.type != "cpu":
        return values.gather(-1, codes.long())
    out = values.new_empty(codes.shape)
    _kernels(codes.shape[-1])["codes_forward"](codes, values, out)
    return out


def level_gradients(grad: Tensor, codes: Tensor) -> Tensor:
    """:func:`level_gradient_formula`, fused."""
    if grad.device.type != "cpu":
        return level_gradient_formula(grad, codes)
    grads = grad.new_empty((codes.shape[0], LEVELS))
    _kernels(codes.shape[-1])["codes_backward"](grad.contiguous(), codes, grads)
    return grads


@functools.cache
def _kernels(group: int) -> Any:
    """The fused functions for a group size, compiled for this machine and proven.

    Raises:
        KernelError: TVM is missing.
        DisprovedError: a kernel disagrees with its formula.
    """
    # Loads TVM: seconds that a look at the catalogue of passes need not spend.
    from .kernels.latent import latent_kernels

    kernels = latent_kernels(group)
    # TVM's parser leaves the frames of all its callers in a cycle, and with them the weights that are in training.
    gc.collect()
    generator = torch.Generator().manual_seed(group)
    shape = (PROOF_UNITS, group)
    latent, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    bitmap = torch.rand(shape, generator=generator)
    bitmap[0, :3] = torch.tensor([0.5, 0.0, 1.0])
    levels, scale = stored_levels(torch.randn((PROOF_UNITS, LEVELS), generator=generator).sort(-1).values)
    levels[1], scale[2] = levels[1].flip(-1), 0.0
    operands = (latent, bitmap, levels, scale)
    codes = torch.randint(0, LEVELS, shape, generator=generator).to(torch.uint8)
    out, picked = torch.empty(shape), torch.empty(shape)
    grads, of_codes = [torch.empty(shape), torch.empty(shape), torch.empty_like(levels)], torch.empty_like(levels)
    kernels["latent_forward"](*operands, out)
    kernels["latent_backward"](grad, *operands, *grads)
    kernels["codes_forward"](codes, levels, picked)
    kernels["codes_backward"](grad, codes, of_codes)
    expected = gradient_formula(grad, *operands)
    exact = [
        (out, matrix_formula(*operands)),
        (grads[0], expected[0]),
        (grads[1], expected[1]),
        (picked, levels.gather(-1, codes.long())),
    ]
    close = [(grads[2], expected[2]), (of_codes, level_gradient_formula(grad, codes))]
    if not (
        all(torch.equal(a, b) for a, b in exact) and all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in close)
    ):
        raise DisprovedError(
            f"the generated training kernels for groups of {group} are wrong on this machine; please report this CPU"
        )
    return kernels
