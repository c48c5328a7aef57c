"""A kernel of one matrix runs for the matrices of several experts, each on its own rows, and reads no other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen.backend import bucket_named
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.codegen.kernels.dense import dense
from lbllm_compile.codegen.kernels.order import order
from lbllm_compile.codegen.kernels.scatter import scatter
from lbllm_compile.codegen.program.builder import FunctionBuilder, Layout, ProgramBuilder, TensorSpec
from lbllm_compile.codegen.program.compile import compile_program
from lbllm_compile.codegen.program.experts import by_expert
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import compile_functions
from lbllm_compile.codegen.tvm_runtime import Machine, array
from test_format import random_weight
from torch import Tensor

from lbllm_compile.lowering.translate import _aligned

LANES = 16

OFFSETS = [
    (7, [0, 3, 3, 6, 7]),
    (7, [7, 7, 7, 7, 7]),
    (7, [0, 0, 0, 0, 7]),
    (1, [0, 0, 1, 1, 1]),
    (6, [0, 2, 3, 4, 4]),
    (5, [0, 0, 0, 0, 0]),
]
"""Rows, and where those of five experts end; behind the last end there may be more."""

BROKEN_OFFSETS = [(9, [4, 2, -1, 100, 3]), (3, [-5, -4, -3, -2, -1]), (4, [9, 9, 9, 9, 9])]
"""No model computes such."""


def compiled(function: Any) -> Callable[..., None]:
    return compile_functions({"kernel": function}, Target.parse("cpu").llvm)["kernel"]


@functools.cache
def experts(one_token: bool) -> Callable[..., None]:
    return compiled(by_expert(dense(33, 100, LANES, one_token), [(5, 33, 100)], 1))


@pytest.mark.parametrize(("count", "ends"), [*OFFSETS, *BROKEN_OFFSETS])
@pytest.mark.parametrize("one_token", [True, False])
def test_every_row_meets_its_experts_matrix(count: int, ends: list[int], one_token: bool) -> None:
    """Broken offsets are clamped: each expert's rows end where those before do, or behind that, and within the rows."""
    generator = torch.Generator().manual_seed(count)
    x, weight = torch.randn(count, 100, generator=generator), torch.randn(5, 33, 100, generator=generator)
    expected, start = torch.zeros(count, 33), 0
    for matrix, end in zip(weight, ends, strict=True):
        end = max(min(end, count), start)
        expected[start:end] = x[start:end] @ matrix.t()
        start = end
    out = torch.full((count, 33), float("nan"))
    experts(one_token)(x, weight, torch.tensor(ends, dtype=torch.int32), out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one_token", [True, False])
def test_a_matrix_without_rows_is_not_read(one_token: bool) -> None:
    """It is not a number, and the result is one."""
    x, weight = torch.ones(2, 100), torch.full((5, 33, 100), float("nan"))
    weight[3] = 1.0
    out = torch.empty(2, 33)
    experts(one_token)(x, weight, torch.tensor([0, 0, 0, 2, 2], dtype=torch.int32), out)
    assert torch.equal(out, torch.full((2, 33), 100.0))


def quantized(
    target: str, layout: str, bucket: str, columns: int, group: int, per_token: bool, folder: Path
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A program of the kernel for five W(1+1) experts, and how the weights of one are packed for it."""
    spec = LinearSpec("bit", 33, columns, group, per_token=per_token)
    implementation = cpu.of_layout(cpu.implementations(spec, Target.parse(target)), layout)
    kernel = implementation.function(implementation.schedules(bucket_named(bucket, cpu.BUCKETS))[0])

    def pack(weight: QuantizedWeight) -> Tensor:
        return _aligned(implementation.pack(weight, None))

    size = pack(random_weight(33, columns, group)).numel()
    whole = ProgramBuilder(Layout.of(()), Layout.of(()))
    inputs = [
        TensorSpec("values", ("rows", columns), "int8"),
        TensorSpec("x_scale", ("rows", spec.x_scales), "float32"),
        TensorSpec("packed", (5, size), "uint8"),
        TensorSpec("offsets", (5,), "int32"),
    ]
    function = FunctionBuilder(whole, "graph", inputs, {}, blocks=False)
    call = whole.kernel("kernel", lambda: by_expert(kernel, [(5, size)], 2))
    arguments = [function.value(item.name) for item in inputs]
    function.finish(function.call(call, arguments, ([function.dimension("rows"), 33], "float32")))
    library = folder / f"{target}-{layout}-{bucket}-{columns}.so".replace(":", "-")
    compile_program(whole.finish(), Target.parse(target).llvm, LANES, {}).export(library)
    machine = Machine(library)

    def run(*tensors: Tensor) -> Tensor:
        given = [machine.tensor(tensor.numpy()) for tensor in tensors]
        return torch.from_numpy(np.array(array(machine.function("graph")(*given, *[machine.tuple([])] * 2))))

    return run, pack


LAYOUTS = [
    (target, implementation.layout)
    for target in ("cpu", "cpu:generic")
    for implementation in cpu.implementations(LinearSpec("bit", 33, 100, 32), Target.parse(target))
]


@pytest.mark.parametrize(("columns", "group", "per_token"), [(100, 32, False), (256, 128, True)])
@pytest.mark.parametrize("bucket", [bucket.name for bucket in cpu.BUCKETS])
@pytest.mark.parametrize(("target", "layout"), LAYOUTS)
def test_every_row_meets_its_experts_w11_matrix_to_the_bit(
    target: str, layout: str, bucket: str, columns: int, group: int, per_token: bool, tmp_path: Path
) -> None:
    function, pack = quantized(target, layout, bucket, columns, group, per_token, tmp_path)
    weights = random_weight(33, columns, group, experts=(5,))
    planes = [weights.sign, weights.bitmap, weights.levels, weights.scale]
    packed = torch.stack([pack(QuantizedWeight(*tensors, columns, group)) for tensors in zip(*planes, strict=True)])
    for count, ends in OFFSETS:
        offsets = torch.tensor(ends, dtype=torch.int32)
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
        clip = torch.ones(2)
        values, scale = torch.ops.lbllm.quantize_activation(x, clip, 4, 0 if per_token else group)
        expected = torch.ops.lbllm.grouped_bit_linear(values, scale, *planes, offsets, group)
        assert torch.equal(function(values, scale, packed, offsets), expected)


@functools.cache
def ordered(dtype: str, descending: bool) -> Callable[..., None]:
    return compiled(order(dtype, descending, True))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 300), st.integers(1, 3)),
    dtype=st.sampled_from(["float32", "int64"]),
    descending=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_order_is_torchs_stable_one(shape: tuple[int, int, int], dtype: str, descending: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-5, 6, shape, generator=generator).to(getattr(torch, dtype))
    if x.is_floating_point():
        x[torch.rand(shape, generator=generator) < 0.1] = float("nan")
        x[torch.rand(shape, generator=generator) < 0.1] = -float("inf")
    places = torch.empty(shape, dtype=torch.int64)
    ordered(dtype, descending)(x, places)
    assert torch.equal(places, torch.sort(x, dim=1, descending=descending, stable=True).indices)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("count", "width", "writes"), [(1, 1, 1), (9, 130, 20), (3, 64, 7), (40, 1, 3)])
def test_rows_are_written_in_order_and_within_the_tensor(
    adds: bool, parallel: bool, count: int, width: int, writes: int
) -> None:
    generator = torch.Generator().manual_seed(writes)
    x, rows = (torch.randn(n, width, generator=generator) for n in (count, writes))
    places = torch.randint(-3, count + 3, (writes,), generator=generator)
    expected = x.clone()
    for row, place in zip(rows, places.clamp(0, count - 1).tolist(), strict=True):
        expected[place] = expected[place] + row if adds else row
    out = torch.empty_like(x)
    compiled(scatter("float32", adds, parallel))(x, places, rows, out)
    assert torch.equal(out, expected)
