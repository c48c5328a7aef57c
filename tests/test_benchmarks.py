"""The yardsticks of the benchmarks: a C twin that computes something else is no limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.kernels import cpu
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target, runnable_targets

from benchmarks import limits

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
