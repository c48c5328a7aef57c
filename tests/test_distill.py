"""Stage 2: the trainable weight, its gradients, and training layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.codegen.latent import stored_levels
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext, PassError, PassResult
from lbllm_compile.passes.calibrate import layers, simulate, training
from lbllm_compile.passes.calibrate.chains import layer_errors
from lbllm_compile.passes.calibrate.sensitivity import channel_weights
from lbllm_compile.passes.distill import Distill
from stages import Memory, annotated, apply, context, quantized, same_tensors

from lbllm_compile.report.stages import of_layers

_TEXT = "distill{epochs=2,precision=float32}"


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight(n: int, k: int, group: int = 32, stack: tuple[int, ...] = ()) -> tuple[QuantizedWeight, torch.Tensor]:
    """A quantized weight with random codes, and a float weight near it."""
    random = _generator(n + k)
    groups = -(-k // group)
    codes = torch.randint(0, 4, (*stack, n, k), generator=random, dtype=torch.uint8)
    levels = torch.randn((*stack, n, groups, 4), generator=random).sort(-1).values
    weight = QuantizedWeight.from_codes(codes, levels, group)
    exact = weight.dequantize()
    return weight, exact + 0.2 * torch.randn(exact.shape, generator=random)


def _tensors(latent: simulate.LatentWeight) -> tuple[torch.Tensor, ...]:
    return latent.latent, latent.bitmap, latent.levels


@pytest.mark.parametrize("n, k, group, stack", [(3, 64, 32, ()), (5, 100, 64, ()), (2, 31, 32, (3,))])
def test_the_simulation_starts_and_ends_as_the_packed_weight(n, k, group, stack):
    weight, exact = _weight(n, k, group, stack)
    latent = simulate.LatentWeight.of(weight, exact)
    assert torch.equal(latent.simulate(), weight.dequantize())
    random = _generator(1)
    for tensor, size in zip(_tensors(latent), (0.5, 0.3, 0.5), strict=True):
        tensor.add_(size * torch.randn(tensor.shape, generator=random))
    folded = latent.fold()
    folded.validate()
    assert torch.equal(folded.dequantize(), latent.simulate())
    assert not torch.equal(folded.codes(), weight.codes())
    frozen = simulate.LevelWeight.of(folded)
    frozen.levels.add_(0.5 * torch.randn(frozen.levels.shape, generator=random))
    assert torch.equal(frozen.fold().dequantize(), frozen.simulate())


def test_gradients_of_the_simulated_weight():
    weight, exact = _weight(4, 40)
    latent = simulate.LatentWeight.of(weight, exact)
    latent.latent.add_(torch.randn(latent.latent.shape, generator=_generator(2)))
    for tensor in _tensors(latent):
        tensor.requires_grad_(True)
    grad = torch.randn((4, 40), generator=_generator(3))
    latent.simulate().backward(grad)

    padded = torch.nn.functional.pad(grad, (0, 24)).view(4, 2, 32)
    rounded = stored_levels(latent.levels.detach())
    levels = rounded[0] * rounded[1].unsqueeze(-1)
    expected_levels = torch.zeros_like(levels)
    for index in torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(32)).tolist():
        row, group, column = index
        l0, l1, l2, l3 = levels[row, group].tolist()
        w, inner = latent.latent[row, group, column].item(), latent.bitmap[row, group, column].item() > 0.5
        high_inner, high_outer = w > (l1 + l2) / 2, w > (l0 + l3) / 2
        g = padded[row, group, column].item()
        middle, width = ((l1 + l2) / 2, l2 - l1) if inner else ((l0 + l3) / 2, l3 - l0)
        if abs(abs(w - middle) - width) > 1e-5:
            expected = g if abs(w - middle) < width else 0.0
            assert latent.latent.grad[row, group, column].item() == pytest.approx(expected, abs=1e-6)
        pull = (l2 if high_inner else l1) - (l3 if high_outer else l0)
        assert latent.bitmap.grad[row, group, column].item() == pytest.approx(g * pull, abs=1e-4)
        code = (2 if high_inner else 1) if inner else (3 if high_outer else 0)
        expected_levels[row, group, code] += g
    assert torch.allclose(latent.levels.grad, expected_levels, atol=1e-4)


def test_gradients_of_levels_with_frozen_planes():
    weight, _ = _weight(4, 40)
    frozen = simulate.LevelWeight.of(weight)
    frozen.levels.requires_grad_(True)
    grad = torch.randn((4, 40), generator=_generator(3))
    frozen.simulate().backward(grad)
    codes = torch.nn.functional.pad(weight.codes(), (0, 24), value=9).view(4, 2, 32)
    padded = torch.nn.functional.pad(grad, (0, 24)).view(4, 2, 32)
    expected = torch.stack([(padded * (codes == c)).sum(-1) for c in range(4)], -1)
    assert torch.allclose(frozen.levels.grad, expected, atol=1e-5)


def test_a_token_with_a_massive_activation_counts_as_one():
    target = torch.randn((1, 8, 16), generator=_generator())
    target[0, 0] *= 1e2
    off = target.clone()
    off[0, 0] *= 1.1
    error = training.reconstruction({"y": off}, {"y": target}, {"y": torch.ones(16)})
    assert float(error) == pytest.approx(0.01 / 8, rel=1e-3)


def test_a_channel_counts_as_much_as_it_weighs():
    target = torch.randn((2, 5, 3), generator=_generator())
    weights = {"y": torch.tensor([0.0, 1.0, 4.0])}

    def error(channel: int) -> float:
        off = target.clone()
        off[..., channel] += 0.5
        return float(training.reconstruction({"y": off}, {"y": target}, weights))

    assert error(0) == 0 < error(1) and error(2) == pytest.approx(4 * error(1))


def test_training_keeps_the_best_state():
    value = torch.zeros(3)
    batches = [torch.full((3,), 1.0), torch.full((3,), 3.0)]

    def run(rate: float) -> training.Outcome:
        group = training.Group((value,), rate)
        losses = lambda i: (value - batches[i]).square().mean()  # noqa: E731
        return training.train(
            [group], losses, lambda: float(abs(value[0] - 0.5)), _generator(), batches=2, steps=10, every=2
        )

    outcome = run(0.1)
    assert outcome.step > 0 and outcome.after == pytest.approx(abs(float(value[0]) - 0.5))
    assert outcome.after < outcome.before == 0.5
    kept = value.clone()
    outcome = run(10.0)
    assert outcome.step == 0 and torch.equal(value, kept)


def test_a_training_tells_its_losses():
    value, steps = torch.zeros(1), 2 * training.POINTS + 7
    losses = lambda i: (value - 1.0).square().sum()  # noqa: E731
    validate = lambda: float(abs(value[0] - 0.5))  # noqa: E731
    outcome = training.train(
        [training.Group((value,), 0.0), training.Group((value,), 1e-9)], losses, validate, _generator(),
        batches=1, steps=steps, every=30,
    )  # fmt: skip
    assert outcome.curve["validation"] == [[0, 0.5], [30, 0.5], [60, 0.5], [steps, 0.5]]
    assert outcome.curve["training"] == [[step, 1.0] for step in [*range(3, steps + 1, 3), steps]]
    assert len(outcome.curve["training"]) <= training.POINTS


def test_an_interrupted_curve_goes_on():
    whole, first, second = (training.Curve(100, 1.0) for _ in range(3))
    for step in range(1, 101):
        for curve in (whole, first if step <= 50 else second):
            curve.step(step, 1 / step)
            if step == 50:
                curve.validated(step, math.inf)
        if step == 50:
            second.restore(json.loads(json.dumps(first.state())))
    assert second.figures() == whole.figures() and whole.figures()["validation"] == [[0, 1.0]]
    last = whole.figures()["training"][-1]
    assert last == [100, pytest.approx((1 / 97 + 1 / 98 + 1 / 99 + 1 / 100) / 4, rel=1e-4)]


@pytest.fixture(scope="module")
def data() -> PassContext:
    return context(count=48)


@pytest.fixture(scope="module")
def student(data: PassContext):
    return apply(annotated(), "observe,ptq{group=32}", data).program


@pytest.fixture(scope="module")
def trained(student, data: PassContext) -> PassResult:
    return apply(student, _TEXT, data)


def test_distill_lowers_the_held_out_error_of_the_layers(trained):
    verdict = of_layers(trained.rows)
    assert verdict.passed and verdict.text.startswith("2 of 2 layers have flipped bits"), verdict
    for row in trained.rows:
        assert row["after"] < row["start"] <= row["before"] and row["step"] > 0
        assert 0 < row["sign_flips"] < 0.2 and 0 < row["bitmap_flips"] < 0.2


def test_layers_are_measured_again_as_they_were_when_they_trained(student, trained, data):
    behind = dataclasses.replace(data, channel_weights=trained.channel_weights, checkpoints=Memory())
    rows = layer_errors("a pass behind", trained.program, behind, Distill().batch)
    assert [row["after"] for row in rows] == [pytest.approx(row["after"], rel=1e-4) for row in trained.rows]
    assert layer_errors("a pass behind", student, behind, Distill().batch) == rows, "a resumed compile tells the same"
    assert layer_errors("a pass alone", trained.program, data, 2) == []


def test_layers_can_be_measured_on_the_first_batches_alone(student, trained, data):
    behind = dataclasses.replace(data, channel_weights=trained.channel_weights)
    size = len(data.validation[0]["input_ids"])
    few = layer_errors("a pass behind", student, behind, size, 2)
    assert few == layer_errors(
        "a pass behind", student, dataclasses.replace(behind, validation=data.validation[:2]), size
    )
    assert few != layer_errors("a pass behind", student, behind, size)


def test_passes_behind_get_what_the_errors_of_layers_weigh(student, data):
    around = dataclasses.replace(data, probe=data.validation[0])
    text = "distill{epochs=1,batch=2},activate{group=32,steps=0}"
    _, records = pipeline.run(student, pipeline.parse(text), around)
    assert [len(record.rows) for record in records] == [2, 2] and not around.channel_weights
    _, (alone,) = pipeline.run(student, pipeline.parse("activate{group=32,steps=0}"), around)
    assert not alone.rows


def test_without_learning_rate_nothing_improves(student, data):
    rates = "lr_weight=0,lr_bitmap=0,lr_levels=0"
    for text in (f"distill{{epochs=1,{rates}}}", "distill{epochs=0}"):
        result = apply(student, text, data)
        assert not of_layers(result.rows).passed
        assert all(row["sign_flips"] == row["bitmap_flips"] == 0 for row in result.rows)
        assert same_tensors(result.program, student)


def test_the_graph_stays_and_the_model_comes_closer(student, trained, data):
    names = [[(n.name, n.target) for n in p.graph.nodes] for p in (student, trained.program)]
    assert names[0] == names[1]
    errors = []
    for program in (student, trained.program):
        total = sum(float((program.run(b) - annotated().run(b)).norm()) for b in data.validation)
        errors.append(total)
    assert errors[1] < errors[0]


def test_a_layer_is_fed_by_the_quantized_layers_before_it(student, trained, data):
    """The error reported for the last layer is that of the whole chain of trained layers."""
    teacher, parts = layers.split(annotated()), layers.split(trained.program)
    name = parts.layers[-1].outputs[0]
    weights = channel_weights(student, teacher, data, "float32")
    errors = []
    for batch in layers.calibration_batches(student, data.validation, 2):
        chains = [layers.Activations([batch]), layers.Activations([batch])]
        for chain, stages in zip(chains, (teacher, parts), strict=True):
            for stage in (stages.prologue, *stages.layers):
                chain.advance(stage)
        errors.append(float(training.reconstruction(chains[1][0], {name: chains[0][0][name]}, weights)))
    assert trained.rows[-1]["after"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_resumed_run_gives_the_same_bytes(student, trained, data):
    memory = Memory(saves=2)  # the channels' weights and one layer
    with pytest.raises(Memory.KilledError):
        apply(student, _TEXT, dataclasses.replace(data, checkpoints=memory))
    memory.left = None
    before = torch.get_rng_state()
    resumed = apply(student, _TEXT, dataclasses.replace(data, checkpoints=memory))
    assert memory.loaded == 2
    assert same_tensors(resumed.program, trained.program)
    assert torch.equal(before, torch.get_rng_state())


def test_preconditions_are_named(data):
    with pytest.raises(PassError, match="float program"):
        apply(quantized(), "distill", PassContext())
    with pytest.raises(PassError, match="validation"):
        apply(quantized(), "distill", dataclasses.replace(data, validation=()))
    with pytest.raises(PassError, match="ptq"):
        apply(annotated(), "distill", data)


def test_a_layer_in_training_tells_its_error_against_the_first() -> None:
    told: list[str] = []

    class Bar:
        def advance(self, note: str = "") -> None:
            told.append(note)

    weight, target = torch.zeros(1), torch.ones(1)
    groups = [training.Group((weight,), 0.5)]
    outcome = training.train_epochs(
        groups,
        lambda index: ((weight - target) ** 2).sum(),
        lambda: float((weight.detach() - target).abs()),
        torch.Generator().manual_seed(0),
        batches=2,
        epochs=2,
        precision="float32",
        begin=lambda steps: contextlib.nullcontext(Bar()),
    )
    assert told[0] == "error 1.0000, 1.0000 at first"
    assert len(told) == 4 and told[-1].endswith(", 1.0000 at first") and outcome.before == 1.0
    assert float(told[-1].split()[1].rstrip(",")) < 1
