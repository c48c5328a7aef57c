"""Artifacts loaded with ``--target cuda``, on a stand-in for the driver: prepared, proven, stored, found, run."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import runtime_only
import standin
import tokenizers
import torch
import transformers
from lbllm_compile.codegen.backend import backend_named
from lbllm_compile.codegen.cuda.compiler import Binary, CudaCompiler
from lbllm_compile.codegen.cuda.kernel import kernel_name
from lbllm_compile.codegen.cuda.program.image import Image, on_device
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.session import DecodeSession
from lbllm_compile.codegen.errors import DisprovedError, KernelError, TargetError, UntranslatableError
from lbllm_compile.codegen.progress import NoProgress, Task
from lbllm_compile.codegen.targets import Target, cuda, parse_targets
from test_zoo import stages
from zoo import VOCABULARY

from lbllm_compile import artifact
from lbllm_compile.chat import Conversation
from lbllm_compile.lowering.compare import DisagreementError, check_replay
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.native import program as native
from lbllm_compile.native.replayed import ReplayedProgram, ReplayedSession
from lbllm_compile.runtime import GenerationError, Sampling, load
from lbllm_compile.runtime.model import CompiledModel
from lbllm_compile.runtime.opening import open_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")

PROMPTS = [[5, 3, 8, 44, 12], [9], [7, 2, 90]]
GREEDY = Sampling(max_new_tokens=6)
DRAWN = Sampling(max_new_tokens=6, temperature=0.8, top_k=20, top_p=0.9, seed=3)


class StandInCompiler:
    """Compiles kernels for the stand-in driver."""

    identity, version = "stand-in", "13.0"

    def __init__(self, folder: Path):
        self.folder = folder

    def compile(self, source: str, arch: str) -> Binary:
        self.folder.mkdir(exist_ok=True)
        return Binary(standin.cubin(source, self.folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and artifacts."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture
def device(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one CUDA device and a compiler for it."""
    monkeypatch.setattr(cuda, "LIBRARY", standin.driver())
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(place / "cache"))
    monkeypatch.setattr(CudaCompiler, "find", lambda: StandInCompiler(place / "module"))
    return place


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


def saved(folder: Path, name: str = "llama") -> Path:
    """An artifact of a tiny model."""
    out = folder / name
    if not out.exists():
        item = stages(name)[1]
        artifact.save(dataclasses.replace(item, tokenizer=tokenizer()), out, lock={})
    return out


@functools.cache
def loaded(out: Path, target: str) -> CompiledModel:
    return load(out, target=target)


def generated(model, prompts=PROMPTS, sampling=GREEDY) -> list[list[int | None]]:
    return list(model.generate_ids(prompts, sampling, ()))


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_artifact_generates_on_a_device_what_it_does_on_the_cpu(device: Path, name: str) -> None:
    """Greedily and drawn, one sequence and several of unequal length; logits differ by the order of fp32 sums."""
    out = saved(device, name)
    model, on_cpu = loaded(out, "cuda"), loaded(out, "cpu")
    assert isinstance(model.native, ReplayedProgram) and model.native.description.target == "cuda:sm_90"
    for sampling in (GREEDY, DRAWN):
        assert generated(model, sampling=sampling) == generated(on_cpu, sampling=sampling)
        for prompt, row in zip(PROMPTS, zip(*generated(model), strict=True), strict=True):
            assert generated(model, [prompt]) == [[token] for token in row]
    ids = torch.tensor([[0, 0, 5, 3], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours, theirs = model.logits(ids, mask), on_cpu.logits(ids, mask)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-3, atol=1e-3)


def test_tokens_are_chosen_on_the_device(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits are copied, neither to take the most likely one nor to draw; where the greatest is no number, that is
    said."""
    model, on_cpu = loaded(saved(device), "cuda"), loaded(saved(device), "cpu")
    expected = [generated(on_cpu, sampling=sampling) for sampling in (GREEDY, DRAWN)]
    monkeypatch.setattr(DecodeSession, "logits", lambda self: pytest.fail("logits are copied"))
    assert [generated(model, sampling=sampling) for sampling in (GREEDY, DRAWN)] == expected
    monkeypatch.setattr(DecodeSession, "choice", lambda self: (0, float("nan")))
    with pytest.raises(GenerationError, match="infinite or no numbers"):
        generated(model)


def greedy(session: ReplayedSession, ids: np.ndarray) -> np.ndarray:
    return session.chosen(ids, GREEDY, np.random.default_rng(0))


def test_a_conversation_grows_and_is_cut(device: Path) -> None:
    """To the bit what one gives that had the room from the beginning; its memory is given back."""
    program = loaded(saved(device), "cuda").native
    assert isinstance(program, ReplayedProgram)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, 70))
    small, large = program.session(1), program.session(1, 200)
    assert small.sequences[0].capacity < ids.shape[1] < large.sequences[0].capacity
    small.step(ids[:, :60])
    large.step(ids[:, :60])
    assert np.array_equal(small.step(ids[:, 60:]), large.step(ids[:, 60:]))
    for _ in range(3):
        chosen = greedy(small, ids[:, :1])
        assert np.array_equal(chosen, greedy(large, ids[:, :1]))
        assert np.array_equal(greedy(small, chosen[:, None]), greedy(large, chosen[:, None]))
    for session in (small, large):
        assert session.rewind(4)
    fresh = program.session(1)
    fresh.step(ids[:, :4])
    assert np.array_equal(small.step(ids[:, 9:12]), fresh.step(ids[:, 9:12]))
    with pytest.raises(GenerationError, match="outside the vocabulary"):
        small.step(np.array([[VOCABULARY]]))
    del small, large, fresh
    taken = []
    for _ in range(4):
        program.session(2)
        taken.append(program.machine.driver.memory()[0])
    assert len(set(taken[1:])) == 1


def test_a_conversation_grows_as_far_as_there_is_room(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To twice as many tokens, but no further than the model has positions, kernels index and memory allows."""
    program = loaded(saved(device), "cuda").native
    assert isinstance(program, ReplayedProgram)
    driver, description = program.machine.driver, program.description
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, 66))
    whole = program.session(1, 80).step(ids)

    def grown() -> int:
        session = program.session(1)
        session.step(ids[:, :60])
        assert session.sequences[0].capacity == 64
        if "LBLLM_STANDIN_MEMORY" in os.environ:  # exactly what the sequence of 80 tokens takes is left
            free, other = driver.memory()[0], program.session(1, 80)
            monkeypatch.setenv("LBLLM_STANDIN_MEMORY", str(driver.memory()[1] - driver.memory()[0]))
            assert free > driver.memory()[0] == 0
            del other
        assert np.array_equal(session.step(ids[:, 60:]), whole)
        return session.sequences[0].capacity

    assert grown() == 128
    with monkeypatch.context() as patch:
        bounds = dataclasses.replace(description.bounds, positions=90)
        patch.setattr(program, "description", dataclasses.replace(description, bounds=bounds))
        assert grown() == 96
    with monkeypatch.context() as patch:
        patch.setattr(program, "_slots", 120)
        assert grown() == 112
    monkeypatch.setenv("LBLLM_STANDIN_MEMORY", str(1 << 34))
    assert grown() == 80


def test_a_conversation_answers_as_on_the_cpu(device: Path) -> None:
    out = saved(device)
    answers = []
    for target in ("cuda", "cpu"):
        talk = Conversation(loaded(out, target), GREEDY)
        answers.append(["".join(talk.answer(text)) for text in ("w5 w3", "w8", "w5 w3 w9")])
    assert answers[0] == answers[1]


def test_several_threads_decode_on_one_device(device: Path) -> None:
    """At the same time, each in a session of its own."""
    model, begin = loaded(saved(device), "cuda"), threading.Barrier(2)

    def together() -> list[list[int | None]]:
        begin.wait()
        return generated(model)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(together) for _ in range(2)]
        assert [done.result() for done in found] == 2 * [generated(model)]


def environment(place: Path, **more: str) -> dict[str, str]:
    """Of a process on a machine whose driver is the stand-in."""
    variables = {"LD_LIBRARY_PATH": str(Path(standin.driver()).parent), "LBLLM_CACHE_DIR": str(place / "cache"), **more}
    return {**os.environ, **variables}


def test_the_stored_program_needs_neither_torch_nor_tvm(device: Path) -> None:
    """Another process, in which neither can be imported, gives the same text."""
    out = saved(device)
    model = loaded(out, "cuda")
    command = runtime_only.command(
        "run", str(out), "--prompt", "w5 w3 w8", "--max-tokens", "6", "--raw", "-t", "cuda:0"
    )
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(device))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == model.generate("w5 w3 w8", max_new_tokens=6).strip()


REFUSALS = {
    "no such device": ({}, "cuda:7", r"no CUDA device 7: its CUDA devices are 0 \(stand-in, sm_90\); use --target cpu"),
    "another architecture": (
        {},
        "cuda:sm_80",
        r"cannot run cuda:sm_80: its CUDA devices are 0 \(stand-in, sm_90\); its own targets: cpu",
    ),
    "too little memory": (
        {"LBLLM_STANDIN_MEMORY": "9999"},
        "cuda",
        r"the model's weights take \d+ MiB of stand-in's memory, of which 0 of 0 MiB are free; stop what else uses",
    ),
    "old driver": (
        {"LBLLM_STANDIN_VERSION": "11020"},
        "cuda",
        r"is too old \(it is for CUDA 11\.2, and programs need 11\.4 at",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_keeps_a_device_from_running_a_model_is_one_sentence(device: Path, name: str) -> None:
    out = saved(device)
    loaded(out, "cuda")
    variables, target, message = REFUSALS[name]
    options = ["--raw", "--max-tokens", "5", "--target", target]
    command = runtime_only.command("run", str(out), "--prompt", "w5", *options)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(device, **variables))
    assert result.returncode == 2 and not result.stdout
    said = " ".join(result.stderr.split())
    assert re.search(message, said) and "Traceback" not in said


def test_a_device_without_room_for_a_sequence_is_told(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(saved(device), "cuda")
    monkeypatch.setenv("LBLLM_STANDIN_MEMORY", str(32 << 20))
    with pytest.raises(KernelError, match=r"a sequence with room for 1000000 tokens takes .* of 32 MiB are free; stop"):
        model.session(1, 10**6)
    assert len(generated(model)) == GREEDY.max_new_tokens
    with pytest.raises(GenerationError, match="1000000000 tokens of a sequence are too many"):
        model.session(1, 10**9)


def test_kernels_that_a_driver_does_not_load_are_told(device: Path, tmp_path: Path) -> None:
    program = loaded(saved(device), "cuda").native
    image = Image.read(program.directory / native.LIBRARY)
    dataclasses.replace(image, cubin=b"none").write(tmp_path / "image")
    weights = program.directory / native.WEIGHTS
    with pytest.raises(KernelError, match=r"stand-in \(sm_90, .* CUDA 13\.0\) does not load kernels that CUDA 13\.0"):
        on_device(tmp_path / "image", weights, [], Target.parse("cuda"))
    dataclasses.replace(image, arch="sm_80").write(tmp_path / "image")
    with pytest.raises(KernelError, match="is for sm_80, and the device is sm_90"):
        on_device(tmp_path / "image", weights, [], Target.parse("cuda"))
    (tmp_path / "image").write_bytes(b"{}")
    with pytest.raises(KernelError, match="is damaged"):
        on_device(tmp_path / "image", weights, [], Target.parse("cuda"))


def prepared_anew(device: Path, monkeypatch: pytest.MonkeyPatch, compiler: StandInCompiler) -> None:
    """Loads an artifact as if no program of it was stored, with another compiler; what is stored stays as it is."""
    monkeypatch.setattr(CudaCompiler, "find", lambda: compiler)
    monkeypatch.setattr(native, "stored_at", lambda digest, target: native.programs_directory() / "none")
    native.programs_directory().mkdir(parents=True, exist_ok=True)
    before = {path for path in native.programs_directory().iterdir() if path.is_dir()}
    try:
        load(saved(device), target="cuda")
    finally:
        assert {path for path in native.programs_directory().iterdir() if path.is_dir()} == before


def test_a_wrong_program_is_refused(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another compiler has spoiled is not taken for the one before, and not stored."""
    model = loaded(saved(device), "cuda")

    class Spoils(StandInCompiler):
        identity = "spoils"

        def compile(self, source: str, arch: str) -> Binary:
            return super().compile(source.replace("slot = past_ptr[0]", "slot = 3"), arch)

    with pytest.raises(DisagreementError, match="does not compute the model"):
        prepared_anew(device, monkeypatch, Spoils(device / "module"))
    monkeypatch.setattr(DecodeSession, "step", lambda self, token=None, draw=None: self.step_by_launch(3))
    with pytest.raises(DisagreementError, match="replaying the program on cuda:sm_90 gives other logits"):
        check_replay(model.native)


class Proven(NoProgress):
    """Keeps which kernels are proven."""

    def __init__(self) -> None:
        self.symbols: list[str] = []

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        return self if title == "proving kernels on stand-in" else super().task(title, total)

    def __enter__(self) -> Proven:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, note: str = "") -> None:
        self.symbols.append(note)


def test_kernels_are_proven_on_the_device_before_they_are_used(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every linear the one of a token, and where parts run one of many that, too; and every quantizer."""

    class Honest(StandInCompiler):
        identity = "honest"

    proven = Proven()
    monkeypatch.setattr(CudaCompiler, "find", lambda: Honest(device / "module"))
    monkeypatch.setattr(native, "stored_at", lambda digest, target: native.programs_directory() / "honest")
    load(saved(device), target="cuda", progress=proven)
    needed = requirements(artifact.load(saved(device)).program)
    assert {*proven.symbols} >= {f"{kernel_name(spec, 'gemv')}_kernel" for spec in needed.linears}
    assert {*proven.symbols} >= {f"{kernel_name(spec, 'quantize')}_kernel" for spec in needed.quantizers}
    assert sum("_gemm_" in symbol for symbol in proven.symbols) >= len(needed.linears) - 1
    assert len({*proven.symbols}) == len(proven.symbols)


SWAPPED = "#define swapped_prmt(a, b, c) ptx_prmt_b32(a, b, ((c) & ~255u) | (((c) & 15u) << 4) | (((c) >> 4) & 15u))\n"

FAULTS = {
    "a swapped nibble of a gemv": ("bit_gemv_", "ptx_prmt_b32(", "swapped_prmt("),
    "a swapped nibble of a gemm": ("bit_gemm_", "ptx_prmt_b32(", "swapped_prmt("),
    "a gemm that waits for too few of its copies": ("bit_gemm_", "copies_wait<", "copies_wait<1 + "),
    "a quantizer that rounds up": ("quantize_", "rintf(", "ceilf("),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_on_a_device_is_refused(
    device: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """By its name, before the program is used: one that the program launches, and one that it has with a prologue."""
    begin, right, wrong = FAULTS[fault]

    class Wrong(StandInCompiler):
        identity = fault

        def compile(self, source: str, arch: str) -> Binary:
            head, *kernels = re.split(r'(?=extern "C" __global__)', source)
            kernels = [k.replace(right, wrong) if re.search(rf"\) {begin}\w+\(", k[:200]) else k for k in kernels]
            return super().compile(head + SWAPPED + "".join(kernels), arch)

    with pytest.raises(DisprovedError, match=rf"on stand-in {begin}\w+_kernel is wrong: .* not used there"):
        prepared_anew(device, monkeypatch, Wrong(device / "module"))


def test_a_program_that_draws_wrongly_is_refused(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays and launches draw alike, and the most likely token is right."""

    class Draws(StandInCompiler):
        identity = "draws"

        def compile(self, source: str, arch: str) -> Binary:
            return super().compile(source.replace("sampling_ptr[3]", "0.0"), arch)

    with pytest.raises(DisagreementError, match=r"chooses token \d+ of a probe where the host draws \d+"):
        prepared_anew(device, monkeypatch, Draws(device / "module"))


def test_what_no_program_holds_is_refused(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on the CPU instead."""

    class Other(StandInCompiler):
        identity = "other"

    loaded(saved(device), "cuda")

    def refuses(self, *_, **__):
        raise UntranslatableError("CUDA programs have no kernel for such attention")

    monkeypatch.setattr(ProgramKernels, "attention", refuses)
    with pytest.raises(KernelError, match=r"does not run on cuda:sm_90: .*no kernel for such attention.*--target cpu"):
        prepared_anew(device, monkeypatch, Other(device / "module"))


def test_targets_name_devices(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cuda`` is the device that is present; ``cuda:N`` is of its architecture."""
    assert [t.name for t in parse_targets("cuda")] == ["cuda:sm_90"]
    assert Target.parse("cuda:0").device == 0 and Target.parse("cuda:0").name == "cuda:sm_90"
    assert Target.parse("cuda:sm_90").runs_here and not Target.parse("cuda:sm_80").runs_here
    assert backend_named("cuda").present(Target.parse("cuda"))
    monkeypatch.setattr(cuda, "LIBRARY", "libnothing.so")
    assert [t.arch for t in parse_targets("cuda")] == [*cuda.DEFAULT_ARCHITECTURES]
    with pytest.raises(TargetError, match="no CUDA device 0: there is no NVIDIA driver here"):
        Target.parse("cuda:0")
    with pytest.raises(TargetError, match="cannot run cuda:sm_75: there is no NVIDIA driver"):
        open_model(saved(device), target="cuda")
