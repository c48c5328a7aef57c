"""Recipes side by side on one model: what each costs, what it leaves of the model, and how fast that runs.

Every recipe is compiled to an artifact of its own, in a process of its own, so that its time and peak memory are its
own. The artifacts are scored on one text by what their kernels compute, and decode in turns. All of it is kept in one
folder: an artifact there that the same compile would give is reused, an interrupted compile goes on where it was, and
figures that were measured are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lbllm_compile import artifact, evaluate, frontend, greedy, recipe
from lbllm_compile.bench import command as bench
from lbllm_compile.bench import decoding
from lbllm_compile.bench.decoders import NATIVE, TORCH, Loading
from lbllm_compile.bench.decoding import Settings
from lbllm_compile.calibration import CalibrationSet
from lbllm_compile.checkpoint import WorkDir, WorkDirError, check_work_dir
from lbllm_compile.codegen.cache import write_atomically
from lbllm_compile.codegen.errors import LbllmError, suggestion
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.threads import thread_count
from lbllm_compile.job import Job, read_job
from lbllm_compile.manifest import is_artifact, read_manifest
from lbllm_compile.native.language import context_length
from lbllm_compile.options import CompileOptions, command_line
from lbllm_compile.passes import pipeline
from lbllm_compile.plain import plain
from lbllm_compile.records import machine
from lbllm_compile.report import terminal
from lbllm_compile.runtime.loader import prepared
from lbllm_compile.version import __version__

COMPARISON = "comparison.json"
"""What was measured, in the folder."""

_WORK = "comparison.lbllm-work"
"""In the folder: figures that are kept until all are there, and for the next comparison."""

_ORIGINAL = "original"


class CompareError(LbllmError):
    """The recipes cannot be compared, or one of them could not be compiled."""


@dataclass(frozen=True)
class Compared:
    """A recipe.

    Attributes:
        recipe: its name.
        directory: the artifact.
        pipeline: its passes as text.
        seconds: wall time of the passes; None where the artifact does not say. Where the compile was ``resumed``, of
            its last run alone.
        resumed: finished pieces of work that this run took over.
        peak_memory: most bytes that the compile held resident; None where the artifact does not say.
        figures: those of :func:`lbllm_compile.evaluate.evaluate` without the text's.
        speed: ``decode`` and ``prefill`` in tokens a second, each a :class:`.bench.turns.Spread`.
    """

    recipe: str
    directory: Path
    pipeline: str
    seconds: float | None
    resumed: int
    peak_memory: int | None
    figures: Mapping[str, Any]
    speed: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The outcome.

    Attributes:
        model: its name.
        calibration: what was calibrated on, in words.
        excerpt: what was scored: ``text``, ``seq_len``, ``chunks``, ``tokens``.
        machine: what it was measured on.
        settings: how many tokens were decoded and read, see :class:`.bench.decoding.Settings`.
        original: speed of the original model in eager torch, float32, as :attr:`Compared.speed`.
        recipes: in the order in which they were named.
        folder: where everything is.
    """

    model: str
    calibration: str
    excerpt: Mapping[str, Any]
    machine: Mapping[str, str]
    settings: Mapping[str, Any]
    original: Mapping[str, Any]
    recipes: Sequence[Compared]
    folder: Path

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        excerpt = document.pop("excerpt")
        return plain({**document, **excerpt})


Compile = Callable[[CompileOptions], None]
"""Compiles, and raises where that fails."""


def compile_apart(options: CompileOptions) -> None:
    """Compiles in a process of its own, whose progress goes to this one's standard error.

    Raises:
        CompareError: it failed; why stands on standard error.
    """
    words = [*shlex.split(command_line(options))[1:], *(["--fresh"] if options.fresh else [])]
    done = subprocess.run([sys.executable, "-m", "lbllm_compile", "compile", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise CompareError(
            f"the recipe '{options.recipe}' could not be compiled; what was printed says why. The same command takes"
            " over what is finished; without the recipe in --recipes it compares the others"
        )


def compare(
    options: CompileOptions,
    recipes: Sequence[str],
    text: Path,
    *,
    seq_len: int | None = None,
    chunks: int = 32,
    progress: Progress | None = None,
    compiles: Compile = compile_apart,
    settings: Settings | None = None,
) -> Comparison:
    """Compiles a model with several recipes, scores and times the artifacts.

    Args:
        options: as for a compile; ``recipe`` has no effect, and ``out`` is the folder for all artifacts, by default
            ``<model name>-compare``. Each is in the subfolder of its recipe's name.
        recipes: names.
        text: a UTF-8 text file to score.
        seq_len: tokens of a chunk; see :func:`lbllm_compile.evaluate.chunk_length`.
        chunks: how many at most, from the start of the text, without overlap.
        progress: told what goes on.
        compiles: makes an artifact.
        settings: how much decoding and prefill is timed, as far as the model's context holds it.

    Raises:
        CompareError: a recipe is unknown, does not fit the options or could not be compiled, or the folder is another
            comparison's.
        EvaluationError: the text cannot be scored, or the model is no language model.
        LbllmError: what would also stop a compile.
    """
    progress = progress or NoProgress()
    _check(options, recipes)
    evaluate.check_numbers(seq_len, chunks)
    evaluate.read_text(text)
    with _chosen_with_recipes():
        for name in recipes:  # a wrong option before the model is read
            recipe.passes(recipe.choices(dataclasses.replace(options, recipe=name)), options.target)
        first = read_job(dataclasses.replace(options, recipe=recipes[0]), progress, _places(options, recipes))
        jobs = {name: _job_of(first, name) for name in recipes}
    excerpt = evaluate.Excerpt.of(first.program, text, seq_len, chunks)
    settings = (settings or Settings()).within(context_length(first.program.config))
    work = _claimed(first)
    try:
        data = first.calibration_data(progress)
        for index, (name, job) in enumerate(jobs.items()):
            _ensure(job, data, f"{name}, recipe {index + 1} of {len(jobs)}", compiles, progress)
            work.save(f"compiled-{name}", 0, {}, {})  # from here on the folder is this model's
        figures = {name: _scores(job, excerpt, work, progress) for name, job in jobs.items()}
        speeds = _speeds(jobs, settings, work, progress)
    finally:
        work.release()
    result = Comparison(
        model=first.model.name,
        calibration=data.source,
        excerpt=excerpt.facts,
        machine=machine(),
        settings=dataclasses.asdict(settings),
        original=speeds[_ORIGINAL],
        recipes=[_compared(name, job, figures[name], speeds[name]) for name, job in jobs.items()],
        folder=first.out,
    )
    document = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
    write_atomically(first.out / COMPARISON, document.encode())
    return result


def _check(options: CompileOptions, recipes: Sequence[str]) -> None:
    """Checks what needs nothing to be read.

    Raises:
        CompareError: the model cannot be named to another process, or a recipe is unknown or named twice.
    """
    if not isinstance(options.model, str):
        raise CompareError("recipes are compiled in processes of their own, so the model must be one that can be named")
    for name in recipes:
        if name not in recipe.RECIPES:
            hint = suggestion(name, recipe.RECIPES)
            raise CompareError(f"there is no recipe '{name}'{hint}; choose {', '.join(recipe.RECIPES)}")
    if not recipes or len(set(recipes)) < len(recipes):
        raise CompareError("--recipes names a recipe twice, or none; give different ones, e.g. lbllm,lbllm-paper")


def _places(options: CompileOptions, recipes: Sequence[str]) -> Callable[[str], tuple[Path, Path]]:
    """The folder of a comparison, and the work directory in it, after checks that nothing of the user's is there."""

    def checked(name: str) -> tuple[Path, Path]:
        folder = options.out or Path(f"{name}-compare")
        if folder.exists() and not folder.is_dir():
            raise CompareError(f"'{folder}' is not a directory; pass another --out")
        if is_artifact(folder):
            raise CompareError(
                f"'{folder}' is an artifact, and artifacts are written into the folder; pass another --out"
            )
        for one in recipes:
            artifact.check_destination(folder / one)
        check_work_dir(folder / _WORK, "--out")
        return folder, folder / _WORK

    return checked


@contextlib.contextmanager
def _chosen_with_recipes() -> Iterator[None]:
    """What an option that does not go with a recipe is told as here.

    Raises:
        CompareError: in its place.
    """
    try:
        yield
    except recipe.RecipeError as error:
        raise CompareError(f"{error.reason}; name others with --recipes") from error


def _job_of(first: Job, name: str) -> Job:
    """The compile of one recipe.

    Raises:
        CompareError: the model brings a pipeline, which takes the place of every recipe's.
    """
    out = first.out / name
    options = dataclasses.replace(first.options, recipe=name, out=out, no_sheet=True)
    choices = recipe.choices(options, first.model.recipe)
    if choices.pipeline is not None:
        raise CompareError("the model brings a pipeline, which takes the place of every recipe's; take it out")
    passes = recipe.passes(choices, options.target)
    return dataclasses.replace(first, options=options, choices=choices, passes=passes, out=out)


def _claimed(first: Job) -> WorkDir:
    """The folder's work directory, before any artifact in it is replaced.

    Raises:
        CompareError: another comparison runs in the folder, or it is that of another model or version.
    """
    facts = {"model": frontend.program_hash(first.program), "version": __version__}
    try:
        return WorkDir(first.out / _WORK, facts, fresh=first.options.fresh, option="--out", holds="a comparison")
    except WorkDirError as error:
        raise CompareError(f"'{first.out}' cannot take this comparison: {error}") from error


def _ensure(job: Job, data: CalibrationSet, title: str, compiles: Compile, progress: Progress) -> None:
    """Compiles, unless the artifact is there that this would give."""
    if not job.options.fresh and is_artifact(job.out):
        facts, stored = {**job.fingerprint(data), "target": job.options.target}, artifact.read_lock(job.out)
        if all(stored.get(name) == value for name, value in facts.items()):
            progress.note(f"{title}: '{job.out}' is what its compile would give, and is reused")
            return
    progress.note(f"{title}: compiling to '{job.out}'")
    compiles(job.options)


def _scores(job: Job, excerpt: evaluate.Excerpt, work: WorkDir, progress: Progress) -> dict[str, Any]:
    """The figures of an artifact on the text, measured now or before."""
    _, digest = read_manifest(job.out)
    stage = f"scores-{digest[:16]}-{excerpt.digest}"
    if done := work.load(stage, 0):
        return done[1]
    progress.note(f"scoring '{job.out}'")
    loaded = artifact.load(job.out)
    context = context_length(loaded.program.config)
    prompts = greedy.prompts(excerpt.pieces, context)
    model = prepared(loaded, progress=progress)
    scores = evaluate.compare(model.logits, evaluate.logits_of(job.model), excerpt.pieces, progress)
    count = evaluate.greedy_length(None, len(prompts[0]), context)
    figures = plain(
        {
            **scores.summary(),
            "intervals": scores.intervals(),
            **evaluate.loop_rates(model, job.model, prompts, count, progress),
            **evaluate.sizes(loaded.program, job.model),
        }
    )
    work.save(stage, 0, {}, figures)
    return figures


def _speeds(jobs: Mapping[str, Job], settings: Settings, work: WorkDir, progress: Progress) -> dict[str, Any]:
    """Decoding and prefill of the original and of every artifact, in turns, measured now or before on this machine."""
    job, threads = next(iter(jobs.values())), thread_count()
    competing = {_ORIGINAL: Loading(TORCH, job.model.source, settings.capacity, threads)}
    competing |= {name: Loading(NATIVE, str(one.out), settings.capacity, threads) for name, one in jobs.items()}
    measured = [machine()["CPU"], str(settings), *(f"{name} {read_manifest(one.out)[1]}" for name, one in jobs.items())]
    stage = "speed-" + hashlib.sha256("\n".join(measured).encode()).hexdigest()[:16]
    if done := work.load(stage, 0):
        return done[1]
    times = decoding.in_turns(competing, settings, progress)
    rows = {name: bench.model_row(name, times[name], (), settings) for name in competing}
    speeds = {name: {"decode": row["decode"], "prefill": row["prefill"]} for name, row in rows.items()}
    work.save(stage, 0, {}, speeds)
    return speeds


def _compared(name: str, job: Job, figures: Mapping[str, Any], speed: Mapping[str, Any]) -> Compared:
    report = artifact.read_report(job.out)
    return Compared(
        recipe=name,
        directory=job.out,
        pipeline=pipeline.render(job.passes),
        seconds=None if report is None else report.seconds.get("passes"),
        resumed=0 if report is None else report.resumed,
        peak_memory=None if report is None else report.peak_memory,
        figures=figures,
        speed=speed,
    )


COLUMNS = (
    "perplexity",
    "KL mean",
    "KL p99",
    "same top token",
    "bits, decoder",
    "bits, all",
    "bytes",
    "calibration",
    "peak memory",
    "decode, tokens/s",
    "prefill, tokens/s",
)


def render(comparison: Comparison) -> list[RenderableType]:
    """The table, for people."""
    figures, settings = comparison.recipes[0].figures, comparison.settings
    ppl = terminal.figure(figures["ppl_teacher"]) + _ends(figures["intervals"]["ppl_teacher"])
    before = [ppl, *[""] * 4, "16", terminal.size(figures["bytes_original"]), "", "", *_speed(comparison.original)]
    rows = [["original", *before], *([one.recipe, *cells(one)] for one in comparison.recipes)]
    facts = comparison.excerpt
    title = (
        f"{comparison.model} on {facts['text']}: {facts['chunks']} chunks of {facts['seq_len']} tokens,"
        f" {facts['tokens']} tokens scored"
    )
    caption = (
        f"Calibrated on {comparison.calibration}. Scored and timed on generated kernels, the original in eager torch,"
        f" float32, on {comparison.machine['CPU']}: {settings['steps']} tokens behind {settings['prompt']}, a prompt of"
        f" {settings['prefill']}, medians of {settings['rounds']} turns. In brackets {evaluate.INTERVAL}s over chunks."
        " KL divergence from the original, in nats; bits a weight as stored; bytes of all weights, the original's in 16"
        " bit; time of the passes and peak memory of the compile."
    )
    kept = f"Kept in {comparison.folder}, with everything as {COMPARISON}."
    return [terminal.table(title, ["", *COLUMNS], rows), Text(caption), Text(kept)]


def cells(one: Compared) -> list[str]:
    """A recipe's figures in the order of ``COLUMNS``."""
    figures, intervals = one.figures, one.figures["intervals"]
    seconds = "" if one.seconds is None else terminal.duration(one.seconds)
    return [
        terminal.figure(figures["ppl"]) + _ends(intervals["ppl"]),
        terminal.figure(figures["kld_mean"]) + _ends(intervals["kld_mean"]),
        terminal.figure(figures["kld_p99"]),
        f"{100 * figures['top1_agreement']:.1f} %",
        terminal.figure(figures["bits_per_weight"]),
        terminal.figure(figures["bits_per_weight_file"]),
        terminal.size(figures["bytes_compiled"]),
        f"{seconds}, resumed" if one.resumed else seconds,
        "" if one.peak_memory is None else terminal.size(one.peak_memory),
        *_speed(one.speed),
    ]


def _ends(interval: Sequence[float] | None) -> str:
    return "" if interval is None else " [" + " to ".join(terminal.figure(end) for end in interval) + "]"


def _speed(speed: Mapping[str, Any]) -> list[str]:
    return [terminal.figure(speed[name]["median"]) for name in ("decode", "prefill")]
