"""Small calls in front of a kernel, in a launch by itself, where every race is seen."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.cuda.dp4a import gemv, gemv_schedules, pack_bit_weight, pitch
from lbllm_compile.codegen.cuda.emulator import ASCENDING, DESCENDING, Emulator
from lbllm_compile.codegen.cuda.emulator import Launch as EmulatedLaunch
from lbllm_compile.codegen.cuda.program import lower
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.launches import Place
from lbllm_compile.codegen.cuda.program.loops import MOST_OPERATIONS, nests
from lbllm_compile.codegen.cuda.program.prologue import JoinError, Loops, Prologue, Value
from lbllm_compile.codegen.cuda.quantize import QuantizeSchedule, quantize
from lbllm_compile.codegen.cuda.text import PREAMBLE, signature
from lbllm_compile.codegen.errors import UntranslatableError
from lbllm_compile.codegen.program.launch import KernelCall
from lbllm_compile.codegen.program.launch import Place as Tensor
from lbllm_compile.codegen.program.queries import operations
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import cuda_source, s_tir, te, tirx, tvm, tvm_ffi
from test_format import random_weight

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")

EXPERTS, ROWS, N, K, GROUP = 2, 3, 40, 72, 32
ROWS_COMPUTED = Tensor("", 0, (ROWS * K,), "float32", 0)
OUTPUT = Tensor("", 0, (ROWS, N), "float32", 1)


def fused(apart: Collection[str] = ()) -> tuple[lower._Lowering, dict[int, torch.Tensor], list[torch.Tensor]]:
    """Rows that loops compute as one, quantized, and linears of experts; later loops read those rows, too.

    Returns:
        The lowering, weights by their offset, and what the launch of the linears writes: rows and output.
    """
    weights: dict[int, torch.Tensor] = {}

    def stored(tensor: torch.Tensor) -> Tensor:
        offset = 4096 * len(weights)
        weights[offset] = tensor
        return Tensor("weights", offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    generator = torch.Generator().manual_seed(0)
    kernels = ProgramKernels(Target.parse("cuda:sm_90"))
    linear = kernels.linear(LinearSpec("bit", N, K, GROUP))
    matrices = [random_weight(N, K, GROUP, seed) for seed in range(EXPERTS)]
    packed = [pack_bit_weight(matrix) for matrix in matrices]
    stacked = [torch.stack([p[key].reshape(-1) for p in packed]) for key in packed[0]]
    of_experts = linear.tir("1").by_expert
    assert of_experts is not None
    experts = of_experts([tuple(t.shape) for t in stacked], ROWS)
    quantizer = kernels.quantizer(QuantizeSpec(K, GROUP)).tir(False)
    x, clip = torch.randn(ROWS * K, generator=generator), torch.tensor([0.9, 0.8])
    flat = te.placeholder((ROWS * K,), "float32", "x")
    loops = te.create_prim_func([flat, te.compute((ROWS * K,), lambda i: flat[i] + flat[i], "out")])
    offsets = torch.tensor([1, 3], dtype=torch.int32)

    values = Tensor("", 0, (ROWS, pitch(K)), "int8", 2)
    scale = Tensor("", 0, (ROWS, -(-K // GROUP)), "float32", 3)
    seen = replace(ROWS_COMPUTED, shape=(ROWS, K))
    other = replace(ROWS_COMPUTED, result=4)

    def call(name: str, kernel: Any, reads: list[Tensor], writes: list[Tensor]) -> KernelCall:
        return KernelCall(name, kernel, reads, writes, False)

    arguments = [values, scale, *map(stored, stacked), stored(offsets)]
    calls = [
        call("double", loops, [stored(x)], [ROWS_COMPUTED]),
        call(quantizer.name, quantizer.make(), [seen, stored(clip)], [values, scale]),
        call(experts.name, experts.make(), arguments, [OUTPUT]),
        call("double", loops, [ROWS_COMPUTED], [other]),
    ]
    codes, scales = reference.quantize_activation(2 * x.view(ROWS, K), clip, 4, GROUP)
    wanted = [
        reference.bit_linear(codes[row : row + 1], scales[row : row + 1], matrices[expert])
        for row, expert in enumerate([0, 1, 1])
    ]
    return lower._Lowering(kernels, calls, OUTPUT, apart), weights, [2 * x, torch.cat(wanted)]


@needs_gpp
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_rows_that_were_computed_in_another_shape(order: int, tmp_path: Path) -> None:
    """To the bit, in one launch, which keeps them for the next one."""
    lowering, weights, wanted = fused()
    launch, *others = lowering.launches
    assert [other.symbol for other in others] == ["next_token_kernel"]
    kernel = next(kernel for kernel in lowering.texts.values() if kernel.symbol == launch.symbol)
    parameters = signature(kernel.source).parameters
    names = {argument: parameter.name for parameter, argument in zip(parameters, launch.arguments, strict=True)}
    inputs = {name: weights[place.offset.fixed] for place, name in names.items() if isinstance(place, Place)}
    results = [names[lowering.result(tensor)] for tensor in (ROWS_COMPUTED, OUTPUT)]
    outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in zip(results, wanted, strict=True)}
    emulator = Emulator(PREAMBLE + kernel.source, tmp_path)
    found = emulator.run(EmulatedLaunch(launch.grid(0), kernel.block, inputs, outputs, order=order))
    for name, tensor in zip(results, wanted, strict=True):
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("group", [0, GROUP])
def test_shared_memory_is_not_underrated(group: int) -> None:
    """Quantizers have some of their own, and every buffer begins at a multiple of 64 bytes."""
    spec = LinearSpec("bit", N, K, GROUP) if group else LinearSpec("int8", N, K, 0)
    quantizer = QuantizeSpec(K, group, 4 if group else 8)
    prologue = Prologue(gemv(spec, gemv_schedules(spec)[0]))
    x, clip = (Value.of(prologue.parameter(shape, "float32")) for shape in ((1, K), (2,)))
    values, scale = prologue.quantizer(quantize(quantizer, QuantizeSchedule(prologue.warps)), x, clip)
    most = prologue.shared_bytes
    text = cuda_source(prologue.kernel({"values": values, "x_scale": scale}), "kernel", "sm_90")
    buffers = re.findall(r"__shared__ alignas\(64\) (signed char|int|float) \w+\[(\d+)\]", text)
    taken = sum(-(-int(count) * (1 if kind == "signed char" else 4) // 64) * 64 for kind, count in buffers)
    assert len(buffers) == text.count("__shared__") and 0 < taken <= most


def test_loops_that_take_a_number_are_refused_in_a_sentence() -> None:
    number, x = tirx.Var("number", "int64"), te.placeholder((4,), name="x")
    out = te.compute((4,), lambda i: x[i] + tirx.Cast("float32", number))
    loops = te.create_prim_func([x, number, out])
    given, result = Tensor("weights", 0, (4,), "float32"), Tensor("", 0, (4,), "float32", 0)
    call = KernelCall("loops", loops, [given, tirx.const(3, "int64")], [result], False)
    with pytest.raises(UntranslatableError, match="loops takes a size by itself"):
        lower._Lowering(ProgramKernels(Target.parse("cuda:sm_90")), [call], result)


def test_functions_of_other_types_than_fp32_are_refused_in_a_sentence() -> None:
    x = te.placeholder((4,), "float64", "x")
    loops = te.create_prim_func([x, te.compute((4,), lambda i: tirx.exp(x[i]), "out")])
    call = KernelCall("loops", loops, [Tensor("weights", 0, (4,), "float64")], [OUTPUT], False)
    with pytest.raises(UntranslatableError, match="CUDA kernels have no exp of float64"):
        lower._Lowering(ProgramKernels(Target.parse("cuda:sm_90")), [call], OUTPUT)


def test_a_program_for_a_virtual_architecture_has_the_same_text() -> None:
    real, virtual = (ProgramKernels(Target.parse(f"cuda:{arch}_90")) for arch in ("sm", "compute"))
    assert virtual.text(virtual.next_token(8)) == real.text(real.next_token(8))


def test_calls_have_launches_of_their_own_where_shared_memory_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "BLOCK_SHARED_BYTES", 1024)
    kinds = ["double", "quantize", "bit_gemv", "next_token"]
    launched = [launch.symbol for launch in fused()[0].launches]
    assert [kind for kind, symbol in zip(kinds, launched, strict=True) if not symbol.startswith(kind)] == []


def test_a_kernel_that_is_refused_what_is_in_front_of_it_leaves_it_to_others() -> None:
    together, *_ = fused()[0].launches
    kinds = ["double", "quantize", "bit_gemv", "next_token"]
    launched = [launch.symbol for launch in fused([together.symbol])[0].launches]
    assert [kind for kind, symbol in zip(kinds, launched, strict=True) if not symbol.startswith(kind)] == []
    assert together.symbol not in launched


def bent(times: int) -> Any:
    """A loop over ``K`` elements, of stages that read the one before three times for an element."""
    x = te.placeholder((K,), "float32", "x")
    one, two = tirx.const(1.0, "float32"), tirx.const(2.0, "float32")

    def stage(before: Any, number: int) -> Any:
        return te.compute((K,), lambda i: (one - before[i]) * before[i] * (before[i] + two), f"stage{number}")

    return te.create_prim_func([x, functools.reduce(stage, range(times), x)])


@pytest.fixture
def front() -> tuple[Prologue, Value]:
    """The prologue of a linear, and a row of its inputs."""
    spec = LinearSpec("bit", N, K, GROUP)
    prologue = Prologue(gemv(spec, gemv_schedules(spec)[0]))
    return prologue, Value.of(prologue.parameter((K,), "float32"))


def in_front(prologue: Prologue, function: Any, *given: Value) -> Value:
    """The result of loops."""
    loops = Loops.of(function)
    assert loops is not None
    (result,) = prologue.loops(loops, given)
    return result


def test_few_operations_are_done_where_they_are_read(front: tuple[Prologue, Value]) -> None:
    prologue, x = front
    before = prologue.shared_bytes
    assert in_front(prologue, bent(2), x).memory is None and prologue.shared_bytes == before


@needs_gpp
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_stages_that_read_the_one_before_often_do_not_grow_exponentially(
    front: tuple[Prologue, Value], order: int, tmp_path: Path
) -> None:
    """The last one has 3 ** 20 operations for an element, but for those that are done once."""
    prologue, x = front
    out = prologue.parameter((K,), "float32")
    prologue.keep(in_front(prologue, bent(20), x), out)
    kernel = prologue.kernel({})
    assert operations(kernel.body) < 20 * 4 * MOST_OPERATIONS
    source = PREAMBLE + cuda_source(kernel, "kernel", "sm_90")
    row = torch.rand(K, generator=torch.Generator().manual_seed(0))
    weight = random_weight(N, K, GROUP, 0)
    inputs = {
        "values": torch.zeros(1, pitch(K) // 4, dtype=torch.int32),
        "x_scale": torch.ones(1, -(-K // GROUP)),
        **pack_bit_weight(weight),
        "p000": row,
    }
    outputs = {"p001": torch.full((K,), torch.nan), "output": torch.full((1, N), torch.nan)}
    block = 32, prologue.warps, 1
    found = Emulator(source, tmp_path).run(EmulatedLaunch((prologue.blocks, 1, 1), block, inputs, outputs, order=order))
    for _ in range(20):
        row = (1 - row) * row * (row + 2)
    assert torch.equal(found["p001"], row)


def test_launches_of_loops_do_not_grow_exponentially() -> None:
    found = nests(bent(20))
    assert 1 < len(found) < 20
    assert all(operations(nest.function.body) < 2 * MOST_OPERATIONS for nest in found)
    assert len(nests(bent(2))) == 1


def test_elements_of_another_type_do_not_stand_for_a_parameters(front: tuple[Prologue, Value]) -> None:
    prologue, x = front
    values = in_front(prologue, bent(1), x).seen([1, K])
    with pytest.raises(JoinError, match="x_scale is read as float32, and its elements are float16"):
        prologue.kernel({"x_scale": Value(values.shape, lambda indices: tirx.Cast("float16", values.element(indices)))})


@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (0, 5), (0, 0)])
def test_sums_of_nothing_are_zero_and_empty_tensors_are_none(
    front: tuple[Prologue, Value], rows: int, columns: int
) -> None:
    prologue, _ = front
    x, k = te.placeholder((rows, columns), "float32", "x"), te.reduce_axis((0, columns), "k")
    total = te.compute((rows,), lambda i: te.sum(x[i, k], axis=k), "total")
    before = prologue.shared_bytes
    given = Value.of(prologue.parameter((rows * columns,), "float32")).seen((rows, columns))
    result = in_front(prologue, te.create_prim_func([x, total]), given)
    assert float(result.element([tirx.const(0, "int32")])) == 0 and prologue.shared_bytes == before
    prologue.keep(result, prologue.parameter((rows,), "float32"))
    assert "kernel_kernel" in cuda_source(prologue.kernel({}), "kernel", "sm_90")


def test_nothing_is_launched_for_empty_results() -> None:
    x = te.placeholder((4, 0), "float32", "x")
    empty = te.create_prim_func([x, te.compute((4, 0), lambda i, j: x[i, j] + x[i, j], "out")])
    y = te.placeholder((4,), "float32", "y")
    whole = te.create_prim_func([y, te.compute((4,), lambda i: y[i] + y[i], "out")])
    result, logits = Tensor("", 0, (4, 0), "float32", 0), Tensor("", 0, (4,), "float32", 1)
    calls = [
        KernelCall("empty", empty, [Tensor("weights", 0, (4, 0), "float32")], [result], False),
        KernelCall("whole", whole, [Tensor("weights", 0, (4,), "float32")], [logits], False),
    ]
    for asked in ([], calls[:1]):
        lowering = lower._Lowering(ProgramKernels(Target.parse("cuda:sm_90")), [*asked, calls[1]], logits)
        assert [launch.symbol for launch in lowering.launches] == ["whole_0_kernel", "next_token_kernel"]


@pytest.mark.parametrize("kind", ["as it is", "predicate", "begin"])
def test_only_blocks_that_do_all_from_0_on_are_taken_along(kind: str) -> None:
    def other(realized: Any) -> Any:
        block = realized.block
        if not block.iter_vars:
            return realized
        (old,) = block.iter_vars
        if kind == "predicate":
            return s_tir.SBlockRealize(realized.iter_values, tirx.LT(realized.iter_values[0], K - 1), block)
        dom = tvm.ir.Range(tirx.const(1, "int32"), tirx.const(K, "int32"))
        variable = tirx.IterVar(dom, old.var, old.iter_type, old.thread_tag)
        rest = block.body, block.init, block.alloc_buffers, block.match_buffers, block.annotations
        moved = s_tir.SBlock([variable], block.reads, block.writes, block.name_hint, *rest)
        return s_tir.SBlockRealize(realized.iter_values, realized.predicate, moved)

    function = bent(1)
    if kind != "as it is":
        function = function.with_body(tvm_ffi.structural_map(function.body, (s_tir.SBlockRealize, other)))
    assert (Loops.of(function) is None) == (kind != "as it is")


@pytest.mark.parametrize(("start", "taken"), [(0.0, True), (1.0, False)])
def test_only_sums_that_begin_with_0_are_taken_along(start: float, taken: bool) -> None:
    """Every lane begins with it."""
    total = te.comm_reducer(lambda a, b: a + b, lambda dtype: tirx.const(start, dtype), name="total")
    x, k = te.placeholder((K,), "float32", "x"), te.reduce_axis((0, K), "k")
    function = te.create_prim_func([x, te.compute((1,), lambda i: total(x[k], axis=k), "out")])
    assert (Loops.of(function) is not None) == taken
