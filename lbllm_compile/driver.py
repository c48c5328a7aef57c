"""``compile()``: the whole job on a page. A model goes in, a directory that runs anywhere comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lbllm_compile import artifact, calibration, checkpoint, fallback, preflight, sheet
from lbllm_compile.calibration import CalibrationSet
from lbllm_compile.checkpoint import WorkDir
from lbllm_compile.codegen.errors import LbllmError, first_line
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.dumps import Dumps
from lbllm_compile.html_report import page
from lbllm_compile.job import Job, read_job
from lbllm_compile.kernels import build_kernels, measured
from lbllm_compile.lowering.build import build_native, keep_native, workshop
from lbllm_compile.options import CompileOptions, command_line
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.pipeline import Listener, PassRecord
from lbllm_compile.records import Clock, CompileReport, MeasuredPass, machine
from lbllm_compile.report.stages import verdicts
from lbllm_compile.resident import peak_memory
from lbllm_compile.runtime.model import CompiledModel

_YOURS = "'{out}' holds a {name} of yours, so the compile's own is not kept"


class Interrupted(KeyboardInterrupt):
    """An interrupt of a compile that had begun.

    Attributes:
        kept: finished pieces of work that the same compile will take over.
    """

    def __init__(self, kept: int):
        super().__init__()
        self.kept = kept


def compile(
    options: CompileOptions,
    *,
    progress: Progress | None = None,
    listener: Listener | None = None,
    check: Callable[[Mapping[str, str]], None] | None = None,
) -> CompileReport:
    """Compiles a model and writes the artifact.

    Finished layers are kept in the work directory, so that a compile that was interrupted, even killed, goes on where
    it was when the same command is given again.

    Args:
        options: what is asked for.
        progress: told what goes on.
        listener: called after every pass.
        check: called with what decides the result (:meth:`.job.Job.fingerprint`) before the passes run, which may take
            long; refuses by raising.

    Raises:
        LbllmError: the user's part is wrong, or a check failed; the message is one sentence.
    """
    progress = progress or NoProgress()
    clock = Clock()
    job = read_job(options, progress)
    if options.fallback:
        fallback.check(job.passes, job.targets)
    clock.lap("capture")
    if options.fresh or not checkpoint.finished(job.work):
        _rehearse(job, calibration.random_probe(job.model, job.program, options.seed), progress)
        clock.lap("preflight")
    data = job.calibration_data(progress)
    clock.lap("calibration data")
    facts = job.fingerprint(data)
    if check is not None:
        check(facts)
    work = WorkDir(job.work, facts, fresh=options.fresh)
    with _released(work), workshop() as folder:
        if kept := sum(work.finished().values()):
            progress.note(f"an interrupted compile goes on: {kept} finished pieces of work are in '{job.work}'")
        timed: list[dict[str, Any]] = []
        if options.fallback:
            passes, timed = fallback.applied(job.program, job.passes, job.targets, job.preset, work, progress)
            job = dataclasses.replace(job, passes=passes)
            facts = job.fingerprint(data)
            clock.lap("choice of what stays float")
        if not kept and (replaced := job.replaced(facts, data)):
            warn(progress, None, replaced)
        program, records, history = _transform(job, data, work, progress, listener)
        clock.lap("passes")
        kernels = build_kernels(
            program,
            job.targets,
            trials=job.preset.tune_trials,
            budget_s=job.preset.tune_seconds,
            progress=progress,
        )
        clock.lap("kernels")
        native = build_native(program, kernels.host, folder, progress)
        clock.lap("native program")
        outputs = sheet.check_outputs(CompiledModel(program, kernels.host, native), data.probe)
        page.discard(job.out)
        digest = artifact.save(
            program,
            job.out,
            lock=job.lock(facts, data, outputs, timed),
            history=history,
            passes=[MeasuredPass.of(record) for record in records],
            records=kernels.records,
            sources=kernels.sources,
            binaries=kernels.binaries,
            places=job.places,
        )
        if native is not None:
            keep_native(native, digest, kernels.host.target)
        clock.lap("artifact")
        figures = sheet.measure(job.model, job.out, data, kernels, outputs, progress, sizes_only=options.no_sheet)
        clock.lap("speed and size sheet")
        report = CompileReport(
            out=job.out,
            records=records,
            verdicts=verdicts(records),
            sheet=figures,
            resumed=work.reused,
            seconds=clock.seconds,
            peak_memory=peak_memory(),
            command=command_line(options),
            machine=machine(),
            kernels=measured(kernels.host),
            fallback=timed,
        )
        if not artifact.write_report(digest, report):
            warn(progress, None, _YOURS.format(out=job.out, name=artifact.REPORT))
        _write_page(job.out, progress)
    work.remove()
    return report


def _write_page(out: Path, progress: Progress) -> None:
    """Puts the page about an artifact beside it.

    The artifact is whole without its page, so what goes wrong with that is said and stops nothing.
    """
    try:
        if not page.write(out, progress):
            warn(progress, None, _YOURS.format(out=out, name=page.PAGE))
    except Exception as error:
        reason = str(error) if isinstance(error, LbllmError) else f"{type(error).__name__}: {first_line(error)}"
        way_out = f"run `lbllm-compile report {shlex.quote(str(out))}` to try again"
        warn(progress, None, f"'{out}' is whole but has no {page.PAGE} ({reason}); {way_out}")


@contextlib.contextmanager
def _released(work: WorkDir) -> Iterator[None]:
    """Lets go of the work directory when what is done meanwhile fails; what is finished stays in it.

    Raises:
        Interrupted: on an interrupt.
    """
    try:
        yield
    except BaseException as error:
        work.release()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(sum(work.finished().values())) from error
        raise


def rehearse(options: CompileOptions, progress: Progress | None = None) -> preflight.Rehearsal:
    """Takes one decoder layer of a model through every pass and its kernels, on a few tokens; writes nothing.

    Raises:
        LbllmError: what would stop the compile.
    """
    progress = progress or NoProgress()
    job = read_job(options, progress)
    return _rehearse(job, job.rehearsal_data(progress).probe, progress)


def _rehearse(job: Job, probe: Mapping[str, Any], progress: Progress) -> preflight.Rehearsal:
    return preflight.rehearse(
        job.program,
        job.passes,
        probe,
        job.targets,
        seed=job.options.seed,
        device=job.device,
        progress=progress,
    )


def _transform(
    job: Job, data: CalibrationSet, work: WorkDir, progress: Progress, listener: Listener | None
) -> tuple[Program, list[PassRecord], list[tuple[str, Program]]]:
    """Runs the pipeline; returns the lowered program, a record per pass, and ``(pass name, program after it)``."""
    context = PassContext(
        calibration=data.calibration,
        validation=data.validation,
        probe=data.probe,
        target=job.options.target,
        seed=job.options.seed,
        device=job.device,
        progress=progress,
        checkpoints=work,
    )
    dumps = Dumps(job.options.dump_dir)
    history: list[tuple[str, Program]] = []

    def after_pass(record: PassRecord, before: Program, after: Program) -> None:
        history.append((record.name, after))
        dumps.write(record, after)
        if listener is not None:
            listener(record, before, after)

    program, records = pipeline.run(job.program, job.passes, context, after_pass)
    return program, records, history
