"""Linears on tensor cores without a GPU: what the emulated instructions do, the kernels of several tokens, the faults
that are caught, and which kernel is taken."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lbllm_compile.codegen.cuda import dp4a, mma
from lbllm_compile.codegen.cuda import emit as cuda
from lbllm_compile.codegen.cuda import proof as cuda_proof
from lbllm_compile.codegen.cuda.compiler import CudaCompiler
from lbllm_compile.codegen.cuda.disassembly import disassemble, instructions, nvdisasm
from lbllm_compile.codegen.cuda.dp4a import GemmSchedule
from lbllm_compile.codegen.cuda.emulator import DESCENDING, Emulator, Launch
from lbllm_compile.codegen.cuda.gemm import gemm_schedules
from lbllm_compile.codegen.cuda.mma import LARGEST_SUM, MmaSchedule, mma_schedules
from lbllm_compile.codegen.cuda.text import PREAMBLE, STEPS, steps
from lbllm_compile.codegen.errors import DisprovedError, KernelError
from lbllm_compile.codegen.sizes import GROUPS
from lbllm_compile.codegen.spec import LinearSpec

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate CUDA kernels with")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the search path")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the module, so that the emulator's runtime is compiled once."""
    return tmp_path_factory.mktemp("cuda-cache")


# The instructions


PRODUCTS = (
    PREAMBLE
    + """
extern "C" __global__ void __launch_bounds__(32) products(
    uint* __restrict__ a_ptr, uint* __restrict__ b_ptr, int* __restrict__ c_ptr, int* __restrict__ d_ptr) {
  int lane = threadIdx.x;
  int c[4];
  for (int i = 0; i < 4; i++) c[i] = c_ptr[4 * lane + i];
  mma_m16n8k32(c, a_ptr + 4 * lane, b_ptr + 2 * lane);
  for (int i = 0; i < 4; i++) d_ptr[4 * lane + i] = c[i];
}
"""
)


@needs_gpp
@pytest.mark.parametrize("step", STEPS)
def test_products_are_those_of_the_ptx_isa(step: int, cache: Path) -> None:
    """Fragments as the PTX ISA lays "mma.m16n8k32" with .s8 out; on sm_75 four "mma.m8n8k16" give the same."""
    draw = np.random.default_rng(0)
    a, b = draw.integers(-128, 128, (16, 32), np.int8), draw.integers(-128, 128, (32, 8), np.int8)
    c = draw.integers(-1000, 1000, (16, 8), np.int32)
    of_a, of_b = np.empty((32, 4, 4), np.int8), np.empty((32, 2, 4), np.int8)
    of_c, rows, columns = np.empty((32, 4), np.int32), np.empty((32, 4), int), np.empty((32, 4), int)
    for lane in range(32):
        group, place = divmod(lane, 4)  # %laneid >> 2 and %laneid % 4
        for i in range(16):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            of_a[lane, i // 4, i % 4] = a[row, place * 4 + (i & 3) + (0 if i < 8 else 16)]
        for i in range(8):
            of_b[lane, i // 4, i % 4] = b[place * 4 + (i & 3) + (0 if i < 4 else 16), group]
        for i in range(4):
            rows[lane, i], columns[lane, i] = group + (0 if i < 2 else 8), place * 2 + (i & 1)
        of_c[lane] = c[rows[lane], columns[lane]]
    inputs = {"a": torch.from_numpy(of_a), "b": torch.from_numpy(of_b), "c": torch.from_numpy(of_c)}
    launch = Launch((1, 1, 1), (32, 1, 1), inputs, {"d": torch.zeros(32, 4, dtype=torch.int32)})
    found = Emulator(PRODUCTS, cache, step).run(launch)["d"]
    assert np.array_equal(found.numpy(), (a.astype(np.int32) @ b.astype(np.int32) + c)[rows, columns])


MODES = (
    PREAMBLE
    + """
extern "C" __global__ void __launch_bounds__(64) modes(
    int* __restrict__ input_ptr, int* __restrict__ output_ptr, int mode) {
  __shared__ alignas(64) int tile[128];
  int i = threadIdx.x, sums[4] = {0, 0, 0, 0};
  uint words[4] = {1, 1, 1, 1};
  if (mode == 0) {  // correct: two groups of copies, the first of which is waited for first
    copy_begin_4(&tile[i], &input_ptr[i]);
    copies_commit();
    if (i < 16) copy_begin_16(&tile[64 + 4 * i], &input_ptr[4 * i]);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    int value = tile[63 - i];
    copies_wait<0>();
    __syncthreads();
    mma_m16n8k32(sums, words, words);
    output_ptr[i] = value + tile[64 + i] + sums[0];
  } else if (mode == 1) {  // of two groups only the first was waited for
    copy_begin_4(&tile[i], &input_ptr[i]);
    copies_commit();
    copy_begin_4(&tile[64 + i], &input_ptr[i]);
    copies_commit();
    copies_wait<1>();
    output_ptr[i] = tile[64 + i];
    copies_wait<0>();
  } else if (mode == 2) {  // what was not committed belongs to no group
    copy_begin_4(&tile[i], &input_ptr[i]);
    copies_wait<0>();
    output_ptr[i] = tile[i];
  } else if (mode == 3) {  // each thread waits for its own copies alone
    copy_begin_4(&tile[i], &input_ptr[i]);
    copies_commit();
    copies_wait<0>();
    output_ptr[i] = tile[63 - i];
  } else if (mode == 4) {  // a copy to what others still read
    tile[i] = i;
    __syncthreads();
    output_ptr[i] = tile[63 - i];
    copy_begin_4(&tile[i], &input_ptr[i]);
    copies_commit();
    copies_wait<0>();
  } else if (mode == 5) {
    copy_begin_4(&tile[i], &input_ptr[i]);
    copies_commit();
  } else if (mode == 6) {
    if (i < 15) copy_begin_16(&tile[4 * i], &input_ptr[4 * i + 1]);
    copies_commit();
    copies_wait<0>();
  } else if (mode == 7) {
    copy_begin_4(&output_ptr[i], &input_ptr[i]);
  } else if (mode == 8) {
    copy_begin_4(&tile[i], &input_ptr[i + 1]);
    copies_commit();
    copies_wait<0>();
  } else if (mode == 9) {  // a product that half of a warp reaches
    if (i % 32 < 16) mma_m16n8k32(sums, words, words);
  } else if (mode == 10) {  // a product orders no memory
    tile[i] = i;
    mma_m16n8k32(sums, words, words);
    output_ptr[i] = tile[i ^ 1];
  } else if (mode == 11) {  // the halves of a warp at two products
    if (i % 32 < 16)
      mma_m16n8k32(sums, words, words);
    else
      mma_m16n8k32(sums, words, words);
    output_ptr[i] = sums[0];
  }
}
"""
)


@pytest.fixture(scope="module")
def modes(cache: Path) -> Emulator:
    return Emulator(MODES, cache)


def launch_mode(mode: int, threads: int = 64) -> Launch:
    inputs = {"input": torch.arange(64, dtype=torch.int32), "mode": mode}
    return Launch((1, 1, 1), (threads, 1, 1), inputs, {"output": torch.zeros(64, dtype=torch.int32)})


@needs_gpp
@pytest.mark.parametrize("step", STEPS)
def test_copies_are_there_when_they_were_waited_for(step: int, cache: Path) -> None:
    assert Emulator(MODES, cache, step).run(launch_mode(0))["output"].tolist() == [63 + 8] * 64


@needs_gpp
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (1, r"reads byte 256 of shared memory, which a copy of thread \(0,0,0\) fills .* not waited for"),
        (2, "not waited for"),
        (3, "of shared memory, which no thread wrote"),
        (4, "race: thread .* of shared memory, which thread .* with no barrier between"),
        (5, "returned and did not wait for its copies"),
        (6, "accesses 16 bytes at a misaligned address"),
        (7, "copies to what is not shared memory"),
        (8, "reads 256 bytes from the start of input, which has 256"),
        (9, "waits for its warp at line .*, which not all lanes of mask ffffffff reach"),
        (10, "race: thread .* reads byte .* of shared memory"),
        (11, "waits for its warp at line .*, which not all lanes of mask ffffffff reach"),
    ],
)
def test_the_emulator_sees(mode: int, message: str, modes: Emulator) -> None:
    with pytest.raises(DisprovedError, match=message):
        modes.run(launch_mode(mode))


@needs_gpp
def test_a_product_takes_a_whole_warp(modes: Emulator) -> None:
    with pytest.raises(DisprovedError, match="multiplies matrices in a warp of 16 lanes"):
        modes.run(launch_mode(10, threads=16))


def test_names_of_instructions_are_their_mnemonics() -> None:
    """Each function ``ptx_...`` is one instruction, and the emulation has it by that name, of PTX and no other."""
    found = re.findall(r'(ptx_\w+)\([^)]*\) \{[^}]*?asm(?: volatile)?\("([\w.]+)[ ;]', PREAMBLE)
    assert len(found) == PREAMBLE.count("asm") == 10
    for name, mnemonic in found:
        assert name == "ptx_" + mnemonic.replace(".", "_")
    emulated = (Path(cuda.__file__).parent / "emulation.h").read_text(encoding="utf-8")
    assert set(re.findall(r"\b(ptx_\w+)\(", emulated)) == {name for name, _ in found}


# The kernels


LINEARS = [
    (LinearSpec("bit", 70, 259, 32, act_bits=8, bias=True), MmaSchedule(16, 32, 16, 32, 2)),
    (LinearSpec("bit", 97, 700, 256, per_token=True), MmaSchedule(32, 64, 16, 16, 2)),
    (LinearSpec("bit", 100, 515, 128, bias=True, additive=True), MmaSchedule(8, 32, 8, 16, 4)),
    (LinearSpec("bit", 33, 130, 64, act_bits=8, per_token=True, bias=True), MmaSchedule(64, 64, 32, 32, 3)),
    (LinearSpec("bit", 1, 1, 32), None),
    (LinearSpec("bit", 576, 576, 64), None),
    (LinearSpec("bit", 33, 300, 256, act_bits=8), None),
    (LinearSpec("bit", 11008, 256, 128), None),
    (LinearSpec("bit", 40, 130, 64), MmaSchedule(128, 32, 32, 16, 2)),
]


@needs_gpp
@pytest.mark.parametrize(("spec", "schedule"), LINEARS, ids=lambda v: str(getattr(v, "out_features", "")))
def test_emulated_linears_are_exact(spec: LinearSpec, schedule: MmaSchedule | None, cache: Path) -> None:
    kernel = cuda.emit(spec, "gemm", "sm_90", schedule)
    assert isinstance(kernel.schedule, MmaSchedule) and steps(kernel.source) == STEPS
    assert cuda_proof.prove_emulated(kernel, cache) == cuda_proof.EMULATED


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_sample_of_all_schedules_is_exact(group: int, bits: int, cache: Path) -> None:
    spec = LinearSpec("bit", 130, 515, group, bits, per_token=bits == 8)
    for schedule in mma_schedules(spec)[:: 7 if bits == 4 else 11]:
        cuda_proof.prove_emulated(cuda.emit(spec, "gemm", "sm_90", schedule), cache)


@pytest.mark.parametrize("tile", [8, 32, 64, 128])
def test_a_proof_has_a_second_block_of_tokens_with_a_remainder(tile: int) -> None:
    kernel = cuda.emit(LinearSpec("bit", 40, 130, 64), "gemm", "sm_90", MmaSchedule(tile, 32, min(tile, 32), 16, 2))
    for _, launch, expected in cuda_proof.proof_runs(kernel):
        tokens = launch.inputs["tokens"]
        assert isinstance(tokens, int) and tokens > tile and tokens % tile
        assert launch.grid[1] == -(-tokens // tile) and expected["output"][1].shape[0] == tokens


def test_sums_that_would_not_be_exact_have_no_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most extreme group there is sums to nearly what is read off exactly."""
    assert 256 * 128 * 127 <= LARGEST_SUM == 2**22
    eight, four = (LinearSpec("bit", 32, 512, 256, act_bits=bits) for bits in (8, 4))
    assert MmaSchedule(8, 32, 8, 16, 2).valid(eight)
    monkeypatch.setattr(mma, "LARGEST_SUM", 256 * 128 * 127 - 1)
    assert mma_schedules(eight) == [] and mma_schedules(four)
    assert all(isinstance(schedule, GemmSchedule) for schedule in gemm_schedules(eight))


@pytest.fixture(scope="module")
def small() -> cuda.EmittedKernel:
    """A kernel with everything in it: tails of rows, inputs and tokens, two stages, several warps."""
    return cuda.emit(LinearSpec("bit", 70, 259, 64, bias=True), "gemm", "sm_90", MmaSchedule(16, 64, 8, 32, 2))


@needs_gpp
def test_no_order_of_threads_matters(small: cuda.EmittedKernel, cache: Path) -> None:
    emulator = Emulator(small.source, cache)
    for name, launch, expected in cuda_proof.proof_runs(small):
        for order in (DESCENDING, 7):
            found = emulator.run(replace(launch, order=order))
            cuda_proof.check_outputs(small.symbol, name, found, expected)


DIFFERS = "of its output differ"
FAULTS = {
    "a missing wait": (r"copies_wait<0>\(\);\n", "", "not waited for"),
    "a wait for too few": (r"copies_wait<0>", "copies_wait<1>", "not waited for"),
    "a missing barrier": (r"__syncthreads\(\);\n", "", "no thread wrote"),
    "a barrier behind the next copies": (
        r"(?s)__syncthreads\(\);\n(.*?copies_commit\(\);\n)",
        r"\1__syncthreads();\n",
        "race: .* writes byte .* read with no barrier between",
    ),
    "a missing commit": (r"copies_commit\(\);\n", "", "not waited for"),
    "a swapped lane of the tokens' fragments": (
        r"(\(b_ptr \+ 0\) = .*)\(\(int\)threadIdx.x\)",
        r"\1(((int)threadIdx.x) ^ 1)",
        DIFFERS,
    ),
    "a swapped word of the weights' fragments": (r"&\(a_ptr\[0\]\)", "&(a_ptr[4])", DIFFERS),
    "a swapped nibble": (r">> \(uint\)16\)", ">> (uint)12)", DIFFERS),
    "levels of another row": (r"= level_tile_ptr\[(.*)\];", r"= level_tile_ptr[\1 ^ 1];", DIFFERS),
    "scales of another token": (
        r"(\(x_factor_ptr \+ 0\) = .*\(\(\(int\)threadIdx.x\) )& 3\)",
        r"\1& 1)",
        DIFFERS,
    ),
    "tokens behind the last": (r"min\((.*?), \(tokens - 1\)\)", r"(\1)", "bytes from the start of"),
    "an output behind the last token": (r"< tokens\)", "< tokens + 1)", "bytes from the start of output"),
    "a seed that is not taken off": (r"0x1\.8p\+23f", "0x1.8p+22f", DIFFERS),
    "an instruction that nobody emulates": (r"\bmma_m16n8k32\(", "ptx_mma_sync_aligned_m16n8k16(", "rejects"),
}


@needs_gpp
@pytest.mark.parametrize(("old", "new", "message"), FAULTS.values(), ids=[*FAULTS])
def test_planted_faults_are_caught(small: cuda.EmittedKernel, old: str, new: str, message: str, cache: Path) -> None:
    text = small.source.removeprefix(PREAMBLE)
    faulty = re.sub(old, new, text)
    assert faulty != text
    with pytest.raises(KernelError, match=message):
        cuda_proof.prove_emulated(replace(small, source=PREAMBLE + faulty), cache)


@needs_gpp
def test_what_only_sm_75_computes_is_proven_too(small: cuda.EmittedKernel, cache: Path) -> None:
    faulty = small.source.replace("(a[1], b[0], high OF_SITE)", "(a[1], b[1], high OF_SITE)")
    assert faulty != small.source
    with pytest.raises(DisprovedError, match="of its output differ"):
        cuda_proof.prove_emulated(replace(small, source=faulty), cache)


# Which kernel is taken


@pytest.mark.parametrize("tokens", [None, 2, 64, 100])
def test_all_tensor_core_schedules_come_before_dp4a(tokens: int | None) -> None:
    """So a kernel that spills has another tile of tensor cores first."""
    kinds = [type(schedule) for schedule in gemm_schedules(LinearSpec("bit", 4096, 4096, 128), tokens)]
    tensor = kinds.count(MmaSchedule)
    assert 1 < tensor < len(kinds) and kinds == [MmaSchedule] * tensor + [GemmSchedule] * (len(kinds) - tensor)
    int8 = gemm_schedules(LinearSpec("int8", 96, 576, 64, 8), tokens)
    assert int8 and all(isinstance(schedule, GemmSchedule) for schedule in int8)


@pytest.mark.parametrize("group", GROUPS)
def test_the_nearest_tile_comes_first(group: int) -> None:
    """Where there is none for so many tokens, as with groups of 256, the largest one there is."""
    spec = LinearSpec("bit", 576, 576, group)
    largest = max(schedule.tokens for schedule in mma_schedules(spec))
    assert largest == (128 if group < 256 else 64)
    for tokens, tile in ((1, 8), (4, 8), (8, 8), (9, 16), (64, 64), (65, largest), (1000, largest)):
        assert mma_schedules(spec, tokens)[0].tokens == tile
    for tokens, tile in ((4, 16), (17, 32), (64, 64), (65, 128), (1000, 128)):
        assert dp4a.gemm_schedules(spec, tokens)[0].tokens == tile
    assert all(schedule.tokens >= 100 for schedule in gemm_schedules(spec, 100))
    assert gemm_schedules(spec, 1000) == []


@pytest.mark.parametrize("group", GROUPS)
def test_schedules_fit_shared_memory(group: int) -> None:
    """By what the text declares, each buffer at a multiple of 64 bytes."""
    spec = LinearSpec("bit", 4096, 4096, group)
    size = {"uint": 4, "ushort": 2, "float": 4}
    largest = sorted(mma_schedules(spec), key=lambda schedule: schedule.shared_bytes(group))[-3:]
    for schedule in largest:
        text = cuda.emit(spec, "gemm", "sm_90", schedule).source.removeprefix(PREAMBLE)
        arrays = re.findall(r"__shared__ (?:alignas\(\d+\) )?(\w+) \w+\[(\d+)\];", text)
        assert len(arrays) == text.count("__shared__") == 5
        assert sum(-(-size[kind] * int(count) // 64) * 64 for kind, count in arrays) <= 48 << 10


@needs_nvcc
@pytest.mark.parametrize("group", GROUPS)
def test_nothing_spills_and_tensor_cores_are_used(group: int, small: cuda.EmittedKernel) -> None:
    compiler = CudaCompiler.find()
    kernel = cuda.emit(LinearSpec("bit", 11008, 4096, group), "gemm", "sm_90")
    for arch, product, copy in (("sm_75", "IMMA.8816", "STS.128"), ("sm_80", "IMMA.16832", "LDGSTS.E.BYPASS.128")):
        binary = compiler.compile(kernel.source, arch)
        schedule = kernel.schedule
        assert isinstance(schedule, MmaSchedule)
        assert binary.kernels[kernel.symbol].shared_bytes == schedule.shared_bytes(group)
        if nvdisasm() is not None:
            found = [i.opcode for i in instructions(disassemble(binary.cubin), kernel.symbol)]
            assert any(opcode.startswith(product) for opcode in found), arch
            assert any(opcode.startswith(copy) for opcode in found), arch
            assert not any(opcode.startswith(("IDP", "LDL", "STL")) for opcode in found), arch
