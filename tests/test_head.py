"""The pass ``head``: int8 rows for the token embedding and the output head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graphs import context, normal, program, rewrites
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.head import Head
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import get_attribute

aten = torch.ops.aten
IDS = {"input_ids": torch.tensor([[1, 4, 2]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}


TIED = """
    %ids = input input_ids
    %mask = input attention_mask
    %w: f32[7, 40] = weight head.weight
    %flat = aten.view(%ids, [-1, 3])
    %x = aten.embedding(%w, %flat)
    %y = aten.linear(%x, %w) {path="head", role="head"}
    return %y
"""

UNTIED = """
    %ids = input input_ids
    %positions = input position_ids
    %embed: f32[7, 40] = weight embed.weight
    %token = aten.embedding(%embed, %ids)
    %table: f32[5, 40] = weight positions.weight
    %place = aten.embedding(%table, %positions)
    %x = aten.add.Tensor(%token, %place)
    %w: f32[7, 40] = weight head.weight
    %bias: f32[7] = weight head.bias
    %y = aten.linear(%x, %w, %bias) {path="head", role="head"}
    return %y
"""


def test_a_tied_pair_becomes_one_int8_matrix():
    expected = """
        %ids: i64[1, 3] = input input_ids
        %mask = input attention_mask
        %rows: i8[7, 40] = weight head.weight.rows
        %row_scale: f32[7] = weight head.weight.row_scale
        %w: f32[7, 40] = lbllm.unpack_rows(%rows, %row_scale)
        %flat = aten.view(%ids, [-1, 3])
        %x = aten.embedding(%w, %flat)
        %clip: f32[2] = weight head.input_clip
        %quantized: f32[1, 3, 40] = lbllm.fake_quantize(%x, %clip, 8, 64)
        %y = aten.linear(%quantized, %w) {path="head", role="head"}
        return %y
    """
    rewrites(Head(), TIED, expected, context(IDS), kind="causal-lm")


def test_weights_that_share_memory_stay_one_matrix():
    shared = normal(7, 40)

    def forward(root, input_ids):
        return aten.linear.default(aten.embedding.default(root.embed.weight, input_ids), root.head.weight)

    after = Head().apply(program({"embed.weight": shared, "head.weight": shared}, forward), context()).program
    assert [p for p, _ in after.parameters() if p.endswith("rows")] == ["embed.weight.rows"]


def test_an_untied_pair_becomes_two_and_other_embeddings_stay():
    expected = """
        %ids = input input_ids
        %positions = input position_ids
        %rows: i8[7, 40] = weight head.weight.rows
        %row_scale: f32[7] = weight head.weight.row_scale
        %w = lbllm.unpack_rows(%rows, %row_scale)
        %embed_rows: i8[7, 40] = weight embed.weight.rows
        %embed_scale: f32[7] = weight embed.weight.row_scale
        %embed = lbllm.unpack_rows(%embed_rows, %embed_scale)
        %token = aten.embedding(%embed, %ids)
        %table: f32[5, 40] = weight positions.weight
        %place = aten.embedding(%table, %positions)
        %x = aten.add.Tensor(%token, %place)
        %clip: f32[2] = weight head.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 8, 32)
        %bias: f32[7] = weight head.bias
        %y = aten.linear(%quantized, %w, %bias) {path="head", role="head"}
        return %y
    """
    rewrites(Head(group=32), UNTIED, expected, kind="causal-lm")


def test_a_tied_pair_becomes_a_four_bit_head_and_an_int8_embedding():
    expected = """
        %ids: i64[1, 3] = input input_ids
        %mask = input attention_mask
        %codes: u8[7, 20] = weight head.weight.codes
        %table: i8[16] = weight head.weight.table
        %code_scale: f16[7, 2] = weight head.weight.code_scale
        %head: f32[7, 40] = lbllm.unpack_int4(%codes, %table, %code_scale, 40, 32)
        %rows: i8[7, 40] = weight head.weight.rows
        %row_scale: f32[7] = weight head.weight.row_scale
        %embed: f32[7, 40] = lbllm.unpack_rows(%rows, %row_scale)
        %flat = aten.view(%ids, [-1, 3])
        %x = aten.embedding(%embed, %flat)
        %clip: f32[2] = weight head.input_clip
        %quantized: f32[1, 3, 40] = lbllm.fake_quantize(%x, %clip, 8, 32)
        %y = aten.linear(%quantized, %head) {path="head", role="head"}
        return %y
    """
    rewrites(Head(bits=4, group=32, sequences=0), TIED, expected, context(IDS), kind="causal-lm")


def test_a_four_bit_embedding_that_is_tied_reads_the_heads_codes():
    expected = """
        %ids: i64[1, 3] = input input_ids
        %mask = input attention_mask
        %codes: u8[7, 20] = weight head.weight.codes
        %table: i8[16] = weight head.weight.table
        %code_scale: f16[7, 1] = weight head.weight.code_scale
        %w: f32[7, 40] = lbllm.unpack_int4(%codes, %table, %code_scale, 40, 64)
        %flat = aten.view(%ids, [-1, 3])
        %x = aten.embedding(%w, %flat)
        %clip: f32[2] = weight head.input_clip
        %quantized: f32[1, 3, 40] = lbllm.fake_quantize(%x, %clip, 8, 64)
        %y = aten.linear(%quantized, %w) {path="head", role="head"}
        return %y
    """
    rewrites(Head(bits=4, embedding=4, sequences=0), TIED, expected, context(IDS), kind="causal-lm")


W11_TIED = """
    %ids: i64[1, 3] = input input_ids
    %mask = input attention_mask
    %sign: u8[7, 5] = weight head.weight.sign
    %bitmap: u8[7, 5] = weight head.weight.bitmap
    %levels: i8[7, 2, 4] = weight head.weight.levels
    %scale: f16[7, 2] = weight head.weight.scale
    %head: f32[7, 40] = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 40, 32)
    %rows: i8[7, 40] = weight head.weight.rows
    %row_scale: f32[7] = weight head.weight.row_scale
    %embed: f32[7, 40] = lbllm.unpack_rows(%rows, %row_scale)
    %flat = aten.view(%ids, [-1, 3])
    %x = aten.embedding(%embed, %flat)
    %clip: f32[2] = weight head.input_clip
    %quantized: f32[1, 3, 40] = lbllm.fake_quantize(%x, %clip, 8, 32)
    %y = aten.linear(%quantized, %head) {path="head", role="head"}
    return %y
"""


def test_a_tied_pair_becomes_a_head_of_planes_and_an_int8_embedding():
    rewrites(Head(bits=2, group=32, sequences=0), TIED, W11_TIED, context(IDS), kind="causal-lm")


@pytest.mark.parametrize("options", [{}, {"bits": 4, "sequences": 0}, {"bits": 16}])
def test_the_form_that_a_scheme_gives_a_head_wins_over_the_options(options):
    told = 'role="head", scheme="bits=2 group=32"'
    before, expected = (text.replace('role="head"', told) for text in (TIED, W11_TIED))
    given = dataclasses.replace(context(IDS), calibration=[IDS])
    rewrites(Head(**options), before, expected, given, kind="causal-lm")


def test_a_scheme_says_how_many_bits_the_embedding_has_beside_a_head():
    told = UNTIED.replace('role="head"', 'role="head", scheme="bits=2 group=32 embedding=4"')
    after = Head(sequences=0).apply(parse(told, kind="causal-lm"), context()).program
    paths = {path.rpartition(".")[0]: path.rpartition(".")[2] for path, _ in after.parameters() if "weight." in path}
    assert paths == {"head.weight": "scale", "embed.weight": "code_scale"}
    assert get_attribute(after.module, "embed.weight.code_scale").shape == (7, 2)


def test_a_head_of_planes_is_closer_than_its_weights_rounded_and_farther_than_codes():
    few = {"input_ids": torch.arange(8)[None]}
    given = dataclasses.replace(context(few), calibration=[few] * 4)
    before = parse(FITTED, kind="causal-lm")
    errors = {}
    for bits, sequences in ((2, 0), (2, 4), (4, 4)):
        after = Head(bits=bits, sequences=sequences).apply(before, given)
        errors[bits, sequences] = float((after.program.run(few) - before.run(few)).norm() / before.run(few).norm())
    assert errors[4, 4] < errors[2, 4] < 0.6 * errors[2, 0]
    assert [row["bits"] for row in Head(bits=2).apply(before, given).rows] == [8, 2]


def test_sizes_are_those_of_the_stored_tensors():
    for options in (
        {},
        {"bits": 4, "group": 32},
        {"bits": 4, "embedding": 4},
        {"bits": 2},
        {"bits": 2, "embedding": 4},
    ):
        item = Head(**options, sequences=0)
        for text in (TIED, UNTIED):
            before = parse(text, kind="causal-lm")
            stored: dict[str, int] = {}
            for path, tensor in item.apply(before, context(IDS)).program.parameters():
                if ".weight." in path:
                    owner = path.rpartition(".")[0]
                    stored[owner] = stored.get(owner, 0) + tensor.nbytes
            assert item.sizes(before) == stored


def test_heads_over_one_matrix_have_one_group():
    text = TIED.replace(
        "    return %y",
        '    %z = aten.linear(%x, %w) {path="second", weight="head.weight", role="head", scheme="bits=4 group=32"}\n'
        "    %both = aten.add.Tensor(%y, %z)\n    return %both",
    )
    with pytest.raises(PassError, match="read one matrix with 4 bits, in groups of 64 and of 32; give both the same"):
        Head(bits=4, sequences=0).apply(parse(text, kind="causal-lm"), context())


FITTED = """
    %ids = input input_ids
    %embed: f32[90, 64] = weight embed.weight
    %x = aten.embedding(%embed, %ids)
    %w: f32[90, 64] = weight head.weight
    %y = aten.linear(%x, %w) {path="head", role="head"}
    return %y
"""


def test_a_four_bit_head_is_fitted_to_the_inputs_it_gets():
    """The calibration uses eight tokens of the vocabulary: on these the logits are much closer than rounded ones."""
    before = parse(FITTED, kind="causal-lm")
    few = {"input_ids": torch.arange(8)[None]}
    errors = []
    for sequences in (0, 4):
        given = dataclasses.replace(context(few), calibration=[few] * 4)
        after = Head(bits=4, sequences=sequences).apply(before, given)
        errors.append(float((after.program.run(few) - before.run(few)).norm() / before.run(few).norm()))
    assert errors[1] < 0.4 * errors[0]
    assert [row["bits"] for row in after.rows] == [8, 4] and 0 < after.rows[1]["output_error"] < 0.01


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({}, TIED, r"needs calibration batches.*head\{bits=4,sequences=0\}"),
        (
            {"sequences": 0, "group": 32},
            TIED.replace('role="head"', 'role="head", scheme="act-group=64"'),
            r"groups of 64 in its scheme.*the 32 of its 4-bit weights; use head\{group=64\}",
        ),
    ],
)
def test_what_a_four_bit_head_cannot_have_is_refused(options, text, message):
    with pytest.raises(PassError, match=message):
        Head(bits=4, **options).apply(parse(text), context())


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(PassError, match="needs groups of one of"):
        Head(bits=4, group=0)
    with pytest.raises(PassError, match="goes with bits=4 or bits=2"):
        Head(embedding=4)


def test_rows_are_within_half_a_step_of_the_weight():
    before = parse(UNTIED)
    after = Head().apply(before, context()).program
    weight = get_attribute(before.module, "head.weight")
    rows, scale = (get_attribute(after.module, f"head.weight.{n}") for n in ("rows", "row_scale"))
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    assert ((rows * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    inputs = {"input_ids": torch.tensor([[1, 2]]), "position_ids": torch.tensor([[0, 1]])}
    error = (after.run(inputs) - before.run(inputs)).norm() / before.run(inputs).norm()
    assert 0 < error < 0.02


def test_sixteen_bits_leave_the_program_alone():
    before = parse(TIED)
    assert Head(bits=16).apply(before, context()).program is before


def test_a_matrix_with_other_uses_is_refused():
    def forward(root, input_ids):
        x = aten.embedding.default(root.embed.weight, input_ids)
        return aten.matmul.default(aten.linear.default(x, root.embed.weight), root.embed.weight)

    with pytest.raises(PassError, match=r"'embed\.weight'.*also used by another operation.*head\{bits=16\}"):
        Head().apply(program({"embed.weight": normal(7, 40)}, forward, head="embed"), context())


def test_a_kept_head_keeps_its_embedding():
    """Float in, float out: neither of an untied pair becomes int8 rows."""
    kept = UNTIED.replace('role="head"', 'role="dense"')
    rewrites(Head(), kept, kept, kind="causal-lm")


def test_a_kept_linear_that_is_no_head_keeps_nothing_else():
    text = """
        %ids = input input_ids
        %embed: f32[7, 40] = weight embed.weight
        %token = aten.embedding(%embed, %ids)
        %p: f32[40, 40] = weight projection.weight
        %x = aten.linear(%token, %p) {path="projection", role="dense"}
        %w: f32[7, 40] = weight head.weight
        %y = aten.linear(%x, %w) {path="head", role="head"}
        return %y
    """
    after = Head().apply(parse(text), context()).program
    assert {p for p, _ in after.parameters() if p.endswith("rows")} == {"embed.weight.rows", "head.weight.rows"}


def test_twice_is_refused():
    once = Head().apply(parse(UNTIED), context()).program
    with pytest.raises(PassError, match="quantized already"):
        Head().apply(once, context())
