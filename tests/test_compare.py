"""Rewrites are held, node by node, against what they replace."""

from __future__ import annotations

import operator

import pytest
import torch
from lbllm_compile.passes import cache, merge, pipeline
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.ir import compare
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import calls
from rtn import simulate
from test_zoo import inputs
from zoo import captured

_aten, _lbllm = torch.ops.aten, torch.ops.lbllm


def applied(program: Program, text: str) -> tuple[Program, dict[str, object]]:
    context, summary = PassContext(probe=inputs(2, 9)), {}
    for item in pipeline.parse(text):
        result = item.apply(program, context)
        program, summary = result.program, dict(result.summary)
    return program, summary


def simulated(name: str) -> Program:
    return simulate(applied(captured(name)[1], "canonicalize,annotate")[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_merged_linears_and_cached_attentions_are_what_they_replace(name: str) -> None:
    merged, figures = applied(simulated(name), "merge")
    assert figures["worst_linear_error"] < 1e-6
    _, figures = applied(merged, "cache")
    assert figures["worst_attention_error"] < 1e-5 and figures["attention_error_bound"] == cache.Cache.contract.each
    _, figures = applied(applied(merged, "lower")[0], "cache")
    assert figures["worst_attention_error"] < 1e-5


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounded_keys_and_values_are_within_their_bits(bits: int) -> None:
    program, _ = applied(captured("mistral")[1], "canonicalize,annotate{keep_dense=*}")
    _, figures = applied(program, f"cache{{bits={bits}}}")
    assert 0 < figures["worst_attention_error"] < {4: 0.5, 8: 0.02, 16: 2e-3}[bits]
    assert figures["worst_attention_error"] < figures["attention_error_bound"] == cache._KV_ROUNDING[bits]


def scaled(node: torch.fx.Node) -> torch.fx.Node:
    """Puts a thousandth more in the place of a node."""
    with node.graph.inserting_after(node):
        more = node.graph.call_function(_aten.mul.Tensor, (node, 1.001))
    node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
    return more


def test_what_the_bound_of_the_whole_lets_pass_is_found_in_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are off by a thousandth where they are merged, and an attention by its scale."""
    rows, attention = merge._merge, cache.replace_call

    def wrong_rows(program: Program, linears: list[torch.fx.Node]) -> dict[str, torch.fx.Node]:
        return {name: scaled(part) for name, part in rows(program, linears).items()}

    def wrong_scale(node: torch.fx.Node, target: object, arguments: tuple[object, ...]) -> torch.fx.Node:
        return attention(node, target, tuple(1.001 * a if isinstance(a, float) else a for a in arguments))

    context, program = PassContext(probe=inputs(2, 9)), simulated("llama")
    for text, name, wrong in (("merge", "_merge", wrong_rows), ("cache", "replace_call", wrong_scale)):
        module = {"merge": merge, "cache": cache}[text]
        (item,) = pipeline.parse(text)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, wrong)
            with pytest.raises(PassError, match=r"'\w+' \(aten\..* differs by [\d.e-]+ from what takes its place"):
                item.apply(program, context)
            patched.setattr(module, "check_replaced", lambda *_: 0.0)
            _, (record,) = pipeline.run(program, [item], context)
        assert 0 < record.error <= item.contract.bound


def test_rows_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = merge._merge

    def swapped(program: Program, linears: list[torch.fx.Node]) -> dict[str, torch.fx.Node]:
        replaced = plain(program, linears)
        first, second = list(replaced.values())[-2:]
        assert first.target is operator.getitem
        first.args, second.args = second.args, first.args
        return replaced

    monkeypatch.setattr(merge, "_merge", swapped)
    # gate and up have the same shape, so that nothing but their values tells
    with pytest.raises(PassError, match=r"'linear.*' \(aten\.linear.*\) differs by .* from what takes its place"):
        applied(simulated("llama"), "merge")


def test_what_is_compared_is_computed_from_the_values_before() -> None:
    """The second of two wrong replacements is judged by its own error alone."""
    before = applied(simulated("llama"), "cleanup")[0]
    after = before.copy()
    names = {}
    for node in [n for n in calls(after.graph, _aten.silu.default)]:
        with after.graph.inserting_after(node):
            scaled = after.graph.call_function(_aten.mul.Tensor, (node, 1.5))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
        names[node.name] = scaled
    after.module.recompile()
    found = compare.errors(before, after, names, inputs(2, 9))
    assert list(found) == list(names) and len(found) == 2
    assert all(error == pytest.approx(0.5) for error in found.values())
    assert compare.errors(before, after, names, {}) == {}
