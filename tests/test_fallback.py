"""``--fallback dense``: exactly the linears whose kernels are slower stay float, and a resumed compile keeps to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lbllm_compile.codegen import operators
from lbllm_compile.codegen.operators import registry
from lbllm_compile.codegen.operators.translator import refusal
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import SLOWER, Annotate, layer_count
from lbllm_compile.passes.base import NoCheckpoints
from lbllm_compile.passes.ir.annotations import LinearInfo, linears
from test_driver import SMALL, model_file, options  # noqa: F401  # a fixture
from test_zoo import stages
from zoo import ZOO, captured

from lbllm_compile import driver, fallback, frontend, inspect, plan, recipe
from lbllm_compile.bench.linears import DENSE, OWN, Floats, Linear, Timer, distinct
from lbllm_compile.bench.turns import Spread
from lbllm_compile.checkpoint import WorkDir
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.report import summary

PIPELINE = "canonicalize,annotate,observe,ptq{group=32},activate{group=32},head,merge,lower,cache,cleanup"

HOST = (Target.parse("cpu"),)

aten, lbllm = torch.ops.aten, torch.ops.lbllm

UNTUNED = SMALL.model_copy(update={"tune_trials": 0})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def around(median: float) -> Spread:
    return Spread(median, 0.99 * median, 1.01 * median, 9)


def plant(monkeypatch: pytest.MonkeyPatch, columns: int) -> list[Linear]:
    """Linears of so many columns are slower than float ones, the others faster; returns those that are timed."""
    timed: list[Linear] = []

    def against_dense(self: Timer, linear: Linear, parts: Any, tokens: int, **_: Any) -> dict[str, Spread]:
        assert tokens == 1 and sum(part.rows for part in parts) == linear.rows
        timed.append(linear)
        return {OWN: around(3e-6 if linear.columns == columns else 1e-6), DENSE: around(2e-6)}

    monkeypatch.setattr(Timer, "against_dense", against_dense)
    return timed


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2"])
def test_kernels_are_known_before_anything_is_quantized(name: str) -> None:
    found = fallback.candidates(captured(name)[1], pipeline.parse(PIPELINE))
    lowered = distinct(stages(name)[1])
    of_bits = {linear: infos for linear, infos in lowered.items() if linear.spec and linear.spec.kind == "bit"}
    assert {together.linear for together in found} == of_bits.keys()
    paths = sorted(info.path for infos in found.values() for info in infos)
    apart = [part for infos in of_bits.values() for info in infos for part in separated(info.path)]
    assert paths == sorted(apart)


def test_linears_of_codes_are_timed_on_the_kernels_of_codes() -> None:
    scheme = "*.down_proj: bits=4 group=64; *.0.self_attn: bits=4"
    found = fallback.candidates(
        captured("llama")[1], pipeline.parse(PIPELINE.replace("annotate", f'annotate{{scheme="{scheme}"}}'))
    )
    kinds = {info.path: together.linear.spec.kind for together, infos in found.items() for info in infos}
    coded = {path for path in kinds if path.endswith("down_proj") or ".0.self_attn." in path}
    assert {path for path, kind in kinds.items() if kind == "int4"} == coded and len(coded) == 6 and len(kinds) == 14


def test_kernels_have_the_columns_that_outliers_leave() -> None:
    def columns(name: str, text: str) -> dict[LinearInfo, int]:
        found = fallback.candidates(captured(name)[1], pipeline.parse(text))
        return {info: together.linear.columns for together, infos in found.items() for info in infos}

    moved = PIPELINE.replace("observe", "outliers{share=0.1},observe")
    assert columns("llama", moved.replace("ptq{", "ptq{outliers=false,")) == columns("llama", PIPELINE)
    plain, kept = columns("mixtral", PIPELINE), columns("mixtral", moved)
    assert {bool(info.experts) for info in plain} == {True, False}
    assert all(kept[info] == (width if info.experts else width - width // 10) for info, width in plain.items())


def separated(path: str) -> list[str]:
    """Paths of the linears that were merged into one."""
    first, *others = path.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]


def test_the_slower_ones_stay_float_and_the_choice_is_kept(tmp_path, monkeypatch):
    program = captured("llama")[1]
    passes, work = pipeline.parse(PIPELINE), WorkDir(tmp_path / "work", {"model": "a"})
    downs = {info.path for _, info in linears(stages("llama")[1]) if info.path.endswith("down_proj")}
    columns = next(t.linear.columns for t, i in fallback.candidates(program, passes).items() if i[0].path in downs)
    timed = plant(monkeypatch, columns)

    def choose(kept: WorkDir) -> tuple[list[Any], list[dict[str, Any]]]:
        return fallback.applied(program, passes, HOST, UNTUNED, kept, NoProgress())

    changed, rows = choose(work)
    (annotate,) = (item for item in changed if isinstance(item, Annotate))
    assert set(annotate.slower) == downs
    assert [row["slower"] for row in rows].count(True) == 1
    count = len(timed)
    work.release()
    resumed = WorkDir(tmp_path / "work", {"model": "a"})
    assert choose(resumed) == (changed, rows) and len(timed) == count, "nothing is measured again"
    resumed.release()
    choose(WorkDir(tmp_path / "work", {"model": "a"}, fresh=True))
    assert len(timed) == 2 * count


def test_what_is_within_the_spread_becomes_bits():
    together = fallback.Together(Linear(8, 64), (Linear(8, 64),))
    slow, close = around(3e-6), Spread(2.02e-6, 1.9e-6, 2.1e-6, 9)
    assert fallback.row(together, [], slow, around(2e-6))["slower"]
    assert not fallback.row(together, [], close, around(2e-6))["slower"]
    assert not fallback.row(together, [], around(1e-6), around(2e-6))["slower"]


@pytest.mark.parametrize("floats", Floats)
def test_kernels_are_timed_against_float_ones(floats):
    found = dict(list(fallback.candidates(captured("llama")[1], pipeline.parse(PIPELINE)).items())[:1])
    rows = fallback.measured(found, HOST[0], UNTUNED, NoProgress(), floats)
    (row,) = rows
    assert row["microseconds"] > 0 and row["dense_microseconds"] > 0 and isinstance(row["slower"], bool)
    assert len(row["paths"]) == 3 * layer_count(stages("llama")[1])
    assert row["linears"] == [f"model.layers.*.self_attn.{part}_proj" for part in "qkv"]


@pytest.mark.parametrize("why", ["", "an operator", "a form", "no language model"])
def test_what_computes_floats_is_known_before_the_compile(why, monkeypatch):
    program, passes = captured("llama")[1], pipeline.parse(PIPELINE)
    attention, add = (operators.find(x) for x in (lbllm.cached_attention.default, aten.add.Tensor))
    if why == "an operator":
        monkeypatch.setitem(registry._registered, attention.target, dataclasses.replace(attention, translate=None))
    elif why == "a form":
        refuse = dataclasses.replace(add, translate=lambda _, arguments: refused(arguments))
        monkeypatch.setitem(registry._registered, add.target, refuse)
    elif why:
        program = dataclasses.replace(program, kind="module")
    assert fallback._becomes_native(program, passes, HOST[0]) == (not why)
    timed: list[Floats] = []
    monkeypatch.setattr(fallback, "measured", lambda *given: timed.append(given[-1]) or [])
    fallback.applied(program, passes, HOST, UNTUNED, NoCheckpoints(), NoProgress())
    assert timed == [Floats.KERNELS if not why else Floats.SESSION if program.kind == "causal-lm" else Floats.TORCH]


def refused(arguments: Any) -> Any:
    raise refusal(arguments, "this form of the operator has no translation")


def test_a_compile_says_what_stays_float_and_why(model_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(recipe.PRESETS, "quick", UNTUNED)
    text = "canonicalize,annotate,observe,ptq{group=32},activate{group=32,epochs=0,steps=0},lower,cache,cleanup"
    chosen = options(model_file, tmp_path / "out", pipeline=text, fallback="dense", no_sheet=True)
    before = driver.read_job(chosen)
    columns = max(t.linear.columns for t in fallback.candidates(before.program, before.passes))
    plant(monkeypatch, columns)
    report = driver.compile(chosen, progress=NoProgress())
    (annotated,) = (record for record in report.records if record.name == "annotate")
    kept = {row["path"] for row in annotated.rows if row["reason"] == SLOWER}
    assert kept == {path for row in report.fallback if row["slower"] for path in row["paths"]}
    assert kept and all(path.endswith("down_proj") for path in kept)
    lock = json.loads((report.out / "lbllm.lock").read_text())
    assert lock["fallback"] == "dense on cpu" and lock["fallback_times"] == list(report.fallback)
    (stored,) = (item for item in pipeline.parse(lock["pipeline"]) if isinstance(item, Annotate))
    assert set(stored.slower) == kept
    roles = {row["linear"]: row["weights"] for row in inspect.look(report.out)[1]["linears"]}
    assert {path for path, weights in roles.items() if weights == "float" and "layers" in path} == kept
    titles = [str(getattr(part, "title", "")) for part in summary.compile_report(report)]
    assert "Quantized or float, the faster (--fallback dense)" in titles
    assert "slower: stays float" in (report.out / "report.html").read_text()
    assert not Path(f"{report.out}.lbllm-work").exists()


def test_where_nothing_can_be_timed_that_is_said():
    passes = pipeline.parse(PIPELINE)
    with pytest.raises(OptionError, match="none of the targets runs on this machine"):
        fallback.check(passes, [Target.parse("cuda:sm_90")])
    with pytest.raises(OptionError, match="needs the pass 'ptq'"):
        fallback.check([item for item in passes if item.name != "ptq"], HOST)
    with pytest.raises(OptionError, match=r"a budget .* chooses groups, .*; leave one of them out"):
        fallback.check(pipeline.parse(PIPELINE.replace("observe", "budget{bits=3},observe")), HOST)
    with pytest.raises(OptionError, match="--fallback cannot be 'torch'; give dense"):
        CompileOptions(model="m.py", fallback="torch")


def test_paths_of_slower_linears_are_an_option_of_annotate():
    (item,) = pipeline.parse('annotate{slower="a.b|c.d"}')
    assert isinstance(item, Annotate) and item.slower == ("a.b", "c.d")
    assert pipeline.parse(pipeline.render([item])) == [item]
    named = {"model.layers.0.mlp.down_proj"}
    model = frontend.UserModel(ZOO["llama"].build(), "causal-lm", "llama", "llama")
    for role, found in (("dense", plan.survey(model, slower=tuple(named))), ("decoder", plan.survey(model))):
        assert {x.info.role for x in found if x.info.path in named} == {role}
    program = captured("llama")[1]
    again = fallback.candidates(program, pipeline.parse(PIPELINE.replace("annotate", 'annotate{slower="*.0.mlp.*"}')))
    assert all(not info.path.startswith("model.layers.0.mlp") for infos in again.values() for info in infos)
