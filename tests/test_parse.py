"""Dumps are read back: the same text, the same graph; and text that is no dump is one sentence with its line."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LAYER, LINEAR, LinearInfo
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.parse import ParseError, parse
from lbllm_compile.passes.ir.program import IN_FEATURES, STAT, STATE, StateSpec
from lbllm_compile.passes.ir.scheme import Scheme
from rtn import simulate
from test_zoo import inputs
from zoo import captured

META = (LAYER, LINEAR, STATE, IN_FEATURES, STAT, "shape")

PROGRAM = """
    # a small one
    decoder layer 0:
    %x: f32[2, 40] = input x
    %q_weight: f32[8, 40] = weight q.weight
    %q: f32[2, 8] = aten.linear(%x, %q_weight) {path="q", role="decoder", reason="it is", scheme="group=32"}  # m.q
    %split = aten.split_with_sizes(%q, [4, 4], -1)
    %left = getitem(%split, 0)

    outside the decoder layers:
    %total = aten.add.Tensor(%left, 1e-05, alpha=2)  # one word is a module, several are not
    return %total
"""


def test_a_program_is_what_its_text_says():
    program = parse(PROGRAM, kind="module")
    nodes = {n.name: n for n in program.graph.nodes}
    assert nodes["q"].target is torch.ops.aten.linear.default
    assert nodes["q"].meta[LINEAR] == LinearInfo("q", "q.weight", 0, "decoder", 0, "it is", Scheme(group=32))
    assert dump.module_path(nodes["q"]) == "m.q" and dump.module_path(nodes["total"]) == ""
    assert nodes["total"].kwargs == {"alpha": 2} and nodes["total"].args[1] == 1e-05
    assert nodes["left"].meta[LAYER] == 0 and nodes["total"].meta[LAYER] is None
    x, weight = normal(2, 40), dict(program.parameters())["q.weight"]
    assert torch.equal(program.run({"x": x}), (x @ weight.T)[:, :4] + 2e-05)


def test_weights_are_those_given_and_else_the_same_every_time():
    first, second = (dict(parse(PROGRAM).parameters())["q.weight"] for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0.5
    given_weight = torch.zeros(8, 40)
    assert dict(parse(PROGRAM, {"q.weight": given_weight}).parameters())["q.weight"].abs().max() == 0
    with pytest.raises(ParseError, match=r"line 5 .*'q\.weight' is f16\[8, 40\], not f32\[8, 40\]"):
        parse(PROGRAM, {"q.weight": given_weight.half()})


@pytest.mark.parametrize("dtype", dump._DTYPES)
def test_weights_of_every_dtype_are_made(dtype):
    text = f"%w: {dump.shape_text(torch.empty(3, 0, 2, dtype=dtype))} = weight w\nreturn %w"
    (made,) = (value for _, value in parse(text).parameters())
    assert made.dtype == dtype and made.shape == (3, 0, 2)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_graph_after_every_pass_round_trips(name):
    program = pipeline_start = captured(name)[1]
    for text in ("canonicalize", "annotate", "observe", "", "head", "merge", "lower", "cache", "cleanup"):
        if text:
            (item,) = pipeline.parse(text)
            after = item.apply(program, PassContext(probe=inputs(2, 9))).program
        else:
            after = simulate(pipeline_start)
        if text == "annotate":
            pipeline_start = after
        program = after
        before = dump.render(program, text)
        again = parse(before, dict(program.parameters()), program.kind)
        assert dump.render(again, text) == before
        assert dump.render(parse(before), text) == before, "made weights have the dtypes and shapes that are shown"
        old = {n.name: n for n in program.graph.nodes if n.users or n.op == "output"}
        for node in (n for n in again.graph.nodes if n.name in old and n.op != "get_attr"):
            same = old[node.name]
            assert (node.op, node.target, str(node.args), str(node.kwargs)) == (
                same.op,
                same.target,
                str(same.args),
                str(same.kwargs),
            )
            assert [node.meta.get(k) for k in META] == [same.meta.get(k) for k in META]
    assert torch.equal(again.run(inputs(2, 9)), program.run(inputs(2, 9)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([torch.float16, torch.int8, torch.device("cuda:0"), torch.strided, torch.contiguous_format]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.builds(slice, inner, inner, st.none())
    ),
    max_leaves=6,
)


@given(
    st.lists(VALUES, max_size=4),
    st.none() | st.integers(0, 99),
    st.none() | st.builds(StateSpec, st.integers(1, 9), st.tuples(st.integers(0, 9)), st.just(torch.uint8)),
    st.none() | st.builds(LinearInfo, st.text(), st.text(), st.none() | st.integers(0, 9), st.just("head"),
                          st.integers(0, 3), st.text(), st.sampled_from([Scheme(), Scheme(32), Scheme(dense=True)])),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_any_small_graph_round_trips(values, layer, state, info):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    if state:
        x.meta[STATE] = state
    node = x
    for value in values:
        node = graph.call_function(torch.ops.aten.add.Tensor, (node, value), {"alpha": value})
        node.meta[LAYER] = layer
    if info:
        node.meta[LINEAR] = info
    graph.output((node, [x]))
    if info and node is x:
        return
    program = parse("%x = input x\nreturn %x").with_module(torch.fx.GraphModule(torch.nn.Module(), graph))
    text = dump.render(program)
    again = parse(text)
    assert dump.render(again) == text
    for old, new in zip(program.graph.nodes, again.graph.nodes, strict=True):
        assert repr((old.args, old.kwargs)) == repr((new.args, new.kwargs))
        assert [old.meta.get(k) for k in META] == [new.meta.get(k) for k in META]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%y aten.relu(%x)", "expected '%name = operator"),
        ("%x = input y", "there is a node '%x' already"),
        ("%y = aten.rleu(%x)", "there is no operator 'aten.rleu'"),
        ("%y = os.system(%x)", "there is no operator 'os.system'"),
        ("%y = aten.add.Tenser(%x, 1)", "there is no operator 'aten.add.Tenser'"),
        ("%y = aten.relu(%z)", "no node '%z' stands before"),
        ("%y = aten.relu(%x", r"expected ',' or '\)' at column 18, not the end"),
        ("%y = aten.relu(%x) 4", "expected the end of the line at column 19, not '4'"),
        ("%y = aten.relu(%x, 1)", "arguments that aten.relu.default does not take"),
        ("%y = aten.relu()", "lacks the argument 'self'"),
        ("%y = aten.relu(self=%x, self=%x)", "'self' is given twice"),
        ("%y = aten.add.Tensor(%x, torch.nn)", "expected a value at column"),
        ('%y = aten.add.Tensor(%x, "\\q")', "quoted as in JSON"),
        ('%y = aten.add.Tensor(%x, device("moon"))', "is no device"),
        ('%y = aten.relu(%x) {colour="red"}', "nothing in braces is named 'colour'"),
        ('%y = aten.relu(%x) {path="red"}', "'role' is missing"),
        ('%y = aten.relu(%x) {path=3, role="head"}', "'path' cannot be 3"),
        ('%y = aten.relu(%x) {path="a", role="head", scheme="group=7"}', "group cannot be 7"),
        ("%y = aten.relu(%x) {3}", "everything in braces has a name"),
        ("%y = state y", "a state, and nothing else, has"),
        ("%w = weight w", "needs dtype and shape"),
        ("%w: f32[B] = weight w", "needs dtype and shape"),
        ("%w: f32[2] = weight a.b", "cannot both have their paths"),
        ("%w: f32[2] = weight training", "cannot be the path of a weight"),
        ("%class = aten.relu(%x)", "cannot be named '%class'"),
        ("return", "expected '%name = operator"),
        ("return %x %x", "expected the end of the line"),
    ],
)
def test_a_malformed_line_is_one_sentence_with_its_number(line, message):
    with pytest.raises(ParseError, match=message) as caught:
        parse(f"%x = input x\n\n%a: f32[2] = weight a\n{line}\nreturn %x")
    assert str(caught.value).startswith("line 4 of the program: ") and "\n" not in str(caught.value)


def test_a_program_ends_with_its_return():
    with pytest.raises(ParseError, match="no line 'return"):
        parse("%x = input x")
    with pytest.raises(ParseError, match=r"line 3 .*nothing may stand behind 'return'"):
        parse("%x = input x\nreturn %x\n%y = aten.relu(%x)")


def test_numbers_are_written_in_full():
    (node,) = (n for n in parse(f"%x = input x\n%y = aten.mul.Tensor(%x, {math.pi!r})\nreturn %y").graph.nodes if n.args
               and n.op == "call_function")  # fmt: skip
    assert node.args[1] == math.pi and repr(math.pi) in dump.node_text(node)


def test_a_line_that_ends_with_a_comma_or_an_opening_bracket_goes_on():
    whole = parse(PROGRAM)
    cut = PROGRAM.replace("(%x, ", "(%x,\n        ").replace('", reason', '",\n\treason')
    cut = cut.replace("sizes(%q, [4, ", "sizes(\n%q, [\n4,\n")
    assert len(cut.splitlines()) == len(PROGRAM.splitlines()) + 5
    assert dump.render(parse(cut)) == dump.render(whole)
    remark = parse("%x = input x  # a, b,\n# c,\n%y = aten.relu(%x)\nreturn %y")
    assert [n.name for n in remark.graph.nodes] == ["x", "y", "output"]
    with pytest.raises(ParseError, match=r"line 2 .*no node '%z'"):
        parse("%x = input x\n%y = aten.add.Tensor(%x,\n%z)\nreturn %y")
    with pytest.raises(ParseError, match="no line 'return"):
        parse("%x = input x\nreturn %x,")
