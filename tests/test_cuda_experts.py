"""What mixtures of experts need of a CUDA program: orders, written rows, and linears of which each row has its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.cuda.dp4a import gemv, gemv_schedules, pack_bit_weight, pitch
from lbllm_compile.codegen.cuda.emulator import ASCENDING, DESCENDING, Emulator, Launch
from lbllm_compile.codegen.cuda.program import computed
from lbllm_compile.codegen.cuda.program.experts import gemv_by_expert
from lbllm_compile.codegen.cuda.text import PREAMBLE
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.tvm_api import compile_functions, cuda_source, prepared
from test_format import random_weight

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")


def run(function, *tensors: torch.Tensor) -> None:
    """Runs loops on the CPU; what they compute is the same where threads share them."""
    prepared(compile_functions({"loops": function}, {"kind": "llvm"})["loops"], *tensors)()


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
@pytest.mark.parametrize("descending", [False, True])
def test_an_order_is_torchs_stable_one(dtype: str, descending: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (2, 23, 3), generator=generator).to(getattr(torch, dtype))
    if dtype == "float32":
        x[0, ::5, 1], x[1, 3, 0], x[1, 4, 0], x[0, 1, 2] = torch.nan, torch.inf, -torch.inf, -0.0
    places = torch.full(x.shape, -1)
    run(computed.order(dtype, descending), x, places)
    assert torch.equal(places, x.sort(dim=1, descending=descending, stable=True).indices)


@pytest.mark.parametrize("adds", [False, True])
def test_rows_are_written_where_places_say(adds: bool) -> None:
    x, rows = torch.arange(15.0).reshape(5, 3), 100 * torch.arange(1.0, 19.0).reshape(6, 3)
    places = torch.tensor([2, 0, 2, -7, 9, 2])
    out = torch.full_like(x, torch.nan)
    run(computed.scatter("float32", adds), x, places, rows, out)
    wanted = x.clone()
    for place, row in zip(places.clamp(0, 4).tolist(), rows, strict=True):
        wanted[place] = wanted[place] + row if adds else row
    assert torch.equal(out, wanted)


def test_float_linears_of_experts() -> None:
    x, weight = torch.randn(5, 7), torch.randn(3, 4, 7)
    offsets, out = torch.tensor([2, 2, 4], dtype=torch.int32), torch.full((5, 4), torch.nan)
    run(computed.dense_by_expert(3, 4, 7), x, weight, offsets, out)
    wanted = torch.cat([x[:2] @ weight[0].T, x[2:4] @ weight[2].T, torch.zeros(1, 4)])
    torch.testing.assert_close(out, wanted)


@needs_gpp
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_each_row_meets_the_matrix_of_its_expert(order: int, tmp_path: Path) -> None:
    """To the bit; one expert has no rows, and the row behind those of the last one becomes zero."""
    experts, rows, n, k, group = 3, 4, 40, 72, 32
    spec = LinearSpec("bit", n, k, group)
    weights = [random_weight(n, k, group, seed) for seed in range(experts)]
    packed = [pack_bit_weight(weight) for weight in weights]
    padded = {
        key: torch.stack([torch.nn.functional.pad(p[key].reshape(-1), (0, 16)) for p in packed]) for key in packed[0]
    }
    generator = torch.Generator().manual_seed(1)
    values = torch.zeros(rows, pitch(k), dtype=torch.int8)
    values[:, :k] = torch.randint(-8, 8, (rows, k), generator=generator)
    scale = torch.rand(rows, spec.x_scales, generator=generator)
    offsets = torch.tensor([1, 1, 3], dtype=torch.int32)
    cut = gemv_schedules(spec)[0]
    function = gemv_by_expert(gemv(spec, cut), {key: tuple(t.shape) for key, t in padded.items()}, rows)
    emulator = Emulator(PREAMBLE + cuda_source(function, "experts", "sm_90"), tmp_path)
    inputs = {"values": values.view(torch.int32), "x_scale": scale, "offsets": offsets, **padded}
    grid, block = (rows * -(-n // (32 * cut.row_warps)), 1, 1), (32, cut.row_warps * cut.slice_warps, 1)
    launch = Launch(grid, block, inputs, {"output": torch.full((rows, n), torch.nan)}, order=order)
    found = emulator.run(launch)["output"]
    for row, expert in enumerate([0, 2, 2]):
        wanted = reference.bit_linear(values[row : row + 1, :k], scale[row : row + 1], weights[expert], None)
        assert torch.equal(found[row : row + 1], wanted)
    assert torch.equal(found[3], torch.zeros(n))
