"""The documentation's code runs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stages
import test_operators
import torch
from lbllm_compile.codegen import backend, levels, targets
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators import registry as op_registry
from lbllm_compile.codegen.operators.registry import OperatorError
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import Pass, PassContext, pipeline, registry
from lbllm_compile.passes.ir.annotations import linears
from plain_backend import PlainBackend
from test_cli import layered
from test_operators import CASES, Graph, Input, case, check, run_natively
from torch import fx

from lbllm_compile import driver
from lbllm_compile.options import CompileOptions
from lbllm_compile.report import catalogue

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> type[Pass]:
    """The pass of docs/writing-a-pass.md, registered under its name."""
    text = (ROOT / "docs" / "writing-a-pass.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    module = ModuleType("documented_pass")
    monkeypatch.setitem(sys.modules, "documented_pass", module)
    exec(compile(code.group(1), "writing-a-pass.md", "exec"), module.__dict__)
    monkeypatch.setitem(registry._BUILTIN, "negate-output", "documented_pass:NegateOutput")
    found = module.NegateOutput
    real = registry.get
    monkeypatch.setattr(registry, "get", lambda name: found if name == "negate-output" else real(name))
    return found


def test_the_documented_pass_works(documented: type[Pass]) -> None:
    x = torch.tensor([[1.0, 2.0]])
    program, context = layered(2), PassContext(probe={"x": x})
    once, (record,) = pipeline.run(program, pipeline.parse("negate-output"), context)
    assert torch.equal(once.run({"x": x}), -program.run({"x": x}))
    assert (record.contract, record.error, record.summary) == ("calibrating", pytest.approx(2.0), {"negations": 1})
    (twice,) = pipeline.parse("negate-output{twice=true}")
    assert torch.equal(twice.apply(program, context).program.run({"x": x}), program.run({"x": x}))
    entry = catalogue.describe(documented)
    assert "%neg = aten.neg(%logits)" in entry.snippet
    assert [(o.name, o.meaning) for o in entry.options] == [
        ("twice", "negate a second time, which gives the original back.")
    ]


def test_documents_name_files_that_exist() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text()
        for path in re.findall(r"`((?:lbllm_compile|passes|codegen|tests|examples|docs)/[\w/.-]*)`", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_documented_names_of_tensors_are_those_that_are_stored() -> None:
    """A path in docs/format.md is that of a module."""
    documented = set(re.findall(r"`<path>\.([\w.]+)`", (ROOT / "docs" / "format.md").read_text()))
    text = "outliers{share=0.1},observe,ptq{group=32},head{bits=4,sequences=0}"
    program = stages.apply(stages.annotated(), text, stages.context(count=4)).program
    modules = [info.path for _, info in linears(program)]
    stored = [
        path.removeprefix(f"{m}.") for path, _ in program.parameters() for m in modules if path.startswith(f"{m}.")
    ]
    assert documented and documented <= {*stored}


def blocks(document: str) -> list[str]:
    """The Python in a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / document).read_text(encoding="utf-8"), re.DOTALL)


def assert_excerpt(block: str, file: str) -> None:
    """Every line of a block, but where it says that something is left out, is in a file of this project."""
    held = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    absent = [line for line in block.splitlines() if line.strip() not in ("", "...", *held)]
    assert not absent, f"{file} has no longer {absent}"


def test_the_documented_operator_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is checked, simulated and translated; under another name, because torch keeps operators for good."""
    definition, translation, line = blocks("new-operator.md")
    monkeypatch.setattr(op_registry, "_registered", dict(op_registry._registered))
    names: dict[str, Any] = {}
    exec(compile(definition.replace('"soft_clip(', '"documented_clip('), "new-operator.md", "exec"), names)
    target = names["SOFT_CLIP"].target
    graph = Graph([case(target, Input(("m", "n")), 1.7), case(target, Input((3,)))])
    check(graph, run_natively(graph.module, graph.inputs, tmp_path), {"m": 4, "n": 7}, 0)
    for bound, known in ((2.0, True), (0.0, False)):
        calling = fx.Graph()
        node = calling.call_function(target, (calling.placeholder("x"), bound))
        given = Arguments(node, lambda value: torch.ones(2) if isinstance(value, fx.Node) else value)
        with contextlib.nullcontext() if known else pytest.raises(OperatorError, match=r"cannot be bounded by 0\.0"):
            op_registry.find(target).verify(given)
    assert_excerpt(translation, "codegen/operators/aten/shapes.py")
    (documented,) = eval(line, {"aten": torch.ops.aten, **vars(test_operators)})
    assert documented in CASES


def test_the_documented_backend_is_the_one_that_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, linear, registration = blocks("new-backend.md")
    for block in (kind, linear):
        assert_excerpt(block, "tests/plain_backend.py")
    names: dict[str, Any] = {"dataclasses": dataclasses, "Target": Target}
    exec(compile(kind, "new-backend.md", "exec"), names)
    made = names["PlainKind"]()
    assert [t.name for t in made.parse("")] == made.known() == ["plain"] and made.runs_here(made.parse("")[0])
    monkeypatch.setattr(backend, "_BACKENDS", dict(backend._BACKENDS))
    monkeypatch.setattr(targets, "_KINDS", dict(targets._KINDS))
    exec(compile(registration, "new-backend.md", "exec"), {"PlainBackend": PlainBackend})
    assert type(backend.backend_of(Target.parse("plain"))) is PlainBackend


def test_the_documented_level_rule_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any four levels become evenly spaced ones."""
    (code,) = blocks("new-level-rule.md")
    monkeypatch.setattr(levels, "_REGISTERED", {"free": levels.FREE})
    names: dict[str, Any] = {}
    exec(compile(code, "new-level-rule.md", "exec"), names)
    rule = levels.get("even")
    assert rule is names["EVEN"] and levels.names()[:2] == ["free", "even"]
    stored, _ = rule.quantize(torch.tensor([[-3.0, -1.0, 0.5, 2.0], [0.0, 0.1, 0.2, 5.0]]))
    steps = stored.diff(dim=-1)
    assert bool(rule.holds(stored).all()) and torch.equal(steps[:, :2], steps[:, 1:]) and bool(steps.all())


def test_the_documented_cpu_family_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fewer than 60 lines make a family whose kernels agree with the reference."""
    from lbllm_compile.codegen.cpu.build import KernelSet
    from lbllm_compile.codegen.kernels import families, x86
    from lbllm_compile.codegen.spec import LinearSpec
    from lbllm_compile.codegen.targets import Target, host
    from lbllm_compile.codegen.targets import x86 as x86_targets

    text = (ROOT / "docs" / "new-hardware.md").read_text()
    code, rows = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(f"{code}{rows}".splitlines()) < 60
    file = tmp_path / "avx512_bw.py"  # TVM reads the source of what it compiles
    file.write_text(code)
    names = {**vars(x86), **vars(x86_targets)}
    exec(compile(code, str(file), "exec"), names)
    instructions, architecture, flags = (row for row in rows.splitlines() if row)
    for table, row in (
        (families.INSTRUCTION_SETS, instructions),
        (x86_targets.ARCHITECTURES, architecture),
        (host.NEEDED_FLAGS, flags),
    ):
        ((name, value),) = eval(f"{{{row}}}", names).items()
        monkeypatch.setitem(table, name, value)
    monkeypatch.setattr(host, "families", host.families.__wrapped__)
    target = Target.parse("cpu:avx512-bw")
    if not target.runs_here:
        pytest.skip("no AVX-512 here")
    specs = [LinearSpec("bit", 47, 300, 128, 4), LinearSpec("int8", 33, 70, 32, 8)]
    KernelSet.build(specs, [], target, cache_dir=tmp_path, trials=0)


def test_the_documented_pipeline_is_the_default_one() -> None:
    from lbllm_compile import recipe

    text = (ROOT / "docs" / "architecture.md").read_text()
    documented = re.search(r"`(canonicalize,[^`]*)`", text)
    assert documented is not None
    names = [p.name for p in pipeline.parse(documented.group(1))]
    assert names == [p.name for p in recipe.passes(recipe.Choices(), "cpu")]
    assert registry.names() == re.findall(r"^\| `([a-z-]+)` \| ", text, re.MULTILINE)


def test_the_readmes_model_compiles_in_principle(tmp_path: Path) -> None:
    from lbllm_compile import frontend

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (model,) = (b for b in blocks if "def build_model" in b)
    (tmp_path / "model.py").write_text(model)
    program = frontend.capture(frontend.load(tmp_path / "model.py"))
    assert [tuple(t.shape) for _, t in program.parameters() if t.dim() == 2] == [(100, 259), (10, 100)]


def test_the_readme_names_what_exists() -> None:
    import lbllm_compile
    from lbllm_compile import cli

    text = (ROOT / "README.md").read_text()
    offered = set(re.findall(r"lbllm_compile\.([a-zA-Z]+)\(", text))
    assert offered == {"compile", "CompileOptions", "load"}
    assert all(callable(getattr(lbllm_compile, name)) for name in offered)
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback} - {"compile"}
    commands |= {str(group.name) for group in cli.app.registered_groups}
    assert commands == set(re.findall(r"^\| `([a-z]+)[` ]", text, re.MULTILINE))


def test_the_readmes_model_and_pipeline_go_through(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    model = tmp_path / "model.py"
    model.write_text(next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "def build_model" in b))
    given = re.search(r"\| `--pipeline TEXT` .*`(canonicalize[^`]*)`", text)
    assert given
    for passes in (None, given.group(1)):
        assert driver.rehearse(CompileOptions(str(model), preset="quick", pipeline=passes)).complete
