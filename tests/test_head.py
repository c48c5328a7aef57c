"""The pass ``head``: int8 rows for the token embedding and the output head."""

from __future__ import annotations

import pytest
import torch
from graphs import context, expected, lines, normal, program
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.head import Head
from lbllm_compile.passes.ir.program import get_attribute

aten = torch.ops.aten
IDS = {"input_ids": torch.tensor([[1, 4, 2]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}


def tied():
    def forward(root, input_ids):
        return aten.linear.default(
            aten.embedding.default(root.head.weight, aten.view.default(input_ids, [-1, 3])), root.head.weight
        )

    return program({"head.weight": normal(7, 40)}, forward)


def untied(head=None):
    def forward(root, input_ids, position_ids):
        x = aten.embedding.default(root.embed.weight, input_ids)
        x = aten.add.Tensor(x, aten.embedding.default(root.positions.weight, position_ids))
        return aten.linear.default(x, root.head.weight, root.head.bias)

    weights = {"embed.weight": normal(7, 40), "positions.weight": normal(5, 40, seed=1), "head.bias": normal(7, seed=3)}
    return program({**weights, "head.weight": normal(7, 40, seed=2) if head is None else head}, forward)


def test_a_tied_pair_becomes_one_int8_matrix():
    before = tied()
    assert lines(before) == expected("""
        %0 = aten.view(input_ids, [-1, 3])
        %1 = aten.embedding(head.weight, %0)
        %2 = aten.linear(%1, head.weight)
        return %2
    """)
    after = Head().apply(before, context()).program
    assert lines(after) == expected("""
        %0 = lbllm.unpack_rows(head.weight.rows, head.weight.row_scale)
        %1 = aten.view(input_ids, [-1, 3])
        %2 = aten.embedding(%0, %1)
        %3 = lbllm.fake_quantize(%2, head.input_clip, 8, 64)
        %4 = aten.linear(%3, %0)
        return %4
    """)
    assert sorted(p for p, _ in after.parameters()) == ["head.input_clip", "head.weight.row_scale", "head.weight.rows"]
    assert [p for p, _ in before.parameters()] == ["head.weight"], "the program it got must stay as it was"


def test_weights_that_share_memory_stay_one_matrix():
    shared = normal(7, 40)

    def forward(root, input_ids):
        return aten.linear.default(aten.embedding.default(root.embed.weight, input_ids), root.head.weight)

    after = Head().apply(program({"embed.weight": shared, "head.weight": shared}, forward), context()).program
    assert [p for p, _ in after.parameters() if p.endswith("rows")] == ["embed.weight.rows"]


def test_an_untied_pair_becomes_two_and_other_embeddings_stay():
    after = Head(group=32).apply(untied(), context()).program
    assert lines(after) == expected("""
        %0 = lbllm.unpack_rows(head.weight.rows, head.weight.row_scale)
        %1 = lbllm.unpack_rows(embed.weight.rows, embed.weight.row_scale)
        %2 = aten.embedding(%1, input_ids)
        %3 = aten.embedding(positions.weight, position_ids)
        %4 = aten.add.Tensor(%2, %3)
        %5 = lbllm.fake_quantize(%4, head.input_clip, 8, 32)
        %6 = aten.linear(%5, %0, head.bias)
        return %6
    """)


def test_rows_are_within_half_a_step_of_the_weight():
    before = untied()
    after = Head().apply(before, context()).program
    weight = get_attribute(before.module, "head.weight")
    rows, scale = (get_attribute(after.module, f"head.weight.{n}") for n in ("rows", "row_scale"))
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    assert ((rows * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    inputs = {"input_ids": torch.tensor([[1, 2]]), "position_ids": torch.tensor([[0, 1]])}
    error = (after.run(inputs) - before.run(inputs)).norm() / before.run(inputs).norm()
    assert 0 < error < 0.02


def test_sixteen_bits_leave_the_program_alone():
    before = tied()
    assert Head(bits=16).apply(before, context()).program is before


def test_a_matrix_with_other_uses_is_refused():
    def forward(root, input_ids):
        x = aten.embedding.default(root.embed.weight, input_ids)
        return aten.matmul.default(aten.linear.default(x, root.embed.weight), root.embed.weight)

    with pytest.raises(PassError, match=r"'embed\.weight'.*also used by another operation.*head\{bits=16\}"):
        Head().apply(program({"embed.weight": normal(7, 40)}, forward, head="embed"), context())


def test_twice_is_refused():
    once = Head().apply(untied(), context()).program
    with pytest.raises(PassError, match="quantized already"):
        Head().apply(once, context())
