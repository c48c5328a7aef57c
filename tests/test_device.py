"""Calibrations on another device than the CPU; a GPU itself is not needed."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from lbllm_compile.passes.layers import split
from other_device import OnOtherDevice, other_device
from stages import annotated, apply, context

OBSERVED = "observe,ptq{group=32,precision=float32}"

TRAINING = {
    "distill": "distill{epochs=1,precision=float32}",
    "activate, all layers together": "activate{group=32,steps=2,precision=float32}",
    "activate, layer by layer": "activate{group=32,epochs=1,steps=0,precision=float32}",
    "activate, knees": "activate{group=0,epochs=1,steps=1,ranges=knees,precision=float32}",
    "finetune": "finetune{steps=2,precision=float32}",
}


@pytest.fixture(scope="module")
def process():
    """A process of its own: torch keeps a registered device as the one that everything may run on."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def outcome(name, text, elsewhere):
    """Summary and weights behind a pipeline, and how many operators ran on the other device."""
    given = context(name, 8)
    if not elsewhere:
        result = apply(annotated(name), text, given)
        return result.summary, dict(result.program.parameters()), 0
    program, mode = annotated(name), OnOtherDevice()
    with mode:
        result = apply(program, text, dataclasses.replace(given, device=other_device()))
    weights = dict(result.program.parameters())
    assert all(type(weight) is torch.Tensor for weight in weights.values())
    return result.summary, weights, mode.calls


def mixing():
    with OnOtherDevice():
        x = torch.ones(3, device=other_device())
        assert (x + 1).device == x.device
        assert (x + 1).tolist() == [2.0] * 3
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(3)


def test_the_other_device_refuses_what_a_gpu_would(process):
    process(mixing)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow), "mixtral"])
def test_stage_1_gives_the_same_weights(process, name):
    expected, weights, _ = outcome(name, OBSERVED, False)
    summary, found, calls = process(outcome, name, OBSERVED, True)
    assert calls > 1000
    assert summary == pytest.approx(expected, rel=1e-6)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[path], weights[path]) for path in weights)


@pytest.mark.parametrize("kind", TRAINING)
def test_stages_that_train_come_as_far(process, kind):
    text = f"smooth{{precision=float32}},{OBSERVED},{TRAINING[kind]}"
    expected, before, _ = outcome("llama", text, False)
    summary, found, calls = process(outcome, "llama", text, True)
    assert calls > 1000
    assert found.keys() == before.keys()
    assert summary.keys() == expected.keys()
    for key, value in expected.items():
        assert summary[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key


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
