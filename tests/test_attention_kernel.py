"""The attention kernel against the reference: odd sizes, every form of attention, extreme values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.kernels import attention
from lbllm_compile.codegen.kernels.exponential import hyperbolic_tangent
from lbllm_compile.codegen.sizes import CAPACITY_MULTIPLE
from lbllm_compile.codegen.spec import AttentionSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import T, compile_functions
from torch import Tensor

HOST = Target.parse("cpu")

PLAIN = [
    AttentionSpec(9, 3, 64, 64, 4, 0, 0.125),
    AttentionSpec(4, 2, 18, 18, 4, 8, 0.2),
    AttentionSpec(4, 4, 16, 20, 8, 0, 0.25),
    AttentionSpec(2, 1, 33, 33, 4, 3, 0.17),
    AttentionSpec(3, 1, 7, 9, 16, 0, 0.38),
]
FORMS = [
    AttentionSpec(4, 2, 18, 18, 4, 0, 0.2, softcap=2.0),
    AttentionSpec(6, 2, 16, 12, 8, 5, 0.25, softcap=50.0, sinks=True),
    AttentionSpec(3, 1, 7, 9, 16, 4, 0.38, sinks=True),
    AttentionSpec(5, 5, 20, 20, 4, 0, 0.2, slopes=True),
    AttentionSpec(6, 3, 33, 16, 8, 0, 0.17, slopes=True, counted=True),
    AttentionSpec(4, 2, 16, 16, 4, 0, 0.25, chunk=5),
    AttentionSpec(2, 1, 10, 10, 16, 3, 0.3, chunk=4, counted=True),
    AttentionSpec(4, 1, 24, 24, 4, 7, 0.2, softcap=3.0, sinks=True, slopes=True, chunk=6),
]


def identity(spec: AttentionSpec) -> str:
    return "-".join(str(v) for v in dataclasses.astuple(spec) if v is not False)


def attention_state(spec: AttentionSpec, batch: int, past: int, capacity: int, generator) -> list[Tensor]:
    """A state of ``past`` random keys and values; what was never written holds whatever may be in memory."""
    tensors = []
    for width in (spec.key_width, spec.value_width):
        stored = reference.quantize_kv(torch.randn(batch, spec.kv_heads, past, width, generator=generator), spec.bits)
        for part in stored:
            whole = torch.full((batch, spec.kv_heads, capacity, *part.shape[3:]), 255).to(part.dtype)
            if part.dtype == torch.float16:
                whole.fill_(float("nan"))
            whole[:, :, :past] = part
            tensors.append(whole)
    return tensors


def masks(batch: int, total: int, holes: bool, generator) -> Tensor:
    """The first sequences have padding on the left; holes are anywhere behind it."""
    mask = torch.ones(batch, total, dtype=torch.int64)
    if holes:
        mask = (torch.rand(batch, total, generator=generator) < 0.7).long()
        mask[:, -1] = 1
    for row in range(batch - 1):
        mask[row, : 3 * (row + 1)] = 0
    return mask


def agrees(spec: AttentionSpec, function, batch: int, length: int, past: int, generator, size: float = 1.0) -> None:
    """Runs a kernel on random operands and holds it against the reference; ``size`` is that of queries and of what
    every head has a number of."""
    shapes = [(spec.heads, spec.key_width), (spec.kv_heads, spec.key_width), (spec.kv_heads, spec.value_width)]
    new = [torch.randn(batch, heads, length, width, generator=generator) for heads, width in shapes]
    new[0] *= size
    mask = masks(batch, past + length, spec.places, generator)
    capacity = -(-(past + length) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
    expected_state = attention_state(spec, batch, past, capacity, generator)
    state = [t.clone() for t in expected_state]
    sinks = size * torch.randn(spec.heads, generator=generator) if spec.sinks else None
    slopes = size * torch.rand(spec.heads, generator=generator) if spec.slopes else None
    options = (spec.softcap, sinks, slopes, spec.counted, spec.chunk)
    arguments = (mask, past, spec.scale, spec.window, spec.bits, *options)
    expected = reference.cached_attention(*new, *expected_state, *arguments)
    given = state if spec.bits < 16 else [state[0], state[0], state[2], state[2]]
    out = torch.full_like(expected, float("nan"))
    own = [slopes if sinks is None else sinks, sinks if slopes is None else slopes] if spec.per_head else []
    function(*new, *given, mask, *own, out)
    for stored, wanted in zip(state, expected_state, strict=True):
        torch.testing.assert_close(stored, wanted, rtol=0, atol=0, equal_nan=True)
    visible = reference.attention_mask(mask, length, past, spec.window, spec.chunk, spec.counted)
    seen = visible.any(-1).expand(batch, spec.heads, length)
    torch.testing.assert_close(out[seen], expected[seen], rtol=1e-5, atol=1e-5 * max(size, 1.0))
    assert not out[~seen].any()


@pytest.mark.parametrize("spec", [*PLAIN, *FORMS], ids=identity)
@pytest.mark.parametrize(
    "lanes", [16, pytest.param(8, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_attention_agrees_with_the_reference(spec, lanes):
    generator = torch.Generator().manual_seed(spec.key_width)
    for queries, parallel in ((1, False), (1, True), (None, True)):
        kernel = attention.cached_attention(spec, lanes, attention.tile_rows(spec, queries), parallel)
        function = compile_functions({"kernel": kernel}, HOST.llvm)["kernel"]
        for batch, length, past in ((1, 1, 0), (1, 1, 40), (2, 7, 0), (3, 33, 5)):
            agrees(spec, function, batch, length, past, generator)


@pytest.mark.parametrize("spec", [PLAIN[1], *FORMS], ids=identity)
@pytest.mark.parametrize("size", [0.0, 1e-20, 300.0])
def test_attention_agrees_on_extreme_scores(spec, size):
    generator = torch.Generator().manual_seed(3)
    kernel = attention.cached_attention(spec, 16, attention.tile_rows(spec, None), False)
    function = compile_functions({"kernel": kernel}, HOST.llvm)["kernel"]
    agrees(spec, function, 2, 19, 3, generator, size)


@pytest.mark.parametrize("spec", [*PLAIN, *FORMS], ids=identity)
@pytest.mark.parametrize("length", [1, 5])
def test_padding_on_the_left_changes_no_bit(spec, length):
    """A sequence alone, and the same one behind padding of any number of slots, beside a sequence without."""
    generator = torch.Generator().manual_seed(length)
    kernel = attention.cached_attention(spec, 16, attention.tile_rows(spec, None), False)
    function = compile_functions({"kernel": kernel}, HOST.llvm)["kernel"]
    past = 20
    shapes = [(spec.heads, spec.key_width), (spec.kv_heads, spec.key_width), (spec.kv_heads, spec.value_width)]
    new = [torch.randn(1, heads, length, width, generator=generator) for heads, width in shapes]
    stored = attention_state(spec, 1, past, past, generator)
    own = [torch.rand(spec.heads, generator=generator)] * 2 if spec.per_head else []

    def run(hidden: int) -> Tensor:
        slots = hidden + past
        capacity = -(-(slots + length) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        state = attention_state(spec, 2, slots, capacity, generator)
        mask = torch.ones(2, slots + length, dtype=torch.int64)
        mask[0, :hidden] = 0
        for whole, part in zip(state, stored, strict=True):
            whole[0, :, hidden:slots] = part[0]
        given = state if spec.bits < 16 else [state[0], state[0], state[2], state[2]]
        out = torch.full((2, spec.heads, length, spec.value_width), float("nan"))
        function(*(x.repeat(2, 1, 1, 1) for x in new), *given, mask, *own, out)
        return out[0]

    alone = run(0)
    for hidden in (1, 15, 16, 37):
        assert torch.equal(run(hidden), alone)


def test_the_hyperbolic_tangent_is_close_everywhere():
    lanes, count = 16, 4096

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle, y_: T.handle):
        x = T.match_buffer(x_, (count,), "float32", align=4)
        y = T.match_buffer(y_, (count,), "float32", align=4)
        for i in T.serial(count // lanes):
            y[T.ramp(i * lanes, 1, lanes)] = hyperbolic_tangent(x[T.ramp(i * lanes, 1, lanes)], lanes)

    x = torch.linspace(-12.0, 12.0, count)
    x[:8] = torch.tensor([-3e38, -1e20, -90.0, -0.0, 0.0, 1e-30, 90.0, 3e38])
    y = torch.empty_like(x)
    compile_functions({"kernel": kernel}, HOST.llvm)["kernel"](x, y)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=4e-7, atol=0)


def test_kernels_that_differ_have_names_that_differ():
    kernels = KernelSet(HOST, {}, {}, [], {}, 0)
    specs = [*PLAIN, *FORMS, dataclasses.replace(PLAIN[0], scale=0.25), dataclasses.replace(FORMS[0], softcap=2.5)]
    assert len({kernels.attention(spec, 1, False).name for spec in specs}) == len(specs)


@pytest.mark.parametrize("options", [{"softcap": -1.0}, {"softcap": float("inf")}, {"chunk": -1}, {"window": -2}])
def test_a_form_that_does_not_exist_is_refused(options):
    with pytest.raises(KernelError):
        dataclasses.replace(PLAIN[0], **options)


def test_places_count_slots_or_tokens():
    mask = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1]])
    assert reference.attention_places(mask, False).tolist() == [[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert reference.attention_places(mask, True).tolist() == [[-1, -1, 0, 0, 1, 2], [0, 1, 1, 1, 1, 2]]


def test_a_sink_takes_its_share_and_a_capped_score_keeps_its_bound():
    scores = torch.tensor([[[[1.0, -torch.inf, 3.0]]], [[[-torch.inf] * 3]]])
    shares = reference.softmax_with_sinks(scores, torch.tensor([2.0]))
    wanted = torch.tensor([1.0, -torch.inf, 3.0, 2.0]).softmax(0)[:3]
    torch.testing.assert_close(shares[0, 0, 0], wanted)
    assert not shares[1].any() and not reference.softmax_with_sinks(scores, None)[1].any()
    assert reference.soft_cap(torch.tensor([-1e9, 0.0, 1e9]), 30.0).tolist() == [-30.0, 0.0, 30.0]


def test_alibi_is_the_paper_s_bias():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    state = [torch.zeros(1, 2, 5, *tail, dtype=torch.float16) for tail in ((8,), (0,), (8,), (0,))]
    slopes = torch.tensor([0.5, 0.25])
    mask = torch.ones(1, 5, dtype=torch.int64)
    got = reference.cached_attention(query, key, value, *state, mask, 0, 1.0, 0, 16, slopes=slopes)
    places = torch.arange(5.0)
    bias = -slopes[:, None, None] * (places[:, None] - places[None, :]).abs()
    bias = bias.masked_fill(places[:, None] < places[None, :], -torch.inf)
    wanted = ((query @ key.half().float().mT) + bias).softmax(-1) @ value.half().float()
    torch.testing.assert_close(got, wanted)
