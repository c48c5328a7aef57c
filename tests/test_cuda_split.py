"""Attention of one token whose keys are shared out over thread blocks, and the launch that merges what these leave."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.backend import StateTensor
from lbllm_compile.codegen.cuda.compiler import CudaCompiler
from lbllm_compile.codegen.cuda.emulator import ASCENDING, DESCENDING, Emulator
from lbllm_compile.codegen.cuda.emulator import Launch as EmulatedLaunch
from lbllm_compile.codegen.cuda.limits import MULTIPROCESSORS
from lbllm_compile.codegen.cuda.program import attention, heads
from lbllm_compile.codegen.cuda.program.heads import THREADS, Split, split_of
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.launches import PART, TOKEN, LaunchList
from lbllm_compile.codegen.cuda.program.prologue import MOST_BLOCKS
from lbllm_compile.codegen.cuda.program.session import DecodeSession, DeviceProgram
from lbllm_compile.codegen.cuda.text import PREAMBLE
from lbllm_compile.codegen.sizes import KV_BITS
from lbllm_compile.codegen.spec import AttentionSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import cuda_source
from reference_kernels import ReferenceKernels
from test_cuda_program import BOUND, lowered, needs_gpp, needs_nvcc, on_standin, some_state
from test_zoo import stages
from zoo import LAYERS, VOCABULARY

from lbllm_compile.lowering.executor import Executor
from lbllm_compile.lowering.session import Session
from lbllm_compile.lowering.translate import Translated

NAMES = ["key_codes", "key_params", "value_codes", "value_params"]

GROUPED = AttentionSpec(4, 2, 18, 18, 4, 0, 0.25)
WINDOWED = AttentionSpec(2, 2, 16, 16, 4, 200, 0.25, softcap=5.0)
SINKING = AttentionSpec(2, 1, 20, 130, 8, 0, 0.25, sinks=True)
HALVES = AttentionSpec(2, 1, 5, 6, 16, 0, 0.25)

# Which thread blocks there are


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
@pytest.mark.parametrize("count", [1, 3, 8, 32, 300])
def test_shares_are_what_the_device_has_room_for(arch: str, count: int) -> None:
    """As many as there can be, but for what is merged one after the other."""
    shares = split_of(AttentionSpec(count, count, 64, 64, 4, 0, 1.0), arch).shares
    most = min(2 * MULTIPROCESSORS[arch], MOST_BLOCKS)
    assert shares >= 1 and (shares == 1 or count * shares <= most)
    assert shares == heads.MOST_SHARES or count * (shares + 1) > most


@pytest.mark.parametrize(("window", "shares"), [(0, 32), (256, 1), (257, 2), (4096, 16), (1 << 20, 32)])
def test_a_window_has_shares_as_far_as_it_has_tiles(window: int, shares: int) -> None:
    assert split_of(AttentionSpec(32, 8, 64, 64, 4, window, 1.0), "sm_90") == Split(shares)


# By itself, where every race is seen


def cut(spec: AttentionSpec, split: Split, past: int) -> int:
    """How many shares there are, as the documentation of :class:`Split` has it."""
    keys = min(past + 1, spec.window or past + 1)
    tiles = -(-keys // THREADS)
    return -(-tiles // max(split.tiles, -(-tiles // split.shares)))


class Fault:
    """None."""

    def in_shares(self, source: str) -> str:
        return source

    def in_merge(self, source: str) -> str:
        return source


class Case:
    """A state, a token, and what the reference makes of them.

    Args:
        hidden: so many tokens are padding, on the left.
    """

    def __init__(self, spec: AttentionSpec, past: int, hidden: int = 0):
        generator = torch.Generator().manual_seed(past)
        self.spec, self.past, capacity = spec, past, past + 3
        query = torch.randn(1, spec.heads, 1, spec.key_width, generator=generator)
        state, new = some_state(spec, past, capacity, 1, generator)
        mask = torch.zeros(1, capacity, dtype=torch.int64)
        mask[:, hidden : past + 1] = 1
        sinks = torch.randn(spec.heads, generator=generator) if spec.sinks else None
        self.wanted = [part.clone() for part in state]
        self.out = reference.cached_attention(
            query,
            *new,
            *self.wanted,
            mask[:, : past + 1],
            past,
            spec.scale,
            spec.window,
            spec.bits,
            spec.softcap,
            sinks,
        )
        bits = [part.view(torch.int16) if part.is_floating_point() else part for part in state]
        if spec.bits == 16:  # there are no parameters, and nothing is read of what stands for them
            bits[1], bits[3] = bits[0].clone(), bits[2].clone()
        self.state = dict(zip(NAMES, bits, strict=True))
        self.past_tensor = torch.tensor([past], dtype=torch.int32)
        self.inputs = {
            "query": query,
            "key": new[0],
            "value": new[1],
            "key_mask": mask,
            "past": self.past_tensor,
            "capacity": capacity,
            **({} if sinks is None else {"sinks": sinks}),
        }

    def launched(self, source: str, blocks: int, outputs: dict, folder: Path, order: int, inputs: dict) -> dict:
        block = THREADS, 1, 1
        emulator = Emulator(source, folder)
        return emulator.run(EmulatedLaunch((blocks, 1, 1), block, inputs, outputs, order=order))

    def whole(self, folder: Path) -> torch.Tensor:
        """The output of a block a head."""
        source = cuda_source(attention.attention(self.spec), "attention", "sm_90")
        outputs = {"out": torch.full(self.out.shape, torch.nan), **self.state}
        return self.launched(source, self.spec.kv_heads, outputs, folder, ASCENDING, self.inputs)["out"]

    def shared_out(
        self, split: Split, folder: Path, order: int = ASCENDING, fault: Fault | None = None
    ) -> torch.Tensor:
        """The output of shares; checks what is stored, and that nothing is written of shares that there are not."""
        spec, fault = self.spec, fault or Fault()
        shares = {"shares": torch.full(split.left(spec), torch.nan)}
        source = fault.in_shares(cuda_source(attention.split_attention(spec, split), "split", "sm_90"))
        blocks = spec.kv_heads * split.shares
        found = self.launched(source, blocks, {**shares, **self.state}, folder, order, self.inputs)
        for name, part in zip(NAMES, self.wanted, strict=True):
            if part.shape[-1]:
                ours, theirs = (t[:, :, : self.past + 1] for t in (found[name], part))
                assert torch.equal(ours, theirs.view(torch.int16) if theirs.is_floating_point() else theirs)
        count = cut(spec, split, self.past)
        assert found["shares"][:, :count].isfinite().all() and found["shares"][:, count:].isnan().all()
        source = fault.in_merge(cuda_source(attention.merge(spec, split), "merge", "sm_90"))
        given, out = (
            {"past": self.past_tensor, "shares": found["shares"]},
            {"out": torch.full_like(self.out, torch.nan)},
        )
        return self.launched(source, spec.heads, out, folder, order, given)["out"]

    def check(self, out: torch.Tensor) -> None:
        torch.testing.assert_close(out, self.out, rtol=1e-5, atol=1e-6)


@needs_gpp
@pytest.mark.parametrize(
    ("spec", "past", "hidden", "count"),
    [
        (GROUPED, 0, 0, 1),
        (GROUPED, 127, 0, 1),
        (GROUPED, 128, 5, 2),  # a share of one key
        (GROUPED, 383, 0, 3),
        (GROUPED, 384, 140, 2),  # one tile more than shares; the padding is all of the first tile
        (WINDOWED, 150, 0, 2),
        (WINDOWED, 333, 0, 2),  # from slot 134 on
        (SINKING, 255, 0, 2),
        (SINKING, 256, 130, 3),  # the first share sees its sink alone
        (HALVES, 300, 0, 3),
        (HALVES, 256, 256, 3),  # two shares see nothing
    ],
    ids=lambda value: getattr(value, "bits", value),
)
@pytest.mark.parametrize("order", [ASCENDING, pytest.param(DESCENDING, marks=pytest.mark.slow)])
def test_shares_merge_to_the_references_attention(
    spec: AttentionSpec, past: int, hidden: int, count: int, order: int, tmp_path: Path
) -> None:
    """Codes and parameters to the bit, whatever thread block stores them."""
    split = Split(3, tiles=1)
    assert cut(spec, split, past) == count
    case = Case(spec, past, hidden)
    case.check(case.shared_out(split, tmp_path, order))


@needs_gpp
@pytest.mark.parametrize(("spec", "past"), [(GROUPED, 127), (WINDOWED, 90), (SINKING, 100), (HALVES, 0)])
def test_one_share_is_attention_without_shares(spec: AttentionSpec, past: int, tmp_path: Path) -> None:
    """To the bit: so it does not matter for which capacity a step was captured."""
    case, split = Case(spec, past, hidden=past // 3), Split(4, tiles=1)
    assert past + 1 <= split.undivided
    assert torch.equal(case.shared_out(split, tmp_path), case.whole(tmp_path))


class OneKeyTooMany(Fault):
    """Each share but the last one reads the first key of the next."""

    def in_shares(self, source: str) -> str:
        spoiled, count = re.subn(r"min\(\((\w+) \+ into_ptr\[1\]\)", r"min(((\1 + into_ptr[1]) + 1)", source)
        assert count == 1, source
        return spoiled


class OneShareTooFew(Fault):
    """The merge leaves the last share out."""

    def in_merge(self, source: str) -> str:
        spoiled, count = re.subn(r"< into_ptr\[2\]; \+\+", "< into_ptr[2] - 1; ++", source)
        assert count == 1, source
        return spoiled


class StaleBest(Fault):
    """What earlier shares weigh is not scaled to the new best score."""

    def in_merge(self, source: str) -> str:
        spoiled, count = re.subn(r"__fmul_rn\((sums_ptr\[0\]), own_ptr\[3\]\)", r"\1", source)
        assert count, source
        return spoiled


@needs_gpp
@pytest.mark.parametrize("fault", [OneKeyTooMany, OneShareTooFew, StaleBest])
def test_planted_faults_are_caught(fault: type[Fault], tmp_path: Path) -> None:
    case = Case(GROUPED, 300)
    case.check(case.shared_out(Split(3, tiles=1), tmp_path))
    with pytest.raises(AssertionError, match="not close"):
        case.check(case.shared_out(Split(3, tiles=1), tmp_path, fault=fault()))


@pytest.mark.parametrize("kernel", ["split", "split_3", "merge"])
def test_an_attention_whose_kernels_for_shares_spill_has_none(kernel: str) -> None:
    kernels = ProgramKernels(Target.parse("cuda:sm_80"))
    for spec in (GROUPED, HALVES):
        kernels.attention(spec, 1, False).make()
    (most, shared), before = kernels.called["attention_0"].beyond or (0, None), kernels.called["attention_1"].beyond
    assert most == 2 * THREADS and shared is not None and before is not None
    assert kernels.give_up([f"attention_0_{kernel}_kernel"])
    assert kernels.called["attention_0"].beyond is None
    assert kernels.called["attention_1"].beyond is not None
    assert not kernels.give_up(["attention_0_kernel"])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_kernels_for_shares_compile_without_spills(arch: str) -> None:
    """For heads of models as they are, and every number of bits. The compiler refuses spills."""
    sources = [PREAMBLE]
    models = [
        AttentionSpec(9, 3, 64, 64, 4, 0, 0.125),  # SmolLM2-135M
        AttentionSpec(32, 32, 128, 128, 4, 0, 0.125),  # LLaMA-2-7B
        AttentionSpec(32, 8, 128, 128, 4, 0, 0.125),  # LLaMA-3-8B
        AttentionSpec(16, 2, 128, 128, 4, 0, 0.125),  # Qwen2.5-3B
        AttentionSpec(8, 4, 256, 256, 4, 4096, 0.0625, softcap=50.0),  # Gemma2-2B
        AttentionSpec(64, 8, 64, 64, 4, 0, 0.125, sinks=True),  # gpt-oss-20b
    ]
    for number, model in enumerate(models):
        for bits in KV_BITS:
            spec = replace(model, bits=bits)
            split = split_of(spec, arch)
            assert split.shares > 1
            for function in (attention.split_attention, attention.merge):
                sources.append(cuda_source(function(spec, split), f"{function.__name__}_{number}_{bits}", arch))
    binary = CudaCompiler.find().compile("\n".join(sources), arch)
    assert len(binary.kernels) == 2 * 3 * len(models)


# In a program

CAPACITY, ELEMENT = 160, {"uint8": 1, "float16": 2}
IDS = np.random.default_rng(1).integers(3, VOCABULARY, 135).tolist()


@contextmanager
def small_shares() -> Iterator[None]:
    """Shares of a tile, at most three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "split_of", lambda spec, arch: Split(3, tiles=1))
        yield


@functools.cache
def shared_out() -> tuple[LaunchList, Translated]:
    with small_shares():
        return lowered.__wrapped__("llama", TOKEN, PART)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceProgram]:
    with on_standin(*shared_out(), tmp_path_factory.mktemp("module")) as found:
        yield found


def test_the_capacity_decides_what_is_launched() -> None:
    """A list has both forms, and what the other one leaves takes no room in the arena."""
    found, kind = shared_out()[0], re.compile(r"embedding|(bit|int8)_gemv|attention_0_(split|merge)?|next_token")

    def kinds(capacity: int) -> list[str]:
        matches = [kind.match(launch.symbol) for launch in found.started(capacity)]
        return [match[0] for match in matches if match]

    def expected(*attending: str) -> list[str]:
        layer = ["bit_gemv", *(f"attention_0_{name}" for name in attending), *["bit_gemv"] * 3]
        return ["embedding", *layer * LAYERS, "int8_gemv", "next_token"]

    assert kinds(THREADS) == expected("")
    assert kinds(THREADS + 16) == expected("split", "merge")
    grids = {launch.symbol: launch.grid(1 << 15)[0] for launch in found.started(1 << 15)}
    assert {grid for symbol, grid in grids.items() if "split" in symbol} == {2 * 3}
    assert found.arena(THREADS).offsets.keys() < found.arena(THREADS + 16).offsets.keys()


def state_tensors() -> list[StateTensor]:
    """Those of the KV state, each ``[batch, heads, capacity, ...]``."""
    state = shared_out()[1].state
    return [
        StateTensor(state.offsets[name], int(tensor.shape[1]), int(np.prod(tensor.shape[3:])) * ELEMENT[tensor.dtype])
        for name, tensor in state.tensors.items()
    ]


def steps(session: DecodeSession, tokens: list[int]) -> np.ndarray:
    found = []
    for token in tokens:
        session.step(token)
        found.append(session.logits())
    return np.stack(found)


@needs_gpp
def test_the_capacity_does_not_decide_what_is_computed(program: DeviceProgram) -> None:
    """As long as the shorter one has room; to the bit, state included."""
    short, long = program.sequence(THREADS), program.sequence(THREADS + 16)
    assert np.array_equal(steps(short, IDS[:5]), steps(long, IDS[:5]))
    for session in (short, long):
        session.feed(IDS[5:THREADS])
    assert np.array_equal(short.logits(), long.logits())


@needs_gpp
def test_a_conversation_that_grows_goes_on_in_shares(program: DeviceProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it would give had there been room from the beginning, to the bit."""
    monkeypatch.setattr(program, "state", state_tensors())
    grown, roomy = program.sequence(THREADS), program.sequence(CAPACITY)
    for session in (grown, roomy):
        session.feed(IDS[:THREADS])
    grown.grow(CAPACITY)
    assert np.array_equal(steps(grown, IDS[THREADS : THREADS + 2]), steps(roomy, IDS[THREADS : THREADS + 2]))
    assert grown.state() == roomy.state()


@needs_gpp
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_replay_is_the_launches_one_by_one(
    program: DeviceProgram, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, state included, over the first key of a second share, and whatever order threads run in."""
    replayed, launched = program.sequence(CAPACITY), program.sequence(CAPACITY)
    replayed.feed(IDS[: THREADS - 2])
    ours = steps(replayed, IDS[THREADS - 2 : THREADS + 2])
    monkeypatch.setenv("LBLLM_STANDIN_ORDER", order)
    launched.feed_by_launch(IDS[: THREADS - 2])
    for token, logits in zip(IDS[THREADS - 2 :], ours, strict=False):
        launched.step_by_launch(token)
        assert np.array_equal(launched.logits(), logits)
    assert replayed.choice() == launched.choice() and replayed.state() == launched.state()


@needs_gpp
def test_logits_behind_shares_are_the_executors(program: DeviceProgram) -> None:
    source = stages("llama")[1]
    session = Session(source, Executor(source, ReferenceKernels()), 1, 0)
    session.start(np.ones((1, len(IDS)), np.int64))
    expected = session.logits(torch.tensor([IDS]))[0, THREADS - 3 :].numpy()
    found = program.sequence(CAPACITY)
    found.feed(IDS[: THREADS - 3])
    ours = steps(found, IDS[THREADS - 3 :])
    distances = np.linalg.norm(ours - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert distances.max() < BOUND
