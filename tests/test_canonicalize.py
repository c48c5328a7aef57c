"""Canonicalize and cleanup: programs before, and what is expected of them."""

from __future__ import annotations

import pytest
import torch
from graphs import context, normal, rewrites
from lbllm_compile.passes.canonicalize import Canonicalize
from lbllm_compile.passes.cleanup import Cleanup
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import get_attribute
from transformers.integrations import moe as moe  # registers its operators

X = {"x": normal(4, 6, seed=1)}

LINEAR = """
    %x = input x
    %w: f32[5, 6] = weight w
    %y: f32[4, 5] = aten.linear(%x, %w)
    return %y
"""

PRODUCTS = {
    "mm": """
        %x = input x
        %w: f32[6, 5] = weight w
        %y = aten.mm(%x, %w)
        return %y
    """,
    "matmul": """
        %x = input x
        %w: f32[6, 5] = weight w
        %y = aten.matmul(%x, %w)
        return %y
    """,
    "transposed": """
        %x = input x
        %w: f32[5, 6] = weight w
        %turned = aten.t(%w)
        %y = aten.mm(%x, %turned)
        return %y
    """,
    "permuted": """
        %x = input x
        %w: f32[5, 6] = weight w
        %turned = aten.permute(%w, [1, 0])
        %y = aten.mm(%x, %turned)
        return %y
    """,
    "turned twice": """
        %x = input x
        %w: f32[6, 5] = weight w
        %turned = aten.t(%w)
        %back = aten.transpose.int(%turned, 0, 1)
        %y = aten.mm(%x, %back)
        return %y
    """,
}


@pytest.mark.parametrize("before", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_a_weight_is_a_linear(before):
    rewrites(Canonicalize(), before, LINEAR, context(X))


def test_a_bias_of_one_row_is_the_linears_and_another_summand_is_not():
    before = """
        %x = input x
        %b: f32[5] = weight b
        %w: f32[6, 5] = weight w
        %y = aten.addmm(%b, %x, %w)
        %c: f32[4, 5] = weight c
        %w_again: f32[6, 5] = weight w
        %z = aten.addmm(%c, %x, %w_again)
        %both = aten.add.Tensor(%y, %z)
        return %both
    """
    expected = """
        %x = input x
        %w: f32[5, 6] = weight w_transposed
        %b: f32[5] = weight b
        %y = aten.linear(%x, %w, %b)
        %w_again: f32[5, 6] = weight w_transposed
        %rows = aten.linear(%x, %w_again)
        %c: f32[4, 5] = weight c
        %z = aten.add.Tensor(%rows, %c)
        %both: f32[4, 5] = aten.add.Tensor(%y, %z)
        return %both
    """
    rewrites(Canonicalize(), before, expected, context(X))


def test_a_weight_on_the_left_stays_as_it_lies():
    before = """
        %x = input x
        %columns = aten.t(%x)
        %w: f32[5, 6] = weight w
        %y = aten.mm(%w, %columns)
        return %y
    """
    expected = """
        %x = input x
        %columns = aten.t(%x)
        %rows = aten.t(%columns)
        %w: f32[5, 6] = weight w
        %product: f32[4, 5] = aten.linear(%rows, %w)
        %y: f32[5, 4] = aten.t(%product)
        return %y
    """
    rewrites(Canonicalize(), before, expected, context(X))


def test_a_weight_that_others_read_gets_a_second_path():
    before = """
        %x = input x
        %w: f32[6, 6] = weight w
        %y = aten.mm(%x, %w)
        %row = aten.select.int(%w, 0, 0)
        %z = aten.mul.Tensor(%y, %row)
        return %z
    """
    expected = """
        %x = input x
        %turned: f32[6, 6] = weight w_transposed
        %y = aten.linear(%x, %turned)
        %w: f32[6, 6] = weight w
        %row = aten.select.int(%w, 0, 0)
        %z = aten.mul.Tensor(%y, %row)
        return %z
    """
    rewrites(Canonicalize(), before, expected, context(X))


def test_a_weight_computed_from_parameters_is_computed_once():
    before = """
        %x = input x
        %base: f32[5, 6] = weight q.base
        %down: f32[5, 2] = weight q.down
        %up: f32[2, 6] = weight q.up
        %adapter = aten.matmul(%down, %up)
        %w = aten.add.Tensor(%base, %adapter)
        %y = aten.linear(%x, %w)  # q
        return %y
    """
    expected = """
        %x = input x
        %w: f32[5, 6] = weight q.weight
        %y = aten.linear(%x, %w)  # q
        return %y
    """
    given = parse(before, kind="module")
    after = rewrites(Canonicalize(), given, expected, context(X)).program
    weights = dict(given.parameters())
    merged = weights["q.base"] + weights["q.down"] @ weights["q.up"]
    assert torch.equal(dict(after.parameters())["q.weight"], merged)


def test_experts_run_through_a_grouped_product_are_stacked():
    before = """
        %x = input x
        %ends = input ends
        %w: f32[3, 5, 6] = weight experts.w
        %turned = aten.transpose.int(%w, -2, -1)
        %y = transformers.grouped_mm_fallback(%x, %turned, %ends)
        return %y
    """
    expected = """
        %x = input x
        %ends = input ends
        %w: f32[3, 5, 6] = weight experts.w
        %y: f32[4, 5] = lbllm.grouped_linear(%x, %w, %ends)
        return %y
    """
    inputs = {**X, "ends": torch.tensor([1, 1, 4], dtype=torch.int32)}
    rewrites(Canonicalize(), before, expected, context(inputs))


def with_ranks(text):
    """A program whose weights have the values that capture leaves there; its products are for another device."""
    program = parse(text, kind="module")
    for node in program.graph.find_nodes(op="get_attr"):
        node.meta["val"] = get_attribute(program.module, node.target)
    return program


@pytest.mark.parametrize("extra", ["%bias", "bias=%bias", "out_dtype=torch.bfloat16"])
def test_a_grouped_product_of_another_form_stays(extra):
    text = f"""
        %x = input x
        %ends = input ends
        %w: f32[3, 6, 5] = weight experts.w
        %bias: f32[3, 5] = weight experts.bias
        %y = aten._grouped_mm(%x, %w, %ends, {extra})
        %half = aten.to.dtype(%y, torch.float32)
        %total = aten.sum(%bias)
        %z = aten.mul.Tensor(%half, %total)
        return %z
    """
    rewrites(Canonicalize(), with_ranks(text), text)


@pytest.mark.parametrize(
    "given", ["%x, %w, %ends", "%x, mat2=%w, offs=%ends", "self=%x, offs=%ends, mat2=%w, bias=None"]
)
def test_a_grouped_product_is_read_by_name(given):
    before = f"""
        %x = input x
        %ends = input ends
        %w: f32[3, 6, 5] = weight experts.w
        %y = aten._grouped_mm({given})
        return %y
    """
    expected = """
        %x = input x
        %ends = input ends
        %w: f32[3, 5, 6] = weight experts.w
        %y = lbllm.grouped_linear(%x, %w, %ends)
        return %y
    """
    rewrites(Canonicalize(), with_ranks(before), expected)


def test_a_batched_product_is_a_stack_of_experts():
    before = """
        %x = input x
        %w: f32[3, 6, 5] = weight w
        %y = aten.bmm(%x, %w)
        return %y
    """
    expected = """
        %x = input x
        %tokens = aten.sym_size.int(%x, 1)
        %rows: f32[12, 6] = aten.flatten.using_ints(%x, 0, 1)
        %count = aten.arange.start(1, 4)
        %ends: i64[3] = aten.mul.Tensor(%count, %tokens)
        %w: f32[3, 5, 6] = weight w
        %product: f32[12, 5] = lbllm.grouped_linear(%rows, %w, %ends)
        %y: f32[3, 4, 5] = aten.view(%product, [3, %tokens, 5])
        return %y
    """
    rewrites(Canonicalize(), before, expected, context({"x": normal(3, 4, 6)}))


STAYING = """
    %x = input x
    %turned = aten.t(%x)
    %square = aten.matmul(%x, %turned)
    %half = aten.to.dtype(%square, torch.bfloat16)
    %whole = aten.to.dtype(%half, torch.float32)
    %part = aten.slice.Tensor(%whole, 1, 1, 9223372036854775807)
    %more = aten.expand(%part, [2, -1, -1])
    return %more
"""


@pytest.mark.parametrize("item", [Canonicalize(), Cleanup()], ids=lambda item: item.name)
def test_products_of_values_and_what_changes_them_stay(item):
    rewrites(item, STAYING, STAYING, context(X))


NOTHING = """
    %x = input x
    %w: f32[6] = weight unused
    %same = aten.to.dtype(%x, torch.float32)
    %whole = aten.slice.Tensor(%same, 0, 0, 9223372036854775807)
    %checked = aten._assert_tensor_metadata(%whole)
    %dead = aten.mul.Tensor(%whole, %w)
    %kept = aten.dropout(%whole, 0.5, False)
    %alias = aten.alias(%kept)
    %shape = aten.expand(%alias, [-1, -1])
    %y = aten.mul.Tensor(%shape, %x)
    return %y
"""


@pytest.mark.parametrize("item", [Canonicalize(), Cleanup()], ids=lambda item: item.name)
def test_what_computes_nothing_goes_and_with_it_unused_weights(item):
    expected = """
        %x = input x
        %y: f32[4, 6] = aten.mul.Tensor(%x, %x)
        return %y
    """
    after = rewrites(item, NOTHING, expected, context(X)).program
    assert not dict(after.module.named_buffers())
