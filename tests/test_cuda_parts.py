"""Prompts in parts of many tokens at once, on a stand-in for the driver: what feeding them token by token gives."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.cuda.emulator import ASCENDING, DESCENDING, Emulator
from lbllm_compile.codegen.cuda.emulator import Launch as EmulatedLaunch
from lbllm_compile.codegen.cuda.program import attention
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.launches import PART, TOKEN, Number
from lbllm_compile.codegen.cuda.program.lower import lower
from lbllm_compile.codegen.cuda.program.session import WORTH_A_PART, DecodeSession, DeviceProgram
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.program.builder import Layout
from lbllm_compile.codegen.sampling import Draw, drawn
from lbllm_compile.codegen.spec import AttentionSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import cuda_source
from test_cuda_program import lowered, on_standin, some_state
from test_zoo import stages
from zoo import VOCABULARY

from lbllm_compile.lowering.translate import translate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")

WHOLE = PART.length or 1
CAPACITY = 3 * WHOLE
IDS = np.random.default_rng(0).integers(3, VOCABULARY, CAPACITY).tolist()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceProgram]:
    with on_standin(*lowered("llama", TOKEN, PART), tmp_path_factory.mktemp("module")) as found:
        yield found


def test_a_program_with_a_state_of_fixed_size_has_no_parts() -> None:
    """Padding would change it. A compile knows how many bytes it has, and not of which tensors."""
    kernels = ProgramKernels(Target.parse("cuda:sm_90"))
    translated = translate(stages("llama")[1], kernels, [TOKEN, PART])
    fixed = Layout({}, {}, 64)
    assert lower(translated.functions(), kernels, translated.layout, translated.state, fixed).part is None


def fed(program: DeviceProgram, tokens: list[int]) -> DecodeSession:
    session = program.sequence(CAPACITY)
    session.feed(tokens)
    return session


@functools.cache
def stepped(program: DeviceProgram, count: int) -> tuple[np.ndarray, int, bytes]:
    """Logits, token and state behind so many tokens, one by one."""
    session = program.sequence(CAPACITY)
    for token in IDS[:count]:
        session.step(token)
    return session.logits(), session.token(), session.state()


DRAWS = [Draw(temperature=2.0, top_k=0, top_p=1.0, place=place) for place in (0.1, 0.5, 0.9)]

LENGTHS = [1, WORTH_A_PART - 1, WORTH_A_PART, WHOLE - 1, WHOLE, WHOLE + 1, 2 * WHOLE + 3]


@pytest.mark.parametrize("count", [*LENGTHS[:5], *(pytest.param(n, marks=pytest.mark.slow) for n in LENGTHS[5:])])
def test_a_prompt_in_parts_is_one_token_by_token(program: DeviceProgram, count: int) -> None:
    """Logits, token and state, to the bit: here the fused loops of both sum in one order."""
    session, (logits, token, state) = fed(program, IDS[:count]), stepped(program, count)
    assert session.past == count and session.token() == token
    assert np.array_equal(session.logits(), logits)
    assert session.state() == state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "phi3", "mixtral"])
def test_parts_of_other_architectures_are_their_tokens_one_by_one(name: str, tmp_path: Path) -> None:
    """But for sums of another order. What is padding goes to experts, too, and changes nothing."""
    with on_standin(*lowered(name, TOKEN, PART), tmp_path) as program:
        session, (logits, _, _) = fed(program, IDS[: WHOLE + 11]), stepped.__wrapped__(program, WHOLE + 11)
        np.testing.assert_allclose(session.logits(), logits, rtol=0, atol=1e-4 * np.abs(logits).max())


@pytest.mark.slow
def test_a_part_of_experts_passes_each_kernel_the_rows_of_its_call() -> None:
    """A quantizer is launched for tokens, for those of all their experts, and for the last one."""
    part = lowered("mixtral", TOKEN, PART)[0].part
    assert part is not None
    quantized = [launch for launch in part.launches if launch.symbol.startswith("quantize")]
    assert {launch.work.fixed for launch in quantized} == {WHOLE, 2 * WHOLE, 1}
    assert all(Number(launch.work, 4) in launch.arguments for launch in quantized)


def test_steps_go_on_behind_a_part_and_parts_behind_steps(program: DeviceProgram) -> None:
    """With what was chosen, and from a place that is no multiple of a part."""
    parts, steps = fed(program, IDS[:11]), program.sequence(CAPACITY)
    for token in IDS[:11]:
        steps.step(token)
    parts.step()
    steps.step()
    parts.feed(IDS[12:24])
    for token in IDS[12:24]:
        steps.step(token)
    assert np.array_equal(parts.logits(), steps.logits()) and parts.state() == steps.state()
    parts.rewind(3)
    parts.feed(IDS[3:12])
    again = fed(program, IDS[:12])
    assert np.array_equal(parts.logits(), again.logits())


@pytest.mark.parametrize("count", [1, WORTH_A_PART - 1, WORTH_A_PART, WHOLE + 1])
def test_a_draw_is_made_behind_the_last_token_of_a_prompt(program: DeviceProgram, count: int) -> None:
    logits = stepped(program, count)[0].ravel()
    tokens = {drawn(logits, draw) for draw in DRAWS}
    assert len(tokens) > 1
    for draw in DRAWS:
        session = program.sequence(CAPACITY)
        session.feed(IDS[:count], draw)
        assert session.token() == drawn(logits, draw)
    session.feed(IDS[:1])
    assert session.choice()[1] == session.logits().max()


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_replayed_part_is_its_launches_one_by_one(
    program: DeviceProgram, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever order threads run in."""
    replayed, launched = program.sequence(CAPACITY), program.sequence(CAPACITY)
    replayed.feed(IDS[:13])
    monkeypatch.setenv("LBLLM_STANDIN_ORDER", order)
    launched.feed_by_launch(IDS[:13])
    assert np.array_equal(replayed.logits(), launched.logits()) and replayed.choice() == launched.choice()
    assert replayed.state() == launched.state()


def test_a_prompt_that_has_no_room_is_refused_whole(program: DeviceProgram) -> None:
    session = program.sequence(16)
    session.feed(IDS[:9])
    with pytest.raises(KernelError, match="room for 16 tokens"):
        session.feed(IDS[:9])
    assert session.past == 9


# Attention by itself, where every race is seen

ATTENTIONS = [
    (AttentionSpec(4, 2, 18, 18, 4, 0, 0.25), 5, 3),
    (AttentionSpec(2, 2, 16, 16, 4, 3, 0.25, softcap=5.0), 150, 5),
    (AttentionSpec(2, 1, 20, 130, 8, 0, 0.25, sinks=True), 0, 4),
    (AttentionSpec(2, 1, 5, 6, 16, 0, 0.25), 9, 1),
]


@pytest.mark.parametrize(("spec", "past", "count"), ATTENTIONS, ids=lambda value: getattr(value, "bits", value))
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING])
def test_attention_of_a_part_is_the_references(
    spec: AttentionSpec, past: int, count: int, order: int, tmp_path: Path
) -> None:
    """Codes and parameters to the bit; slots that nobody wrote hold what is no number, and padding stores nothing."""
    generator = torch.Generator().manual_seed(past)
    tokens, capacity, names = 5, past + count + 2, ["key_codes", "key_params", "value_codes", "value_params"]
    query = torch.randn(1, spec.heads, tokens, spec.key_width, generator=generator)
    state, new = some_state(spec, past, capacity, tokens, generator)
    mask = torch.zeros(1, capacity, dtype=torch.int64)
    mask[:, : past + count] = 1
    sinks = torch.randn(spec.heads, generator=generator) if spec.sinks else None
    wanted, last = [part.clone() for part in state], slice(tokens - count, tokens)
    out = reference.cached_attention(
        query[:, :, last], *(part[:, :, last] for part in new), *wanted, mask[:, : past + count], past,
        spec.scale, spec.window, spec.bits, spec.softcap, sinks,
    )  # fmt: skip
    bits = [part.view(torch.int16) if part.is_floating_point() else part for part in state]
    if spec.bits == 16:  # there are no parameters, and nothing is read of what stands for them
        bits[1], bits[3] = bits[0].clone(), bits[2].clone()
    sizes = {"past": torch.tensor([past, count], dtype=torch.int32), "capacity": capacity}
    block = attention.THREADS, 1, 1

    def run(function, blocks: int, inputs: dict, outputs: dict) -> dict:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        emulator = Emulator(cuda_source(function, "kernel", "sm_90"), folder)
        return emulator.run(EmulatedLaunch((blocks, 1, 1), block, {**inputs, **sizes}, outputs, order=order))

    append = attention.append_part(spec, tokens)
    given = dict(zip(["key", "value"], new, strict=True))
    found = run(append, spec.kv_heads * tokens, given, dict(zip(names, bits, strict=True)))
    for name, before, part in zip(names, bits, wanted, strict=True):
        if part.shape[-1]:
            theirs = part.view(torch.int16) if part.is_floating_point() else part
            assert torch.equal(found[name][:, :, : past + count], theirs[:, :, : past + count])
            assert torch.equal(found[name][:, :, past + count :], before[:, :, past + count :])
    asked = {"query": query, "key_mask": mask, **({} if sinks is None else {"sinks": sinks})}
    attended = run(
        attention.attend_part(spec, tokens),
        spec.heads * tokens,
        {**asked, **dict(zip(names, bits, strict=True)), **found},
        {"out": torch.full((1, spec.heads, tokens, spec.value_width), torch.nan)},
    )["out"]
    torch.testing.assert_close(attended[:, :, last], out, rtol=1e-5, atol=1e-6)
    assert not attended[:, :, : tokens - count].any()
