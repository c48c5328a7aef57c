"""The yardsticks of the benchmarks: what computes something else is no limit and no rival."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.sizes import int4_bytes, int8_bytes
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target, runnable_targets
from lbllm_compile.passes.activate import insert_quantizers
from lbllm_compile.passes.annotate import layer_count
from lbllm_compile.passes.ir.rewrite import calls
from stages import annotated, apply, batches, context
from test_driver import SMALL
from zoo import user_model

from benchmarks import decode, heads, levels, limits, llama, quality, serve, smoothing, subjects
from lbllm_compile import calibration, export, frontend, recipe
from lbllm_compile.bench import decoders
from lbllm_compile.bench.decoding import Times

needs_twins = pytest.mark.skipif(bool(limits.missing()), reason=limits.missing() or "-")


@needs_twins
@pytest.mark.parametrize(("rows", "columns", "group"), [(32, 64, 64), (96, 320, 64), (64, 384, 128)])
def test_the_twins_compute_what_the_kernels_compute(rows, columns, group):
    spec = LinearSpec("bit", rows, columns, group)
    implementations = cpu.implementations(spec, Target.parse(runnable_targets()[0]))
    for case, implementation in ((c, i) for c in prove.linear_cases(spec) for i in implementations):
        packed = [implementation.pack(case.weight, None)]
        calls = [(implementation.layout, 1)]
        if implementation.layout == "lut8":
            calls += [("gemm", tokens) for tokens in (1, 2, 9, 10, 11, 37)]
        for kernel, tokens in calls:
            out = torch.empty(tokens, rows)
            values, x_scale = case.values[:tokens].contiguous(), case.x_scale[:tokens].contiguous()
            times = limits.times(kernel, group, values, x_scale, packed, out, calls=2, prefetch=1024)
            assert prove.agree(out, case.expected[:tokens]), (kernel, tokens)
            assert len(times) == 2 and min(times) > 0


@needs_twins
@pytest.mark.parametrize(("rows", "columns", "group"), [(33, 64, 64), (32, 65, 64), (32, 64, 32)])
def test_shapes_that_the_twins_do_not_take_are_refused(rows, columns, group):
    values, x_scale = torch.zeros(1, columns, dtype=torch.int8), torch.zeros(1, columns)
    packed = [torch.zeros(8192, dtype=torch.uint8)]
    with pytest.raises(LbllmError, match="C twins take"):
        limits.times("lut8", group, values, x_scale, packed, torch.empty(1, rows), 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_gemv", "cpu_gemm"])
def test_a_quick_run_says_how_contenders_compare(name, tmp_path):
    arguments = ["--quick", "--threads", "1", "--shapes", "64x128:64", "--json", str(tmp_path / "results.json")]
    tokens = ["--tokens", "3"] if name == "cpu_gemm" else []
    environment = os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p), "LBLLM_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, *tokens]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    (document,) = json.loads((tmp_path / "results.json").read_text())
    assert {"lut8", "torch fp32", "torch bf16"} <= {row["contender"] for row in document["results"]}
    assert all(1.0 in case["multiples"].values() for case in document["ratios"])


@pytest.mark.slow
def test_a_quick_run_times_the_linears_of_a_layer(tmp_path):
    shape = ["--width", "64", "--heads", "4", "--kv-heads", "2", "--inner", "96", "--group", "32"]
    arguments = ["--quick", "--threads", "1", *shape, "--json", str(tmp_path / "results.json")]
    environment = os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p), "LBLLM_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "benchmarks.cpu_layer", *arguments], check=True, env=environment)
    (document,) = json.loads((tmp_path / "results.json").read_text())
    own = [row for row in document["rows"] if row["contender"] == "generated"]
    assert [(row["cache"], row["layers"]) for row in own] == [("hot", 1), ("cold", 2)]
    assert all(row["microseconds_per_layer"] > 0 for row in own)
    assert 0 < document["call_microseconds"]["prepared"] < document["call_microseconds"]["checked"]


def test_torch_decodes_with_a_cache_what_the_model_gives_without():
    model = subjects.random_model("tiny")
    decoder = decoders.TorchDecoder(model)
    ids = torch.arange(9)
    whole = model(input_ids=ids[None]).logits[0]
    for _ in range(2):
        decoder.reset()
        for piece in (ids[:6], ids[6:7], ids[7:8], ids[8:]):
            logits = decoder.feed(piece.numpy())
        torch.testing.assert_close(torch.from_numpy(logits), whole[-1])


def test_a_decoder_is_timed_and_weighed_on_request(monkeypatch, capsys, tmp_path):
    source = str(subjects.random_source("tiny", tmp_path))
    loading = decoders.Loading(decoders.TORCH_BF16, source, capacity=16, threads=torch.get_num_threads())
    requests = [asdict(loading), {"prompt": 5, "steps": 3}, "memory"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(r) + "\n" for r in requests)))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the process of a decoder gives its own to what prints
    decoders.serve()
    loaded, times, memory = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert loaded["load_seconds"] > 0 and times["prefill"] > 0 and len(times["steps"]) == 3
    assert memory.keys() == loaded["bare"].keys()
    assert memory == {} or memory["peak"] >= memory["resident"] > 0


def test_a_decoder_that_cannot_be_loaded_is_an_error(tmp_path):
    with pytest.raises(LbllmError, match="is not an lbllm artifact"):
        decoders.Child(decoders.Loading(decoders.NATIVE, str(tmp_path), capacity=16, threads=1))


def test_servers_that_nobody_asked_for_are_left_out_where_they_cannot_be(monkeypatch, tmp_path):
    def exported(directory: Path, form: str, out: Path) -> None:
        out.touch()

    def refused(*_: object) -> None:
        raise export.ExportError("GGUF is written for llama, not for this")

    def options(server: str | None = None, types: list[str] | None = None) -> Namespace:
        return Namespace(artifact=tmp_path, llama_server=server, types=types, threads=[1])

    monkeypatch.setattr(serve.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(llama, "missing", lambda: "install the extra 'bench' (llama-cpp-python)")
    monkeypatch.setattr(export, "export", exported)
    assert serve.rivals(options(), tmp_path).keys() == {"llama.cpp q8_0"}
    assert serve.rivals(options(types=["q8_0"]), tmp_path).keys() == {"llama.cpp q8_0"}
    assert not serve.rivals(options(types=[]), tmp_path)
    with pytest.raises(LbllmError, match=r"make q4_0 of a GGUF file, are not here; install the extra 'bench'"):
        serve.rivals(options(types=["q8_0", "q4_0"]), tmp_path)
    monkeypatch.setattr(export, "export", refused)
    assert not serve.rivals(options(), tmp_path)
    for asked in (options("llama-server"), options(types=["q8_0"])):
        with pytest.raises(export.ExportError, match="not for this"):
            serve.rivals(asked, tmp_path)
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    assert not serve.rivals(options(), tmp_path)


@pytest.mark.parametrize("columns", [128, 100])
def test_random_weights_are_rounded_to_the_nearest_level(columns):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    rounded = subjects.round_to_nearest(weight, 64)
    levels = (rounded.levels.float() * rounded.scale.float().unsqueeze(-1)).repeat_interleave(64, 1)[:, :columns]
    distances = (weight.unsqueeze(-1) - levels).abs()
    chosen = distances.gather(-1, rounded.codes().long().unsqueeze(-1)).squeeze(-1)
    # levels are stored in few bits, borders are exact
    assert (chosen <= distances.amin(-1) + 0.02).all()


def test_models_are_compared_by_medians():
    rows = [
        decode.result("native", 2.75, Times([[0.1, 0.1], [0.1, 0.4]], [0.5]), 8),
        decode.result("torch fp32", 32.0, Times([[0.4] * 2] * 2, [4.0, 1.0, 1.0]), 8),
        decode.result("llama.cpp q4_0", 4.5, Times([[0.2] * 2] * 2, [1.0]), 8, {"shares": {"Q4_0": 1.0}}),
        decode.result("llama.cpp q2_k", 2.9, Times([[0.3] * 2] * 2, [0.25]), 8, {"shares": {"Q2_K": 1.0}}),
    ]
    assert rows[0]["decode_tokens_per_second"] == pytest.approx(10)
    assert rows[0]["slowest_round_tokens_per_second"] == pytest.approx(4)
    ratios = decode.ratios(rows)
    assert ratios["decode"]["multiples"]["torch fp32"] == pytest.approx(4)
    assert (ratios["decode"]["fastest"], ratios["prefill"]["fastest"]) == ("llama.cpp q4_0", "llama.cpp q2_k")
    assert ratios["decode"]["over_fastest"] == pytest.approx(2)
    assert ratios["prefill"]["over_fastest"] == pytest.approx(0.5)
    assert "fastest" not in decode.ratios(rows[:2])["decode"]


@pytest.mark.slow
def test_a_quick_run_compares_decoders(tmp_path):
    arguments = ["--quick", "--threads", "1", "--shape", "tiny", "--json", str(tmp_path / "results.json")]
    environment = os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p), "LBLLM_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.decode", *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    document = json.loads((tmp_path / "results.json").read_text())
    (run,) = document["runs"]
    assert {"native", "torch fp32", "torch bf16"} <= {row["contender"] for row in run["results"]}
    assert run["ratios"]["decode"]["multiples"]["native"] == 1
    assert document["processes"][0]["load_seconds"] > 0
    (few,) = run["few"]
    assert few["tokens"] == 2 and few["speedup"] == pytest.approx(few["without"] / few["milliseconds"])


@pytest.mark.parametrize("centered", [False, True])
def test_quantizers_of_keys_move_in_front_of_the_rotary_embedding(centered):
    program = insert_quantizers(annotated(), 16, 0, 16)
    batch = batches(1)[0]
    before = program.run(batch)
    smoothing.quantize_before_rotation(program, batch if centered else None)
    program.graph.lint()
    after = program.run(batch)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
    quantizers = calls(program.graph, torch.ops.lbllm.fake_quantize_kv.default)
    of_keys = torch.ops.aten.sub.Tensor if centered else torch.ops.aten.transpose.int
    expected = [of_keys, torch.ops.aten.transpose.int] * layer_count(annotated())
    assert Counter(quantizer.args[0].target for quantizer in quantizers) == Counter(expected)


def test_a_pipeline_of_ones_own_is_scored_behind_its_own_preparation(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "quick", SMALL)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    given = [f"canonicalize,annotate{dense},observe,ptq{{group=32}}" for dense in ("", '{keep_dense="*"}')]
    options = Namespace(
        pipeline=given,
        model="examples/tiny_llama.py",
        preset="quick",
        calibration=str(text),
        text=text,
        seq_len=32,
        chunks=2,
        seed=0,
        work=tmp_path / "work",
    )
    rows = quality.wanted_rows(options)
    assert [row.name for row in rows] == given and not any(row.compiled for row in rows)
    quantized, dense = (quality.measure_here(row, options) for row in rows)
    assert quantized["ppl_teacher"] == dense["ppl_teacher"]
    assert dense["kld_mean"] == 0 < quantized["kld_mean"]


def test_a_pipeline_without_ptq_is_refused_in_its_own_words():
    text = "canonicalize,annotate,head"
    with pytest.raises(LbllmError, match=f"--pipeline '{text}' has no 'ptq', .*; write one behind 'observe'"):
        quality.wanted_rows(Namespace(pipeline=["canonicalize,annotate,observe,ptq", text]))


def test_level_rules_are_fitted_to_the_inputs_that_ptq_sees():
    given = context(count=4)
    program = apply(annotated(), "observe", given).program
    found = list(levels.matrices(program, given.calibration, [0], rows=10**6))
    rows = apply(program, "ptq{group=32}", given).rows
    expected = {row["linear"] + ".weight": row["error"] for row in rows if row["layer"] == 0}
    # The first input of a layer is the same on the quantized chain.
    assert {m.path for m in found} == set(expected) and found[0].path in expected
    assert found[0].error(32, "free") == pytest.approx(expected[found[0].path], rel=1e-4)
    assert found[0].error(32, "free") < found[0].error(32, "dual")
    few = list(levels.matrices(program, given.calibration, [0], rows=7))
    assert [m.path for m in few] == [m.path for m in found] and all(len(m.weight) <= 7 for m in few)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("llama", {"rows": 0}, "--rows 0 leaves nothing of a matrix to fit; use 1 or more"),
        ("llama", {"rules": ["free", "twin"]}, "there is no level rule 'twin'"),
        ("llama", {"layers": [7, 9]}, "in the layers 7, 9; name others"),
        ("mixtral", {}, "has stacked experts, which are not measured here"),
    ],
)
def test_levels_that_cannot_be_measured_are_refused_before_calibration(model, changes, message, monkeypatch):
    def collect(*_: object, **__: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(calibration, "collect", collect)
    monkeypatch.setattr(frontend, "load", lambda _: user_model(model))
    given = {"model": model, "calibration": None, "layers": [0], "groups": [64], "rules": ["free"], "rows": 96}
    with pytest.raises(LbllmError, match=message):
        levels.measure(Namespace(**given | changes))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_token_reads_the_head_and_not_the_embedding(name):
    rows, columns = dict(annotated(name).parameters())["model.embed_tokens.weight"].shape
    whole, coded = int8_bytes(rows, columns), int4_bytes(rows, columns, 32)
    tied = name == "llama-tied"
    for options, read, beside in [
        ("bits=8", whole, 0 if tied else whole),
        ("bits=4", coded, whole),
        ("bits=4,embedding=4", coded, 0 if tied else coded),
    ]:
        program = apply(annotated(name), f"head{{{options},group=32,sequences=0}}").program
        assert heads.sizes(program) == (read, read + beside), options
