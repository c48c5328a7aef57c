"""``lbllm-compile bench``: an artifact and what it is compared with, in turns, whole and linear by linear."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lbllm_compile import artifact
from lbllm_compile.bench import decoders, decoding, llama, turns
from lbllm_compile.bench.decoders import LLAMA_CPP, NATIVE, TORCH, TORCH_BF16, Loading
from lbllm_compile.bench.decoding import Settings
from lbllm_compile.bench.turns import Spread
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.errors import LbllmError, suggestion
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.targets import Target, host
from lbllm_compile.codegen.threads import in_words, thread_count, usable_cpus
from lbllm_compile.native.language import context_length
from lbllm_compile.report import terminal

AGAINST = (TORCH, TORCH_BF16, LLAMA_CPP)
"""What an artifact can be compared with."""

_LINEARS = "lbllm_compile.bench.linears"

WHOLE = {
    "decode": ("decode, tokens/s", True),
    "prefill": ("prefill, tokens/s", True),
    "load": ("load, ms", False),
    "memory": ("peak memory, MB", False),
}
"""Figures of a whole model: how they are called, and whether more is better."""

_SHOWN = {"load": 1e3, "memory": 1e-6}
"""What figures are multiplied by where people read them."""


class BenchError(LbllmError):
    """What was asked to be compared cannot be."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        directory: the artifact.
        against: of :data:`AGAINST`.
        threads: numbers of threads, each a measurement of its own; none for as many as kernels use anyway.
        target: what the artifact runs on.
        original: what torch runs, as a compile takes it; by default the artifact's weights in the architecture it was
            compiled from.
        gguf: the file that llama.cpp runs; by default the artifact's weights, exported.
        rounds: turns of each that count.
        quick: too short to mean anything.
    """

    directory: Path
    against: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    target: str = "cpu"
    original: str | None = None
    gguf: Path | None = None
    rounds: int = Settings.rounds
    quick: bool = False

    def __post_init__(self) -> None:
        """Checks what needs no model.

        Raises:
            BenchError: an option cannot be met.
        """
        for name in self.against:
            if name not in AGAINST:
                hint = suggestion(name, AGAINST)
                raise BenchError(f"--against knows no '{name}'{hint}; choose {', '.join(AGAINST)}")
        if min((*self.threads, self.rounds)) < 1:
            raise BenchError("--threads and --rounds must be at least 1")
        if LLAMA_CPP in self.against and (why := llama.missing()):
            raise BenchError(f"llama.cpp is not here to compare with; {why}, or leave it out of --against")
        if self.gguf is not None and LLAMA_CPP not in self.against:
            raise BenchError("--gguf is what llama.cpp runs; add llama.cpp to --against")
        if self.gguf is not None and not self.gguf.is_file():
            raise BenchError(f"there is no file '{self.gguf}' for --gguf")
        if self.original is not None and not {TORCH, TORCH_BF16} & {*self.against}:
            raise BenchError("--original is what torch runs; add torch or torch-bf16 to --against")


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        directory: the artifact.
        machine: what it was measured on.
        settings: tokens and rounds of whole models; None where the artifact is no language model.
        runs: by number of threads: ``threads``; ``models``, a row a contender with the :class:`.turns.Spread` of each
            figure of :data:`WHOLE`, in tokens a second, seconds and bytes; ``linears``, rows of :func:`.linears.rows`.
    """

    directory: Path
    machine: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    runs: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        verdicts = [dataclasses.asdict(verdict) for verdict in verdicts_of(self)]
        return {**dataclasses.asdict(self), "verdicts": verdicts}


@dataclass(frozen=True)
class Verdict:
    """How an artifact compares in one figure.

    Attributes:
        what: is compared, e.g. ``decode`` or ``model.layers.*.mlp.down_proj (576x1536, W(1+1) g64, A4), 1 token``.
        threads: of both.
        against: the contender.
        times_as_fast: its time over the artifact's; of memory, its bytes over the artifact's.
        clear: the middle halves of the measurements lie apart, and there are enough to say so.
        measurements: of the artifact or of the contender, whichever are fewer.
    """

    what: str
    threads: int
    against: str
    times_as_fast: float
    clear: bool
    measurements: int

    @property
    def slower(self) -> bool:
        return self.times_as_fast < 1

    @property
    def doubt(self) -> str:
        """Why the difference may be none; empty where it is clear."""
        if self.clear:
            return ""
        return "within the spread" if self.measurements >= turns.FEWEST_TO_COMPARE else "too few measurements"

    def __str__(self) -> str:
        word = ("MORE: " if self.what == "memory" else "SLOWER: ") if self.slower else ""
        return f"{word}{self.times_as_fast:.2f}x" + (f", {self.doubt}" if self.doubt else "")


def bench(options: BenchOptions, progress: Progress | None = None) -> Report:
    """Measures an artifact, alone or against others.

    Raises:
        BenchError: something cannot be compared here.
        ArtifactError, KernelError, ExportError: the artifact cannot be read, run, or written for the others.
    """
    progress = progress or NoProgress()
    target = Target.parse(options.target)
    if not backend_of(target).searches:
        raise BenchError(
            f"kernels for {target.name} are not timed one by one; `bench DIR --predict` predicts them, or time"
            " the artifact with --target cpu"
        )
    program, config = (artifact.read_object(options.directory, name) for name in ("program.json", "config.json"))
    settings = _settings(options, context_length(config)) if program.get("kind") == "causal-lm" else None
    if settings is None and LLAMA_CPP in options.against:
        raise BenchError(f"'{options.directory}' is no language model, so llama.cpp cannot run it")
    runs = []
    with contextlib.ExitStack() as stack:
        sources = {} if settings is None else stack.enter_context(_sources(options, progress))
        for threads in options.threads or (thread_count(),):
            run: dict[str, Any] = {"threads": threads, "models": []}
            if settings is not None:
                run["models"] = _models(options, sources, settings, threads, progress)
            run["linears"] = _linears(options, settings, threads, progress)
            runs.append(run)
    facts = {"cpu": host.cpu_name()} | (llama.facts() if LLAMA_CPP in options.against else {})
    return Report(options.directory, facts, settings and dataclasses.asdict(settings), runs)


def _settings(options: BenchOptions, context: int | None) -> Settings:
    """How much to measure within a context of so many tokens."""
    quick = {"steps": 4, "prefill": 16, "processes": 1, "pause": 0.0, "warm": False} if options.quick else {}
    return Settings(**{"rounds": options.rounds, **quick}).within(context)


@contextlib.contextmanager
def _sources(options: BenchOptions, progress: Progress) -> Iterator[dict[str, str]]:
    """What each contender loads, by kind; what had to be exported is there as long as the block lasts."""
    sources = {NATIVE: str(options.directory)}
    with contextlib.ExitStack() as stack:
        for name in options.against:
            given = options.gguf if name == LLAMA_CPP else options.original
            sources[name] = str(given) if given else sources.get(TORCH) or sources.get(TORCH_BF16) or ""
            if given is None and (name == LLAMA_CPP or not sources[name]):
                sources[name] = str(stack.enter_context(_exported(options.directory, name == LLAMA_CPP, progress)))
        yield sources


@contextlib.contextmanager
def _exported(directory: Path, for_llama: bool, progress: Progress) -> Iterator[Path]:
    """The weights of an artifact as other engines read them.

    Raises:
        BenchError: the artifact cannot be written so; says which option names a model that takes its place.
    """
    # torch takes seconds to import
    from lbllm_compile import export
    from lbllm_compile.passes.ir import spool

    form, name, option = "hf-dense", "model", "--original MODEL"
    if for_llama:
        form, name, option = "gguf", "model.gguf", "--gguf FILE"
    with tempfile.TemporaryDirectory(prefix="lbllm-bench-", dir=spool.directory()) as folder:
        try:
            with progress.task(f"writing the weights as {form}", 1) as task:
                export.export(directory, form, Path(folder) / name)
                task.advance()
        except export.ExportError as error:
            raise BenchError(f"{error}; or name what to compare with as {option}") from error
        yield Path(folder) / name


def _models(
    options: BenchOptions, sources: Mapping[str, str], settings: Settings, threads: int, progress: Progress
) -> list[dict[str, Any]]:
    """A row a contender, the artifact first."""
    competing = {
        kind: Loading(kind, source, settings.capacity, threads, options.target) for kind, source in sources.items()
    }
    # A program that is not stored yet is prepared here, where nothing is measured.
    with decoders.Child(competing[NATIVE]):
        pass
    fresh = decoding.fresh_processes(competing, settings, progress)
    times = decoding.in_turns(competing, settings, progress)
    return [model_row(name, times[name], fresh[name], settings) for name in competing]


def model_row(
    name: str, times: decoding.Times, fresh: Sequence[Mapping[str, Any]], settings: Settings
) -> dict[str, Any]:
    """The figures of :data:`WHOLE` of a contender, JSON-able; memory is left out where the system does not tell."""
    figures = {
        "decode": [1 / statistics.median(steps) for steps in times.rounds],
        "prefill": [settings.prefill / second for second in times.prefill],
        "load": [row["load_seconds"] for row in fresh],
        "memory": [row["peak"] for row in fresh if "peak" in row],
    }
    return {"contender": name} | {
        what: dataclasses.asdict(Spread.of(values)) for what, values in figures.items() if values
    }


def _linears(
    options: BenchOptions, settings: Settings | None, threads: int, progress: Progress
) -> list[Mapping[str, Any]]:
    """Rows of :func:`.linears.rows`, made in a child process of so many threads."""
    against = [name for name in options.against if name != LLAMA_CPP]
    request = {
        "directory": str(options.directory),
        "target": options.target,
        "tokens": sorted({1, settings.prefill if settings else Settings.prefill}),
        "against": against,
        "quick": options.quick,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", _LINEARS],
        env=turns.environment(threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout
    rows: list[Mapping[str, Any]] = []
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.close()
        first = json.loads(child.stdout.readline() or "{}")
        with progress.task(f"linears in turns, {in_words(threads)}", first.get("linears", 1)) as task:
            for line in child.stdout if "linears" in first else ():
                row = json.loads(line)
                if "failure" in row:
                    raise LbllmError(row["failure"])
                rows.append(row)
                task.advance(f"{row['shape']}, {row['tokens']} tokens")
        if "failure" in first:
            raise LbllmError(first["failure"])
        if child.wait() or len(rows) < first.get("linears", 1):
            raise LbllmError("the process that times linears ended; what it printed says why")
    except BaseException:
        child.terminate()
        raise
    finally:
        child.stdout.close()
        child.wait()
    return rows


def verdicts_of(report: Report) -> list[Verdict]:
    """How the artifact compares with every contender, in every figure."""
    found = []
    for run in report.runs:
        for row in run["models"][1:]:
            found += _model_verdicts(run, row).values()
        for row in run["linears"]:
            found += _linear_verdicts(run, row).values()
    return found


def _model_verdicts(run: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Verdict]:
    """How the artifact compares with one contender, by figure."""
    own = run["models"][0]
    return {
        what: _verdict(what, run["threads"], other["contender"], own[what], other[what], more_is_better)
        for what, (_, more_is_better) in WHOLE.items()
        if what in own and what in other
    }


def _linear_verdicts(run: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Verdict]:
    """How one linear compares, by contender."""
    seconds = row["seconds"]
    what = f"{', '.join(row['linears'])} ({row['shape']}, {row['computed']}), {_tokens(row['tokens'])}"
    return {
        name: _verdict(what, run["threads"], name, seconds["own"], seconds[name], False)
        for name in AGAINST
        if name in seconds
    }


def _verdict(
    what: str, threads: int, against: str, own: Mapping[str, Any], other: Mapping[str, Any], more_is_better: bool
) -> Verdict:
    ratio = own["median"] / other["median"]
    clear, fewest = Spread(**own).apart(Spread(**other)), min(own["count"], other["count"])
    return Verdict(what, threads, against, ratio if more_is_better else 1 / ratio, clear, fewest)


def render(report: Report) -> list[RenderableType]:
    """The figures for people: a table of whole models and one of linears for each number of threads, then where the
    artifact is slower."""
    verdicts = verdicts_of(report)
    parts: list[RenderableType] = []
    for run in report.runs:
        if run["models"]:
            parts += [_models_table(report, run), Text()]
        parts += [_linears_table(run), Text()]
    if report.settings is None:
        parts.append(Text("Only language models decode, so the model as a whole was not timed."))
    slower = [v for v in verdicts if v.slower]
    parts += [Text(_sentence(v)) for v in slower]
    if verdicts and not slower:
        parts.append(Text("Slower or larger than what it was compared with: in nothing."))
    return parts


def _sentence(verdict: Verdict) -> str:
    """E.g. ``SLOWER: decode with 2 threads is 0.83 times as fast as torch-bf16 (within the spread)``."""
    doubt = f" ({verdict.doubt})" if verdict.doubt else ""
    with_threads = in_words(verdict.threads)
    if verdict.what == "memory":
        return f"MORE: memory with {with_threads} is {1 / verdict.times_as_fast:.2f} times {verdict.against}'s{doubt}"
    fast = f"{verdict.times_as_fast:.2f} times as fast as {verdict.against}"
    return f"SLOWER: {verdict.what} with {with_threads} is {fast}{doubt}"


def _models_table(report: Report, run: Mapping[str, Any]) -> Any:
    settings = report.settings or {}
    rows = []
    for index, row in enumerate(run["models"]):
        verdicts = _model_verdicts(run, row) if index else {}
        cells = []
        for what in WHOLE:
            verdict = f" ({verdicts[what]})" if what in verdicts else ""
            cells.append(_cell(row.get(what), _SHOWN.get(what, 1.0)) + verdict)
        rows.append([str(report.directory) if row["contender"] == NATIVE else row["contender"], *cells])
    title = (
        f"{in_words(run['threads'])}: {settings['steps']} tokens behind {settings['prompt']}, a prompt of"
        f" {settings['prefill']}; medians and quartiles (how many times better the artifact is)"
    )
    return terminal.table(title, ["", *(name for name, _ in WHOLE.values())], rows)


def _linears_table(run: Mapping[str, Any]) -> Any:
    others = [name for name in AGAINST if any(name in row["seconds"] for row in run["linears"])]
    rows = []
    for row in run["linears"]:
        seconds, share, verdicts = row["seconds"], row["roofline_share"], _linear_verdicts(run, row)
        rows.append(
            [
                ", ".join(row["linears"]),
                row["shape"],
                row["computed"],
                row["count"],
                row["tokens"],
                _cell(seconds["own"], 1e6),
                _cell(seconds.get("kernel"), 1e6),
                "" if share is None else f"{100 * share:.0f} %",
                *(f"{_cell(seconds[name], 1e6)} ({verdicts[name]})" for name in others),
            ]
        )
    title = f"{in_words(run['threads'])}: distinct linears, microseconds a call; medians and quartiles"
    columns = ["linear", "shape", "computed", "times", "tokens", "whole", "kernel", "of the roofline", *others]
    return terminal.table(title, columns, rows)


def _cell(spread: Mapping[str, Any] | None, scale: float) -> str:
    """E.g. ``412 [400 to 431]``; empty where nothing was measured."""
    if spread is None:
        return ""
    middle, lower, upper = (_digits(scale * spread[name]) for name in ("median", "lower", "upper"))
    return middle if lower == upper else f"{middle} [{lower} to {upper}]"


def _digits(value: float) -> str:
    """Three significant digits and no exponent, e.g. ``0.123``, ``12.3``, ``1234``."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def threads_from(text: str | None) -> tuple[int, ...]:
    """Numbers of threads from ``1,2``.

    Raises:
        BenchError: it is no list of numbers.
    """
    if text is None:
        return ()
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise BenchError(f"--threads cannot be '{text}'; give numbers joined by commas, e.g. 1,2") from error
    most = usable_cpus()
    if max(counts) > most:
        raise BenchError(f"--threads cannot be {max(counts)}: this process may use {most} of the CPUs here")
    return counts
