"""A fault is found where it is, and the script that is written of it shows it by itself."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lbllm_compile.codegen import operators, prove
from lbllm_compile.codegen.errors import DisprovedError
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.passes import contracts, merge, pipeline, registry
from lbllm_compile.passes.base import CALIBRATING, EXACT, Contract, Pass, PassContext, PassResult, bounded
from lbllm_compile.passes.ir import parting
from lbllm_compile.passes.ir.attention import ATTENTIONS
from lbllm_compile.passes.ir.program import LAYER, Program, set_attribute
from lbllm_compile.passes.ir.rewrite import calls
from proven_kernels import kernels_of
from test_cli import invoke
from test_compare import applied, scaled, simulated
from test_driver import MODEL
from test_zoo import inputs, stages
from zoo import captured

from lbllm_compile import artifact, bisect
from lbllm_compile.lowering import piecewise
from lbllm_compile.lowering.executor import requirements

_aten = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent


def of_layer(program: Program, target: Any, layer: int) -> torch.fx.Node:
    return next(n for n in calls(program.graph, target) if n.meta.get(LAYER) == layer)


@dataclass(frozen=True)
class Twist(Pass):
    """Puts a thousandth more in the place of one node of one decoder layer."""

    name: ClassVar[str] = "twist"
    contract: ClassVar[Contract] = bounded(1e-6)

    layer: int = 1

    def apply(self, program: Program, context: PassContext) -> PassResult:
        after = program.copy()
        scaled(of_layer(after, _aten.silu.default, self.layer))
        after.module.recompile()
        return PassResult(after)


@dataclass(frozen=True)
class Shift(Pass):
    """Halves what a norm gives and doubles the weights that read it, but for one matrix of the last layer."""

    name: ClassVar[str] = "shift"
    contract: ClassVar[Contract] = bounded(1e-6)

    def apply(self, program: Program, context: PassContext) -> PassResult:
        after = program.copy()
        last = max(n.meta[LAYER] for n in after.graph.nodes if n.meta.get(LAYER) is not None)
        weights = dict(after.parameters())
        for node in calls(after.graph, _aten.linear.default):
            layer, path = node.meta.get(LAYER), node.args[1].target
            if path.endswith(("gate_proj.weight", "up_proj.weight")):
                wrong = layer == last and "up_proj" in path
                set_attribute(after.module, path, weights[path] * (1.5 if wrong else 2))
        for path in {n.target for n in after.graph.nodes if n.op == "get_attr"}:
            if path.endswith("post_attention_layernorm.weight"):
                set_attribute(after.module, path, weights[path] / 2)
        return PassResult(after)


@dataclass(frozen=True)
class Overflow(Pass):
    """Calibrates an activation of one layer into infinity."""

    name: ClassVar[str] = "overflow"
    contract: ClassVar[Contract] = CALIBRATING

    def apply(self, program: Program, context: PassContext) -> PassResult:
        after = program.copy()
        node = of_layer(after, _aten.silu.default, 1)
        with after.graph.inserting_after(node):
            more = after.graph.call_function(_aten.mul.Tensor, (node, float("inf")))
        node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
        after.module.recompile()
        return PassResult(after)


def annotated() -> Program:
    return applied(captured("llama")[1], "canonicalize,annotate")[0]


def broken(program: Program, item: Pass) -> parting.Parting:
    with pytest.raises(contracts.ContractError) as caught:
        pipeline.run(program, [item], PassContext(probe=inputs(2, 9)))
    assert caught.value.parting is not None
    return caught.value.parting


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_one_changed_node_is_found_with_its_layer_and_nothing_else() -> None:
    found = broken(annotated(), Twist())
    assert found.layer == 1 and found.error == pytest.approx(1e-3, rel=1e-2)
    assert targets(found.before) == ["aten.mul.Tensor"]
    assert targets(found.after) == ["aten.mul.Tensor", "aten.mul.Tensor"]
    assert all(isinstance(value, torch.Tensor) for value in found.inputs.values()) and len(found.inputs) == 2


def test_a_change_that_is_made_up_for_is_no_fault() -> None:
    """Norms have other values in all layers; the matrix that does not make up for it is in the last."""
    found = broken(annotated(), Shift())
    layers = max(n.meta[LAYER] for n in annotated().graph.nodes if n.meta.get(LAYER) is not None)
    assert found.layer == layers >= 1
    paths = {path for path, _ in found.after.parameters()}
    assert f"model.layers.{layers}.mlp.up_proj.weight" in paths
    assert not any("gate_proj" in path or "self_attn" in path for path in paths)
    assert found.error == pytest.approx(0.25, rel=1e-3)


def test_where_values_become_infinite_is_found() -> None:
    found = broken(annotated(), Overflow())
    assert found.layer == 1 and found.error == float("inf") and len(targets(found.after)) == 2


def test_nothing_is_found_where_nothing_parts() -> None:
    program = annotated()
    found = parting.find(program, program.copy(), inputs(2, 9), 0.0)
    assert found.error == 0


def test_simulated_and_integer_graphs_part_where_the_lowering_is_wrong() -> None:
    before = applied(simulated("llama"), "merge")[0]
    after = applied(before, "lower")[0]
    assert parting.find(before, after, inputs(2, 9), 0.0).error == 0
    node = [n for n in calls(after.graph, torch.ops.lbllm.bit_linear.default) if n.meta.get(LAYER) == 1][2]
    scaled(node)
    after.module.recompile()
    found = parting.find(before, after, inputs(2, 9), 0.0)
    assert found.layer == 1 and found.error == pytest.approx(1e-3, rel=0.5)
    assert targets(found.after).count("lbllm.bit_linear.default") <= 1


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a written script elsewhere, where nothing but the packages is to be found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(folder / bisect.SCRIPT)]
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)


def test_what_a_replacement_does_wrong_is_written_as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = merge._merge

    def wrong_rows(program: Program, linears: list[torch.fx.Node]) -> dict[str, torch.fx.Node]:
        replaced = rows(program, linears)
        later = linears[0].meta.get(LAYER) == 1
        return {name: scaled(part) if later else part for name, part in replaced.items()}

    monkeypatch.setattr(merge, "_merge", wrong_rows)
    with pytest.raises(contracts.ReplacementError) as caught:
        applied(simulated("llama"), "merge")
    found = caught.value.parting
    assert found.layer == 1 and found.allowed == merge.Merge.contract.each
    fault = bisect._parted("merge", str(caught.value), found, tmp_path / "fault")
    result = run(fault.folder)
    assert result.returncode == 1, result.stderr
    assert "relative error 0.001, allowed 1e-05" in result.stdout


def test_a_cached_attention_is_judged_where_there_are_tokens(tmp_path: Path) -> None:
    """What is computed at padding means nothing, so once the fault is mended the script is content. Here it is one more
    than before, and elsewhere a thousandth."""
    before = applied(simulated("llama"), "merge,lower")[0]
    after = applied(before, "cache")[0]
    names = [n.name for n in calls(before.graph, *ATTENTIONS)]
    cached = calls(after.graph, torch.ops.lbllm.cached_attention.default)
    wrong = scaled(cached[1])
    mask, more = next(n for n in after.placeholders() if n.target == "attention_mask"), wrong
    for target, arguments in (
        (_aten.eq.Scalar, lambda last: (mask, 0)),
        (_aten.unsqueeze.default, lambda last: (last, 1)),
        (_aten.unsqueeze.default, lambda last: (last, 3)),
        (_aten.add.Tensor, lambda last: (wrong, last)),
    ):
        with after.graph.inserting_after(more):
            more = after.graph.call_function(target, arguments(more))
    wrong.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
    replaced = dict(zip(names, cached, strict=True)) | {names[1]: more}
    after.module.recompile()
    probe = inputs(2, 9)
    tokens = probe["attention_mask"].bool()
    with pytest.raises(contracts.ReplacementError) as caught:
        contracts.check_replaced(before, after, replaced, probe, 1e-4, lambda v: v.transpose(1, 2)[tokens])
    found = caught.value.parting
    assert found is not None and found.layer == 1 and found.error == pytest.approx(1e-3, rel=1e-2)
    assert found.counted is not None and len(found.counted) % int(tokens.sum()) == 0
    fault = bisect._parted("cache", str(caught.value), found, tmp_path / "fault")
    assert exit_code(tmp_path / "fault") == 1 and fault.error == found.error
    script = tmp_path / "fault" / bisect.SCRIPT
    text = script.read_text()
    script.write_text(text.replace(", 1.001)", ", 1.0)"))
    assert exit_code(tmp_path / "fault") == 0
    # It would not be, did padding count.
    script.write_text(script.read_text().replace(', stored.get("counted/places")', ""))
    assert exit_code(tmp_path / "fault") == 1


@pytest.mark.parametrize("item", [Twist(), Overflow()], ids=lambda item: item.name)
def test_a_broken_contract_is_told_where_no_piece_can_be_cut(monkeypatch: pytest.MonkeyPatch, item: Pass) -> None:
    def failing(*arguments: Any) -> parting.Parting:
        raise RuntimeError("no such value")

    monkeypatch.setattr(parting, "find", failing)
    with pytest.raises(contracts.ContractError, match=f"the pass '{item.name}'") as caught:
        pipeline.run(annotated(), [item], PassContext(probe=inputs(2, 9)))
    assert caught.value.parting is None and "no such value" in str(caught.value.__cause__)


class Entry(EntryPoint):
    def load(self) -> type[Pass]:
        return Twist


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A language model of three layers, a third-party pass, and a cache of the test's own."""
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    point = Entry("twist", "test:twist", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(MODEL)
    yield tmp_path / "small.py"


def test_the_command_finds_a_planted_fault_and_its_script_shows_it(model: Path) -> None:
    line = ["bisect", str(model), "--pipeline", "canonicalize,annotate,twist{layer=2},smooth"]
    result = invoke(*line, "--json")
    assert result.exit_code == 3, result.stderr
    document = json.loads(result.stdout)
    assert [record["name"] for record in document["records"]] == ["canonicalize", "annotate"]
    fault = document["fault"]
    assert (fault["where"], fault["layer"], fault["folder"]) == ("twist{layer=2}", 2, "small-fault")
    assert fault["error"] == pytest.approx(1e-3, rel=1e-2) and fault["source"].startswith("transformers/models/llama/")
    shown = run(model.parent / "small-fault")
    assert shown.returncode == 1 and "allowed 1e-06" in shown.stdout, shown.stderr
    text = (model.parent / "small-fault" / bisect.SCRIPT).read_text()
    assert str(model.parent) not in text
    # Once the pass is right, the piece is too.
    (model.parent / "small-fault" / bisect.SCRIPT).write_text(text.replace(", 1.001)", ", 1.0)"))
    assert run(model.parent / "small-fault").returncode == 0
    again = invoke(*line)
    assert again.exit_code == 3 and "Found: the pass 'twist' promised" in again.stdout
    (model.parent / "small-fault" / "mine.txt").write_text("")
    refused = invoke(*line)
    assert (
        refused.exit_code == 2 and "'small-fault' holds other files ('mine.txt'); pass an empty --out" in refused.stderr
    )


def test_a_model_without_a_fault_has_none(model: Path) -> None:
    pipe = "canonicalize,annotate,smooth,observe,ptq,activate{steps=0},head,merge,lower,cache,cleanup"
    result = invoke("bisect", str(model), "--pipeline", pipe)
    assert result.exit_code == 0, result.stderr
    assert "Nothing in 'small' drifts past its contract." in result.stdout
    assert "native operator" in result.stdout and "native program" in result.stdout
    assert result.stdout.count("bounded") >= 3 and not (model.parent / "small-fault").exists()


def test_a_graph_that_does_not_hold_together_stays_its_own_error(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def malformed(self: Twist, program: Program, context: PassContext) -> PassResult:
        after = program.copy()
        node = of_layer(after, _aten.silu.default, 0)
        node.args = (after.graph.output_node().args[0],)
        return PassResult(after)

    monkeypatch.setattr(Twist, "apply", malformed)
    result = invoke("bisect", str(model), "--pipeline", "canonicalize,annotate,twist")
    assert result.exit_code == 1 and "the pass 'twist' left a malformed graph" in result.stderr


def test_a_kernel_that_a_pass_trains_on_is_found(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def refused(self: Twist, program: Program, context: PassContext) -> PassResult:
        raise DisprovedError("the generated training kernels are wrong")

    monkeypatch.setattr(Twist, "apply", refused)
    result = invoke("bisect", str(model), "--pipeline", "canonicalize,annotate,twist", "--json")
    assert result.exit_code == 3, result.stderr
    document = json.loads(result.stdout)
    assert [record["name"] for record in document["records"]] == ["canonicalize", "annotate"]
    assert document["fault"]["sentence"] == "the generated training kernels are wrong"


def test_an_exact_promise_is_held_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Twist, "contract", EXACT)
    assert broken(annotated(), Twist()).allowed == 0


@dataclass(frozen=True)
class OffByOne:
    """A linear's kernel whose first result is the next number."""

    right: Any

    def pack(self, weight: Any, bias: torch.Tensor | None) -> Any:
        return self.right.pack(weight, bias)

    def tir(self, bucket: str) -> Any:
        return self.right.tir(bucket)

    def __call__(self, values: torch.Tensor, x_scale: torch.Tensor, packed: Any) -> torch.Tensor:
        out = self.right(values, x_scale, packed)
        out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(torch.inf))
        return out


def own_fault(program: Program, kernels: Any, folder: Path) -> tuple[list[bisect.Check], bisect.Fault | None]:
    return bisect._held(program, kernels, inputs(2, 9), folder, NoProgress())


def exit_code(folder: Path) -> int:
    """Of a script that is run in this process, with what was planted here."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / bisect.SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_wrong_translation_is_found_among_right_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = stages("llama")[1]
    silu, sigmoid = operators.find(_aten.silu.default), operators.find(_aten.sigmoid.default)
    assert silu is not None and sigmoid is not None
    right = silu.translate
    try:
        object.__setattr__(silu, "translate", sigmoid.translate)
        checks, fault = own_fault(program, kernels_of(program), tmp_path / "fault")
        assert fault is not None and fault.where == piecewise.NATIVE and "(aten.silu" in fault.sentence
        assert fault.layer == 0 and fault.error > 0.1 and fault.source
        assert {c.name for c in checks} == {piecewise.KERNEL, piecewise.NATIVE}
        assert exit_code(tmp_path / "fault") == 1
    finally:
        object.__setattr__(silu, "translate", right)
    mended = run(tmp_path / "fault")
    assert mended.returncode == 0 and "relative error" in mended.stdout, mended.stderr


def test_a_kernel_that_is_off_by_one_bit_is_found(tmp_path: Path) -> None:
    program = stages("llama")[1]
    kernels = kernels_of(program)
    spec = next(spec for spec in requirements(program).linears if spec.in_features == 104)
    kernels._linears[spec] = OffByOne(kernels.linear(spec))
    checks, fault = own_fault(program, kernels, tmp_path / "fault")
    assert fault is not None and fault.where == piecewise.KERNEL and 0 < fault.error < 1e-5
    assert "down_proj" in (tmp_path / "fault" / bisect.SCRIPT).read_text()
    assert {c.name: c.allowed for c in checks}[piecewise.KERNEL] == 0
    assert run(tmp_path / "fault").returncode == 0  # the kernels that are built anew are right


def test_an_artifact_is_held_against_its_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    artifact.save(stages("llama")[1], tmp_path / "out", lock={})
    result = invoke("bisect", "out")
    assert result.exit_code == 0 and "the passes were not run again" in result.stderr
    assert "Nothing in 'out' drifts past its contract." in result.stdout and "native program" in result.stdout
    for inside in ("out", "out/fault", "."):
        refused = invoke("bisect", "out", "--out", inside)
        assert refused.exit_code == 2 and "lies in or over the artifact 'out'" in refused.stderr
    result = invoke("bisect", "out", "--group", "32")
    assert result.exit_code == 2 and "'out' is an artifact, which says how it was compiled" in result.stderr


def test_a_kernel_that_its_proof_refuses_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    artifact.save(stages("llama")[1], tmp_path / "out", lock={})
    monkeypatch.setattr(prove, "linear_failure", lambda *_: "3 of 5 outputs differ")
    result = invoke("bisect", "out", "--json")
    assert result.exit_code == 3, result.stderr
    fault = json.loads(result.stdout)["fault"]
    assert (
        fault["where"] == piecewise.KERNEL and "is wrong on this machine (3 of 5 outputs differ)" in fault["sentence"]
    )
    assert fault["folder"] is None and not (tmp_path / "out-fault").exists()


@pytest.mark.parametrize("name", [bisect.SCRIPT, bisect.TENSORS])
def test_a_file_of_the_users_is_not_replaced_for_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('"""Mine."""\n')
    with pytest.raises(bisect.BisectError, match=f"holds other files \\('{name}'\\)"):
        bisect.check_free(tmp_path)
    assert (tmp_path / name).read_text() == '"""Mine."""\n'
    (tmp_path / name).unlink()
    bisect._write(tmp_path, "print(1)", {"input": {"x": torch.ones(2)}})
    bisect.check_free(tmp_path)
