"""The pass ``lower``: simulated quantization becomes integer operators."""

from __future__ import annotations

import pytest
import torch
from graphs import context, normal, program, rewrites
from lbllm_compile.codegen import reference
from lbllm_compile.passes import lower
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.ir.program import get_attribute
from lbllm_compile.passes.ir.rewrite import calls
from lbllm_compile.passes.lower import IN_FEATURES, Lower, stored_weights
from rtn import planes, quantize, simulate

aten, lbllm = torch.ops.aten, torch.ops.lbllm


def two_linears():
    def forward(root, x):
        return aten.add.Tensor(
            aten.linear.default(x, root.a.weight, root.a.bias), aten.linear.default(x, root.b.weight)
        )

    weights = {"a.weight": normal(24, 100), "a.bias": normal(24, seed=1), "b.weight": normal(24, 100, seed=2)}
    return program(weights, forward, kind="module")


def test_linears_that_share_an_input_share_its_quantizer():
    before = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight a.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 32)
        %a_sign: u8[24, 13] = weight a.weight.sign
        %a_bitmap: u8[24, 13] = weight a.weight.bitmap
        %a_levels: i8[24, 4, 4] = weight a.weight.levels
        %a_scale: f16[24, 4] = weight a.weight.scale
        %a_weight = lbllm.unpack_weight(%a_sign, %a_bitmap, %a_levels, %a_scale, 100, 32)
        %bias: f32[24] = weight a.bias
        %a = aten.linear(%quantized, %a_weight, %bias) {path="a", role="decoder"}
        %b_sign: u8[24, 13] = weight b.weight.sign
        %b_bitmap: u8[24, 13] = weight b.weight.bitmap
        %b_levels: i8[24, 4, 4] = weight b.weight.levels
        %b_scale: f16[24, 4] = weight b.weight.scale
        %b_weight = lbllm.unpack_weight(%b_sign, %b_bitmap, %b_levels, %b_scale, 100, 32)
        %b = aten.linear(%quantized, %b_weight) {path="b", role="decoder"}
        outside the decoder layers:
        %total = aten.add.Tensor(%a, %b)
        return %total
    """
    expected = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight a.input_clip
        %quantized = lbllm.quantize_activation(%x, %clip, 4, 32) {in_features=100}
        %values: i8[3, 100] = getitem(%quantized, 0)
        %scale: f32[3, 4] = getitem(%quantized, 1)
        %a_sign: u8[24, 13] = weight a.weight.sign
        %a_bitmap: u8[24, 13] = weight a.weight.bitmap
        %a_levels: i8[24, 4, 4] = weight a.weight.levels
        %a_scale: f16[24, 4] = weight a.weight.scale
        %bias: f32[24] = weight a.bias
        %a: f32[3, 24] = lbllm.bit_linear(%values, %scale, %a_sign, %a_bitmap, %a_levels, %a_scale, %bias, 32) {
            path="a", role="decoder", scheme="group=32 act=4 act-group=32 codebook=none", in_features=100}
        %b_sign: u8[24, 13] = weight b.weight.sign
        %b_bitmap: u8[24, 13] = weight b.weight.bitmap
        %b_levels: i8[24, 4, 4] = weight b.weight.levels
        %b_scale: f16[24, 4] = weight b.weight.scale
        %b: f32[3, 24] = lbllm.bit_linear(%values, %scale, %b_sign, %b_bitmap, %b_levels, %b_scale, None, 32) {
            path="b", role="decoder", scheme="group=32 act=4 act-group=32 codebook=none", in_features=100}
        outside the decoder layers:
        %total = aten.add.Tensor(%a, %b)
        return %total
    """
    weights = {
        **planes("a.weight", normal(24, 100), 32),
        **planes("b.weight", normal(24, 100, seed=2), 32),
        "a.input_clip": torch.tensor([0.95, 0.9]),
    }
    after = rewrites(Lower(target="cpu"), before, expected, context({"x": normal(3, 100, seed=5)}), weights).program
    assert after.metadata["target"] == "cpu"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_lowered_linear_is_the_reference_to_the_bit(bits, per_token):
    source = two_linears()
    after = Lower().apply(simulate(source, group=64, bits=bits, per_token=per_token), context()).program
    x = normal(4, 100, seed=6)
    values, scale = reference.quantize_activation(x, torch.tensor([0.95, 0.9]), bits, 0 if per_token else 64)
    parts = [
        reference.bit_linear(values, scale, quantize(get_attribute(source.module, f"{n}.weight"), 64), bias)
        for n, bias in (("a", get_attribute(source.module, "a.bias")), ("b", None))
    ]
    assert torch.equal(after.module(x), parts[0] + parts[1])


def test_embedding_and_head_lower_to_int8():
    before = """
        %ids = input input_ids
        %rows: i8[7, 40] = weight head.weight.rows
        %row_scale: f32[7] = weight head.weight.row_scale
        %unpacked = lbllm.unpack_rows(%rows, %row_scale)
        %x = aten.embedding(%unpacked, %ids, 0)
        %clip: f32[2] = weight head.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 8, 64)
        %y = aten.linear(%quantized, %unpacked) {path="head", role="head"}
        return %y
    """
    expected = """
        %ids = input input_ids
        %rows: i8[7, 40] = weight head.weight.rows
        %row_scale: f32[7] = weight head.weight.row_scale
        %x: f32[2, 3, 40] = lbllm.int8_embedding(%rows, %row_scale, %ids)
        %clip: f32[2] = weight head.input_clip
        %quantized = lbllm.quantize_activation(%x, %clip, 8, 64) {in_features=40}
        %values: i8[2, 3, 40] = getitem(%quantized, 0)
        %scale: f32[2, 3, 1] = getitem(%quantized, 1)
        %y: f32[2, 3, 7] = lbllm.int8_linear(%values, %scale, %rows, %row_scale, None, 64) {
            path="head", role="head", scheme="bits=8 act=8 act-group=64 codebook=none", in_features=40}
        return %y
    """
    weights = {"head.weight.row_scale": normal(7).abs(), "head.input_clip": torch.ones(2)}
    probe = {"input_ids": torch.tensor([[1, 4, 2], [6, 0, 1]])}
    rewrites(Lower(), before, expected, context(probe), weights)


def test_stacked_experts_lower_to_grouped_bit_linear():
    before = """
        decoder layer 0:
        %x = input x
        %offsets = input offsets
        %clip: f32[2] = weight experts.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 32)
        %sign: u8[3, 8, 5] = weight experts.weight.sign
        %bitmap: u8[3, 8, 5] = weight experts.weight.bitmap
        %levels: i8[3, 8, 2, 4] = weight experts.weight.levels
        %scale: f16[3, 8, 2] = weight experts.weight.scale
        %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 40, 32)
        %y = lbllm.grouped_linear(%quantized, %w, %offsets) {path="experts", role="decoder", experts=3}
        return %y
    """
    expected = """
        decoder layer 0:
        %x = input x
        %offsets = input offsets
        %clip: f32[2] = weight experts.input_clip
        %quantized = lbllm.quantize_activation(%x, %clip, 4, 32) {in_features=40}
        %values = getitem(%quantized, 0)
        %x_scale = getitem(%quantized, 1)
        %sign: u8[3, 8, 5] = weight experts.weight.sign
        %bitmap: u8[3, 8, 5] = weight experts.weight.bitmap
        %levels: i8[3, 8, 2, 4] = weight experts.weight.levels
        %scale: f16[3, 8, 2] = weight experts.weight.scale
        %y: f32[6, 8] = lbllm.grouped_bit_linear(%values, %x_scale, %sign, %bitmap, %levels, %scale, %offsets, 32) {
            path="experts", role="decoder", experts=3,
            scheme="group=32 act=4 act-group=32 codebook=none", in_features=40}
        return %y
    """
    weights = {**planes("experts.weight", normal(3, 8, 40), 32), "experts.input_clip": torch.tensor([0.95, 0.9])}
    probe = {"x": normal(6, 40, seed=3), "offsets": torch.tensor([2, 2, 6], dtype=torch.int32)}
    rewrites(Lower(), before, expected, context(probe), weights)


def test_stored_weights_are_whole_under_their_original_paths():
    source = two_linears()
    after = Lower().apply(simulate(source), context()).program
    found = stored_weights(after)
    assert list(found) == ["a.weight", "b.weight"]
    for path, weight in found.items():
        weight.validate(path)
        assert torch.equal(weight.dequantize(), quantize(get_attribute(source.module, path), 32).dequantize())
    assert {n.meta[IN_FEATURES] for n in calls(after.graph, lbllm.bit_linear.default)} == {100}


def test_a_float_decoder_linear_is_refused():
    with pytest.raises(PassError, match=r"weight of 'linear.*not quantized; put 'ptq' before 'lower'"):
        Lower().apply(two_linears(), context())


def test_an_unquantized_input_is_refused():
    before = simulate(two_linears())
    for node in calls(before.graph, lbllm.fake_quantize.default):
        node.replace_all_uses_with(node.args[0])
    with pytest.raises(PassError, match=r"input of .*put 'activate' before 'lower'"):
        Lower().apply(before, context())


def test_disagreeing_groups_are_refused():
    before = simulate(two_linears(), group=32)
    for node in calls(before.graph, lbllm.fake_quantize.default):
        node.update_arg(3, 64)
    with pytest.raises(
        PassError, match=r"groups of 64, which are no parts of its weight's of 32; use activate\{group=32\}"
    ):
        Lower().apply(before, context())


def test_a_leftover_observer_is_refused():
    def forward(root, x):
        return aten.linear.default(lbllm.observe.default(x, "site"), root.a.weight)

    with pytest.raises(PassError, match=r"observer .*put 'ptq' between"):
        Lower().apply(program({"a.weight": normal(8, 40)}, forward, kind="module"), context())


def test_a_lowered_linear_that_differs_from_its_simulation_is_found(monkeypatch):
    before = simulate(two_linears())
    probe = {"x": normal(5, 100, seed=7)}
    result = Lower().apply(before, context(probe))
    assert 0 < result.summary["worst_linear_error"] < 1e-5

    right = lower._integer_form

    def wrong(linear, quantizer, group):
        target, arguments = right(linear, quantizer, group)
        return target, (*arguments[:4], None, arguments[-1])

    monkeypatch.setattr(lower, "_integer_form", wrong)
    with pytest.raises(PassError, match=r"integer form of 'linear.* differs from its simulation"):
        Lower().apply(before, context(probe))
