"""The kernel that chooses the next token: the token that the rule for CPUs gives, whatever is asked for."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import sampling
from lbllm_compile.codegen.cuda.compiler import CudaCompiler
from lbllm_compile.codegen.cuda.driver import Driver
from lbllm_compile.codegen.cuda.emulator import ASCENDING, DESCENDING, Emulator
from lbllm_compile.codegen.cuda.emulator import Launch as EmulatedLaunch
from lbllm_compile.codegen.cuda.program.choice import PARAMETERS, next_token, threads
from lbllm_compile.codegen.cuda.program.launches import Launch, LaunchList, Number, Place, ProgramKernel, Result, Size
from lbllm_compile.codegen.cuda.program.lower import INPUTS
from lbllm_compile.codegen.cuda.program.session import ARENA, DecodeSession, DeviceProgram
from lbllm_compile.codegen.cuda.text import PREAMBLE
from lbllm_compile.codegen.sampling import Draw, drawn
from lbllm_compile.codegen.targets.cuda import ARCHITECTURES
from lbllm_compile.codegen.tvm_api import cuda_source

from lbllm_compile.native.generate import GenerationError, Sampling, check_finite, choose

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the search path")

CAPACITY = 4
SIZES = [1, 33, 101, 1024, 2053]
"""Vocabularies."""

BOTH = [pytest.param(size, marks=() if size in (101, 2053) else pytest.mark.slow) for size in SIZES]
"""A block that is not full and one whose threads take turns; others are slow, each being a program to build."""

SETTINGS = [
    (1.0, 0, 1.0),
    (0.8, 20, 0.9),
    (0.8, 0, 0.95),
    (1.3, 7, 1.0),
    (1.0, 1, 1.0),
    (1.0, 10**6, 0.5),
    (1.0, 0, 5e-324),
    (1.0, 0, 1 - 2.0**-53),
    (5e-324, 0, 0.9),
    (1e-9, 5, 1.0),
    (1.7e308, 0, 1.0),
    (1.7e308, 3, 0.5),
    (50.0, 0, 0.7),
]
"""Temperature, top-k, top-p."""

PLACES = [0.0, 0.1, 0.5, 0.987, 1 - 2.0**-53]


@functools.cache
def emulator(vocabulary: int) -> Emulator:
    return Emulator(PREAMBLE + cuda_source(next_token(vocabulary), "next_token", "sm_90"))


def emulated(logits: np.ndarray, draw: Draw | None, order: int = ASCENDING) -> int:
    """The token that one launch chooses, every memory access of which is watched."""
    values = [0.0] * 4 if draw is None else [draw.scale, draw.top_k, draw.top_p, draw.place]
    inputs = {
        "logits": torch.from_numpy(logits)[None, None],
        "sampling": torch.tensor(values, dtype=torch.float64),
        "capacity": CAPACITY,
    }
    outputs = {
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "input_ids": torch.tensor([[7]]),
        "past": torch.tensor([1], dtype=torch.int32),
        "position_ids": torch.tensor([[1]]),
        "shares": torch.full((len(logits),), -1),
    }
    launch = EmulatedLaunch((1, 1, 1), (threads(len(logits)), 1, 1), inputs, outputs, order=order)
    found = emulator(len(logits)).run(launch)
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert (found["past"].tolist(), found["position_ids"].tolist()) == ([2], [[2]])
    return int(found["input_ids"][0, 0])


def some_logits(vocabulary: int, seed: int, spread: float = 3.0) -> np.ndarray:
    """With equal ones among them, and some that are out of the question."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, vocabulary).astype(np.float32).round(1)
    logits[generator.integers(0, vocabulary, vocabulary // 10)] = -np.inf
    return logits


@needs_gpp
@pytest.mark.parametrize("vocabulary", BOTH)
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_no_thread_disturbs_another(vocabulary: int, order: int) -> None:
    logits = some_logits(vocabulary, vocabulary)
    assert emulated(logits, None, order) == int(logits.argmax())
    for temperature, top_k, top_p in SETTINGS[:3]:
        draw = Draw(temperature, top_k, top_p, 0.8)
        assert emulated(logits, draw, order) == drawn(logits, draw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("module")


@functools.cache
def step(vocabulary: int, folder: Path) -> DecodeSession:
    """A sequence of which a step is the one launch, as a graph that is replayed, and its logits are written."""
    source = cuda_source(next_token(vocabulary), "next_token", "sm_90")
    results = {"logits": Result(0), "shares": Result(1)}
    arguments = [results.get(name, Place(name, Size(0))) for name in PARAMETERS]
    launch_list = LaunchList(
        (ProgramKernel("next_token_kernel", source, (threads(vocabulary), 1, 1)),),
        (Launch("next_token_kernel", Size(1), 1, (*arguments, Number(Size(0, 1), 4))),),
        (Size(4 * vocabulary), Size(8 * vocabulary)),
        INPUTS,
        0,
        vocabulary,
        0,
        0,
        0,
    )
    folder = folder / str(vocabulary)
    folder.mkdir()
    driver = Driver(library=standin.driver())
    return DeviceProgram(driver, launch_list, standin.cubin(launch_list.source(), folder), []).sequence(CAPACITY)


def replayed(logits: np.ndarray, draw: Draw | None, folder: Path) -> tuple[int, float]:
    """What a replay chooses, and its logit."""
    found = step(len(logits), folder)
    found.rewind(0)
    found._write(ARENA, logits)
    found.step(7, draw)
    return found.choice()


@needs_gpp
@pytest.mark.parametrize("vocabulary", BOTH)
@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_a_device_draws_what_the_host_does(vocabulary: int, asked: tuple[float, int, float], folder: Path) -> None:
    spreads = (0.0, 0.3, 3.0, 30.0) if vocabulary < 1000 else (3.0,)
    for seed, spread in enumerate(spreads):
        logits = some_logits(vocabulary, seed, spread)
        logits[vocabulary // 2] = 0.5
        for place in PLACES if vocabulary < 1000 else PLACES[3:4]:
            draw = Draw(*asked, place)
            token = drawn(logits, draw)
            assert replayed(logits, draw, folder) == (token, logits[token])


@needs_gpp
@given(
    st.integers(0, 2**31),
    st.floats(1e-3, 1e3),
    st.sampled_from([0, 1, 2, 50]),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from([1e-30, 0.1, 3.0, 1e30]),
)
@settings(deadline=None, max_examples=60)
def test_a_seed_gives_the_hosts_tokens(
    folder: Path, seed: int, temperature: float, top_k: int, top_p: float, spread: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, 101).astype(np.float32)
    asked = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    device, host = np.random.default_rng(seed), np.random.default_rng(seed)
    for _ in range(4):
        (draw,) = asked.draws(device, 1)
        assert replayed(logits, draw, folder)[0] == choose(logits[None], asked, host)[0]


@needs_gpp
@pytest.mark.parametrize("draw", [None, Draw(1.0, 3, 0.9, 0.99)], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "broken", [[np.nan], [-np.nan], [np.inf], [np.inf, np.nan], [-np.nan, np.inf]], ids=lambda v: ",".join(map(str, v))
)
@pytest.mark.parametrize("at", [0, 77, 1030])
def test_logits_that_are_not_finite_are_told(broken: Sequence[float], at: int, draw: Draw | None, folder: Path) -> None:
    """Wherever they are, as on the host."""
    logits = some_logits(SIZES[-1], 0)
    logits[at : at + len(broken)] = broken
    _, logit = replayed(logits, draw, folder)
    with pytest.raises(GenerationError, match="infinite or no numbers"):
        check_finite(np.array([logit]))
    nothing = np.full(101, -np.inf, np.float32)
    assert replayed(nothing, draw, folder) == (0, -np.inf)


@needs_gpp
def test_the_first_of_equal_logits_is_the_most_likely_one(folder: Path) -> None:
    """Both zeros are equal."""
    logits = np.full(SIZES[-1], -1.0, np.float32)
    logits[[1500, 40, 2000]] = -0.0, 0.0, 0.0
    assert replayed(logits, None, folder)[0] == 40
    logits[40] = -0.0
    assert replayed(logits, None, folder)[0] == 40
    draw = Draw(1e-9, 0, 1.0, 0.5)
    assert replayed(logits, draw, folder)[0] == drawn(logits, draw) == 1500


# The rule


@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([1e-3, 0.7, 1.0, 40.0, 1e300]))
@settings(deadline=None, max_examples=100)
def test_shares_are_those_of_the_softmax(seed: int, vocabulary: int, temperature: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 5, vocabulary).astype(np.float32)
    found = sampling.shares(logits, Draw(temperature, 0, 1.0, 0.0).scale, sampling.share_bits(vocabulary))
    powers = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    assert np.abs(found / 2.0 ** sampling.share_bits(vocabulary) - powers).max() < 2.0**-46


@pytest.mark.parametrize("vocabulary", [1, 2, 2**10, 2**10 + 1, 2**18, 2**18 + 1, 2**31 - 1])
def test_the_sum_of_all_shares_is_an_integer_of_63_bits(vocabulary: int) -> None:
    assert vocabulary << sampling.share_bits(vocabulary) < 2**63


@given(st.integers(0, 2**31), st.integers(1, 400), st.sampled_from([0, 1, 30]), st.floats(0, 1, exclude_min=True))
@settings(deadline=None, max_examples=200)
def test_what_is_not_sorted_does_not_count(seed: int, vocabulary: int, top_k: int, top_p: float) -> None:
    """The rule by sorting everything."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, vocabulary).astype(np.float32).round(1)
    draw = Draw(1.1, top_k, top_p, float(generator.random()))
    parts = sampling.shares(logits, draw.scale, sampling.share_bits(vocabulary))
    if 0 < top_k < vocabulary:
        parts[logits < np.sort(logits)[-top_k]] = 0
    order = np.argsort(-logits, kind="stable")
    reached = parts[order].cumsum().tolist()
    needed = sampling.reaching(reached[-1], top_p)
    whole = next(sum_ for sum_ in reached if sum_ >= needed)
    place = sampling.placed(whole, draw.place)
    assert drawn(logits, draw) == order[next(i for i, sum_ in enumerate(reached) if sum_ > place)]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_register_spills(arch: str) -> None:
    """The compiler refuses what spills."""
    for vocabulary in (32000, 49152, 151936, 262144):
        source = cuda_source(next_token(vocabulary), "next_token", arch)
        assert CudaCompiler.find().compile(PREAMBLE + source, arch).cubin
