"""Times decoding on a GPU: whole programs against torch, llama.cpp and copy bandwidth.

    python -m benchmarks.cuda_decode --packed FOLDER [--models NAME ...] [--json FILE]

Models are those that ``benchmarks/cuda_all.sh pack`` wrote. Before a program is timed, its replays, of steps and of
parts of a prompt, are held against its launches one by one, to the bit, what they choose against what the host would,
and their logits against the graph's where its weights came along. Then everyone decodes the same number of tokens
behind the same prompt, one sequence, greedily, in turns. *Greedy* copies each token to the host, as text needs it;
*replayed* waits for the device only at the end, so that the difference is what the host costs; *serial*, where launches
overlap, is the same without that. Times are of the clock on the wall, around work that is waited for. *prefill* is a
prompt, which programs take in parts.
Without a GPU it ends in a sentence and exit code 2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.cuda.program.session import DecodeSession
from lbllm_compile.codegen.errors import KernelError, LbllmError
from lbllm_compile.codegen.sampling import Draw, drawn

from . import cuda_peers, cuda_timing
from .cuda_packed import EXPECTED, PROVEN_PROMPT, PROVEN_TOKENS, PackedModel
from .cuda_timing import Bench, attempted

MODELS, GGUF = "models", "gguf"

GREEDY, REPLAYED, SERIAL, PREFILL, COPY = "greedy", "replayed", "serial", "prefill", "copy"


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        prompt: tokens that are fed before.
        steps: decoded tokens of a round.
        prefill: tokens of a long prompt.
        rounds: that count; one more is before them.
    """

    prompt: int = 32
    steps: int = 64
    prefill: int = 512
    rounds: int = 5


QUICK = Settings(prompt=2, steps=2, prefill=9, rounds=1)
"""A smoke test, whose long prompt is one part."""

Turn = Callable[[], dict[str, float]]
"""A round of a contender: seconds of a token of each kind."""


def agreeing(model: PackedModel, folder: Path, one: DecodeSession, other: DecodeSession) -> str:
    """Checks a program on this device.

    Args:
        model: what it is.
        folder: where it is.
        one, other: empty sequences with room for :data:`.cuda_packed.PROVEN_PROMPT` tokens.

    Returns:
        What was checked, in words.

    Raises:
        KernelError: replays give other bits than launches, tokens that the host would not choose, or logits other than
            the graph's.
    """
    ids = np.random.default_rng(0).integers(0, model.vocabulary, PROVEN_PROMPT).tolist()
    found, draw = [], Draw(temperature=1.0, top_k=20, top_p=0.9, place=0.7)
    for number, token in enumerate([*ids[:PROVEN_TOKENS], *[None] * PROVEN_TOKENS]):
        chosen = draw if number % 2 else None
        one.step(token, chosen)
        other.step_by_launch(token, chosen)
        found.append(_same(model, one, other, chosen, "steps"))
    for sequence in (one, other):
        sequence.rewind(0)
    one.feed(ids, draw)
    other.feed_by_launch(ids, draw)
    found = [*found[:PROVEN_TOKENS], _same(model, one, other, draw, "a prompt")]
    said = "replays of steps and of a prompt equal launches, to the bit"
    if not model.bound:
        return f"{said}; weights were drawn here, so there are no logits to compare with"
    with np.load(folder / EXPECTED) as arrays:
        expected = arrays["logits"]
        assert arrays["ids"].tolist() == ids
    distance = max(_distance(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    if not distance <= model.bound:
        raise KernelError(f"the logits of {model.name} are {distance:.2g} of their length from the graph's")
    return f"{said}; logits are {distance:.2g} of their length from the graph's"


def _same(model: PackedModel, one: DecodeSession, other: DecodeSession, draw: Draw | None, where: str) -> np.ndarray:
    """The logits of a sequence that was replayed, which are those of one that was launched."""
    logits = one.logits()
    if logits.tobytes() != other.logits().tobytes() or one.state() != other.state() or one.token() != other.token():
        raise KernelError(f"replaying {model.name} gives other bits than its launches one by one, in {where}")
    if not np.isfinite(logits).all():
        raise KernelError(f"the logits of {model.name} are infinite or no numbers")
    expected = int(logits.argmax()) if draw is None else drawn(logits, draw)
    if one.token() != expected:
        raise KernelError(f"{model.name} chooses token {one.token()} where the host chooses {expected}, in {where}")
    return logits


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of logits, apart from their means, as a share of their length."""
    difference, centered = (values - values.mean() for values in (ours - theirs, theirs))
    return float(np.linalg.norm(difference) / np.linalg.norm(centered))


def _own(bench: Bench, session: DecodeSession, model: PackedModel, settings: Settings) -> Turn:
    """A program's turn, in a session, and in one whose launches do not overlap."""
    ids = np.random.default_rng(0).integers(0, model.vocabulary, settings.prefill).tolist()
    program = session.program
    serial = program.sequence(session.capacity, overlapping=False) if program.overlaps else None

    def fed(count: int, session: DecodeSession = session) -> None:
        session.rewind(0)
        session.feed(ids[:count])
        bench.driver.synchronize()

    def replayed(session: DecodeSession) -> float:
        fed(settings.prompt, session)
        start = time.perf_counter()
        for _ in range(settings.steps):
            session.step()
        bench.driver.synchronize()
        return (time.perf_counter() - start) / settings.steps

    def turn() -> dict[str, float]:
        seconds = {}
        fed(settings.prompt)
        start = time.perf_counter()
        for _ in range(settings.steps):
            session.step()
            session.token()
        seconds[GREEDY] = (time.perf_counter() - start) / settings.steps
        seconds[REPLAYED] = replayed(session)
        if serial is not None:
            seconds[SERIAL] = replayed(serial)
        start = time.perf_counter()
        fed(settings.prefill)
        seconds[PREFILL] = (time.perf_counter() - start) / settings.prefill
        return seconds

    return turn


def torch_turn(decoder: cuda_peers.TorchDecoder, vocabulary: int, settings: Settings) -> Turn:
    """Torch's turn."""
    ids = np.random.default_rng(0).integers(0, vocabulary, settings.prefill)

    def turn() -> dict[str, float]:
        decoder.reset()
        token = decoder.feed(ids[: settings.prompt])
        start = time.perf_counter()
        for _ in range(settings.steps):
            token = decoder.feed(np.array([token]))
        seconds = {GREEDY: (time.perf_counter() - start) / settings.steps}
        decoder.reset()
        start = time.perf_counter()
        decoder.feed(ids)
        seconds[PREFILL] = (time.perf_counter() - start) / settings.prefill
        return seconds

    return turn


def llama_turn(program: Path, file: Path, settings: Settings) -> Turn:
    """llama.cpp's turn, a process of its own; it counts neither its start nor its sampling."""

    def turn() -> dict[str, float]:
        found = cuda_peers.llama_run(program, file, settings.prefill, settings.steps)
        return {GREEDY: found["decode"], PREFILL: found["prefill"]}

    return turn


def measured(bench: Bench, packed: Path, name: str, settings: Settings) -> dict[str, Any]:
    """One model's results, JSON-able.

    Raises:
        LbllmError: it was not packed for the device, or computes something else.
    """
    folder, driver, absent = packed / MODELS / name, bench.driver, dict[str, str]()
    model = PackedModel.read(folder)
    start = time.perf_counter()
    free = driver.memory()[0]
    program = model.program(folder, driver)
    capacity = max(settings.prefill, settings.prompt + settings.steps, PROVEN_PROMPT)
    session = program.sequence(capacity)
    driver.synchronize()
    loading, taken = time.perf_counter() - start, free - driver.memory()[0]
    proof = agreeing(model, folder, session, program.sequence(capacity))
    turns: dict[str, Turn] = {"lbllm": _own(bench, session, model, settings)}
    moved, copy, buffers = bench.copying()
    turns[COPY] = lambda: {COPY: min(copy(2))}
    turns |= _peers(packed, model, settings, absent)
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(1 + settings.rounds):
        for contender, turn in list(turns.items()):
            found = attempted(absent, contender, turn)
            if found is None:
                if contender in ("lbllm", COPY):
                    raise KernelError(absent[contender])
                del turns[contender]
            for kind, value in (found or {}).items():
                if number:
                    seconds.setdefault((contender, kind), []).append(value)
    driver.free(buffers)
    bandwidth = moved / statistics.median(seconds[COPY, COPY])
    return {
        "model": name,
        "proof": proof,
        "bits_per_decoder_weight": model.bits,
        "weight_bytes": model.weight_bytes,
        "launches_of_a_step": model.launches,
        "launches_of_a_part": model.part_launches,
        "load_seconds": loading,
        "device_bytes": taken,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "prompt": settings.prompt,
        "steps": settings.steps,
        "prefill": settings.prefill,
        "results": [_row(*key, values, model, bandwidth) for key, values in seconds.items() if key[0] != COPY],
        "absent": absent,
    }


def _row(contender: str, kind: str, seconds: list[float], model: PackedModel, bandwidth: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    more: dict[str, Any] = {"kind": kind, "tokens_per_second": 1 / median}
    if contender == "lbllm" and kind != PREFILL:
        more["share_of_copy_bandwidth"] = model.weight_bytes / median / bandwidth
        more["microseconds_of_a_launch"] = 1e6 * median / model.launches
    return cuda_timing.seconds_row(contender, seconds, **more)


def _peers(packed: Path, model: PackedModel, settings: Settings, absent: dict[str, str]) -> dict[str, Turn]:
    """Turns of what is compared with, as far as it is here."""
    turns: dict[str, Turn] = {}
    capacity = max(settings.prefill, settings.prompt + settings.steps)
    device = attempted(absent, "torch bf16", cuda_peers.torch_device)
    if device is not None and not model.config:
        absent["torch bf16"] = "an artifact's original is not packed; python -m benchmarks.decode compares it on a CPU"
    elif device is not None:
        for name, compiled in (("torch bf16", False), ("torch bf16, compiled", True)):
            decoder = attempted(
                absent, name, lambda c=compiled: cuda_peers.TorchDecoder(model.config, capacity, device, c)
            )
            if decoder is not None:
                turns[name] = torch_turn(decoder, model.vocabulary, settings)
    program = attempted(absent, "llama.cpp", lambda: cuda_peers.llama_bench(packed))
    files = sorted((packed / GGUF / model.name).glob("*.gguf"))
    if program is not None and not files:
        absent["llama.cpp"] = f"there are no files in {GGUF}/{model.name}/"
    elif program is not None:
        turns |= {f"llama.cpp {file.stem}": llama_turn(program, file, settings) for file in files}
    return turns


def main() -> int:
    parser = cuda_timing.parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="those to measure; all by default")
    options = parser.parse_args()
    driver = cuda_timing.present_device()
    with driver:
        if options.packed is None:
            raise LbllmError("whole models come from a folder: name what cuda_all.sh pack wrote with --packed")
        models = options.models or sorted(path.name for path in (options.packed / MODELS).glob("*"))
        if not models:
            raise LbllmError(f"there are no models in {options.packed / MODELS}; pack some with --models")
        bench, failed = Bench(driver, options.quick), dict[str, str]()
        settings = QUICK if options.quick else Settings()
        found = [attempted(failed, n, lambda n=n: measured(bench, options.packed, n, settings)) for n in models]
        document = {"machine": bench.facts(), "models": [each for each in found if each], "failed": failed}
    cuda_timing.write(document, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    cuda_timing.ended(main)
