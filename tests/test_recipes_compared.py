"""Recipes compared on one model: what is compiled, reused and measured, and what is told."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from filelock import FileLock
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from reference_kernels import ReferenceKernels
from test_driver import MODEL, SMALL
from test_errors import fails

from lbllm_compile import artifact, compare, driver, evaluate, recipe
from lbllm_compile.bench import decoding
from lbllm_compile.bench.decoding import Settings, Times
from lbllm_compile.checkpoint import LOCK
from lbllm_compile.compare import CompareError
from lbllm_compile.job import read_job
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.records import CompileReport
from lbllm_compile.report import terminal
from lbllm_compile.runtime import loader

RECIPES = ["lbllm", "lbllm-paper"]
SHORT = Settings(prompt=4, steps=4, prefill=16, rounds=2, processes=1, pause=0.0, warm=False)


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.PRESETS, "quick", SMALL)
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "small.py").write_text(MODEL)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return folder


def options(base, **changes):
    return CompileOptions(str(base / "small.py"), **{"preset": "quick", "out": base / "compared", **changes})


def run(base, recipes=RECIPES, compiles=driver.compile, **changes):
    return compare.compare(
        options(base, **changes), recipes, base / "text.txt", seq_len=32, chunks=3, compiles=compiles, settings=SHORT
    )


def rounded(given):
    """In place of a compile: weights are fitted to a few tokens and nothing is trained, tuned or timed."""
    job = read_job(given)
    data = job.calibration_data(NoProgress())
    few = PassContext(calibration=data.calibration[:2], validation=data.validation[:1], probe=data.probe)
    kept = [item for item in job.passes if item.name not in ("smooth", "distill", "finetune")]
    passes = [dataclasses.replace(item, epochs=0, steps=0) if item.name == "activate" else item for item in kept]
    program, _ = pipeline.run(job.program, passes, few)
    digest = artifact.save(program, given.out, lock=job.lock(job.fingerprint(data), data, {}))
    report = CompileReport(given.out, [], [], {}, 0, {"passes": 61.0}, 123_456_789)
    assert artifact.write_report(digest, report)


@pytest.fixture(scope="module")
def cheap():
    """Kernels are the reference, and every decoder takes a millisecond a token."""

    def in_turns(competing, settings, progress):
        steps, prefill = [[1e-3] * settings.steps] * settings.rounds, [1e-3 * settings.prefill] * settings.rounds
        return {name: Times(steps, prefill) for name in competing}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "build_kernels", lambda *_, **__: ReferenceKernels())
        patch.setattr(decoding, "in_turns", in_turns)
        yield


@pytest.fixture(scope="module")
def outcome(base, cheap):
    return run(base, compiles=rounded)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_a_compile_gives_is_compared(base, tmp_path):
    """Nothing is replaced: compiled, scored on proven kernels, and timed in processes."""
    given = dataclasses.replace(options(base), out=tmp_path / "compared")
    found = compare.compare(
        given, RECIPES, base / "text.txt", seq_len=32, chunks=3, compiles=driver.compile, settings=SHORT
    )
    for one in found.recipes:
        report = artifact.read_report(one.directory)
        assert one.seconds == report.seconds["passes"] and one.peak_memory == report.peak_memory
        for speed in (one.speed, found.original):
            assert speed["decode"]["median"] > 0 and speed["prefill"]["count"] == SHORT.rounds


def test_figures_are_those_of_the_artifacts(base, outcome):
    assert [one.recipe for one in outcome.recipes] == RECIPES
    for one in outcome.recipes:
        expected = evaluate.evaluate(
            one.directory, base / "text.txt", seq_len=32, chunks=3, teacher=str(base / "small.py")
        )
        names = (
            "ppl",
            "ppl_teacher",
            "kld_mean",
            "kld_p99",
            "top1_agreement",
            "loops",
            "bits_per_weight",
            "bytes_compiled",
        )
        assert {name: one.figures[name] for name in names} == {name: expected[name] for name in names}
        assert (one.seconds, one.peak_memory, one.resumed) == (61.0, 123_456_789, 0)
        assert artifact.read_lock(one.directory)["recipe"] == one.recipe
        for speed in (one.speed, outcome.original):
            assert speed["decode"]["median"] == speed["prefill"]["median"] == pytest.approx(1000.0)
    assert outcome.recipes[0].figures["bits_per_weight"] != outcome.recipes[1].figures["bits_per_weight"]


def test_a_rerun_measures_nothing_and_keeps_every_artifact(base, outcome, monkeypatch):
    monkeypatch.setattr(evaluate, "compare", None)
    monkeypatch.setattr(decoding, "in_turns", None)
    assert run(base, compiles=None).to_json() == outcome.to_json()
    assert json.loads((base / "compared" / compare.COMPARISON).read_text()) == outcome.to_json()


def test_what_another_compile_would_give_is_compiled_again(base, outcome, tmp_path):
    """``fresh`` also drops the figures, so it has a copy of the folder."""
    copied = tmp_path / "compared"
    shutil.copytree(base / "compared", copied)
    asked = []

    def refuse(given):
        asked.append((given.recipe, given.seed, given.no_sheet))
        raise CompareError("stop")

    with pytest.raises(CompareError, match="stop"):
        run(base, compiles=refuse, seed=1)
    with pytest.raises(CompareError, match="stop"):
        run(base, compiles=refuse, fresh=True, out=copied)
    assert (base / "compared" / "comparison.lbllm-work" / "stages").is_dir()
    assert asked == [("lbllm", 1, True), ("lbllm", 0, True)]


def test_the_table_names_what_was_scored_and_how(base, outcome):
    console = terminal.make_console(file=io.StringIO())
    for part in compare.render(outcome):
        console.print(part)
    shown = "".join(console.file.getvalue().split())
    assert "3chunksof32tokens,93tokensscored" in shown and "KLmean" in shown and "95%intervals" in shown
    assert "original" in shown and "lbllm-paper" in shown and f"{SHORT.rounds}turns" in shown
    row = compare.cells(dataclasses.replace(outcome.recipes[0], seconds=61.0, resumed=2, peak_memory=None))
    assert len(row) == len(compare.COLUMNS) and row[7:9] == ["1:01, resumed", ""]


def test_a_compile_is_a_process_of_its_own(base, monkeypatch):
    ran = []

    def recorded(words, **_):
        ran.append(words[1:])
        return SimpleNamespace(returncode=len(ran) - 1)

    monkeypatch.setattr(subprocess, "run", recorded)
    given = options(base, recipe="lbllm", no_sheet=True, fresh=True, keep_dense=("*.o_proj",))
    compare.compile_apart(given)
    (words,) = ran
    assert words[:4] == ["-m", "lbllm_compile", "compile", str(base / "small.py")]
    assert {"--no-sheet", "--fresh", "*.o_proj", str(base / "compared")} < {*words}
    with pytest.raises(CompareError, match=r"'lbllm' could not be compiled.*same command takes over"):
        compare.compile_apart(given)


@pytest.mark.parametrize(
    ("recipes", "changes", "message"),
    [
        (["lblm"], {}, r"no recipe 'lblm' \(did you mean 'lbllm'\?\)"),
        (["lbllm", "lbllm"], {}, "names a recipe twice"),
        ([], {}, "or none"),
        (["lbllm-paper"], {"act_bits": 8}, "'lbllm-paper', whose activations have knees; name others with --recipes$"),
        ([*recipe.RECIPES], {"bits": 2.5}, "--bits cannot be given with the recipe 'bwa': .* others with --recipes$"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(base, recipes, changes, message):
    with pytest.raises((CompareError, OptionError), match=message):
        run(base, recipes, compiles=None, **changes)


def test_a_model_in_memory_and_one_with_a_pipeline_are_told(base, tmp_path):
    in_memory = CompileOptions(model=object(), preset="quick")
    with pytest.raises(CompareError, match="the model must be one that can be named"):
        compare.compare(in_memory, RECIPES, base / "text.txt")
    (tmp_path / "small.py").write_text(MODEL + "\nrecipe = {'pipeline': 'canonicalize,annotate,lower,cache,cleanup'}\n")
    brings = CompileOptions(str(tmp_path / "small.py"), preset="quick", out=tmp_path / "out")
    with pytest.raises(CompareError, match="the model brings a pipeline"):
        compare.compare(brings, RECIPES, base / "text.txt")
    assert not (tmp_path / "out").exists()


def test_what_the_model_asks_for_and_a_recipe_refuses_is_told(base, tmp_path):
    (tmp_path / "small.py").write_text(MODEL + "\nrecipe = {'bits': 2.5}\n")
    asks = CompileOptions(str(tmp_path / "small.py"), preset="quick", out=tmp_path / "out")
    for recipes in (["bwa", "lbllm"], ["lbllm", "bwa"]):
        with pytest.raises(CompareError, match=r"with the recipe 'bwa': .* name others with --recipes$"):
            compare.compare(asks, recipes, base / "text.txt")


def test_nothing_of_the_users_is_overwritten(base, outcome, tmp_path):
    (tmp_path / "lbllm").mkdir()
    (tmp_path / "lbllm" / "mine").write_text("mine")
    with pytest.raises(artifact.ArtifactError, match="holds files that are not an lbllm artifact"):
        compare.compare(dataclasses.replace(options(base), out=tmp_path), RECIPES, base / "text.txt")
    with pytest.raises(CompareError, match="is an artifact, and artifacts are written"):
        compare.compare(dataclasses.replace(options(base), out=base / "compared" / "lbllm"), RECIPES, base / "text.txt")
    with pytest.raises(CompareError, match="is not a directory"):
        compare.compare(dataclasses.replace(options(base), out=base / "text.txt"), RECIPES, base / "text.txt")
    assert (tmp_path / "lbllm" / "mine").read_text() == "mine"


def test_a_folder_of_another_model_or_in_use_is_left_as_it_is(base, tmp_path):
    """Also where the other comparison has come no further than its first artifact."""
    given = dataclasses.replace(options(base), out=tmp_path / "compared")
    asked = []

    def stops_at_the_second(options):
        asked.append(options.recipe)
        if len(asked) > 1:
            raise CompareError("stop")

    def compared(given):
        compare.compare(given, RECIPES, base / "text.txt", seq_len=32, chunks=3, compiles=stops_at_the_second)

    with pytest.raises(CompareError, match="stop"):
        compared(given)
    (tmp_path / "other.py").write_text(MODEL.replace("manual_seed(1)", "manual_seed(3)"))
    other = dataclasses.replace(given, model=str(tmp_path / "other.py"))
    with pytest.raises(
        CompareError, match=r"holds a comparison with another model; pass --fresh to start over, or another --out$"
    ):
        compared(other)
    held = FileLock(tmp_path / "compared" / "comparison.lbllm-work" / LOCK)
    with held, pytest.raises(CompareError, match=r"another comparison is using .*wait for it, or pass another --out$"):
        compared(given)
    assert asked == RECIPES
    with pytest.raises(CompareError, match="stop"):
        compared(dataclasses.replace(other, fresh=True))
    assert asked == [*RECIPES, "lbllm"]


def test_recipes_may_be_named_one_by_one(base):
    assert "no recipe 'lblm'" in fails(
        "compare", "missing.py", "--text", str(base / "text.txt"), "--recipes", "lbllm, lblm"
    )
