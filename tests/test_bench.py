"""``bench``: what is timed, how it is compared, and that what is slower is called so."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lbllm_compile.codegen import operators
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.operators import registry
from lbllm_compile.codegen.progress import LbllmWarning
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from test_export import LOCK
from test_zoo import inputs, stages
from typer.testing import CliRunner
from zoo import ZOO, captured

from lbllm_compile import artifact, cli, export, frontend, runtime
from lbllm_compile.bench import command, decoders, decoding, linears, llama
from lbllm_compile.bench.command import BenchError, BenchOptions, Report
from lbllm_compile.bench.linears import Floats
from lbllm_compile.bench.turns import Spread, alternate
from lbllm_compile.native.language import InputBounds
from lbllm_compile.report.terminal import make_console

HOST = Target.parse("cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "compiled"
    artifact.save(stages("llama")[1], out, lock=LOCK)
    return out


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An artifact of a module that is no language model, without W(1+1) weights."""
    module = torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))
    program = frontend.capture(frontend.load_given(module, frontend.Given(example_inputs=torch.randn(3, 24))))
    for item in pipeline.parse('canonicalize,annotate{keep_dense="*"},lower,cleanup'):
        program = item.apply(program, PassContext()).program
    artifact.save(program, tmp_path / "plain", lock=LOCK)
    return tmp_path / "plain"


def shown(report: Report) -> str:
    stream = io.StringIO()
    console = make_console(file=stream)
    console.width = 400
    for part in command.render(report):
        console.print(part)
    return stream.getvalue()


def spread(median: float, around: float = 0.01) -> dict[str, Any]:
    return dataclasses.asdict(Spread(median, median * (1 - around), median * (1 + around), 5))


def planted(**own: float) -> Report:
    """A report in which torch decodes 50 and reads 500 tokens a second, loads in a second and takes 100 MB."""
    theirs = {"decode": 50.0, "prefill": 500.0, "load": 1.0, "memory": 1e8}
    models = [
        {"contender": "native"} | {what: spread(value) for what, value in (theirs | own).items() if what in theirs},
        {"contender": "torch"} | {what: spread(value) for what, value in theirs.items()},
    ]
    row = {
        "linears": ["model.layers.*.mlp.down_proj"], "count": 30, "shape": "576x1536", "computed": "W(1+1) g64, A4",
        "tokens": 1, "seconds": {"own": spread(own["linear"]), "kernel": spread(8e-6), "torch": spread(20e-6)},
        "roofline_seconds": 4e-6, "roofline_share": 0.5,
    }  # fmt: skip
    settings = dataclasses.asdict(decoding.Settings())
    return Report(Path("out"), {"cpu": "a CPU"}, settings, [{"threads": 2, "models": models, "linears": [row]}])


def test_what_is_slower_is_called_so():
    report = planted(decode=40.0, prefill=1000.0, load=2.0, memory=2e8, linear=25e-6)
    text = shown(report)
    assert "SLOWER: decode with 2 threads is 0.80 times as fast as torch" in text
    assert "SLOWER: load with 2 threads is 0.50 times as fast as torch" in text
    assert "MORE: memory with 2 threads is 2.00 times torch's" in text
    linear = "model.layers.*.mlp.down_proj (576x1536, W(1+1) g64, A4), 1 token"
    assert f"SLOWER: {linear} with 2 threads is 0.80 times as fast as torch" in text
    assert "SLOWER: prefill" not in text and "(2.00x)" in text
    slower = {v["what"] for v in report.to_json()["verdicts"] if v["times_as_fast"] < 1}
    assert slower == {"decode", "load", "memory", linear}
    json.dumps(report.to_json(), default=str, allow_nan=False)


def test_what_is_faster_is_not_called_slower():
    text = shown(planted(decode=100.0, prefill=1000.0, load=0.1, memory=5e7, linear=10e-6))
    assert "SLOWER" not in text and "MORE" not in text and "in nothing" in text
    assert "50 %" in text, "of the roofline"


def test_a_difference_within_the_spread_is_called_that():
    close = planted(decode=49.9, prefill=1000.0, load=0.1, memory=5e7, linear=10e-6)
    assert "SLOWER: decode with 2 threads is 1.00 times as fast as torch (within the spread)" in shown(close)
    (verdict,) = (v for v in command.verdicts_of(close) if v.what == "decode")
    assert verdict.slower and not verdict.clear


def test_linears_of_one_name_keep_their_own_figures():
    report = planted(decode=100.0, prefill=1000.0, load=0.1, memory=5e7, linear=10e-6)
    (run,) = report.runs
    (bits,) = run["linears"]
    alike = bits | {"seconds": {"own": spread(40e-6), "torch": spread(20e-6)}}  # differs in its bias, say
    floats = alike | {"computed": "float", "seconds": {"own": spread(80e-6), "torch": spread(20e-6)}}
    report = dataclasses.replace(report, runs=[run | {"linears": [bits, alike, floats]}])
    rows = [line for line in shown(report).splitlines() if "576x1536" in line and "SLOWER: model" not in line]
    for row, said in zip(rows, ["(2.00x)", "(SLOWER: 0.50x)", "(SLOWER: 0.25x)"], strict=True):
        assert said in row
    assert "down_proj (576x1536, float), 1 token with 2 threads is 0.25 times as fast" in shown(report)


def test_a_difference_of_few_measurements_is_not_clear():
    once, twice = Spread.of([1.0]), Spread.of([2.0, 2.1])
    assert not once.apart(twice) and not twice.apart(Spread.of([1.0, 1.1, 1.2]))
    assert Spread.of([2.0, 2.1, 2.2]).apart(Spread.of([1.0, 1.1, 1.2]))
    report = planted(decode=49.9, prefill=1000.0, load=0.1, memory=5e7, linear=10e-6)
    for row in report.runs[0]["models"]:
        row["decode"] |= {"lower": row["decode"]["median"], "upper": row["decode"]["median"], "count": 1}
    assert "SLOWER: decode with 2 threads is 1.00 times as fast as torch (too few measurements)" in shown(report)
    (verdict,) = (v for v in command.verdicts_of(report) if v.what == "decode")
    assert not verdict.clear


def test_a_spread_is_the_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Spread(1, 0.5, 2, 3).meets(Spread(3, 2, 4, 3)) and not Spread(1, 0.5, 2, 3).meets(Spread(3, 2.5, 4, 3))


def test_contenders_take_turns():
    calls: list[str] = []

    def run(name: str):
        def made(count: int) -> list[float]:
            calls.append(name)
            return [1.0] * count

        return made

    times = alternate({"a": run("a"), "b": run("b")}, quick=True)
    assert calls == ["a", "a", "b", "b"], "warm calls, then those that count"
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"against": ("torch-bf61",)}, "--against knows no 'torch-bf61' (did you mean 'torch-bf16'?)"),
        ({"threads": (0,)}, "--threads and --rounds must be at least 1"),
        ({"rounds": 0}, "--threads and --rounds must be at least 1"),
        ({"against": ("llama.cpp",)}, "llama.cpp is not here to compare with; install the extra 'bench'"),
        ({"gguf": Path("a.gguf")}, "add llama.cpp to --against"),
        ({"original": "model.py"}, "add torch or torch-bf16 to --against"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(given, said, monkeypatch):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError) as caught:
        BenchOptions(Path("out"), **given)
    assert said in str(caught.value) and caught.value.exit_code == 2


def test_numbers_of_threads_are_numbers_that_there_are():
    assert command.threads_from(None) == () and command.threads_from("1,1") == (1,)
    with pytest.raises(BenchError, match="give numbers joined by commas"):
        command.threads_from("one")
    with pytest.raises(BenchError, match="CPUs here"):
        command.threads_from("100000")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to CPUs")
def test_threads_are_those_of_cpus_that_may_be_used(monkeypatch):
    allowed = os.sched_getaffinity(0)
    monkeypatch.setenv("TVM_NUM_THREADS", "64")
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert command.threads_from("1") == (1,)
        with pytest.raises(BenchError, match="may use 1 of the CPUs here"):
            command.threads_from("2")
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_command_line_refuses_in_one_sentence(tmp_path):
    result = CliRunner().invoke(cli.app, ["bench", str(tmp_path), "--against", "onnx"])
    assert result.exit_code == 2 and "--against knows no 'onnx'" in result.stderr
    result = CliRunner().invoke(cli.app, ["bench", str(tmp_path)])
    assert result.exit_code == 2 and "is not an lbllm artifact" in result.stderr


def test_a_target_without_kernels_to_time_is_refused_before_anything_is_timed(compiled, monkeypatch):
    monkeypatch.setattr(command, "_models", None)
    with pytest.raises(BenchError, match=r"kernels for cuda:sm_90 are not timed one by one; `bench DIR --predict`"):
        command.bench(BenchOptions(compiled, target="cuda:sm_90"))


def test_a_prediction_times_nothing(compiled, plain, monkeypatch):
    monkeypatch.setattr(command, "bench", None)
    result = CliRunner().invoke(cli.app, ["bench", str(compiled), "--predict", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["predicted"]
    assert json.loads(result.stdout)["predicted_without"] == 0
    assert [row["device"] for row in found] == ["H200", "H100", "A100", "L4", "RTX 4090", "T4"]
    # Two layers of five launches and three launches besides; the linears of a model this small take next to nothing.
    assert all(row["gaps_s"] == pytest.approx(1.3e-6 * 13) for row in found)
    assert all(row["gaps_s"] < row["seconds"] < 3e-5 for row in found)
    assert "PREDICTION, not measured" in CliRunner().invoke(cli.app, ["bench", str(compiled), "--predict"]).stdout
    for option, value in {"--against": "torch", "--rounds": "5", "--target": "cuda:sm_90"}.items():
        result = CliRunner().invoke(cli.app, ["bench", str(compiled), "--predict", option, value])
        assert result.exit_code == 2 and f"--predict times nothing; leave out {option}\n" in result.stderr
    result = CliRunner().invoke(cli.app, ["bench", str(plain), "--predict"])
    assert result.exit_code == 2 and "is of language models without experts" in result.stderr


def test_what_cannot_be_exported_is_asked_for(compiled, monkeypatch):
    def refuse(*_: object) -> None:
        raise export.ExportError("GGUF is written for llama, not for this")

    monkeypatch.setattr(export, "export", refuse)
    monkeypatch.setattr(llama, "missing", lambda: "")
    for name, option in (("llama.cpp", "--gguf FILE"), ("torch", "--original MODEL")):
        with pytest.raises(BenchError, match=f"not for this; or name what to compare with as {option}"):
            command.bench(BenchOptions(compiled, (name,)))


def test_what_others_run_is_written_once_and_removed(tmp_path, monkeypatch):
    written: list[tuple[str, Path]] = []

    def write(directory: Path, form: str, out: Path) -> None:
        written.append((form, out))
        out.touch()

    monkeypatch.setattr(export, "export", write)
    monkeypatch.setattr(llama, "missing", lambda: "")
    every = BenchOptions(tmp_path, ("torch", "torch-bf16", "llama.cpp"))
    with command._sources(every, command.NoProgress()) as sources:
        assert [form for form, _ in written] == ["hf-dense", "gguf"]
        assert sources["torch"] == sources["torch-bf16"] == str(written[0][1])
        assert sources["llama.cpp"] == str(written[1][1]) and sources["native"] == str(tmp_path)
        assert all(path.exists() for _, path in written)
    assert not any(path.parent.exists() for _, path in written)
    given = tmp_path / "q4.gguf"
    given.touch()
    named = BenchOptions(tmp_path, ("torch-bf16", "llama.cpp"), original="m.py", gguf=given)
    with command._sources(named, command.NoProgress()) as sources:
        assert sources["torch-bf16"] == "m.py" and sources["llama.cpp"] == str(given) and len(written) == 2
    assert given.exists()


def test_decoders_that_know_other_tokens_are_fed_the_same():
    class Fed:
        def __init__(self, vocabulary: int):
            self.vocabulary, self.ids = vocabulary, []

        def reset(self) -> None:
            self.ids.clear()

        def feed(self, ids):
            self.ids += ids.tolist()

    small, large = Fed(7), Fed(10)
    for decoder in (small, large):
        times = decoders.turn(decoder, 5, 3, vocabulary=7)
        assert len(times["steps"]) == 3 and len(decoder.ids) == 8
    assert small.ids == large.ids and max(large.ids) < 7


def test_processes_that_count_are_fed_the_same(monkeypatch):
    asked: dict[str, list[int]] = {"wide": [], "narrow": []}

    class Fresh:
        def __init__(self, loading: decoders.Loading, module: str):
            self.kind = loading.kind
            self.loaded = {"vocabulary": 10 if loading.kind == "wide" else 7, "load_seconds": 1.0, "bare": {}}

        def __enter__(self) -> Fresh:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ask(self, request: Any) -> dict[str, Any]:
            if request == "memory":
                return {}
            asked[self.kind].append(request["vocabulary"])
            return {"prefill": 1.0, "steps": []}

    monkeypatch.setattr(decoding, "Child", Fresh)
    competing = {kind: decoders.Loading(kind, "", 1, 1) for kind in asked}
    measured = decoding.fresh_processes(competing, decoding.Settings(pause=0.0), command.NoProgress())
    assert {name: len(rows) for name, rows in measured.items()} == {"wide": 3, "narrow": 3}
    assert {name: counts[1:] for name, counts in asked.items()} == {"wide": [7, 7, 7], "narrow": [7, 7, 7]}


def test_a_process_that_ends_says_so(tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text("""print('{"vocabulary": 1}', flush=True)""")
    monkeypatch.syspath_prepend(tmp_path)
    with decoders.Child(decoders.Loading(decoders.TORCH, "", 1, 1), "ends") as child:
        child._process.wait()
        with pytest.raises(LbllmError, match="the process of torch ended"):
            child.ask("memory")
    assert child._process.stdout.closed
    with pytest.raises(KeyError), decoders.Child(decoders.Loading(decoders.TORCH, "", 1, 1), "ends") as child:
        child._process.wait()
        with contextlib.suppress(LbllmError):
            child.ask("memory")
        raise KeyError


def test_torch_runs_folders_in_its_types(tmp_path):
    model = ZOO["llama"].build()
    model.save_pretrained(tmp_path)
    for kind, dtype in ((decoders.TORCH, torch.float32), (decoders.TORCH_BF16, torch.bfloat16)):
        loaded = decoders.original(str(tmp_path), kind)
        assert {tensor.dtype for tensor in loaded.parameters()} == {dtype} and not loaded.training
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(dtype))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is not a model configuration"),
        ('{"model_type": "nothing"}', "cannot be loaded as a language model"),
        ('{"model_type": "llama", "architectures": ["None"]}', "cannot be loaded as a language model"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.C"}}', "cannot be loaded as a language model"),
        ('{"quantization_config": {"quant_method": "gptq"}}', r"already quantized \(gptq\); give the original weights"),
    ],
)
def test_a_folder_that_torch_cannot_run_is_one_sentence(tmp_path, capsys, monkeypatch, config, said):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "x.py").write_text("raise SystemExit('run')")
    torch.save({}, tmp_path / "pytorch_model.bin")
    loading = dataclasses.asdict(decoders.Loading(decoders.TORCH, str(tmp_path), 1, torch.get_num_threads()))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(loading) + "\ny\n"))
    monkeypatch.setattr("sys.stdout", sys.stdout)
    decoders.serve()
    (answer,) = capsys.readouterr().out.splitlines()
    assert re.search(said, json.loads(answer)["failure"]) and "\n" not in json.loads(answer)["failure"]


def test_artifacts_are_no_originals(compiled):
    with pytest.raises(LbllmError, match=r"already quantized \(lbllm\); give the original weights"):
        decoders.original(str(compiled))


def test_vocabularies_are_found_in_nested_configurations():
    unknown = InputBounds(None, None)
    assert decoders._vocabulary(unknown, {"text_config": {"vocab_size": 7}}) == 7
    assert decoders._vocabulary(unknown, {"vocab_size": 8}) == 8
    assert decoders._vocabulary(InputBounds(9, None), {"vocab_size": 8}) == 9
    with pytest.raises(LbllmError, match="how many tokens it knows"):
        decoders._vocabulary(unknown, {})
    nested = transformers.Gemma3Config(text_config={"vocab_size": 11})
    assert decoders.TorchDecoder(types.SimpleNamespace(config=nested)).vocabulary == 11


def test_distinct_linears_are_counted_and_named():
    found = linears.distinct(stages("llama")[1])
    rows = {tuple(linears.names(infos)): (linear, len(infos)) for linear, infos in found.items()}
    merged, count = rows["model.layers.*.self_attn.q_proj+k_proj+v_proj",]
    assert count >= 1 and merged.spec is not None and merged.spec.out_features == merged.rows
    assert str(rows["lm_head",][0]) == "int8, A8" and str(merged) == "W(1+1) g32, A4"
    assert sum(len(infos) for infos in found.values()) == len(stages("llama")[1].graph.find_nodes(
        op="call_function", target=torch.ops.lbllm.bit_linear.default)) + 1  # fmt: skip


def test_knees_and_floats_are_told():
    spec = LinearSpec("bit", 8, 64, 32, 8)
    assert str(linears.Linear(8, 64, spec, QuantizeSpec(64, 32, 4, knees=True))) == "W(1+1) g32, A4 with knees"
    assert str(linears.Linear(8, 64)) == "float"


def test_the_roofline_is_told_where_it_is_known():
    large, tiny = LinearSpec("bit", 2048, 1024, 64), LinearSpec("bit", 8, 64, 32)
    kernels = backend_of(HOST).build([large, tiny], [], HOST, trials=0)
    timer = linears.Timer(kernels, Floats.KERNELS)
    of_large = linears.Linear(2048, 1024, large, QuantizeSpec(1024, 64))
    assert 0 < timer.roofline(of_large, 1) < timer.roofline(linears.Linear(2048, 1024), 1)
    assert timer.roofline(linears.Linear(8, 64, tiny, QuantizeSpec(64, 32)), 1) is None, "it stays in caches"
    assert timer.roofline(linears.Linear(2048, 1024), 512) is None, "what float products can reach is not measured"


def test_floats_are_timed_where_they_run(monkeypatch):
    kernels = backend_of(HOST).build([], [], HOST, trials=0)
    linear, threads = linears.Linear(8, 64), []
    product = torch.nn.functional.linear

    def counted(*given: torch.Tensor) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return product(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for floats, tokens, expected in [
            (Floats.KERNELS, 1, set()),
            (Floats.TORCH, 1, {2}),
            (Floats.SESSION, 1, {1}),
            (Floats.SESSION, 32, {2}),
        ]:
            timer = linears.Timer(kernels, floats, quick=True)
            threads.clear()
            assert timer.times(linear, tokens).keys() == {"own"}
            assert {*threads} == expected
            assert timer.computed(linear) == ("float" if floats is Floats.KERNELS else "float in torch")
    finally:
        torch.set_num_threads(before)


def test_a_language_model_without_a_native_program_runs_floats_in_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    context = PassContext(probe=inputs(1, 9))
    program = captured("llama")[1]
    for item in pipeline.parse('canonicalize,annotate{keep_dense="*"},lower,cache,cleanup'):
        program = item.apply(program, context).program
    artifact.save(program, tmp_path / "out", lock=LOCK)
    attention = operators.find(torch.ops.lbllm.cached_attention.default)
    monkeypatch.setitem(registry._registered, attention.target, dataclasses.replace(attention, translate=None))
    with pytest.warns(LbllmWarning):
        assert runtime.load(tmp_path / "out").native is None
    request = linears.Request(str(tmp_path / "out"), "cpu", (1,), (), quick=True)

    def computed() -> set[str]:
        _, *rows = linears.rows(request, command.NoProgress())
        return {row["computed"] for row in rows}

    assert computed() == {"float in torch"}
    monkeypatch.setattr(linears, "find", lambda *_: object())
    assert computed() == {"float"}


@pytest.mark.parametrize(("context", "expected"), [(None, (32, 64, 512)), (40, (20, 20, 40)), (1, (1, 1, 1))])
def test_measurements_fit_the_context(context, expected):
    settings = command._settings(BenchOptions(Path("out")), context)
    assert (settings.prompt, settings.steps, settings.prefill) == expected


needs_llama = pytest.mark.skipif(bool(llama.missing()), reason=llama.missing() or "-")


@pytest.mark.parametrize(
    "against",
    [
        (),
        pytest.param(("torch", "torch-bf16"), marks=pytest.mark.slow),
        pytest.param(("llama.cpp",), marks=(pytest.mark.slow, needs_llama)),
    ],
    ids=["alone", "torch", "llama.cpp"],
)
def test_an_artifact_is_timed_whole_and_by_its_linears(compiled, against):
    report = command.bench(BenchOptions(compiled, against, threads=(1,), quick=True))
    document = json.loads(json.dumps(report.to_json(), default=str, allow_nan=False))
    (run,) = document["runs"]
    assert [row["contender"] for row in run["models"]] == ["native", *against]
    for row in run["models"]:
        assert all(row[what]["median"] > 0 for what in ("decode", "prefill", "load"))
    paths = {name for row in run["linears"] for name in row["linears"]}
    assert {"lm_head", "model.layers.*.mlp.down_proj"} <= paths
    assert {row["tokens"] for row in run["linears"]} == {1, 16}
    torch_alone = {*against} - {"llama.cpp"}
    assert all(row["seconds"].keys() == {"own", "kernel"} | torch_alone for row in run["linears"])
    compared = {v["what"] for v in document["verdicts"]}
    assert ({"decode", "prefill", "load"} <= compared) == bool(against)
    assert any(what.startswith("lm_head (") for what in compared) == bool(torch_alone)
    assert "1 thread: distinct linears" in shown(report)


def test_a_module_is_timed_linear_by_linear(plain):
    report = command.bench(BenchOptions(plain, threads=(1,), quick=True))
    (run,) = report.runs
    assert report.settings is None and run["models"] == []
    assert {(row["shape"], row["computed"]) for row in run["linears"]} == {
        ("12x24", "float in torch"),
        ("8x12", "float in torch"),
    }
    assert "Only language models decode" in shown(report)


def test_what_stops_a_child_is_said_here(tmp_path):
    options = BenchOptions(tmp_path, threads=(1,), quick=True)
    with pytest.raises(LbllmError, match="is not an lbllm artifact"):
        command._linears(options, None, 1, command.NoProgress())
