"""The pass ``smooth``: scales and offsets move, the float model stays the same."""

from __future__ import annotations

import pytest
import stages
import torch
from graphs import normal, program, rewrites
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.smooth import Smooth
from torch import Tensor
from zoo import ZOO

aten = torch.ops.aten


def _calibrated(rows: int, channels: int, loud: int) -> PassContext:
    """Inputs of which one channel is 100 times as loud as the others."""
    x = normal(rows, channels, seed=5)
    x[:, loud] *= 100
    return PassContext(calibration=[{"x": x}])


def _gated() -> Program:
    """A norm whose output goes into a gated MLP."""

    def forward(root, x):
        n = aten.mul.Tensor(root.norm.weight, x)
        gate, up = aten.linear.default(n, root.gate.weight), aten.linear.default(n, root.up.weight)
        return aten.linear.default(aten.mul.Tensor(aten.silu.default(gate), up), root.down.weight)

    shapes = {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}
    weights = {f"{n}.weight": normal(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    return program({**weights, "norm.weight": torch.ones(8)}, forward, kind="module")


def test_a_norm_and_a_gate_take_the_scales_and_the_graph_stays():
    before, context = _gated(), _calibrated(64, 8, loud=3)
    result = Smooth(strength=1.0).apply(before, context)
    after = result.program
    assert dump.render(after) == dump.render(before)
    x = context.calibration[0]["x"]
    torch.testing.assert_close(after.module(x), before.module(x), rtol=1e-4, atol=1e-3)
    # With strength 1 all channels are equally loud; a geometric mean of 1 keeps their level.
    rms = (x * after.module.norm.weight).square().mean(0).sqrt()
    torch.testing.assert_close(rms, rms.mean().expand(8), rtol=1e-3, atol=0)
    assert float((1 / after.module.norm.weight).log().mean()) == pytest.approx(0, abs=1e-5)
    assert [row.get("into") for row in result.rows] == ["norm.weight", "up.weight"]
    assert result.summary == {"inputs": 2, "smoothed": 2, "centered_keys": 0}
    assert torch.equal(before.module.norm.weight, torch.ones(8))


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_is_the_exponent_of_the_rms(strength):
    context = _calibrated(4096, 8, loud=0)
    after = Smooth(strength=strength).apply(_gated(), context).program
    ratio = float(after.module.norm.weight[1] / after.module.norm.weight[0])
    assert ratio == pytest.approx(100**strength, rel=0.05)


def test_a_norm_that_adds_one_to_its_weight_is_computed():
    before = """
        decoder layer 0:
        %x = input x
        %norm: f32[8] = weight norm.weight
        %gain = aten.add.Tensor(1.0, %norm)
        %n = aten.mul.Tensor(%x, %gain)
        %w: f32[4, 8] = weight q.weight
        %q = aten.linear(%n, %w) {path="q", role="decoder"}
        return %q
    """
    expected = """
        decoder layer 0:
        %x = input x
        %norm: f32[8] = weight norm.weight
        %n = aten.mul.Tensor(%x, %norm)
        %w: f32[4, 8] = weight q.weight
        %q = aten.linear(%n, %w) {path="q", role="decoder"}
        return %q
    """
    context = _calibrated(64, 8, loud=2)
    given = parse(before, {"norm.weight": torch.zeros(8)}, "module")
    after = rewrites(Smooth(), given, expected, context).program
    inputs = context.calibration[0]
    torch.testing.assert_close(after.run(inputs), given.run(inputs), rtol=1e-4, atol=1e-3)


def test_layer_norm_is_divided_in_weight_and_bias():
    def forward(root, x):
        n = aten.layer_norm.default(x, [8], root.norm.weight, root.norm.bias, 1e-5)
        return aten.linear.default(n, root.q.weight)

    weights = {"norm.weight": normal(8, seed=1), "norm.bias": normal(8, seed=2) * 30, "q.weight": normal(4, 8)}
    before, x = program(weights, forward, kind="module"), normal(32, 8, seed=3)
    after = Smooth().apply(before, PassContext(calibration=[{"x": x}])).program
    torch.testing.assert_close(after.module(x), before.module(x), rtol=1e-4, atol=1e-3)
    assert not torch.equal(after.module.norm.bias, before.module.norm.bias)


def test_inputs_that_no_weight_computes_alone_are_left():
    def forward(root, x):
        n = aten.mul.Tensor(root.norm.weight, x)
        shared = aten.mul.Tensor(root.norm.weight, aten.linear.default(n, root.q.weight))
        read = aten.relu.default(aten.linear.default(shared, root.k.weight))
        return aten.add.Tensor(aten.linear.default(read, root.o.weight), read)

    weights = {f"{n}.weight": normal(8, 8, seed=i) for i, n in enumerate("qko")}
    before, x = program({**weights, "norm.weight": normal(8)}, forward, kind="module"), normal(16, 8)
    result = Smooth().apply(before, PassContext(calibration=[{"x": x}]))
    assert [row["left"] for row in result.rows] == [
        "other values use the norm's weight",
        "other values use the norm's weight",
        "also read by something that is not quantized",
    ]
    assert torch.equal(result.program.module(x), before.module(x))


def test_a_dead_channel_keeps_a_finite_scale():
    x = normal(32, 8)
    x[:, 5] = 0
    after = Smooth(strength=1.0).apply(_gated(), PassContext(calibration=[{"x": x}])).program
    assert all(bool(torch.isfinite(t).all()) for _, t in after.parameters())
    silent = Smooth().apply(_gated(), PassContext(calibration=[{"x": torch.zeros(4, 8)}])).program
    assert all(bool(torch.isfinite(t).all()) for _, t in silent.parameters())


ATTENTION = """
    decoder layer 0:
    %q = input q
    %x = input x
    %k_weight: f32[8, 8] = weight k.weight
    %k_row = aten.linear(%x, %k_weight) {path="k", role="decoder"}
    %v_weight: f32[8, 8] = weight v.weight
    %v_row = aten.linear(%x, %v_weight) {path="v", role="decoder"}
    %k_heads = aten.view(%k_row, [2, 6, 2, 4])  # attn
    %v_heads = aten.view(%v_row, [2, 6, 2, 4])
    %key = aten.transpose.int(%k_heads, 1, 2)  # attn
    %value = aten.transpose.int(%v_heads, 1, 2)
    %y = aten.scaled_dot_product_attention(%q, %key, %value)
    return %y
"""


def test_the_mean_key_is_subtracted_where_attention_reads_it():
    expected = """
        decoder layer 0:
        %q = input q
        %x = input x
        %k_weight: f32[8, 8] = weight k.weight
        %k_row = aten.linear(%x, %k_weight) {path="k", role="decoder"}
        %v_weight: f32[8, 8] = weight v.weight
        %v_row = aten.linear(%x, %v_weight) {path="v", role="decoder"}
        %k_heads = aten.view(%k_row, [2, 6, 2, 4])  # attn
        %v_heads = aten.view(%v_row, [2, 6, 2, 4])
        %key = aten.transpose.int(%k_heads, 1, 2)  # attn
        %mean: f32[2, 1, 4] = weight attn.key_mean
        %centered: f32[2, 2, 6, 4] = aten.sub.Tensor(%key, %mean)  # attn
        %value = aten.transpose.int(%v_heads, 1, 2)
        %y = aten.scaled_dot_product_attention(%q, %centered, %value)
        return %y
    """
    inputs = {"q": normal(2, 2, 6, 4, seed=3), "x": normal(2, 6, 8, seed=4) + 3}
    context = PassContext(calibration=[inputs], probe=inputs)
    centering = Smooth(strength=0.0, precision="float32")
    after = rewrites(centering, ATTENTION, expected, context, kind="causal-lm").program
    weights = dict(after.parameters())
    keys = (inputs["x"] @ weights["k.weight"].T).view(2, 6, 2, 4).transpose(1, 2)
    torch.testing.assert_close(weights["attn.key_mean"].squeeze(1), keys.mean((0, 2)), rtol=1e-4, atol=1e-4)
    rewrites(Smooth(strength=0.0, center_keys=False), ATTENTION, ATTENTION, context, kind="causal-lm")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_architecture_computes_the_same(name):
    before = stages.annotated(name)
    context = stages.context(name)
    result = Smooth().apply(before, context)
    inputs = stages.batches(1, seed=9)[0]
    mask = torch.ones_like(inputs["attention_mask"])
    mask[0, :5] = 0
    inputs = {**inputs, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    attended = mask.bool()
    torch.testing.assert_close(result.program.run(inputs)[attended], before.run(inputs)[attended], rtol=1e-4, atol=1e-4)
    assert result.summary["smoothed"] > 0
    assert result.summary["centered_keys"] > 0


def test_what_has_to_come_first_is_said():
    before = stages.annotated()
    with pytest.raises(PassError, match="calibration text"):
        Smooth().apply(before, PassContext())
    observed = stages.apply(before, "observe").program
    with pytest.raises(PassError, match="in front of 'observe'"):
        Smooth().apply(observed, stages.context())


def test_four_bit_keys_come_closer():
    """The reason for centering, on keys with a constant part."""
    keys = normal(1, 2, 64, 16, seed=1)
    keys[..., 0] += 20
    quantize = torch.ops.lbllm.fake_quantize_kv

    def error(x: Tensor) -> float:
        return float((quantize(x, 4) - x).square().mean())

    assert error(keys - keys.mean((0, 2), keepdim=True)) < 0.1 * error(keys)
