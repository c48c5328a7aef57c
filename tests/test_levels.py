"""Level rules: the built-in ones, one that comes from outside the package, and what registration refuses."""

from __future__ import annotations

import pytest
import stages
import torch
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.codegen import levels
from lbllm_compile.codegen.errors import FormatError
from lbllm_compile.codegen.format import QuantizedWeight, quantize_levels
from lbllm_compile.codegen.levels import ADDITIVE, DUAL, FREE, LevelRule, LevelRuleError, LinearRule
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import linears
from lbllm_compile.passes.calibrate.fit import expectation_maximization, factor, fit
from lbllm_compile.passes.calibrate.simulate import LatentWeight, LevelWeight, NearestWeight
from lbllm_compile.passes.lower import check_weights, stored_weights
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from torch import Tensor
from zoo import user_model

from lbllm_compile import frontend
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.runtime import CompiledModel

SYMMETRIC = levels.register(LinearRule("symmetric", ((1, 0, -1), (1, -1, 0), (1, 1, 0), (1, 0, 1))))
"""Two pairs about a shared offset: ``o - b, o - a, o + a, o + b``. The package does not know it."""

NARROW = (SYMMETRIC, ADDITIVE, DUAL)
"""Rules that do not allow every four levels."""

SCALES = st.sampled_from([1e-7, 3e-6, 1e-4, 0.02, 1.0, 300.0, 1e6])


def random_levels(seed: int, *shape: int) -> Tensor:
    return torch.randn((*shape, 4), generator=torch.Generator().manual_seed(seed)).sort(-1).values


def is_symmetric(quantized: Tensor) -> Tensor:
    l0, l1, l2, l3 = quantized.int().unbind(-1)
    return l0 + l3 == l1 + l2


def follows(rule: LevelRule, quantized: Tensor) -> Tensor:
    return is_symmetric(quantized) & ((quantized == 0).any(-1) if rule is DUAL else True)


@pytest.mark.parametrize("rule", NARROW, ids=lambda rule: rule.name)
@given(seed=st.integers(0, 2**32 - 1), scale=SCALES, shift=st.sampled_from([0.0, 0.0, 3.0, -3.0]))
def test_stored_levels_follow_the_rule_and_stay(rule, seed, scale, shift):
    wanted = scale * (random_levels(seed, 5, 3) + shift)
    quantized, step = rule.quantize(wanted)
    assert bool(follows(rule, quantized).all()) and bool(rule.holds(quantized).all())
    assert bool((quantized.int().diff(dim=-1) >= 0).all()) and int(quantized.int().abs().max()) <= 127
    stored = quantized.float() * step.float().unsqueeze(-1)
    nearest = rule.levels(rule.parameters(wanted))
    tolerance = step.float().unsqueeze(-1) * 1.6  # half a step of each parameter
    assert bool(((stored - nearest).abs() <= tolerance).all())
    again, same_step = rule.quantize(stored)
    assert torch.equal(again.float() * same_step.float().unsqueeze(-1), stored)
    shuffled = stored[..., [2, 0, 3, 1]]
    again, same_step = rule.stored(shuffled)
    assert torch.equal(again.float() * same_step.float().unsqueeze(-1), shuffled)


@pytest.mark.parametrize("rule", [SYMMETRIC, ADDITIVE], ids=lambda rule: rule.name)
def test_groups_of_zeros_and_of_one_level(rule):
    quantized, scale = rule.quantize(torch.tensor([[0.0] * 4, [-2.0] * 4]))
    assert not quantized[0].any() and scale[0] == 0
    assert len(set(quantized[1].tolist())) == 1 and float(quantized[1, 0] * scale[1]) == pytest.approx(-2, rel=1e-3)


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ([-1.0, 0.0, 1.0, 2.0], [-1.0, 0.0, 1.0, 2.0]),
        ([-2.0, -1.0, 0.0, 1.0], [-2.0, -1.0, 0.0, 1.0]),  # the other orientation
        ([0.0, 1.0, 3.0, 4.0], [0.0, 1.0, 3.0, 4.0]),
        ([-4.0, -3.0, -1.0, 0.0], [-4.0, -3.0, -1.0, 0.0]),
        ([-2.0, 0.0, 0.0, 2.0], [-2.0, 0.0, 0.0, 2.0]),
        ([0.0] * 4, [0.0] * 4),
        ([2.0] * 4, [0.0, 2.0, 2.0, 4.0]),  # the square error of 8; with one scale of 0 it would be that, too
        ([-3.0, -1.0, 1.0, 3.0], [-2.0, 0.0, 2.0, 4.0]),  # as close as its mirror image
        ([-3.0, -1.1, 1.1, 3.0], [-2.6333, -1.4667, 0.0, 1.1667]),
    ],
)
def test_dual_levels_are_the_closest_ones(wanted, nearest):
    found = DUAL.levels(DUAL.parameters(torch.tensor(wanted)))
    error = float((found - torch.tensor(wanted)).square().sum())
    assert error <= float((torch.tensor(nearest) - torch.tensor(wanted)).square().sum()) + 1e-6
    if error < 1e-12:
        assert torch.equal(found, torch.tensor(nearest))
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 121)] * 2)
    assert error <= float((DUAL.levels(grid) - torch.tensor(wanted)).square().sum(-1).min()) + 1e-6


@pytest.mark.parametrize("scales", [(2.0, -1.0), (-2.0, 1.0), (1.0, 3.0), (-0.5, -3.0), (0.0, 2.0), (1.0, -1.0)])
def test_dual_levels_are_the_sums_of_two_planes(scales):
    first, second = scales
    levels = DUAL.levels(torch.tensor(scales))
    assert levels.tolist() == sorted([0.0, first, second, first + second])


@pytest.mark.parametrize("rule", [FREE, *NARROW], ids=lambda rule: rule.name)
def test_expectation_maximization_stays_in_the_rule_and_gains_by_it(rule):
    generator = torch.Generator().manual_seed(5)
    weight, importance = torch.randn((50, 64), generator=generator), torch.rand(64, generator=generator) + 0.1

    def error(levels: Tensor) -> Tensor:
        nearest = (weight.unsqueeze(-1) - levels.unsqueeze(1)).square().amin(-1)
        return (importance * nearest).sum(-1)

    found = expectation_maximization(weight, importance, rule)
    torch.testing.assert_close(rule.levels(rule.parameters(found)), found, rtol=1e-5, atol=1e-5)
    free = expectation_maximization(weight, importance)
    moved = rule.levels(rule.parameters(free))  # what it comes to where the rule is heeded afterwards
    assert float(error(free).sum()) <= float(error(found).sum()) <= float(error(moved).sum())
    assert rule is FREE or float(error(found).sum()) < 0.99 * float(error(moved).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_levels_that_no_scale_holds(bad):
    for rule in (FREE, *NARROW):
        with pytest.raises(FormatError, match=r"check the model|rescale"):
            rule.quantize(torch.tensor([[0.0, 0.0, 1.0, bad]]))


def test_free_is_what_the_format_stores():
    wanted = random_levels(0, 7)
    assert all(torch.equal(a, b) for a, b in zip(FREE.quantize(wanted), quantize_levels(wanted), strict=True))
    assert FREE.parameters(wanted) is wanted and FREE.levels(wanted) is wanted
    assert bool(FREE.holds(quantize_levels(wanted)[0]).all())


@pytest.mark.parametrize(("rule", "count"), [(SYMMETRIC, 3), (ADDITIVE, 3), (DUAL, 2)], ids=["s", "a", "d"])
def test_a_refit_is_the_least_squares_one_of_the_rule(rule, count):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn((6, 4, 4), generator=generator, dtype=torch.double)
    normal, right = root @ root.mT + torch.eye(4), torch.randn((6, 4), generator=generator, dtype=torch.double)
    start = rule.levels(torch.randn((6, count), generator=generator, dtype=torch.double)).sort(-1).values

    def cost(moved: Tensor) -> Tensor:
        d = moved - start
        return torch.einsum("ui,uij,uj->u", d, normal, d) - 2 * (right * d).sum(-1)

    best = rule.refit(normal, right, start)
    assert bool((cost(best) <= 0).all())
    ascending = (best.diff(dim=-1) >= 0).all(-1)
    assert bool(ascending.all()) or rule is not DUAL
    assert torch.allclose(rule.levels(rule.parameters(best))[ascending], best[ascending])
    for step in 0.01 * torch.cat([torch.eye(count), -torch.eye(count)]).double():
        moved = rule.levels(rule.parameters(best) + step)
        inside = ascending & (best.diff(dim=-1) > 0.02).all(-1) & (cost(best) < 0)
        assert bool(inside.any()) and bool((cost(moved) > cost(best))[inside].all())
    assert bool((cost(FREE.refit(normal, right, start)) <= cost(best) + 1e-9).all())


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("rule", NARROW, ids=lambda rule: rule.name)
def test_a_fit_keeps_the_rule_and_its_error_is_what_it_says(rule, rounds):
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn((n, 100), generator=generator) for n in (9, 400))
    factored = factor(x.t() @ x / 400, 32, 0.01)
    found = fit(weight, factored, 32, rounds=rounds, rule=rule)
    packed = QuantizedWeight.from_codes(found.codes, found.levels, 32, rule.quantize)
    assert bool(follows(rule, packed.levels).all())
    picked = found.levels.repeat_interleave(32, 1)[:, :100].gather(-1, found.codes.long().unsqueeze(-1)).squeeze(-1)
    assert torch.equal(packed.dequantize(), picked)  # packing changes nothing that was fitted
    free = fit(weight, factored, 32, rounds=rounds)
    assert free.relative_error < found.relative_error < 0.25


def test_gradients_reach_the_parameters_through_the_rule():
    packed = QuantizedWeight.from_codes(
        torch.randint(0, 4, (5, 64), generator=torch.Generator().manual_seed(3), dtype=torch.uint8),
        random_levels(3, 5, 2),
        32,
        SYMMETRIC.quantize,
    )
    exact = packed.dequantize() + 0.1 * torch.randn((5, 64), generator=torch.Generator().manual_seed(4))
    grad = torch.randn((5, 64), generator=torch.Generator().manual_seed(5))
    for weight in (LatentWeight.of(packed, exact, SYMMETRIC), LevelWeight.of(packed, SYMMETRIC)):
        assert torch.equal(weight.simulate(), packed.dequantize())
        assert weight.parameters.shape == (5, 2, 3)
        weight.parameters.requires_grad_()
        weight.simulate().backward(grad)
        codes, cut = packed.codes().view(5, 2, 32), grad.view(5, 2, 32)
        of_levels = torch.stack([(cut * (codes == level)).sum(-1) for level in range(4)], -1)
        l0, l1, l2, l3 = of_levels.unbind(-1)
        expected = torch.stack([l0 + l1 + l2 + l3, l2 - l1, l3 - l0], -1)
        torch.testing.assert_close(weight.parameters.grad, expected, rtol=1e-5, atol=1e-4)


def test_gradients_of_dual_levels_reach_the_scales_that_make_them():
    """``a1 = 2, a2 = -1`` in the first group, whose levels are ``a2, 0, a1 + a2, a1``; turned around in the second."""
    levels = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-2.0, -1.0, 0.0, 1.0]])
    codes = torch.arange(4, dtype=torch.uint8).repeat(1, 16)
    packed = QuantizedWeight.from_codes(codes, levels.unsqueeze(0), 32, DUAL.quantize)
    weight = LevelWeight.of(packed, DUAL)
    weight.parameters.requires_grad_()
    grad = torch.randn((1, 64), generator=torch.Generator().manual_seed(6))
    weight.simulate().backward(grad)
    l0, l1, l2, l3 = grad.view(2, 8, 4).sum(1).unbind(-1)
    larger, smaller = (l3 + torch.stack([l2[0], l1[1]])), l0 + torch.stack([l2[0], l1[1]])
    expected = torch.stack([torch.stack([larger[0], smaller[0]]), torch.stack([larger[1], smaller[1]])])
    order = weight.parameters.detach()[0].argsort(dim=-1, descending=True)  # the positive scale first
    torch.testing.assert_close(weight.parameters.grad[0].gather(-1, order), expected, rtol=1e-5, atol=1e-4)


def nearest_weight(rule: LevelRule, seed: int = 7) -> tuple[QuantizedWeight, Tensor, NearestWeight]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 4, (5, 90), generator=generator, dtype=torch.uint8)
    packed = QuantizedWeight.from_codes(codes, random_levels(seed, 5, 3), 32, rule.quantize)
    exact = packed.dequantize() + 0.5 * torch.randn((5, 90), generator=generator)
    return packed, exact, NearestWeight.of(packed, exact, rule)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", [FREE, *NARROW], ids=lambda rule: rule.name)
def test_elements_take_the_level_nearest_to_their_latent(rule, seed):
    packed, exact, weight = nearest_weight(rule, seed)
    assert torch.equal(weight.simulate(), packed.dequantize())  # moved to where its own level is the nearest
    own = weight.latent.flatten(1)[:, :90]
    values = (packed.levels.float() * packed.scale.float().unsqueeze(-1)).repeat_interleave(32, 1)[:, :90]
    right = values.gather(-1, (exact.unsqueeze(-1) - values).abs().argmin(-1, keepdim=True)).squeeze(-1)
    gap = 0.11 * values.diff(dim=-1).amax(-1)
    kept = (right == packed.dequantize()) & (
        ((exact.unsqueeze(-1) - values).abs().sort(-1).values.diff())[..., 0] > gap
    )
    assert bool(kept.any()) and torch.equal(own[kept], exact[kept])  # others stay as they are
    weight.parameters.add_(0.3 * torch.randn(weight.parameters.shape, generator=torch.Generator().manual_seed(seed)))
    weight.latent.add_(0.3 * torch.randn(weight.latent.shape, generator=torch.Generator().manual_seed(seed + 1)))
    folded = weight.fold()
    folded.validate()
    assert bool(follows(rule, folded.levels).all()) or rule is FREE
    assert torch.equal(folded.dequantize(), weight.simulate())
    values = (folded.levels.double() * folded.scale.double().unsqueeze(-1)).repeat_interleave(32, 1)[:, :90]
    distance = (weight.latent.flatten(1)[:, :90].double().unsqueeze(-1) - values).abs()
    taken = (folded.dequantize().double() - weight.latent.flatten(1)[:, :90].double()).abs()
    assert bool((taken <= distance.amin(-1) + 1e-5).all())


@pytest.mark.parametrize("rule", [FREE, *NARROW], ids=lambda rule: rule.name)
def test_gradients_of_nearest_levels(rule):
    packed, _, weight = nearest_weight(rule)
    weight.latent[0, 0, :2] = torch.tensor([50.0, -50.0])  # far outside the levels
    grad = torch.randn((5, 90), generator=torch.Generator().manual_seed(8))
    frozen = LevelWeight.of(weight.fold(), rule)
    for trained in (weight.parameters, weight.latent, frozen.parameters):
        trained.requires_grad_()
    weight.simulate().backward(grad)
    frozen.simulate().backward(grad)
    torch.testing.assert_close(weight.parameters.grad, frozen.parameters.grad)  # planes count as constant
    passed = weight.latent.grad.flatten(1)[:, :90]
    levels = (packed.levels.float() * packed.scale.float().unsqueeze(-1)).repeat_interleave(32, 1)[:, :90]
    lowest, highest = 2 * levels[..., 0] - levels[..., 1], 2 * levels[..., 3] - levels[..., 2]
    own = weight.latent.detach().flatten(1)[:, :90]
    inside = (own >= lowest) & (own <= highest)
    assert torch.equal(passed, torch.where(inside, grad, 0.0)) and not inside[0, :2].any() and bool(inside.any())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rule", "count"), [(SYMMETRIC, 3), (ADDITIVE, 3), (DUAL, 2)], ids=["s", "a", "d"])
def test_what_is_packed_is_what_was_trained(rule, count, seed):
    generator = torch.Generator().manual_seed(seed)
    latent, bitmap = torch.randn((5, 3, 32), generator=generator), torch.rand((5, 3, 32), generator=generator)
    parameters = torch.randn((5, 3, count), generator=generator)  # pairs out of order, as training may leave them
    weight = LatentWeight(latent, bitmap, parameters, (5, 90), 32, rule)
    packed = weight.fold()
    packed.validate()
    assert bool(follows(rule, packed.levels).all())
    assert torch.equal(packed.dequantize(), weight.simulate())
    frozen = LevelWeight.of(packed, rule)
    frozen.parameters.add_(torch.randn(frozen.parameters.shape, generator=generator))
    assert torch.equal(frozen.fold().dequantize(), frozen.simulate())


@pytest.mark.parametrize("rule", NARROW, ids=lambda rule: rule.name)
def test_a_rule_goes_through_all_stages(rule):
    context = stages.context(probe=stages.batches(1, length=9, seed=2)[0])
    text = (
        f'canonicalize,annotate{{scheme="*: levels={rule.name}; *.0.mlp.*: levels=free"}},observe,ptq{{group=32}},'
        "distill{epochs=2},activate{group=32,steps=8},finetune{steps=8,every=4},"
        "head,merge,lower,cache,cleanup"
    )
    program = frontend.capture(user_model("llama"))
    context.teacher = None
    moved = {}
    for item in pipeline.parse(text):
        program = item.apply(program, context).program
        if item.name == "annotate":
            context.teacher = program
        if item.name in ("ptq", "distill", "activate", "finetune"):
            moved[item.name] = {k: v.clone() for k, v in program.parameters() if k.endswith(".levels")}
    fitted = moved.pop("ptq")
    for name, trained in moved.items():
        assert any(not torch.equal(fitted[path], tensor) for path, tensor in trained.items()), name
    check_weights(program)
    rules = {info.path: info.scheme.levels for _, info in linears(program) if info.role == "decoder"}
    assert {name for path, name in rules.items() if ".0.mlp." in path} == {"free"}
    assert {name for path, name in rules.items() if ".0.mlp." not in path} == {rule.name}
    # Whether kernels may count two planes is known from the scheme alone.
    assert [spec.additive for spec in requirements(program).linears if spec.kind == "bit"].count(False) == 2
    kernels = kernels_of(program)
    ids, mask = (context.probe[name] for name in ("input_ids", "attention_mask"))
    logits = CompiledModel(program, kernels).logits(ids, mask)
    assert torch.equal(logits, CompiledModel(program, ReferenceKernels()).logits(ids, mask))
    for path, weight in stored_weights(program).items():
        assert bool(follows(rule, weight.levels).all()) == (".0.mlp." not in path)


def test_a_weight_that_breaks_its_rule_is_refused():
    quantized, _ = quantize_levels(random_levels(6, 4))
    FREE.check(quantized, "up.weight")
    for rule in NARROW:
        with pytest.raises(FormatError, match=rf"up\.weight: the levels .* do not follow the level rule '{rule.name}'"):
            rule.check(quantized, "up.weight")
    offset = torch.tensor([[-3, -1, 2, 4]], dtype=torch.int8)
    assert bool(ADDITIVE.holds(offset).all()) and not bool(DUAL.holds(offset).any())


@pytest.mark.parametrize(
    ("coefficients", "reason"),
    [
        (((1, 0), (0, 1), (1, 1)), "needs 4 rows"),
        (((1, 0), (0, 1), (1, 1), (1,)), "needs 4 rows"),
        (((1, 1), (2, 2), (3, 3), (4, 4)), "superfluous"),
        (((1, 0), (0, 1), (0.5, 0.5), (1, 1)), "no whole number"),
        (((0, 1), (1, 0), (1, 1), (2, 1)), "when its levels are sorted"),
    ],
)
def test_rules_that_are_none(coefficients, reason):
    with pytest.raises(LevelRuleError, match=reason):
        LinearRule("wrong", coefficients)


def test_names_are_taken_once():
    assert levels.register(LinearRule("symmetric", SYMMETRIC.coefficients)) == SYMMETRIC
    with pytest.raises(LevelRuleError, match="another level rule 'symmetric'"):
        levels.register(LinearRule("symmetric", ((1,), (1,), (1,), (1,))))
    assert levels.get("symmetric") is SYMMETRIC and {"free", "symmetric"} <= set(levels.names())
    with pytest.raises(LevelRuleError, match="there is no level rule 'symetric'; known are free, additive, dual"):
        levels.get("symetric")


def test_rules_of_installed_packages(monkeypatch):
    class Point:
        def __init__(self, name: str, found: object):
            self.name, self.value, self._found = name, f"package:{name}", found

        def load(self) -> object:
            if isinstance(self._found, Exception):
                raise self._found
            return self._found

    flat = LinearRule("flat", ((1,), (1,), (1,), (1,)))
    points = [Point("flat", flat), Point("odd", 3), Point("gone", ImportError("x"))]
    monkeypatch.setattr(levels, "_REGISTERED", dict(levels._REGISTERED))
    monkeypatch.setattr(levels, "entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)])
    assert "flat" in levels.names() and levels.get("flat") is flat
    with pytest.raises(LevelRuleError, match="not a LevelRule named 'odd'"):
        levels.get("odd")
    with pytest.raises(LevelRuleError, match="cannot be imported: x"):
        levels.get("gone")
