"""The observer pass: Before and Expected graphs."""

from __future__ import annotations

import pytest
import torch
from graphs import context, normal, rewrites
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.observe import Observe
from stages import annotated, apply, batches

SHARED = """
    decoder layer 0:
    %x = input x
    %q_weight: f32[8, 8] = weight q.weight
    %q = aten.linear(%x, %q_weight) {path="q", role="decoder"}
    %k_weight: f32[8, 8] = weight k.weight
    %k = aten.linear(%x, %k_weight) {path="k", role="decoder"}
    %total = aten.add.Tensor(%q, %k)
    %o_weight: f32[8, 8] = weight o.weight
    %o = aten.linear(%total, %o_weight) {path="o", role="decoder"}
    return %o
"""
"""Two linears on one input and one on their sum."""

KEPT = SHARED.replace('path="k", role="decoder"', 'path="k", role="dense"').replace(
    'path="o", role="decoder"', 'path="o", role="head"'
)


def test_linears_that_share_an_input_share_an_observer():
    expected = """
        decoder layer 0:
        %x = input x
        %x_seen = lbllm.observe(%x, "q") {stat="hessian"}
        %q_weight: f32[8, 8] = weight q.weight
        %q = aten.linear(%x_seen, %q_weight) {path="q", role="decoder"}
        %k_weight: f32[8, 8] = weight k.weight
        %k = aten.linear(%x_seen, %k_weight) {path="k", role="decoder"}
        %total = aten.add.Tensor(%q, %k)
        %sum_seen = lbllm.observe(%total, "o") {stat="hessian"}
        %o_weight: f32[8, 8] = weight o.weight
        %o = aten.linear(%sum_seen, %o_weight) {path="o", role="decoder"}
        return %o
    """
    rewrites(Observe(), SHARED, expected, context({"x": normal(2, 8)}))


def test_what_stays_dense_is_not_observed():
    expected = """
        decoder layer 0:
        %x = input x
        %x_seen = lbllm.observe(%x, "q") {stat="absmax"}
        %q_weight: f32[8, 8] = weight q.weight
        %q = aten.linear(%x_seen, %q_weight) {path="q", role="decoder"}
        %k_weight: f32[8, 8] = weight k.weight
        %k = aten.linear(%x, %k_weight) {path="k", role="dense"}
        %total = aten.add.Tensor(%q, %k)
        %o_weight: f32[8, 8] = weight o.weight
        %o = aten.linear(%total, %o_weight) {path="o", role="head"}
        return %o
    """
    rewrites(Observe("absmax"), KEPT, expected, context({"x": normal(2, 8)}))


def test_a_decoder_layer_has_four_observers():
    program = annotated()
    result = apply(program, "observe")
    assert [len(row["linears"]) for row in result.rows] == [3, 1, 2, 1] * 2
    batch = batches(1)[0]
    assert torch.equal(program.run(batch), result.program.run(batch))


def test_observing_twice_is_refused():
    program = parse(SHARED, kind="module")
    with pytest.raises(PassError, match="observed already"):
        apply(program, "observe,observe")


def test_where_every_linear_is_kept_nothing_is_observed():
    program = parse(KEPT.replace('decoder"', 'dense"'), kind="module")
    assert apply(program, "observe").program is program
