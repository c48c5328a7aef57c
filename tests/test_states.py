"""States that are not one entry a token: short convolutions, and what no cache can follow."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
import torch
from graphs import normal, token_inputs
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.kernels.convolution import cached_conv as convolution_kernel
from lbllm_compile.codegen.spec import ConvolutionSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import compile_functions
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import FIXED, STATE, Program, StateSpec
from lbllm_compile.passes.ir.rewrite import calls
from test_cache import attention, cached, decode

from lbllm_compile.lowering.state import KVState

aten, lbllm = torch.ops.aten, torch.ops.lbllm
CHANNELS, TAPS = 24, 3


def convolution(x, mask, length, *, centered: bool = False, flipped: bool = False):
    """LFM2's: padding tuned out, a tap for the token and one for each of those before."""
    new = aten.slice.Tensor(mask, 1, -length, (1 << 63) - 1)
    x = aten.transpose.int(aten.mul.Tensor(x, aten.unsqueeze.default(new, 2)), 1, 2)
    if flipped:
        x = aten.flip.default(x, [2])
    weight = aten.expand.default(aten.full.default([1, 1, 1], 0.5), [CHANNELS, 1, TAPS])
    y = aten.conv1d.default(x, weight, None, [1], [1 if centered else TAPS - 1], [1], CHANNELS)
    return aten.transpose.int(aten.slice.Tensor(y, 2, None, length), 1, 2)


def test_a_short_convolution_gets_a_state_and_decoding_gives_the_whole_sequence_again() -> None:
    before = attention(mangle=convolution, bits=(16, 16))
    after = cached(before, bits=16)
    assert len(calls(after.graph, lbllm.cached_conv.default)) == 1 and not calls(after.graph, aten.conv1d.default)
    (state,) = (n for n in after.state_placeholders() if n.target == "conv_0_state")
    assert state.meta[STATE] == StateSpec(CHANNELS, (TAPS - 1,), torch.float32, FIXED)
    inputs = token_inputs(batch=3, length=11, padding=4)
    seen = inputs["attention_mask"].bool()
    whole = before.run(inputs)[seen]
    for prefill in (1, 2, 6):
        torch.testing.assert_close(decode(after, inputs, prefill)[seen], whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "mangle",
    [
        lambda x, mask, length: convolution(x, mask, length, centered=True),
        lambda x, mask, length: convolution(x, mask, length, flipped=True),
        lambda x, mask, length: aten.cumsum.default(x, 1),
    ],
    ids=["looks ahead", "backwards", "sum of all"],
)
def test_what_else_passes_from_token_to_token_is_refused(mangle) -> None:
    with pytest.raises(PassError, match="neither attention nor a short convolution"):
        cached(attention(mangle=mangle))


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(2, 5),
    st.booleans(),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_the_reference_in_parts_is_one_convolution(batch, channels, taps, bias, parts) -> None:
    length = sum(parts)
    x, weight = normal(batch, channels, length), normal(channels, 1, taps, seed=1)
    offset = normal(channels, seed=2) if bias else None
    state = torch.zeros(batch, channels, taps - 1)
    got = [reference.cached_conv(part, weight, offset, state) for part in x.split(parts, -1)]
    padded = torch.nn.functional.pad(x, (taps - 1, 0))
    want = torch.nn.functional.conv1d(padded, weight, offset, groups=channels)
    torch.testing.assert_close(torch.cat(got, -1), want)
    assert torch.equal(state, padded[..., length:])


def test_a_stored_graph_says_the_kind_of_every_state() -> None:
    after = cached(attention(mangle=convolution))
    document = json.loads(graph_json.dumps(after.module))
    tensors = dict(after.parameters())
    again = Program(graph_json.decode(document, tensors))
    assert [n.meta[STATE] for n in again.state_placeholders()] == [n.meta[STATE] for n in after.state_placeholders()]
    node = next(n for n in document["nodes"] if n["name"] == "conv_0_state")
    assert node["meta"]["state"]["kind"] == FIXED
    node["meta"]["state"]["kind"] = "eternal"
    with pytest.raises(graph_json.GraphFormatError, match="kind of state 'eternal' is none of per_token, fixed"):
        graph_json.decode(document, tensors)


def test_a_state_of_fixed_size_stays_when_room_for_tokens_grows() -> None:
    fixed = StateSpec(CHANNELS, (TAPS - 1,), torch.float32, FIXED)
    state = KVState([StateSpec(2, (3,), torch.uint8), fixed], batch=2, capacity=64)
    assert [tuple(t.shape) for t in state.tensors] == [(2, 2, 64, 3), (2, CHANNELS, TAPS - 1)]
    state.tensors[1].fill_(7)
    kept = state.tensors[1]
    state.past = 64
    state.reserve(1)
    assert tuple(state.tensors[0].shape) == (2, 2, 128, 3)
    assert state.tensors[1] is kept and bool((kept == 7).all())


@functools.cache
def kernel(channels: int, taps: int, bias: bool, parallel: bool) -> Callable[..., None]:
    made = convolution_kernel(ConvolutionSpec(channels, taps, bias), parallel)
    return compile_functions({"kernel": made}, Target.parse("cpu").llvm)["kernel"]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("channels", "taps", "bias"), [(1, 2, True), (7, 3, False), (33, 4, True), (2, 9, False)])
@pytest.mark.parametrize("parts", [(1,), (5,), (1, 1, 1), (2, 13, 1), (9, 8)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_kernel_in_parts_is_the_reference(channels, taps, bias, parallel, parts, size) -> None:
    x, weight = size * normal(3, channels, sum(parts)), normal(channels, 1, taps, seed=1)
    offset = size * normal(channels, seed=2) if bias else None
    ours, theirs = torch.zeros(3, channels, taps - 1), torch.zeros(3, channels, taps - 1)
    for part in x.split(parts, -1):
        want, out = reference.cached_conv(part, weight, offset, theirs), torch.empty(part.shape)
        given = [part.contiguous(), weight, *([] if offset is None else [offset]), ours, out]
        kernel(channels, taps, bias, parallel)(*given)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5 * size)
        assert torch.equal(ours, theirs)
