"""The whole compile, on a model small enough to do it often: what it writes, what survives, what is refused."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lbllm_compile.codegen import progress
from lbllm_compile.codegen.errors import KernelError, LbllmError
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.ir import exact, graph_json
from lbllm_compile.passes.ir.program import Program, set_attribute
from rich.table import Table
from stages import Notes

import lbllm_compile
from lbllm_compile import artifact, calibration, driver, dumps, evaluate, frontend, inspect, plan, recipe
from lbllm_compile.checkpoint import WorkDir, WorkDirError
from lbllm_compile.html_report import page
from lbllm_compile.job import check_named, read_job
from lbllm_compile.native import program as native
from lbllm_compile.native.language import COMPILED_CONTEXT
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.report import terminal
from lbllm_compile.runtime.model import CompiledModel

ROOT = Path(__file__).resolve().parent.parent

SMALL = recipe.Preset(
    sequences=16,
    sequence_length=32,
    validation_sequences=4,
    distill_epochs=1,
    activate_steps=4,
    finetune_steps=4,
    tune_trials=2,
    tune_seconds=5,
)

MODEL = f"""
import runpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

example = runpy.run_path({str(ROOT / "examples" / "tiny_llama.py")!r})
tokenizer = example["tokenizer"]

def build_model():
    config = LlamaConfig(vocab_size=259, hidden_size=72, intermediate_size=100, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config)
"""


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Calibration text and tuning results of these tests stay out of the user's caches."""
    old = os.environ.get("LBLLM_CACHE_DIR")
    os.environ["LBLLM_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["LBLLM_CACHE_DIR"]
    else:
        os.environ["LBLLM_CACHE_DIR"] = old


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "quick", SMALL)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.py"
    path.write_text(MODEL)
    return path


def options(model_file, out, **changes):
    return CompileOptions(model=str(model_file), out=out, preset="quick", **changes)


def generators():
    """The state of every global generator."""
    _, words, *rest = np.random.get_state()
    return random.getstate(), (words.tolist(), *rest), torch.get_rng_state().tolist()


def files(path):
    """Every file that a name stands for, and its size."""
    found = path.rglob("*") if path.is_dir() else [path]
    return {file: file.stat().st_size for file in found if file.is_file()}


class Disk:
    """What goes to disk for good, in order: ``("synced", path, bytes)``, ``("renamed", {file: bytes}, from, to)`` and
    ``("removed", work directory, 0)``."""

    def __init__(self, patch):
        self.events = []
        fsync, remove = os.fsync, WorkDir.remove

        def synced(handle):
            fsync(handle)
            self.events.append(("synced", Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle).st_size))

        def renames(rename):
            def renamed(old, new, **places):
                held = files(Path(old))
                rename(old, new, **places)
                self.events.append(("renamed", held, Path(old), Path(new)))

            return renamed

        def removed(work):
            self.events.append(("removed", work.path, 0))
            remove(work)

        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", renames(os.rename))
        patch.setattr(os, "replace", renames(os.replace))
        patch.setattr(WorkDir, "remove", removed)


@pytest.fixture(scope="session")
def compilation(tmp_path_factory, model_file, caches):
    """A compile's report, the state of the global generators before and after it, and what it did to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.PRESETS, "quick", SMALL)
        directory = tmp_path_factory.mktemp("compiled")
        disk = Disk(patch)
        before = generators()
        report = driver.compile(options(model_file, directory / "out", dump_dir=directory / "dumps"))
        return report, before, generators(), disk


@pytest.fixture(scope="session")
def compiled(compilation):
    return compilation[0]


def test_the_report_tells_what_was_done(compiled):
    names = [r.name for r in compiled.records]
    assert names == [
        "canonicalize",
        "annotate",
        "smooth",
        "observe",
        "ptq",
        "distill",
        "activate",
        "finetune",
        "head",
        "merge",
        "lower",
        "cache",
        "cleanup",
    ]
    ptq = compiled.records[names.index("ptq")]
    assert len(ptq.rows) == 3 * 7
    sheet = compiled.sheet
    assert sheet["bytes_compiled"] < sheet["bytes_original"]
    assert 2 < sheet["bits_per_weight"] < 4
    assert sheet["kld_mean"] > 0 and sheet["decode_compiled"] > 0
    json.dumps(compiled.to_json(), allow_nan=False)


def test_every_pass_is_dumped_as_text_and_as_a_graph(compiled):
    dumps = sorted(p.name for p in (compiled.out.parent / "dumps").iterdir())
    assert dumps[4] == "005_ptq.txt" and len(dumps) == len(compiled.records)
    text = (compiled.out.parent / "dumps" / "011_lower.txt").read_text()
    assert "lbllm.bit_linear" in text and "decoder layer 2" in text
    assert len(list((compiled.out / "passes").iterdir())) == len(compiled.records)


def test_the_work_directory_is_gone_and_the_lock_tells_all(compiled):
    assert not compiled.out.with_name("out.lbllm-work").exists()
    lock = json.loads((compiled.out / "lbllm.lock").read_text())
    assert {"model", "calibration", "pipeline", "seed", "versions", "check"} <= lock.keys()
    assert "ptq{group=64" in lock["pipeline"]


def test_a_fresh_process_gives_the_recorded_tokens(compiled):
    script = textwrap.dedent(
        f"""
        import json, lbllm_compile
        from lbllm_compile.sheet import check_outputs
        model = lbllm_compile.load({str(compiled.out)!r})
        check = json.load(open({str(compiled.out / "lbllm.lock")!r}))["check"]
        import torch
        print(check_outputs(model, {{"input_ids": torch.tensor([check["prompt"]])}}) == check)
        """
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


def test_what_gets_its_name_is_on_disk_and_checkpoints_go_last(compilation):
    """A crash of the machine at any point leaves names of whole files, and the work or what came of it."""
    out, events = compilation[0].out, compilation[-1].events
    renamed = {}
    for place, (kind, *event) in enumerate(events):
        if kind != "renamed":
            continue
        held, old, new = event
        synced = {path: size for known, path, size in (e for e in events[:place] if e[0] == "synced")}
        assert held == {file: synced.get(file) for file in held}, f"{new} may not be on disk"
        renamed[new] = place, {file.relative_to(old).as_posix() for file in held}
    put, inside = renamed[out]
    assert {"model.safetensors", "graph.json", "manifest.json"} <= inside
    programs = [names for new, (_, names) in renamed.items() if new.parent == native.programs_directory()]
    assert any({native.WEIGHTS, native.LIBRARY, native.DESCRIPTION, native.SEAL} == names for names in programs)
    gone = [event[:2] for event in events].index(("removed", out.with_name("out.lbllm-work")))
    assert ("synced", out.parent) in [event[:2] for event in events[put:gone]]


class TestWhatRuns:
    """It is the lowered graph that runs, on generated kernels, and nothing else."""

    def test_negating_the_head_changes_the_text(self, compiled):
        model = lbllm_compile.load(compiled.out)
        prompt = model.encode("Hello")
        before = [t[0] for t in model.generate_ids([prompt], stop=(), sampling=sampling())]
        program = model.program.copy()
        output = program.graph.output_node()
        with program.graph.inserting_before(output):
            negated = program.graph.call_function(torch.ops.aten.neg.default, (output.args[0],))
        output.args = (negated,)
        program.module.recompile()
        changed = CompiledModel(program, model.kernels)
        after = [t[0] for t in changed.generate_ids([prompt], stop=(), sampling=sampling())]
        assert after != before
        lowest = model.logits(torch.tensor([prompt]))[0, -1].argmin()
        assert after[0] == int(lowest)

    def test_without_the_kernel_library_there_is_no_slow_path(self, compiled):
        script = textwrap.dedent(
            f"""
            import sys
            sys.modules["tvm"] = None
            import lbllm_compile
            from lbllm_compile.codegen.errors import KernelError
            try:
                lbllm_compile.load({str(compiled.out)!r})
            except KernelError as error:
                print(error)
            """
        )
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert "TVM" in result.stdout and "\n" not in result.stdout.strip(), result.stderr

    def test_a_kernel_that_was_not_built_is_an_error(self, compiled):
        from lbllm_compile.codegen.cpu.build import KernelSet
        from lbllm_compile.codegen.targets import Target

        nothing = KernelSet.build([], [], Target.parse("cpu"), trials=0)
        model = lbllm_compile.load(compiled.out)
        with pytest.raises(KernelError, match="no kernel was built"):
            CompiledModel(model.program, nothing)


def sampling():
    from lbllm_compile.runtime import Sampling

    return Sampling(max_new_tokens=6)


def stored_simulation(out, model, kind):
    """The simulated program: the stored graph after ``merge``, on the weights of what runs."""
    stored = next((out / "passes").glob("*_merge.json"))
    return Program(graph_json.loads(stored.read_bytes(), dict(model.program.parameters())), kind=kind)


def test_lowered_and_simulated_agree(compiled):
    model = lbllm_compile.load(compiled.out)
    simulated = stored_simulation(compiled.out, model, "causal-lm")
    ids = torch.randint(0, 259, (8, 48), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)}
    expected, actual = exact.run(simulated, inputs).log_softmax(-1), model.logits(ids).log_softmax(-1)
    kld = (expected.exp() * (expected - actual)).sum(-1)
    assert float(kld.mean()) <= 1e-3
    assert float((expected.argmax(-1) == actual.argmax(-1)).float().mean()) >= 0.99


@pytest.mark.slow
def test_a_killed_compile_resumes_and_gives_the_same_bytes(compiled, model_file, tmp_path):
    out = tmp_path / "out"
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from lbllm_compile import driver, recipe
        from lbllm_compile.options import CompileOptions
        recipe.PRESETS["quick"] = recipe.Preset(**{SMALL.model_dump()!r})
        driver.compile(CompileOptions(model={str(model_file)!r}, out=Path({str(out)!r}), preset="quick"))
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    stages = tmp_path / "out.lbllm-work" / "stages"
    deadline = time.monotonic() + 300
    while len(list(stages.glob("*-distill/*.safetensors"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    notes = Notes()
    report = driver.compile(options(model_file, out), progress=notes)
    assert report.resumed >= 3 + 2
    assert (
        notes.said[0]
        == f"an interrupted compile goes on: {report.resumed} finished pieces of work are in '{out}.lbllm-work'"
    )
    for name in ("model.safetensors", "graph.json"):
        assert (out / name).read_bytes() == (compiled.out / name).read_bytes(), name


def test_an_unfinished_compile_of_something_else_is_refused(model_file, tmp_path):
    work = WorkDir(tmp_path / "out.lbllm-work", {"model": "another"})
    work.save("ptq", 0, {"x": torch.ones(1)}, {})
    work.release()
    with pytest.raises(WorkDirError, match=r"another.*model.*--fresh"):
        driver.compile(options(model_file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_global_generator_is_touched(compilation):
    _, before, after, _ = compilation
    assert before == after


def test_whatever_decides_the_weights_is_named_when_it_has_changed(model_file, tmp_path, monkeypatch):
    job = read_job(options(model_file, tmp_path / "out"))
    data = job.calibration_data(NoProgress())
    facts = job.fingerprint(data)
    other = job.program.copy()
    path, weight = next(iter(other.parameters()))
    set_attribute(other.module, path, weight + 1)
    coarser = recipe.passes(recipe.Choices(group=128), "cpu")
    changed = {
        "model": dataclasses.replace(job, program=other).fingerprint(data),
        "pipeline": dataclasses.replace(job, passes=coarser).fingerprint(data),
        "calibration": job.fingerprint(dataclasses.replace(data, sha256="another")),
        "seed": dataclasses.replace(job, options=dataclasses.replace(job.options, seed=1)).fingerprint(data),
    }
    monkeypatch.setattr("lbllm_compile.job.__version__", "another")
    changed["version"] = job.fingerprint(data)
    monkeypatch.undo()
    monkeypatch.setattr("lbllm_compile.job.device_of", lambda options: torch.device("cuda"))
    changed["device"] = job.fingerprint(data)
    work = WorkDir(tmp_path / "w", facts)
    work.save("01-ptq", 0, {"x": torch.ones(1)}, {})
    work.release()
    for name, different in changed.items():
        with pytest.raises(WorkDirError, match=f"with another {name}; pass --fresh"):
            WorkDir(tmp_path / "w", different)


def test_a_compile_says_what_sets_it_apart_from_the_artifact_it_replaces(compiled, model_file, tmp_path):
    out = Path(shutil.copytree(compiled.out, tmp_path / "out"))
    lock = json.loads((out / "lbllm.lock").read_text())

    def said(chosen, sha256=lock["calibration"]):
        data = calibration.CalibrationSet([], [], {}, "book.txt", sha256)
        job = read_job(chosen)
        return job.replaced(job.fingerprint(data), data)

    assert said(options(model_file, out)) == (
        f"'{out}' holds an artifact that was compiled alike; this compile replaces it when it is done"
    )
    other = said(options(model_file, out, group=128, seed=3), "another")
    assert "with other calibration (the model's own samples, now book.txt), pipeline (ptq," in other
    assert "now ptq{group=128},activate{" in other and "seed (0, now 3); this compile replaces it" in other
    assert "distill" not in other and "\n" not in other
    assert said(options(model_file, tmp_path / "elsewhere")) == ""
    (out / "lbllm.lock").write_text("{}")
    assert "holds an artifact that is damaged or of another version" in said(options(model_file, out))


def test_a_second_compile_into_one_place_says_so_every_time(tmp_path, monkeypatch):
    """To who listens as a note, to others as a warning: each time, not once a process."""
    monkeypatch.setitem(recipe.PRESETS, "default", SMALL)

    def compile_again(place, listener):
        inputs = torch.ones(4, 5, 70)
        text = 'canonicalize,annotate{keep_dense="*"},lower,cleanup'
        given = CompileOptions(Averaged(), example_inputs=inputs, pipeline=text, out=tmp_path / place)
        driver.compile(given, progress=listener)

    def replaces(place):
        return f"'{tmp_path / place}' holds an artifact that was compiled alike; this compile replaces it"

    notes = Notes()
    compile_again("a", notes)
    assert not any("holds an artifact" in said for said in notes.said)
    compile_again("a", notes)
    assert sum(said.startswith(replaces("a")) for said in notes.said) == 1
    with pytest.warns(progress.LbllmWarning) as caught:
        for _ in range(2):
            compile_again("a", None)
    assert [str(item.message).startswith(replaces("a")) for item in caught] == [True] * 2


def test_a_context_reaches_the_capture_and_what_it_means_is_said(tmp_path):
    path = tmp_path / "dynamic.py"
    rope = "rope_parameters={'rope_type': 'dynamic', 'factor': 4.0, 'rope_theta': 100.0}, num_hidden_layers=1,"
    path.write_text(MODEL.replace("num_hidden_layers=3,", rope))
    notes = Notes()
    job = read_job(CompileOptions(path, context=200, out=tmp_path / "out"), notes)
    assert job.program.config[COMPILED_CONTEXT] == job.model.config[COMPILED_CONTEXT] == 200
    assert notes.said == [
        "the dynamic rotary frequencies are those of a sequence of 200 tokens; shorter ones get them too, where the"
        " original model would compute its own for every length"
    ]
    with pytest.warns(progress.LbllmWarning, match="frequencies are those of sequences of up to 128 tokens"):
        assert read_job(CompileOptions(path, out=tmp_path / "out")).program.config[COMPILED_CONTEXT] == 128


def test_who_does_not_listen_is_warned_once_of_each_kind(monkeypatch):
    monkeypatch.setattr(progress, "_warned", set())
    with pytest.warns(progress.LbllmWarning) as caught:
        for listener in (None, NoProgress()):
            progress.warn(listener, "slow", "this is slow")
            progress.warn(listener, "wrong", f"this is odd: {listener}")
            progress.warn(listener, None, "this counts every time")
    every = "this counts every time"
    assert [str(item.message) for item in caught] == ["this is slow", "this is odd: None", every, every]
    notes = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress.warn(notes, "slow", "this is slow")
        progress.warn(notes, "slow", "that is slow")
    assert notes.said == ["this is slow", "that is slow"]


def test_a_plan_and_a_compile_count_the_original_alike(compiled, model_file):
    planned = plan.make_plan(CompileOptions(model_file, preset="quick"))
    assert planned.parameters * 2 == compiled.sheet["bytes_original"]
    assert planned.artifact == pytest.approx(compiled.sheet["bytes_compiled"], rel=0.05)
    smaller = f"{compiled.sheet['bytes_original'] / planned.artifact:.1f} times smaller; the original in 16 bit"
    stream = io.StringIO()
    for part in plan.render(planned):
        terminal.make_console(file=stream).print(part)
    assert smaller in stream.getvalue()


def test_an_artifact_keeps_what_its_passes_measured(compiled):
    measured = {item.name: item for item in artifact.measured_passes(compiled.out)}
    assert list(measured) == [record.name for record in compiled.records]
    assert len(measured["ptq"].rows) == 3 * 7 and all(0 < row["error"] < 1 for row in measured["ptq"].rows)
    for row in measured["distill"].rows:
        assert row["after"] <= row["start"] and 0 <= row["sign_flips"] < 1 and 0 <= row["bitmap_flips"] < 1
    assert not any("seconds" in row for item in measured.values() for row in item.rows)
    parts, document = inspect.look(compiled.out, layer=1)
    titles = [str(part.title) for part in parts if isinstance(part, Table)]
    assert [t for t in titles if t.startswith("distill") and t.endswith("by decoder layer")]
    assert [item["name"] for item in document["measured"]] == list(measured)
    assert [item["name"] for item in inspect.look(compiled.out, "distill")[1]["measured"]] == ["distill"]


def test_a_page_that_cannot_be_made_fails_no_compile(tmp_path, monkeypatch):
    chosen = CompileOptions(
        model=Averaged(),
        example_inputs=torch.ones(4, 5, 70),
        pipeline='canonicalize,annotate{keep_dense="*"},lower,cleanup',
        out=tmp_path / "my out",
    )
    driver.compile(chosen)
    assert (tmp_path / "my out" / "report.html").is_file()

    def broken(contents):
        raise KeyError("a figure")

    monkeypatch.setattr(page, "render", broken)
    notes = Notes()
    report = driver.compile(dataclasses.replace(chosen, seed=3), progress=notes)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["my out"], "the work directory is gone"
    assert artifact.read_report(report.out).to_json() == json.loads(json.dumps(report.to_json()))
    assert not (report.out / "report.html").exists(), "no page of the older artifact stands beside the newer one"
    (said,) = (text for text in notes.said if "report.html" in text)
    assert f"(KeyError: 'a figure'); run `lbllm-compile report '{report.out}'` to try again" in said
    monkeypatch.undo()
    (report.out / "report.html").write_text("mine")
    notes = Notes()
    driver.compile(chosen, progress=notes)
    assert any("holds a report.html of yours" in text for text in notes.said)
    assert (report.out / "report.html").read_text() == "mine"


def test_without_a_sheet_the_artifact_is_checked_and_nothing_is_said_that_was_not_measured(tmp_path, monkeypatch):
    chosen = CompileOptions(
        model=Averaged(),
        example_inputs=torch.ones(4, 5, 70),
        pipeline='canonicalize,annotate{keep_dense="*"},lower,cleanup',
        out=tmp_path / "out",
        no_sheet=True,
    )
    report = driver.compile(chosen)
    assert "relative_error" not in report.sheet and report.sheet["bytes_compiled"] > 0
    parts, document = inspect.look(report.out)
    assert document["report"]["sheet"]["not_measured"] == "quality and speed"
    (sheet,) = (part for part in parts if isinstance(part, Table) and part.title == "Speed and size")
    assert [str(column._cells[-1]) for column in sheet.columns[:3]] == ["quality and speed", "", "not measured"]
    shown = (report.out / "report.html").read_text()
    assert "did not measure the quality" in shown and "did not measure the speed" in shown
    asked = iter([{"sha256": "of the compile"}, {"sha256": "of what was loaded"}])
    monkeypatch.setattr(driver.sheet, "check_outputs", lambda *_: next(asked))
    with pytest.raises(driver.sheet.SelfCheckError, match="does not give what the compile gave"):
        driver.compile(chosen, progress=Notes())


def test_an_artifact_keeps_the_report_of_its_compile(compiled, tmp_path):
    stored = artifact.read_report(compiled.out)
    assert stored.to_json() == json.loads(json.dumps(compiled.to_json()))
    assert stored.seconds["passes"] > 0 and stored.sheet["decode_compiled"] > 0 and stored.peak_memory > 1 << 20
    parts, document = inspect.look(compiled.out)
    assert document["report"]["sheet"] == dict(compiled.sheet)
    titles = [str(part.title) for part in parts if isinstance(part, Table)]
    assert {"Passes", "What the stages measured", "Inputs and state", "Speed and size"} <= set(titles)
    out = Path(shutil.copytree(compiled.out, tmp_path / "out"))
    file = out / "report.json"
    document = json.loads(file.read_text())
    digest = document["artifact"]
    for key, wrong in (("passes", [{}]), ("sheet", 3), ("seconds", {"passes": "long"}), ("peak_memory", None)):
        file.write_text(json.dumps({**document, key: wrong}))
        with pytest.raises(artifact.ArtifactError, match=r"report\.json' is damaged; remove it"):
            artifact.read_report(out)
    file.write_text(json.dumps({**document, "artifact": "of another"}))
    assert artifact.read_report(out) is None
    assert artifact.write_report(digest, dataclasses.replace(compiled, out=out))
    assert artifact.read_report(out).to_json()["sheet"] == stored.to_json()["sheet"]
    file.write_text("mine")
    assert artifact.read_report(out) is None
    assert not artifact.write_report(digest, dataclasses.replace(compiled, out=out)) and file.read_text() == "mine"


def test_an_evaluation_says_what_it_scored(compiled, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All that glitters is not gold. " * 20)
    figures = evaluate.evaluate(compiled.out, text, seq_len=64, chunks=3, teacher=None)
    assert {k: figures[k] for k in ("text", "seq_len", "chunks", "tokens")} == {
        "text": str(text),
        "seq_len": 64,
        "chunks": 3,
        "tokens": 3 * 63,
    }
    assert figures["ppl"] > 1 and figures["ppl_teacher"] > 1 and figures["kld_p99"] >= figures["kld_mean"] > 0
    first, *layers = [part for part in evaluate.render(compiled.out, figures) if isinstance(part, Table)]
    assert "3 chunks of 64 tokens, 189 tokens scored" in str(first.title) and len(layers) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 48}, "--group cannot be 48; choose 32, 64, 128, 256"),
        ({"act_bits": 3}, "--act-bits cannot be 3"),
        ({"kv_bits": 5}, "--kv-bits cannot be 5"),
        ({"preset": "qick"}, "no preset 'qick'.*did you mean 'quick'"),
        ({"recipe": "lblm"}, "no recipe 'lblm'.*did you mean 'lbllm'"),
        ({"device": "gpu"}, "--device cannot be 'gpu'"),
        ({"pipeline": "ptq", "group": 64}, "--group and --pipeline contradict"),
        ({"target": "cpu:avx9"}, "unknown target 'cpu:avx9'"),
        ({"keep_dense": ("*.q_prj",)}, "matches no linear.*did you mean"),
    ],
)
def test_wrong_options_are_one_sentence(model_file, tmp_path, changes, message):
    wrong = dataclasses.replace(options(model_file, tmp_path / "out"), **changes)
    with pytest.raises(LbllmError, match=message) as caught:
        driver.compile(wrong)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_models_own_recipe_is_used_and_options_win(tmp_path):
    path = tmp_path / "with_recipe.py"
    path.write_text(MODEL + "\nrecipe = {'group': 128, 'act_bits': 8, 'preset': 'quick'}\n")
    job = read_job(CompileOptions(model=str(path), out=tmp_path / "out", act_bits=16))
    text = pipeline.render(job.passes, full=True)
    assert "ptq{group=128" in text and "activate{bits=16" in text
    path.write_text(MODEL + "\nrecipe = {'gruop': 128}\n")
    with pytest.raises(LbllmError, match=r"no option 'gruop'.*did you mean 'group'"):
        read_job(CompileOptions(model=str(path), out=tmp_path / "out"))


def test_a_pass_that_only_the_models_recipe_runs_may_be_printed_after(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "default", SMALL.model_copy(update={"finetune_steps": 0}))
    path = tmp_path / "with_recipe.py"
    path.write_text(MODEL + "\nrecipe = {'preset': 'quick'}\n")
    named = CompileOptions(model=str(path), out=tmp_path / "out", print_after=("finetune",))
    assert "finetune" in [p.name for p in read_job(named).passes]


def test_the_rehearsal_comes_before_sampling_and_only_once(model_file, tmp_path, monkeypatch):
    from lbllm_compile import calibration, preflight
    from lbllm_compile.checkpoint import WorkDir

    calls = []

    def rehearse(program, passes, probe, *rest, **options):
        calls.append("rehearse")
        assert probe["input_ids"].shape == calibration.PROBE_SHAPE and int(probe["input_ids"].max()) < 259

    def sample(*rest, **options):
        calls.append("sample")
        raise LbllmError("enough")

    monkeypatch.setattr(preflight, "rehearse", rehearse)
    monkeypatch.setattr(calibration, "collect", sample)
    work = WorkDir(tmp_path / "w", {"model": "another"})
    work.save("ptq", 0, {"x": torch.ones(1)}, {})
    work.release()
    resumed = options(model_file, tmp_path / "out", work_dir=tmp_path / "w")
    for chosen in (dataclasses.replace(resumed, work_dir=None), resumed, dataclasses.replace(resumed, fresh=True)):
        with pytest.raises(LbllmError, match="enough"):
            driver.compile(chosen)
    assert calls == ["rehearse", "sample", "sample", "rehearse", "sample"]


def test_a_model_that_does_not_go_through_costs_no_sampling(model_file, tmp_path, monkeypatch):
    from lbllm_compile import calibration

    monkeypatch.setattr(calibration, "collect", None)
    text = "canonicalize,annotate,observe,ptq{group=64},activate{group=128},head,lower,cache"
    with pytest.raises(LbllmError, match="group cannot be 128"):
        driver.compile(options(model_file, tmp_path / "out", pipeline=text))


def test_an_interrupt_says_what_is_kept(model_file, tmp_path, monkeypatch):
    def stop(job, data, work, *rest):
        work.save("ptq", 0, {"x": torch.ones(1)}, {})
        raise KeyboardInterrupt

    monkeypatch.setattr(driver.preflight, "rehearse", lambda *_, **__: None)
    monkeypatch.setattr(driver, "_transform", stop)
    with pytest.raises(driver.Interrupted) as caught:
        driver.compile(options(model_file, tmp_path / "out"))
    assert caught.value.kept == 1


def test_paths_may_be_text_and_text_paths():
    chosen = CompileOptions(model=Path("m.py"), out="o", work_dir="w", dump_dir="d")
    assert (chosen.model, chosen.out, chosen.work_dir, chosen.dump_dir) == ("m.py", Path("o"), Path("w"), Path("d"))
    assert CompileOptions("m.py", calibration=Path("texts.txt")).calibration == "texts.txt"


@pytest.mark.parametrize("option", ["scheme", "keep_dense", "print_after"])
def test_one_text_may_stand_where_several_may(option):
    for given, kept in (("*.a", ("*.a",)), (["*.a", "b"], ("*.a", "b")), (("*.a",), ("*.a",)), ([], ())):
        assert getattr(CompileOptions("m.py", **{option: given}), option) == kept


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"scheme": ("*.a: act=8", 3)}, "--scheme cannot be ('*.a: act=8', 3); give one text or a tuple of them"),
        ({"keep_dense": {"*.a": True}}, "--keep-dense cannot be {'*.a': True}; give one text or a tuple of them"),
        ({"print_after": None}, "--print-after cannot be None; give one text or a tuple of them"),
        ({"seed": "1"}, "--seed cannot be '1'; give a whole number"),
        ({"seed": None}, "--seed cannot be None; give a whole number"),
        ({"context": "512"}, "--context cannot be '512'; give a whole number"),
        ({"context": 512.0}, "--context cannot be 512.0; give a whole number"),
        ({"group": True}, "--group cannot be True; give a whole number"),
        ({"fresh": "yes"}, "--fresh cannot be 'yes'; give True or False"),
        ({"target": ("cpu", "cuda")}, "--target cannot be ('cpu', 'cuda'); give text"),
        ({"preset": 1}, "--preset cannot be 1; give text"),
        ({"work_dir": 7}, "--work-dir cannot be 7; give a path"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_one_sentence(given, expected):
    with pytest.raises(OptionError) as caught:
        CompileOptions("m.py", **given)
    assert str(caught.value) == expected


def test_whole_numbers_may_be_numpys():
    chosen = CompileOptions("m.py", seed=np.int64(3), context=np.int32(64))
    assert (type(chosen.seed), chosen.seed, type(chosen.context), chosen.context) == (int, 3, int, 64)


class TestDumps:
    """``--dump-dir`` replaces earlier dumps and touches nothing else, and nothing before the long work starts."""

    def prepare(self, model_file, directory):
        return read_job(options(model_file, directory / "out", dump_dir=directory / "dumps"))

    def test_a_users_files_are_left_alone(self, model_file, tmp_path):
        (tmp_path / "dumps").mkdir()
        (tmp_path / "dumps" / "2024-taxes.txt").write_text("mine")
        with pytest.raises(LbllmError, match=r"holds other files.*2024-taxes\.txt"):
            self.prepare(model_file, tmp_path)
        with pytest.raises(LbllmError, match="holds other files"):
            dumps.Dumps(tmp_path / "dumps")
        assert (tmp_path / "dumps" / "2024-taxes.txt").read_text() == "mine"

    def test_a_refused_compile_writes_and_deletes_nothing(self, model_file, tmp_path):
        self.prepare(model_file, tmp_path)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "dumps").mkdir()
        (tmp_path / "dumps" / "001_ptq.txt").write_text("earlier")
        self.prepare(model_file, tmp_path)
        assert (tmp_path / "dumps" / "001_ptq.txt").exists()
        dumps.Dumps(tmp_path / "dumps")
        assert list((tmp_path / "dumps").iterdir()) == []


@pytest.mark.parametrize(
    ("out", "work", "dumps"),
    [("o", "o", None), ("o", "o/w", None), ("w/o", "w", None), ("o", None, "o"), ("o", None, "o/d"), ("d/o", None, "d"),
     ("o", "w", "w"), ("o", None, "o.lbllm-work"), (None, None, "small-lbllm")],
)  # fmt: skip
def test_directories_that_would_get_in_each_others_way_are_refused(model_file, tmp_path, monkeypatch, out, work, dumps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frontend, "capture", None)
    with pytest.raises(LbllmError, match="would lie inside one another"):
        read_job(options(model_file, out, work_dir=work, dump_dir=dumps))


def test_checking_a_work_directory_leaves_it_as_it_is(model_file, tmp_path):
    from lbllm_compile.checkpoint import WorkDir

    absent, used = tmp_path / "a" / "b", tmp_path / "used"
    work = WorkDir(used, {"model": "another"})
    work.save("ptq", 0, {"x": torch.ones(1)}, {})
    work.release()
    before = sorted(tmp_path.rglob("*"))
    for path in (absent, used):
        chosen = options(model_file, None, work_dir=path)
        check_named(chosen, recipe.passes(recipe.choices(chosen), chosen.target))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plain_module_compiles_and_loads(tmp_path):
    report = driver.compile(options(ROOT / "examples" / "mlp.py", tmp_path / "mlp"))
    model = lbllm_compile.load(tmp_path / "mlp")
    x = torch.randn((3, 259), generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (3, 33)
    assert 0 < report.sheet["relative_error"] < 1
    simulated = stored_simulation(tmp_path / "mlp", model, "module").run({"x": x})
    assert float((model(x) - simulated).norm() / simulated.norm()) <= 1e-4


class Averaged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.linear = torch.nn.Linear(70, 40)

    def forward(self, x):
        return torch.relu(self.linear(x)).mean(1)


def test_an_object_is_compiled_and_resumes_like_a_file(tmp_path):
    inputs = torch.randn(4, 5, 70, generator=torch.Generator().manual_seed(0))
    chosen = CompileOptions(
        model=Averaged(),
        example_inputs=inputs,
        calibration_inputs=[inputs + i for i in range(9)],
        pipeline='canonicalize,annotate{keep_dense="*"},lower,cleanup',
        out=tmp_path / "out",
    )
    report = lbllm_compile.compile(chosen)
    torch.testing.assert_close(lbllm_compile.load(report.out)(x=inputs), chosen.model(inputs))
    lock = json.loads((report.out / "lbllm.lock").read_text())
    assert lock["source"] is None and lock["calibration_source"] == "the given inputs"
    assert lock["calibration_object"] == "calibration_inputs"
    again = dataclasses.replace(chosen, model=Averaged())
    other = dataclasses.replace(chosen, model=Averaged().requires_grad_(False))
    other.model.linear.weight.mul_(2)
    facts = []
    for job in map(read_job, (again, other)):
        facts.append(job.fingerprint(job.calibration_data(NoProgress())))
    assert all(lock[name] == value for name, value in facts[0].items())
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"model"}


def test_a_language_model_comes_with_its_tokenizer_and_texts_as_objects(model_file, tmp_path, monkeypatch):
    named = frontend.load(model_file)
    chosen = CompileOptions(
        model=named.module, tokenizer=named.tokenizer, texts=["All is well that ends well. " * 400], preset="quick"
    )
    monkeypatch.chdir(tmp_path)
    job = read_job(chosen)
    assert job.out == Path("LlamaForCausalLM-lbllm") and job.program.tokenizer is named.tokenizer
    data = job.calibration_data(NoProgress())
    assert data.source == "the given texts" and data.tokens == SMALL.sequences * SMALL.sequence_length
    assert job.fingerprint(data)["model"] == frontend.program_hash(frontend.capture(named))
    assert plan.make_plan(chosen).parameters == sum(p.numel() for p in named.module.parameters())
    with pytest.raises(LbllmError, match="calibration and texts contradict"):
        dataclasses.replace(chosen, calibration="a.txt")


def test_what_was_an_object_is_no_teacher_later(compiled):
    loaded = artifact.load(compiled.out)
    notes = Notes()
    forgotten = dataclasses.replace(loaded, lock={**loaded.lock, "source": None})
    assert evaluate.find_teacher(forgotten, None, notes) is None
    assert notes.said == ["no comparison with the original model: it was an object in memory; name it with --teacher"]
