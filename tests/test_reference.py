"""The operators' exact definition, against plain Python and the C library."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.format import QuantizedWeight, codes_to_planes, quantize_rows
from lbllm_compile.codegen.sizes import ACTIVATION_BITS, group_count

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def libm_fmaf():
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no C math library to compare with")
    function = ctypes.CDLL(name).fmaf
    function.argtypes, function.restype = [ctypes.c_float] * 3, ctypes.c_float
    return function


def bits(value: float) -> bytes:
    return struct.pack("<f", value)


@settings(max_examples=300, deadline=None)
@given(floats, floats, floats)
def test_fused_multiply_add_is_the_c_librarys(a, b, c):
    expected = libm_fmaf()(a, b, c)
    actual = reference.fused_multiply_add(torch.tensor(a), torch.tensor(b), torch.tensor(c)).item()
    assert actual == expected or (math.isnan(actual) and math.isnan(expected))


@settings(max_examples=300, deadline=None)
@given(st.integers(-(2**24), 2**24), floats, st.integers(-3, 3), st.floats(0.875, 1.125, width=32))
def test_fused_multiply_add_rounds_once_where_terms_cancel(integer, scale, ulps, near):
    """The addend lies next to the negated product, where a sum rounded twice differs."""
    a, b = float(integer), scale
    addend = torch.tensor(-(a * b) * near, dtype=torch.float64).float()
    for _ in range(abs(ulps)):
        addend = torch.nextafter(addend, torch.tensor(math.copysign(math.inf, ulps)))
    expected = libm_fmaf()(a, b, addend.item())
    actual = reference.fused_multiply_add(torch.tensor(a), torch.tensor(b), addend).item()
    assert actual == expected or (math.isnan(actual) and math.isnan(expected))


def test_fused_multiply_add_at_the_edges_of_fp32():
    extremes = [0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126), 2.0**-24, 3.4028234663852886e38, 1 + 2.0**-23, 2.0**24 + 2]
    triples = [(a, b, c) for a in extremes for b in extremes for c in extremes]
    a, b, c = (torch.tensor(column) for column in zip(*triples, strict=True))
    fmaf = libm_fmaf()
    for got, triple in zip(reference.fused_multiply_add(a, b, c).tolist(), triples, strict=True):
        assert got == fmaf(*triple), triple


def plain_dot(values, weight, x_scale, w_scale, bias, group):
    """The documented sum, one Python integer and one ``fmaf`` at a time."""
    fmaf = libm_fmaf()
    out = []
    for m, token in enumerate(values.tolist()):
        row = []
        for n, weights in enumerate(weight.tolist()):
            y = 0.0
            for g, start in enumerate(range(0, len(token), group)):
                dot = sum(
                    a * b for a, b in zip(token[start : start + group], weights[start : start + group], strict=True)
                )
                xs = x_scale[m, min(g, x_scale.shape[1] - 1)]
                product = (xs * w_scale[n, min(g, w_scale.shape[1] - 1)].float()).item()
                y = fmaf(torch.tensor(float(dot)).item(), product, y)
            row.append(y if bias is None else (torch.tensor(y) + bias[n]).item())
        out.append(row)
    return torch.tensor(out)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 140),
    st.sampled_from([(32, 32), (64, 64), (64, 32), (128, 32), (256, 64)]),
    st.sampled_from(ACTIVATION_BITS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_bit_linear_is_a_plain_integer_loop(m, n, k, groups, act_bits, per_token, with_bias, seed):
    group, act_group = groups
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(4, (n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-128, 128, (n, group_count(k, group), 4), generator=generator).sort(-1).values.to(torch.int8)
    scale = torch.rand(n, group_count(k, group), generator=generator).half()
    weight = QuantizedWeight(*codes_to_planes(codes), levels, scale, k, group)
    limit = {4: 15, 8: 127, 16: 32767}[act_bits]
    values = torch.randint(-limit, limit + 1, (m, k), generator=generator).to(reference.value_dtype(act_bits))
    x_scale = torch.rand(m, 1 if per_token else group_count(k, act_group), generator=generator)
    bias = torch.randn(n, generator=generator) if with_bias else None
    if x_scale.shape[1] > 1:
        scale, group = scale.repeat_interleave(group // act_group, 1), act_group
    expected = plain_dot(values, weight.integer_levels(), x_scale, scale, bias, group)
    assert torch.equal(reference.bit_linear(values, x_scale, weight, bias), expected)


@pytest.mark.parametrize("group", [0, 32])
def test_int8_linear_is_a_plain_integer_loop(group):
    generator = torch.Generator().manual_seed(group)
    rows, scale = quantize_rows(torch.randn(5, 75, generator=generator))
    values = torch.randint(-127, 128, (3, 75), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(3, group_count(75, group) if group else 1, generator=generator)
    expected = plain_dot(values, rows, x_scale, scale[:, None], None, group or 75)
    assert torch.equal(reference.int8_linear(values, x_scale, rows, scale, None, group), expected)


finite_rows = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70)


@settings(max_examples=150, deadline=None)
@given(finite_rows, st.sampled_from(ACTIVATION_BITS), st.sampled_from([0, 32]))
def test_quantized_values_are_in_range_and_close(row, act_bits, group):
    x = torch.tensor([row])
    values, scale = reference.quantize_activation(x, torch.ones(2), act_bits, group)
    assert values.dtype == reference.value_dtype(act_bits) and bool((scale > 0).all())
    limit = {4: 15, 8: 127, 16: 32767}[act_bits]
    assert int(values.int().abs().max()) <= limit
    step = scale.repeat_interleave(group or x.shape[1], -1)[:, : x.shape[1]]
    error = (reference.dequantize_activation(values, scale, group) - x).abs()
    # The zero point is rounded, too, and one that rounds down can clip the top half step.
    assert bool((error <= step * 1.001 + 1e-30).all())


def test_four_bits_hold_one_sided_groups_with_all_sixteen_steps():
    x = torch.arange(16.0)[None]
    values, scale = reference.quantize_activation(x, torch.ones(2), 4, 0)
    assert scale.item() == 1 and values.tolist() == [list(range(16))]
    values, _ = reference.quantize_activation(-x, torch.ones(2), 4, 0)
    assert values.tolist() == [[-i for i in range(16)]]


def test_clip_factors_bound_the_range():
    x = torch.tensor([[-8.0, 0.0, 4.0, 16.0]])
    _, scale = reference.quantize_activation(x, torch.tensor([0.5, 0.25]), 4, 0)
    assert scale.item() == torch.tensor(10.0).div(15).item()
    values, scale = reference.quantize_activation(x, torch.tensor([0.5, 0.25]), 8, 0)
    assert scale.item() == torch.tensor(8.0).div(127).item() and values[0, 3] == 127 and values[0, 0] == -127


def test_zeros_stay_zeros_and_tails_are_groups_of_their_own():
    x = torch.zeros(2, 40)
    x[1, 32:] = 100.0
    values, scale = reference.quantize_activation(x, torch.ones(2), 4, 32)
    assert not values[0].any() and not values[1, :32].any()
    assert scale.shape == (2, 2) and bool((values[1, 32:] == 15).all())
