"""Attention written out in operators becomes one call that computes the same; what is no attention stays."""

from __future__ import annotations

import pytest
import torch
from graphs import context, normal, program, rewrites, with_values
from lbllm_compile.passes.activate import insert_quantizers
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.canonicalize import Canonicalize
from lbllm_compile.passes.ir import attention, dump
from lbllm_compile.passes.ir.attention import ATTENTIONS, AttentionCall
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import before_repeat, calls
from lbllm_compile.passes.smooth import _keys

aten, lbllm = torch.ops.aten, torch.ops.lbllm
BATCH, HEADS, LENGTH, WIDTH = 2, 3, 7, 5
LOWEST = torch.finfo(torch.float32).min

INPUTS = {
    "q": normal(BATCH, HEADS, LENGTH, WIDTH),
    "k": normal(BATCH, HEADS, LENGTH, WIDTH, seed=1),
    "v": normal(BATCH, HEADS, LENGTH, WIDTH, seed=2),
    "hidden": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(BATCH, 1, -1, -1).contiguous(),
}
WEIGHTS = {"sinks": normal(HEADS, seed=3), "bias": normal(BATCH * HEADS, 1, LENGTH, seed=4), "four": torch.tensor(4.0)}
WEIGHTS["seen"] = torch.ones(1, 1, LENGTH + 2, LENGTH + 2).tril()


def written(forward) -> Program:
    """A program as capture makes it from ``forward(root, q, k, v, hidden)``; ``hidden [B, 1, S, S]`` is a mask."""
    return with_values(program(WEIGHTS, forward), INPUTS)


def additive(hidden):
    return aten.mul.Tensor(aten.to.dtype(hidden, torch.float32), -1e9)


def product(q, k):
    return aten.matmul.default(q, aten.transpose.int(k, 2, 3))


def folded(x):
    return aten.reshape.default(x, [BATCH * HEADS, LENGTH, WIDTH])


def attribute(beside, path):
    """A weight as a node; operators on weights alone would be computed while tracing."""
    return beside.tracer.create_proxy("get_attr", path, (), {})


def plain(root, q, k, v, hidden):
    scores = aten.add.Tensor(aten.mul.Tensor(product(q, k), 0.5), additive(hidden))
    return aten.matmul.default(aten.softmax.int(scores, -1, torch.float32), v)


def scaled_behind_the_mask(root, q, k, v, hidden):
    """CodeGen's, with a scale that is a weight, and the mask first in the sum."""
    scores = aten.div.Tensor(aten.add.Tensor(additive(hidden), product(q, k)), root.four)
    return aten.matmul.default(aten.contiguous.default(aten.softmax.int(scores, 3)), v)


def filled(root, q, k, v, hidden):
    scores = aten.masked_fill.Scalar(product(q, k), hidden, LOWEST)
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


def kept(root, q, k, v, hidden):
    shown = aten.logical_not.default(hidden)
    scores = aten.where.ScalarOther(shown, aten.mul.Scalar(product(q, k), 2.0), LOWEST)
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


def multiplied(root, q, k, v, hidden):
    """GPT's: a stored mask of ones and zeros is a factor, and what hides the rest is added."""
    seen = aten.slice.Tensor(aten.slice.Tensor(attribute(q, "seen"), 2, 0, LENGTH), 3, 0, LENGTH)
    others = aten.mul.Tensor(aten.rsub.Scalar(seen, 1), -1e4)
    scores = aten.add.Tensor(aten.mul.Tensor(aten.div.Tensor(product(q, k), 2.0), seen), others)
    return aten.matmul.default(aten.softmax.int(aten.add.Tensor(scores, additive(hidden)), -1), v)


def biased_and_filled(root, q, k, v, hidden):
    """MPT's: a bias, then a mask."""
    bias = aten.slice.Tensor(aten.view.default(root.bias, [BATCH, HEADS, 1, LENGTH]), 0, 0, 1)
    scores = aten.add.Tensor(product(q, k), bias)
    return aten.matmul.default(aten.softmax.int(aten.masked_fill.Scalar(scores, hidden, LOWEST), -1), v)


def folded_heads(root, q, k, v, hidden):
    """BLOOM's: heads are part of the batch, and a bias is the product's summand."""
    scores = aten.baddbmm.default(root.bias, folded(q), aten.transpose.int(folded(k), -1, -2), beta=1.0, alpha=0.25)
    scores = aten.add.Tensor(aten.view.default(scores, [BATCH, HEADS, LENGTH, LENGTH]), additive(hidden))
    shares = aten.view.default(aten.softmax.int(scores, -1), [BATCH * HEADS, LENGTH, LENGTH])
    return aten.view.default(aten.bmm.default(shares, folded(v)), [BATCH, HEADS, LENGTH, WIDTH])


def transposed_keys(root, q, k, v, hidden):
    """Keys come with their channels last but one, and the softmax is of three dimensions."""
    keys = aten.reshape.default(aten.permute.default(k, [0, 1, 3, 2]), [BATCH * HEADS, WIDTH, LENGTH])
    mask = aten.reshape.default(
        aten.expand.default(additive(hidden), [-1, HEADS, -1, -1]), [BATCH * HEADS, LENGTH, LENGTH]
    )
    scores = aten.add.Tensor(aten.bmm.default(folded(q), keys), mask)
    return aten.bmm.default(aten.softmax.int(scores, 2), folded(v))


def capped(root, q, k, v, hidden):
    """Gemma 2's."""
    scores = aten.div.Tensor(aten.mul.Tensor(product(q, k), 0.5), 3.0)
    scores = aten.add.Tensor(aten.mul.Tensor(aten.tanh.default(scores), 3.0), additive(hidden))
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


def with_sinks(root, q, k, v, hidden):
    """gpt-oss's: a column of sinks, and the maximum subtracted."""
    scores = aten.add.Tensor(aten.mul.Tensor(product(q, k), 0.5), additive(hidden))
    sinks = aten.expand.default(aten.reshape.default(attribute(q, "sinks"), [1, -1, 1, 1]), [BATCH, -1, LENGTH, -1])
    scores = aten.cat.default([scores, sinks], -1)
    scores = aten.sub.Tensor(scores, aten.amax.default(scores, [-1], True))
    return aten.matmul.default(aten.slice.Tensor(aten.softmax.int(scores, -1), -1, 0, -1), v)


def canonical(before: Program) -> Program:
    return Canonicalize().apply(before, context(INPUTS)).program


MASKED = """
    %q = input q
    %k = input k
    %v = input v
    %hidden = input hidden
    %turned = aten.transpose.int(%k, 2, 3)
    %product = aten.matmul(%q, %turned)
    %scaled = aten.mul.Tensor(%product, 0.5)
    %floats = aten.to.dtype(%hidden, torch.float32)
    %mask = aten.mul.Tensor(%floats, -1000000000.0)
    %scores = aten.add.Tensor(%scaled, %mask)
    %shares = aten.softmax.int(%scores, -1)
    %y = aten.matmul(%shares, %v)
    return %y
"""


def test_attention_written_out_becomes_one_call():
    expected = """
        %q = input q
        %k = input k
        %v = input v
        %hidden = input hidden
        %floats = aten.to.dtype(%hidden, torch.float32)
        %mask = aten.mul.Tensor(%floats, -1000000000.0)
        %y: f32[2, 3, 7, 5] = aten.scaled_dot_product_attention(%q, %k, %v, %mask, scale=0.5)
        return %y
    """
    rewrites(Canonicalize(), MASKED, expected, context(INPUTS), kind="causal-lm")


def test_a_bound_goes_into_the_call():
    tanh = """
        %low = aten.div.Tensor(%scaled, 3.0)
        %bent = aten.tanh(%low)
        %bound = aten.mul.Tensor(%bent, 3.0)
    """
    before = MASKED.replace("%scores =", f"{tanh.strip()}\n%scores =").replace("%scaled, %mask", "%bound, %mask")
    expected = """
        %q = input q
        %k = input k
        %v = input v
        %hidden = input hidden
        %floats = aten.to.dtype(%hidden, torch.float32)
        %mask = aten.mul.Tensor(%floats, -1000000000.0)
        %y: f32[2, 3, 7, 5] = lbllm.attention(%q, %k, %v, %mask, 0.5, 3.0)
        return %y
    """
    rewrites(Canonicalize(), before, expected, context(INPUTS), kind="causal-lm")


@pytest.mark.parametrize(
    ("forward", "scale"),
    [
        (plain, 0.5),
        (scaled_behind_the_mask, 0.25),
        (filled, 1.0),
        (multiplied, 0.5),
        (kept, 2.0),
        (biased_and_filled, 1.0),
        (folded_heads, 0.25),
        (transposed_keys, 1.0),
    ],
)
def test_attention_written_out_becomes_torch_s_operator(forward, scale):
    before = written(forward)
    after = canonical(before)
    (node,) = calls(after.graph, *ATTENTIONS)
    call = AttentionCall.of(node)
    assert node.target is ATTENTIONS[0] and call.scale == scale and call.shifts
    assert [str(n.target) for n in (call.query, call.value)] == ["q", "v"]
    assert not calls(after.graph, aten.softmax.int, aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
    torch.testing.assert_close(after.run(INPUTS), before.run(INPUTS))


def test_a_bound_and_sinks_become_the_project_s_operator():
    for forward, softcap, sinks in ((capped, 3.0, None), (with_sinks, 0.0, "sinks")):
        before = written(forward)
        after = canonical(before)
        (node,) = calls(after.graph, *ATTENTIONS)
        call = AttentionCall.of(node)
        assert (call.scale, call.softcap, call.sinks and call.sinks.target) == (0.5, softcap, sinks)
        assert node.target is ATTENTIONS[1] and not call.shifts and str(call.key.target) == "k"
        torch.testing.assert_close(after.run(INPUTS), before.run(INPUTS))


def mask_before_the_bound(root, q, k, v, hidden):
    scores = aten.tanh.default(aten.add.Tensor(product(q, k), additive(hidden)))
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


def another_axis(root, q, k, v, hidden):
    return aten.matmul.default(aten.softmax.int(aten.add.Tensor(product(q, k), additive(hidden)), 2), v)


def shares_are_read(root, q, k, v, hidden):
    shares = aten.softmax.int(aten.add.Tensor(product(q, k), additive(hidden)), -1)
    return aten.add.Tensor(aten.matmul.default(shares, v), aten.sum.dim_IntList(shares, [-1], True))


def a_number_that_hides_nothing(root, q, k, v, hidden):
    return aten.matmul.default(aten.softmax.int(aten.masked_fill.Scalar(product(q, k), hidden, -3.0), -1), v)


def a_last_key_is_dropped(root, q, k, v, hidden):
    shares = aten.softmax.int(aten.add.Tensor(product(q, k), additive(hidden)), -1)
    return aten.matmul.default(aten.slice.Tensor(shares, -1, 0, -1), aten.slice.Tensor(v, 2, 0, -1))


def no_product(root, q, k, v, hidden):
    return aten.matmul.default(aten.softmax.int(aten.add.Tensor(aten.mul.Tensor(q, k), 1.0), -1), aten.mT.default(v))


@pytest.mark.parametrize(
    "forward",
    [
        mask_before_the_bound,
        another_axis,
        shares_are_read,
        a_number_that_hides_nothing,
        a_last_key_is_dropped,
        no_product,
    ],
)
def test_what_is_something_else_stays(forward):
    before = written(forward)
    after = canonical(before)
    assert not calls(after.graph, *ATTENTIONS)
    assert torch.equal(after.run(INPUTS), before.run(INPUTS))


def test_attention_that_was_misread_is_an_error(monkeypatch):
    monkeypatch.setattr(attention._Scores, "scaled", lambda self, factor, rank: self)
    with pytest.raises(PassError, match=r"'matmul.*ends an attention that cannot be told: .* differs .* on the probe"):
        canonical(written(plain))


def test_the_program_given_stays_as_it_was():
    before = written(capped)
    text = dump.render(before)
    canonical(before)
    assert dump.render(before) == text


def test_keys_and_values_of_every_attention_are_quantized():
    after = insert_quantizers(canonical(written(capped)), 4, 32, 8)
    (node,) = calls(after.graph, *ATTENTIONS)
    call = AttentionCall.of(node)
    assert [(n.target, str(n.args[0].target), n.args[1]) for n in (call.key, call.value)] == [
        (lbllm.fake_quantize_kv.default, "k", 8),
        (lbllm.fake_quantize_kv.default, "v", 8),
    ]


def test_keys_are_centered_only_where_a_shift_of_all_scores_is_nothing():
    assert [str(n.target) for n in _keys(canonical(written(plain)).graph)] == ["k"]
    assert not _keys(canonical(written(capped)).graph)
    assert not _keys(canonical(written(with_sinks)).graph)


def test_attention_is_differentiable():
    q, k, v = (INPUTS[n].clone().requires_grad_() for n in "qkv")
    mask = additive(INPUTS["hidden"])
    sinks = WEIGHTS["sinks"].clone().requires_grad_()
    lbllm.attention(q, k, v, mask, 0.5, 3.0, sinks).square().sum().backward()
    assert all(bool(t.grad.abs().sum() > 0) for t in (q, k, v, sinks))


def test_a_copy_does_not_hide_a_repeat():
    def forward(root, q, k, v, hidden):
        one = aten.slice.Tensor(k, 1, 0, 1)
        keys = aten.expand.default(aten.unsqueeze.default(one, 2), [BATCH, 1, HEADS, LENGTH, WIDTH])
        keys = aten.contiguous.default(aten.reshape.default(keys, [BATCH, HEADS, LENGTH, WIDTH]))
        return aten.scaled_dot_product_attention.default(q, keys, v, aten.logical_not.default(hidden))

    (node,) = calls(written(forward).graph, *ATTENTIONS)
    user, source = before_repeat(node, node.args[1])
    assert user.target is aten.unsqueeze.default and source.target is aten.slice.Tensor
