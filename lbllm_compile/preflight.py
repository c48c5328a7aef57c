"""A rehearsal: one decoder layer through every pass and its kernels, before the long work starts.

What can go wrong at hour three usually can go wrong in the first minute too: a graph that a pass refuses, a compiler
that is missing, a kernel that disagrees with the reference. The rehearsal runs the same passes on the model cut down to
its first decoder layer, with a handful of tokens, and builds the kernels it needs with one schedule each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.targets import Target
from lbllm_compile.kernels import build_kernels
from lbllm_compile.lowering.build import build_native, workshop
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import layer_count
from lbllm_compile.passes.base import Pass, PassContext
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import CPU, Program
from lbllm_compile.passes.ir.spool import reclaim
from lbllm_compile.passes.ir.truncate import first_layer_only


@dataclass(frozen=True)
class Step:
    """One thing the rehearsal did: a pass, or ``kernels``; with its time in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal found.

    Attributes:
        steps: in order.
        layers: decoder layers of the whole model.
        complete: whether one layer could be cut out; otherwise only the passes up to ``annotate`` were rehearsed.
    """

    steps: tuple[Step, ...]
    layers: int
    complete: bool


def rehearse(
    program: Program,
    passes: Sequence[Pass],
    probe: Mapping[str, Any],
    targets: Sequence[Target],
    *,
    seed: int = 0,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> Rehearsal:
    """Runs every pass, with its contract checks, and builds the kernels, on the first decoder layer alone.

    Args:
        program: as captured.
        passes: the whole pipeline.
        probe: one small batch; it is calibration, validation and probe at once.
        targets: what to build kernels for.
        seed: of every random choice.
        device: where calibrations compute.
        progress: told what goes on.

    Raises:
        LbllmError: what would have stopped the compile later.
    """
    progress = progress or NoProgress()
    names = [p.name for p in passes]
    head = names.index("annotate") + 1 if "annotate" in names else 0
    context = PassContext(calibration=[probe], validation=[probe], probe=probe, seed=seed, device=device)
    steps = []
    with progress.task("preflight: one decoder layer through every pass", len(passes) + 1) as task:
        for item in passes[:head]:
            start = time.perf_counter()
            program = item.apply(program, context).program
            steps.append(Step(item.name, time.perf_counter() - start))
            task.advance(item.name)
        layers = layer_count(program)
        cut = first_layer_only(program) if head else None
        if cut is None:
            return Rehearsal(tuple(steps), layers, complete=False)
        context.teacher = cut

        def rehearsed(record: pipeline.PassRecord, _before: Program, _after: Program) -> None:
            steps.append(Step(record.name, record.seconds))
            task.advance(record.name)

        after, _ = pipeline.run(cut, [item.rehearsal() for item in passes[head:]], context, rehearsed)
        graph_json.check_storable(after.graph)
        if "lower" in names:
            start = time.perf_counter()
            kernels = build_kernels(after, targets, trials=0)
            steps.append(Step("kernels", time.perf_counter() - start))
            start = time.perf_counter()
            with workshop() as folder:
                build_native(after, kernels.host, folder)
            steps.append(Step("native program", time.perf_counter() - start))
        task.advance("kernels")
    reclaim(program.module)
    return Rehearsal(tuple(steps), layers, complete=True)
