"""The fused kernels of training against the plain formulas, and what is packed against what was trained."""

from __future__ import annotations

import pytest
import torch
from lbllm_compile.codegen import latent
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.codegen.latent import gradient_formula, level_gradient_formula, matrix_formula, stored_levels
from lbllm_compile.codegen.sizes import GROUPS
from lbllm_compile.passes.calibrate.simulate import LatentWeight, LevelWeight

_CASES = [(group, features, seed) for group in GROUPS for features, seed in ((group, 0), (3 * group, 1))]


def _latent(group: int, features: int, seed: int) -> LatentWeight:
    """Random parameters with what training can make of them: levels out of order, groups of zeros, far latents."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, -(-features // group), group)
    latent = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 3, shape, generator=generator)
    bitmap = torch.rand(shape, generator=generator)
    bitmap[0, 0, :4] = torch.tensor([0.5, 0.0, 1.0, 0.50001])
    levels = torch.randn((*shape[:2], 4), generator=generator)
    levels[1:] = levels[1:].sort(-1).values
    levels[2] = 0
    levels[3, :, 1] = levels[3, :, 2]
    return LatentWeight(latent, bitmap, levels, (5, features), group)


@pytest.mark.parametrize("group, features, seed", _CASES)
def test_the_kernels_compute_the_formulas(group, features, seed):
    weight = _latent(group, features, seed)
    parameters = [t.requires_grad_() for t in (weight.latent, weight.bitmap, weight.levels)]
    operands = (weight.latent.detach(), weight.bitmap.detach(), *stored_levels(weight.levels.detach()))
    matrix = weight.simulate()
    assert torch.equal(matrix, matrix_formula(*operands).flatten(1)[:, :features])
    grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9))
    matrix.backward(grad)
    of_latent, of_bitmap, of_levels = gradient_formula(grad.reshape(weight.latent.shape), *operands)
    assert torch.equal(parameters[0].grad, of_latent) and torch.equal(parameters[1].grad, of_bitmap)
    torch.testing.assert_close(parameters[2].grad, of_levels, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("features", [64, 100, 259])
def test_a_tail_group_trains_only_what_exists(features):
    weight = _latent(64, features, 2)
    weight.latent.requires_grad_()
    weight.levels.requires_grad_()
    weight.simulate().sum().backward()
    assert not weight.latent.grad.flatten(1)[:, features:].any()
    assert float(weight.levels.grad.sum()) == 5 * features


@pytest.mark.parametrize("group, features, seed", [*_CASES, (64, 100, 3), (128, 259, 4)])
def test_what_is_packed_is_what_was_trained(group, features, seed):
    weight = _latent(group, features, seed)
    assert torch.equal(weight.fold().dequantize(), weight.simulate())


@pytest.mark.parametrize("group, features", [(32, 32), (64, 100), (256, 768)])
def test_levels_alone_give_the_same_matrix_and_gradient(group, features):
    packed = _latent(group, features, 5).fold()
    weight = LevelWeight.of(packed)
    weight.levels.requires_grad_()
    matrix = weight.simulate()
    assert torch.equal(matrix, packed.dequantize())
    grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9))
    matrix.backward(grad)
    padded = torch.nn.functional.pad(grad, (0, weight.picked[0].numel() - features)).reshape(weight.picked.shape)
    torch.testing.assert_close(weight.levels.grad, level_gradient_formula(padded, weight.picked), rtol=1e-5, atol=1e-4)
    assert _same(weight.fold(), packed)


def test_a_wrong_kernel_is_not_used(monkeypatch):
    from lbllm_compile.codegen.kernels import latent as kernels

    right = kernels.latent_kernels(32)
    wrong = {name: right[name] for name in ("latent_forward", "codes_forward", "codes_backward")}
    wrong["latent_backward"] = lambda *tensors: [t.zero_() for t in tensors[5:]]
    monkeypatch.setattr(kernels, "latent_kernels", lambda group: wrong)
    latent._kernels.cache_clear()
    try:
        with pytest.raises(KernelError, match="wrong on this machine"):
            _latent(32, 32, 0).simulate()
    finally:
        latent._kernels.cache_clear()


def test_training_starts_from_the_packed_weight():
    packed = _latent(64, 100, 6).fold()
    target = packed.dequantize() + 0.1 * torch.randn((5, 100), generator=torch.Generator().manual_seed(1))
    assert torch.equal(LatentWeight.of(packed, target).simulate(), packed.dequantize())


def _same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return torch.equal(a.dequantize(), b.dequantize())
