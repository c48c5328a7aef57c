"""Level rules: the built-in one, one that comes from outside the package, and what registration refuses."""

from __future__ import annotations

import pytest
import stages
import torch
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.codegen import levels
from lbllm_compile.codegen.errors import FormatError
from lbllm_compile.codegen.format import QuantizedWeight, quantize_levels
from lbllm_compile.codegen.levels import FREE, LevelRuleError, LinearRule
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import linears
from lbllm_compile.passes.calibrate.fit import factor, fit
from lbllm_compile.passes.calibrate.simulate import LatentWeight, LevelWeight
from lbllm_compile.passes.lower import check_weights, stored_weights
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from torch import Tensor
from zoo import user_model

from lbllm_compile import frontend
from lbllm_compile.runtime import CompiledModel

SYMMETRIC = levels.register(LinearRule("symmetric", ((1, 0, -1), (1, -1, 0), (1, 1, 0), (1, 0, 1))))
"""Two pairs about a shared offset: ``o - b, o - a, o + a, o + b``. The package does not know it."""

SCALES = st.sampled_from([1e-7, 3e-6, 1e-4, 0.02, 1.0, 300.0, 1e6])


def random_levels(seed: int, *shape: int) -> Tensor:
    return torch.randn((*shape, 4), generator=torch.Generator().manual_seed(seed)).sort(-1).values


def is_symmetric(quantized: Tensor) -> Tensor:
    l0, l1, l2, l3 = quantized.int().unbind(-1)
    return l0 + l3 == l1 + l2


@given(seed=st.integers(0, 2**32 - 1), scale=SCALES)
def test_stored_levels_follow_the_rule_and_stay(seed, scale):
    wanted = scale * random_levels(seed, 5, 3)
    quantized, step = SYMMETRIC.quantize(wanted)
    assert bool(is_symmetric(quantized).all()) and bool(SYMMETRIC.holds(quantized).all())
    assert bool((quantized.int().diff(dim=-1) >= 0).all()) and int(quantized.int().abs().max()) <= 127
    stored = quantized.float() * step.float().unsqueeze(-1)
    nearest = SYMMETRIC.levels(SYMMETRIC.parameters(wanted))
    tolerance = step.float().unsqueeze(-1) * 1.1
    assert bool(((stored - nearest).abs() <= tolerance).all())
    again, same_step = SYMMETRIC.quantize(stored)
    assert torch.equal(again.float() * same_step.float().unsqueeze(-1), stored)
    shuffled = stored[..., [2, 0, 3, 1]]
    again, same_step = SYMMETRIC.stored(shuffled)
    assert torch.equal(again.float() * same_step.float().unsqueeze(-1), shuffled)


def test_groups_of_zeros_and_of_one_level():
    quantized, scale = SYMMETRIC.quantize(torch.tensor([[0.0] * 4, [-2.0] * 4]))
    assert not quantized[0].any() and scale[0] == 0
    assert len(set(quantized[1].tolist())) == 1 and float(quantized[1, 0] * scale[1]) == pytest.approx(-2, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_levels_that_no_scale_holds(bad):
    for rule in (FREE, SYMMETRIC):
        with pytest.raises(FormatError, match=r"check the model|rescale"):
            rule.quantize(torch.tensor([[0.0, 0.0, 1.0, bad]]))


def test_free_is_what_the_format_stores():
    wanted = random_levels(0, 7)
    assert all(torch.equal(a, b) for a, b in zip(FREE.quantize(wanted), quantize_levels(wanted), strict=True))
    assert FREE.parameters(wanted) is wanted and FREE.levels(wanted) is wanted
    assert bool(FREE.holds(quantize_levels(wanted)[0]).all())


def test_a_refit_is_the_least_squares_one_of_the_rule():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn((6, 4, 4), generator=generator, dtype=torch.double)
    normal, right = root @ root.mT + torch.eye(4), torch.randn((6, 4), generator=generator, dtype=torch.double)
    start = SYMMETRIC.levels(torch.randn((6, 3), generator=generator, dtype=torch.double))

    def cost(moved: Tensor) -> Tensor:
        d = moved - start
        return torch.einsum("ui,uij,uj->u", d, normal, d) - 2 * (right * d).sum(-1)

    best = SYMMETRIC.refit(normal, right, start)
    assert torch.allclose(SYMMETRIC.levels(SYMMETRIC.parameters(best)), best)
    for step in 0.01 * torch.cat([torch.eye(3), -torch.eye(3)]).double():
        assert bool((cost(SYMMETRIC.levels(SYMMETRIC.parameters(best) + step)) > cost(best)).all())
    assert bool((cost(FREE.refit(normal, right, start)) <= cost(best) + 1e-9).all())


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_fit_keeps_the_rule_and_its_error_is_what_it_says(rounds):
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn((n, 100), generator=generator) for n in (9, 400))
    factored = factor(x.t() @ x / 400, 32, 0.01)
    found = fit(weight, factored, 32, rounds=rounds, rule=SYMMETRIC)
    packed = QuantizedWeight.from_codes(found.codes, found.levels, 32, SYMMETRIC.quantize)
    assert bool(is_symmetric(packed.levels).all())
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


@pytest.mark.parametrize("seed", range(3))
def test_what_is_packed_is_what_was_trained(seed):
    generator = torch.Generator().manual_seed(seed)
    latent, bitmap = torch.randn((5, 3, 32), generator=generator), torch.rand((5, 3, 32), generator=generator)
    parameters = torch.randn((5, 3, 3), generator=generator)  # pairs out of order, as training may leave them
    weight = LatentWeight(latent, bitmap, parameters, (5, 90), 32, SYMMETRIC)
    packed = weight.fold()
    packed.validate()
    assert bool(is_symmetric(packed.levels).all())
    assert torch.equal(packed.dequantize(), weight.simulate())
    frozen = LevelWeight.of(packed, SYMMETRIC)
    frozen.parameters.add_(torch.randn(frozen.parameters.shape, generator=generator))
    assert torch.equal(frozen.fold().dequantize(), frozen.simulate())


def test_a_rule_from_outside_goes_through_all_stages():
    context = stages.context(probe=stages.batches(1, length=9, seed=2)[0])
    text = (
        'canonicalize,annotate{scheme="*: levels=symmetric; *.0.mlp.*: levels=free"},observe,ptq{group=32},'
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
    assert {rule for path, rule in rules.items() if ".0.mlp." in path} == {"free"}
    assert {rule for path, rule in rules.items() if ".0.mlp." not in path} == {"symmetric"}
    kernels = kernels_of(program)
    ids, mask = (context.probe[name] for name in ("input_ids", "attention_mask"))
    logits = CompiledModel(program, kernels).logits(ids, mask)
    assert torch.equal(logits, CompiledModel(program, ReferenceKernels()).logits(ids, mask))
    for path, weight in stored_weights(program).items():
        assert bool(is_symmetric(weight.levels).all()) == (".0.mlp." not in path)


def test_a_weight_that_breaks_its_rule_is_refused():
    quantized, _ = quantize_levels(random_levels(6, 4))
    FREE.check(quantized, "up.weight")
    with pytest.raises(FormatError, match=r"up\.weight: the levels .* do not follow the level rule 'symmetric'"):
        SYMMETRIC.check(quantized, "up.weight")


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
    with pytest.raises(LevelRuleError, match="there is no level rule 'symetric'; known are free"):
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
