"""CUDA kernels without a GPU: generated text, compiled cubins, emulated execution, and the emulator's own eyes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.cuda import compiler as cuda_compiler
from lbllm_compile.codegen.cuda import device as cuda_device
from lbllm_compile.codegen.cuda import dp4a as cuda_dp4a
from lbllm_compile.codegen.cuda import emit as cuda
from lbllm_compile.codegen.cuda import mma as cuda_mma
from lbllm_compile.codegen.cuda import proof as cuda_proof
from lbllm_compile.codegen.cuda.dp4a import GemmSchedule, GemvSchedule
from lbllm_compile.codegen.cuda.emulator import DESCENDING, Emulator, Launch, Sparse
from lbllm_compile.codegen.cuda.quantize import QuantizeSchedule
from lbllm_compile.codegen.cuda.text import signature
from lbllm_compile.codegen.errors import KernelError, TargetError
from lbllm_compile.codegen.format import QuantizedWeight, codes_to_planes
from lbllm_compile.codegen.sizes import GROUPS
from lbllm_compile.codegen.spec import KINDS, LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import parse_targets
from lbllm_compile.codegen.targets.cuda import ARCHITECTURES, DEFAULT_ARCHITECTURES, VIRTUAL_ARCHITECTURES

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate CUDA kernels with")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the search path")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the module, so that the emulator's runtime is compiled once."""
    return tmp_path_factory.mktemp("cuda-cache")


@pytest.fixture(scope="module")
def gemv() -> cuda.EmittedKernel:
    """A small GEMV with everything in it: several row blocks, split slices, a tail group, a bias."""
    return cuda.emit(LinearSpec("bit", 100, 259, 64, bias=True), "gemv", "sm_90")


# Targets


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("cuda", ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_100")),
        ("cuda:sm_80", ("sm_80",)),
        ("cuda:sm_90,cuda:sm_80", ("sm_90", "sm_80")),
        ("cuda:compute_75", ("compute_75",)),
        ("cuda:sm_90, sm_80, sm_90", ("sm_90", "sm_80")),
    ],
)
def test_architectures_of_a_target(text: str, archs: tuple[str, ...]) -> None:
    assert [t.arch for t in parse_targets(text)] == list(archs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda:sm_91", "did you mean cuda:sm_90"),
        ("cuda:compute_91", "did you mean cuda:compute_90"),
        ("cuda:banana", "known are sm_75"),
        ("cuda:", "cuda:sm_90"),
        ("cudaa", "unknown target 'cudaa'; did you mean 'cuda'"),
    ],
)
def test_unknown_architectures_are_named(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_targets(text)


# Generated text


def filecheck(text: str, checks: str, folder: Path) -> None:
    """Matches ``text`` against LLVM-style CHECK lines."""
    (folder / "text").write_text(text)
    (folder / "checks").write_text(checks)
    command = [sys.executable, "-m", "filecheck", str(folder / "checks"), "--input-file", str(folder / "text")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_gemv_text(gemv: cuda.EmittedKernel, tmp_path: Path) -> None:
    checks = """
CHECK: __launch_bounds__(128) bit_gemv_100x259_g64_a4g_bias_kernel(
CHECK-SAME: bias_ptr, {{.*}}levels_ptr, {{.*}}output_ptr, {{.*}}values_ptr, {{.*}}w_scale_ptr, {{.*}}weight_ptr,
CHECK: __shared__ {{.*}} int partial_ptr
CHECK: *(uint4*)(loaded_ptr + 0) = *(uint4*)(weight_ptr
CHECK: *(int4*)(x_ptr + 0) = *(int4*)(values_ptr
CHECK: ptx_and_b32(loaded_ptr[0], (uint)858993459)
CHECK: __dp4a(x_ptr[0], ((int)ptx_prmt_b32(level
CHECK: __fmul_rn(x_scale_ptr
CHECK: __syncthreads();
CHECK: __fmaf_rn(__int2float_rn(partial_ptr
CHECK-NOT: __syncthreads
CHECK: __fadd_rn(y_ptr[0], bias_ptr
CHECK: output_ptr[
"""
    filecheck(gemv.source, checks, tmp_path)


def test_gemm_text(tmp_path: Path) -> None:
    kernel = cuda.emit(LinearSpec("bit", 96, 256, 128), "gemm", "sm_90", GemmSchedule(32, 32, 4, 4, 128))
    checks = """
CHECK: __launch_bounds__(64) bit_gemm_96x256_g128_a4g_kernel(
CHECK-SAME: x_scale_ptr, int tokens);
CHECK: __shared__ {{.*}} int x_tile_ptr[1148]
CHECK: __shared__ {{.*}} int w_tile_ptr[1148]
CHECK: < tokens)
CHECK: ptx_prmt_b32(
CHECK: __syncthreads();
CHECK: *(int4*)(a_ptr + 0) = *(int4*)(x_tile_ptr
CHECK: __dp4a(a_ptr[0], b_ptr[0]
CHECK: __syncthreads();
CHECK: __fmaf_rn(__int2float_rn(
"""
    filecheck(kernel.source, checks, tmp_path)


def test_quantizer_text_rounds_explicitly(tmp_path: Path) -> None:
    kernel = cuda.emit(QuantizeSpec(259, 64), "quantize", "sm_90")
    checks = """
CHECK: __launch_bounds__
CHECK: __shfl_xor_sync((uint)4294967295
CHECK: __fmul_rn(bounds_ptr[0], clip_ptr[0])
CHECK: __fdiv_rn(
CHECK: rintf(__fdiv_rn(
CHECK: values_ptr[{{.*}} = ((signed char)__float2int_rn(
"""
    filecheck(kernel.source, checks, tmp_path)


@pytest.mark.parametrize("form", ["gemv", "gemm"])
@pytest.mark.parametrize("kind", ["bit", "int8"])
def test_parameters_keep_one_order(kind: str, form: str) -> None:
    """TVM sorts a kernel's parameters by name; the launch order must be the emitted one."""
    kernel = cuda.emit(LinearSpec(kind, 64, 128, 64, bias=True), form, "sm_80")
    levels = ["levels"] if kind == "bit" else []
    expected = ["bias", *levels, "output", "values", "w_scale", "weight", "x_scale"]
    assert list(kernel.parameters) == expected + (["tokens"] if form == "gemm" else [])


def test_other_parameter_orders_are_refused() -> None:
    text = 'extern "C" __global__ void __launch_bounds__(32) f(int* __restrict__ b_ptr, int* __restrict__ a_ptr) {}'
    with pytest.raises(KernelError, match="alphabetical"):
        signature(text)


def test_text_does_not_depend_on_the_architecture(gemv: cuda.EmittedKernel) -> None:
    assert cuda.emit(gemv.spec, "gemv", "sm_80").source == gemv.source


def test_generating_leaves_tvms_compiler_alone() -> None:
    import tvm_ffi

    before = tvm_ffi.get_global_func("tvm_callback_cuda_compile")
    cuda.emit(QuantizeSpec(64, 64), "quantize", "sm_80")
    assert tvm_ffi.get_global_func("tvm_callback_cuda_compile").same_as(before)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LinearSpec("bit", 32, 64, 64, act_bits=16), "--act-bits 4 or 8"),
        (QuantizeSpec(64, 64, 16), "--act-bits 4 or 8"),
        (LinearSpec("int8", 32, 200_000, 0), "overflow"),
    ],
)
def test_what_has_no_kernel_is_refused(spec: LinearSpec | QuantizeSpec, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        cuda.emit(spec, "gemv" if isinstance(spec, LinearSpec) else "quantize", "sm_80")


def test_schedules_are_checked() -> None:
    spec = LinearSpec("bit", 64, 128, 64)
    assert len(cuda_dp4a.gemm_schedules(spec)) >= 16
    with pytest.raises(KernelError, match="does not fit"):
        cuda.emit(spec, "gemv", "sm_80", GemvSchedule(1, 16))


def test_too_many_tokens_are_refused(gemv: cuda.EmittedKernel) -> None:
    with pytest.raises(KernelError, match="split the call"):
        gemv.grid(2)
    gemm = cuda.emit(LinearSpec("bit", 100, 259, 64), "gemm", "sm_80")
    assert gemm.grid(65) == (4, 2, 1)
    with pytest.raises(KernelError, match="split the call"):
        gemm.grid(10_000_000)


# Layouts


def random_weight(n: int, k: int, group: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    codes = torch.randint(4, (n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-127, 128, (n, groups, 4), generator=generator).sort(-1).values.to(torch.int8)
    scale = torch.rand(n, groups, generator=generator).half()
    return QuantizedWeight(*codes_to_planes(codes), levels, scale, k, group)


@given(st.integers(1, 70), st.integers(1, 600), st.sampled_from(GROUPS), st.integers(0, 2**30))
@settings(max_examples=40, deadline=None)
def test_packed_codes_pick_the_levels(n: int, k: int, group: int, seed: int) -> None:
    """What the kernel's masks, shifts and byte permutations read from the layout is the weight."""
    weight = random_weight(n, k, group, seed)
    packed = cuda_dp4a.pack_bit_weight(weight)
    words = packed["weight"].numpy().view(np.uint32)
    blocks, groups, chunks, rows, vector = words.shape
    inputs = np.empty((blocks, rows, groups, chunks, vector, 16), np.uint8)
    for quad in range(4):
        selector = ((words >> (2 if quad >= 2 else 0)) & 0x33333333) >> (16 * (quad % 2))
        for byte in range(4):
            inputs[..., 4 * quad + byte] = ((selector >> (4 * byte)) & 7).transpose(0, 3, 1, 2, 4)
    codes = torch.from_numpy(inputs.reshape(blocks * rows, -1))[:n, :k]
    assert torch.equal(codes, weight.codes())
    levels = packed["levels"].view(torch.int8).view(blocks, groups, rows, 4).transpose(1, 2).reshape(-1, groups, 4)
    assert torch.equal(levels[:n], weight.levels)
    scale = packed["w_scale"].view(torch.float16).transpose(1, 2).reshape(-1, groups)
    assert torch.equal(scale[:n], weight.scale) and not scale[n:].any()


@given(st.integers(1, 70), st.integers(1, 600), st.sampled_from((0, *GROUPS)))
@settings(max_examples=20, deadline=None)
def test_packed_int8_rows_keep_their_order(n: int, k: int, group: int) -> None:
    rows = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed = cuda_dp4a.pack_int8_weight(rows, torch.ones(n), group)["weight"]
    flat = packed.permute(0, 3, 1, 2, 4).reshape(packed.shape[0] * 32, -1).contiguous().view(torch.int8)
    assert torch.equal(flat[:n, :k], rows) and not flat[n:].any() and not flat[:, k:].any()


# Emulated execution


LINEARS = [
    (LinearSpec("bit", 100, 259, 32, per_token=True), "gemv", GemvSchedule(2, 8)),
    (LinearSpec("bit", 33, 4200, 32, act_bits=8), "gemv", GemvSchedule(1, 16)),
    (LinearSpec("bit", 290, 1000, 256, bias=True, additive=True), "gemv", GemvSchedule(4, 2)),
    (LinearSpec("int8", 70, 259, 0, act_bits=8, bias=True), "gemv", None),
    (LinearSpec("bit", 70, 259, 32, act_bits=8, bias=True), "gemm", GemmSchedule(16, 32, 4, 4, 32)),
    (LinearSpec("bit", 97, 700, 256, per_token=True), "gemm", GemmSchedule(32, 64, 8, 4, 128)),
    (LinearSpec("int8", 40, 259, 64, act_bits=8), "gemm", GemmSchedule(16, 32, 4, 4, 64)),
    (LinearSpec("int8", 33, 100, 0, act_bits=4), "gemm", None),
    (LinearSpec("int4", 70, 259, 64, act_bits=8), "gemv", None),
    (LinearSpec("int4", 33, 100, 32, bias=True), "gemv", GemvSchedule(2, 4)),
    (LinearSpec("int4", 40, 515, 256, act_bits=8, per_token=True), "gemv", None),
    (LinearSpec("int4", 70, 259, 64, act_bits=8), "gemm", None),
    (LinearSpec("int4", 33, 100, 32, bias=True), "gemm", GemmSchedule(16, 32, 4, 4, 32)),
    (LinearSpec("int4", 40, 515, 256, act_bits=8, per_token=True), "gemm", None),
]


@needs_gpp
@pytest.mark.parametrize(("spec", "form", "schedule"), LINEARS, ids=lambda v: getattr(v, "kind", None))
def test_emulated_linears_are_exact(spec: LinearSpec, form, schedule, cache: Path) -> None:
    kernel = cuda.emit(spec, form, "sm_90", schedule)
    assert cuda_proof.prove_emulated(kernel, cache) == cuda_proof.EMULATED


@needs_gpp
@pytest.mark.parametrize(
    ("spec", "schedule"),
    [
        (QuantizeSpec(259, 32), QuantizeSchedule(4)),
        (QuantizeSpec(300, 256, 8), None),
        (QuantizeSpec(700, 0), None),
        (QuantizeSpec(259, 32, knees=True), QuantizeSchedule(4)),
        (QuantizeSpec(300, 256, planes=True), None),
        (QuantizeSpec(700, 0, knees=True), None),
        (QuantizeSpec(130, 0, planes=True), None),
    ],
    ids=str,
)
def test_emulated_quantizers_are_exact(spec: QuantizeSpec, schedule, cache: Path) -> None:
    assert cuda_proof.prove_emulated(cuda.emit(spec, "quantize", "sm_90", schedule), cache) == cuda_proof.EMULATED


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_default_kernel_is_exact(group: int, bits: int, cache: Path) -> None:
    for n, k in ((1, 1), (31, 33), (129, 515), (700, 1111)):
        specs = [LinearSpec(kind, n, k, group, bits, bias=kind != "bit") for kind in KINDS]
        for spec in specs:
            for form in ("gemv", "gemm"):
                cuda_proof.prove_emulated(cuda.emit(spec, form, "sm_90"), cache)
        tables = [{"knees": True}, {"planes": True}] if bits == 4 else []
        for quantizer in (QuantizeSpec(k, g, bits, **table) for g in (group, 0) for table in ({}, *tables)):
            cuda_proof.prove_emulated(cuda.emit(quantizer, "quantize", "sm_90"), cache)


@needs_gpp
def test_quantizer_and_linear_fit_together(gemv: cuda.EmittedKernel, cache: Path) -> None:
    """The quantizer's padded values are what the linear reads, whatever order the threads run in."""
    spec = gemv.spec
    assert isinstance(spec, LinearSpec)
    generator = torch.Generator().manual_seed(3)
    x, clip = torch.randn(1, 259, generator=generator), torch.tensor([0.9, 1.0])
    weight, bias = random_weight(100, 259, 64, 5), torch.randn(100, generator=generator)
    quantizer = cuda.emit(QuantizeSpec(259, 64), "quantize", "sm_90")
    quantized = Emulator(quantizer.source, cache).run(
        Launch(
            quantizer.grid(1),
            quantizer.block,
            {"x": x, "clip": clip, "tokens": 1},
            {"values": torch.zeros(1, cuda_dp4a.pitch(259), dtype=torch.int8), "scale": torch.zeros(1, spec.groups)},
        )
    )
    inputs = {**cuda_dp4a.pack_bit_weight(weight), "bias": bias}
    inputs |= {"values": quantized["values"], "x_scale": quantized["scale"]}
    values, scale = reference.quantize_activation(x, clip, 4, 64)
    expected = reference.bit_linear(values, scale, weight, bias)
    emulator = Emulator(gemv.source, cache)
    for order in (DESCENDING, 7):
        launch = Launch(gemv.grid(1), gemv.block, inputs, {"output": torch.full((1, 100), float("nan"))}, order=order)
        assert torch.equal(emulator.run(launch)["output"], expected)


def broken(kernel: cuda.EmittedKernel, old: str, new: str) -> cuda.EmittedKernel:
    assert old in kernel.source
    return replace(kernel, source=kernel.source.replace(old, new))


@needs_gpp
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  __syncthreads();\n", "", "no thread wrote|race"),
        (">> (uint)2)", ">> (uint)4)", "of its output differ"),
        ("levels_ptr[(", "levels_ptr[100000 + (", "outside every buffer|from the start of levels"),
    ],
)
def test_planted_bugs_are_caught(gemv: cuda.EmittedKernel, old: str, new: str, message: str, cache: Path) -> None:
    with pytest.raises(KernelError, match=message):
        cuda_proof.prove_emulated(broken(gemv, old, new), cache)


# What the emulator sees


MODES = """
extern "C" __global__ void __launch_bounds__(64) modes(
    int* __restrict__ input_ptr, int* __restrict__ output_ptr, int mode) {
  __shared__ alignas(64) int tile[64];
  int i = threadIdx.x;
  if (mode == 0) {  // correct: a reversal through shared memory, twice
    tile[i] = input_ptr[i];
    __syncthreads();
    int value = tile[63 - i];
    __syncthreads();
    tile[i] = value;
    __syncthreads();
    output_ptr[i] = tile[i] + __shfl_xor_sync(0xffffffffu, i, 1) + __shfl_down_sync(0xffffffffu, i, 4, 8);
  } else if (mode == 1) {  // a barrier only half of the block reaches
    if (i < 32) __syncthreads();
  } else if (mode == 2) {  // a write after a read with no barrier between
    tile[i] = i;
    __syncthreads();
    int value = tile[(i + 32) % 64];
    tile[i] = value;
  } else if (mode == 3) {  // two barriers where there should be one
    if (i < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (mode == 4) {  // a shuffle that not every lane of its mask reaches
    if (i % 32 < 16) output_ptr[i] = __shfl_xor_sync(0xffffffffu, i, 1);
  } else if (mode == 5) {
    output_ptr[i + 1] = 1;
  } else if (mode == 6) {
    input_ptr[i] = 1;
  } else if (mode == 7) {  // 16 bytes from an address that is no multiple of 16
    if (i < 8) *(int4*)(output_ptr + 4 * i) = *(int4*)(input_ptr + 4 * i + 1);
  } else if (mode == 8) {  // two threads, one output
    output_ptr[i / 2] = i;
  } else if (mode == 9) {  // lanes of one warp in turn: a warp barrier is enough within the warp
    tile[i] = i;
    __syncwarp();
    output_ptr[i] = tile[i ^ 1];
  } else if (mode == 10) {  // but not across warps
    tile[i] = i;
    __syncwarp();
    output_ptr[i] = tile[63 - i];
  } else if (mode == 11) {
    output_ptr[i] = tile[i];
  }
}
"""


@pytest.fixture(scope="module")
def modes(cache: Path) -> Emulator:
    return Emulator(MODES, cache)


def launch_mode(mode: int) -> Launch:
    return Launch((1, 1, 1), (64, 1, 1), {"input": torch.arange(64, dtype=torch.int32), "mode": mode}, {
        "output": torch.zeros(64, dtype=torch.int32)
    })  # fmt: skip


@needs_gpp
def test_emulator_runs_barriers_and_shuffles(modes: Emulator) -> None:
    i = np.arange(64)
    down = np.where(i % 8 < 4, i % 32 + i // 32 * 32 + 4, i)
    assert modes.run(launch_mode(0))["output"].tolist() == (63 - i + (i ^ 1) + down).tolist()
    assert modes.run(launch_mode(9))["output"].tolist() == (i ^ 1).tolist()


@needs_gpp
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (1, r"divergent barrier: thread \(\d+,0,0\) returned while others wait at line 15"),
        (2, "race: .* shared memory, which thread .* with no barrier between"),
        (3, "divergent barrier: .* waits at line"),
        (4, "waits for its warp at line"),
        (5, "writes 256 bytes from the start of output, which has 256"),
        (6, "writes to the input input"),
        (7, "misaligned"),
        (8, "race: .* of output"),
        (10, "race: "),
        (11, "which no thread wrote"),
    ],
)
def test_emulator_sees(modes: Emulator, mode: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        modes.run(launch_mode(mode))


@needs_gpp
def test_emulator_takes_sparse_buffers(modes: Emulator) -> None:
    launch = launch_mode(0)
    dense = torch.zeros(64, dtype=torch.int32)
    dense[40:44] = torch.arange(4, dtype=torch.int32)
    sparse = Sparse(256, [(160, dense[40:44])])
    results = [modes.run(replace(launch, inputs={**launch.inputs, "input": x}))["output"] for x in (dense, sparse)]
    assert torch.equal(*results)


@needs_gpp
def test_text_that_is_not_cuda_is_rejected(cache: Path) -> None:
    with pytest.raises(KernelError, match="rejects"):
        Emulator(MODES.replace("__shfl_down_sync", "__no_such_intrinsic"), cache)


# Compiling


SMALL = LinearSpec("bit", 64, 192, 64)


@needs_nvcc
def test_emit_cuda_compiles_proves_and_caches(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = QuantizeSpec(192, 64)
    kernels = cuda.emit_cuda([SMALL, SMALL], [quantizer], ("sm_80", "sm_90"), cache_dir=cache)
    assert [(k.spec, k.form, k.arch) for k in kernels] == [
        (spec, form, arch)
        for spec, form in ((SMALL, "gemv"), (SMALL, "gemm"), (quantizer, "quantize"))
        for arch in ("sm_80", "sm_90")
    ]
    assert len({k.name for k in kernels}) == 6
    for kernel in kernels:
        assert kernel.cubin[:4] == b"\x7fELF" and kernel.symbol.encode() in kernel.cubin
        assert 0 < kernel.registers <= 128
        assert kernel.proof in (cuda_proof.EMULATED, cuda_proof.NOT_RUN)
        assert kernel.record()["cubin_bytes"] == len(kernel.cubin)
        multiplied_by = {"gemv": "dp4a", "gemm": "mma.sync", "quantize": ""}[kernel.form]
        assert kernel.record()["multiplied_by"] == multiplied_by
    assert kernels[2].shared_bytes == cuda_mma.mma_schedules(SMALL)[0].shared_bytes(64)

    compiled: list[str] = []
    compile_once = cuda_compiler.CudaCompiler.compile

    def compile_and_count(self, source: str, arch: str) -> cuda_compiler.Binary:
        compiled.append(arch)
        return compile_once(self, source, arch)

    monkeypatch.setattr(cuda_compiler.CudaCompiler, "compile", compile_and_count)
    monkeypatch.setattr(cuda_proof, "Emulator", None)
    assert cuda.emit_cuda([SMALL], [quantizer], ("sm_80", "sm_90"), cache_dir=cache) == kernels
    assert compiled == []
    damaged = next(f for f in (cache / "cuda").glob("*.cubin") if f.read_bytes() == kernels[3].cubin)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert cuda.emit_cuda([SMALL], [quantizer], ("sm_80", "sm_90"), cache_dir=cache) == kernels
    assert compiled == ["sm_90"]


@needs_nvcc
def test_nvcc_errors_are_told(cache: Path) -> None:
    compiler = cuda_compiler.CudaCompiler.find()
    with pytest.raises(KernelError, match="nvcc cannot compile"):
        compiler.compile("no CUDA at all", "sm_80")
    with pytest.raises(KernelError, match="for sm_10"):
        compiler.compile("", "sm_10")


def test_flags_keep_floats_exact() -> None:
    assert "-fmad=false" in cuda_compiler.FLAGS and "-prec-div=true" in cuda_compiler.FLAGS
    assert not any("fast" in flag for flag in cuda_compiler.FLAGS)


def test_every_flag_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "targets.md").read_text(encoding="utf-8")
    assert [flag for flag in cuda_compiler.FLAGS if f"| `{flag}` |" not in page] == []


def test_the_default_architectures_run_on_every_device_but_one() -> None:
    """By the rules of CUDA: a cubin on later minors of its major version, but for Jetsons; PTX on everything later."""
    jetsons = ("sm_87", "sm_110")

    def version(arch: str) -> tuple[int, int]:
        return divmod(int(arch.rpartition("_")[2]), 10)

    def runs(arch: str, device: str) -> bool:
        if arch.startswith("compute"):
            return version(arch) <= version(device)
        later = version(arch)[0] == version(device)[0] and version(arch) <= version(device)
        return arch == device or (later and device not in jetsons)

    devices = (*ARCHITECTURES, "sm_130")
    unserved = [device for device in devices if not any(runs(arch, device) for arch in DEFAULT_ARCHITECTURES)]
    assert unserved == ["sm_87"]


@needs_nvcc
def test_every_architecture_compiles(gemv: cuda.EmittedKernel) -> None:
    compiler = cuda_compiler.CudaCompiler.find()
    compiler.check([*ARCHITECTURES, *VIRTUAL_ARCHITECTURES])
    for arch in ARCHITECTURES:
        assert 0 < compiler.compile(gemv.source, arch).kernels[gemv.symbol].registers <= 64, arch
    ptx = compiler.compile(gemv.source, "compute_100")
    assert b".target sm_100" in ptx.cubin and gemv.symbol.encode() in ptx.cubin and ptx.kernels == {}
    with pytest.raises(KernelError, match=r"nvcc here cannot compile for sm_42; update it, .* knows sm_75"):
        compiler.check(["sm_90", "sm_42"])


@needs_nvcc
def test_ptx_is_an_architecture_of_a_kernel(cache: Path) -> None:
    cubin, ptx = cuda.emit_cuda([], [QuantizeSpec(192, 64)], ("sm_90", "compute_90"), cache_dir=cache)
    assert (cubin.file, ptx.file) == ("quantize_192_g64_a4_sm_90.cubin", "quantize_192_g64_a4_compute_90.ptx")
    assert ptx.source == cubin.source and b".entry" in ptx.cubin and ptx.record()["registers"] is None


@pytest.mark.parametrize("build", ["13.2.51", "13.2.78"])
def test_compilers_that_miscompile_are_refused(build: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 13.2, V{build}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(KernelError, match=r"nvcc of CUDA 13.2.0 and 13.2.1 miscompiles .*; install CUDA 13.2.2 "):
        cuda.emit_cuda([SMALL], [], cache_dir=tmp_path)
    monkeypatch.setattr(cuda_compiler.importlib.metadata, "version", lambda name: build)
    assert "NVRTC of CUDA 13.2.0" in cuda_compiler.nvrtc_fault("13.2")


@pytest.mark.parametrize("build", ["12.4.131", "13.0.88", "13.1.80", "13.2.86", "13.3.20", "99.1.1"])
def test_other_compilers_are_not(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_compiler.nvcc_fault(f"Cuda compilation tools, release 0.0, V{build}") == ""
    monkeypatch.setattr(cuda_compiler.importlib.metadata, "version", lambda name: build)
    assert cuda_compiler.nvrtc_fault(build.rpartition(".")[0]) == ""


def test_nvrtc_of_a_doubtful_version_and_unknown_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compiler.importlib.metadata, "version", lambda name: "12.9.86")
    assert "is or may be of these" in cuda_compiler.nvrtc_fault("13.2")
    assert cuda_compiler.nvrtc_fault("13.20") == ""


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) k(float* __restrict__ p) {
  float own[96];
#pragma unroll
  for (int i = 0; i < 96; i++) own[i] = p[threadIdx.x + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; i++) p[threadIdx.x + i] = own[i] - own[(37 * i + 11) % 96];
}
"""


@needs_nvcc
def test_a_compile_that_spills_is_refused() -> None:
    with pytest.raises(cuda_compiler.SpillError, match=r"registers of k spill: \d+ bytes"):
        cuda_compiler.CudaCompiler.find().compile(SPILLING, "sm_90")


@needs_nvcc
def test_a_schedule_that_spills_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The next one takes its place for all architectures; where there is none left, that is said."""
    quantizer = QuantizeSpec(192, 64)
    dropped, *rest = cuda.schedules(quantizer, "quantize")
    compile_once = cuda_compiler.CudaCompiler.compile
    spilling = cuda.emit(quantizer, "quantize", "sm_80", dropped).source

    def spills(self, source: str, arch: str) -> cuda_compiler.Binary:
        if source == spilling and arch == "sm_90":
            return compile_once(self, SPILLING, arch)
        return compile_once(self, source, arch)

    monkeypatch.setattr(cuda_compiler.CudaCompiler, "compile", spills)
    monkeypatch.setattr(cuda, "prove_emulated", lambda kernel, folder: "")
    kernels = cuda.emit_cuda([], [quantizer], ("sm_80", "sm_90"), cache_dir=tmp_path)
    assert [kernel.schedule for kernel in kernels] == [rest[0]] * 2
    monkeypatch.setattr(cuda, "schedules", lambda spec, form: [dropped])
    with pytest.raises(KernelError, match="no schedule is left: registers of k spill"):
        cuda.emit_cuda([], [quantizer], ("sm_80", "sm_90"), cache_dir=tmp_path)


def test_no_cuda_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_compiler, "_nvrtc", lambda: None)
    with pytest.raises(KernelError, match="needs nvcc or NVRTC; install"):
        cuda.emit_cuda([SMALL], [], cache_dir=tmp_path)


def test_without_gpp_the_proof_says_so(
    gemv: cuda.EmittedKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_proof, "compiler", lambda: None)
    assert cuda_proof.prove_emulated(gemv, tmp_path).startswith("not run")


def test_nvrtc_results_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of NVRTC's interface, against a stand-in for the library."""
    log = b"ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
    log += b"ptxas info    : Used 38 registers, used 1 barriers, 8192 bytes smem\n\0"

    class Nvrtc:
        options: tuple[bytes, ...] = ()

        def nvrtcCreateProgram(self, source, name, count, headers, names):  # noqa: N802
            assert source == b"text"
            return 0, "program"

        def nvrtcCompileProgram(self, program, count, options):  # noqa: N802
            Nvrtc.options = tuple(options)
            return (0,)

        def nvrtcGetProgramLogSize(self, program):  # noqa: N802
            return 0, len(log)

        def nvrtcGetProgramLog(self, program, buffer):  # noqa: N802
            buffer[:] = log

        def nvrtcGetCUBINSize(self, program):  # noqa: N802
            return 0, 4

        def nvrtcGetCUBIN(self, program, buffer):  # noqa: N802
            buffer[:] = b"\x7fELF"

        def nvrtcDestroyProgram(self, program):  # noqa: N802
            assert program == "program"

    monkeypatch.setattr(cuda_compiler, "_nvrtc", Nvrtc)
    binary = cuda_compiler.CudaCompiler(None, "nvrtc").compile("text", "sm_90")
    assert binary == cuda_compiler.Binary(b"\x7fELF", {"k": cuda_compiler.Resources(38, 8192)})
    assert b"--gpu-architecture=sm_90" in Nvrtc.options and b"--fmad=false" in Nvrtc.options


# The driver interface


FAKE_DRIVER = """
#include <cstdint>
#include <cstdlib>
#include <cstring>
#define ENTRY extern "C" int
ENTRY cuDriverGetVersion(int* version) { *version = 13000; return 0; }
ENTRY cuInit(unsigned) { return 0; }
ENTRY cuGetErrorString(int, const char** text) { *text = "no such function"; return 0; }
ENTRY cuDeviceGetCount(int* n) { *n = 1; return 0; }
ENTRY cuDeviceGet(int* d, int ordinal) { *d = ordinal; return ordinal ? 101 : 0; }
ENTRY cuDeviceGetName(char* to, int size, int) { strncpy(to, "Fake", size); return 0; }
ENTRY cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? 9 : 0; return 0; }
ENTRY cuDevicePrimaryCtxRetain(void** c, int) { *c = malloc(1); return 0; }
ENTRY cuDevicePrimaryCtxRelease_v2(int) { return 0; }
ENTRY cuCtxSetCurrent(void*) { return 0; }
ENTRY cuCtxSynchronize() { return 0; }
ENTRY cuMemGetInfo_v2(size_t* free, size_t* whole) { *free = *whole = 1 << 30; return 0; }
ENTRY cuMemAlloc_v2(uint64_t* p, size_t n) { *p = (uint64_t)malloc(n); return 0; }
ENTRY cuMemFree_v2(uint64_t p) { free((void*)p); return 0; }
ENTRY cuMemsetD8_v2(uint64_t p, unsigned char v, size_t n) { memset((void*)p, v, n); return 0; }
ENTRY cuMemsetD8Async(uint64_t p, unsigned char v, size_t n, void*) { memset((void*)p, v, n); return 0; }
ENTRY cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t n) { memcpy((void*)to, from, n); return 0; }
ENTRY cuMemcpyDtoH_v2(void* to, uint64_t from, size_t n) { memcpy(to, (void*)from, n); return 0; }
ENTRY cuModuleLoadData(void** m, const char* image) { *m = strdup(image); return 0; }
ENTRY cuModuleUnload(void* m) { free(m); return 0; }
ENTRY cuModuleGetFunction(void** f, void* m, const char* name) { *f = m; return strcmp(name, (char*)m) ? 500 : 0; }
ENTRY cuLaunchKernel(void*, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned, void*, void** a,
                     void**) {
  const int *input = *(int**)a[0]; int *output = *(int**)a[1], add = *(int*)a[2];
  for (unsigned i = 0; i < gx * bx; i++) output[i] = input[i] + add;
  return 0;
}
ENTRY cuLaunchKernelEx(const void*, void*, void**, void**) { return 1; }
ENTRY cuStreamCreate(void** s, unsigned flags) { *s = malloc(1); return flags != 1; }
ENTRY cuStreamDestroy_v2(void* s) { free(s); return 0; }
ENTRY cuStreamSynchronize(void*) { return 0; }
ENTRY cuMemcpyHtoDAsync_v2(uint64_t, const void*, size_t, void*) { return 1; }
ENTRY cuMemcpyDtoHAsync_v2(void*, uint64_t, size_t, void*) { return 1; }
ENTRY cuMemcpyDtoDAsync_v2(uint64_t, uint64_t, size_t, void*) { return 1; }
ENTRY cuStreamBeginCapture_v2(void* s, int mode) { return !s || mode != 1; }
ENTRY cuStreamEndCapture(void*, void** g) { *g = malloc(1); return 0; }
ENTRY cuGraphInstantiateWithFlags(void** e, void*, uint64_t flags) { *e = malloc(1); return flags != 0; }
ENTRY cuGraphLaunch(void* e, void* s) { return !e || !s; }
ENTRY cuGraphExecDestroy(void* e) { free(e); return 0; }
ENTRY cuGraphDestroy(void* g) { free(g); return 0; }
ENTRY cuEventCreate(void** e, unsigned) { *e = malloc(1); return 0; }
ENTRY cuEventRecord(void*, void*) { return 0; }
ENTRY cuEventSynchronize(void*) { return 0; }
ENTRY cuEventElapsedTime(float* ms, void*, void*) { *ms = 1.5f; return 0; }
ENTRY cuEventDestroy_v2(void* e) { free(e); return 0; }
"""


@needs_gpp
def test_driver_calls(gemv: cuda.EmittedKernel, tmp_path: Path) -> None:
    """Every call of the driver interface, against a stand-in whose one kernel adds a number."""
    library = tmp_path / "libfake.so"
    (tmp_path / "fake.cpp").write_text(FAKE_DRIVER)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "fake.cpp")], check=True)
    emitted = {**vars(gemv), "symbol": "add", "parameters": ("input", "output", "tokens")}
    kernel = cuda.CudaKernel(**emitted, arch="sm_90", cubin=b"add", registers=1, shared_bytes=0, proof="")
    numbers = torch.arange(64, dtype=torch.int32)
    launch = Launch((2, 1, 1), (32, 1, 1), {"input": numbers, "tokens": 7}, {"output": torch.zeros_like(numbers)})
    sparse = replace(launch, inputs={"input": Sparse(256, [(128, numbers[32:])]), "tokens": 7})
    with cuda_device.Device(library=str(library)) as device:
        assert (device.name, device.arch) == ("Fake", "sm_90")
        assert torch.equal(device.run(kernel, launch)["output"], numbers + 7)
        assert device.run(kernel, sparse)["output"].tolist() == [7] * 32 + list(range(39, 71))
        assert device.microseconds(device.synchronize) == 1500.0
        with pytest.raises(KernelError, match="refuses cuModuleGetFunction: no such function"):
            device.load(b"add", "subtract")
    with pytest.raises(KernelError, match="refuses cuDeviceGet"):
        cuda_device.Device(1, library=str(library))


def test_no_driver_is_told() -> None:
    with pytest.raises(KernelError, match="install the NVIDIA driver"):
        cuda_device.Device(library="libcuda-that-is-not-there.so.1")
    assert ctypes.sizeof(ctypes.c_void_p) == 8


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "form", "schedule"), LINEARS, ids=lambda v: getattr(v, "kind", None))
def test_linears_on_a_device(spec: LinearSpec, form, schedule) -> None:
    with cuda_device.Device() as device:
        emitted = cuda.emit(spec, form, device.arch, schedule)
        binary = cuda_compiler.CudaCompiler.find().compile(emitted.source, device.arch)
        kernel = cuda.CudaKernel.of(emitted, binary, device.arch, "")
        assert cuda_device.prove_on_device(kernel, device) == f"proven on {device.name}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [
        QuantizeSpec(259, 32),
        QuantizeSpec(300, 256, 8),
        QuantizeSpec(700, 0),
        QuantizeSpec(259, 64, knees=True),
        QuantizeSpec(700, 0, planes=True),
    ],
    ids=str,
)
def test_quantizers_on_a_device(spec: QuantizeSpec) -> None:
    with cuda_device.Device() as device:
        (kernel,) = cuda.emit_cuda([], [spec], (device.arch,))
        assert cuda_device.prove_on_device(kernel, device) == f"proven on {device.name}"
