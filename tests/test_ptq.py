"""Stage 1: the matrix fit and the pass around it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.passes import distill, ptq
from lbllm_compile.passes.annotate import LAYER, LINEAR, LinearInfo, matrix_count
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.calibrate import fit
from lbllm_compile.passes.ir.program import Program, get_attribute, set_attribute
from stages import Memory, annotated, apply, batches, context, quantized, same_tensors
from torch import fx, nn

from lbllm_compile import footprint

_lbllm = torch.ops.lbllm


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the Hessian of correlated inputs of very unequal size."""
    random = _generator(seed)
    mixing = torch.eye(k) + torch.randn((k, k), generator=random) / k**0.5
    x = torch.randn((4 * k, k), generator=random) @ mixing * torch.randn(k, generator=random).exp()
    return torch.randn((n, k), generator=random), x.t() @ x / len(x)


def _round_to_nearest(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Four even levels over each group's range."""
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        w = weight[:, start : start + group]
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        out[:, start : start + group] = low + ((w - low) / (high - low) * 3).round() / 3 * (high - low)
    return out


def _error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = weight - quantized
    return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(5, 64), st.integers(0, 1000))
def test_expectation_maximization_beats_even_levels(n, g, seed):
    weight = torch.randn((n, g), generator=_generator(seed))
    importance = torch.rand(g, generator=_generator(seed + 1)) + 0.01
    levels = fit.expectation_maximization(weight, importance)
    assert bool((levels.diff(dim=-1) >= 0).all())
    error = ((weight.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1).square() * importance).sum()
    even = ((weight - _round_to_nearest(weight, g)).square() * importance).sum()
    assert error <= even + 1e-6


def test_expectation_maximization_finds_four_clusters():
    levels = torch.tensor([[-3.0, -0.5, 0.25, 7.0]])
    weight = levels[:, torch.randint(0, 4, (64,), generator=_generator(0))]
    assert torch.allclose(fit.expectation_maximization(weight, torch.rand(64) + 0.1), levels)


def test_factor_is_a_root_of_the_damped_reordered_hessian():
    _, hessian = _problem(1, 70)
    factored = fit.factor(hessian, 32, 0.01)
    expected = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(70)
    assert torch.allclose(factored.root @ factored.root.t(), expected[factored.order][:, factored.order], rtol=1e-3)
    assert torch.allclose(factored.inverse @ factored.root, torch.eye(70), atol=1e-3)
    assert sorted(factored.sizes) == [6, 32, 32] and factored.order.sort().values.equal(torch.arange(70))


def test_damping_adapts_to_a_singular_hessian_and_dead_columns_are_found():
    hessian = torch.ones((40, 40))
    hessian[3], hessian[:, 3] = 0, 0
    factored = fit.factor(hessian, 32, 0.0)
    assert factored.damp > 0 and factored.dead.nonzero().flatten().tolist() == [3]
    with pytest.raises(fit.FitError, match="not finite"):
        fit.factor(torch.full((4, 4), float("nan")), 32, 0.01)


@pytest.mark.parametrize("n, k, group", [(5, 64, 32), (7, 100, 64), (3, 259, 128), (4, 31, 32)])
def test_fit_obeys_the_format_and_beats_round_to_nearest(n, k, group):
    weight, hessian = _problem(n, k)
    factored = fit.factor(hessian, group, 0.01)
    errors = []
    for compensate in (False, True):
        found = fit.fit(weight, factored, group, compensate=compensate)
        packed = QuantizedWeight.from_codes(found.codes, found.levels, group)
        picked = found.levels.repeat_interleave(group, 1)[:, :k].gather(-1, found.codes.long().unsqueeze(-1))
        assert torch.equal(packed.dequantize(), picked.squeeze(-1))
        errors.append(_error(weight, packed.dequantize(), hessian))
    assert errors[1] < errors[0] < 0.6 * _error(weight, _round_to_nearest(weight, group), hessian)


def test_more_rounds_do_not_hurt_a_group():
    weight, hessian = _problem(16, 64)
    factored = fit.factor(hessian, 64, 0.01)
    errors = [fit.fit(weight, factored, 64, rounds=rounds).error for rounds in (1, 2, 3)]
    assert bool((errors[1] <= errors[0] * 1.0001).all() and (errors[2] <= errors[1] * 1.0001).all())


def test_rows_are_fitted_independently():
    weight, hessian = _problem(9, 100)
    factored = fit.factor(hessian, 32, 0.01)
    whole, part = fit.fit(weight, factored, 32), fit.fit(weight[4:], factored, 32)
    assert (whole.rows(4, 9).codes == part.codes).float().mean() > 0.99
    assert whole.rows(4, 9).relative_error == pytest.approx(part.relative_error, rel=1e-2)


def test_dead_columns_do_not_disturb_the_others():
    weight, hessian = _problem(4, 64)
    hessian[10], hessian[:, 10] = 0, 0
    weight[:, 10] = 100.0
    found = fit.fit(weight, fit.factor(hessian, 32, 0.01), 32)
    assert float(found.levels.abs().max()) < 10


def test_a_weight_makes_up_for_errors_in_its_inputs():
    """Moved all the way, its outputs are as close to those of the float inputs as a linear map can bring them."""
    random = _generator(3)
    x = torch.randn((400, 24), generator=random)
    quantized_x = 0.8 * x + 0.3 * torch.randn((400, 24), generator=random)
    weight = torch.randn((5, 24), generator=random)
    factored = fit.factor(quantized_x.t() @ quantized_x / 400, 32, 0.0)
    moved = weight + weight @ ptq.error_correction(factored, (x - quantized_x).t() @ quantized_x / 400)
    assert torch.allclose(moved, torch.linalg.lstsq(quantized_x, x @ weight.t()).solution.t(), atol=1e-4)


def _rough(options: str, **given: Any) -> Program:
    """The model in groups of 128 rounded to even levels, whose errors are large."""
    text = f"observe,ptq{{group=128,init=rtn,compensate=false,{options}}}"
    return apply(annotated(), text, context(count=4, **given)).program


def test_errors_of_the_layers_in_front_can_propagate():
    """Given the float program, the result on the calibration text is closer to it than without; what reads no quantized
    input stays the same."""
    with_errors, without = _rough("propagate=1"), _rough("propagate=0")
    changed = {path for path, t in with_errors.parameters() if not torch.equal(t, dict(without.parameters())[path])}
    assert not any(f".0.self_attn.{name}_proj" in path for path in changed for name in "qkv")
    assert all(any(f".{n}.{linear}" in path for path in changed) for n in (0, 1) for linear in ("self_attn", "mlp"))

    def distance(program: Program) -> float:
        return sum(float((program.run(b) - annotated().run(b)).norm()) for b in context(count=4).calibration)

    assert distance(with_errors) < 0.95 * distance(without)


def test_propagating_errors_takes_hessians():
    with pytest.raises(PassError, match=r"use observe\{stat=hessian\}"):
        apply(annotated(), "observe{stat=absmax},ptq{propagate=0.5}", context(count=2))


def test_errors_propagate_around_stacked_experts():
    """What is behind experts moves; the experts, which see other tokens in the float model, take part as ever."""
    made = [
        apply(annotated("mixtral"), f"observe,ptq{{group=32,propagate={share}}}", context("mixtral", 4)).program
        for share in (0, 1)
    ]
    first, second = (dict(program.parameters()) for program in made)
    changed = {path for path in first if not torch.equal(first[path], second[path])}
    assert first.keys() == second.keys() and any(".1.self_attn." in path for path in changed)


def test_layers_are_fitted_to_so_many_sequences(monkeypatch):
    """Batches behind the first ``sequences`` change nothing, and are not trained on."""
    few, many = context(count=4), context(count=8)
    assert torch.equal(few.calibration[3]["input_ids"], many.calibration[3]["input_ids"])
    fitted = [apply(annotated(), "observe,ptq{group=32,sequences=8}", given).program for given in (few, many)]
    assert same_tensors(*fitted)
    rest = dataclasses.replace(many, calibration=many.calibration[4:])
    assert not same_tensors(apply(annotated(), "observe,ptq{group=32,sequences=8}", rest).program, fitted[0])
    trained: list[int] = []

    def stop(*arguments: Any) -> None:
        trained.append(arguments[4])
        raise Memory.KilledError

    monkeypatch.setattr(distill, "train_epochs", stop)
    for text in ("distill", "distill{sequences=8}"):
        with pytest.raises(Memory.KilledError):
            apply(fitted[0], text, many)
    assert trained == [8, 4]  # batches of two sequences


def test_propagated_errors_survive_a_kill():
    memory = Memory(saves=1)
    with pytest.raises(Memory.KilledError):
        _rough("propagate=0.5", checkpoints=memory)
    memory.left = None
    assert same_tensors(_rough("propagate=0.5", checkpoints=memory), _rough("propagate=0.5")) and memory.loaded == 1


def test_weights_become_unpacked_planes():
    before = annotated()
    program = quantized()
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert _lbllm.observe.default not in targets
    assert targets.count(_lbllm.unpack_weight.default) == matrix_count(before) == 14
    linear = next(n for n in program.graph.nodes if LINEAR in n.meta)
    original = next(n for n in before.graph.nodes if n.name == linear.name)
    path = "model.layers.0.self_attn.q_proj.weight"
    unpack = linear.args[1]
    assert unpack.target is _lbllm.unpack_weight.default and unpack.meta[LAYER] == 0
    assert [a.target for a in unpack.args[:4]] == [f"{path}.{f}" for f in ("sign", "bitmap", "levels", "scale")]
    assert unpack.args[4:] == (72, 32)
    assert linear.args[0].name == original.args[0].name
    assert get_attribute(before.module, path).dtype == torch.float32
    weight = QuantizedWeight(*(get_attribute(program.module, a.target) for a in unpack.args[:4]), *unpack.args[4:])
    weight.validate()


def test_rows_report_every_linear_and_outputs_stay_close():
    result = apply(annotated(), "observe,ptq{group=32}", context())
    assert [row["layer"] for row in result.rows] == [0] * 7 + [1] * 7
    assert all(0 < row["error"] < 0.15 for row in result.rows)
    batch = batches(1, seed=3)[0]
    exact, rough = annotated().run(batch), result.program.run(batch)
    worse = apply(annotated(), "observe{stat=absmax},ptq{group=32,compensate=false}", context()).program.run(batch)
    assert (rough - exact).norm() < (worse - exact).norm() < exact.norm()


def test_a_resumed_run_gives_the_same_bytes():
    memory = Memory(saves=1)
    with pytest.raises(Memory.KilledError):
        apply(annotated(), "observe,ptq{group=32}", context(checkpoints=memory))
    memory.left = None
    resumed = apply(annotated(), "observe,ptq{group=32}", context(checkpoints=memory))
    assert memory.loaded == 1 and len(memory.kept) == 2
    assert same_tensors(resumed.program, quantized())


def _experts(tokens_of_last: int) -> tuple[Program, list[dict[str, torch.Tensor]]]:
    """Three stacked experts; the last one gets few tokens."""
    root, graph = nn.Module(), fx.Graph()
    set_attribute(root, "experts.up", torch.randn((3, 8, 36), generator=_generator(0)))
    x, offsets = graph.placeholder("x"), graph.placeholder("offsets")
    node = graph.call_function(_lbllm.grouped_linear.default, (x, graph.get_attr("experts.up"), offsets))
    node.meta[LINEAR] = LinearInfo("experts.up", "experts.up", 0, "decoder", 3, "")
    node.meta[LAYER] = 0
    graph.output(node)
    count = 200 + tokens_of_last
    batch = {"x": torch.randn((count, 36), generator=_generator(1)), "offsets": torch.tensor([100, 200, count])}
    return Program(fx.GraphModule(root, graph), "module"), [batch]


@pytest.mark.parametrize("tokens, fallbacks", [(100, 0), (5, 1)])
def test_experts_use_their_own_tokens_where_there_are_enough(tokens, fallbacks):
    program, data = _experts(tokens)
    result = apply(program, "observe,ptq{group=32}", PassContext(calibration=data))
    assert result.summary["fallback_experts"] == fallbacks
    assert get_attribute(result.program.module, "experts.up.levels").shape == (3, 8, 2, 4)
    out, exact = result.program.run(data[0]), program.run(data[0])
    assert 0 < (out - exact).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("stat", ["hessian", "absmax"])
@pytest.mark.parametrize("tokens", [100, 5])
@pytest.mark.parametrize("together", [1, 2])
def test_experts_are_the_same_however_many_are_held(monkeypatch, tokens, together, stat):
    program, (whole,) = _experts(tokens)
    half = {"x": whole["x"][::2], "offsets": whole["offsets"] // 2}
    text = f"observe{{stat={stat}}},ptq{{group=32}}"
    data = [whole, half]
    plain = apply(program, text, PassContext(calibration=data)).program
    width = 36 if stat == "absmax" else 36 * 36
    monkeypatch.setattr(ptq, "HESSIAN_BYTES", 4 * together * width)
    most = 0
    gather = ptq.Statistic._add_held

    def watched(statistic, values):
        nonlocal most
        gather(statistic, values)
        most = max(most, sum(t is not None for t in statistic.sums))

    monkeypatch.setattr(ptq.Statistic, "_add_held", watched)
    assert same_tensors(apply(program, text, PassContext(calibration=data)).program, plain)
    assert most == together


@pytest.mark.parametrize("kind", ["hessian", "absmax"])
def test_experts_are_pooled_in_blocks_no_larger_than_one_of_their_sums(monkeypatch, kind):
    """Stacked whole, the sums of all experts would be there twice."""
    shape = (64, 64) if kind == "hessian" else (64,)
    sums = [None, *(torch.rand(shape, generator=_generator(i)) for i in range(12))]
    statistic = ptq.Statistic("x", kind, [], "offsets", 13, sums, [0, *[5] * 12], range(13))
    stack, most = torch.stack, []
    monkeypatch.setattr(
        torch, "stack", lambda tensors: most.append(4 * sum(t.numel() for t in tensors)) or stack(tensors)
    )
    pool = ptq.Pool(statistic)
    for _ in range(2):  # two windows of experts
        pool.add()
    monkeypatch.undo()
    one = sums[1].numel() * 4
    assert 0 < max(most) <= one * (1 + 12 / 64)
    together = torch.stack(sums[1:])
    expected = torch.diag(together.amax(0).square()) if kind == "absmax" else ptq._symmetric(2 * together.sum(0)) / 60
    torch.testing.assert_close(pool.hessian(), expected)


def test_the_plan_counts_the_hessians_that_are_held():
    """256 experts of 7168 channels would take 53 GB of Hessians at once."""

    def stage_1(experts):
        shapes = [[(experts, 2048, 7168)]] if experts else [[(2048, 7168)]]
        model = footprint.Model(10**9, 10**6, 1000, shapes, whole=False, artifact=10**9)
        work = footprint.Work(10**6, 256, 8, 0, 0, 0, 0, 64, text=None, half=False)
        return footprint.memory(model, work)["stage 1, ptq"]

    square = 4 * 7168**2
    assert stage_1(1) - stage_1(0) == 2 * square + 6 * 2048 * 7168
    assert stage_1(8) - stage_1(4) == 4 * square + 4 * 6 * 2048 * 7168
    assert stage_1(256) - stage_1(128) == 128 * 6 * 2048 * 7168


def test_preconditions_are_named():
    with pytest.raises(PassError, match="observe"):
        apply(annotated(), "ptq", context())
    with pytest.raises(PassError, match="group cannot be 48"):
        apply(annotated(), "observe,ptq{group=48}", context())
    with pytest.raises(PassError, match="calibration"):
        apply(annotated(), "observe,ptq", PassContext())
    broken = annotated().copy()
    path = "model.layers.1.mlp.up_proj.weight"
    set_attribute(broken.module, path, torch.full_like(get_attribute(broken.module, path), float("nan")))
    with pytest.raises(PassError, match=path):
        apply(broken, "observe,ptq", context())
