"""``compile()``: the whole job on a page. A model goes in, a directory that runs anywhere comes out."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lbllm_compile import __version__, artifact, calibration, checkpoint, frontend, preflight, recipe, sheet
from lbllm_compile.calibration import CalibrationSet
from lbllm_compile.checkpoint import WorkDir
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.targets import Target, parse_targets
from lbllm_compile.frontend import UserModel
from lbllm_compile.kernels import build_kernels
from lbllm_compile.lowering.build import build_native, keep_native, workshop
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import MAX_SEED, Pass, PassContext
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.pipeline import Listener, PassRecord
from lbllm_compile.passes.registry import suggestion
from lbllm_compile.report import stages
from lbllm_compile.runtime.model import CompiledModel

REHEARSAL_TOKENS = 64
"""Calibration tokens of a preflight on its own."""

_DUMP = re.compile(r"\d{3}_[a-z0-9-]+\.txt")
"""Names of the files that :class:`Dumps` writes, and may delete."""


@dataclass(frozen=True)
class CompileOptions:
    """What the command line of a compile can say.

    Attributes:
        model: a ``model.py``, a Hugging Face directory, a ``.gguf`` file or a hub id as ``hf:ORG/NAME``.
        target: what to generate kernels for; several separated by commas.
        out: the directory to write; ``<model name>-lbllm`` by default.
        recipe, preset: see :mod:`lbllm_compile.recipe`.
        pipeline: pipeline text instead of the recipe's.
        calibration: calibration text; the model's own samples by default.
        group, act_bits, kv_bits, keep_dense: override the recipe's.
        device: where calibrations compute and the model samples its calibration text: ``auto``, ``cpu`` or ``cuda``.
        work_dir: where finished layers are kept until the compile is done; ``<out>.lbllm-work`` by default.
        seed: of every random choice.
        dump_dir: where to write the graph after every pass, as text.
        fresh: start over instead of resuming.
    """

    model: str
    target: str = "cpu"
    out: Path | None = None
    recipe: str | None = None
    preset: str | None = None
    pipeline: str | None = None
    calibration: str | None = None
    group: int | None = None
    act_bits: int | None = None
    kv_bits: int | None = None
    keep_dense: tuple[str, ...] = ()
    device: str = "auto"
    work_dir: Path | None = None
    seed: int = 0
    dump_dir: Path | None = None
    print_after: tuple[str, ...] = ()
    time_passes: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        """Takes paths as text and text as paths.

        Raises:
            OptionError: the seed is out of range.
        """
        object.__setattr__(self, "model", str(self.model))
        for name in ("out", "work_dir", "dump_dir"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if not 0 <= self.seed <= MAX_SEED:
            raise recipe.OptionError(f"--seed cannot be {self.seed}; choose 0 to {MAX_SEED}")


@dataclass(frozen=True)
class CompileReport:
    """What a compile did.

    Attributes:
        out: the artifact.
        records: one per pass.
        sheet: sizes, perplexities and speeds, see :func:`lbllm_compile.sheet.measure`.
        resumed: finished pieces taken over from an interrupted compile.
        seconds: wall time by phase.
        peak_memory: most bytes this process has held resident.
    """

    out: Path
    records: list[PassRecord]
    sheet: Mapping[str, Any]
    resumed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "passes": [dataclasses.asdict(r) for r in self.records],
            "sheet": dict(self.sheet),
            "stages": [dataclasses.asdict(v) for v in stages.verdicts(self.records)],
            "resumed": self.resumed,
            "seconds": dict(self.seconds),
            "peak_memory": self.peak_memory,
        }


class Interrupted(KeyboardInterrupt):
    """An interrupt of a compile that had begun.

    Attributes:
        kept: finished pieces of work that the same compile will take over.
    """

    def __init__(self, kept: int):
        super().__init__()
        self.kept = kept


class Clock:
    """Wall time by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class Job:
    """A compile that has been read and checked but not started.

    Attributes:
        choices: recipe, preset and options, the model's own recipe included.
        passes: the pipeline.
        targets: parsed ``options.target``.
        program: the captured model, before the first pass.
        out: where the artifact goes.
        work: where finished pieces of work are kept.
    """

    options: CompileOptions
    model: UserModel
    choices: recipe.Choices
    passes: list[Pass]
    targets: tuple[Target, ...]
    program: Program
    out: Path
    work: Path

    @property
    def preset(self) -> recipe.Preset:
        """How much work."""
        return recipe.preset(self.choices.preset)


def compile(
    options: CompileOptions, *, progress: Progress | None = None, listener: Listener | None = None
) -> CompileReport:
    """Compiles a model and writes the artifact.

    Finished layers are kept in the work directory, so that a compile that was interrupted, even killed, goes on where
    it was when the same command is given again.

    Raises:
        LbllmError: the user's part is wrong, or a check failed; the message is one sentence.
    """
    progress = progress or NoProgress()
    clock = Clock()
    job = prepare(options, progress)
    clock.lap("capture")
    if options.fresh or not checkpoint.finished(job.work):
        probe = calibration.random_probe(job.model, job.program, options.seed)
        _rehearse(job, probe, progress)
        clock.lap("preflight")
    data = calibration_data(job, progress)
    clock.lap("calibration data")
    facts = fingerprint(job, data)
    work = WorkDir(job.work, facts, fresh=options.fresh)
    if kept := sum(work.finished().values()):
        progress.note(f"an interrupted compile goes on: {kept} finished pieces of work are in '{job.work}'")
    try:
        dumps = Dumps(options.dump_dir)
        program, records, history = _transform(job, data, work, dumps, progress, listener)
        clock.lap("passes")
        kernels = build_kernels(
            program,
            job.targets,
            trials=job.preset.tune_trials,
            budget_s=job.preset.tune_seconds,
            progress=progress,
        )
        clock.lap("kernels")
        with workshop() as folder:
            native = build_native(program, kernels.host, folder, progress)
            clock.lap("native program")
            check = sheet.check_outputs(CompiledModel(program, kernels.host, native), data.probe)
            digest = artifact.save(
                program,
                job.out,
                lock=lock(job, facts, data, check),
                history=history,
                passes=[measurements(record) for record in records],
                records=kernels.records,
                sources=kernels.sources,
                binaries=kernels.binaries,
            )
            if native is not None:
                keep_native(native, digest, kernels.host.target.name)
        clock.lap("artifact")
        figures = sheet.measure(job.model, job.out, data, kernels, check, progress)
        clock.lap("speed and size sheet")
    except BaseException as error:
        work.release()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(sum(work.finished().values())) from error
        raise
    work.remove()
    return CompileReport(job.out, records, figures, work.reused, clock.seconds, peak_memory())


def rehearse(options: CompileOptions, progress: Progress | None = None) -> preflight.Rehearsal:
    """Takes one decoder layer of a model through every pass and its kernels, on a few tokens; writes nothing.

    Raises:
        LbllmError: what would stop the compile.
    """
    progress = progress or NoProgress()
    job = prepare(options, progress)
    data = calibration.prepare(
        job.model,
        job.program,
        options.calibration,
        tokens=REHEARSAL_TOKENS,
        validation_tokens=REHEARSAL_TOKENS,
        length=REHEARSAL_TOKENS // 2,
        seed=options.seed,
        device=device_of(options),
        progress=progress,
    )
    return _rehearse(job, data.probe, progress)


def _rehearse(job: Job, probe: Mapping[str, Any], progress: Progress) -> preflight.Rehearsal:
    return preflight.rehearse(
        job.program,
        job.passes,
        probe,
        job.targets,
        seed=job.options.seed,
        device=device_of(job.options),
        progress=progress,
    )


def calibration_data(job: Job, progress: Progress) -> CalibrationSet:
    """The inputs that the passes of a job calibrate on, as many as its preset says."""
    return calibration.prepare(
        job.model,
        job.program,
        job.options.calibration,
        tokens=job.preset.sequences * job.preset.sequence_length,
        validation_tokens=job.preset.validation_sequences * job.preset.sequence_length,
        length=job.preset.sequence_length,
        seed=job.options.seed,
        device=device_of(job.options),
        progress=progress,
    )


def _transform(
    job: Job, data: CalibrationSet, work: WorkDir, dumps: Dumps, progress: Progress, listener: Listener | None
) -> tuple[Program, list[PassRecord], list[tuple[str, Program]]]:
    """Runs the pipeline; returns the lowered program, a record per pass, and ``(pass name, program after it)``."""
    context = PassContext(
        calibration=data.calibration,
        validation=data.validation,
        probe=data.probe,
        target=job.options.target,
        seed=job.options.seed,
        device=device_of(job.options),
        progress=progress,
        checkpoints=work,
    )
    history: list[tuple[str, Program]] = []

    def after_pass(record: PassRecord, before: Program, after: Program) -> None:
        history.append((record.name, after))
        dumps.write(record, after)
        if listener is not None:
            listener(record, before, after)

    program, records = pipeline.run(job.program, job.passes, context, after_pass)
    return program, records, history


def prepare(options: CompileOptions, progress: Progress | None = None) -> Job:
    """Reads everything the user named and captures the model; nothing is written.

    Raises:
        LbllmError: something the user named is missing or wrong.
    """
    for target in parse_targets(options.target):
        if target.kind == "cpu":
            target.check_runs_here()
    if options.out is not None:
        artifact.check_destination(options.out)

    def places(name: str) -> tuple[Path, Path]:
        out = options.out or Path(f"{name}-lbllm")
        artifact.check_destination(out)
        work = options.work_dir or out.with_name(out.name + ".lbllm-work")
        check_apart(out, work, options.dump_dir)
        return out, work

    return capture(options, places, progress or NoProgress())


def capture(options: CompileOptions, places: Callable[[str], tuple[Path, Path]], progress: Progress) -> Job:
    """Reads everything the user named and captures the model.

    Args:
        options: of the compile, or of something like it.
        places: gives the directories for the result and for unfinished work, checked, for a model's name.
        progress: told what goes on.

    Raises:
        LbllmError: something the user named is missing or wrong.
    """
    targets = parse_targets(options.target)
    choices = recipe.choices(options)
    passes = recipe.passes(choices, options.target)
    check_named(options, passes)
    device_of(options)  # a wrong one before the model is read
    with progress.task("reading and capturing the model", 2) as task:
        model = frontend.load(options.model)
        task.advance("read")
        if model.recipe:
            choices = recipe.choices(options, model.recipe)
            passes = recipe.passes(choices, options.target)
        check_print_after(options, passes)
        out, work = places(model.name)
        program = frontend.capture(model)
        task.advance("captured")
    return Job(options, model, choices, passes, targets, program, out, work)


def check_named(options: CompileOptions, passes: Sequence[Pass]) -> None:
    """Checks the calibration text, the directories and the passes to print after, as far as no model is needed.

    Nothing is written, no text is tokenized and the network is not asked.

    Args:
        passes: the pipeline of the command line.

    Raises:
        CalibrationError: the text is missing, of no known kind or unreadable, or a package that reads it is missing.
        WorkDirError: the work directory holds other things or cannot be written.
        LbllmError: the directory for dumps does, or one of the directories lies inside another.
        OptionError: a pass to print after is not in the pipeline.
    """
    if options.calibration is not None:
        texts = calibration.read_texts(options.calibration)
        # The first document says whether the rest can be read. That of a data set comes from the network, unless the
        # package that would fetch it is missing.
        if not options.calibration.startswith("hf:") or importlib.util.find_spec("datasets") is None:
            next(iter(texts), None)
    if options.work_dir is not None:
        checkpoint.check_work_dir(options.work_dir)
    if options.dump_dir is not None:
        check_dump_dir(options.dump_dir)
    check_apart(options.out, options.work_dir, options.dump_dir)
    # A model.py may bring a recipe with another pipeline.
    if options.pipeline is not None or not options.model.endswith(".py"):
        check_print_after(options, passes)


def check_apart(out: Path | None, work: Path | None, dumps: Path | None) -> None:
    """Checks that artifact, work directory and dumps do not lie inside one another; None is not known yet or not asked.

    Raises:
        LbllmError: two of them do.
    """
    roles = {"the artifact": out, "the work directory": work, "the dumps": dumps}
    placed = [(role, path, path.resolve()) for role, path in roles.items() if path is not None]
    for (role, path, place), (other_role, other, other_place) in itertools.combinations(placed, 2):
        if place == other_place or place in other_place.parents or other_place in place.parents:
            raise LbllmError(
                f"{role} '{path}' and {other_role} '{other}' would lie inside one another; choose --out, --work-dir"
                " and --dump-dir apart"
            )


def check_print_after(options: CompileOptions, passes: Sequence[Pass]) -> None:
    """Checks that every pass to print after is run.

    Raises:
        OptionError: one is not in the pipeline.
    """
    names = [p.name for p in passes]
    for name in options.print_after:
        if name not in names:
            raise recipe.OptionError(
                f"--print-after {name}: the pipeline has no pass '{name}'{suggestion(name, names)}; it has"
                f" {', '.join(names)}"
            )


def fingerprint(job: Job, data: CalibrationSet) -> dict[str, str]:
    """Everything that decides the weights of the artifact, hashed or in words."""
    return {
        "model": frontend.fingerprint(job.program),
        "calibration": data.sha256,
        "pipeline": pipeline.render(job.passes, full=True),
        "seed": str(job.options.seed),
        "threads": str(torch.get_num_threads()),
        "device": device_of(job.options).type,
        "version": __version__,
        "torch": torch.__version__,
    }


def lock(job: Job, facts: Mapping[str, str], data: CalibrationSet, check: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``lbllm.lock``: what it takes to repeat the compile, and the tokens it gave."""
    return {
        **facts,
        "source": str(Path(job.model.source).resolve()) if Path(job.model.source).exists() else job.model.source,
        "calibration_source": data.source,
        "recipe": job.choices.recipe,
        "preset": job.choices.preset,
        "target": job.options.target,
        "versions": artifact.versions(),
        "check": dict(check),
    }


def measurements(record: PassRecord) -> dict[str, Any]:
    """What an artifact keeps of a pass: all it measured but times, so that the same compile gives the same bytes."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in record.rows]
    facts = {"name": record.name, "text": record.text, "contract": record.contract}
    return {**facts, "rows": rows, "summary": dict(record.summary)}


def peak_memory() -> int:
    """Most bytes this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_dump_dir(path: Path) -> None:
    """Checks that dumps may be written to ``path``, where earlier dumps are replaced; writes nothing.

    Raises:
        LbllmError: it holds files that are not such dumps, or cannot be written.
    """
    if not checkpoint.check_writable(path, "directory for dumps", "--dump-dir"):
        return
    foreign = sorted(p.name for p in path.iterdir() if not _DUMP.fullmatch(p.name) or not p.is_file())
    if foreign:
        raise LbllmError(f"{path} holds other files ('{foreign[0]}'); pass an empty --dump-dir")


class Dumps:
    """Numbered text files of the graph after every pass, in place of those of an earlier compile.

    Raises:
        LbllmError: the directory holds files that are not such dumps, or cannot be written.
    """

    def __init__(self, directory: Path | None):
        self._directory = directory
        if directory is None:
            return
        check_dump_dir(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.iterdir():
            old.unlink()

    def write(self, record: PassRecord, program: Program) -> None:
        if self._directory is None:
            return
        header = (
            f"after {record.text} ({record.seconds:.1f} s, {record.nodes_before} -> {record.nodes_after} nodes,"
            f" {record.contract}, probe error {record.error:.3g})"
        )
        (self._directory / f"{record.index:03d}_{record.name}.txt").write_text(dump.render(program, header))


def device_of(options: CompileOptions) -> torch.device:
    """Where calibrations compute.

    Raises:
        LbllmError: there is no such device here.
    """
    name = options.device
    if name not in ("auto", "cpu", "cuda"):
        hint = suggestion(name, ("auto", "cpu", "cuda"))
        raise LbllmError(f"--device cannot be '{name}'{hint}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise LbllmError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
