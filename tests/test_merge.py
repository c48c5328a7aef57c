"""The pass ``merge``: linears that share their quantized input become one."""

from __future__ import annotations

import torch
from graphs import context, expected, lines, normal, program
from lbllm_compile.passes.annotate import LINEAR
from lbllm_compile.passes.merge import Merge
from rtn import simulate

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
    before = simulate(attention_inputs(biases=()))
    after = Merge().apply(before, context()).program
    assert lines(after) == expected("""
        %0 = lbllm.fake_quantize(x, q.input_clip, 4, 32)
        %1 = aten.cat([q.weight.sign, k.weight.sign, v.weight.sign])
        %2 = aten.cat([q.weight.bitmap, k.weight.bitmap, v.weight.bitmap])
        %3 = aten.cat([q.weight.levels, k.weight.levels, v.weight.levels])
        %4 = aten.cat([q.weight.scale, k.weight.scale, v.weight.scale])
        %5 = lbllm.unpack_weight(%1, %2, %3, %4, 40, 32)
        %6 = aten.linear(%0, %5)
        %7 = aten.split_with_sizes(%6, [16, 8, 8], -1)
        %8 = getitem(%7, 0)
        %9 = getitem(%7, 1)
        %10 = getitem(%7, 2)
        %11 = aten.reshape(%8, [-1, 8])
        %12 = aten.add.Tensor(%9, %10)
        %13 = lbllm.unpack_weight(o.weight.sign, o.weight.bitmap, o.weight.levels, o.weight.scale, 8, 32)
        %14 = lbllm.fake_quantize(%12, o.input_clip, 4, 32)
        %15 = aten.linear(%14, %13)
        return [%15, %11]
    """)
    x = normal(3, 5, 40, seed=4)
    for new, old in zip(outputs(after, x), outputs(before, x), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


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
    assert "aten.cat([q.bias, k.bias, v.bias])" in "\n".join(lines(after))
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
    assert lines(result.program) == lines(before)
