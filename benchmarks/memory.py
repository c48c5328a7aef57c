"""Measures how much memory a compile holds, phase by phase, against what ``plan`` predicts.

    python -m benchmarks.memory --layers 4 22                        # the shape of a LLaMA of 1.1 billion weights
    python -m benchmarks.memory --model DIR --calibrated 64 256      # a model of one's own

Writes a LLaMA of that shape with random weights, in bfloat16 and a shard a layer, never holding more than a shard. Each
number of layers is then read, captured, rehearsed, calibrated by stages 1 to 3 on random tokens and lowered, in a
process of its own. A phase's peak is the largest resident set (``VmHWM`` of ``/proc/self/status``) since the phase
began, mapped files included, as far as they are in memory at a time. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .subjects import SHAPES

PIPELINE = (
    "canonicalize,annotate,observe,ptq,distill{epochs=1},activate{epochs=1,steps=0},head,merge,lower,cache,cleanup"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One process's work.

    Attributes:
        model: what to compile.
        pipeline: as text.
        sequences, length: of the calibration set; a quarter as many, at least one, are held out.
    """

    model: str
    pipeline: str
    sequences: int
    length: int


def write_model(folder: Path, shape: dict[str, Any], layers: int) -> None:
    """Writes a language model of random weights, gaussian with a standard deviation of 0.02."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.num_hidden_layers = layers
    config.save_pretrained(folder)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in module.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    for file, tensors in shards.items():
        drawn = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
            for name, size in tensors.items()
        }
        save_file(drawn, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Peak:
    """The largest resident set of this process, phase by phase, in bytes."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase and begins the next."""
        self.phases[phase] = max(self.phases.get(phase, 0), _status("VmHWM"))
        print(f"{phase}: {self.phases[phase] / 1e6:.0f} MB", file=sys.stderr, flush=True)
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(run: Run) -> dict[str, Any]:
    """Runs one compile as far as its kernels; returns the phases' peaks and what ``plan`` predicts."""
    import torch
    import transformers  # noqa: F401
    from lbllm_compile.codegen import tvm_api  # noqa: F401
    from lbllm_compile.codegen.targets import parse_targets
    from lbllm_compile.passes import pipeline
    from lbllm_compile.passes.base import PassContext

    from lbllm_compile import calibration, frontend, preflight
    from lbllm_compile.kernels import build_kernels

    peak = Peak()
    peak.lap("libraries")
    model = frontend.load(run.model)
    peak.lap("reading")
    program = frontend.capture(model)
    frontend.program_hash(program)
    peak.lap("capture")
    passes, targets = pipeline.parse(run.pipeline), parse_targets("cpu")
    probe = calibration.random_probe(model, program, 0)
    preflight.rehearse(program, passes, probe, targets)
    peak.lap("preflight")
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config["vocab_size"])
    ids = torch.randint(vocabulary, (run.sequences + _held_out(run.sequences), run.length), generator=generator)
    batches = [frontend.language_model_inputs(i) for i in ids.split(run.sequences)]
    context = PassContext(calibration=batches[:1], validation=batches[1:], probe=probe)
    program, _ = pipeline.run(
        program, passes, context, lambda record, *_: peak.lap(_PHASES.get(record.name, "lowering"))
    )
    build_kernels(program, targets, trials=0)
    peak.lap("lowering")
    return {"measured": peak.phases, "planned": _planned(run, passes), "layers": model.config["num_hidden_layers"]}


def _planned(run: Run, passes: Sequence[Any]) -> dict[str, int]:
    """What ``plan`` says of the phases that are measured, for the tokens that are used."""
    from lbllm_compile import footprint, plan, recipe
    from lbllm_compile.options import CompileOptions

    made = plan.make_plan(CompileOptions(run.model, pipeline=run.pipeline))
    tokens = {
        "sequences": run.sequences,
        "sequence_length": run.length,
        "validation_sequences": _held_out(run.sequences),
    }
    preset = recipe.PRESETS["quick"].model_copy(update=tokens)
    skeleton = plan.skeleton(run.model)
    told = plan.footprint_of(skeleton, plan.survey(skeleton), passes, preset, made.artifact, None)
    return footprint.memory(*told)


_PHASES = {"canonicalize": "rest", "annotate": "rest", "observe": "rest"} | {
    name: name for name in ("ptq", "distill", "activate", "finetune")
}
"""Names of the phases that are passes; what comes behind them is lowering."""

PLANNED = {
    "reading": "reading",
    "capture": "capture and preflight",
    "preflight": "capture and preflight",
    "ptq": "stage 1, ptq",
    "distill": "stage 2, distill",
    "activate": "stage 3, activate",
    "finetune": "training all layers together",
    "lowering": "lowering and saving",
}
"""What ``plan`` calls the measured phases."""


def _held_out(sequences: int) -> int:
    return max(1, sequences // 4)


def _in_child(run: Run) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(dataclasses.asdict(run))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    sequences, length = options.calibrated
    if options.model:
        yield Run(options.model, options.pipeline, sequences, length)
        return
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_model(Path(folder), SHAPES[options.shape], layers)
            yield Run(folder, options.pipeline, sequences, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 22])
    parser.add_argument("--model", help="a model of your own, as a compile takes it")
    parser.add_argument("--calibrated", type=int, nargs=2, default=[4, 64], metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--pipeline", default=PIPELINE)
    parser.add_argument("--folder", help="where to write the models; the folder for temporary files by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(Run(**json.loads(options.child)))))
        return
    results = [_in_child(run) for run in _runs(options)]
    table = Table("phase", *(f"{r['layers']} layers: {kind}, MB" for r in results for kind in ("measured", "planned")))
    for phase in results[0]["measured"]:
        cells = ((r["measured"][phase], r["planned"].get(PLANNED.get(phase, ""))) for r in results)
        table.add_row(phase, *(f"{size / 1e6:.0f}" if size else "" for pair in cells for size in pair))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
