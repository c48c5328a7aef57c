"""An operator from outside the package: in a graph, in a file, in the executor, in a native program."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from graphs import context, program, token_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import installed, operators
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.operators import Arguments, Operator, define, registry
from lbllm_compile.codegen.operators.checks import require, require_tensor
from lbllm_compile.codegen.operators.registry import OperatorError
from lbllm_compile.codegen.operators.translator import Translator, Value
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes.annotate import Annotate
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.contracts import ContractError, check_structure
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.graph_json import GraphFormatError
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import calls, make_call
from lbllm_compile.passes.lower import Lower
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from test_operators import Graph, Input, case, run_natively
from test_runtime import VOCABULARY, language_model
from test_zoo import agree
from torch import Tensor

from lbllm_compile import artifact
from lbllm_compile.artifact import ArtifactError
from lbllm_compile.lowering.build import build_native
from lbllm_compile.lowering.executor import Executor, requirements
from lbllm_compile.native import program as native


def _soft_clip(x: Tensor, bound: float = 1.0) -> Tensor:
    return x / (1.0 + x.abs() / bound)


def _verify(a: Arguments) -> None:
    require_tensor(a, "x", torch.float32)
    require(a.bound > 0, a, f"values cannot be bounded by {a.bound}")


def _translate(t: Translator, a: Arguments) -> Value:
    x, op = a.x, t.op
    share = op.divide(op.abs(x), t.constant(a.bound, "float32"))
    return t.emit(op.divide(x, op.add(share, t.constant(1.0, "float32"))))


SOFT_CLIP = define(
    "soft_clip(Tensor x, float bound=1.0) -> Tensor",
    reference=_soft_clip,
    shape=lambda x, bound=1.0: torch.empty_like(x),
    verify=_verify,
    translate=_translate,
)
"""``x / (1 + |x| / bound)``, whose magnitude is below ``bound``. Once a process: registries are for all of it."""

SOFT_ROUND = define(
    "soft_round(Tensor x) -> Tensor",
    reference=lambda x: x.round() / 2 + x / 2,
    shape=torch.empty_like,
    simulates=True,
)
FAST_SQUARE = define("fast_square(Tensor x) -> Tensor", reference=torch.square, shape=torch.empty_like, kernel=True)
"""Operators whose roles in a compile are known from when they are defined on."""

BOUND = 1.7


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))


def clipped(bound: Any = BOUND) -> Program:
    """The language model with the operator in front of its output head."""
    return with_operator(SOFT_CLIP, bound)


def with_operator(new_operator: Operator, *options: Any) -> Program:
    """The language model with an operator in front of its output head."""
    item = language_model().copy()
    (head,) = calls(item.graph, torch.ops.lbllm.int8_linear.default)
    quantizer = Arguments(Arguments(head).values).value
    hidden = Arguments(quantizer).x
    with item.graph.inserting_before(quantizer):
        new = make_call(item.graph, new_operator.target, (hidden, *options), quantizer)
    quantizer.replace_input_with(hidden, new)
    item.module.recompile()
    return item


def test_it_is_known_by_its_name():
    assert operators.find(torch.ops.lbllm.soft_clip.default) is SOFT_CLIP
    assert registry.named("lbllm.soft_clip.default") is SOFT_CLIP
    assert torch.equal(torch.ops.lbllm.soft_clip(torch.tensor([-3.0, 0.0, 1.0])), torch.tensor([-0.75, 0.0, 0.5]))
    with pytest.raises(ValueError, match=r"lbllm\.soft_clip\.default is registered already"):
        registry.register(SOFT_CLIP)


def test_one_that_simulates_is_not_left_in_a_lowered_graph():
    with pytest.raises(KernelError, match=r"lbllm\.soft_round.*is simulated quantization; only lowered graphs run"):
        Executor(with_operator(SOFT_ROUND), ReferenceKernels())
    simulated = program(
        {"w": torch.ones(11, 8)}, lambda root, x: SOFT_ROUND.target(torch.ops.aten.embedding(root.w, x))
    )
    with pytest.raises(PassError, match=r"lbllm\.soft_round.*has no integer form"):
        Lower().apply(simulated, context({"x": torch.ones(1, 3, dtype=torch.int64)}))


def test_one_that_must_run_as_a_kernel_never_runs_as_its_reference():
    with pytest.raises(KernelError, match=r"lbllm\.fast_square.*runs as a kernel only, and no kernel computes it"):
        requirements(with_operator(FAST_SQUARE))


def test_a_stored_graph_calls_it():
    before = clipped()
    text = graph_json.dumps(before.module)
    (node,) = (n for n in json.loads(text)["nodes"] if n["target"] == "lbllm.soft_clip.default")
    assert node["args"][1] == BOUND
    after = before.with_module(graph_json.loads(text, dict(before.parameters())))
    inputs = token_inputs(batch=3, length=7, vocabulary=VOCABULARY)
    assert torch.equal(after.run(inputs), before.run(inputs))
    assert not torch.equal(after.run(inputs), language_model().run(inputs))


def test_a_package_that_defines_it_is_imported_when_a_stored_graph_calls_it(monkeypatch):
    text, state = graph_json.dumps(clipped().module), dict(clipped().parameters())
    point = EntryPoint("soft_clip", "my_package.operators", installed.OPERATORS)
    points = [point]
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(
        registry, "entry_points", lambda group, name: [p for p in points if (p.group, p.name) == (group, name)]
    )
    del registry._registered[SOFT_CLIP.target]

    with pytest.raises(OperatorError, match=r"'soft_clip' \(my_package\.operators\) cannot be imported: No module"):
        graph_json.loads(text, state)
    monkeypatch.setattr(EntryPoint, "load", lambda self: registry.register(SOFT_CLIP))
    assert calls(graph_json.loads(text, state).graph, SOFT_CLIP.target)
    points.clear()
    del registry._registered[SOFT_CLIP.target]
    with pytest.raises(GraphFormatError, match=r"'lbllm\.soft_clip\.default', which is outside"):
        graph_json.loads(text, state)


def test_a_stored_program_is_of_the_operators_that_are_installed(monkeypatch, tmp_path):
    module = tmp_path / "outside_operators.py"
    module.write_text("TWICE = 2")
    monkeypatch.syspath_prepend(tmp_path)
    before = native.machine_facts(Target.parse("cpu"))
    points = [EntryPoint("soft_clip", "outside_operators", installed.OPERATORS)]
    monkeypatch.setattr(installed, "entry_points", lambda group: points)
    first = native.machine_facts(Target.parse("cpu"))
    module.write_text("TWICE = 2.0")
    second = native.machine_facts(Target.parse("cpu"))
    assert before != first != second
    points[0] = EntryPoint("soft_clip", "not_there.operators", installed.OPERATORS)
    assert native.machine_facts(Target.parse("cpu")) not in (before, first, second)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A graph of the operator alone, and its native form."""
    graph = Graph([case(SOFT_CLIP.target, Input(("m", "n")), BOUND), case(SOFT_CLIP.target, Input((3,)))])
    return graph, run_natively(graph.module, graph.inputs, tmp_path_factory.mktemp("graph"))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_its_translation_gives_its_references_bits(alone, m, n, seed):
    graph, run = alone
    tensors = graph.draw({"m": m, "n": n}, seed)
    for found, wanted in zip(run(*tensors), graph.module(*tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_language_model_runs_it_in_the_executor_and_natively(tmp_path):
    artifact.save(clipped(), tmp_path / "out", lock={})
    program = artifact.load(tmp_path / "out").program
    kernels = kernels_of(program)
    native = build_native(program, kernels, tmp_path)
    assert native is not None
    inputs = token_inputs(batch=3, length=7, vocabulary=VOCABULARY)
    ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
    executed = Executor(program, kernels)(*program.arguments(inputs))
    session = native.session(3)
    session.start(inputs["attention_mask"].numpy())
    logits = torch.from_numpy(session.logits(ids.numpy()))
    agree(executed, clipped().run(inputs), seen)
    agree(logits, executed, seen)
    torch.testing.assert_close(logits[seen], executed[seen], rtol=1e-4, atol=1e-4)


def test_a_wrong_use_is_refused_where_it_is_made():
    with pytest.raises(ContractError, match=r"after the pass 'annotate' 'soft_clip\w*' .*cannot be bounded by -1\.0"):
        check_structure(Annotate(), clipped(-1.0), token_inputs(vocabulary=VOCABULARY))


def test_a_wrong_use_in_a_file_is_refused_in_one_sentence(tmp_path):
    artifact.save(clipped(0.0), tmp_path / "out", lock={})
    with pytest.raises(ArtifactError, match=r"'soft_clip\w*' .*cannot be bounded by 0\.0") as raised:
        artifact.load(tmp_path / "out")
    assert "\n" not in str(raised.value)
