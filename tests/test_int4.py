"""4-bit matrices: packing is lossless, fits come close, and nothing that breaks the format's rules is let in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graphs import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen.errors import FormatError
from lbllm_compile.codegen.format import Int4Weight, pack_codes, unpack_codes
from lbllm_compile.codegen.sizes import GROUPS
from lbllm_compile.passes.calibrate.coded import fit_int4
from lbllm_compile.passes.calibrate.fit import factor
from lbllm_compile.passes.calibrate.int4 import fit_scales, nearest_codes, quantize_int4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**16))
def test_bytes_hold_every_code_the_even_column_in_the_low_bits(rows, columns, seed):
    codes = torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_codes(codes)
    padded = [[*row, 0] for row in codes.tolist()]
    assert packed.tolist() == [[row[i] + 16 * row[i + 1] for i in range(0, columns, 2)] for row in padded]
    assert torch.equal(unpack_codes(packed, columns), codes)


@pytest.mark.parametrize(("columns", "group"), [(1, 32), (77, 32), (64, 64), (300, 256)])
def test_every_weight_has_the_level_next_to_it(columns, group):
    weight = normal(13, columns)
    weight[3], weight[4] = 0.0, 1e-9
    found = quantize_int4(weight, group)
    found.validate()
    assert int(found.table.int().abs().max()) == 127
    scale = found.scale.float().repeat_interleave(group, 1)[:, :columns, None]
    nearest = (found.table.float() * scale - weight[:, :, None]).abs().amin(-1)
    assert torch.allclose((found.dequantize() - weight).abs(), nearest, atol=1e-6)
    assert found.dequantize()[3].abs().max() == 0


@pytest.mark.parametrize("seed", range(3))
def test_many_weights_get_the_codes_that_few_get(seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-127, 128, (16,), generator=generator).sort().values.to(torch.int8)
    # between two middles, on them, and far beyond the levels
    weights = torch.cat(
        [torch.arange(-300, 301) / 2, torch.randn(40000, generator=generator) * 90, torch.tensor([1e30, -1e30])]
    )
    scale = torch.tensor([[0.5], [1.0], [-2.0], [0.0]])
    few = torch.cat([nearest_codes(part, scale, table) for part in weights.split(1000)], 1)
    assert torch.equal(nearest_codes(weights, scale, table), few)


@pytest.mark.parametrize("group", GROUPS)
def test_fitted_levels_are_better_than_even_steps(group):
    """Rounding to 15 even steps whose ends are the furthest weight's: what symmetric int4 does."""
    weight = normal(64, 512)
    groups = weight.unflatten(1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True) / 7
    even = ((groups / step).round() * step - groups).square().mean()
    assert (quantize_int4(weight, group).dequantize() - weight).square().mean() < 0.65 * even


def test_a_scale_may_mirror_the_levels():
    """The levels reach further on one side of zero; a group whose furthest weight is on the other side wants that."""
    table = torch.tensor([-127, *range(-30, 36, 5), 40], dtype=torch.int8)[:16]
    groups = torch.stack([table.float(), -table.float()])
    scale = fit_scales(groups, torch.ones(16), table)
    assert scale.flatten().tolist() == [1.0, -1.0]
    assert torch.equal(table[nearest_codes(groups, scale, table).int()] * scale, groups)


def test_what_a_calibration_saw_decides_which_errors_count():
    """Loud and correlated inputs: the output's error is far below that of rounding, the weights' error is above it."""
    weight, inputs = normal(40, 96, seed=1), normal(500, 24, seed=2) @ normal(24, 96, seed=3) + normal(500, 96, seed=4)
    inputs[:, 5] *= 30
    found = fit_int4(weight, factor(inputs.T @ inputs / 500, 32, 1e-5), 32)
    fitted, error = found.weight, found.relative_error
    fitted.validate()
    rounded = quantize_int4(weight, 32)

    def errors(matrix):
        wrong = matrix.dequantize() - weight
        return float((inputs @ wrong.T).norm() / (inputs @ weight.T).norm()), float(wrong.norm())

    assert errors(fitted)[0] < 0.6 * errors(rounded)[0]
    assert errors(fitted)[1] > errors(rounded)[1]
    assert error == pytest.approx(errors(fitted)[0] ** 2, rel=0.1)


def test_unusable_weights_are_refused():
    with pytest.raises(FormatError, match="NaN or infinite"):
        quantize_int4(torch.tensor([[1.0, float("nan")]]), 32)
    with pytest.raises(FormatError, match=r"exceeds 4\.1e6"):
        quantize_int4(torch.full((2, 40), 5e6), 32)


GOOD = quantize_int4(normal(5, 33), 32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("group", 48, "group size 48 is not one of"),
        ("packed", GOOD.packed[0], "no matrix"),
        (
            "packed",
            GOOD.packed[:, 1:],
            r"weight\.codes is torch\.uint8 \(5, 16\), the format needs torch\.uint8 \(5, 17\)",
        ),
        ("packed", GOOD.packed | 0x80, "padding code behind column 33"),
        ("table", GOOD.table.flip(0), "not sorted"),
        ("table", GOOD.table[1:], r"weight\.table is torch\.int8 \(15,\)"),
        ("scale", GOOD.scale.float(), r"weight\.scale is torch\.float32"),
        ("scale", GOOD.scale * float("inf"), "NaN or infinite"),
    ],
)
def test_what_breaks_a_rule_is_named(field, value, message):
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(GOOD, **{field: value}).validate()


def test_rows_of_a_matrix_are_the_matrix_of_rows():
    assert isinstance(GOOD.rows(slice(1, 3)), Int4Weight)
    assert torch.equal(GOOD.rows(torch.tensor([4, 0])).dequantize(), GOOD.dequantize()[[4, 0]])
