"""The W(1+1) storage format: packing is lossless, and nothing that breaks its rules is let in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen.errors import FormatError
from lbllm_compile.codegen.format import (
    GROUPS,
    LEVEL_MAX,
    Int4Weight,
    QuantizedWeight,
    codes_to_planes,
    group_count,
    pack_codes,
    pack_plane,
    planes_to_codes,
    quantize_levels,
    quantize_rows,
    unpack_plane,
)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 300))


def random_weight(n: int, k: int, group: int, seed: int = 0, experts: tuple[int, ...] = ()) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(4, (*experts, n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randn(*experts, n, group_count(k, group), 4, generator=generator).sort(-1).values
    return QuantizedWeight.from_codes(codes, levels, group)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**16))
def test_planes_hold_every_code(shape, seed):
    codes = torch.randint(4, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    sign, bitmap = codes_to_planes(codes)
    assert sign.shape == bitmap.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(planes_to_codes(sign, bitmap, shape[1]), codes)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 2**16))
def test_a_plane_is_least_significant_bit_first_with_zero_padding(shape, seed):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_plane(bits)
    expected = [
        sum(int(bit) << i for i, bit in enumerate(row[start : start + 8]))
        for row in bits.tolist()
        for start in range(0, shape[1], 8)
    ]
    assert packed.flatten().tolist() == expected
    assert torch.equal(unpack_plane(packed, shape[1]), bits)


def test_the_four_codes_are_the_papers_pairs():
    """Bitmap 1 is the inner pair (levels 1 and 2), bitmap 0 the outer one; the sign picks the upper of the two."""
    sign, bitmap = codes_to_planes(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8))
    assert sign.item() == 0b1100 and bitmap.item() == 0b0110


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(GROUPS), st.integers(0, 2**16))
def test_dequantize_agrees_with_a_plain_loop(shape, group, seed):
    weight = random_weight(*shape, group, seed)
    weight.validate()
    codes, dense = weight.codes(), weight.dequantize()
    for row, column in {(0, 0), (shape[0] - 1, shape[1] - 1), (0, shape[1] // 2)}:
        g = column // group
        level = int(weight.levels[row, g, int(codes[row, column])])
        assert dense[row, column].item() == level * float(weight.scale[row, g])


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([(64, 32), (256, 32), (128, 64), (32, 32)]), st.integers(0, 2**16))
def test_refined_weights_are_the_same_matrix_in_smaller_groups(shape, groups, seed):
    group, smaller = groups
    weight = random_weight(*shape, group, seed, experts=(2,))
    refined = weight.refined(smaller)
    refined.validate()
    assert refined.groups == group_count(shape[1], smaller) == refined.levels.shape[-2]
    assert torch.equal(refined.dequantize(), weight.dequantize())
    table = torch.arange(16, dtype=torch.int8)
    scale = torch.rand(shape[0], group_count(shape[1], group)).half()
    coded = Int4Weight(pack_codes(torch.randint(16, shape, dtype=torch.uint8)), table, scale, shape[1], group)
    coded.refined(smaller).validate()
    assert torch.equal(coded.refined(smaller).dequantize(), coded.dequantize())
    with pytest.raises(FormatError, match="groups of 64 columns do not divide those of 32"):
        random_weight(2, 70, 32).refined(64)


def test_stacked_experts_are_their_matrices():
    weight = random_weight(6, 70, 32, experts=(3,))
    for expert in range(3):
        one = QuantizedWeight(
            weight.sign[expert], weight.bitmap[expert], weight.levels[expert], weight.scale[expert], 70, 32
        )
        assert torch.equal(weight.dequantize()[expert], one.dequantize())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1e-30, 1e-6, 1.0, 1e5]))
def test_levels_stay_sorted_and_close(seed, magnitude):
    levels = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)).sort(-1).values * magnitude
    quantized, scale = quantize_levels(levels)
    assert bool((quantized[..., 1:] >= quantized[..., :-1]).all())
    error = (quantized.double() * scale.double().unsqueeze(-1) - levels.double()).abs()
    # Half a step of the grid, plus what rounding the scale to fp16 moves the outermost level.
    assert bool((error <= scale.double().unsqueeze(-1) * (0.5 + LEVEL_MAX * 2.0**-10)).all())


def test_a_group_of_zeros_has_scale_zero():
    quantized, scale = quantize_levels(torch.zeros(1, 1, 4))
    assert scale.item() == 0 and not quantized.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_levels_that_do_not_fit_are_named(bad):
    with pytest.raises(FormatError, match=r"NaN|8\.3e6"):
        quantize_levels(torch.tensor([[0.0, 0.0, 0.0, bad]]))


def _set(field: str, index: tuple, value: float):
    def change(weight: QuantizedWeight) -> QuantizedWeight:
        tensor = getattr(weight, field).clone()
        tensor[index] = value
        return dataclasses.replace(weight, **{field: tensor})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("scale", (0, 0), float("nan")), "negative, NaN or infinite"),
        (_set("scale", (0, 0), float("inf")), "negative, NaN or infinite"),
        (_set("scale", (0, 0), -1.0), "negative, NaN or infinite"),
        (_set("levels", (0, 0, 0), 127), "not sorted"),
        (_set("sign", (0, -1), 255), "padding bit"),
        (_set("bitmap", (0, -1), 255), "padding bit"),
        (lambda w: dataclasses.replace(w, group=48), "group size 48"),
        (lambda w: dataclasses.replace(w, group=64), "the format needs"),
        (lambda w: dataclasses.replace(w, scale=w.scale.float()), "the format needs torch.float16"),
        (lambda w: dataclasses.replace(w, sign=w.sign[:, :-1]), "the format needs"),
        (lambda w: dataclasses.replace(w, levels=w.levels[..., :2]), "the format needs"),
    ],
)
def test_validate_names_the_broken_rule(change, message):
    weight = random_weight(4, 100, 32)
    with pytest.raises(FormatError, match=message) as error:
        change(weight).validate("model.q_proj.weight")
    assert "model.q_proj.weight" in str(error.value)


def test_rows_of_merged_matrices_follow_each_other():
    first, second = random_weight(3, 100, 32, 1), random_weight(5, 100, 32, 2)
    merged = first.concatenate_rows(second)
    merged.validate()
    assert torch.equal(merged.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    with pytest.raises(FormatError, match="same in_features and group"):
        first.concatenate_rows(random_weight(3, 100, 64))


def test_stored_bits_counts_planes_levels_and_scales():
    assert random_weight(8, 512, 128).stored_bits / (8 * 512) == 2.375


def test_int8_rows_round_to_half_a_step():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rows, scale = quantize_rows(weight)
    assert scale[3] == 0 and int(rows.abs().max()) == LEVEL_MAX
    assert bool(((rows * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all())
    with pytest.raises(FormatError, match="NaN"):
        quantize_rows(torch.tensor([[float("nan")]]))
