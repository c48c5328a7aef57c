"""The pass ``merge``: linears that share their quantized input become one."""

from __future__ import annotations

import torch
from graphs import context, normal, program, rewrites
from lbllm_compile.passes.annotate import LINEAR
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.rewrite import calls
from lbllm_compile.passes.merge import Merge
from rtn import planes, simulate

aten = torch.ops.aten


def attention_inputs(biases=("q",)):
    """q, k, v from one input and o from another."""

    def forward(root, x):
        bias = {n: getattr(root, n).bias if n in biases else None for n in "qkv"}
        q = aten.view.default(aten.linear.default(x, root.q.weight, bias["q"]), [-1, 8])
        k = aten.linear.default(x, root.k.weight, bias["k"])
        v = aten.linear.default(x, root.v.weight, bias["v"])
        return aten.linear.default(aten.add.Tensor(k, v), root.o.weight), q

    weights = {
        f"{n}.weight": normal(rows, 40, seed=i) for i, (n, rows) in enumerate(zip("qkv", (16, 8, 8), strict=True))
    }
    return program(
        {**weights, "o.weight": normal(40, 8, seed=9), **{f"{n}.bias": normal(16 if n == "q" else 8) for n in biases}},
        forward,
        kind="module",
    )


def outputs(item, x):
    return item.module(x)


def test_linears_with_one_input_are_stacked_and_split():
    before = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight q.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 32)
        %q_sign: u8[16, 5] = weight q.weight.sign
        %q_bitmap: u8[16, 5] = weight q.weight.bitmap
        %q_levels: i8[16, 2, 4] = weight q.weight.levels
        %q_scale: f16[16, 2] = weight q.weight.scale
        %q_weight = lbllm.unpack_weight(%q_sign, %q_bitmap, %q_levels, %q_scale, 40, 32)
        %q = aten.linear(%quantized, %q_weight) {path="q", role="decoder"}
        %heads = aten.view(%q, [-1, 8])
        %k_sign: u8[8, 5] = weight k.weight.sign
        %k_bitmap: u8[8, 5] = weight k.weight.bitmap
        %k_levels: i8[8, 2, 4] = weight k.weight.levels
        %k_scale: f16[8, 2] = weight k.weight.scale
        %k_weight = lbllm.unpack_weight(%k_sign, %k_bitmap, %k_levels, %k_scale, 40, 32)
        %k = aten.linear(%quantized, %k_weight) {path="k", role="decoder"}
        %o_clip: f32[2] = weight o.input_clip
        %o_quantized = lbllm.fake_quantize(%k, %o_clip, 4, 32)
        %o_sign: u8[40, 1] = weight o.weight.sign
        %o_bitmap: u8[40, 1] = weight o.weight.bitmap
        %o_levels: i8[40, 1, 4] = weight o.weight.levels
        %o_scale: f16[40, 1] = weight o.weight.scale
        %o_weight = lbllm.unpack_weight(%o_sign, %o_bitmap, %o_levels, %o_scale, 8, 32)
        %o = aten.linear(%o_quantized, %o_weight) {path="o", role="decoder"}
        return (%o, %heads)
    """
    expected = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight q.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 32)
        %q_sign: u8[16, 5] = weight q.weight.sign
        %k_sign: u8[8, 5] = weight k.weight.sign
        %sign: u8[24, 5] = aten.cat([%q_sign, %k_sign])
        %q_bitmap: u8[16, 5] = weight q.weight.bitmap
        %k_bitmap: u8[8, 5] = weight k.weight.bitmap
        %bitmap: u8[24, 5] = aten.cat([%q_bitmap, %k_bitmap])
        %q_levels: i8[16, 2, 4] = weight q.weight.levels
        %k_levels: i8[8, 2, 4] = weight k.weight.levels
        %levels: i8[24, 2, 4] = aten.cat([%q_levels, %k_levels])
        %q_scale: f16[16, 2] = weight q.weight.scale
        %k_scale: f16[8, 2] = weight k.weight.scale
        %scale: f16[24, 2] = aten.cat([%q_scale, %k_scale])
        %weight = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 40, 32)
        %both: f32[3, 5, 24] = aten.linear(%quantized, %weight) {path="q+k", weight="q.weight", role="decoder",
            scheme="group=32 act=4 act-group=32 codebook=none"}
        %split = aten.split_with_sizes(%both, [16, 8], -1)
        %q: f32[3, 5, 16] = getitem(%split, 0)
        %k: f32[3, 5, 8] = getitem(%split, 1)
        %heads: f32[30, 8] = aten.reshape(%q, [-1, 8])
        %o_clip: f32[2] = weight o.input_clip
        %o_quantized = lbllm.fake_quantize(%k, %o_clip, 4, 32)
        %o_sign: u8[40, 1] = weight o.weight.sign
        %o_bitmap: u8[40, 1] = weight o.weight.bitmap
        %o_levels: i8[40, 1, 4] = weight o.weight.levels
        %o_scale: f16[40, 1] = weight o.weight.scale
        %o_weight = lbllm.unpack_weight(%o_sign, %o_bitmap, %o_levels, %o_scale, 8, 32)
        %o = aten.linear(%o_quantized, %o_weight) {path="o", role="decoder"}
        return (%o, %heads)
    """
    weights = {name: torch.tensor([0.95, 0.9]) for name in ("q.input_clip", "o.input_clip")}
    for name, shape in (("q", (16, 40)), ("k", (8, 40)), ("o", (40, 8))):
        weights |= planes(f"{name}.weight", normal(*shape), 32)
    rewrites(Merge(), before, expected, context({"x": normal(3, 5, 40, seed=4)}), weights)


def test_the_merged_linear_names_all_of_them_and_weights_keep_their_paths():
    before = simulate(attention_inputs(biases=()))
    after = Merge().apply(before, context()).program
    paths = [n.meta[LINEAR].path for n in after.graph.nodes if LINEAR in n.meta]
    assert paths == ["q+k+v", "o"]
    assert {p for p, _ in after.parameters() if p.startswith(("q.w", "k.w", "v.w"))} == {
        p for p, _ in before.parameters() if p.startswith(("q.w", "k.w", "v.w"))
    }


def test_biases_are_stacked_when_all_have_one():
    before = simulate(attention_inputs(biases=("q", "k", "v")))
    after = Merge().apply(before, context()).program
    (both,) = (n for n in calls(after.graph, aten.linear.default) if n.meta[LINEAR].path == "q+k+v")
    assert [n.target for n in both.args[2].args[0]] == ["q.bias", "k.bias", "v.bias"]
    x = normal(2, 40, seed=4)
    torch.testing.assert_close(outputs(after, x)[0], outputs(before, x)[0], rtol=1e-5, atol=1e-5)


def test_linears_with_and_without_bias_stay_apart():
    after = Merge().apply(simulate(attention_inputs(biases=("q",))), context())
    assert after.rows[0]["merged"] == ["k", "v"]
    assert (after.summary["linears"], after.summary["into"]) == (2, 1)


def test_linears_with_different_inputs_and_float_ones_stay_apart():
    def forward(root, x):
        first = aten.linear.default(x, root.a.weight)
        second = aten.linear.default(aten.relu.default(x), root.b.weight)
        return aten.add.Tensor(aten.add.Tensor(first, second), aten.linear.default(x, root.head.weight))

    weights = {f"{n}.weight": normal(8, 40, seed=i) for i, n in enumerate(("a", "b", "head"))}
    before = simulate(program(weights, forward, kind="module"))
    result = Merge().apply(before, context())
    assert (result.summary["linears"], result.summary["into"]) == (0, 0)
    assert dump.render(result.program) == dump.render(before)
