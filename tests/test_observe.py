"""The observer pass: Before and Expected graphs."""

from __future__ import annotations

import pytest
import torch
from lbllm_compile.passes.annotate import LAYER, LINEAR, LinearInfo
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.observe import STAT, Observe
from stages import annotated, apply, batches
from torch import fx, nn

_linear, _observe = torch.ops.aten.linear.default, torch.ops.lbllm.observe.default


def _program(roles: dict[str, str]) -> Program:
    """Two linears on one input and one on their sum, with the given roles."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    nodes = []

    def linear(name: str, source: fx.Node) -> fx.Node:
        root.add_module(name, nn.Linear(8, 8, bias=False))
        node = graph.call_function(_linear, (source, graph.get_attr(f"{name}.weight")))
        node.meta[LINEAR] = LinearInfo(name, f"{name}.weight", 0, roles[name], 0, "")
        node.meta[LAYER] = 0
        nodes.append(node)
        return node

    q, k = linear("q", x), linear("k", x)
    graph.output(linear("o", graph.call_function(torch.ops.aten.add.Tensor, (q, k))))
    return Program(fx.GraphModule(root.requires_grad_(False), graph), "module")


def _text(program: Program) -> list[str]:
    return [f"{n.name} = {getattr(n.target, '__name__', n.target)}{n.args}" for n in program.graph.nodes]


def test_linears_that_share_an_input_share_an_observer():
    before = _program({"q": "decoder", "k": "decoder", "o": "decoder"})
    after = Observe().apply(before, PassContext()).program
    assert _text(after) == [
        "x = x()",
        "q_weight = q.weight()",
        "observe_default = observe.default(x, 'q')",
        "linear_default = linear.default(observe_default, q_weight)",
        "k_weight = k.weight()",
        "linear_default_1 = linear.default(observe_default, k_weight)",
        "add_tensor = add.Tensor(linear_default, linear_default_1)",
        "o_weight = o.weight()",
        "observe_default_1 = observe.default(add_tensor, 'o')",
        "linear_default_2 = linear.default(observe_default_1, o_weight)",
        "output = output(linear_default_2,)",
    ]
    assert not any(n.target is _observe for n in before.graph.nodes)
    observers = [n for n in after.graph.nodes if n.target is _observe]
    assert [n.meta[LAYER] for n in observers] == [0, 0]
    x = {"x": torch.randn(2, 8)}
    assert torch.equal(before.run(x), after.run(x))


def test_what_stays_dense_is_not_observed():
    after = Observe("absmax").apply(_program({"q": "decoder", "k": "dense", "o": "head"}), PassContext()).program
    observer, *others = [n for n in after.graph.nodes if n.target is _observe]
    assert not others and [u.meta[LINEAR].path for u in observer.users] == ["q"]
    assert observer.meta[STAT] == "absmax"


def test_a_decoder_layer_has_four_observers():
    program = annotated()
    result = apply(program, "observe")
    assert [len(row["linears"]) for row in result.rows] == [3, 1, 2, 1] * 2
    batch = batches(1)[0]
    assert torch.equal(program.run(batch), result.program.run(batch))


def test_observing_twice_is_refused():
    program = _program({"q": "decoder", "k": "decoder", "o": "decoder"})
    with pytest.raises(PassError, match="observed already"):
        apply(program, "observe,observe")


def test_where_every_linear_is_kept_nothing_is_observed():
    program = _program({"q": "dense", "k": "dense", "o": "head"})
    assert apply(program, "observe").program is program
