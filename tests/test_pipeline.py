"""Pipeline text, typed options, contracts."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.passes import pipeline, registry
from lbllm_compile.passes.base import CALIBRATING, EXACT, Contract, Pass, PassContext, PassResult, bounded
from lbllm_compile.passes.contracts import ContractError
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program, get_attribute


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies every linear's output: harmless at 1, a broken promise elsewhere."""

    name: ClassVar[str] = "scale"
    contract: ClassVar[Contract] = bounded(1e-3)
    factor: float = 1.0
    where: tuple[str, ...] = ()
    note: str = ""
    on: bool = True
    times: int = 1

    def apply(self, program, context):
        after = program.copy()
        for node in list(after.graph.nodes):
            if node.target is torch.ops.aten.linear.default:
                with after.graph.inserting_after(node):
                    scaled = after.graph.call_function(torch.ops.aten.mul.Tensor, (node, self.factor))
                node.replace_all_uses_with(scaled, delete_user_cb=lambda user, new=scaled: user is not new)
        return PassResult(after, summary={"factor": self.factor})


@dataclass(frozen=True)
class Malformed(Pass):
    name: ClassVar[str] = "malformed"

    def apply(self, program, context):
        after = program.copy()
        for node in after.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                weight = node.args[1]
                with after.graph.inserting_before(node):
                    node.args = (node.args[0], after.graph.call_function(torch.ops.aten.t.default, (weight,)))
        return PassResult(after)


@dataclass(frozen=True)
class Impossible(Pass):
    """Quantizes the output to a width that does not exist, which its operator's shapes do not depend on."""

    name: ClassVar[str] = "impossible"
    contract: ClassVar[Contract] = CALIBRATING

    def apply(self, program, context):
        after = program.copy()
        (output,) = (n for n in after.graph.nodes if n.op == "output")
        with after.graph.inserting_before(output):
            call = after.graph.call_function(torch.ops.lbllm.fake_quantize_kv.default, (output.args[0][0], 5))
        output.args = (call,)
        return PassResult(after)


class Entry(EntryPoint):
    def load(self):
        return {"scale": Scale, "malformed": Malformed, "broken": None}[self.name]


@pytest.fixture(autouse=True)
def third_party(monkeypatch):
    points = [Entry(n, f"test:{n}", registry.ENTRY_POINT_GROUP) for n in ("scale", "malformed", "broken")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.fixture
def program():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(6, 5)
            self.second = torch.nn.Linear(5, 4)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    with torch.no_grad():
        module = torch.export.export(Two(), (torch.ones(2, 6),)).module(check_guards=False)
    return Program(module, kind="module")


PROBE = {"x": torch.linspace(-1, 1, 12).reshape(2, 6)}


def test_text_round_trips():
    text = 'scale{factor=0.5,where=a.*|b,note="a, {b} = \\"c\\"",on=false,times=3},scale'
    passes = pipeline.parse(text)
    assert passes == [Scale(0.5, ("a.*", "b"), 'a, {b} = "c"', False, 3), Scale()]
    assert pipeline.render(passes) == text
    assert pipeline.parse(pipeline.render(passes, full=True)) == passes


words = st.text(st.characters(codec="utf-8", exclude_characters="|"), max_size=12)


@given(
    st.floats(allow_nan=False),
    st.lists(words.filter(bool), max_size=3),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.booleans(),
    st.integers(-(10**12), 10**12),
)
def test_any_options_round_trip(factor, where, note, on, times):
    passes = [Scale(factor, tuple(where), note, on, times)]
    assert pipeline.parse(pipeline.render(passes)) == passes
    assert pipeline.parse(pipeline.render(passes, full=True)) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scael", "no pass 'scael'.*did you mean 'scale'"),
        ("scale{fcator=1}", "no option 'fcator'.*did you mean 'factor'"),
        ("scale{factor=lots}", "option 'factor' of the pass 'scale' cannot be 'lots'"),
        ("scale{times=1.5}", "option 'times'"),
        ("scale{factor=1", "expected ',' or '}' at column 15"),
        ("scale{factor}", "expected an option as key=value"),
        ("scale scale", "expected ',' between passes"),
        ("scale,", "expected a pass name"),
        ("", "expected a pass name"),
        ("scale{on=true,on=false}", "given twice"),
        (r'scale{note="a\.b"}', "expected a string quoted as in JSON, with each backslash written twice, at column 14"),
        ('scale{on=true,note="a\tb"}', "expected a string quoted as in JSON"),
        ("broken", "is not a Pass named 'broken'"),
    ],
)
def test_mistakes_are_one_clear_sentence(text, message):
    with pytest.raises((pipeline.PipelineError, registry.PassNameError), match=message) as caught:
        pipeline.parse(text)
    assert "\n" not in str(caught.value)


def test_a_kept_promise_is_measured(program):
    seen = []
    after, records = pipeline.run(
        program,
        pipeline.parse("scale{factor=1.0001}"),
        PassContext(probe=PROBE),
        lambda record, old, new: seen.append((record.name, old is program, len(new.graph.nodes))),
    )
    (record,) = records
    assert 0 < record.error < 1e-3 and record.contract == "bounded(0.001)"
    assert record.nodes_after == record.nodes_before + 2 == len(after.graph.nodes)
    assert record.summary == {"factor": 1.0001}
    assert seen == [("scale", True, record.nodes_after)]


def test_a_broken_promise_names_pass_node_and_source(program):
    with pytest.raises(ContractError) as caught:
        pipeline.run(program, pipeline.parse("scale{factor=2}"), PassContext(probe=PROBE))
    message = str(caught.value)
    assert "'scale' promised bounded(0.001)" in message and "aten.relu" in message
    assert "test_pipeline.py:" in message
    assert any(line.startswith("> %relu") for line in caught.value.excerpt.splitlines())


def test_an_exact_pass_may_change_no_bit(program, monkeypatch):
    monkeypatch.setattr(Scale, "contract", EXACT)
    pipeline.run(program, [Scale(1.0)], PassContext(probe=PROBE))
    with pytest.raises(ContractError, match="promised exact"):
        pipeline.run(program, [Scale(1.0000001)], PassContext(probe=PROBE))


def test_a_calibrating_pass_may_change_but_not_break(program, monkeypatch):
    monkeypatch.setattr(Scale, "contract", CALIBRATING)
    _, (record,) = pipeline.run(program, [Scale(2.0)], PassContext(probe=PROBE))
    assert record.error > 0.1
    with pytest.raises(ContractError, match="not finite"):
        pipeline.run(program, [Scale(float("nan"))], PassContext(probe=PROBE))


def test_shapes_that_do_not_propagate_name_the_node(program):
    with pytest.raises(ContractError, match="after the pass 'malformed' shapes do not propagate at 'linear'"):
        pipeline.run(program, [Malformed()], PassContext(probe=PROBE))


def test_arguments_that_an_operator_does_not_take_name_the_node(program):
    with pytest.raises(
        ContractError, match=r"after the pass 'impossible' 'fake_quantize_kv_default' .*5 bits are not one of"
    ):
        pipeline.run(program, [Impossible()], PassContext(probe=PROBE))


def test_a_copy_shares_weights_and_nothing_else(program):
    copy, before = program.copy(), program.run(PROBE)[0]
    target = next(n.target for n in program.graph.nodes if n.op == "get_attr")
    assert get_attribute(copy.module, target).data_ptr() == get_attribute(program.module, target).data_ptr()
    for node in list(copy.graph.nodes):
        if node.target is torch.ops.aten.relu.default:
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
    copy.module.recompile()
    assert any(n.target is torch.ops.aten.relu.default for n in program.graph.nodes)
    assert torch.equal(program.run(PROBE)[0], before) and not torch.equal(copy.run(PROBE)[0], before)


def test_dump_reads_top_to_bottom(program):
    pipeline.run(program, [Scale()], PassContext(probe=PROBE))
    text = dump.render(program, "captured")
    assert text.startswith("# captured\n")
    assert "%x = input x" in text or "%x: f32[2, 6] = input x" in text
    assert text.index("weight first.weight") < text.index("aten.linear(%x, %first_weight, %first_bias)  # first")
    assert text.rstrip().splitlines()[-1].startswith("return ")
