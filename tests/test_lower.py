"""The pass ``lower``: simulated quantization becomes integer operators."""

from __future__ import annotations

import pytest
import torch
from graphs import context, expected, lines, normal, program
from lbllm_compile.codegen import reference
from lbllm_compile.passes import lower
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.head import Head
from lbllm_compile.passes.ir.program import get_attribute
from lbllm_compile.passes.ir.rewrite import calls
from lbllm_compile.passes.lower import IN_FEATURES, Lower, stored_weights
from rtn import quantize, simulate

aten, lbllm = torch.ops.aten, torch.ops.lbllm


def two_linears():
    def forward(root, x):
        return aten.add.Tensor(
            aten.linear.default(x, root.a.weight, root.a.bias), aten.linear.default(x, root.b.weight)
        )

    weights = {"a.weight": normal(24, 100), "a.bias": normal(24, seed=1), "b.weight": normal(24, 100, seed=2)}
    return program(weights, forward, kind="module")


def test_linears_that_share_an_input_share_its_quantizer():
    before = simulate(two_linears())
    after = Lower(target="cpu").apply(before, context()).program
    assert lines(after) == expected("""
        %0 = lbllm.quantize_activation(x, a.input_clip, 4, 32)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = lbllm.bit_linear(%1, %2, a.weight.sign, a.weight.bitmap, a.weight.levels, a.weight.scale, a.bias, 32)
        %4 = lbllm.bit_linear(%1, %2, b.weight.sign, b.weight.bitmap, b.weight.levels, b.weight.scale, None, 32)
        %5 = aten.add.Tensor(%3, %4)
        return %5
    """)
    assert after.metadata["target"] == "cpu"
    x = normal(3, 100, seed=5)
    torch.testing.assert_close(after.module(x), before.module(x), rtol=1e-5, atol=1e-5)


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
    def forward(root, input_ids):
        return aten.linear.default(aten.embedding.default(root.head.weight, input_ids, 0), root.head.weight)

    before = Head().apply(program({"head.weight": normal(7, 40)}, forward), context()).program
    after = Lower().apply(before, context()).program
    assert lines(after) == expected("""
        %0 = lbllm.int8_embedding(head.weight.rows, head.weight.row_scale, input_ids)
        %1 = lbllm.quantize_activation(%0, head.input_clip, 8, 64)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        %4 = lbllm.int8_linear(%2, %3, head.weight.rows, head.weight.row_scale, None, 64)
        return %4
    """)


def test_stacked_experts_lower_to_grouped_bit_linear():
    def forward(root, x, offsets):
        return lbllm.grouped_linear.default(x, root.experts.weight, offsets)

    before = simulate(program({"experts.weight": normal(3, 8, 40)}, forward, kind="module"))
    after = Lower().apply(before, context()).program
    assert "grouped_bit_linear" in lines(after)[-2]
    x, offsets = normal(6, 40, seed=3), torch.tensor([2, 2, 6], dtype=torch.int32)
    torch.testing.assert_close(after.module(x, offsets), before.module(x, offsets), rtol=1e-5, atol=1e-5)


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
    with pytest.raises(PassError, match=r"groups of 64, its weight of 32; use activate\{group=32\}"):
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
