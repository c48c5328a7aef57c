"""The pass ``cache``: which attentions may get a KV state, and that decoding with it is the whole sequence again."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable

import pytest
import torch
from graphs import context, normal, program, rewrites, token_inputs
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.codegen.reference import attention_mask
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.cache import Cache, _latent
from lbllm_compile.passes.ir.compare import relative_error
from lbllm_compile.passes.ir.program import STATE, Program, get_attribute
from lbllm_compile.passes.ir.rewrite import calls
from stages import Notes
from torch import Tensor, fx

aten, lbllm = torch.ops.aten, torch.ops.lbllm
HEADS, KV_HEADS, WIDTH = 4, 2, 6

Mask = Callable[[Tensor, object], object]


def grid(length):
    """Query and key slots, ``[S, 1]`` and ``[1, S]``."""
    slots = aten.arange.default(length)
    return aten.unsqueeze.default(slots, 1), aten.unsqueeze.default(slots, 0)


def padding(mask):
    return aten.unsqueeze.default(aten.unsqueeze.default(aten.to.dtype(mask, torch.bool), 1), 1)


def causal(mask, length):
    query, key = grid(length)
    return aten.__and__.Tensor(aten.le.Tensor(key, query), padding(mask))


def causal_without_padding(mask, length):
    query, key = grid(length)
    return aten.le.Tensor(key, query)


def window(size: int) -> Mask:
    def build(mask, length):
        query, key = grid(length)
        near = aten.gt.Tensor(key, aten.sub.Tensor(query, size))
        return aten.__and__.Tensor(causal(mask, length), near)

    return build


def additive(lowest: float) -> Mask:
    def build(mask, length):
        hidden = aten.bitwise_not.default(causal(mask, length))
        return aten.mul.Tensor(aten.to.dtype(hidden, torch.float32), lowest)

    return build


def bidirectional(mask, length):
    query, key = grid(length)
    return aten.__and__.Tensor(aten.ge.Scalar(aten.add.Tensor(query, key), 0), padding(mask))


def biased(places: Callable[[Tensor, object], object], dtype: torch.dtype = torch.float32) -> Mask:
    """A bias that grows with the places of keys, with a slope per head."""

    def build(mask, length):
        slopes = aten.pow.Scalar(0.5, aten.unsqueeze.default(aten.unsqueeze.default(aten.arange.start(1, 5), 1), 2))
        where = aten.unsqueeze.default(aten.unsqueeze.default(places(mask, length), 1), 1)
        bias = aten.mul.Tensor(aten.to.dtype(slopes, dtype), aten.to.dtype(where, dtype))
        return aten.add.Tensor(aten.to.dtype(bias, torch.float32), additive(-1e9)(mask, length))

    return build


def slots(mask, length):
    """MPT's places: slots, counted from the last one."""
    return aten.unsqueeze.default(aten.sub.Tensor(aten.arange.default(length), length), 0)


def tokens(mask, length):
    """BLOOM's places: attended tokens."""
    return aten.mul.Tensor(aten.sub.Tensor(aten.cumsum.default(mask, 1), 1), mask)


def squares(mask, length):
    return aten.pow.Tensor_Scalar(tokens(mask, length), 2)


def blocks(size: int) -> Mask:
    """Chunked attention: a query sees its own block only."""

    def build(mask, length):
        query, key = grid(length)
        same = aten.eq.Tensor(aten.floor_divide.default(query, size), aten.floor_divide.default(key, size))
        return aten.__and__.Tensor(causal(mask, length), same)

    return build


def chunks(size: int) -> Mask:
    """Llama 4's chunks: a query sees its own, and the first one begins with the first token."""

    def build(mask, length):
        padding = aten.sum.dim_IntList(aten.eq.Scalar(aten.cumsum.default(mask, 1), 0), [1], True)
        place = aten.sub.Tensor(aten.unsqueeze.default(aten.arange.default(length), 0), padding)
        place = aten.div.Tensor_mode(place, size, rounding_mode="floor")
        same = aten.eq.Tensor(aten.unsqueeze.default(place, 2), aten.unsqueeze.default(place, 1))
        return aten.__and__.Tensor(causal(mask, length), aten.unsqueeze.default(same, 1))

    return build


def stored(size: int, most: int) -> Mask:
    """GPT-Neo's: a window within a mask that was made for the longest sequence, of which the first part is taken."""

    def build(mask, length):
        whole = torch.ones(1, 1, most, most).tril().bool()
        part = aten.slice.Tensor(aten.slice.Tensor(whole ^ whole.tril(-size), 2, 0, length), 3, 0, length)
        shown = aten.where.Scalar(part, 0.0, torch.finfo(torch.float32).min)
        return aten.add.Tensor(shown, additive(torch.finfo(torch.float32).min)(mask, length))

    return build


def repeat(x, batch, length):
    """The grouped-query repeat as transformers writes it."""
    x = aten.expand.default(aten.unsqueeze.default(x, 2), [batch, KV_HEADS, HEADS // KV_HEADS, length, WIDTH])
    return aten.reshape.default(x, [batch, HEADS, length, WIDTH])


def interleave(x, batch, length):
    """Not that repeat: heads in another order."""
    x = aten.expand.default(aten.unsqueeze.default(x, 1), [batch, HEADS // KV_HEADS, KV_HEADS, length, WIDTH])
    return aten.reshape.default(x, [batch, HEADS, length, WIDTH])


def copied(x, batch, length):
    """The repeat with a copy behind it, as models write it whose attention wants contiguous memory."""
    return aten.contiguous.default(repeat(x, batch, length))


def first_head(x, batch, length):
    """One head, which the operator takes for every head (Falcon's multi-query attention)."""
    return aten.slice.Tensor(x, 1, 0, 1)


def attention(
    mask: Mask | None = causal,
    *,
    expand=repeat,
    expand_values=None,
    bits: tuple[int, int] = (4, 4),
    layers: int = 1,
    mangle=None,
    **options,
) -> Program:
    """``layers`` attentions over embeddings; sizes are read from the attention mask, as exported graphs do."""

    def forward(root, input_ids, attention_mask, position_ids):
        batch, length = aten.sym_size.int(attention_mask, 0), aten.sym_size.int(attention_mask, 1)
        visible = mask(attention_mask, length) if mask else None
        x = aten.add.Tensor(
            aten.embedding.default(root.embed, input_ids), aten.embedding.default(root.positions, position_ids)
        )
        if mangle:
            x = mangle(x, attention_mask, length)
        for _ in range(layers):

            def heads(weight, count, x=x):
                y = aten.view.default(aten.linear.default(x, weight), [batch, length, count, WIDTH])
                return aten.transpose.int(y, 1, 2)

            q, k, v = heads(root.q, HEADS), heads(root.k, KV_HEADS), heads(root.v, KV_HEADS)
            if bits[0]:
                k = lbllm.fake_quantize_kv.default(k, bits[0])
            if bits[1]:
                v = lbllm.fake_quantize_kv.default(v, bits[1])
            if expand:
                k, v = expand(k, batch, length), (expand_values or expand)(v, batch, length)
            y = aten.scaled_dot_product_attention.default(q, k, v, visible, **options)
            y = aten.reshape.default(aten.transpose.int(y, 1, 2), [batch, length, HEADS * WIDTH])
            x = aten.add.Tensor(x, y)
        return x

    weights = {"embed": normal(11, 24), "positions": normal(64, 24, seed=1), "q": 0.2 * normal(24, 24, seed=2)}
    return program({**weights, "k": 0.2 * normal(12, 24, seed=3), "v": 0.2 * normal(12, 24, seed=4)}, forward)


def cached(before: Program, **options) -> Program:
    return Cache(**options).apply(before, context(token_inputs())).program


def the_attention(item: Program) -> list[object]:
    (node,) = calls(item.graph, lbllm.cached_attention.default)
    return list(node.args)


def decode(item: Program, inputs: dict[str, Tensor], prefill: int) -> Tensor:
    """Prefill, then token by token."""
    batch, length = inputs["input_ids"].shape
    state = {n.target: n.meta[STATE].allocate(batch, length + 3) for n in item.state_placeholders()}
    outputs = []
    for start, end in itertools.pairwise([0, *range(prefill, length + 1)]):
        step = {
            "input_ids": inputs["input_ids"][:, start:end],
            "attention_mask": inputs["attention_mask"][:, :end],
            "position_ids": inputs["position_ids"][:, start:end],
        }
        outputs.append(item.run({**step, **state, "past": start}))
    return torch.cat(outputs, 1)


def test_attention_gets_a_state_and_the_mask_goes_away():
    before = """
        %ids = input input_ids
        %mask = input attention_mask
        %places = input position_ids
        %batch = aten.sym_size.int(%mask, 0)
        %length = aten.sym_size.int(%mask, 1)
        %slots = aten.arange(%length)
        %query = aten.unsqueeze(%slots, 1)
        %key = aten.unsqueeze(%slots, 0)
        %earlier = aten.le.Tensor(%key, %query)
        %attended = aten.to.dtype(%mask, torch.bool)
        %per_head = aten.unsqueeze(%attended, 1)
        %keys = aten.unsqueeze(%per_head, 1)
        %visible = aten.__and__.Tensor(%earlier, %keys)
        decoder layer 0:
        %embed: f32[11, 24] = weight embed
        %x = aten.embedding(%embed, %ids)
        %q_weight: f32[24, 24] = weight q
        %q_row = aten.linear(%x, %q_weight)
        %q_heads = aten.view(%q_row, [%batch, %length, 4, 6])
        %q = aten.transpose.int(%q_heads, 1, 2)
        %kv_weight: f32[12, 24] = weight kv
        %k_row = aten.linear(%x, %kv_weight)
        %k_heads = aten.view(%k_row, [%batch, %length, 2, 6])
        %k = aten.transpose.int(%k_heads, 1, 2)
        %rounded = lbllm.fake_quantize_kv(%k, 4)
        %one = aten.unsqueeze(%rounded, 2)
        %two = aten.expand(%one, [%batch, 2, 2, %length, 6])
        %repeated = aten.reshape(%two, [%batch, 4, %length, 6])
        %y = aten.scaled_dot_product_attention(%q, %repeated, %repeated, %visible, scale=0.5)
        %rows = aten.transpose.int(%y, 1, 2)
        %out = aten.reshape(%rows, [%batch, %length, 24])
        return %out
    """
    expected = """
        %ids: i64[batch, length] = input input_ids
        %mask: i64[batch, total] = input attention_mask
        %places = input position_ids
        %past = input past
        %key_codes: u8[batch, 2, capacity, 3] = state kv_0_key_codes {
            kind="per_token", heads=2, tail=(3,), dtype=torch.uint8}
        %key_params: f16[batch, 2, capacity, 2] = state kv_0_key_params {
            kind="per_token", heads=2, tail=(2,), dtype=torch.float16}
        %value_codes: u8[batch, 2, capacity, 3] = state kv_0_value_codes {
            kind="per_token", heads=2, tail=(3,), dtype=torch.uint8}
        %value_params: f16[batch, 2, capacity, 2] = state kv_0_value_params {
            kind="per_token", heads=2, tail=(2,), dtype=torch.float16}
        %batch = aten.sym_size.int(%ids, 0)
        %length = aten.sym_size.int(%ids, 1)
        decoder layer 0:
        %embed: f32[11, 24] = weight embed
        %x = aten.embedding(%embed, %ids)
        %q_weight: f32[24, 24] = weight q
        %q_row = aten.linear(%x, %q_weight)
        %q_heads = aten.view(%q_row, [%batch, %length, 4, 6])
        %q = aten.transpose.int(%q_heads, 1, 2)
        %kv_weight: f32[12, 24] = weight kv
        %k_row = aten.linear(%x, %kv_weight)
        %k_heads = aten.view(%k_row, [%batch, %length, 2, 6])
        %k = aten.transpose.int(%k_heads, 1, 2)
        %y: f32[batch, 4, length, 6] = lbllm.cached_attention(
            %q, %k, %k, %key_codes, %key_params, %value_codes, %value_params, %mask, %past, 0.5, 0, 4)
        %rows = aten.transpose.int(%y, 1, 2)
        %out: f32[batch, length, 24] = aten.reshape(%rows, [%batch, %length, 24])
        return %out
    """
    weights = {"embed": normal(11, 24), "q": 0.2 * normal(24, 24, seed=2), "kv": 0.2 * normal(12, 24, seed=3)}
    rewrites(Cache(), before, expected, context(token_inputs()), weights, "causal-lm")


def test_a_weight_among_the_inputs_and_a_vector_among_the_keys():
    """What is made of the attention mask stands behind it, and a vector that all keys share is no head."""
    before = """
        %ids = input input_ids
        decoder layer 0:
        %embed: f32[11, 24] = weight embed
        %mask = input attention_mask
        %places = input position_ids
        %batch = aten.sym_size.int(%ids, 0)
        %length = aten.sym_size.int(%ids, 1)
        %x = aten.embedding(%embed, %ids)
        %rows = aten.view(%x, [%batch, %length, 4, 6])
        %heads = aten.transpose.int(%rows, 1, 2)
        %shared: f32[2] = weight shared
        %vector = aten.reshape(%shared, [2])
        %everywhere = aten.expand(%vector, [%batch, 4, %length, 2])
        %k = aten.cat([%heads, %everywhere], -1)
        %y = aten.scaled_dot_product_attention(%k, %k, %k, None, 0.0, True, scale=0.5)
        %tokens = aten.transpose.int(%y, 1, 2)
        return %tokens
    """
    expected = """
        %ids = input input_ids
        decoder layer 0:
        %embed: f32[11, 24] = weight embed
        %mask = input attention_mask
        %places = input position_ids
        outside the decoder layers:
        %past = input past
        %key_codes: f16[batch, 4, capacity, 8] = state kv_0_key_codes {
            kind="per_token", heads=4, tail=(8,), dtype=torch.float16}
        %key_params: f16[batch, 4, capacity, 0] = state kv_0_key_params {
            kind="per_token", heads=4, tail=(0,), dtype=torch.float16}
        %value_codes: f16[batch, 4, capacity, 8] = state kv_0_value_codes {
            kind="per_token", heads=4, tail=(8,), dtype=torch.float16}
        %value_params: f16[batch, 4, capacity, 0] = state kv_0_value_params {
            kind="per_token", heads=4, tail=(0,), dtype=torch.float16}
        %ones = aten.ones_like(%mask)
        decoder layer 0:
        %batch = aten.sym_size.int(%ids, 0)
        %length = aten.sym_size.int(%ids, 1)
        %x = aten.embedding(%embed, %ids)
        %rows = aten.view(%x, [%batch, %length, 4, 6])
        %heads = aten.transpose.int(%rows, 1, 2)
        %shared: f32[2] = weight shared
        %vector = aten.reshape(%shared, [2])
        %everywhere = aten.expand(%vector, [%batch, 4, %length, 2])
        %k = aten.cat([%heads, %everywhere], -1)
        %y = lbllm.cached_attention(
            %k, %k, %k, %key_codes, %key_params, %value_codes, %value_params, %ones, %past, 0.5, 0, 16)
        %tokens = aten.transpose.int(%y, 1, 2)
        return %tokens
    """
    rewrites(Cache(), before, expected, context(token_inputs()), kind="causal-lm")


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mask", [causal, window(5)])
@pytest.mark.parametrize("prefill", [1, 6])
def test_decoding_gives_the_whole_sequence_again(bits, mask, prefill):
    before = attention(mask, bits=(bits, bits), layers=2)
    after = cached(before)
    inputs = token_inputs(batch=3, length=11, padding=4)
    seen = inputs["attention_mask"].bool()
    whole = before.run(inputs)[seen]
    torch.testing.assert_close(after.run(inputs)[seen], whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(after, inputs, prefill)[seen], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "meaning"),
    [
        (causal, 0),
        (window(2), 2),
        (window(7), 7),
        (window(100), 100),
        (window(100_000), 100_000),
        (stored(8, 40), 8),
        (stored(60, 64), 60),
        (stored(64, 64), 0),
        (stored(5, 9), 5),
        (additive(-1e9), 0),
        (additive(torch.finfo(torch.float32).min), 0),
    ],
)
def test_the_meaning_of_a_mask_is_found(mask, meaning):
    assert the_attention(cached(attention(mask)))[10] == meaning


def test_a_mask_without_padding_gets_an_all_ones_key_mask():
    for before in (attention(causal_without_padding), attention(None, is_causal=True)):
        after = cached(before)
        assert the_attention(after)[7].target is aten.ones_like.default
        inputs = token_inputs(length=7)
        torch.testing.assert_close(decode(after, inputs, 3), before.run(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [bidirectional, blocks(4), blocks(9)])
def test_other_masks_are_refused(mask):
    with pytest.raises(PassError, match=r"mask of 'scaled_dot_product_attention.*neither causal nor"):
        cached(attention(mask))


def test_a_large_number_that_is_no_window_is_refused():
    with pytest.raises(PassError, match="depends on the number 70000 in a way that is neither a sliding window nor a"):
        cached(attention(blocks(70_000)))


@pytest.mark.parametrize(("places", "counted"), [(slots, False), (tokens, True)])
@pytest.mark.parametrize("prefill", [1, 6])
def test_a_slope_times_the_distance_is_alibi(places, counted, prefill):
    before = attention(biased(places), bits=(16, 16))
    after = cached(before)
    (node,) = calls(after.graph, lbllm.cached_attention.default)
    assert get_attribute(after.module, node.kwargs["slopes"].target).tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert node.kwargs.get("counted", False) is counted
    inputs = token_inputs(batch=3, length=11, padding=4)
    inputs["attention_mask"][1, 3:6] = 0  # a hole, which takes a place or does not
    seen = inputs["attention_mask"].bool()
    whole = before.run(inputs)[seen]
    torch.testing.assert_close(after.run(inputs)[seen], whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(after, inputs, prefill)[seen], whole, rtol=1e-4, atol=1e-4)


def test_layers_share_their_slopes():
    after = cached(attention(biased(slots), layers=3))
    assert {n.kwargs["slopes"].target for n in calls(after.graph, lbllm.cached_attention.default)} == {"alibi_slopes"}


@pytest.mark.parametrize("mask", [biased(squares), biased(tokens, torch.bfloat16)])
def test_another_bias_is_refused(mask):
    with pytest.raises(PassError, match="adds a bias to the scores that is not a slope times the distance"):
        cached(attention(mask))


@pytest.mark.parametrize("size", [4, 7, 100, 8192])
def test_chunks_are_found(size):
    before = attention(chunks(size), bits=(16, 16))
    after = cached(before)
    (node,) = calls(after.graph, lbllm.cached_attention.default)
    assert node.kwargs == {"chunk": size}
    inputs = token_inputs(batch=3, length=19, padding=6)
    seen = inputs["attention_mask"].bool()
    whole = before.run(inputs)[seen]
    torch.testing.assert_close(decode(after, inputs, 5)[seen], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("softcap", "sinks"), [(1.5, False), (0.0, True), (2.0, True)])
def test_capped_scores_and_sinks_stay_with_the_attention(softcap, sinks):
    def forward(root, input_ids, attention_mask, position_ids):
        length = aten.sym_size.int(attention_mask, 1)
        x = aten.unsqueeze.default(aten.embedding.default(root.embed, input_ids), 1)
        q, k, v = (aten.linear.default(x, weight) for weight in (root.q, root.k, root.v))
        q = aten.mul.Tensor(q, root.heads)
        mask = additive(-1e9)(attention_mask, length)
        y = lbllm.attention.default(q, k, v, mask, 2.0, softcap, root.sinks if sinks else None)
        return aten.transpose.int(y, 1, 2)

    weights = {"embed": normal(11, 8), "heads": normal(3, 1, 8, seed=5), "sinks": normal(3, seed=6)}
    before = program({**weights, **{n: 0.3 * normal(8, 8, seed=i) for i, n in enumerate("qkv")}}, forward)
    after = cached(before)
    (node,) = calls(after.graph, lbllm.cached_attention.default)
    assert {*node.kwargs} == {n for n, given in (("softcap", softcap), ("sinks", sinks)) if given}
    inputs = token_inputs(batch=3, length=11, padding=4)
    seen = inputs["attention_mask"].bool()
    got, wanted = decode(after, inputs, 6), before.run(inputs)
    torch.testing.assert_close(got[seen], wanted[seen], rtol=2e-3, atol=2e-3)


def test_attention_without_mask_is_refused():
    with pytest.raises(PassError, match="not causal, so it cannot decode"):
        cached(attention(None))


def test_a_mask_that_is_one_layers_alone_is_proved_alone():
    assert {n.args[10] for n in calls(cached(attention(layers=3)).graph, lbllm.cached_attention.default)} == {0}


def test_repeated_heads_are_recognized():
    key, value = the_attention(cached(attention()))[1:3]
    assert key.target is aten.transpose.int and value.target is aten.transpose.int
    grouped = attention(expand=None, enable_gqa=True)
    inputs = token_inputs()
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(cached(grouped).run(inputs)[seen], attention().run(inputs)[seen], rtol=1e-4, atol=1e-4)


def test_heads_repeated_in_another_order_are_kept_so_and_that_is_said():
    notes = Notes()
    before = attention(expand=interleave, bits=(0, 0))
    after = Cache().apply(before, dataclasses.replace(context(token_inputs()), progress=notes)).program
    assert {n.meta[STATE].heads for n in after.state_placeholders()} == {HEADS}
    (note,) = notes.said
    assert note.startswith("1 attentions repeat the heads") and note.endswith("2.0 times as many numbers")
    inputs = token_inputs()
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(decode(after, inputs, 4)[seen], before.run(inputs)[seen], rtol=2e-3, atol=2e-3)


def test_a_repeat_is_found_behind_a_copy():
    after = cached(attention(expand=copied))
    assert {n.meta[STATE].heads for n in after.state_placeholders()} == {KV_HEADS}


def test_one_head_for_all_is_cached_once():
    before = attention(expand=first_head, bits=(0, 0))
    after = cached(before)
    assert {n.meta[STATE].heads for n in after.state_placeholders()} == {1}
    inputs = token_inputs()
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(decode(after, inputs, 4)[seen], before.run(inputs)[seen], rtol=2e-3, atol=2e-3)


def test_values_of_fewer_heads_than_keys_are_cached_as_many():
    """Differential attention gives half of the values' heads twice."""

    def halved(x, batch, length):
        return repeat(aten.repeat.default(aten.slice.Tensor(x, 1, 0, 1), [1, 2, 1, 1]), batch, length)

    before = attention(expand_values=halved, bits=(0, 0))
    after = cached(before)
    assert {n.meta[STATE].heads for n in after.state_placeholders()} == {KV_HEADS}
    inputs = token_inputs()
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(decode(after, inputs, 4)[seen], before.run(inputs)[seen], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_a_cache_larger_than_what_it_is_made_of_is_said(shared):
    """Keys and values of two heads from six numbers, and four channels of the keys from one head for all."""

    def forward(root, input_ids, attention_mask, position_ids):
        batch, length = aten.sym_size.int(attention_mask, 0), aten.sym_size.int(attention_mask, 1)
        x = aten.embedding.default(root.embed, input_ids)

        def heads(y, count, width):
            return aten.transpose.int(aten.view.default(y, [batch, length, count, width]), 1, 2)

        both = aten.split_with_sizes.default(heads(aten.linear.default(x, root.up), 2, 10), [5, 5], -1)
        rope = aten.expand.default(heads(aten.linear.default(x, root.rope), 1, 4), [batch, 2, length, 4])
        other = heads(aten.linear.default(x, root.others), 2, 4)
        key = aten.cat.default([both[0], rope if shared else other], -1)
        query = heads(aten.linear.default(x, root.q), 2, 9)
        y = aten.scaled_dot_product_attention.default(query, key, both[1], causal(attention_mask, length))
        return aten.transpose.int(y, 1, 2)

    sizes = {"embed": (11, 6), "up": (20, 6), "rope": (4, 6), "others": (8, 6), "q": (18, 6)}
    before = program({name: 0.3 * normal(*size) for name, size in sizes.items()}, forward)
    notes = Notes()
    given = dataclasses.replace(context(token_inputs()), progress=notes)
    after = Cache().apply(before, given).program
    assert sorted({n.meta[STATE].tail[0] for n in after.state_placeholders()}) == [0, 5, 9]
    assert len(notes.said) == shared and all("2.8 times as many numbers" in note for note in notes.said)


def test_latent_attention_is_known_behind_an_integer_linear():
    graph = fx.Graph()
    x, scale, rope, *planes = (graph.placeholder(name) for name in ("x", "x_scale", "rope", *WEIGHT))
    up = graph.call_function(lbllm.bit_linear.default, (x, scale, *planes, None, 32))
    both = graph.call_function(aten.split_with_sizes.default, (up, [5, 5], -1))
    own, value = (graph.call_function(operator.getitem, (both, part)) for part in range(2))
    common = graph.call_function(aten.expand.default, (rope, [1, 2, 3, 4]))
    key = graph.call_function(aten.cat.default, ([own, common], -1))
    sizes = {x: (1, 3, 6), rope: (1, 1, 3, 4), common: (1, 2, 3, 4), own: (1, 2, 3, 5), value: (1, 2, 3, 5)}
    assert _latent(key, value, {node: torch.Size(size) for node, size in sizes.items()}) == 6 + 4


def test_bits_come_from_the_simulation():
    assert the_attention(cached(attention(bits=(8, 8))))[11] == 8
    assert the_attention(cached(attention(bits=(0, 0))))[11] == 16
    assert the_attention(cached(attention(bits=(0, 0)), bits=8))[11] == 8
    with pytest.raises(PassError, match=r"simulates 4-bit keys .*cache\{bits=4\} or activate\{kv=8\}"):
        cached(attention(), bits=8)
    with pytest.raises(PassError, match="keys of 4 bits and values of 8"):
        cached(attention(bits=(4, 8)))


def test_the_softmax_scale_defaults_to_the_head_size():
    assert the_attention(cached(attention()))[9] == pytest.approx(WIDTH**-0.5)


def test_what_else_reads_mask_or_length_is_refused():
    def masks_hidden(x, mask, length):
        return aten.mul.Tensor(x, aten.unsqueeze.default(mask, 2))

    with pytest.raises(PassError, match="uses the attention mask outside attention"):
        cached(attention(mangle=masks_hidden))

    def counts_pairs(x, mask, length):
        return aten.add.Tensor(x, aten.sum.default(aten.arange.start_step(0, length, 2)))

    with pytest.raises(PassError, match=r"counts positions from the sequence's length.*position_ids"):
        cached(attention(mangle=counts_pairs))


def counted(x, mask, length):
    return aten.mul.Tensor(x, aten.unsqueeze.default(aten.cos.default(aten.arange.default(length)), 1))


def taken_from_a_table(x, mask, length):
    table = torch.linspace(0.5, 2.0, 40).reshape(1, 40, 1)
    return aten.mul.Tensor(x, aten.slice.Tensor(table, 1, 0, length))


@pytest.mark.parametrize("mangle", [counted, taken_from_a_table])
def test_positions_that_the_graph_counts_go_on_behind_past_tokens(mangle):
    """Slots count, padding included, as they do in the sequence as a whole."""
    before = attention(mangle=mangle)
    after = cached(before)
    inputs = token_inputs(batch=3, length=11, padding=4)
    seen = inputs["attention_mask"].bool()
    for prefill in (1, 6):
        decoded = decode(after, inputs, prefill)
        torch.testing.assert_close(decoded[seen], before.run(inputs)[seen], rtol=1e-4, atol=1e-4)


def test_what_goes_from_token_to_token_beside_attention_is_refused_where_it_does():
    def sees_all(x, mask, length):
        return aten.add.Tensor(x, aten.mean.dim(x, [1], True), alpha=0.3)

    def sums_up(x, mask, length):
        return aten.cumsum.default(x, 1)

    for leak, where in ((sees_all, r"aten\.add\.Tensor"), (sums_up, r"aten\.cumsum")):
        with pytest.raises(PassError, match=rf"gets another value of '\w+' \({where}.*token to token"):
            cached(attention(mangle=leak, layers=2))


def test_a_rounding_that_spreads_is_no_leak():
    """A sum in another order, and steep functions behind it, in which its last bits become all."""

    def steep(x, mask, length):
        x = aten.mul.Tensor(x, aten.add.Scalar(aten.sum.default(aten.new_ones.default(x, [length])), 3e6))
        for _ in range(4):
            x = aten.sin.default(aten.mul.Scalar(x, 300.0))
        return x

    before = attention(mangle=steep, layers=2)
    inputs = token_inputs()
    whole, stepped = (item.run(inputs)[:, -1] for item in (before, cached(before)))
    torch.testing.assert_close(whole, stepped, rtol=1e-4, atol=1e-4)
    decoded = decode(cached(before), inputs, inputs["input_ids"].shape[1] - 1)[:, -1]
    assert relative_error(whole, decoded) > 0.5


def test_dropout_a_second_run_and_missing_attention_are_refused():
    with pytest.raises(PassError, match="dropout"):
        cached(attention(dropout_p=0.1))
    with pytest.raises(PassError, match="run 'cache' once"):
        cached(cached(attention()))
    with pytest.raises(PassError, match="computes no attention"):
        cached(program({"w": normal(11, 8)}, lambda root, input_ids: aten.embedding.default(root.w, input_ids)))


def test_a_plain_module_stays_as_it_is():
    before = program({"a": normal(8, 40)}, lambda root, x: aten.linear.default(x, root.a), kind="module")
    assert Cache().apply(before, context(token_inputs())).program is before


def test_the_reference_mask_is_what_the_proof_compares_with():
    mask = attention_mask(torch.tensor([[0, 1, 1, 1]]), 2, 2, 2)
    assert mask[0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]
