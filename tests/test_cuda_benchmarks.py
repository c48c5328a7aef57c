"""The CUDA benchmarks from packing to the JSON, under a stand-in for the driver, where times mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import standin
from lbllm_compile.codegen.cuda.compiler import CudaCompiler
from lbllm_compile.codegen.cuda.dp4a import GemmSchedule
from lbllm_compile.codegen.cuda.emit import schedules
from lbllm_compile.codegen.cuda.mma import MmaSchedule
from test_cuda_models import StandInCompiler

from benchmarks import cuda_pack, cuda_packed, cuda_peers

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")

SHAPE = (33, 100, 64)

CUBLAS = """
#define ENTRY extern "C" int
ENTRY cublasCreate_v2(void** handle) { *handle = new char; return 0; }
ENTRY cublasDestroy_v2(void* handle) { delete static_cast<char*>(handle); return 0; }
ENTRY cublasSetStream_v2(void* handle, void* stream) { return !handle || !stream; }
ENTRY cublasSetWorkspace_v2(void* handle, void* at, unsigned long size) { return !handle || !at || !size; }
ENTRY cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int at, int lda,
                   const void* b, int bt, int ldb, const void* beta, void* c, int ct, int ldc, int compute, int) {
  if (*static_cast<const float*>(alpha) != 1.0f || *static_cast<const float*>(beta) != 0.0f) return 7;
  if (ta != 1 || tb != 0 || at != 14 || bt != 14 || ct != 14 || compute != 68) return 7;
  return handle && a && b && c && m == 33 && k == 100 && n > 0 && lda == k && ldb == k && ldc == m ? 0 : 7;
}
"""
"""Refuses what is not the product of row-major matrices in bf16."""

LLAMA = """#!/bin/sh
case "$*" in *bad*) echo 'no such file' >&2; exit 1 ;; esac
echo '[{"backends": "CUDA", "n_prompt": 9, "n_gen": 0, "avg_ts": 100.0},'
echo ' {"backends": "CUDA", "n_prompt": 0, "n_gen": 2, "avg_ts": 50.0}]'
"""


class KnowsAll(StandInCompiler):
    """Is asked for an architecture first."""

    def check(self, archs: Sequence[str]) -> None:
        assert list(archs) == ["sm_90"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is carried, for the stand-in's architecture."""
    place = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(place / "cache"))
        patch.setattr(CudaCompiler, "find", lambda: KnowsAll(place / "module"))
        patch.setitem(
            cuda_pack.subjects.SHAPES,
            "less",
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 96,
            },
        )
        cuda_pack.pack(place / "carried", ["sm_90"], [SHAPE], ["less"], 2)
    carried = place / "carried"
    (carried / "llama.cpp").mkdir()
    (carried / "llama.cpp" / "llama-bench").write_text(LLAMA)
    (carried / "llama.cpp" / "llama-bench").chmod(0o755)
    (carried / "gguf" / "less").mkdir(parents=True)
    for name in ("q2_k", "bad"):
        (carried / "gguf" / "less" / f"{name}.gguf").touch()
    library = place / "lib"
    library.mkdir()
    (place / "cublas.cpp").write_text(CUBLAS)
    command = ["g++", "-shared", "-fPIC", "-o", str(library / "libcublas.so.13"), str(place / "cublas.cpp")]
    subprocess.run(command, check=True)
    return carried


def started(*command: str, library: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """A process on a machine whose driver is the stand-in, or nowhere."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]), "LD_LIBRARY_PATH": library}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **paths, **more})


def libraries(packed: Path) -> str:
    return os.pathsep.join([str(Path(standin.driver()).parent), str(packed.parent / "lib")])


def test_one_script_runs_every_part_and_tells_what_failed(packed: Path, tmp_path: Path) -> None:
    """What is broken is recorded, and the other parts go on."""
    script, out = str(ROOT / "benchmarks" / "cuda_all.sh"), tmp_path / "out.json"
    arguments = ["run", str(packed), str(out), "--quick", "--parts", "prove", "gemv", "gemm", "decode"]
    done = started("sh", script, *arguments, library=libraries(packed), PYTHON=sys.executable)
    assert out.is_file(), done.stderr
    document = json.loads(out.read_text())
    assert document["failed"] == {} and done.returncode == 0
    assert document["machine"]["device"] == "stand-in" and document["machine"]["driver_for_cuda"] == "13.0"
    proven = document["parts"]["prove"]["proven"]
    assert len(proven) == 3 and sum("equal to the bit" in said for said in proven.values()) == 2
    assert "steps and of a prompt" in proven["less"] and "of their length from the graph's" in proven["less"]
    for form, tokens in (("gemv", [1]), ("gemm", [4, 16])):
        cases = document["parts"][form]["cases"]
        assert [case["tokens"] for case in cases] == tokens
        for case in cases:
            names = {row["contender"] for row in case["results"]}
            assert names == {case["best"], case["default"], "copy", "cuBLAS bf16"}
            assert len(case["schedules_microseconds"]) == 2 and case["multiples_of_best"][case["best"]] == 1
    (model,) = document["parts"]["decode"]["models"]
    kinds = {(row["contender"], row["kind"]) for row in model["results"]}
    own = {("lbllm", kind) for kind in ("greedy", "replayed", "serial", "prefill")}
    assert kinds == own | {("llama.cpp q2_k", "greedy"), ("llama.cpp q2_k", "prefill")}
    assert "no such file" in model["absent"]["llama.cpp bad"] and "torch" in model["absent"]["torch bf16"]
    assert model["launches_of_a_part"] > model["launches_of_a_step"] > 5
    assert model["device_bytes"] > model["weight_bytes"]


def test_both_kinds_of_tiles_are_packed_for_each_number_of_tokens() -> None:
    spec = cuda_pack.measured_spec(4096, 4096, 128)
    packed = cuda_pack.candidates(spec, "gemm")[: cuda_pack.SCHEDULES]
    assert packed[0] == schedules(spec, "gemm")[0] and len({*packed}) == cuda_pack.SCHEDULES
    assert {s.tokens for s in packed if isinstance(s, MmaSchedule)} == {8, 16, 64, 128}
    assert {s.tokens for s in packed if isinstance(s, GemmSchedule)} == {16, 64, 128}


def test_a_wrong_kernel_is_told_and_not_timed(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "carried"
    shutil.copytree(packed, folder)
    index = json.loads((folder / "kernels" / cuda_packed.INDEX).read_text())
    gemv = next(kernel for kernel in index["kernels"] if kernel["form"] == "gemv")
    cases = list(cuda_packed.read_cases(folder / "kernels" / gemv["proof"]))
    cases[0].expected[0, 0] += 1
    cuda_packed.write_cases(folder / "kernels" / gemv["proof"], cases)
    arguments = ["--packed", str(folder), "--quick", "--json", str(tmp_path / "out.json")]
    done = started(sys.executable, "-m", "benchmarks.cuda_gemv", *arguments, library=libraries(packed))
    document = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 1 and document["cases"] == []
    assert "1 of 33 outputs differ for random values" in next(iter(document["failed"].values()))


def test_a_program_that_takes_a_prompt_wrongly_is_told(packed: Path, tmp_path: Path) -> None:
    """Though its steps are right."""
    folder = tmp_path / "carried"
    shutil.copytree(packed, folder)
    file = folder / "models" / "less" / cuda_packed.EXPECTED
    with np.load(file) as arrays:
        ids, logits = arrays["ids"], arrays["logits"]
    logits[-1] = -logits[-1]
    np.savez(file, ids=ids, logits=logits)
    arguments = ["--packed", str(folder), "--quick", "--json", str(tmp_path / "out.json")]
    done = started(sys.executable, "-m", "benchmarks.cuda_prove", *arguments, library=libraries(packed))
    document = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 1 and list(document["failed"]) == ["less"]
    assert "the logits of less are 2 of their length from the graph's" in document["failed"]["less"]


@pytest.mark.parametrize("name", ["gemv", "gemm", "decode", "prove"])
def test_without_a_driver_there_is_one_sentence(name: str, tmp_path: Path) -> None:
    done = started(sys.executable, "-m", f"benchmarks.cuda_{name}", "--packed", str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("this benchmark needs an NVIDIA GPU, and there is no NVIDIA driver here")
    assert len(done.stderr.splitlines()) == 1


def test_the_script_without_a_driver_says_so(packed: Path, tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "cuda_all.sh"), tmp_path / "out.json"
    done = started("sh", script, "run", str(packed), str(out), PYTHON=sys.executable)
    assert done.returncode == 2 and not out.exists() and "there is no NVIDIA driver" in done.stderr


def test_what_is_compared_with_in_torch_computes(packed: Path) -> None:
    """Its code path, on the CPU: torch here sees no GPU."""
    config = cuda_packed.PackedModel.read(packed / "models" / "less").config
    eager, compiled = (cuda_peers.TorchDecoder(config, 8, "cpu", c, backend="eager") for c in (False, True))
    fed = []
    for decoder in (eager, compiled):
        tokens = []
        for _ in range(2):
            decoder.reset()
            token = decoder.feed(np.arange(3))
            tokens.append([token, token := decoder.feed(np.array([token]))])
        assert tokens[0] == tokens[1]
        fed.append(tokens)
    assert fed[0] == fed[1]
    bench = SimpleNamespace(copies=lambda size: 2, launches=2)
    for compiled in (False, True):
        run = cuda_peers.torch_linear(bench, 8, 16, 3, compiled=compiled, device="cpu", backend="eager")
        assert len(run(3)) == 3 and min(run(2)) > 0
