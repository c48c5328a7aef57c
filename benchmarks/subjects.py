"""Models to decode with: an artifact and its original, or random weights in the shape of a known model.

    python -m benchmarks.subjects DIRECTORY      # reads a JSON request from stdin

prepares one in a process of its own, whose memory is gone when the measurement starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.threads import in_words

from lbllm_compile.bench import turns
from lbllm_compile.bench.decoders import original

from . import harness, llama

if TYPE_CHECKING:
    from lbllm_compile.codegen.format import QuantizedWeight
    from lbllm_compile.passes.ir.program import Program
    from torch import Tensor

SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""Configurations of LLaMA models."""

CONTEXT = 2048
"""Tokens a model of random weights takes."""

BITS = 4
"""Of activations, keys and values of a model of random weights."""

PROBE_TOKENS = 8
"""Tokens on which passes look at shapes."""

LEVELS = (-1.5, -0.45, 0.45, 1.5)
"""Levels of a group, in standard deviations: about those of the best four-level quantizer of a normal distribution."""


@dataclass(frozen=True)
class Wish:
    """What to make ready.

    Attributes:
        artifact: a directory that a compile wrote; empty for a model of random weights.
        original: the model it was compiled from; of a model of random weights its name in :data:`SHAPES`.
        group: columns per group, for a model of random weights.
        trials: schedules to measure per kernel, where no result of such a search is stored; 0 searches nothing.
        kinds: file types to write for llama.cpp, where they are not yet.
        threads: to prepare for; a program for one thread shares no work among several.
    """

    artifact: str
    original: str
    group: int
    trials: int
    kinds: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Subject:
    """A model, ready to be loaded in every form.

    Attributes:
        original: what a compile takes.
        native: the artifact or the folder of a native program.
        bits: of a decoder weight of the artifact, as stored.
        parameters: weights of the original.
        gguf: by llama.cpp's file type: the file's ``path``, ``bits`` of a decoder weight, and the ``shares`` of the
            decoder weights that each tensor type has.
    """

    original: str
    native: str
    bits: float
    parameters: int
    gguf: dict[str, dict[str, Any]] = field(default_factory=dict)


def random_source(shape: str, directory: Path) -> Path:
    """Writes what a compile takes for :func:`random_model`."""
    path = directory / f"{shape}.py"
    lines = ("from benchmarks.subjects import random_model", "", "", "def build_model():")
    path.write_text("\n".join((*lines, f"    return random_model({shape!r})", "")))
    return path


def random_model(shape: str) -> Any:
    """A LLaMA with the same random weights at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def round_to_nearest(weight: Tensor, group: int) -> QuantizedWeight:
    """The nearest of a group's four :data:`LEVELS`, for a weight ``[N, K]``: a compile's format without its quality."""
    import torch
    from lbllm_compile.codegen.format import QuantizedWeight

    columns = weight.shape[-1]
    grouped = torch.nn.functional.pad(weight, (0, -columns % group)).unflatten(-1, (-1, group))
    levels = grouped.square().mean(-1, keepdim=True).sqrt() * torch.tensor(LEVELS)
    borders = (levels[..., 1:] + levels[..., :-1]) / 2
    codes = sum((grouped > borders[..., i, None]).to(torch.uint8) for i in range(3))
    assert isinstance(codes, torch.Tensor)
    return QuantizedWeight.from_codes(codes.flatten(-2)[..., :columns], levels, group)


def lowered(model: Any, name: str, group: int) -> Program:
    """The program that a compile would give, with weights rounded to nearest instead of calibrated."""
    import torch
    from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
    from lbllm_compile.passes import pipeline
    from lbllm_compile.passes.activate import insert_quantizers
    from lbllm_compile.passes.annotate import decoder_linears
    from lbllm_compile.passes.base import PassContext
    from lbllm_compile.passes.ir.annotations import LINEAR
    from lbllm_compile.passes.ir.program import get_attribute
    from lbllm_compile.passes.ptq import rewrite

    from lbllm_compile import frontend

    context = PassContext(probe=frontend.language_model_inputs(torch.arange(PROBE_TOKENS)[None]))

    def apply(program: Program, passes: str) -> Program:
        for each in pipeline.parse(passes):
            program = each.apply(program, context).program
        return program

    program = frontend.capture(frontend.prepare(frontend.UserModel(model, "causal-lm", name, name)))
    program = apply(program, "canonicalize,annotate,observe")
    stored = {}
    for linears in decoder_linears(program.graph).values():
        for path in (linear.meta[LINEAR].weight for linear in linears):
            weight = round_to_nearest(get_attribute(program.module, path), group)
            stored |= {f"{path}.{part}": getattr(weight, part) for part in WEIGHT}
    program = insert_quantizers(rewrite(program, stored, group), BITS, group, BITS)
    return apply(program, "head,merge,lower,cache,cleanup")


def make(wish: Wish, directory: Path) -> Subject:
    """Makes a model ready for a number of threads; what takes much memory happens in a child process.

    Args:
        wish: what to make ready.
        directory: where its files go.

    Raises:
        LbllmError: it failed; what the child printed says why.
    """
    command = [sys.executable, "-m", "benchmarks.subjects", str(directory)]
    done = subprocess.run(
        command,
        env=turns.environment(wish.threads),
        input=json.dumps(asdict(wish)),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise LbllmError("the model could not be prepared; what was printed says why")
    return Subject(**json.loads(done.stdout.splitlines()[-1]))


def _make_here(wish: Wish, directory: Path) -> Subject:
    from lbllm_compile.codegen.cpu.build import KernelSet
    from lbllm_compile.codegen.targets import Target

    from lbllm_compile import runtime
    from lbllm_compile.evaluate import bits_per_weight
    from lbllm_compile.lowering.build import build_native
    from lbllm_compile.lowering.executor import requirements
    from lbllm_compile.tune import TuneOptions, tune

    if wish.artifact:
        if wish.trials:
            harness.CONSOLE.print(f"[dim]tuning for {in_words(wish.threads)}[/dim]")
            tune(TuneOptions(directory=Path(wish.artifact), trials=wish.trials))
        compiled = runtime.load(wish.artifact)
        program, native = compiled.program, wish.artifact
        if compiled.native is None:
            raise LbllmError(f"'{wish.artifact}' has no native program, so that its speed says nothing")
        del compiled
    else:
        program = None
        native = str(directory / f"native-{wish.threads}")
    source = wish.original if wish.artifact else str(random_source(wish.original, directory))
    model = original(source)
    parameters = sum(p.numel() for p in model.parameters())
    gguf = _write_gguf(model, wish.kinds, wish.threads, directory)
    if program is None:
        harness.CONSOLE.print(f"[dim]lowering {wish.original}[/dim]")
        program = lowered(model, wish.original, wish.group)
        needed = requirements(program)
        kernels = KernelSet.build(needed.linears, needed.quantizers, Target.parse("cpu"), trials=wish.trials)
        Path(native).mkdir()
        if build_native(program, kernels, Path(native)) is None:
            raise LbllmError(f"{wish.original} has no native program")
    return Subject(source, native, bits_per_weight(program)["bits_per_weight"], parameters, gguf)


def _write_gguf(model: Any, kinds: Sequence[str], threads: int, directory: Path) -> dict[str, dict[str, Any]]:
    """Files for llama.cpp, as :class:`Subject` has them."""
    files: dict[str, dict[str, Any]] = {}
    exact = directory / "f16.gguf"
    for kind in kinds:
        path = directory / f"{kind}.gguf"
        if not path.is_file():
            if not exact.is_file():
                harness.CONSOLE.print(f"[dim]writing GGUF files: {', '.join(kinds)}[/dim]")
                llama.write_gguf(model, exact)
            llama.quantize(exact, path, kind, threads)
        bits, shares = llama.bits_per_weight(path)
        files[kind] = {"path": str(path), "bits": bits, "shares": shares}
    exact.unlink(missing_ok=True)
    return files


if __name__ == "__main__":
    fields = json.loads(sys.stdin.read())
    try:
        made = _make_here(Wish(**{**fields, "kinds": tuple(fields["kinds"])}), Path(sys.argv[1]))
    except LbllmError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(made)))
