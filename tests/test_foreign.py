"""Kernels for CPUs that this machine is not: cross-compiled, read, and run in emulation against the reference."""

from __future__ import annotations

import dataclasses
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.backend import Bucket
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.cpu.emulator import AARCH64, HERE, ForeignLibrary, Machine, with_emulated_tiles
from lbllm_compile.codegen.cpu.space import Implementation, Schedule
from lbllm_compile.codegen.errors import KernelError, TargetError
from lbllm_compile.codegen.kernels.families import INSTRUCTION_SETS
from lbllm_compile.codegen.sizes import ACTIVATION_BITS, GROUPS
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target, arm, host, known_targets, x86
from lbllm_compile.codegen.tune.search import spread
from lbllm_compile.codegen.tvm_api import PrimFunc, T, assembly, object_code
from test_kernels import MORE_SHAPES, SHAPES, build

from lbllm_compile.job import read_job
from lbllm_compile.options import CompileOptions

FUSED = re.compile(r"v?fn?m(add|sub|la|ls)\w*")
"""Fused multiply-adds, as ARM and x86 call them."""


def _on_arm(functions: dict[str, PrimFunc], target: Target) -> bytes:
    return object_code(functions, target.llvm)


def _as_avx512(functions: dict[str, PrimFunc], target: Target) -> str:
    """AVX-VNNI adds one instruction. AVX-512 VNNI has it, too: without ``{vex}`` the assembler takes that encoding, and
    the kernel, otherwise as generated, runs on machines that lack AVX-VNNI."""
    text = assembly(functions, target.llvm)
    return text if "avx_vnni" in host.cpu_flags() else re.sub(r"\{vex\}\s+", "", text)


def _on_vpopcnt(functions: dict[str, PrimFunc], target: Target) -> bytes:
    return object_code({name: with_emulated_tiles(function) for name, function in functions.items()}, target.llvm)


def _why_not_amx() -> str | None:
    if "avx512-vpopcnt" not in host.families():
        return "this CPU has not the vector instructions of a CPU with tiles"
    return HERE.missing


def _why_not_avx_vnni() -> str | None:
    if {"avx-vnni", "avx512-vnni"}.isdisjoint(host.families()):
        return "this CPU has neither AVX-VNNI nor AVX-512 VNNI to stand in for it"
    return HERE.missing


@dataclass(frozen=True)
class Foreign:
    """A kernel family and how its kernels are run on this machine.

    Attributes:
        target: what code is generated for.
        machine: runs it.
        code: makes what is linked.
        skip: why it cannot be run here, or None.
        gemv, gemm: how instructions start that W(1+1) kernels must have for one token and for many.
    """

    target: Target
    machine: Machine
    code: Callable[[dict[str, PrimFunc], Target], bytes | str]
    skip: str | None
    gemv: tuple[str, ...] = ()
    gemm: tuple[str, ...] = ()

    def load(self, functions: dict[str, PrimFunc]) -> ForeignLibrary:
        return ForeignLibrary(self.code(functions, self.target), list(functions), self.machine)


def _arm(target: Target, *instructions: tuple[str, ...]) -> Foreign:
    return Foreign(target, AARCH64, _on_arm, AARCH64.missing, *instructions)


FOREIGN = {
    "neon-dotprod": _arm(Target.parse("cpu:neon-dotprod"), ("tbl", "sdot", "fmla"), ("tbl", "sdot", "fmla")),
    "neon-i8mm": _arm(Target.parse("cpu:neon-i8mm"), ("tbl", "sdot", "fmla"), ("tbl", "smmla", "fmla")),
    "generic on ARM": _arm(Target("cpu", "cpu:generic", "generic", "", (), arm.TRIPLE)),
    "avx512-amx": Foreign(
        Target.parse("cpu:avx512-amx"),
        HERE,
        _on_vpopcnt,
        _why_not_amx(),
        ("vpshufb", "vpdpbusd", "vfmadd"),
        ("vpshufb", "ldtilecfg", "tileloadd", "tdpbssd", "tilestored", "tilerelease", "vfmadd"),
    ),
    "avx-vnni": Foreign(
        Target.parse("cpu:avx-vnni"),
        HERE,
        _as_avx512,
        _why_not_avx_vnni(),
        *2 * (("vpshufb", "{vex} vpdpbusd", "vfmadd"),),
    ),
}
RUNNABLE = [
    pytest.param(foreign, id=name, marks=pytest.mark.skip(reason=foreign.skip) if foreign.skip else [])
    for name, foreign in FOREIGN.items()
]
VECTOR = [pytest.param(foreign, id=name) for name, foreign in FOREIGN.items() if foreign.gemv]


def instructions(functions: dict[str, PrimFunc], target: Target) -> Counter[str]:
    """How often each instruction is in the assembly of functions."""
    lines = re.findall(r"^\t((?:\{vex\}\s+)?[a-z][\w.]*)", assembly(functions, target.llvm), re.MULTILINE)
    return Counter(line.replace("\t", " ") for line in lines)


def kernels(implementation: Implementation, sampled: int = 1) -> list[tuple[str, Bucket, Schedule]]:
    """Name, token bucket and schedule of a few kernels of every bucket, the first guess among them."""
    return [
        (f"k{i}_{j}", bucket, schedule)
        for i, bucket in enumerate(cpu.BUCKETS)
        for j, schedule in enumerate(spread(implementation.schedules(bucket), sampled))
    ]


def assert_exact(spec: LinearSpec, foreign: Foreign, sampled: int = 1) -> None:
    """Runs kernels of a linear for every layout and token bucket and holds them against the reference."""
    for implementation in cpu.implementations(spec, foreign.target):
        chosen = kernels(implementation, sampled)
        with foreign.load({name: implementation.function(schedule) for name, _, schedule in chosen}) as library:
            for case in prove.linear_cases(spec, seed=1):
                packed = implementation.pack(case.weight, case.bias)
                for name, bucket, schedule in chosen:
                    counts = prove.token_counts(bucket.lowest, bucket.highest)
                    failure = prove.linear_failure(library[name], packed, case, counts)
                    assert failure is None, (spec, schedule)


@pytest.mark.parametrize("foreign", VECTOR)
@pytest.mark.parametrize("kind", ["bit", "int8"])
def test_kernels_are_made_of_the_familys_instructions(foreign, kind):
    implementation = cpu.implementations(LinearSpec(kind, 64, 128, 64), foreign.target)[0]
    for bucket, expected in ((cpu.BUCKETS[0], foreign.gemv), (cpu.BUCKETS[-1], foreign.gemm)):
        found = instructions({"kernel": implementation.function(implementation.schedules(bucket)[0])}, foreign.target)
        if kind == "int8":
            expected = expected[1:]  # nothing to look up
        assert all(any(name.startswith(start) for name in found) for start in expected), (bucket, found)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("family", arm.ARCHITECTURES)
def test_popcounts_are_made_of_bit_counts_and_nothing_wider_than_a_byte(family, additive):
    target, spec = Target.parse(f"cpu:{family}"), LinearSpec("bit", 64, 128, 64, additive=additive)
    implementation = cpu.of_layout(cpu.implementations(spec, target), "popcount")
    found = instructions({"kernel": implementation.function(implementation.schedules(cpu.BUCKETS[0])[0])}, target)
    masks, words, vectors = (2 if additive else 3) * 4, 2, 4
    assert found["cnt"] == masks * words * vectors


@pytest.mark.parametrize("foreign", VECTOR)
@pytest.mark.parametrize("bits", ACTIVATION_BITS)
def test_quantizers_contract_nothing(foreign, bits):
    function = cpu.quantizer(QuantizeSpec(100, 64, bits), foreign.target, False)
    found = instructions({"quantize": function}, foreign.target)
    assert not [name for name in found if FUSED.fullmatch(name)]
    assert any("div" in name for name in found)


@pytest.mark.parametrize(
    "shapes",
    [SHAPES[1::2], pytest.param(SHAPES[::2] + MORE_SHAPES, marks=pytest.mark.slow)],
    ids=["some", "more"],
)
@pytest.mark.parametrize("foreign", RUNNABLE)
def test_linears_are_exact_in_emulation(foreign, shapes):
    for shape in shapes:
        spec = LinearSpec(*shape)
        if foreign.gemv and spec.act_bits == 16:
            continue  # the portable kernel, proven under its own target
        assert_exact(spec, foreign)


@pytest.mark.parametrize("columns", [1, 17, 40, 70, 600])
def test_a_row_of_one_group_may_leave_any_part_of_a_tile(columns):
    foreign, spec = FOREIGN["avx512-amx"], LinearSpec("int8", 50, columns, 0, 8)
    if foreign.skip:
        pytest.skip(foreign.skip)
    (implementation,) = cpu.implementations(spec, foreign.target)
    found = [s for b in cpu.BUCKETS[1:] for s in implementation.schedules(b) if isinstance(s, cpu.TileSchedule)]
    sample = {f"k{i}": schedule for i, schedule in enumerate(spread(found, 4))}
    with foreign.load({name: implementation.function(schedule) for name, schedule in sample.items()}) as library:
        for case in prove.linear_cases(spec):
            packed = implementation.pack(case.weight, None)
            for name, schedule in sample.items():
                assert prove.linear_failure(library[name], packed, case, [1, 9, 16, 37]) is None, schedule


@pytest.mark.parametrize("foreign", RUNNABLE)
def test_calls_of_many_tokens_are_exact_in_emulation(foreign):
    """More tokens than a kernel keeps sums of at once."""
    spec, tokens = LinearSpec("bit", 20, 70, 32), 6 * prove.TOKENS
    implementation, case = cpu.implementations(spec, foreign.target)[0], prove.linear_cases(spec)[0]
    function = implementation.function(implementation.schedules(cpu.BUCKETS[-1])[0])
    out = torch.empty(tokens, spec.out_features)
    with foreign.load({"kernel": function}) as library:
        library["kernel"](
            case.values.repeat(6, 1), case.x_scale.repeat(6, 1), implementation.pack(case.weight, None), out
        )
    assert prove.agree(out, case.expected.repeat(6, 1))


@pytest.mark.slow
@pytest.mark.parametrize("foreign", RUNNABLE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
def test_schedules_of_the_whole_space_are_exact_in_emulation(foreign, bits, group):
    """Full groups and a tail, several row blocks and odd rows."""
    assert_exact(LinearSpec("bit", 75, 2 * group + 21, group, bits, False, True), foreign, sampled=6)


@pytest.mark.parametrize(
    "shapes",
    [
        [(259, 64, 4), (77, 0, 8), (1, 32, 16), (259, 64, 4, True)],
        pytest.param(
            [(1, 32, 4), (77, 0, 4), (300, 256, 4), (259, 64, 8), (259, 64, 16), (77, 0, 4, True), (300, 128, 4, True)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "more"],
)
@pytest.mark.parametrize("foreign", RUNNABLE)
def test_quantizers_are_exact_in_emulation(foreign, shapes):
    functions, specs = {}, {}
    for shape in shapes:
        for parallel in (False, True):
            name = f"q{len(functions)}"
            specs[name] = QuantizeSpec(*shape)
            functions[name] = cpu.quantizer(specs[name], foreign.target, parallel)
    with foreign.load(functions) as library:
        for name, spec in specs.items():
            assert prove.quantizer_failure(library[name], spec, [1, 7, prove.TOKENS]) is None, (spec, name)


@pytest.fixture(scope="module")
def neon():
    """A small kernel for many tokens, its library and a case it gets right."""
    foreign = FOREIGN["neon-i8mm"]
    if foreign.skip:
        pytest.skip(foreign.skip)
    spec = LinearSpec("bit", 40, 96, 64)
    implementation = cpu.implementations(spec, foreign.target)[0]
    function = implementation.function(implementation.schedules(cpu.BUCKETS[1])[0])
    return foreign, {"kernel": function}, implementation, prove.linear_cases(spec)[0]


def test_a_wrong_result_is_seen(neon):
    foreign, functions, implementation, case = neon
    levels = case.weight.levels.clone()
    levels[-1, -1, 3] -= 1
    packed = implementation.pack(dataclasses.replace(case.weight, levels=levels), None)
    with foreign.load(functions) as library:
        assert "of 600 outputs differ" in prove.linear_failure(library["kernel"], packed, case, [15])


def test_arguments_of_a_wrong_shape_are_refused(neon):
    foreign, functions, implementation, case = neon
    packed = implementation.pack(case.weight, None)
    with foreign.load(functions) as library, pytest.raises(KernelError, match="kernel is wrong: ValueError"):
        library["kernel"](case.values[:, :-1].contiguous(), case.x_scale, packed, torch.empty(37, 40))


def test_an_access_outside_a_tensor_is_seen(neon):
    @T.prim_func(s_tir=True)
    def reads_one_too_many(x_: T.handle, y_: T.handle):
        n = T.int32()
        x = T.match_buffer(x_, (n,), "int8", align=1)
        y = T.match_buffer(y_, (8,), "int8", align=1)
        for i in T.serial(8):
            y[i] = x[i + 1]

    with neon[0].load({"kernel": reads_one_too_many}) as library:
        library["kernel"](torch.ones(9, dtype=torch.int8), torch.ones(8, dtype=torch.int8))
        with pytest.raises(KernelError, match=r"Segmentation fault|ended with code"):
            library["kernel"](torch.ones(8, dtype=torch.int8), torch.ones(8, dtype=torch.int8))


def tiles_kernel(configures: bool, releases: bool, values: int = 64) -> PrimFunc:
    """Multiplies tiles of 16 lines, the values of ``values`` bytes a line, that hold nothing but zeros."""
    tiles = INSTRUCTION_SETS["avx512-amx"](8).tiles

    def body(scratch) -> None:
        if configures:
            tiles.configure_tiles(scratch, {0: (16, 64), 1: (16, values), 2: (16, 64)})
        tiles.clear_tile(0)
        tiles.multiply_tiles(0, 1, 2)
        if releases:
            tiles.release_tiles()

    @T.prim_func(s_tir=True)
    def kernel(y_: T.handle):
        y = T.match_buffer(y_, (1,), "int8", align=1)
        scratch = T.alloc_buffer((16,), "int32")
        body(scratch)
        y[0] = T.int8(1)

    return kernel


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((True, True), None),
        ((False, True), "used that is not configured"),
        ((True, False), "does not release its tiles"),
        ((True, True, 32), "shapes do not fit"),
    ],
)
def test_a_wrong_use_of_tiles_is_seen(arguments, complaint):
    foreign = FOREIGN["avx512-amx"]
    if foreign.skip:
        pytest.skip(foreign.skip)
    y = torch.zeros(1, dtype=torch.int8)
    with foreign.load({"kernel": tiles_kernel(*arguments)}) as library:
        if complaint is None:
            library["kernel"](y)
            assert y.tolist() == [1]
            return
        with pytest.raises(KernelError, match=complaint):
            library["kernel"](y)


# Targets


@pytest.mark.parametrize(("module", "machine"), [(x86, "x86_64"), (arm, "aarch64")])
def test_only_another_architecture_needs_a_triple(module, machine, monkeypatch):
    for here in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda here=here: here)
        for family in module.ARCHITECTURES:
            triple = Target.parse(f"cpu:{family}").llvm.get("mtriple")
            assert triple == (None if here == machine else module.TRIPLE)


AVX512 = "fpu avx2 bmi1 bmi2 fma f16c movbe avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bitalg"
CPUINFO = {
    "avx512-vpopcnt": ("flags", AVX512),
    "neon-i8mm": ("Features", "fp asimd evtstrm aes asimddp sve i8mm bf16"),
    "neon-dotprod": ("Features", "fp asimd evtstrm aes asimddp"),
    "generic": ("Features", "fp asimd evtstrm aes"),
    "avx-vnni": ("flags", "fpu avx2 bmi1 bmi2 fma f16c movbe avx_vnni"),
    "avx2": ("flags", "fpu avx2 bmi1 bmi2 fma f16c movbe"),
}


@pytest.mark.parametrize("family", CPUINFO)
def test_the_best_family_is_found_in_cpuinfo(family, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(host, "_cpuinfo", lambda: dict([CPUINFO[family]]))
    monkeypatch.setattr(host, "cpu_flags", host.cpu_flags.__wrapped__)
    assert host.families.__wrapped__()[0] == family


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_are_for_processes_that_are_granted_them(granted, monkeypatch):
    flags = host.NEEDED_FLAGS["avx512-amx"]
    monkeypatch.setattr(host, "cpu_flags", lambda: flags)
    monkeypatch.setattr(host, "grants_tiles", lambda: granted)
    families = host.families.__wrapped__()
    assert families[0] == ("avx512-amx" if granted else "avx512-vpopcnt")


def test_every_process_that_runs_kernels_has_asked_for_tiles():
    """Without TVM's compiler, and with it."""
    if not host.grants_tiles():
        pytest.skip("this machine has no tiles, or does not grant them")
    for module in ("tvm_runtime", "tvm_api"):
        program = (
            f"import ctypes, lbllm_compile.codegen.{module};"
            "granted = ctypes.c_uint64();"
            "assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(granted)) == 0;"
            "assert granted.value >> 18 & 1"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("family", [*x86.ARCHITECTURES, *arm.ARCHITECTURES])
def test_every_family_is_a_target_with_instructions_and_flags(family):
    assert f"cpu:{family}" in known_targets()
    assert family in INSTRUCTION_SETS and family in host.NEEDED_FLAGS


@pytest.mark.parametrize("family", arm.ARCHITECTURES if platform.machine() in x86.MACHINES else x86.ARCHITECTURES)
def test_kernels_of_another_architecture_are_not_built_for_use(family, tmp_path):
    sentence = f"this machine cannot run cpu:{family}; its own targets: "
    with pytest.raises(TargetError, match=sentence):
        build([], [], f"cpu:{family}", tmp_path)
    with pytest.raises(TargetError, match=sentence):  # before the model is looked for
        read_job(CompileOptions(model="absent.py", target=f"cpu,cpu:{family}"))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model name": "AMD EPYC", "cpu family": "26", "model": "2"}, "AMD EPYC (family 26, model 2)"),
        ({"CPU implementer": "0x41", "CPU part": "0xd0b"}, "ARM implementer 0x41 part 0xd0b"),
        ({"model name": "POWER9"}, "POWER9"),
    ],
)
def test_a_cpu_is_named_so_that_generations_differ(fields, name, monkeypatch):
    monkeypatch.setattr(host, "_cpuinfo", lambda: fields)
    assert host.cpu_name() == name
