"""What CUDA kernels take, without a GPU: occupancy, main loops, bytes, predictions, and the page about all that."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.backend import predictions
from lbllm_compile.codegen.cuda import disassembly, dp4a, limits, predict
from lbllm_compile.codegen.cuda.bounds import bytes_moved
from lbllm_compile.codegen.cuda.compiler import CudaCompiler, find_tool
from lbllm_compile.codegen.cuda.disassembly import Instruction, instructions, main_loop
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import parse_targets
from lbllm_compile.codegen.targets.cuda import ARCHITECTURES
from rtn import code, quantize

from benchmarks import cuda_bounds

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the search path")
needs_nvdisasm = pytest.mark.skipif(disassembly.nvdisasm() is None, reason="no nvdisasm (nvidia-cuda-nvdisasm)")


# Occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_90", 128, 32, 0, 16),  # warps: 64 of them
        ("sm_90", 32, 16, 0, 32),  # thread blocks
        ("sm_90", 256, 64, 0, 4),  # registers: 2048 a warp, 32 warps
        ("sm_90", 512, 33, 0, 3),  # registers come by 256 a warp: 40 a thread, 12 warps a partition
        ("sm_90", 64, 16, 48 * 1024, 4),  # shared memory: 49 KB each
        ("sm_75", 64, 16, 32 * 1024, 2),  # nothing is reserved there
        ("sm_80", 1024, 65, 0, 0),  # more registers than there are
        ("sm_86", 256, 40, 0, 6),  # 48 warps
    ],
)
def test_resident_blocks(arch: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert limits.resident_blocks(arch, threads, registers, shared) == blocks
    assert limits.occupancy(arch, threads, registers, shared) == blocks * threads / 32 / limits.LIMITS[arch].warps


def test_every_architecture_has_limits() -> None:
    assert list(limits.LIMITS) == list(ARCHITECTURES)


ORACLE = """
#include <climits>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, warps, shared, reserved, threads, registers, bytes;
  while (scanf("%d %d %d %d %d", &major, &minor, &warps, &shared, &reserved) == 5 &&
         scanf("%d %d %d", &threads, &registers, &bytes) == 3) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor, device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps, device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1, device.sharedMemPerBlockOptin = shared - reserved, device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = bytes;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult found;
    cudaOccError failed = cudaOccMaxActiveBlocksPerMultiprocessor(&found, &device, &kernel, &state, threads, 0);
    printf("%d\\n", failed ? -1 : found.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_occupancy_is_the_toolkits(tmp_path: Path) -> None:
    """Against ``cuda_occupancy.h``, which is given each architecture's limits of warps and shared memory."""
    nvcc = find_tool("nvcc")
    assert nvcc is not None
    source, program = tmp_path / "oracle.cpp", tmp_path / "oracle"
    source.write_text(ORACLE)
    subprocess.run([nvcc, "-w", "--cudart=none", "-o", str(program), str(source)], check=True)
    draw = random.Random(0)
    cases = [
        (arch, 32 * draw.randint(1, 32), draw.randint(16, 255), draw.choice([0, draw.randint(0, 47 << 10)]))
        for arch in ARCHITECTURES
        for _ in range(200)
    ]
    lines = []
    for arch, threads, registers, shared in cases:
        limit, (major, minor) = limits.LIMITS[arch], divmod(int(arch[3:]), 10)
        device = (major, minor, limit.warps, limit.shared_bytes, limit.reserved_bytes)
        lines.append(" ".join(map(str, (*device, threads, registers, shared))))
    result = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    theirs = [int(line) for line in result.stdout.split()]
    ours = [limits.resident_blocks(*case) for case in cases]
    assert [row for row in zip(cases, ours, theirs, strict=True) if row[1] != row[2]] == []


# Instructions


LOOP = """
.text.other:
        /*0000*/                   EXIT ;
.text.k:
        /*0000*/                   S2R R3, SR_CTAID.X ;
        /*0010*/                   IMAD R5, R3, 0x20, R2 ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR8][R32.64] ;
.L_x_0:
        /*0030*/                   LOP3.LUT R12, R4, 0x33333333, RZ, 0xc0, !PT ;
        /*0040*/                   PRMT R13, R20.reuse, R13, RZ ;
        /*0050*/                   IDP.4A.S8.S8 R21, R8, R13, RZ ;
        /*0060*/                   ISETP.NE.AND P0, PT, R5, RZ, PT ;
        /*0070*/              @P0  BRA `(.L_x_0) ;
        /*0080*/             @!P1 BRA `(.L_x_1) ;
        /*0090*/                   FFMA R1, R2, R3, R4 ;
        /*00a0*/                   EXIT ;
"""


def test_the_innermost_loop_that_multiplies_is_the_main_one() -> None:
    found = instructions(LOOP, "k")
    assert [(i.mnemonic, i.target) for i in found if i.target is not None] == [("BRA", 3), ("BRA", 2)]
    loop = main_loop(found, "SASS")
    assert loop.pipes == {"alu": 3, "fma": 1, "other": 1}
    assert (loop.integers, loop.products, loop.integers_per_product) == (4, 4, 1.0)
    assert loop.around == 2 and loop.instructions(12) == 3 * 5 + 2 and not loop.unrolled


def test_an_unrolled_loop_is_the_stretch_that_multiplies() -> None:
    straight = LOOP.replace("@P0  BRA `(.L_x_0)", "     BAR.SYNC 0x0").replace("@!P1 BRA `(.L_x_1)", "     NOP")
    found = instructions(straight.replace(".L_x_0:", "").replace(".L_x_1:", ""), "k")
    loop = main_loop(found, "SASS")
    assert loop.pipes == {"other": 2, "fma": 2, "memory": 1, "alu": 3} and loop.products == 4
    # What the barrier divides from it is among all the instructions of its products.
    assert loop.unrolled == len(found) == 11 and loop.instructions(2) == len(found) / 2


def test_without_products_all_innermost_loops_are() -> None:
    loop = main_loop(instructions(LOOP.replace("IDP.4A.S8.S8", "IMAD"), "k"), "SASS")
    assert (sum(loop.pipes.values()), loop.products, loop.integers_per_product) == (5, 0, None)
    assert sum(main_loop(instructions(LOOP, "other"), "SASS").pipes.values()) == 1


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(KernelError, match="no kernel j"):
        instructions(LOOP, "j")
    with pytest.raises(KernelError, match=r"IDP\.2A\.LO"):
        _ = Instruction("IDP.2A.LO.S16.S8").products
    assert Instruction("IMMA.16832.S8.S8").products == 16 * 8 * 32 / 32 and Instruction("IMMA.16832").pipe == "tensor"


SPEC = LinearSpec("bit", 960, 576, 64)


@needs_nvcc
@needs_nvdisasm
def test_a_weight_takes_thirteen_sixteenths() -> None:
    """What the prediction takes for one token, by pipe, is what an unrolled main loop does, addresses aside."""
    specs = [LinearSpec("bit", 4096, 4096, 128), LinearSpec("int8", 4096, 4096, 128, 8)]
    kernels = cuda_bounds.kernels_of([*specs, LinearSpec("int4", 4096, 4096, 256, 8)])
    for bound in cuda_bounds.measured([k for k in kernels if k.form == "gemv"], ["sm_90"]):
        kind, main = bound.kernel.spec.kind, bound.main
        for pipe, count in predict.PIPES[kind].items():
            assert count <= main.pipes.get(pipe, 0) / main.products <= count + 0.1, (kind, pipe, main)
        if kind == "bit":
            assert 13 / 16 <= (main.integers_per_product or 0) <= 0.92


@needs_nvcc
def test_without_nvdisasm_ptx_is_read_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm_compile.codegen.cuda.bounds.nvdisasm", lambda: None)
    monkeypatch.setattr(disassembly, "nvdisasm", lambda: None)
    (bound, many) = cuda_bounds.measured(cuda_bounds.kernels_of([SPEC]), ["sm_90"])
    assert many.main.source == "PTX" and many.main.products == 128 * many.main.pipes["tensor"] > 0
    assert bound.main.source == "PTX" and bound.main.products == 4 * 32
    assert 13 / 16 <= (bound.main.integers_per_product or 0) < 1.3
    with pytest.raises(
        KernelError, match=r"nvdisasm; install the CUDA toolkit, or: pip install 'lbllm-compile\[cuda\]'"
    ):
        disassembly.disassemble(b"")


# Bytes and predictions


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(100, 259, 64), (960, 576, 64), (33, 1536, 128), (64, 512, 256)]
)
def test_bytes_are_those_of_what_is_packed(rows: int, columns: int, group: int) -> None:
    spec = LinearSpec("bit", rows, columns, group)
    packed = dp4a.pack_bit_weight(quantize(torch.randn(rows, columns), group))
    weights = sum(t.numel() * t.element_size() for t in packed.values())
    around = dp4a.pitch(columns) + 4 * spec.x_scales + 4 * rows
    assert bytes_moved(spec, 1) == weights + around and bytes_moved(spec, 7) == weights + 7 * around


@pytest.mark.parametrize(("rows", "columns", "group"), [(100, 259, 64), (33, 130, 0), (64, 512, 128)])
def test_bytes_of_int8_rows_are_those_of_what_is_packed(rows: int, columns: int, group: int) -> None:
    spec = LinearSpec("int8", rows, columns, group, 8, bias=True)
    packed = dp4a.pack_int8_weight(torch.ones(rows, columns, dtype=torch.int8), torch.ones(rows), group)
    weights = sum(t.numel() * t.element_size() for t in packed.values())
    assert bytes_moved(spec, 3) == weights + 4 * rows + 3 * (dp4a.pitch(columns) + 4 * spec.x_scales + 4 * rows)


@pytest.mark.parametrize(("rows", "columns", "group"), [(100, 259, 64), (64, 512, 32)])
def test_bytes_of_codes_are_those_of_what_is_packed(rows: int, columns: int, group: int) -> None:
    spec = LinearSpec("int4", rows, columns, group, 8)
    packed = dp4a.pack_int4_weight(code(torch.randn(rows, columns), group))
    weights = sum(t.numel() * t.element_size() for t in packed.values())
    assert bytes_moved(spec, 2) == weights + 2 * (dp4a.pitch(columns) + 4 * spec.x_scales + 4 * rows)


@pytest.mark.parametrize("table", [{}, {"knees": True}, {"planes": True}])
def test_bytes_of_quantizers_are_those_of_their_tensors(table: dict[str, bool]) -> None:
    spec = QuantizeSpec(259, 64, **table)
    values, scale = prove.quantized(spec, *next(prove.quantizer_inputs(spec)))
    read = sum(t[0].nbytes if t.dim() > 1 else t.nbytes for t in next(prove.quantizer_inputs(spec)))
    assert bytes_moved(spec, 1) == read + values[0].nbytes + dp4a.pitch(259) - 259 + scale[0].nbytes


def test_a_prediction_is_what_is_slowest_and_its_gaps() -> None:
    spec = LinearSpec("bit", 4096, 4096, 128)
    slow = predict.Gpu("slow memory", "sm_90", 100, 1e9, 1e9)
    narrow = predict.Gpu("one multiprocessor", "sm_90", 1, 1e9, 1e15)
    of_memory, of_pipe = predict.predict({spec: 3}, 2, [slow, narrow])
    assert of_memory.limit == "bandwidth" and of_pipe.limit == "alu"
    gaps = 1.3e-6 * (2 * 5 + 3)
    assert of_memory.seconds == pytest.approx(gaps + 3 * bytes_moved(spec, 1) / 0.9e9)
    assert of_pipe.seconds == pytest.approx(gaps + 3 * 4096**2 * 9 / 16 / 64e9) and of_pipe.gaps_s == gaps
    assert [gpu.name for gpu in predict.GPUS] == ["H200", "H100", "A100", "L4", "RTX 4090", "T4"]


def test_plan_and_bench_predict_what_the_backend_does() -> None:
    """Only backends that predict are asked, and of a compile's targets those alone."""
    linears = cuda_bounds.MODELS["SmolLM2-135M"].linears(64)
    found = predict.predict(linears, 30)
    assert predictions(linears, [], 30) == predictions(linears, [], 30, parse_targets("cpu,cuda")) == found
    assert predictions(linears, [], 30, parse_targets("cpu")) == []
    with pytest.raises(KernelError, match="4-bit and 8-bit activations"):
        predictions({LinearSpec("bit", 64, 64, 64, 16): 1}, [], 1)


# The page


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_the_page_has_every_kernel_and_architecture() -> None:
    text = cuda_bounds.PAGE.read_text(encoding="utf-8")
    wanted = cuda_bounds.specs(cuda_bounds.MODELS.values())
    names = [cuda_bounds.row_name(spec) for spec in wanted]
    linears = [cuda_bounds.row_name(spec) for spec in wanted if isinstance(spec, LinearSpec)]
    choices = [f"one of {model.vocabulary} tokens" for model in cuda_bounds.MODELS.values()]
    found = [row for row in rows(text) if row[0] in names + choices]
    assert sorted(row[0] for row in found) == sorted(names + linears + choices)  # one token and many
    assert "none spills" in text and "prediction" in text.lower()
    for row in found:
        assert len(row) == len(ARCHITECTURES) + 3
        for cell in row[2:-1]:
            assert re.fullmatch(r"\d+, \d+ %(, \d\.\d\d)?", cell), row
    assert text.endswith("\n".join(cuda_bounds.predictions()) + "\n")


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("archs", [("sm_90",), pytest.param(ARCHITECTURES, marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_page_is_what_a_run_gives(archs: tuple[str, ...]) -> None:
    """One shape and one vocabulary on one architecture; slowly, all of it."""
    text = cuda_bounds.PAGE.read_text(encoding="utf-8")
    build = re.search(r"V[\d.]+\d", text)
    if build is None or build[0] not in CudaCompiler.find().identity:
        pytest.skip("the page was written with another compiler, which chooses other registers")
    wanted = [SPEC] if len(archs) == 1 else cuda_bounds.specs(cuda_bounds.MODELS.values())
    fresh = cuda_bounds.measured(cuda_bounds.kernels_of(wanted), archs)
    choices = cuda_bounds.counted(cuda_bounds.choices_of(list(cuda_bounds.MODELS.values())[: len(archs)]), archs)
    if len(archs) > 1:
        assert cuda_bounds.page(fresh, choices, cuda_bounds.compared()) == text
    header = next(row for row in rows(text) if row[0] == "kernel")
    named = [(cuda_bounds.row_name(bound.kernel.spec), bound) for bound in fresh]
    for name, bound in [*named, *((cuda_bounds.choice_name(bound.kernel), bound) for bound in choices)]:
        cells = [row[header.index(bound.arch)] for row in rows(text) if row[0] == name]
        assert cuda_bounds.cell(bound) in cells, (bound.kernel.symbol, bound.arch)
