"""Many pipelines on one model: what begins alike runs once, and what is finished survives a kill.

A :class:`Tree` takes a captured program through pipelines. The program after every pass is kept in the work directory
as what differs from the program before it, under a key of the pipeline so far, so a rerun, or another process, takes
over every finished pass, and of an unfinished one its finished layers.

A :class:`Scorer` scores the programs on a text as they are, simulated quantization and all, in float32. Layers run one
after the other on all chunks of the text, and of the logits one chunk's are held at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.checkpoint import WorkDir
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.evaluate import Excerpt, Scores
from lbllm_compile.frontend import language_model_inputs
from lbllm_compile.job import Job
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import Pass, PassCheckpoints, PassContext
from lbllm_compile.passes.calibrate.chains import parameters_of
from lbllm_compile.passes.calibrate.layers import Activations, Layers, calibration_batches, finish, split
from lbllm_compile.passes.calibrate.simulate import lift
from lbllm_compile.passes.calibrate.training import DivergenceError
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.resident import peak_memory

_AFTER = "after-"
"""In front of the key of a finished pass: the stage of the work directory that holds its program."""

_PREPARED = "prepared-"
"""In front of the key of a finished preparation: the stage that holds what it took."""


class DivergedError(LbllmError):
    """A training of the pipeline diverged, now or when it ran first."""


@dataclass(frozen=True)
class Reached:
    """A program behind a pipeline, and what it took to get there.

    Attributes:
        key: stands for the pipeline.
        program: the program.
        seconds: wall time of the passes. Of a pass that was interrupted, the time of its last run alone.
        peak_memory: most bytes that a process which ran one of the passes held resident until the pass was done.
    """

    key: str
    program: Program
    seconds: float
    peak_memory: int


def _key(passes: Sequence[Pass]) -> str:
    return hashlib.sha256(pipeline.render(passes, full=True).encode()).hexdigest()[:16]


@dataclass
class Tree:
    """Runs pipelines on one program, each pass once for all pipelines that begin alike up to it.

    The programs along the latest pipeline stay in memory, so pipelines are best given in an order in which those that
    begin alike follow one another.

    Attributes:
        prepared: where the pipelines start.
        preparation: the passes behind it.
        context: what the passes share; its checkpoints are not used.
        work: where finished passes are kept.
    """

    prepared: Reached
    preparation: Sequence[Pass]
    context: PassContext
    work: WorkDir
    _path: list[Reached] = field(default_factory=list)

    @classmethod
    def start(cls, program: Program, preparation: Sequence[Pass], context: PassContext, work: WorkDir) -> Tree:
        """Prepares a captured program. Every process does so, with what earlier ones measured for it."""
        key = _key(preparation)
        context = dataclasses.replace(context, checkpoints=PassCheckpoints(work, f"{key}-"))
        prepared, records = pipeline.run(program, preparation, context)
        stage = _PREPARED + key
        done = work.load(stage, 0)
        if done is None:
            done = {}, {"seconds": sum(record.seconds for record in records), "peak_memory": peak_memory()}
            work.save(stage, 0, *done)
        facts = done[1]
        return cls(Reached("", prepared, facts["seconds"], facts["peak_memory"]), preparation, context, work)

    def reach(self, passes: Sequence[Pass]) -> Reached:
        """The program behind a pipeline.

        Args:
            passes: what comes behind the preparation.

        Raises:
            DivergedError: a training diverged.
            LbllmError: a pass refused the program or broke its contract.
        """
        keys = [self.key_of(passes[: count + 1]) for count in range(len(passes))]
        common = 0
        while common < min(len(keys), len(self._path)) and self._path[common].key == keys[common]:
            common += 1
        del self._path[common:]
        for item, key in zip(passes[common:], keys[common:], strict=True):
            before = self._last
            self._path.append(self._stored(before, key) or self._run(before, item, key))
        return self._last

    @property
    def _last(self) -> Reached:
        return self._path[-1] if self._path else self.prepared

    def key_of(self, passes: Sequence[Pass]) -> str:
        """Stands for a pipeline behind the preparation, options at their defaults included."""
        return _key([*self.preparation, *passes])

    def _stored(self, before: Reached, key: str) -> Reached | None:
        found = self.work.load(_AFTER + key, 0)
        if found is None:
            return None
        tensors, facts = found
        if "diverged" in facts:
            raise DivergedError(facts["diverged"])
        state = {**dict(before.program.parameters()), **tensors}
        program = before.program.with_module(graph_json.loads(facts["graph"], state), **facts["metadata"])
        peak = max(before.peak_memory, facts["peak_memory"])
        return Reached(key, program, before.seconds + facts["seconds"], peak)

    def _run(self, before: Reached, item: Pass, key: str) -> Reached:
        context = dataclasses.replace(self.context, checkpoints=PassCheckpoints(self.work, f"{key}-"))
        try:
            program, (record,) = pipeline.run(before.program, [item], context)
        except DivergenceError as error:
            self.work.save(_AFTER + key, 0, {}, {"diverged": str(error)})
            raise DivergedError(str(error)) from error
        old = dict(before.program.parameters())
        changed = {path: t for path, t in program.parameters() if path not in old or not _same(t, old[path])}
        facts = {
            "graph": graph_json.dumps(program.module),
            "metadata": dict(program.metadata),
            "seconds": record.seconds,
            "peak_memory": peak_memory(),
        }
        self.work.save(_AFTER + key, 0, changed, facts)
        self.work.forget(f"{key}-")
        peak = max(before.peak_memory, facts["peak_memory"])
        return Reached(key, program, before.seconds + record.seconds, peak)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


class Scorer:
    """Scores simulated programs against the float program on the same chunks of a text.

    Args:
        teacher: the float program, annotated.
        chunks: token ids, each ``[1, S]``.
        progress: told what goes on.
    """

    def __init__(self, teacher: Program, chunks: Sequence[Tensor], progress: Progress | None = None):
        self._chunks = list(chunks)
        self._progress = progress or NoProgress()
        self._teacher = self._behind_layers(teacher, "running the float model on the text")

    def score(self, program: Program) -> dict[str, float | None] | None:
        """The figures of :meth:`lbllm_compile.evaluate.Scores.summary`; None where the logits are not finite."""
        layers, values = self._behind_layers(program, "running a variant on the text")
        teacher, targets = self._teacher
        scores = Scores()
        with self._progress.task("scoring", len(self._chunks)) as task, torch.no_grad():
            for ids, value, target in zip(self._chunks, values, targets, strict=True):
                scores.add(ids, finish(layers, value), finish(teacher, target))
                task.advance()
        figures = scores.summary()
        finite = all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
        return figures if finite else None

    def _behind_layers(self, program: Program, title: str) -> tuple[Layers, Activations]:
        """The program's layers, and its values behind the last of them, a chunk at a time."""
        layers = split(program)
        inputs = [language_model_inputs(ids) for ids in self._chunks]
        chain = Activations(calibration_batches(program, inputs, 1))
        with self._progress.task(title, len(layers.layers)) as task:
            chain.advance(layers.prologue)
            for stage in layers.layers:
                lifted = lift(stage)
                # Bound, so that weights are unpacked once for all chunks.
                chain.advance(lifted.bind(parameters_of(lifted, {})))
                task.advance()
        return layers, chain


@dataclass(frozen=True)
class Measured:
    """What a pipeline gave.

    Attributes:
        pipeline: its text behind the preparation; empty for the float model.
        figures: of :meth:`Scorer.score`; None where a training or the logits diverged.
        seconds, peak_memory: of :class:`Reached`; None where a training diverged.
    """

    pipeline: str
    figures: Mapping[str, float] | None
    seconds: float | None
    peak_memory: int | None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "diverged": self.figures is None}


class Study:
    """A model, what it is calibrated on and the text it is scored on; pipelines are measured on these.

    Args:
        job: the captured model. Its work directory is kept when all is done, so that later studies take from it.
        preparation: the passes in front of every pipeline.
        excerpt: what to score.
        progress: told what goes on.

    Raises:
        WorkDirError: the work directory holds a study of something else; the message names what changed.
        LbllmError: the calibration data cannot be used.
    """

    def __init__(self, job: Job, preparation: Sequence[Pass], excerpt: Excerpt, progress: Progress | None = None):
        self.excerpt = excerpt
        self._job = job
        self._progress = progress or NoProgress()
        data = job.calibration_data(self._progress)
        # Every piece of work is kept under its pipeline, so that studies of other pipelines share the directory.
        facts = {k: v for k, v in job.fingerprint(data).items() if k != "pipeline"}
        self.calibration = data.source
        self.work = WorkDir(job.work, facts, fresh=job.options.fresh, holds="a study")
        context = PassContext(
            calibration=data.calibration,
            validation=data.validation,
            probe=data.probe,
            seed=job.options.seed,
            device=job.device,
            progress=self._progress,
        )
        self._tree = Tree.start(job.program, preparation, context, self.work)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        teacher = self._tree.context.teacher
        assert teacher is not None, "the preparation annotates"
        return Scorer(teacher, self.excerpt.pieces, self._progress)

    def measure(self, passes: Sequence[Pass]) -> Measured:
        """Runs a pipeline behind the preparation and scores its program, unless the work directory has the figures."""
        stage = f"scores-{self._tree.key_of(passes)}-{self.excerpt.digest}"
        done = self.work.load(stage, 0)
        if done is None:
            done = {}, self._measure(passes)
            self.work.save(stage, 0, *done)
        return Measured(pipeline.render(passes), **done[1])

    def _measure(self, passes: Sequence[Pass]) -> dict[str, Any]:
        try:
            reached = self._tree.reach(passes)
        except DivergedError as error:
            self._progress.note(f"{pipeline.render(passes)}: {error}")
            return {"figures": None, "seconds": None, "peak_memory": None}
        figures = self._scorer.score(reached.program)
        return {"figures": figures, "seconds": reached.seconds, "peak_memory": reached.peak_memory}
