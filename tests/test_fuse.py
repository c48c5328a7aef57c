"""Kernels that are joined with their neighbours compute what these compute one after the other, to the bit."""

from __future__ import annotations

import pytest
import torch
from lbllm_compile.codegen import prove, reference
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.program.builder import BATCH, LENGTH, FunctionBuilder, Layout, ProgramBuilder, TensorSpec
from lbllm_compile.codegen.program.compile import build_loops, compile_program, operators_to_loops
from lbllm_compile.codegen.program.floats import hide_floats, show_floats
from lbllm_compile.codegen.program.fuse import fuse_rows, join_rows, with_residual
from lbllm_compile.codegen.program.launch import Limits, without_memory
from lbllm_compile.codegen.program.queries import bindings, called_kernel
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target, runnable_targets
from lbllm_compile.codegen.tune.search import spread
from lbllm_compile.codegen.tvm_api import T, compile_functions, relax, tirx, tvm, tvm_ffi

HERE = Target.parse("cpu")
LANES = cpu.lanes(HERE)


@pytest.mark.parametrize("target", runnable_targets())
@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec("bit", 47, 70, 32, 4, False, True),
        LinearSpec("bit", 96, 128, 64, 8),
        LinearSpec("int8", 33, 77, 0, 8, True, True),
    ],
    ids=str,
)
def test_a_linear_adds_a_residual(spec, target):
    target = Target.parse(target)
    for implementation in cpu.implementations(spec, target):
        for bucket in cpu.BUCKETS:
            schedules = spread(implementation.schedules(bucket), 2)
            functions = {f"k{i}": with_residual(implementation.function(s)) for i, s in enumerate(schedules)}
            library = compile_functions(functions, target.llvm)
            for case in prove.linear_cases(spec, seed=3):
                packed = implementation.pack(case.weight, case.bias)
                residual = torch.randn(case.expected.shape, generator=torch.Generator().manual_seed(4))
                for name in functions:
                    for tokens in prove.token_counts(bucket.lowest, bucket.highest):
                        expected = case.expected[:tokens] + residual[:tokens]
                        out = torch.full_like(expected, float("nan"))
                        library[name](case.values[:tokens], case.x_scale[:tokens], packed, residual[:tokens], out)
                        assert prove.agree(out, expected), (implementation.layout, bucket.name, case.name, tokens)


def test_a_kernel_that_keeps_sums_in_its_result_adds_the_residual_behind_them():
    @T.prim_func(s_tir=True)
    def sums(x_: T.handle, out_: T.handle):
        tokens = T.int32()
        x = T.match_buffer(x_, (tokens, 3), "float32", align=4)
        out = T.match_buffer(out_, (tokens, 2), "float32", align=4)
        for row in T.parallel(2):
            for m in range(tokens):
                out[m, row] = T.float32(0)
                for k in range(3):
                    out[m, row] = out[m, row] + x[m, k]

    function = compile_functions({"sums": with_residual(sums)}, HERE.llvm)["sums"]
    x, residual, out = torch.arange(12.0).view(4, 3), torch.arange(8.0).view(4, 2), torch.empty(4, 2)
    function(x, residual, out)
    assert torch.equal(out, x.sum(1, keepdim=True) + residual)


# Quantizers that compute their rows


def build(width: int, spec: QuantizeSpec, few: bool, also: str = ""):
    """``quantize(norm(x))`` as a module with one function ``f(x, weight, factors, (), ())``: values and scales.

    Args:
        width: channels.
        spec: of the quantizer.
        few: for one token instead of any number.
        also: what else happens to the norm: it is ``"read"``, or its rows are ``"halved"``.
    """
    whole = ProgramBuilder(Layout({}, {}, 0), Layout({}, {}, 0))
    inputs = [
        TensorSpec("x", (BATCH, LENGTH, width), "float32"),
        TensorSpec("weight", (width,), "float32"),
        TensorSpec("factors", (2,), "float32"),
    ]
    function = FunctionBuilder(whole, "f", inputs, {BATCH: 1, LENGTH: 1} if few else {}, blocks=False)
    x, weight, factors = (function.value(tensor.name) for tensor in inputs)
    inverse = relax.op.rsqrt(relax.op.add(function.mean_of_squares(x), relax.const(1e-5, "float32")))
    h = function.emit(relax.op.multiply(weight, relax.op.multiply(x, inverse)))
    rows = function.dimension(BATCH) * function.dimension(LENGTH)
    if also == "halved":
        rows = rows * 2
    flat = function.emit(relax.op.reshape(h, [rows, spec.in_features]))
    kernel = whole.kernel("quantize_rows", lambda: cpu.quantizer(spec, HERE, parallel=not few), by_rows=True)
    operands = [flat, factors, factors] if spec.knees else [flat, factors]
    outputs = ([rows, spec.in_features], "int8"), ([rows, spec.scales], "float32")
    values, scale = function.call(kernel, operands, *outputs)
    results = [values, scale, h] if also == "read" else [values, scale]
    function.finish(function.emit(relax.Tuple(results)))
    return whole.finish()


def called(module, function: str = "f") -> list[str]:
    """The kernels that a function of a module calls, in order."""
    return [name for binding in bindings(module[function]) if (name := called_kernel(binding.value))]


@pytest.mark.parametrize("knees", [False, True], ids=["clip", "knees"])
@pytest.mark.parametrize(("width", "group"), [(64, 32), (75, 32), (48, 0), (576, 64)])
def test_a_quantizer_computes_its_rows(width, group, knees):
    spec = QuantizeSpec(width, group, 4, knees)
    generator = torch.Generator().manual_seed(width)
    weight, factors = torch.randn(width, generator=generator), torch.tensor([0.9, 0.7])
    for few, shapes in ((True, [(1, 1)]), (False, [(1, 1), (1, 5), (3, 7)])):
        before = operators_to_loops(build(width, spec, few), LANES)
        norm, quantizer = called(before)
        after = fuse_rows(before)
        assert called(after) == [f"{norm}_{quantizer}"]
        for batch, length in shapes:
            x = torch.randn(batch, length, width, generator=generator)
            expected, results = run(before, x, weight, factors), run(after, x, weight, factors)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
            assert results[0].unique().numel() > 8


def run(module, *arguments) -> list[torch.Tensor]:
    """The results of the function of a module of loops."""
    machine = relax.VirtualMachine(build_loops(module, HERE.llvm), tvm.cpu())
    results = machine["f"](*map(tvm_ffi.from_dlpack, arguments), (), ())
    return [torch.from_dlpack(result).clone() for result in results]


@pytest.mark.parametrize("also", ["read", "halved"])
def test_rows_that_are_read_elsewhere_or_cut_stay(also):
    spec = QuantizeSpec(32 if also == "halved" else 64, 32, 4)
    module = operators_to_loops(build(64, spec, False, also), LANES)
    assert called(fuse_rows(module)) == called(module)


@T.prim_func(s_tir=True)
def negated(x_: T.handle, y_: T.handle, out_: T.handle):
    rows = T.int32()
    x = T.match_buffer(x_, (rows, 48), "float32", align=4)
    y = T.match_buffer(y_, (rows, 48), "float32", align=4)
    out = T.match_buffer(out_, (rows, 48), "float32", align=4)
    for m in range(rows):
        for k in range(48):
            out[m, k] = T.float32(0) - x[m, k] * y[m, k]


@T.prim_func(s_tir=True)
def bound(x_: T.handle, y_: T.handle, out_: T.handle):
    rows = T.int32()
    x = T.match_buffer(x_, (rows, 48), "float32", align=4)
    y = T.match_buffer(y_, (rows, 48), "float32", align=4)
    out = T.match_buffer(out_, (rows, 48), "float32", align=4)
    for m in range(rows):
        for k in range(48):
            product: T.let = x[m, k] * y[m, k]
            out[m, k] = T.float32(0) - product


@T.prim_func(s_tir=True)
def chosen(x_: T.handle, y_: T.handle, out_: T.handle):
    rows = T.int32()
    x = T.match_buffer(x_, (rows, 48), "float32", align=4)
    y = T.match_buffer(y_, (rows, 48), "float32", align=4)
    out = T.match_buffer(out_, (rows, 48), "float32", align=4)
    for m in range(rows):
        for k in range(48):
            out[m, k] = T.Select(k < 48, x[m, k] * -y[m, k], T.float32(0))


@T.prim_func(s_tir=True)
def sums(h_: T.handle, z_: T.handle, out_: T.handle):
    rows = T.int32()
    h = T.match_buffer(h_, (rows, 48), "float32", align=4)
    z = T.match_buffer(z_, (rows, 48), "float32", align=4)
    out = T.match_buffer(out_, (rows, 48), "float32", align=4)
    for m in range(rows):
        for k in range(48):
            out[m, k] = h[m, k] + z[m, k]


@pytest.mark.parametrize("producer", [negated, bound, chosen], ids=["negated", "bound", "chosen"])
def test_a_product_is_rounded_before_a_sum_of_the_kernel_behind(producer):
    """The addend cancels the rounded product, so that what a single rounding leaves is all there is."""
    producer = show_floats(hide_floats(producer))
    joined = join_rows(producer, sums)
    assert joined is not None
    library = compile_functions({"joined": joined, "producer": producer, "sums": sums}, HERE.llvm)
    x, y = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    h, expected, out = torch.empty(3, 5, 48)
    z = x * y
    library["producer"](x, y, h)
    library["sums"](h, z, expected)
    library["joined"](x, y, z, out)
    assert torch.equal(h, -z) and not expected.any() and torch.equal(out, expected)


def test_a_product_in_the_result_is_rounded_before_the_residual():
    @T.prim_func(s_tir=True)
    def scaled(x_: T.handle, y_: T.handle, out_: T.handle):
        x = T.match_buffer(x_, (1, 48), "float32", align=4)
        y = T.match_buffer(y_, (1, 48), "float32", align=4)
        out = T.match_buffer(out_, (1, 48), "float32", align=4)
        for n in range(48):
            out[0, n] = x[0, n]
            out[0, n] = out[0, n] * y[0, n]

    function = compile_functions({"scaled": with_residual(scaled)}, HERE.llvm)["scaled"]
    x, y = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(0))
    out = torch.empty(1, 48)
    function(x, y, -(x * y), out)
    assert not out.any()


def test_a_result_is_not_copied_to_change_its_shape():
    whole = ProgramBuilder(Layout({}, {}, 0), Layout({}, {}, 0))
    inputs = [TensorSpec("x", (LENGTH, 32), "float32"), TensorSpec("clip", (2,), "float32")]
    function = FunctionBuilder(whole, "f", inputs, {}, blocks=False)
    x, clip = function.value("x"), function.value("clip")
    length = function.dimension(LENGTH)
    kernel = whole.kernel("quantize_rows", lambda: cpu.quantizer(QuantizeSpec(32, 0, 8), HERE, parallel=True))
    values, _ = function.call(kernel, [x, clip], ([length, 32], "int8"), ([length, 1], "float32"))
    function.finish(function.emit(relax.op.reshape(values, [1, length, 4, 8])))
    module = operators_to_loops(whole.finish(), LANES)
    assert called(module) == ["quantize_rows"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    machine = relax.VirtualMachine(build_loops(module, HERE.llvm), tvm.cpu())
    result = machine["f"](*map(tvm_ffi.from_dlpack, (x, torch.ones(2))), (), ())
    expected, _ = reference.quantize_activation(x, torch.ones(2), 8, 0)
    assert torch.equal(torch.from_dlpack(result), expected.view(1, 3, 4, 8))


@pytest.mark.parametrize("size", [1, BATCH], ids=["one", "any"])
def test_a_slice_from_the_beginning_is_no_view(size):
    whole = ProgramBuilder(Layout({}, {}, 0), Layout({}, {}, 0))
    function = FunctionBuilder(whole, "f", [TensorSpec("x", (size, 6), "float32")], {}, blocks=False)
    axis, end = (1, 4) if size == 1 else (0, 2)
    function.finish(function.emit(relax.op.strided_slice(function.value("x"), [axis], [0], [end], assume_inbound=True)))
    module = operators_to_loops(whole.finish(), LANES)
    assert len(called(module)) == 1
    x = torch.arange(6.0 if size == 1 else 18.0).view(-1, 6)
    result = relax.VirtualMachine(build_loops(module, HERE.llvm), tvm.cpu())["f"](tvm_ffi.from_dlpack(x), (), ())
    assert torch.equal(torch.from_dlpack(result), x[:, :4] if size == 1 else x[:2])


def test_a_sum_over_another_axis_is_no_loop_over_rows():
    whole = ProgramBuilder(Layout({}, {}, 0), Layout({}, {}, 0))
    inputs = [TensorSpec("x", (BATCH, 3, 64), "float32"), TensorSpec("clip", (2,), "float32")]
    function = FunctionBuilder(whole, "f", inputs, {}, blocks=False)
    total, rows = function.emit(relax.op.sum(function.value("x"), [1])), function.dimension(BATCH)
    kernel = whole.kernel("quantize_rows", lambda: cpu.quantizer(QuantizeSpec(64, 32, 4), HERE, parallel=True), True)
    outputs = ([rows, 64], "int8"), ([rows, 2], "float32")
    function.finish(function.call(kernel, [total, function.value("clip")], *outputs)[0])
    module = operators_to_loops(whole.finish(), LANES)
    assert called(fuse_rows(module)) == called(module) and len(called(module)) == 2


def test_a_compiled_program_has_joined_kernels_where_it_may():
    for apart in ((), ("f",)):
        module = build(64, QuantizeSpec(64, 32, 4), False)
        text = compile_program(module, HERE.llvm, LANES, {}, apart).executable.as_text()
        names = [line.split()[1] for line in text.splitlines() if line.strip().startswith("call ")]
        norm, *rest = [name for name in names if "rsqrt" in name or "quantize" in name]
        assert (rest == ["quantize_rows"]) == (not norm.endswith("_quantize_rows")) == bool(apart)


def test_large_working_memory_of_kernels_is_asked_for_once():
    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle):
        x = T.match_buffer(x_, (8,), "float32", align=4)
        for i in range(8):
            large = T.alloc_buffer((300,), "float32")
            small = T.alloc_buffer((100,), "float32")
            large[i] = x[i]
            small[i] = large[i]
            x[i] = small[i]

    memory, body = without_memory(kernel.body)
    assert [int(size) for buffer in memory for size in buffer.ty.shape] == [300]
    left = []
    tvm_ffi.structural_walk(body, (tirx.AllocBuffer, lambda found: left.append(int(found.buffer.ty.shape[0])) or None))
    assert left == [100]


def test_working_memory_of_a_limited_size_is_asked_for_once_too():
    """As much as there may be; what has no limit stays where it is."""

    @T.prim_func(s_tir=True)
    def kernel(x_: T.handle):
        batch = T.int64()
        total = T.int64()
        x = T.match_buffer(x_, (batch, total), "float32", align=4)
        rows: T.let = T.cast((batch + T.int64(7)) // T.int64(8) * T.int64(8), "int32")
        limited = T.alloc_buffer((rows * 4,), "float32")
        endless = T.alloc_buffer((total,), "float32")
        limited[0] = x[0, 0]
        endless[0] = limited[0]
        x[0, 0] = endless[0]

    memory, body = without_memory(kernel.body, Limits({"batch": 11}))
    assert [int(size) for buffer in memory for size in buffer.ty.shape] == [64]
    left, views = [], []
    tvm_ffi.structural_walk(body, (tirx.AllocBuffer, lambda found: left.append(found.buffer.name) or None))
    tvm_ffi.structural_walk(body, (tirx.DeclBuffer, lambda found: views.append(found.buffer.name) or None))
    assert (left, views) == (["endless"], ["limited"])
