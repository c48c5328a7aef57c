"""A whole program as a static launch list, run by a stand-in driver: launched one by one and replayed as a graph."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.backend import EntryPoint
from lbllm_compile.codegen.cuda.compiler import Binary, CudaCompiler, SpillError
from lbllm_compile.codegen.cuda.dp4a import ROWS, gemv_schedules
from lbllm_compile.codegen.cuda.driver import OVERLAP_VERSION, Driver
from lbllm_compile.codegen.cuda.emulator import ASCENDING, DESCENDING, Emulator
from lbllm_compile.codegen.cuda.emulator import Launch as EmulatedLaunch
from lbllm_compile.codegen.cuda.kernel import kernel_name
from lbllm_compile.codegen.cuda.program import attention, elementary, launches, prologue
from lbllm_compile.codegen.cuda.program.compile import compile_launches
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.launches import (
    PART,
    TOKEN,
    Launch,
    LaunchList,
    Place,
    ProgramKernel,
    Result,
    Size,
)
from lbllm_compile.codegen.cuda.program.loops import nests
from lbllm_compile.codegen.cuda.program.lower import lower
from lbllm_compile.codegen.cuda.program.session import DecodeSession, DeviceProgram
from lbllm_compile.codegen.cuda.text import BEGIN, PREAMBLE
from lbllm_compile.codegen.errors import KernelError, UntranslatableError
from lbllm_compile.codegen.format import Int4Weight, pack_codes
from lbllm_compile.codegen.program.builder import FunctionBuilder, Layout, ProgramBuilder, TensorSpec
from lbllm_compile.codegen.spec import AttentionSpec, EmbeddingSpec, LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import cuda_source, s_tir, te, tirx
from lbllm_compile.passes.ir.program import Program
from reference_kernels import ReferenceKernels
from rtn import simulate
from test_zoo import apply, stages
from zoo import LAYERS, VOCABULARY, captured

from lbllm_compile.lowering.executor import Executor, requirements
from lbllm_compile.lowering.session import Session
from lbllm_compile.lowering.translate import Translated, translate

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the search path")

CAPACITY = 32
PROMPT = np.random.default_rng(0).integers(3, VOCABULARY, 12)
OTHERS = ["qwen3", "gemma3", "gpt2", "phi3", "mixtral"]
"""Architectures of which a whole step is a launch list, beside LLaMA."""

BOUND = 1e-3
"""Distance of logits where nothing but the order of fp32 sums differs and no code of a quantizer moves."""


@functools.cache
def lowered(name: str, *entries: EntryPoint) -> tuple[LaunchList, Translated]:
    """The launches of a toy model, as they are read back, for the steps of single tokens unless entries are given."""
    return launches_of(stages(name)[1], *entries)


def launches_of(program: Program, *entries: EntryPoint) -> tuple[LaunchList, Translated]:
    """The same of a lowered program."""
    kernels = ProgramKernels(Target.parse("cuda:sm_90"))
    translated = translate(program, kernels, entries or [TOKEN])
    launch_list = lower(translated.functions(), kernels, translated.layout, translated.state, translated.fixed)
    return LaunchList.from_json(launch_list.to_json()), translated


@contextmanager
def on_standin(
    launch_list: LaunchList, translated: Translated, folder: Path, library: str | None = None
) -> Iterator[DeviceProgram]:
    """A program on the stand-in for the driver, or on another library."""
    binary = standin.cubin(launch_list.source(), folder)
    with Driver(library=library or standin.driver()) as driver:
        yield DeviceProgram(driver, launch_list, binary, translated.weight_bytes())


ONE_CODE = 1e-2
"""Distance of logits where a code of a quantizer is the next one."""


class WatchedKernels(ReferenceKernels):
    """Notes how close to the middle between two codes the elements of quantizers lie, in codes."""

    def __init__(self) -> None:
        self.closest = torch.inf

    def quantizer(self, spec: QuantizeSpec) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        quantize = super().quantizer(spec)

        def watched(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, scale = quantize(x, *others)
            codes = x.double() / scale.double().repeat_interleave(spec.group or spec.in_features, -1)[:, : x.shape[1]]
            self.closest = min(self.closest, float((codes - codes.floor() - 0.5).abs().min()))
            return values, scale

        return watched


@functools.cache
def executed(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The executor's logits of every token of the prompt, one by one, and which have an element close to two codes."""
    return executed_by(stages(name)[1])


def executed_by(program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a lowered program."""
    kernels = WatchedKernels()
    session = Session(program, Executor(program, kernels), 1, 0)
    session.start(np.ones((1, 1), np.int64))
    logits, close = [], []
    for token in PROMPT:
        kernels.closest = torch.inf
        logits.append(session.logits(torch.tensor([[int(token)]]))[0])
        close.append(kernels.closest < 1e-5)
    return torch.cat(logits), torch.tensor(close)


def expected(name: str) -> torch.Tensor:
    """The executor's logits of every token of the prompt."""
    return executed(name)[0]


@pytest.fixture(scope="module")
def library() -> str:
    return standin.driver()


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return standin.cubin(lowered("llama")[0].source(), tmp_path_factory.mktemp("module"))


@pytest.fixture
def session(library: str, cubin: bytes):
    """Makes sessions, which end with the test."""
    with ExitStack() as drivers:

        def make(other: bytes = cubin) -> DecodeSession:
            launch_list, translated = lowered("llama")
            driver = drivers.enter_context(Driver(library=library))
            return DeviceProgram(driver, launch_list, other, translated.weight_bytes()).sequence(CAPACITY)

        yield make


def decoded(found: DecodeSession, replayed: bool = True, tokens: int = len(PROMPT)) -> torch.Tensor:
    """Logits of every token of the prompt, or of the first ones."""
    logits = []
    for token in PROMPT[:tokens]:
        (found.step if replayed else found.step_by_launch)(int(token))
        logits.append(found.logits())
    return torch.from_numpy(np.stack(logits))


def distances(found: torch.Tensor, name: str) -> torch.Tensor:
    """The relative distance of every token's logits from the executor's."""
    theirs = expected(name)[: len(found)]
    return ((found - theirs).norm(dim=-1) / theirs.norm(dim=-1)).nan_to_num(nan=torch.inf)


def distance(found: torch.Tensor, name: str = "llama") -> float:
    """The largest one."""
    return float(distances(found, name).max())


@needs_gpp
def test_a_replayed_program_gives_the_executors_logits(session) -> None:
    logits = decoded(session())
    assert distance(logits) < BOUND
    assert torch.equal(logits.argmax(-1), expected("llama").argmax(-1))


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_give_the_executors_logits(name: str, library: str, tmp_path: Path) -> None:
    logits = logits_of(name, library, tmp_path)
    assert distance(logits, name) < BOUND
    assert torch.equal(logits.argmax(-1), expected(name).argmax(-1))


@needs_gpp
@pytest.mark.parametrize(
    ("name", "table", "per_token", "coded", "head", "entries"),
    [
        ("llama", "knees", False, (".q_proj", ".k_proj", ".v_proj", ".down_proj"), "bits=4,embedding=4", [TOKEN]),
        pytest.param(
            "llama-tied", "knees", False, (".up_proj", ".gate_proj"), "bits=4", [TOKEN, PART], marks=pytest.mark.slow
        ),
        pytest.param("llama", "knees", True, (".o_proj",), "bits=8", [TOKEN, PART], marks=pytest.mark.slow),
        pytest.param("llama", "planes", True, (".o_proj",), "bits=8", [TOKEN, PART], marks=pytest.mark.slow),
        pytest.param("llama", "planes", False, (".o_proj",), "bits=8", [TOKEN], marks=pytest.mark.slow),
    ],
)
def test_tables_and_codes_of_4_bits_give_the_executors_logits(
    name: str,
    table: str,
    per_token: bool,
    coded: tuple[str, ...],
    head: str,
    entries: list[EntryPoint],
    library: str,
    tmp_path: Path,
) -> None:
    """Codes in some linears, in the head and in the embedding, in a table of its own or in that of the head; token by
    token and in a part."""
    annotated = apply(captured(name)[1], "canonicalize,annotate")
    simulated = simulate(annotated, per_token=per_token, coded=coded, **{table: True})
    program = apply(simulated, f"head{{{head},sequences=0}},merge,lower,cache,cleanup")
    needed = requirements(program)
    assert {"bit", "int4"} <= {spec.kind for spec in needed.linears}
    tables = {(spec.knees, spec.planes, spec.bits, spec.group == 0) for spec in needed.quantizers if spec.tabled}
    assert tables == {(table == "knees", table == "planes", 4, per_token)}
    wanted, _ = executed_by(program)
    with on_standin(*launches_of(program, *entries), tmp_path, library) as made:
        found = decoded(made.sequence(CAPACITY))
        assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < BOUND
        whole = made.sequence(CAPACITY)
        whole.feed([int(token) for token in PROMPT])
        last = torch.tensor(whole.logits())
        assert (last - wanted[-1]).norm() / wanted[-1].norm() < BOUND


@needs_gpp
@pytest.mark.slow
def test_an_element_between_two_codes_may_become_either(library: str, tmp_path: Path) -> None:
    """Sums of another order move an element by its last bit. In Qwen2's third token, one in front of the head is so
    close to the middle of two codes that it becomes the other one; all other tokens keep the bound."""
    found, close = distances(logits_of("qwen2", library, tmp_path), "qwen2"), executed("qwen2")[1]
    assert close.tolist() == [token == 2 for token in range(len(PROMPT))]
    assert found[~close].max() < BOUND and found[close].max() < ONE_CODE


def logits_of(name: str, library: str, folder: Path) -> torch.Tensor:
    """Logits of every token of the prompt."""
    with on_standin(*lowered(name), folder, library) as program:
        return decoded(program.sequence(CAPACITY))


@needs_gpp
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_replay_is_the_launches_one_by_one(session, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, state included, and whatever order threads run in."""
    replayed, launched = session(), session()
    ours = decoded(replayed)
    monkeypatch.setenv("LBLLM_STANDIN_ORDER", order)
    theirs = decoded(launched, replayed=False)
    assert torch.equal(ours, theirs) and replayed.token() == launched.token()
    assert replayed.state() == launched.state()


@needs_gpp
def test_steps_hand_their_tokens_on(session) -> None:
    """Nothing is written between steps that go on with what was chosen; it is what comes of writing it."""
    free, told = session(), session()
    for token in PROMPT[:5]:
        free.step(int(token))
        told.step(int(token))
    for _ in range(8):
        chosen = free.token()
        assert chosen == int(free.logits().argmax())
        free.step()
        told.step(chosen)
        assert np.array_equal(free.logits(), told.logits())


@needs_gpp
def test_a_conversation_ends_where_its_room_does_and_can_be_cut(session) -> None:
    found = session()
    first = decoded(found)
    found.rewind(5)
    for i in range(5, len(PROMPT)):
        found.step(int(PROMPT[i]))
        assert np.array_equal(found.logits(), first[i].numpy())
    for _ in range(CAPACITY - len(PROMPT)):
        found.step()
    with pytest.raises(KernelError, match=f"room for {CAPACITY} tokens"):
        found.step()
    with pytest.raises(KernelError, match="cannot be cut"):
        found.rewind(CAPACITY + 1)


@needs_gpp
def test_thread_blocks_of_a_large_kernel_take_turns(session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whatever order they run in."""
    expected_logits = decoded(session(), tokens=3)
    monkeypatch.setattr(prologue, "MOST_BLOCKS", 2)
    launch_list, translated = lowered.__wrapped__("llama")
    assert max(launch.grid(CAPACITY)[0] for launch in launch_list.started(CAPACITY)) == 2
    binary = standin.cubin(launch_list.source(), tmp_path)
    for order in ("ascending", "descending"):
        monkeypatch.setenv("LBLLM_STANDIN_ORDER", order)
        driver = session().driver
        found = DeviceProgram(driver, launch_list, binary, translated.weight_bytes()).sequence(CAPACITY)
        assert torch.equal(decoded(found, tokens=3), expected_logits)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS if n != "gpt2")]
)
def test_a_layer_takes_five_launches(name: str) -> None:
    """One for each linear, of all experts, and one for the attention; norms, quantizers, rotary embeddings, gates,
    routers and residuals are in theirs."""
    layer = ["bit_gemv", "attention", "bit_gemv", "bit_gemv", "bit_gemv"]
    launched = [launch.symbol for launch in lowered(name)[0].started(CAPACITY)]
    wanted = ["embedding", *layer * LAYERS, "int8_gemv", "next_token"]
    assert [kind for kind, symbol in zip(wanted, launched, strict=True) if not symbol.startswith(kind)] == []


@needs_gpp
def test_loops_of_many_iterations_have_launches_of_their_own(
    session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbllm_compile.codegen.cuda.program.lower.MOST_STEPS", 0)
    launch_list, translated = lowered.__wrapped__("llama")
    assert len(launch_list.launches) > len(lowered("llama")[0].launches)
    binary = standin.cubin(launch_list.source(), tmp_path)
    found = DeviceProgram(session().driver, launch_list, binary, translated.weight_bytes()).sequence(CAPACITY)
    assert distance(decoded(found)) < BOUND


def test_loops_that_tvm_does_not_schedule_are_refused_in_a_sentence() -> None:
    rows = te.placeholder((4, 8), "float32")
    over = te.reduce_axis((0, 8))
    sums = te.compute((4,), lambda i: te.sum(rows[i, over], over), name="sums")
    plan = s_tir.Schedule(te.create_prim_func([rows, te.compute((4,), lambda i: sums[i] * 2.0, name="doubled")]))
    plan.compute_at(plan.get_sblock("sums"), plan.get_loops(plan.get_sblock("doubled"))[0])
    with pytest.raises(UntranslatableError, match="threads cannot share a fused loop"):
        nests(plan.mod["main"])  # two blocks in one loop, of which each would have threads of its own


def test_a_number_is_a_loop_of_one_element() -> None:
    (nest,) = nests(te.create_prim_func([te.compute((), lambda: tirx.const(3, "int64"))]))
    assert (int(nest.work), len(nest.buffers)) == (1, 1)


def test_layers_that_are_alike_share_their_kernels() -> None:
    launch_list = lowered("llama")[0]
    # The first layer's norm reads the embedding, and its attention computes the rotary embedding for all.
    assert len({launch.symbol for launch in launch_list.started(CAPACITY)}) == 5 + 2 + 3
    # Beyond so many slots attention is two kernels.
    assert len(launch_list.kernels) == 5 + 2 + 3 + 2 + 1


def test_layers_that_are_alike_read_their_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of any size, too, which become loops of their sizes in every layer."""
    monkeypatch.setattr("lbllm_compile.codegen.cuda.program.lower.MOST_STEPS", 0)
    kernels, none = ProgramKernels(Target.parse("cuda:sm_90")), Layout.of(())
    shapes = {"x": (1, 8), "first": (8, 8), "second": (8, 8)}
    weights = Layout.of(TensorSpec(name, shape, "float32") for name, shape in shapes.items())
    whole, dense = ProgramBuilder(weights, none), kernels.dense(8, 8, True)
    function, kernel = FunctionBuilder(whole, TOKEN.name, [], {}, blocks=True), whole.kernel(dense.name, dense.make)
    rows = function.value("x")
    for name in ("first", "second"):
        rows = function.call(kernel, [rows, function.value(name)], ((1, 8), "float32"))
    function.finish(rows)
    first, second, _ = lower(whole.finish(), kernels, weights, none, none).launches
    x, *matrices = (Place("weights", Size(offset)) for offset in weights.offsets.values())
    assert first.arguments == (x, matrices[0], Result(0))
    assert second.arguments == (Result(0), matrices[1], Result(1))


# Launches that overlap


@needs_gpp
@pytest.mark.parametrize(
    ("version", "arch", "wanted", "overlaps"),
    [
        (OVERLAP_VERSION, 90, "1", True),
        (OVERLAP_VERSION, 121, "", True),
        (OVERLAP_VERSION - 10, 90, "1", False),
        (OVERLAP_VERSION, 89, "1", False),
        (OVERLAP_VERSION, 90, "0", False),
    ],
)
def test_launches_of_replays_overlap_where_architecture_and_driver_have_that(
    version: int, arch: int, wanted: str, overlaps: bool, library: str, cubin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first one, whatever is in front of that. Single launches never do."""
    for name, value in (("STANDIN_VERSION", version), ("STANDIN_ARCH", arch), ("CUDA_OVERLAP", wanted)):
        monkeypatch.setenv(f"LBLLM_{name}", str(value))
    launch_list, translated = lowered("llama")
    launched: list[bool] = []

    class Noting(Driver):
        def launch(self, *arguments: Any, **named: Any) -> None:
            launched.append(arguments[4])
            super().launch(*arguments, **named)

    with Noting(library=library) as driver:
        program = DeviceProgram(driver, launch_list, cubin, translated.weight_bytes())
        session = program.sequence(CAPACITY)
        assert launched == [False, *[overlaps] * (len(launch_list.started(CAPACITY)) - 1)]
        launched.clear()
        program.sequence(CAPACITY, overlapping=False)
        session.step_by_launch(5)
        assert len(launched) > 2 and not any(launched)


@needs_gpp
def test_launches_of_kernels_that_do_not_wait_by_themselves_never_overlap(library: str, tmp_path: Path) -> None:
    """As of a program that was packed by an older release."""
    launch_list, translated = lowered("llama")
    plain = tuple(replace(kernel, source=kernel.source.replace(BEGIN, "")) for kernel in launch_list.kernels)
    with on_standin(replace(launch_list, kernels=plain), translated, tmp_path, library) as program:
        assert not program.overlaps
        assert distance(decoded(program.sequence(CAPACITY), tokens=3)) < BOUND


@needs_nvcc
def test_nothing_is_read_before_the_launches_in_front_have_ended() -> None:
    """Nor by loads that no wait orders, those of what is constant while a kernel is there."""
    source = lowered("llama", TOKEN, PART)[0].source()
    text = CudaCompiler.find().compile(source, "compute_90").cubin.decode()
    bodies = re.split(r"(?m)^\s*\.visible \.entry ", text)[1:]
    assert len(bodies) == len(lowered("llama", TOKEN, PART)[0].all_kernels())
    for body in bodies:
        # What sines and cosines look up are constants of CUDA's own.
        constants = set(re.findall(r"mov\.u64\s+(%rd\d+), __cudart_", body))
        assert set(re.findall(r"ld\.global\.nc\S* .*\[(%rd\d+)", body)) <= constants
        assert -1 < body.index("griddepcontrol.wait") < body.find("ld.global") or "ld.global" not in body


# The stand-in refuses what a driver refuses


@needs_gpp
@pytest.mark.parametrize(
    ("forbidden", "message"),
    [
        (lambda driver: driver.allocate(64), "cuMemAlloc_v2: operation not permitted"),
        (lambda driver: driver.synchronize(), "cuCtxSynchronize: operation not permitted"),
        (lambda driver: driver.module(b"x"), "cuModuleLoadData: operation not permitted"),
    ],
)
def test_what_cannot_be_captured_is_refused(library: str, forbidden, message: str) -> None:
    with Driver(library=library) as driver:
        stream = driver.new_stream()
        with pytest.raises(KernelError, match=message):
            driver.captured(stream, lambda: forbidden(driver))
        graph = driver.captured(stream, lambda: None)
        driver.replay(graph, stream)


@needs_gpp
def test_what_spoiled_a_capture_is_told_even_where_it_was_overlooked(library: str) -> None:
    with Driver(library=library) as driver:

        def overlooks() -> None:
            with pytest.raises(KernelError):
                driver.allocate(64)

        with pytest.raises(KernelError, match="due to a previous error during capture"):
            driver.captured(driver.new_stream(), overlooks)


# Planted faults


def faulty(old: str, new: str, symbol: str, tmp_path: Path) -> bytes:
    """The program with a fault in one kernel's text."""
    launch_list, kernels = lowered("llama")[0], []
    for kernel in launch_list.kernels:
        if re.match(symbol, kernel.symbol):
            assert old in kernel.source, kernel.source
            kernel = replace(kernel, source=kernel.source.replace(old, new))
        kernels.append(kernel)
    return standin.cubin(replace(launch_list, kernels=tuple(kernels)).source(), tmp_path)


def wrong(found: DecodeSession) -> bool:
    """Whether a test above would fail for a program."""
    try:
        return not distance(decoded(found, tokens=6)) < BOUND
    except KernelError:  # the driver saw it
        return True


@needs_gpp
def test_a_result_that_another_one_overwrites_is_caught(session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LaunchList, "arena", lambda self, capacity: launches.Arena(dict.fromkeys(range(len(self.results)), 0), 1 << 16)
    )
    assert wrong(session())


@needs_gpp
def test_a_captured_pointer_that_went_stale_is_caught(session) -> None:
    """A step that is given other memory than the graph that was captured."""
    found, launched = session(), session()
    fresh = found.driver.allocate(8)
    found._blocks["input_ids"] = fresh
    ours, theirs = decoded(found), decoded(launched, replayed=False)
    assert not torch.equal(ours, theirs)


@needs_gpp
@pytest.mark.parametrize(
    ("symbol", "old", "new"),
    [
        ("next_token", "= (position_ids_ptr[0] + (int64_t)1)", "= 2"),
        (r"attention_\d+_\d", "slot = past_ptr[0]", "slot = 3"),
        (r"attention_\d+_\d", "__syncthreads();", ""),
        ("bit_gemv_144x72", "__syncthreads();", ""),
        ("int8_gemv_101x72", "< 101", "< 100"),
        ("bit_gemv_144x72", ">> (uint)16", ">> (uint)12"),
        ("bit_gemv_144x72", BEGIN, ""),
    ],
    ids=["position", "length", "barrier of the attention", "barrier of a linear", "tail", "nibble", "begin"],
)
def test_planted_faults_are_caught(
    session, symbol: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = faulty(old, new, symbol, tmp_path)

    def fails(order: str) -> bool:
        monkeypatch.setenv("LBLLM_STANDIN_ORDER", order)
        return wrong(session(spoiled))

    assert fails("ascending") or fails("descending")


# The embedding by itself


@needs_gpp
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("columns", "group"), [(33, 32), (259, 64), (256, 256)])
def test_rows_of_4_bit_codes_are_the_references(columns: int, group: int, tokens: int) -> None:
    """With scales of every size and sign, an odd number of columns, and ids that are no rows."""
    spec, generator = EmbeddingSpec(11, columns, group), torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 16, (spec.rows, columns), generator=generator, dtype=torch.uint8)
    levels = torch.arange(-128, 128, 17, dtype=torch.int8)
    groups = -(-columns // group)
    scale = torch.tensor([0.0, 2**-24, -1.0, 65504.0, -(2**-15)]).half().repeat(11)[: spec.rows * groups]
    weight = Int4Weight(pack_codes(codes), levels, scale.reshape(spec.rows, groups), columns, group)
    ids = torch.tensor([[-5, 10, 400]])[:, -tokens:]
    made = elementary.embedding(spec, tokens)
    emulator = Emulator(PREAMBLE + cuda_source(made, "embedding", "sm_90"))
    blocks = tokens * -(-columns // elementary.THREADS)
    inputs = {"codes": weight.packed, "levels": levels, "scale": weight.scale.view(torch.int16), "ids": ids}
    out = torch.full((1, tokens, columns), float("nan"))
    launch = EmulatedLaunch((blocks, 1, 1), (elementary.THREADS, 1, 1), inputs, {"out": out})
    found = emulator.run(launch)["out"]
    assert torch.equal(found[0], weight.dequantize()[ids[0].clamp(0, spec.rows - 1)])


# Attention by itself, where every race is seen

ATTENTIONS = [
    (AttentionSpec(4, 2, 18, 18, 4, 0, 0.25), 5),
    (AttentionSpec(3, 1, 7, 33, 4, 0, 0.5), 0),
    (AttentionSpec(2, 2, 16, 16, 4, 8, 0.25, softcap=5.0), 150),
    (AttentionSpec(2, 1, 20, 130, 8, 0, 0.25, sinks=True), 131),
    (AttentionSpec(2, 1, 5, 6, 16, 0, 0.25), 9),
]


def some_state(
    spec: AttentionSpec, past: int, capacity: int, tokens: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A KV state whose slots behind the past ones hold what is no number, and new keys and values."""
    state, new = [], []
    for width in (spec.key_width, spec.value_width):
        stored = reference.quantize_kv(torch.randn(1, spec.kv_heads, past, width, generator=generator) * 3, spec.bits)
        for part in stored:
            whole = torch.full((*part.shape[:2], capacity, part.shape[3]), 255).to(part.dtype)
            if part.is_floating_point():
                whole.fill_(torch.nan)
            whole[:, :, :past] = part
            state.append(whole)
        new.append(torch.randn(1, spec.kv_heads, tokens, width, generator=generator))
    return state, new


@needs_gpp
@pytest.mark.parametrize(("spec", "past"), ATTENTIONS, ids=lambda value: getattr(value, "bits", value))
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_attention_is_the_references(spec: AttentionSpec, past: int, order: int, tmp_path: Path) -> None:
    """Codes and parameters to the bit; slots that nobody wrote hold what is no number, and one token is hidden."""
    generator = torch.Generator().manual_seed(past)
    capacity = past + 3
    query = torch.randn(1, spec.heads, 1, spec.key_width, generator=generator)
    state, new = some_state(spec, past, capacity, 1, generator)
    mask = torch.zeros(1, capacity, dtype=torch.int64)
    mask[:, : past + 1] = 1
    mask[:, past // 2 : past // 2 + (past > 0)] = 0
    sinks = torch.randn(spec.heads, generator=generator) if spec.sinks else None
    wanted = [part.clone() for part in state]
    out = reference.cached_attention(
        query, *new, *wanted, mask[:, : past + 1], past, spec.scale, spec.window, spec.bits, spec.softcap, sinks
    )
    bits = [part.view(torch.int16) if part.is_floating_point() else part for part in state]
    if spec.bits == 16:  # there are no parameters, and nothing is read of what stands for them
        bits[1], bits[3] = bits[0].clone(), bits[2].clone()
    names = ["key_codes", "key_params", "value_codes", "value_params"]
    emulator = Emulator(cuda_source(attention.attention(spec), "attention", "sm_90"), tmp_path)
    inputs = {
        "query": query,
        "key": new[0],
        "value": new[1],
        "key_mask": mask,
        "past": torch.tensor([past], dtype=torch.int32),
        "capacity": capacity,
        **({} if sinks is None else {"sinks": sinks}),
    }
    outputs = {"out": torch.full(out.shape, torch.nan), **dict(zip(names, bits, strict=True))}
    grid, block = (spec.kv_heads, 1, 1), (attention.THREADS, 1, 1)
    found = emulator.run(EmulatedLaunch(grid, block, inputs, outputs, order=order))
    for name, part in zip(names, wanted, strict=True):
        if part.shape[-1]:
            ours, theirs = (t[:, :, : past + 1] for t in (found[name], part))
            assert torch.equal(ours, theirs.view(torch.int16) if theirs.is_floating_point() else theirs)
    torch.testing.assert_close(found["out"], out, rtol=1e-5, atol=1e-6)


def test_attention_that_has_no_kernel_is_refused() -> None:
    with pytest.raises(UntranslatableError, match="ALiBi"):
        attention.attention(AttentionSpec(2, 2, 8, 8, 4, 0, 1.0, chunk=4))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_program_compiles_to_one_cubin(arch: str) -> None:
    binary = CudaCompiler.find().compile(lowered("llama")[0].source(), arch)
    assert binary.cubin.startswith(b"\x7fELF")


class SpillingCompiler:
    """Compiles nothing, and says that kernels spill that are in a text."""

    version = "13.0"

    def __init__(self, spilling: Collection[str]):
        self.spilling, self.compiled = spilling, 0

    def compile(self, source: str, arch: str) -> Binary:
        self.compiled += 1
        if spilled := {symbol: 8 for symbol in self.spilling if f" {symbol}(" in source}:
            raise SpillError(spilled)
        return Binary(b"")


def compiled(
    compiler: SpillingCompiler, monkeypatch: pytest.MonkeyPatch, entries: Sequence[EntryPoint] = (TOKEN,)
) -> LaunchList:
    monkeypatch.setattr(CudaCompiler, "find", lambda: compiler)
    kernels = ProgramKernels(Target.parse("cuda:sm_90"))
    return compile_launches(translate(stages("llama")[1], kernels, entries).functions(), kernels).image.launches


def test_kernels_that_spill_take_nothing_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in front of them has launches of its own; the others stay what they were."""
    before = lowered("llama")[0]
    gemvs = [kernel.symbol for kernel in before.kernels if kernel.symbol.startswith("bit_gemv")]
    compiler = SpillingCompiler(gemvs[:2])
    after = compiled(compiler, monkeypatch)
    assert compiler.compiled == 2 and len(after.launches) > len(before.launches)
    sources = {kernel.symbol: kernel.source for kernel in after.kernels}
    assert {kernel.symbol for kernel in before.kernels if kernel.symbol not in sources} == {*gemvs[:2]}
    assert all(sources[k.symbol] == k.source for k in before.kernels if k.symbol in sources)


def test_a_linear_that_spills_by_itself_has_its_next_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of SmolLM2 does, on one architecture."""

    class HeadSpills(SpillingCompiler):
        """Until it is alone and cut otherwise."""

        def compile(self, source: str, arch: str) -> Binary:
            self.spilling = [] if self.compiled == 2 else re.findall(r"\b(int8_gemv\w*)\(", source)
            return super().compile(source, arch)

    def heads(launches: LaunchList) -> list[ProgramKernel]:
        return [kernel for kernel in launches.kernels if kernel.symbol.startswith("int8_gemv")]

    compiler = HeadSpills([])
    (head,) = heads(compiled(compiler, monkeypatch))
    spec = next(spec for spec in requirements(stages("llama")[1]).linears if spec.kind == "int8")
    first, second, *_ = gemv_schedules(spec)
    assert compiler.compiled == 3 and first.slice_warps != second.slice_warps
    assert head.block == (ROWS, second.row_warps * second.slice_warps, 1)
    assert [kernel.block for kernel in heads(lowered("llama")[0])] == [(ROWS, first.row_warps * first.slice_warps, 1)]


def test_a_linear_of_many_tokens_that_spills_has_its_next_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is another one for tensor cores, and the linears that do not spill keep theirs."""

    class OneSpills(SpillingCompiler):
        """A linear's kernel, the first time."""

        first = ""

        def compile(self, source: str, arch: str) -> Binary:
            self.first = self.first or source
            self.spilling = [] if self.compiled else re.findall(r"\b(bit_gemm_\w*)\(", source)[:1]
            return super().compile(source, arch)

    compiler = OneSpills([])
    part = compiled(compiler, monkeypatch, [TOKEN, PART]).part
    assert part is not None and compiler.compiled == 2
    cut, *others = [kernel for kernel in part.kernels if kernel.symbol.startswith("bit_gemm_")]
    assert f" {cut.symbol}(" in compiler.first and cut.source not in compiler.first
    assert others and all(kernel.source in compiler.first for kernel in others)
    assert all("mma_m16n8k32(" in kernel.source for kernel in (cut, *others))


def test_only_the_linear_that_spills_has_its_next_schedule() -> None:
    """And not that whose name begins alike, with a bias or as additive levels."""
    kernels = ProgramKernels(Target.parse("cuda:sm_90"))
    plain = LinearSpec("bit", 96, 576, 64)
    biased, additive = replace(plain, bias=True), replace(plain, additive=True)
    specs = [plain, biased, additive]
    for spec in specs:
        kernels.linear(spec)

    def cuts() -> list[tuple[object, object]]:
        return [(kernels.cut(spec), kernels.tile(spec, 64)) for spec in specs]

    first = cuts()
    assert kernels.give_up([f"{kernel_name(biased, 'gemv')}_kernel"])
    assert [now != was for now, was in zip(cuts(), first, strict=True)] == [False, True, False]
    assert kernels.give_up([f"{kernel_name(additive, 'gemm')}_64_kernel"])
    assert [now[1] != was[1] for now, was in zip(cuts(), first, strict=True)] == [False, False, True]
    assert not kernels.give_up([f"{kernel_name(plain, 'gemv')}_of_something_else_kernel"])
    assert kernels.give_up([f"{kernel_name(plain, 'gemv')}_2_of_8_experts_kernel"])


def test_a_kernel_that_spills_by_itself_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = SpillingCompiler(["next_token_kernel"])
    with pytest.raises(KernelError, match="compiled for sm_90: registers of next_token_kernel spill: 8 bytes"):
        compiled(compiler, monkeypatch)
    assert compiler.compiled == 1


# The arena


def test_results_that_are_needed_together_do_not_overlap() -> None:
    kernel = ProgramKernel("k", "", (1, 1, 1))
    spans = [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)]
    steps = tuple(
        Launch("k", Size(1), 1, tuple(Result(n) for n, span in enumerate(spans) if step in span)) for step in range(5)
    )
    sizes = (Size(100), Size(0, 8), Size(64), Size(1), Size(500))
    plan = LaunchList((kernel,), steps, sizes, {}, 4, 1, 0, 0, 0)
    for capacity in (1, 16, 100):
        arena = plan.arena(capacity)
        for a, (first, last) in enumerate(spans):
            for b, (begin, end) in enumerate(spans[:a]):
                if begin <= last and first <= end:
                    low, high = sorted((arena.offsets[n], n) for n in (a, b))
                    assert low[0] + sizes[low[1]].at(capacity) <= high[0]
        assert arena.bytes == max(arena.offsets[n] + -(-sizes[n].at(capacity) // 64) * 64 for n in range(5))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kernels": [{}]}'])
def test_a_damaged_list_is_refused(text: str) -> None:
    with pytest.raises(KernelError, match="damaged"):
        LaunchList.from_json(text)
