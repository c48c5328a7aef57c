"""What each part of the recipe earns: the ablations of the paper (LBLLM, arXiv 2604.19167) on a given model.

Every variant is a pipeline made of the recipe's own passes with one thing changed, and is scored on the same text
against the float model, on the simulated program: integer arithmetic and kernels play no part, and *A16* stands for
activations that are not quantized at all. Variants that begin alike share their beginning
(:mod:`lbllm_compile.variants`), and everything finished is kept in the work directory: a rerun takes it over, and may
ask for other comparisons.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import RenderableType
from rich.text import Text

from lbllm_compile import evaluate, recipe
from lbllm_compile.checkpoint import check_work_dir
from lbllm_compile.codegen.errors import LbllmError, suggestion
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.job import Places, read_job
from lbllm_compile.options import CompileOptions
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.activate import Activate
from lbllm_compile.passes.base import Pass
from lbllm_compile.passes.distill import Distill
from lbllm_compile.passes.finetune import Finetune
from lbllm_compile.passes.outliers import Outliers
from lbllm_compile.passes.ptq import Ptq
from lbllm_compile.report import terminal
from lbllm_compile.variants import Measured, Study

PROPAGATED = 0.5
"""How far weights move to make up for the errors in front of them, where that is compared."""


class AblationError(LbllmError):
    """There is no such comparison, or the recipe has nothing to compare."""


@dataclass(frozen=True)
class Parts:
    """The calibrating passes of a recipe, each doing some work, and what comes before them.

    Attributes:
        preparation: the passes in front of ``ptq``.
        ptq, distill, finetune: as the recipe has them, or at their defaults where it has none or one without steps.
        quantize: ``activate`` without training.
        activate: ``activate`` with training.
    """

    preparation: tuple[Pass, ...]
    ptq: Ptq
    distill: Distill
    quantize: Activate
    activate: Activate
    finetune: Finetune

    @classmethod
    def of(cls, passes: Sequence[Pass]) -> Parts:
        """Takes a pipeline apart.

        Raises:
            AblationError: it has no ``ptq``.
        """
        position = next((i for i, item in enumerate(passes) if isinstance(item, Ptq)), None)
        if position is None:
            raise AblationError("the model's pipeline has no 'ptq', so there is nothing to compare; leave it out")
        ptq = typing.cast(Ptq, passes[position])
        activate = _first(passes, Activate(group=ptq.group))
        return cls(
            preparation=tuple(passes[:position]),
            ptq=ptq,
            distill=_training(_first(passes, Distill()), "epochs"),
            quantize=dataclasses.replace(activate, epochs=0, steps=0),
            activate=_training(activate, "epochs", "steps"),
            finetune=_training(_first(passes, Finetune()), "steps"),
        )


P = TypeVar("P", bound=Pass)


def _first(passes: Sequence[Pass], default: P) -> P:
    """The first pass of the default's type, or the default."""
    return next((item for item in passes if isinstance(item, type(default))), default)


def _training(item: P, *counts: str) -> P:
    """The pass with some training to do: where all ``counts`` are 0, with their defaults."""
    if any(getattr(item, count) for count in counts):
        return item
    return dataclasses.replace(item, **{count: getattr(type(item), count) for count in counts})


@dataclass(frozen=True)
class Comparison:
    """Pipelines that differ in one thing.

    Attributes:
        name: what ``--only`` calls it.
        title: what differs.
        variants: pipelines behind the preparation, by what sets them apart.
    """

    name: str
    title: str
    variants: Mapping[str, tuple[Pass, ...]]


def comparisons(parts: Parts) -> list[Comparison]:
    """All comparisons, from the passes of a recipe."""

    ptq, distill, finetune = parts.ptq, parts.distill, parts.finetune
    quantize, activate = parts.quantize, parts.activate
    starts = {
        "RTN": dataclasses.replace(ptq, init="rtn", compensate=False, propagate=0.0),
        "EM": dataclasses.replace(ptq, init="em", compensate=False, propagate=0.0),
        "EM+GPTQ": dataclasses.replace(ptq, init="em", compensate=True, propagate=0.0),
        "EM+GPTQ+QEP": dataclasses.replace(ptq, init="em", compensate=True, propagate=ptq.propagate or PROPAGATED),
    }
    # A16 is the name of activations that are not quantized at all.
    bits = "int16" if quantize.bits == 16 else f"A{quantize.bits}"
    first = starts["EM+GPTQ+QEP" if ptq.propagate else "EM+GPTQ"]
    trained = (first, distill)

    def scaled(item: Activate, group: int, ranges: Literal["clip", "knees"] = "clip") -> tuple[Pass, ...]:
        return (*trained, dataclasses.replace(item, group=group, ranges=ranges))

    ranges = {
        "none (A16)": trained,
        f"{bits}, group scales": scaled(quantize, ptq.group),
        f"{bits}, group scales, clip": scaled(activate, ptq.group),
        f"{bits}, token scales": scaled(quantize, 0),
        f"{bits}, token scales, clip": scaled(activate, 0),
    }
    if quantize.bits == 4:  # others have none
        for name, group in (("group", ptq.group), ("token", 0)):
            ranges[f"{bits}, {name} scales, knees"] = scaled(activate, group, "knees")
    plain = dataclasses.replace(first, outliers=False)
    outliers = Comparison(
        "outliers",
        "the loudest channels of inputs",
        {
            f"{name}, {level}": (item, *tail)
            for name, item in (("as all others", plain), ("8 bits", first))
            for level, tail in (("A16", ()), (bits, (quantize,)))
        },
    )
    tuned = Comparison(
        "tuned",
        f"what tuning on the whole model's output trains ({bits})",
        {
            "levels and ranges": (*trained, activate, dataclasses.replace(finetune, lr_norms=0.0)),
            "norms and biases, too": (*trained, activate, finetune),
        },
    )
    moved = any(isinstance(item, Outliers) and item.columns for item in parts.preparation)
    return [
        *([outliers] if moved else []),
        Comparison(
            "weights",
            "stage 1: how planes and levels are fitted",
            {
                f"{name}, {level}": (item, *tail)
                for name, item in starts.items()
                for level, tail in (("A16", ()), (bits, (quantize,)))
            },
        ),
        Comparison(
            "distill",
            "stage 2",
            {
                f"{'on' if tail else 'off'}, {level}": (first, *tail, *more)
                for tail in ((), (distill,))
                for level, more in (("A16", ()), (bits, (quantize,)))
            },
        ),
        Comparison(
            "trained",
            "what stage 2 trains",
            {
                "nothing": (first,),
                "levels alone": (first, dataclasses.replace(distill, lr_weight=0.0, lr_bitmap=0.0)),
                "planes alone": (first, dataclasses.replace(distill, lr_levels=0.0)),
                "planes and levels": trained,
            },
        ),
        Comparison(
            "joint",
            f"when activations are quantized ({bits})",
            {
                "after stage 2": (*trained, quantize),
                "before stage 2: joint training": (first, quantize, distill),
            },
        ),
        Comparison("activations", "stage 3: scales and ranges of activations", ranges),
        Comparison(
            "finetune",
            "tuning on the whole model's output",
            {
                "off, A16": trained,
                "on, A16": (*trained, finetune),
                f"off, {bits}": (*trained, activate),
                f"on, {bits}": (*trained, activate, finetune),
            },
        ),
        *([tuned] if finetune.lr_norms else []),
    ]


@dataclass(frozen=True)
class Ablation:
    """The outcome.

    Attributes:
        model: its name.
        calibration: what was calibrated on, in words.
        excerpt: what was scored: ``text``, ``seq_len``, ``chunks``, ``tokens``.
        original: figures of the float model.
        results: of every comparison that was asked for, by the variants' names.
        work: where everything is kept.
    """

    model: str
    calibration: str
    excerpt: Mapping[str, Any]
    original: Measured
    results: Sequence[tuple[Comparison, Mapping[str, Measured]]]
    work: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "calibration": self.calibration,
            **self.excerpt,
            "original": self.original.to_json(),
            "comparisons": [
                {
                    "name": comparison.name,
                    "title": comparison.title,
                    "variants": [{"variant": name, **m.to_json()} for name, m in measured.items()],
                }
                for comparison, measured in self.results
            ],
            "work_dir": str(self.work),
        }


def ablate(
    options: CompileOptions,
    text: Path,
    *,
    seq_len: int | None = None,
    chunks: int = 32,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Ablation:
    """Runs and scores the variants.

    Args:
        options: as for a compile; what concerns kernels and the artifact has no effect.
        text: a UTF-8 text file to score.
        seq_len: tokens of a chunk; see :func:`lbllm_compile.evaluate.chunk_length`.
        chunks: how many at most, from the start of the text, without overlap.
        only: names of comparisons; all by default.
        progress: told what goes on.

    Raises:
        AblationError: there is no comparison of a name.
        EvaluationError: the text cannot be scored, or the model is no language model.
        WorkDirError: the work directory holds an ablation of something else.
        LbllmError: what would also stop a compile.
    """
    progress = progress or NoProgress()
    evaluate.check_numbers(seq_len, chunks)
    evaluate.read_text(text)
    chosen_of(comparisons(Parts.of(recipe.passes(recipe.choices(options), options.target))), only)
    job = read_job(options, progress, places(options))
    parts = Parts.of(job.passes)
    chosen = chosen_of(comparisons(parts), only)
    excerpt = evaluate.Excerpt.of(job.program, text, seq_len, chunks)
    study = Study(job, parts.preparation, excerpt, progress)
    try:
        pipelines = list(dict.fromkeys(p for comparison in chosen for p in comparison.variants.values()))
        # In this order pipelines that begin alike follow one another.
        pipelines.sort(key=pipeline.render)
        with progress.task("ablation", 1 + len(pipelines)) as task:
            original = study.measure(())
            task.advance()
            measured = {}
            for passes in pipelines:
                measured[passes] = study.measure(passes)
                task.advance(pipeline.render(passes))
    finally:
        study.work.release()
    results = [(c, {name: measured[passes] for name, passes in c.variants.items()}) for c in chosen]
    return Ablation(job.model.name, study.calibration, excerpt.facts, original, results, job.work)


def chosen_of(known: Sequence[Comparison], names: Sequence[str]) -> list[Comparison]:
    """The comparisons of some names, in their own order; all where there are none.

    Raises:
        AblationError: a name is unknown.
    """
    for name in names:
        if name not in [c.name for c in known]:
            hint = suggestion(name, [c.name for c in known])
            raise AblationError(f"there is no comparison '{name}'{hint}; choose {', '.join(c.name for c in known)}")
    return [c for c in known if not names or c.name in names]


def places(options: CompileOptions) -> Places:
    """Where an ablation keeps what is finished: ``NAME-ablation.lbllm-work`` unless named."""

    def checked(name: str) -> tuple[Path, Path]:
        work = options.work_dir or Path(f"{name}-ablation.lbllm-work")
        check_work_dir(work)
        return Path(f"{name}-ablation"), work

    return checked


COLUMNS = ("perplexity", "KL mean", "KL p99", "same top token", "time")


def render(ablation: Ablation) -> list[RenderableType]:
    """The table, for people."""
    facts = ablation.excerpt
    rows: list[Sequence[Any]] = [["", "float model", *cells(ablation.original)]]
    for comparison, measured in ablation.results:
        rows.append([comparison.name, comparison.title, *[""] * len(COLUMNS)])
        rows += [["", f"  {name}", *cells(m)] for name, m in measured.items()]
    caption = (
        f"{facts['text']}: {facts['chunks']} chunks of {facts['seq_len']} tokens, {facts['tokens']} tokens scored;"
        f" simulated programs in float32; calibrated on {ablation.calibration}."
        " A16: activations not quantized. KL divergence from the float model, in nats. Time: of the variant's passes,"
        " those it shares with others included."
    )
    table = terminal.table(f"Ablation of {ablation.model}", ["", "", *COLUMNS], rows)
    return [table, Text(caption), Text(f"Kept in {ablation.work}; delete it when done.")]


def cells(measured: Measured) -> list[str]:
    """A row's figures in the order of ``COLUMNS``."""
    time = "" if measured.seconds is None else terminal.duration(measured.seconds)
    if measured.figures is None:
        return ["diverged", "", "", "", time]
    figures = measured.figures
    values = [terminal.figure(figures[name]) for name in ("ppl", "kld_mean", "kld_p99")]
    return [*values, f"{100 * figures['top1_agreement']:.1f} %", time]
