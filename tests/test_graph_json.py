"""Graphs as JSON: nothing is lost on the way, and nothing that is not a plain graph is read."""

from __future__ import annotations

import copy
import json
import operator

import pytest
import torch
from graphs import context, normal, program, token_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import operators
from lbllm_compile.codegen.operators import stored
from lbllm_compile.passes.annotate import LINEAR
from lbllm_compile.passes.contracts import describe
from lbllm_compile.passes.head import Head
from lbllm_compile.passes.ir import dump, graph_json
from lbllm_compile.passes.ir.graph_json import GraphFormatError
from lbllm_compile.passes.ir.program import STATE, Program
from lbllm_compile.passes.lower import IN_FEATURES, Lower
from rtn import simulate
from test_cache import attention, cached

aten = torch.ops.aten


def lowered():
    def forward(root, input_ids):
        x = aten.embedding.default(root.embed.weight, input_ids)
        return aten.linear.default(aten.linear.default(x, root.a.weight), root.head.weight)

    weights = {
        "embed.weight": normal(11, 40),
        "a.weight": normal(36, 40, seed=1),
        "head.weight": normal(11, 36, seed=2),
    }
    item = simulate(program(weights, forward))
    for step in (Head(), Lower()):
        item = step.apply(item, context()).program
    return item


def again(item: Program) -> Program:
    return item.with_module(graph_json.loads(graph_json.dumps(item.module), dict(item.parameters())))


@pytest.mark.parametrize("make", [lowered, lambda: cached(attention(layers=2))], ids=["lowered", "cached"])
def test_a_round_trip_gives_the_same_graph_and_outputs(make):
    before = make()
    after = again(before)
    assert dump.render(after) == dump.render(before)
    assert graph_json.dumps(after.module) == graph_json.dumps(before.module)
    for old, new in zip(before.graph.nodes, after.graph.nodes, strict=True):
        assert (old.name, old.op, old.target, str(old.args)) == (new.name, new.op, new.target, str(new.args))
        assert {k: old.meta.get(k) for k in (LINEAR, IN_FEATURES, STATE)} == {
            k: new.meta.get(k) for k in (LINEAR, IN_FEATURES, STATE)
        }
    inputs = token_inputs()
    assert torch.equal(after.run(inputs), before.run(inputs))


def test_provenance_and_symbolic_sizes_survive():
    before = lowered()
    node = next(n for n in before.graph.nodes if n.op == "call_function")
    node.meta["nn_module_stack"] = {"": ("model.embed", "Embedding")}
    node.meta["stack_trace"] = '  File "/home/someone/site-packages/transformers/models/llama.py", line 7, in forward'
    node.meta["shape"] = "f32[B, S, 40]"
    text = graph_json.dumps(before.module)
    assert "/home/someone" not in text, "paths of the compiling machine do not belong into an artifact"
    after = again(before)
    for item in (before, after, again(after)):
        new = next(n for n in item.graph.nodes if n.name == node.name)
        assert dump.module_path(new) == "model.embed"
        assert dump.source_line(new) == "transformers/models/llama.py:7"
        assert "from transformers/models/llama.py:7)" in describe(new)
    assert new.meta["shape"] == "f32[B, S, 40]"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([torch.float16, torch.int8, torch.device("cpu"), torch.strided, torch.contiguous_format]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.builds(slice, inner, inner, st.none()),
    max_leaves=6,
)


@given(VALUES)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=80)
def test_every_argument_value_survives(value):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.getitem, (x, value)))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    text = graph_json.dumps(module)
    try:
        after = graph_json.loads(text, {})
    except GraphFormatError as error:
        assert "nested too deep" in str(error)
        return
    assert graph_json.dumps(after) == text
    (node,) = [n for n in after.graph.nodes if n.op == "call_function"]
    assert repr(node.args[1]) == repr(next(n for n in graph.nodes if n.op == "call_function").args[1])


def document():
    """``output(relu(x) + weight)`` as a document."""
    return {
        "format": "lbllm-graph",
        "version": 1,
        "nodes": [
            {"name": "x", "op": "placeholder", "target": "x"},
            {"name": "w", "op": "get_attr", "target": "layer.weight"},
            {"name": "relu", "op": "call_function", "target": "aten.relu.default", "args": [{"node": "x"}]},
            {
                "name": "add",
                "op": "call_function",
                "target": "aten.add.Tensor",
                "args": [{"node": "relu"}, {"node": "w"}],
                "kwargs": {"alpha": 1},
            },
            {"name": "output", "op": "output", "target": "output", "args": [{"node": "add"}]},
        ],
    }


STATE_DICT = {"layer.weight": torch.ones(3)}


def test_the_document_of_these_tests_is_read():
    module = graph_json.decode(document(), STATE_DICT)
    assert module(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [1.0, 1.0, 3.0]


def change(path: str, value: object):
    """Sets one place of the document, e.g. ``nodes.2.target``."""

    def apply(item):
        *parents, leaf = path.split(".")
        for part in parents:
            item = item[int(part)] if isinstance(item, list) else item[part]
        item[int(leaf) if isinstance(item, list) else leaf] = value

    return apply


REFUSED = [
    ("nodes.2.target", "aten.from_file.default", "outside the operators"),
    ("nodes.2.target", "aten.set_.source_Tensor", "outside the operators"),
    ("nodes.2.target", "aten.add.out", "outside the operators"),
    ("nodes.2.target", "aten.relu.nothing", "outside the operators"),
    ("nodes.2.target", "prim.Print.default", "outside the operators"),
    ("nodes.2.target", "os.system", "outside the operators"),
    ("nodes.2.target", "builtins.eval", "outside the operators"),
    ("nodes.2.target", ["aten.relu.default"], "outside the operators"),
    ("nodes.2.op", "call_module", "none of placeholder"),
    ("nodes.2.op", "call_method", "none of placeholder"),
    ("nodes.2.name", "relu; import os", "not a free identifier"),
    ("nodes.2.name", "lambda", "not a free identifier"),
    ("nodes.2.name", "x", "not a free identifier"),
    ("nodes.2.name", "x" * 5000, "not a short text"),
    ("nodes.0.target", "x=__import__('os')", "not an identifier"),
    ("nodes.0.target", "class", "not an identifier"),
    ("nodes.0.args", [1], "arguments where none belong"),
    ("nodes.1.target", "layer.weight.__class__", "cannot be the path"),
    ("nodes.1.target", "forward", "cannot be the path"),
    ("nodes.1.target", "_modules.layer", "cannot be the path"),
    ("nodes.1.target", "layer.weight) or exit(", "cannot be the path"),
    ("nodes.1.target", "layer.bias", "not stored"),
    ("nodes.2.args", [{"node": "relu"}], "not a node before it"),
    ("nodes.2.args", [{"node": "add"}], "not a node before it"),
    ("nodes.2.args", [{"node": {"node": "x"}}], "not a node before it"),
    ("nodes.2.args", [{"node": "x"}, 1, 2], "does not take"),
    ("nodes.2.args", {"node": "x"}, "malformed arguments"),
    ("nodes.2.args", [1 << 63], "not an integer from"),
    ("nodes.2.args", ["y" * 2000], "not a short text"),
    ("nodes.2.args", [[[[[[[[[[1]]]]]]]]]], "nested too deep"),
    ("nodes.2.args", [{"code": "1+1"}], "unknown kind"),
    ("nodes.2.args", [{"dtype": "float128"}], "none of"),
    ("nodes.2.args", [{"device": "cuda:0; x"}], "none of"),
    ("nodes.2.args", [{"slice": [1]}], "malformed slice"),
    ("nodes.3.kwargs", {"beta": 1}, "does not take"),
    ("nodes.3.kwargs", {"alpha=1)#": 1}, "malformed arguments"),
    ("nodes.3.kwargs", [1], "not an object"),
    ("nodes.3.kwargs", 3, "not an object"),
    ("nodes.2.meta", {"python": "x"}, "unknown field 'python'"),
    ("nodes.2.meta", {"layer": -1}, "not an integer from"),
    ("nodes.2.meta", {"source": 'x", line 1\nimport os'}, "malformed source"),
    ("nodes.2.meta", {"linear": {"path": "a"}}, "has no field"),
    ("nodes.2.meta", {"state": {"heads": 1 << 40, "tail": [], "dtype": "int8"}}, "not an integer from"),
    ("nodes.2.meta", {"in_features": 0}, "not an integer from"),
    ("nodes.2.hook", 1, "unknown field 'hook'"),
    ("nodes.2", "relu", "is not an object"),
    ("nodes.4.op", "call_function", "outside the operators"),
    ("nodes.4.args", [], "must return one value"),
    ("nodes", [], "must be a list of nodes"),
    ("nodes", {"0": {}}, "must be a list of nodes"),
    ("format", "onnx", "not a graph of this project"),
    ("version", 2, "version 2, this build reads version 1"),
    ("extra", 1, "unknown field 'extra'"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_is_not_a_plain_graph_is_refused(path, value, message):
    item = copy.deepcopy(document())
    change(path, value)(item)
    with pytest.raises(GraphFormatError, match=message):
        graph_json.loads(json.dumps(item), STATE_DICT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": NaN}', "not JSON"),
        ('{"version": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "not an object"),
        ("{}", "no field 'format'"),
        (" " * (graph_json.MAX_BYTES + 1), "more than"),
    ],
)
def test_what_is_not_a_document_is_refused(text, message):
    with pytest.raises(GraphFormatError, match=message):
        graph_json.loads(text, {})


def test_weights_in_each_others_way_are_refused():
    item = document()
    item["nodes"].insert(2, {"name": "v", "op": "get_attr", "target": "layer.weight.inner"})
    with pytest.raises(GraphFormatError, match="cannot both have their paths"):
        graph_json.decode(item, {**STATE_DICT, "layer.weight.inner": torch.ones(1)})


def test_code_behind_the_output_is_refused():
    item = document()
    item["nodes"].append(
        {"name": "late", "op": "call_function", "target": "aten.relu.default", "args": [{"node": "x"}]}
    )
    with pytest.raises(GraphFormatError, match="one output, as its last node"):
        graph_json.decode(item, STATE_DICT)


def test_a_function_that_cannot_be_named_is_not_stored():
    graph = torch.fx.Graph()
    graph.output(graph.call_function(print, (graph.placeholder("x"),)))
    with pytest.raises(GraphFormatError, match="calls 'print' cannot be stored"):
        graph_json.dumps(torch.fx.GraphModule(torch.nn.Module(), graph))


def test_a_graph_that_cannot_be_stored_is_found_before_it_is():
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.from_file.default, ("weights",)))
    with pytest.raises(GraphFormatError, match=r"'from_file_default' calls aten.from_file, which is outside"):
        graph_json.check_storable(graph)


def test_every_registered_operator_may_be_stored():
    names = [name for o in operators.operators() if (name := stored.name_of(o.target)) is not None]
    assert len(names) > 200
    assert [name for name in names if stored.resolve(name) is None] == []


def test_every_allowed_operator_exists():
    missing = [n for n in stored._ATEN if not hasattr(torch.ops.aten, n)]
    assert not missing
