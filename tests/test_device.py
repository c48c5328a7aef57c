"""Calibrations on another device than the CPU; a GPU itself is not needed."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import weakref
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.calibrate.layers import Activations, split
from other_device import OnOtherDevice, other_device
from stages import Memory, annotated, apply, batches, context, quantized, same_tensors

from lbllm_compile import plan

OBSERVED = "observe,ptq{group=32,precision=float32}"

TRAINING = {
    "distill": "distill{epochs=1,precision=float32}",
    "activate, all layers together": "activate{group=32,steps=2,precision=float32}",
    "activate, layer by layer": "activate{group=32,epochs=1,steps=0,precision=float32}",
    "activate, knees": "activate{group=0,epochs=1,steps=1,ranges=knees,precision=float32}",
    "finetune": "finetune{steps=2,precision=float32}",
    "finetune in bfloat16": "finetune{steps=2,precision=bfloat16}",
}


@pytest.fixture(scope="module")
def process():
    """A process of its own: torch keeps a registered device as the one that everything may run on."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def outcome(name, text, device):
    """What the last pass of a pipeline says and leaves, and how many operators of it ran on the other device."""
    given = context(name, 8)
    if device != "other":
        result = apply(annotated(name), text, dataclasses.replace(given, device=torch.device(device)))
        return result.summary, dict(result.program.parameters()), 0
    program = annotated(name)
    with OnOtherDevice() as mode:
        given = dataclasses.replace(given, device=other_device())
        *before, last = pipeline.parse(text)
        for item in before:
            program = item.apply(program, given).program
        mode.calls = 0
        result = last.apply(program, given)
    weights = dict(result.program.parameters())
    assert all(type(weight) is torch.Tensor for weight in weights.values())
    return result.summary, weights, mode.calls


def mixing():
    with OnOtherDevice():
        x = torch.ones(3, device=other_device())
        assert (x + 1).device == x.device
        assert (x + torch.ones(())).tolist() == [2.0] * 3
        for mixed in (lambda: x + torch.ones(3), lambda: torch.stack([x[0], torch.ones(())])):
            with pytest.raises(RuntimeError, match="one device"):
                mixed()


def test_the_other_device_refuses_what_a_gpu_would(process):
    process(mixing)


def measured():
    with OnOtherDevice() as mode:
        speed = plan.matmul_speed(torch.float32, other_device(), seconds=0.01, size=64)
        return speed, mode.calls


def test_a_plan_measures_the_device_that_computes(process):
    speed, calls = process(measured)
    assert speed > 0 and calls >= 2


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_stage_1_gives_the_same_weights(process, name):
    expected, weights, _ = outcome(name, OBSERVED, "cpu")
    summary, found, calls = process(outcome, name, OBSERVED, "other")
    assert calls > 1000
    assert summary == pytest.approx(expected, rel=1e-6)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[path], weights[path]) for path in weights)


def test_stage_1_of_experts_differs_by_rounding(process):
    """On some CPUs products of experts round otherwise from one layout to another, and a tie goes the other way."""
    expected, weights, _ = outcome("mixtral", OBSERVED, "cpu")
    summary, found, calls = process(outcome, "mixtral", OBSERVED, "other")
    assert calls > 1000
    assert summary == pytest.approx(expected, rel=1e-2)
    assert found.keys() == weights.keys()
    # What follows the first layer is calibrated behind it, so that there a difference has spread.
    first = [path for path in weights if ".layers.0." in path]
    assert first and min(float((found[path] == weights[path]).float().mean()) for path in first) > 0.99


def close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether figures are alike, however they are nested; what is no fraction is the same."""
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(close(found[k], expected[k], tolerance) for k in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(close(a, b, tolerance) for a, b in zip(found, expected, strict=True))
    return found == (pytest.approx(expected, rel=tolerance) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("device", ["other", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_stages_that_train_come_as_far(process, kind, device):
    text = f"smooth{{precision=float32}},{OBSERVED},{TRAINING[kind]}"
    expected, weights, _ = outcome("llama", text, "cpu")
    summary, found, calls = process(outcome, "llama", text, device)
    assert calls > 1000 or device == "cuda"
    assert summary.keys() == expected.keys()
    tolerance = 1e-3 if device == "other" and "bfloat16" not in kind else 5e-2
    for key, value in expected.items():
        assert close(summary[key], value, tolerance), key
    assert found.keys() == weights.keys()
    planes = [path for path in weights if path.endswith(WEIGHT[:2])]
    assert planes
    same = [(found[path] == weights[path]).float().mean() for path in planes]
    assert min(same) > 0.98


def resuming():
    """A training that is killed and goes on, on the device, beside one that is not."""
    program = quantized()
    with OnOtherDevice():
        given = dataclasses.replace(context(count=8), device=other_device(), probe=batches(1)[0])

        def tuned(memory):
            return apply(program, "finetune{steps=6,precision=float32}", dataclasses.replace(given, checkpoints=memory))

        whole, memory = tuned(Memory()).program, Memory(saves=1)
        with pytest.raises(Memory.KilledError):
            tuned(memory)
        memory.left = None
        assert same_tensors(tuned(memory).program, whole)
        assert memory.loaded == 1


def test_a_killed_training_goes_on_there(process):
    process(resuming)


def moving():
    with OnOtherDevice():
        for stage in (split(annotated()).prologue, split(annotated()).layers[0]):
            moved = stage.on(other_device())
            assert stage.on(stage.device) is stage
            assert moved.on(other_device()) is moved
            tensors, copies = stage.module.state_dict(), moved.module.state_dict()
            assert tensors
            assert tensors.keys() == copies.keys()
            assert {t.device.type for t in tensors.values()} == {"cpu"}
            assert {t.device for t in copies.values()} == {other_device()}
            arguments = [v for n in moved.module.graph.nodes for v in (*n.args, *n.kwargs.values())]
            assert torch.device("cpu") not in arguments


def test_a_stage_moves_with_its_weights_and_the_devices_in_its_graph(process):
    process(moving)


def passing():
    """A layer that a chain has passed leaves nothing on the device, before Python looks for cycles."""
    layers, made = split(annotated()), []
    on = type(layers.prologue).on

    def watched(stage, device):
        moved = on(stage, device)
        made.extend(weakref.ref(t) for t in moved.module.state_dict().values())
        return moved

    gc.disable()
    with OnOtherDevice(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layers.prologue), "on", watched)
        chain = Activations(batches(1), other_device())
        for stage in (layers.prologue, *layers.layers):
            chain.advance(stage)
        text = "distill{epochs=1,precision=float32}"
        apply(quantized(), text, dataclasses.replace(context(count=2), device=other_device()))
    assert len(made) > 20
    assert not [reference for reference in made if reference() is not None]
    gc.enable()


def test_nothing_of_a_layer_stays_there(process):
    process(passing)
