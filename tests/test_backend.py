"""Backends: what is built in, and one from outside the package that runs a model end to end."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lbllm_compile.codegen import backend, targets
from lbllm_compile.codegen.backend import backend_named, backend_of, register_backend
from lbllm_compile.codegen.errors import TargetError
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target, known_targets, parse_targets
from plain_backend import PlainBackend, PlainKernels, PlainKind, PlainLinear
from reference_kernels import ReferenceKernels
from test_runtime import VOCABULARY, language_model

from lbllm_compile import artifact
from lbllm_compile.doctor import target_rows
from lbllm_compile.kernels import build_kernels
from lbllm_compile.native import program as native
from lbllm_compile.runtime import CompiledModel, Sampling, load
from lbllm_compile.tune import TuneOptions, tune

ROOT = Path(__file__).parent.parent


@pytest.fixture
def registries(monkeypatch, tmp_path):
    """Registries and a cache that only this test sees."""
    monkeypatch.setattr(backend, "_BACKENDS", dict(backend._BACKENDS))
    monkeypatch.setattr(targets, "_KINDS", dict(targets._KINDS))
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def plain(registries):
    register_backend(PlainBackend())


def test_a_backend_serves_the_targets_of_its_kind():
    assert backend_of(Target.parse("cpu:generic")) is backend_named("cpu")
    for target in parse_targets("cuda"):
        assert backend_of(target) is backend_named("cuda") and not backend_of(target).eager


def test_an_unknown_kind_is_one_clear_error():
    with pytest.raises(TargetError, match=r"no backend .* register_backend"):
        backend_named("abacus")
    with pytest.raises(TargetError, match=r"unknown target 'abacus'.*known targets: cpu"):
        Target.parse("abacus")


@pytest.mark.parametrize("listed", [False, True])
def test_an_installed_package_registers_its_backend(registries, monkeypatch, listed):
    class TwoKind(PlainKind):
        def parse(self, detail):
            target = super().parse("")[0]
            return [dataclasses.replace(target, name=f"plain:{d}") for d in detail or "ab"]

        def known(self):
            return ["plain", "plain:a", "plain:b"]

    class Two(PlainBackend):
        """A backend whose kind stands for two targets."""

        kind = TwoKind()

    class Point:
        name = "plain"

        def load(self):
            return lambda: register_backend(Two())

    def entry_points(group, name="plain"):
        return [Point()] if (group, name) == ("lbllm_compile.backends", "plain") else []

    monkeypatch.setattr(targets, "entry_points", entry_points)
    monkeypatch.setattr(targets, "_KINDS", dict(targets._KINDS))
    if listed:
        assert {"plain", "plain:a", "plain:b"} <= {*known_targets()}
    for _ in range(2):
        assert [t.name for t in parse_targets("plain")] == ["plain:a", "plain:b"]
    assert [t.name for t in parse_targets("cpu:generic,plain:b,a,plain")] == ["cpu:generic", "plain:b", "plain:a"]
    assert Target.parse("plain").kind == "plain" and isinstance(backend_named("plain"), Two)
    with pytest.raises(TargetError, match="unknown target 'plane'; did you mean 'plain'"):
        Target.parse("plane")


def test_cuda_does_not_run_without_a_driver(monkeypatch):
    monkeypatch.setattr(targets.cuda, "LIBRARY", "libnothing.so")
    target = Target.parse("cuda:sm_90")
    with pytest.raises(TargetError, match=r"cannot run cuda:sm_90: there is no NVIDIA driver.*; its own targets: cpu"):
        backend_of(target).build([LinearSpec("bit", 32, 32, 32)], [], target)
    with pytest.raises(TargetError, match="no functions to call"):
        backend_of(target).machine(Path("program"))


@pytest.mark.parametrize(
    "spec", [LinearSpec("bit", 5, 67, 32, bias=True), LinearSpec("int8", 3, 40, 0, 8, per_token=True)], ids=str
)
def test_kernels_from_outside_read_two_tensors(spec):
    """Building is the proof."""
    PlainLinear.build(spec, Target.parse("cpu:generic"))


def test_a_backend_from_outside_runs_a_model(plain, tmp_path, monkeypatch):
    assert "plain" in known_targets() and parse_targets("plain,cpu:generic")[0].name == "plain"
    assert next(row for row in target_rows() if row["target"] == "plain")["runs_here"]
    program, out = language_model(), tmp_path / "out"
    built = build_kernels(program, parse_targets("plain"), trials=4)
    assert isinstance(built.host, PlainKernels)
    artifact.save(program, out, lock={})

    model = load(out, target="plain")
    assert model.native is not None and model.native.description.target == "plain"
    names = [member.name for member in model.native.description.weights]
    packed = [name for name in names if name.endswith((".levels", ".scales"))]
    linears = len(built.host.linears)
    assert packed[0::2] == [name.replace(".scales", ".levels") for name in packed[1::2]] and len(packed) >= 2 * linears
    assert native.find(out) is None and native.find(out, "plain") is not None
    monkeypatch.setattr(PlainBackend, "compile", lambda *_: pytest.fail("compiled again"))
    assert load(out, target="plain").native.directory == model.native.directory

    ids = torch.from_numpy(np.random.default_rng(0).integers(1, VOCABULARY, (3, 11)))
    by_operators = CompiledModel(program, built.host).logits(ids)
    assert torch.equal(by_operators, CompiledModel(program, ReferenceKernels()).logits(ids))
    torch.testing.assert_close(model.logits(ids), by_operators, atol=0.05, rtol=0)
    prompts, sampling = [[5, 3, 8], [9], [4, 4, 4, 4, 7, 2]], Sampling(max_new_tokens=8)
    expected = list(CompiledModel(program, ReferenceKernels()).generate_ids(prompts, sampling, ()))
    assert list(model.generate_ids(prompts, sampling, ())) == expected
    assert list(model.generate_ids(prompts[:1], sampling, ())) == [[row[0]] for row in expected]


def test_a_backend_without_a_search_is_not_tuned(plain):
    with pytest.raises(TargetError, match="schedules of plain are not searched"):
        tune(TuneOptions(shapes="32x32", target="plain"))


def test_nothing_but_a_backend_and_the_parsing_of_targets_knows_a_kind():
    """No comparison with the name of a kind of targets outside ``codegen/targets``."""
    found = []
    for folder in ("lbllm_compile", "passes", "codegen"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                compared = isinstance(node, ast.Compare) and [node.left, *node.comparators]
                if compared and any(ast.unparse(part).endswith(".kind") for part in compared):
                    text = ast.unparse(node)
                    found += [f"{file.relative_to(ROOT)}: {text}"] if "'cpu'" in text or "'cuda'" in text else []
    assert found == []
