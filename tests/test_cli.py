"""The command line: verbs, where output goes, exit codes, and what people see while they wait."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import zoo
from lbllm_compile.codegen.cuda import compiler as cuda_compiler
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import parse_targets
from lbllm_compile.passes import canonicalize, pipeline
from lbllm_compile.passes.annotate import Annotate, LinearInfo, linears
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir.program import LAYER, Program, set_attribute
from rich.console import Console
from torch import fx
from typer.testing import CliRunner, Result

from lbllm_compile import cli, doctor, driver, footprint, frontend, plan, recipe
from lbllm_compile.options import CompileOptions, options
from lbllm_compile.plain import plain
from lbllm_compile.records import CompileReport
from lbllm_compile.report import catalogue, graph, stages, summary, terminal

ROOT = Path(__file__).resolve().parent.parent


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args), prog_name="lbllm-compile")


# Verbs


def test_the_first_word_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(options: CompileOptions, **_: object) -> None:
        seen.append(options)
        raise LbllmError("enough")

    monkeypatch.setattr(driver, "compile", stop)
    for args in (["model.py"], ["compile", "model.py"], ["compile", "compile"], ["./run"], ["--seed", "3", "model.py"]):
        result = invoke(*args)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", "lbllm-compile: enough\n")
    assert [o.model for o in seen] == ["model.py", "model.py", "compile", "./run", "model.py"]
    assert [o.seed for o in seen] == [0, 0, 0, 0, 3]


def test_every_option_reaches_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompileOptions] = []

    def stop(options: CompileOptions, **_: object) -> None:
        seen.append(options)
        raise LbllmError("enough")

    monkeypatch.setattr(driver, "compile", stop)
    line = (
        "model.py --target cuda:sm_90 --out o --recipe lbllm --preset best --pipeline annotate --calibration c.txt"
        " --group 32 --act-bits 8 --kv-bits 16 --keep-dense a.* --keep-dense b --device cpu --work-dir w --seed 7"
        " --dump-dir d --print-after ptq --time-passes --fresh --json --context 77 --no-sheet --fallback dense"
    )
    invoke(*line.split(), "--scheme", "a.*: act=8", "--scheme", "b: group=32")
    assert seen == [
        CompileOptions(
            model="model.py",
            target="cuda:sm_90",
            out=Path("o"),
            recipe="lbllm",
            preset="best",
            pipeline="annotate",
            calibration="c.txt",
            group=32,
            act_bits=8,
            kv_bits=16,
            scheme=("a.*: act=8", "b: group=32"),
            keep_dense=("a.*", "b"),
            device="cpu",
            work_dir=Path("w"),
            seed=7,
            context=77,
            dump_dir=Path("d"),
            print_after=("ptq",),
            time_passes=True,
            fresh=True,
            no_sheet=True,
            fallback="dense",
        )
    ]


def shown_help(*verb: str) -> str:
    """The help of a verb as one line, without its frames."""
    text = invoke(*verb, "--help").stdout
    return " ".join(word for word in text.split() if word.strip("│╭╮╰╯─"))


def test_every_option_is_in_the_help_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    whole = shown_help("compile")
    for name, option in options().items():
        assert " ".join(option.flag.help.split()) in whole, name
        assert name == "model" or f"--{name.replace('_', '-')} " in whole
    for default in ("lbllm", "64; 128 in lbllm-paper and bwa", "auto", "NAME-lbllm"):
        assert f"[default: {default}]" in whole
    assert "[default: bit]" in shown_help("tune", "search")


def test_verbs_describe_the_options_they_share_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known = options()
    look = {"dump_dir", "print_after", "time_passes"}
    lacking = {
        "plan": {"fallback", "out", "work_dir", "seed", "fresh", "no_sheet"} | look,
        "preflight": {"fallback", "out", "work_dir", "fresh", "no_sheet"} | look,
        "ablate": {"target", "pipeline", "bits", "max_kl", "budget_over", "fallback", "out", "no_sheet"} | look,
    }
    for verb, absent in lacking.items():
        text = shown_help(verb)
        assert {n for n, option in known.items() if " ".join(option.flag.help.split()) not in text} == absent, verb


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lbllm-compile', '--help']\n"
        "from lbllm_compile import cli\n"
        "try: cli.main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print([m for m in ('torch', 'tvm', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    for verb in ("compile", "plan", "preflight", "run", "eval", "inspect", "explain", "passes", "targets", "doctor"):
        assert f" {verb} " in done.stdout


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lbllm_compile", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.1.0\n", "")


# Errors


@pytest.mark.parametrize("error", ["OSError", "ImportError"])
def test_the_doctor_examines_a_machine_whose_torch_does_not_load(tmp_path: Path, error: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}('libcudart.so: cannot open shared object file')\n")
    done = subprocess.run(
        [sys.executable, "-m", "lbllm_compile", "doctor", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["torch"]["status"] == "missing"
    assert "libcudart.so" in findings["torch"]["cost"]
    assert "pip install --force-reinstall torch" in findings["torch"]["cost"]
    assert findings["CUDA device"]["value"] == "unknown"
    assert {"CPU", "threads", "memory", "C compiler", "TVM", "disk, kernel cache"} <= findings.keys()
    assert all(f["cost"] for f in findings.values() if f["status"] != "ok")


def test_a_prompt_on_standard_input_must_be_utf8() -> None:
    args = ["run", "nowhere", "--prompt", "-"]
    result = CliRunner().invoke(cli.app, args, input="grün".encode("latin-1"), prog_name="lbllm-compile")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "lbllm-compile: the prompt on standard input is not UTF-8 text (byte 2); convert it first, e.g. with iconv\n"
    )


def test_a_prompt_on_standard_input_is_utf8_in_every_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    from lbllm_compile import artifact
    from lbllm_compile.runtime import loader

    class Echo:
        config: Mapping[str, Any] = {}

        def tokenizer(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

        def stream(self, ids: list[int], **_: object) -> list[str]:
            return [chr(i) for i in ids]

    monkeypatch.setattr(artifact, "load", lambda _: SimpleNamespace(program=Echo()))
    monkeypatch.setattr(loader, "prepared", lambda *_, **__: Echo())
    args = ["run", "somewhere", "--prompt", "-", "--json"]
    result = CliRunner(charset="ascii").invoke(cli.app, args, input="grün".encode(), prog_name="lbllm-compile")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["text"] == "grün"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["plan", "m.py", "--grup", "3"], "there is no option --grup (did you mean --group?)"),
        (["plan", "m.py", "--group", "many"], "invalid value for '--group'"),
        (["plan"], "missing argument 'MODEL'"),
        (["inspect", "a", "b"], "unexpected extra argument"),
        (["passes", "lowr"], "there is no pass 'lowr' (did you mean 'lower'?)"),
        (["plna", "m.py"], "there is no verb or file 'plna' (did you mean 'plan'?)"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(args: list[str], expected: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


class Raises:
    """Stands in for :func:`lbllm_compile.driver.compile`."""

    def __init__(self, error: BaseException):
        self.error = error

    def __call__(self, options: object, *, progress: terminal.PlainProgress, **_: object) -> None:
        with progress.task("ptq", 30) as task:
            task.advance()
            task.advance()
            raise self.error


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (LbllmError("the moon is full; wait"), 2, "lbllm-compile: the moon is full; wait\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "lbllm-compile: cannot access '/x': Permission denied\n"),
        (ValueError("secret detail\nsecond line"), 1, "a bug in lbllm-compile (ValueError: secret detail)"),
        (KeyboardInterrupt(), 130, "interrupted in ptq, 3 of 30\n"),
        (driver.Interrupted(0), 130, "interrupted in ptq, 3 of 30\n"),
        (
            driver.Interrupted(4),
            130,
            "in ptq, 3 of 30; 4 finished pieces of work are kept, run the same command again to resume\n",
        ),
        (MemoryError(), 1, "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            1,
            "out of memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory"),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str) -> None:
    monkeypatch.setattr(driver, "compile", Raises(error))
    result = invoke("model.py", "--json")
    assert result.exit_code == code
    assert result.stdout == ""
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    traced = invoke("model.py", "--debug")
    assert traced.exit_code == code
    assert "Traceback" in traced.stderr


@pytest.mark.parametrize("verb", ["run", "eval", "plan"])
def test_only_a_compile_speaks_of_resuming(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lbllm_compile.artifact.load", stop)
    monkeypatch.setattr("lbllm_compile.evaluate.evaluate", stop)
    monkeypatch.setattr(plan, "make_plan", stop)
    args = {"run": ["--prompt", "x"], "eval": ["--text", "x"], "plan": []}[verb]
    result = invoke(verb, "somewhere", *args)
    assert (result.exit_code, result.stderr) == (130, "lbllm-compile: interrupted\n")


def test_an_interrupt_while_the_command_line_loads_is_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from lbllm_compile.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lbllm-compile: interrupted\n")


def test_what_a_model_prints_stays_off_stdout(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        "import torch\nprint('at import')\n"
        "def build_model():\n    print('in build_model')\n    return torch.nn.Sequential(torch.nn.Linear(40, 8))\n"
        "def example_inputs():\n    return torch.zeros(2, 40)\n"
    )
    result = invoke("plan", str(model), "--json")
    assert result.exit_code == 0, result.stderr
    (linear,) = json.loads(result.stdout)["linears"]
    assert (linear["shape"], linear["treatment"]) == ([8, 40], "W(1+1) g64, A4 with knees")
    assert "in build_model" in result.stderr


# Verbs that only look


def test_targets_doctor_and_passes_speak_json() -> None:
    targets = json.loads(invoke("targets", "--json").stdout)["targets"]
    assert {"cpu", "cpu:avx2", "cpu:generic", "cuda:sm_90"} <= {row["target"] for row in targets}
    findings = json.loads(invoke("doctor", "--json").stdout)["findings"]
    assert {"CPU features", "C compiler", "nvcc", "TVM", "memory"} <= {f["name"] for f in findings}
    assert all(f["cost"] for f in findings if f["status"] != "ok")
    (cuda,) = (row for row in targets if row["target"] == "cuda")
    assert cuda["means"] == ", ".join(t.name for t in parse_targets("cuda"))
    document = json.loads(invoke("passes", "--json").stdout)
    names = [p["name"] for p in document["passes"]]
    assert names[:6] == ["canonicalize", "annotate", "smooth", "budget", "outliers", "observe"]
    assert [r["name"] for r in document["recipes"]] == list(recipe.RECIPES)
    assert all(pipeline.parse(r["pipeline"]) and r["description"] for r in document["recipes"])


def test_every_recipe_is_offered() -> None:
    shown, offered = invoke("passes").stdout, invoke("compile", "--help").stdout
    assert all(f"--recipe {name}" in shown and name in offered for name in recipe.RECIPES)
    assert "--recipe" in invoke("ablate", "--help").stdout


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_every_pass_explains_itself(entry: catalogue.Entry) -> None:
    assert entry.summary.endswith(".")
    assert entry.snippet.startswith("Given:")
    assert "Result:" in entry.snippet
    assert not re.search(r"::$|:\w+:`|``", entry.description, re.MULTILINE)
    assert [o.name for o in entry.options if not o.meaning] == []
    assert pipeline.parse(entry.name)


def test_a_pass_is_shown_with_what_its_options_mean() -> None:
    result = invoke("passes", "distill")
    assert result.exit_code == 0, result.stderr
    assert "peak learning rate of latent weights, in standard deviations of the matrix" in result.stdout


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_doctor_finds_the_compiler_that_a_compile_would_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_compiler, "_nvrtc", lambda: None)
    (lacking, _) = (f for f in doctor._compilers() if f.name in ("nvcc", "NVRTC"))
    assert (lacking.status, lacking.value) == (
        "note",
        "not found",
    ) and "pip install 'lbllm-compile[cuda]'" in lacking.cost
    monkeypatch.setattr(cuda_compiler, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=lambda: (0, 12, 8)))
    found = {f.name: f for f in doctor._compilers()}
    assert (found["NVRTC"].status, found["NVRTC"].value) == ("ok", "12.8")
    assert found["nvcc"].cost == "CUDA kernels are compiled with NVRTC instead"
    monkeypatch.setenv(variable, str(tmp_path))
    found = {f.name: f for f in doctor._compilers()}
    assert found["nvcc"].value == f"Cuda compilation tools, release 99.1, {nvcc}" and found["nvcc"].status == "ok"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.2, V13.2.78'\n")
    found = {f.name: f for f in doctor._compilers()}
    assert found["nvcc"].status == "note" and "miscompiles" in found["nvcc"].cost


def facts(info: LinearInfo) -> tuple[str, int | None, int, str]:
    return info.role, info.layer, info.experts, info.reason


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_plan_says_what_annotate_does(name: str) -> None:
    model = zoo.user_model(name)
    program = frontend.capture(model)
    patterns = (f"*.{'h' if name == 'gpt2' else 'layers'}.1.*",)
    for item in (canonicalize.Canonicalize(), Annotate(keep_dense=patterns)):
        program = item.apply(program, PassContext()).program
    expected = {info.weight: (info.role, info.layer, info.experts, info.reason) for _, info in linears(program)}
    planned = {
        x.info.weight: (x.info.role, x.info.layer, x.info.experts, x.info.reason) for x in plan.survey(model, patterns)
    }
    if zoo.ZOO[name].tied:
        (head,) = planned.keys() - expected.keys()
        planned[next(iter(expected.keys() - planned.keys()))] = planned.pop(head)
    assert planned == expected


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("llama", "bits=16", 32),
        ("llama", "bits=8", 8),
        ("llama", "bits=4", 8),
        ("llama", "bits=4,embedding=4", 4),
        ("llama", "bits=2", 8),
        ("llama", "bits=2,embedding=4", 4),
        ("llama-tied", "bits=8", 0),
        ("llama-tied", "bits=4", 8),
        ("llama-tied", "bits=4,embedding=4", 0),
        ("llama-tied", "bits=2", 8),
        ("llama-tied", "bits=2,embedding=4", 4),
    ],
)
def test_the_plan_counts_the_embedding_beside_the_head(name: str, options: str, bits: int) -> None:
    """One that is tied to the head takes nothing, unless its form is another."""
    model = zoo.user_model(name)
    rows, columns = model.module.get_input_embeddings().weight.shape
    passes = pipeline.parse(f"head{{{options}}}")
    rest = 10 + (0 if zoo.ZOO[name].tied else rows * columns)
    scales = {8: 4 * rows, 4: 2 * rows * -(-columns // 64) + 16}.get(bits, 0)
    assert plan._rest_bytes(passes, rest, model, plan.survey(model)) == 40 + rows * columns * bits // 8 + scales


def test_the_plan_divides_by_the_speed_of_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"meta": 1e15, "cpu": 1e9}
    monkeypatch.setattr(plan, "matmul_speed", lambda dtype, device: speeds[device.type])
    options = CompileOptions(str(ROOT / "examples" / "tiny_llama.py"))
    monkeypatch.setattr(plan, "device_of", lambda options: torch.device("cpu"))
    slow = plan.make_plan(options)
    monkeypatch.setattr(plan, "device_of", lambda options: torch.device("meta"))
    fast = plan.make_plan(options)
    assert (fast.speed.device, fast.speed.products, fast.speed.host) == ("meta", 1e15, 1e9)
    for stage in ("stage 1, ptq", "stage 2, distill", "finetune"):
        assert fast.seconds[stage] == pytest.approx(slow.seconds[stage] / 1e6)
    assert fast.seconds["checks, artifact, sheet"] == slow.seconds["checks, artifact, sheet"]


def test_the_plan_predicts_for_targets_that_are_elsewhere() -> None:
    tiny = str(ROOT / "examples" / "tiny_llama.py")
    assert plan.make_plan(CompileOptions(tiny)).predicted == ()
    found = plan.make_plan(CompileOptions(tiny, target="cpu,cuda:sm_90"))
    assert [p.device for p in found.predicted][:2] == ["H200", "H100"]
    gaps = 1.3e-6 * (5 * found.layers + 3)
    assert all(gaps == pytest.approx(p.gaps_s) and p.gaps_s < p.seconds for p in found.predicted)
    assert {row["device"] for row in found.to_json()["predicted"]} == {p.device for p in found.predicted}
    titles = [getattr(part, "title", "") for part in plan.render(found)]
    assert any("PREDICTION, not measured" in str(title) for title in titles)
    assert plan.make_plan(CompileOptions(str(ROOT / "examples" / "mlp.py"), target="cuda:sm_90")).predicted == ()
    for limit in ({"bits": 2.5}, {"max_kl": 0.5}):
        assert plan.make_plan(CompileOptions(tiny, target="cuda:sm_90", **limit)).predicted == ()


def planned(pipeline: str) -> plan.Plan:
    """Of the tiny example for CUDA."""
    return plan.make_plan(
        CompileOptions(
            str(ROOT / "examples" / "tiny_llama.py"), target="cuda:sm_90", pipeline=pipeline + ",lower,cache"
        )
    )


def test_the_plan_predicts_nothing_where_a_linear_has_no_kernel() -> None:
    reason = "CUDA kernels take 4-bit and 8-bit activations"
    found = planned('canonicalize,annotate{scheme="*.layers.0.mlp.down_proj: act=16"},observe,ptq,activate,head')
    assert found.predicted == () and reason in found.unpredicted
    texts = [str(part) for part in plan.render(found)]
    assert any(text.startswith(f"No prediction of how long a token takes: {reason}") for text in texts)


def test_the_plan_predicts_every_linear_in_its_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[dict[LinearSpec, int], set[QuantizeSpec]]] = []

    def predictions(linears: Any, quantizers: Any, *_: object) -> list[Any]:
        given.append((dict(linears), set(quantizers)))
        return []

    monkeypatch.setattr(plan, "predictions", predictions)
    scheme = "*.layers.0.mlp.down_proj: act=8 act-group=0; lm_head: act-group=0; *.layers.1.*: dense"
    stages = "outliers{share=0.25},observe,ptq{group=32},activate{group=32},head"
    found = planned(f'canonicalize,annotate{{scheme="{scheme}"}},{stages}')
    ((counts, quantizers),) = given
    assert counts == {
        LinearSpec("bit", 128, 96, 32, 4): 2,
        LinearSpec("bit", 64, 96, 32, 4): 2,
        LinearSpec("bit", 256, 96, 32, 4): 2,
        LinearSpec("bit", 128, 192, 32, 8, per_token=True): 1,
        LinearSpec("int8", 128, 32, 0, 8, per_token=True): 2,
        LinearSpec("int8", 64, 32, 0, 8, per_token=True): 2,
        LinearSpec("int8", 256, 32, 0, 8, per_token=True): 2,
        LinearSpec("int8", 128, 64, 0, 8, per_token=True): 1,
        LinearSpec("int8", 259, 128, 0, 8, per_token=True): 1,
    }
    assert quantizers == {
        QuantizeSpec(96, 32, 4), QuantizeSpec(192, 0, 8), QuantizeSpec(32, 0, 8), QuantizeSpec(64, 0, 8),
        QuantizeSpec(128, 0, 8),
    }  # fmt: skip
    assert found.predicted_without == 7 and found.unpredicted == ""


def test_a_prediction_says_how_many_linears_it_leaves_out() -> None:
    assert "7 linears that stay float" in str(plan.predicted_table([], 7).title)  # type: ignore[attr-defined]
    assert "float" not in str(plan.predicted_table([], 0).title)  # type: ignore[attr-defined]


def test_the_plan_of_a_hub_model_reads_its_configuration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def configuration(name: str, **_: object) -> Any:
        asked.append(name)
        return zoo.ZOO["llama"].build().config

    def download(*_: object, **__: object) -> None:
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", configuration)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", download)
    result = plan.make_plan(CompileOptions("hf:some/model"))
    assert asked == ["some/model"] and result.layers == zoo.LAYERS


def test_the_plan_counts_what_sampling_takes(tmp_path: Path) -> None:
    # Many wide heads on few weights, so that keys and values are the most that is held.
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64}
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        architectures=["LlamaForCausalLM"],
        **heads,
    )
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("words")
    sampled = CompileOptions(str(tmp_path / "model"), preset="quick")
    read = dataclasses.replace(sampled, calibration=str(tmp_path / "text.txt"))
    size = recipe.PRESETS["quick"]
    tokens = (size.sequences + size.validation_sequences) * size.sequence_length
    keys_and_values = 2 * 4 * config.num_hidden_layers * 32 * 64 * tokens
    low, high = (plan.make_plan(options).peak_memory for options in (read, sampled))
    assert low < footprint.LIBRARIES + keys_and_values < high


# Waiting


def text_console(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, **options), stream


def test_plain_progress_is_silent_for_short_work_and_speaks_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FIRST_LINE", 0.05)
    monkeypatch.setattr(terminal, "LINE_INTERVAL", 0.05)
    console, stream = text_console()
    progress = terminal.make_progress(console)
    assert isinstance(progress, terminal.PlainProgress)
    with progress.task("short", 1) as task:
        task.advance()
    assert stream.getvalue() == ""
    with progress.task("distill", 4) as task:
        for _ in range(4):
            time.sleep(0.04)
            task.advance("error 0.5")
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    assert lines[0].startswith("distill: 1/4 (25 %), 0.1 s so far, about ")
    if Path("/proc/self/statm").exists():
        assert re.search(r"; error 0\.5; \d+\.\d [MG]B of memory$", lines[0])
    assert lines[-1].startswith("distill: 4/4 in ")
    assert lines[-1].endswith("; error 0.5")


def test_steps_from_a_checkpoint_do_not_spoil_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    state = terminal.TaskState("ptq", 40)
    for _ in range(20):
        state.advance()
    for _ in range(10):
        now += 3.0
        state.advance()
    assert state.remaining() == pytest.approx(30.0)


def test_bars_on_a_terminal_nest() -> None:
    console, stream = text_console(force_terminal=True)
    progress = terminal.make_progress(console)
    assert isinstance(progress, terminal.BarProgress)
    with progress.task("outer", 2) as outer:
        with progress.task("inner", 1) as inner:
            inner.advance("fine")
        progress.note("a line to keep")
        outer.advance()
    assert "a line to keep" in stream.getvalue()
    assert progress.stopped is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.5, "1.5"),
        (92.0003, "92.00"),
        (12345.6, "12346"),
        (-0.25, "-0.25"),
        (1e-7, "1e-07"),
        (1.00002e-7, "1.000e-07"),
        (None, "-"),
        (True, "yes"),
        ([1, 2.5], "1, 2.5"),
        (float("inf"), "inf"),
    ],
)
def test_figures(value: object, expected: str) -> None:
    assert terminal.figure(value) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.04, "0.0 s"), (59.6, "1:00"), (3725, "1:02:05")])
def test_durations(seconds: float, expected: str) -> None:
    assert terminal.duration(seconds) == expected


# Graphs


def layered(count: int, negate: int | None = None) -> Program:
    """``count`` layers ``relu(x @ w)``; in layer ``negate`` a ``neg`` stands behind."""
    root = torch.nn.Module()
    program_graph = fx.Graph()
    value = program_graph.placeholder("x")
    value = program_graph.call_function(torch.ops.aten.abs.default, (value,))
    value.meta[LAYER] = None
    for layer in range(count):
        path = f"layers.{layer}.weight"
        set_attribute(root, path, torch.eye(2))
        weight = program_graph.get_attr(path)
        for operator, operands in ((torch.ops.aten.mm.default, (weight,)), (torch.ops.aten.relu.default, ())):
            value = program_graph.call_function(operator, (value, *operands))
            value.meta[LAYER] = layer
        if layer == negate:
            value = program_graph.call_function(torch.ops.aten.neg.default, (value,))
            value.meta[LAYER] = layer
    program_graph.output(value)
    return Program(fx.GraphModule(root, program_graph), kind="module")


def test_like_layers_fold_and_changes_are_marked() -> None:
    before, after = layered(5), layered(5, negate=3)
    assert [b.layers for b in graph.blocks(before)] == [(), (0, 1, 2, 3, 4), ()]
    blocks = graph.blocks(after, before)
    assert [b.layers for b in blocks] == [(), (0, 1, 2), (3,), (4,), ()]
    assert next(m.text for b in blocks for m in b.marks if m.sign == "+") == "%neg_default = aten.neg(%relu_default_3)"
    assert graph.summary(after, before).endswith(", 2 new or changed, 0 gone")
    gone = [m.text for b in graph.blocks(before, after) for m in b.marks if m.sign == "-"]
    assert [text.partition(" = ")[2].partition("(")[0] for text in gone] == ["aten.neg", "aten.mm"]


def test_a_view_names_the_layers_it_folded() -> None:
    console, stream = text_console()
    console.print(graph.view(layered(4), title="After nothing"))
    text = stream.getvalue()
    assert "decoder layer 0  (1-3 alike)" in text
    assert text.count("aten.mm") == 1
    assert [b.layers for b in graph.blocks(layered(4), layer=2)] == [(2,)]
    with pytest.raises(ValueError, match="no decoder layer 9"):
        graph.view(layered(4), layer=9)


def test_json_has_no_non_finite_numbers() -> None:
    document: Mapping[str, Any] = {"a": float("nan"), "b": [float("inf"), 1.0], "c": Path("x")}
    assert plain(document) == {"a": None, "b": [None, 1.0], "c": "x"}


def test_the_sheet_is_honest() -> None:
    console, stream = text_console()
    figures = {
        "bytes_original": 4_000_000,
        "bytes_compiled": 1_000_000,
        "bits_per_weight": 2.75,
        "ppl_teacher": 10.0,
        "ppl": 12.5,
        "decode_original": 20.0,
        "decode_compiled": 5.0,
        "something_new": 3,
    }
    console.print(summary.sheet(figures))
    text = stream.getvalue()
    assert "4.0 times smaller" in text
    assert "SLOWER: 0.25 times as fast" in text
    assert "something new" in text


def test_rows_of_linears_become_rows_of_layers() -> None:
    rows = [
        {"layer": 0, "linear": "q", "after": 1.0, "before": 3.0, "seconds": 1.0},
        {"layer": 0, "linear": "k", "after": 2.0, "before": 5.0, "seconds": 1.0},
        {"layer": None, "linear": "head", "after": 9.0, "before": 9.0, "seconds": 1.0},
    ]
    assert [list(row.items()) for row in summary.by_layer(rows)] == [[("layer", 0), ("before", 4.0), ("after", 1.5)]]


def test_the_end_of_a_compile_says_whether_the_stages_did_their_part() -> None:
    def record(name: str, rows: list[dict[str, float]], **figures: float) -> pipeline.PassRecord:
        return pipeline.PassRecord(1, name, name, 1.0, 0.0, 9, 9, "calibrating", 0.1, rows, figures)

    def layer(after: float, flips: float = 0.01) -> dict[str, float]:
        return {"before": 1.0, "after": after, "sign_flips": flips, "bitmap_flips": 0.0}

    def passed(*records: pipeline.PassRecord) -> list[bool]:
        return [verdict.passed for verdict in stages.verdicts(records)]

    untrained, tuned = {"kl_before": 0.5, "kl_after": 0.5}, {"kl_before": 0.5, "kl_after": 0.4}
    good = record("distill", [layer(0.8)] * 4 + [layer(0.95)])
    assert passed(good, record("activate", [], **untrained), record("finetune", [], **tuned)) == [True, True]
    assert passed(record("distill", [layer(0.8)] * 3 + [layer(0.95)] * 2)) == [False]
    assert passed(record("distill", [layer(0.8, flips=0.0)])) == [False]
    assert passed(record("activate", [], **untrained)) == [False]
    assert passed(record("activate", [], error_before=0.2, error_after=0.1)) == [True]
    assert passed(record("ptq", [{"before": 1.0}])) == []
    (missed,) = stages.verdicts([record("activate", [], **untrained)])
    assert missed.text.endswith(f"; {stages.WAY_OUT}") and "--preset" in stages.WAY_OUT
    console, stream = text_console()
    report = CompileReport(Path("o"), [good], stages.verdicts([good]), {}, 0)
    for part in summary.compile_report(report):
        console.print(part)
    assert "4 of 5 layers have flipped bits and a held-out error lower by 10% or more" in stream.getvalue()
    assert report.to_json()["stages"][0]["passed"]
