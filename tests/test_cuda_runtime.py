"""Devices, contexts, threads and refusals, on a stand-in for the driver: a made-up program of two tiny kernels."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import standin
from lbllm_compile.codegen.backend import StateTensor
from lbllm_compile.codegen.cuda.driver import Driver
from lbllm_compile.codegen.cuda.program.image import Image, on_device
from lbllm_compile.codegen.cuda.program.launches import (
    PART,
    Argument,
    Launch,
    LaunchList,
    Number,
    Place,
    ProgramKernel,
    Result,
    Size,
)
from lbllm_compile.codegen.cuda.program.lower import INPUTS
from lbllm_compile.codegen.cuda.program.session import DecodeSession, DeviceProgram
from lbllm_compile.codegen.errors import KernelError, OutOfMemoryError
from lbllm_compile.codegen.sizes import PAST, STATE, WEIGHTS
from lbllm_compile.codegen.targets import Target, cuda

from lbllm_compile.lowering.compare import check_replay
from lbllm_compile.native.language import InputBounds

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")

VOCABULARY, TOGETHER = 8, 8
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 40).tolist()

KERNELS = {
    "step_kernel": """
extern "C" __global__ void __launch_bounds__(1) step_kernel(int64_t* ids, int64_t* mask, int* past, int64_t* position,
    signed char* codes, ushort* params, float* weights, float* logits, int capacity) {
  const int slot = past[0];
  codes[slot] = (signed char)ids[0];
  params[slot] = (ushort)(3 * ids[0] + position[0]);
  int64_t sum = 0;
  for (int i = 0; i <= slot; i++) sum += mask[i] * (codes[i] * (i + 1) + params[i]);
  int best = 0;
  for (int v = 0; v < 8; v++) {
    logits[v] = (float)((sum * (v + 3) + v) % 11) * weights[0];
    if (logits[v] > logits[best]) best = v;
  }
  ids[0] = best;
  past[0] = slot + 1;
  position[0] += 1;
  if (slot + 1 < capacity) mask[slot + 1] = 1;
}
""",
    "part_kernel": """
extern "C" __global__ void __launch_bounds__(1) part_kernel(int64_t* part, int64_t* ids, signed char* codes,
    ushort* params) {
  const int past = ((int*)(part + 16))[0], count = ((int*)(part + 16))[1];
  for (int i = 0; i < count; i++) {
    codes[past + i] = (signed char)part[8 - count + i];
    params[past + i] = (ushort)(3 * part[8 - count + i] + part[16 - count + i]);
  }
  ids[0] = part[7];
}
""",
    "faulty_kernel": """
extern "C" __global__ void __launch_bounds__(2) faulty_kernel() {
  if (threadIdx.x == 0) __syncthreads();
}
""",
}

STATE_TENSORS = [StateTensor(0, 1, 1), StateTensor(1, 1, 2)]


def expected(tokens: list[int], weight: float = 1.0) -> np.ndarray:
    """Logits behind tokens."""
    total = sum(token * (i + 1) + 3 * token + i for i, token in enumerate(tokens))
    return np.array([(total * (v + 3) + v) % 11 for v in range(VOCABULARY)], np.float32) * np.float32(weight)


def launch_list() -> LaunchList:
    codes, params = Place(STATE, Size(0, 0)), Place(STATE, Size(0, 1))
    ids, mask, past, position = (Place(name, Size(0)) for name in ("input_ids", "attention_mask", PAST, "position_ids"))

    def launch(symbol: str, *arguments: Argument) -> Launch:
        return Launch(symbol, Size(1), 1, arguments)

    weights, logits = Place(WEIGHTS, Size(0)), Result(0)
    step = launch("step_kernel", ids, mask, past, position, codes, params, weights, logits, Number(Size(0, 1), 4))
    part = launch("part_kernel", Place(PART.name, Size(0)), ids, codes, params)
    kernels = {symbol: ProgramKernel(symbol, source, (1, 1, 1)) for symbol, source in KERNELS.items()}
    results = (Size(4 * VOCABULARY),)
    common = results, INPUTS, 0, VOCABULARY, 4, 3, 0
    of_part = results, {PART.name: Size(16 * TOGETHER + 8)}, *common[2:]
    return LaunchList(
        (kernels["step_kernel"], kernels["faulty_kernel"]),
        (step,),
        *common,
        part=LaunchList((kernels["part_kernel"],), (part, step), *of_part, tokens=TOGETHER),
    )


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return standin.cubin(launch_list().source(), tmp_path_factory.mktemp("module"))


Make = Callable[..., DeviceProgram]


@pytest.fixture
def made(cubin: bytes) -> Iterator[Make]:
    """Makes programs, which end with the test."""
    with ExitStack() as drivers:

        def make(device: int = 0, weight: float = 1.0) -> DeviceProgram:
            driver = drivers.enter_context(Driver(device, standin.driver()))
            return DeviceProgram(
                driver, launch_list(), cubin, [np.array([weight], np.float32).data.cast("B")], STATE_TENSORS
            )

        yield make


def held(*drivers: Driver) -> list[int]:
    """What is taken of the stand-in: graphs, streams, contexts, and the free memory of devices."""
    gc.collect()
    library = ctypes.CDLL(standin.driver())
    counts = library.standin_graphs(), library.standin_streams(), library.standin_retained()
    return [*counts, *(driver.memory()[0] for driver in drivers)]


def refuse_instantiation(number: int) -> None:
    ctypes.CDLL(standin.driver()).standin_refuse_instantiation(number)


def check(session: DecodeSession, tokens: list[int], weight: float = 1.0) -> None:
    assert session.past == len(tokens)
    np.testing.assert_array_equal(session.logits(), expected(tokens, weight))


def fault(driver: Driver, program: DeviceProgram) -> None:
    """A kernel that faults, as the wait for it tells."""
    driver.launch(program.functions["faulty_kernel"][0], (1, 1, 1), (2, 1, 1), [])
    driver.synchronize()


def stored(cubin: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], DeviceProgram]:
    """Stores the made-up program; what loads it on the stand-in, as a load of an artifact does."""
    monkeypatch.setattr(cuda, "LIBRARY", standin.driver())
    Image(launch_list(), cubin, "sm_90", "13.0").write(folder / "image")
    (folder / "weights").write_bytes(np.float32(1).tobytes())
    return lambda: on_device(folder / "image", folder / "weights", [], Target.parse("cuda"))


def test_steps_and_parts_of_a_growing_sequence(made: Make) -> None:
    session = made(weight=0.5).sequence(16)
    session.feed(TOKENS[:10])
    check(session, TOKENS[:10], 0.5)
    before = session.choice()
    session.grow(32)
    assert session.choice() == before and session.capacity == 32
    session.step()
    check(session, [*TOKENS[:10], before[0]], 0.5)
    session.rewind(10)
    session.feed(TOKENS[10:30])
    check(session, TOKENS[:30], 0.5)


def test_a_capacity_is_a_multiple_at_which_elements_are_aligned(made: Make) -> None:
    """Here elements of two bytes lie behind ``capacity`` bytes."""
    session = made().sequence(17)
    assert session.capacity == 32
    session.feed(TOKENS[:20])
    session.grow(33)
    assert session.capacity == 48
    check(session, TOKENS[:20])


# Devices


def test_two_devices_in_one_thread(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each is asked for is done in its context, whichever was current before."""
    monkeypatch.setenv("LBLLM_STANDIN_DEVICES", "2")
    programs = [made(device, weight) for device, weight in ((0, 1.0), (1, 2.0))]
    drivers = [program.driver for program in programs]
    before = held(*drivers)
    sessions = [program.sequence(16) for program in programs]
    for token in TOKENS[:16]:
        for session in sessions:
            session.step(token)
    for session in sessions:
        session.grow(32)
    for weight, session in zip((1.0, 2.0), sessions, strict=True):
        check(session, TOKENS[:16], weight)
        session.feed(TOKENS[16:30])
    for weight, session in zip((1.0, 2.0), sessions, strict=True):
        check(session, TOKENS[:30], weight)
    taken = np.subtract(before, held(*drivers))[-2:]
    assert taken[0] == taken[1] > 0
    del session, sessions
    assert held(*drivers) == before


def test_another_context_may_become_current(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.cuda.set_device`` makes one."""
    monkeypatch.setenv("LBLLM_STANDIN_DEVICES", "2")
    library, other = ctypes.CDLL(standin.driver()), ctypes.c_void_p()
    program = made()
    library.cuDevicePrimaryCtxRetain(ctypes.byref(other), 1)
    try:
        library.cuCtxSetCurrent(other)
        session = program.sequence(16)
        library.cuCtxSetCurrent(other)
        graph = program.driver.captured(session._stream, lambda: library.cuCtxSetCurrent(other))
        program.driver.replay(graph, session._stream)
        session.step(3)
        check(session, [3])
    finally:
        library.cuDevicePrimaryCtxRelease_v2(1)


# Faults and refusals


def test_what_a_fault_says_is_not_replaced_and_the_context_is_released(cubin: bytes) -> None:
    """Every give-back reports the fault again; the next program runs."""
    before = held()
    for ends in ("by itself", "with a sequence left"):
        with pytest.raises(KernelError, match="cuCtxSynchronize: unspecified launch failure"), ExitStack() as stack:
            driver = stack.enter_context(Driver(library=standin.driver()))
            program = DeviceProgram(
                driver, launch_list(), cubin, [np.array([1], np.float32).data.cast("B")], STATE_TENSORS
            )
            sessions = [program.sequence(16) for _ in range(2)]
            if ends == "with a sequence left":
                fault(driver, program)
            del sessions[0]
            fault(driver, program)
        del program, sessions
        assert held() == before


def test_behind_a_fault_no_other_driver_is_advised(
    made: Make, cubin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = stored(cubin, tmp_path, monkeypatch)
    before, program = held(), made()
    with pytest.raises(KernelError, match="unspecified launch failure"):
        fault(program.driver, program)
    with pytest.raises(KernelError, match=r"refuses cuModuleLoadData: unspecified launch failure$"):
        load()
    assert held()[2] == before[2] + 1


@pytest.mark.parametrize("number", [1, 2], ids=["step", "part"])
def test_a_graph_that_has_no_room_changes_nothing(made: Make, number: int) -> None:
    program = made()
    session, before = program.sequence(16), held(program.driver)
    for _ in range(2):
        refuse_instantiation(number)
        with pytest.raises(OutOfMemoryError, match=r"room for 32 tokens takes 0 MiB .* are free; stop what else uses"):
            program.sequence(32)
        assert held(program.driver) == before
    session.feed(TOKENS[:12])
    before, chosen = held(program.driver), session.choice()
    refuse_instantiation(number)
    with pytest.raises(OutOfMemoryError, match=r"room for 32 tokens takes 0 MiB"):
        session.grow(32)
    assert held(program.driver) == before and session.capacity == 16 and session.choice() == chosen
    check(session, TOKENS[:12])
    session.feed(TOKENS[12:16])
    check(session, TOKENS[:16])
    session.grow(32)
    session.feed(TOKENS[16:30])
    check(session, TOKENS[:30])


def test_memory_that_is_refused_leaves_no_stream(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    program = made()
    before = held(program.driver)
    whole = program.driver.memory()[1]
    monkeypatch.setenv("LBLLM_STANDIN_MEMORY", str(whole - before[-1] + 100))
    with pytest.raises(OutOfMemoryError, match="a sequence with room for 32 tokens takes"):
        program.sequence(32)
    monkeypatch.delenv("LBLLM_STANDIN_MEMORY")
    assert held(program.driver) == before


def test_what_was_captured_in_vain_is_given_back(made: Make) -> None:
    driver = made().driver
    stream, before = driver.new_stream(), held()

    def fails() -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        driver.captured(stream, fails)
    refuse_instantiation(1)
    with pytest.raises(OutOfMemoryError):
        driver.captured(stream, lambda: None)
    assert held() == before
    driver.forget([driver.captured(stream, lambda: None)])
    assert held() == before


# Threads and the garbage collector


def test_a_sequence_begins_while_another_one_is_captured(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the capture, as does who waits for the device; a sequence that there is goes on meanwhile."""
    program = made()
    going_on = program.sequence(16)
    captured, launch, main = threading.Event(), Driver.launch, threading.current_thread()

    def slow(self: Driver, *arguments) -> None:
        launch(self, *arguments)
        if threading.current_thread() is not main:
            captured.set()
            threading.Event().wait(0.3)

    monkeypatch.setattr(Driver, "launch", slow)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(program.sequence, 16)
        assert captured.wait(60)
        going_on.step(5)
        check(going_on, [5])
        program.driver.synchronize()
        mine = program.sequence(16)
        going_on.grow(32)
        for session in (other.result(), mine):
            session.feed(TOKENS[:9])
            check(session, TOKENS[:9])
    check(going_on, [5])


def test_threads_decode_at_the_same_time(made: Make) -> None:
    """Sequences begin, grow and end in each of them."""
    program, threads = made(), 4
    before, begin = held(program.driver), threading.Barrier(threads)

    def decode(seed: int) -> None:
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 40).tolist()
        begin.wait()
        for _ in range(20):
            session = program.sequence(16)
            session.feed(tokens[:13])
            session.grow(48)
            for token in tokens[13:16]:
                session.step(token)
            session.feed(tokens[16:])
            check(session, tokens)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(decode, seed) for seed in range(threads)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert held(program.driver) == before


def test_a_program_that_the_collector_ends_during_a_capture(
    made: Make, cubin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its sequence; what is captured stays valid, and the memory is given back behind it."""
    load = stored(cubin, tmp_path, monkeypatch)
    driver = made().driver
    stream, before = driver.new_stream(), held(driver)
    old = load()
    old.cycle = [old, old.sequence(16)]  # type: ignore[attr-defined]
    between = held(driver)
    assert between[2] == before[2] + 1 and between[-1] < before[-1]

    def collects() -> None:
        nonlocal old
        del old
        gc.collect()

    graph = driver.captured(stream, collects)
    driver.replay(graph, stream)
    driver.forget([graph])
    assert held(driver) == before


def test_a_program_is_given_back_as_it_ends(
    made: Make, cubin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is captured nobody has to ask for memory first."""
    load = stored(cubin, tmp_path, monkeypatch)
    driver = made().driver
    before = held(driver)
    program = load()
    session = program.sequence(16)
    assert held(driver) != before
    del session, program
    assert held(driver) == before


# The proof of replays


def test_logits_that_are_no_numbers_are_no_fault_of_replaying(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    program = made(weight=np.nan)

    def native() -> SimpleNamespace:
        bounds = InputBounds(VOCABULARY, None)
        session = lambda batch: SimpleNamespace(sequences=[program.sequence(256) for _ in range(batch)])  # noqa: E731
        return SimpleNamespace(description=SimpleNamespace(bounds=bounds, target="cuda:sm_90"), session=session)

    check_replay(native())  # type: ignore[arg-type]
    monkeypatch.setattr(DecodeSession, "step_by_launch", lambda self, token, draw=None: self.step(1, draw))
    with pytest.raises(KernelError, match="gives other logits"):
        check_replay(native())  # type: ignore[arg-type]
