"""How good a compiled model is, stage by stage: perplexity and divergence from the float model, time and peak memory.

    python -m benchmarks.quality --text FILE [--model MODEL] [--calibration FILE] [--preset default] [--json FILE]
    python -m benchmarks.quality --text FILE --pipeline TEXT [--pipeline TEXT …]

Without ``--pipeline`` the rows are those of the recipe ``lbllm``, with it one in simulation for each, which must have a
``ptq``. Rows *in simulation* run a pipeline's program in float32 with simulated quantization; the rows of the
*artifact* compile one and evaluate it on its kernels. A row is measured in a process of its own, which takes the passes
that earlier rows have finished from the work directory; its time is that of all its passes, its memory the most that
any process held which ran one of them. An artifact is compiled from the start. Interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.threads import in_words

from lbllm_compile.bench import turns

from . import harness

if TYPE_CHECKING:
    from lbllm_compile.passes.base import Pass

FIGURES = ("ppl", "ppl_teacher", "kld_mean", "kld_p99", "top1_agreement")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: what it shows.
        pipeline: text of the passes.
        compiled: whether an artifact is compiled and evaluated, rather than the simulated program.
    """

    name: str
    pipeline: str
    compiled: bool = False


def recipe_passes(preset: str, group: int | None = None) -> list[Pass]:
    """The passes of the default recipe, for a group size other than its own where one is given."""
    from lbllm_compile import recipe

    return recipe.passes(recipe.Choices(preset=preset, group=group), "cpu")


def rows(preset: str, group: int) -> Iterator[Row]:
    """The rows for one group size.

    The stages alone with float activations; what quantized activations and a KV cache of 4 bits cost untrained; the
    recipe, what an int8 head adds, and scales per token instead of per group; the artifact.
    """
    from lbllm_compile.passes import pipeline

    from lbllm_compile.ablate import Parts

    passes = recipe_passes(preset, group)
    parts = Parts.of(passes)
    given = next(item for item in passes if item.name == "activate")
    trained = (parts.ptq, parts.distill)
    untrained = parts.quantize
    # As in the recipe, or tuned on the whole output where the recipe does not do so itself.
    four = replace(untrained, **{name: getattr(given, name) for name in ("epochs", "steps")})

    def simulated(name: str, *items: Pass) -> Row:
        return Row(f"g{group}, {name}", pipeline.render([*parts.preparation, *items]))

    yield simulated("A16, stage 1 alone", parts.ptq)
    yield simulated("A16, stages 1 and 2", *trained)
    yield simulated("A16, stages 1 and 2, finetune", *trained, parts.finetune)
    yield simulated("the same with A8", *trained, parts.finetune, replace(untrained, bits=8, kv=16, ranges="clip"))
    yield simulated("A4, KV16, stages 1 and 2", *trained, replace(untrained, kv=16))
    yield simulated("A4, KV4, stages 1 and 2", *trained, untrained)
    yield simulated("A4, KV4, all stages", *trained, four, parts.finetune)
    yield simulated("A4, KV4, all stages, int8 head", *trained, four, parts.finetune, pipeline.make("head", {}))
    for scales, at in (("", given.group), (" per token", 0)):
        for ranges in ("clip", "knees"):
            if (at, ranges) != (given.group, given.ranges):
                other = replace(four, group=at, ranges=ranges)
                yield simulated(f"A4{scales}, {ranges}, KV4, all stages", *trained, other, parts.finetune)
    yield Row(f"g{group}, artifact of --preset {preset}", pipeline.render(passes), compiled=True)


def measure_here(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """A row in simulation, in this process."""
    from lbllm_compile.passes import pipeline

    from lbllm_compile import ablate, evaluate
    from lbllm_compile.job import read_job
    from lbllm_compile.options import CompileOptions
    from lbllm_compile.report.terminal import make_progress
    from lbllm_compile.variants import Study

    progress = make_progress(harness.CONSOLE)
    chosen = CompileOptions(
        options.model,
        preset=options.preset,
        calibration=options.calibration,
        seed=options.seed,
        work_dir=options.work / "stages",
    )
    job = read_job(chosen, progress, ablate.places(chosen))
    excerpt = evaluate.Excerpt.of(job.program, options.text, options.seq_len, options.chunks)
    passes = pipeline.parse(row.pipeline)
    preparation = ablate.Parts.of(passes).preparation
    study = Study(job, preparation, excerpt, progress)
    try:
        measured = study.measure(passes[len(preparation) :])
    finally:
        study.work.release()
    found = {"seconds": measured.seconds, "peak_memory": measured.peak_memory, "calibration": study.calibration}
    return {**excerpt.facts, **found, **(measured.figures or dict.fromkeys(FIGURES))}


def measure_artifact(row: Row, options: argparse.Namespace, index: int) -> dict[str, Any]:
    """A row of an artifact, which is compiled where it is not there yet, and evaluated on its kernels."""
    out = options.work / f"artifact-{index}"
    record = options.work / f"artifact-{index}.json"
    if not record.is_file():
        command = ["compile", options.model, "--pipeline", row.pipeline, "--preset", options.preset, "--out", str(out)]
        command += ["--seed", str(options.seed), "--json"]
        command += ["--calibration", options.calibration] if options.calibration else []
        report = json.loads(_output(["-m", "lbllm_compile", *command]))
        found = {"seconds": sum(report["seconds"].values()), "peak_memory": report["peak_memory"]}
        record.write_text(json.dumps(found))
    command = ["eval", str(out), "--text", str(options.text), "--chunks", str(options.chunks), "--json"]
    command += ["--seq-len", str(options.seq_len), "--teacher", options.model]
    figures = json.loads(_output(["-m", "lbllm_compile", *command]))
    return {**figures, **json.loads(record.read_text())}


def _output(arguments: Sequence[str]) -> str:
    """What a child process writes to stdout."""
    done = subprocess.run(
        [sys.executable, *arguments], env=turns.environment(_threads()), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _threads() -> int:
    from lbllm_compile.codegen.threads import thread_count

    return thread_count()


def markdown(document: Mapping[str, Any]) -> str:
    """The table."""
    facts = document["rows"][0]
    calibration = facts.get("calibration", "what the command names")
    lines = [
        f"{document['model']}, preset {document['preset']}, seed {document['seed']}, {in_words(document['threads'])};"
        f" {facts['text']}: {facts['chunks']} chunks of {facts['seq_len']} tokens, {facts['tokens']} tokens scored;"
        f" calibrated on {calibration}. Perplexity of the float model: {facts['ppl_teacher']:.3f}.",
        "",
        "| | measured | perplexity | KL mean | KL p99 | same top token | time | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        where = "artifact" if row["compiled"] else "simulation"
        lines.append(f"| {row['name']} | {where} | {' | '.join(_cells(row))} |")
    lines += ["", "The pipelines:", ""]
    lines += [f"* {row['name']}: `{row['pipeline']}`" for row in document["rows"]]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["ppl"] is None:
        figures = ["diverged", "", "", ""]
    else:
        figures = [f"{row['ppl']:.2f}", f"{row['kld_mean']:.4f}", f"{row['kld_p99']:.3f}"]
        figures.append(f"{100 * row['top1_agreement']:.1f} %")
    spent = ["", ""]
    if row["seconds"] is not None:
        spent = [f"{row['seconds'] / 60:.1f} min", f"{row['peak_memory'] / 1e9:.2f} GB"]
    return [*figures, *spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--model", default="examples/smollm2.py")
    parser.add_argument("--calibration", help="as of a compile; without it the model writes its own")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="where everything finished is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument(
        "--pipeline", action="append", metavar="TEXT", help="a row in simulation, in place of those of the recipe"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="the rows whose names hold this text")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        wanted = wanted_rows(options)
        if options.child is not None:
            print(json.dumps(measure_here(wanted[options.child], options)))
            return
        document = _measure(wanted, options)
    except LbllmError as error:
        sys.exit(str(error))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(markdown(document))


def wanted_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for.

    Raises:
        LbllmError: a pipeline's text is wrong, or it has no ``ptq``.
    """
    from lbllm_compile.passes import pipeline

    if options.pipeline:
        given = {text: pipeline.parse(text) for text in options.pipeline}
        for text, passes in given.items():
            if all(item.name != "ptq" for item in passes):
                raise LbllmError(
                    f"--pipeline '{text}' has no 'ptq', which a row begins with; write one behind 'observe', as in"
                    " --pipeline 'canonicalize,annotate,observe,ptq{group=64}'"
                )
        return [Row(text, pipeline.render(given[text])) for text in options.pipeline]
    return [row for group in options.groups for row in rows(options.preset, group)]


def _measure(wanted: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    document = {"model": options.model, "preset": options.preset, "seed": options.seed, "threads": _threads()}
    document["rows"] = []
    for index, row in enumerate(wanted):
        if options.only not in row.name:
            continue
        start = time.monotonic()
        if row.compiled:
            figures = measure_artifact(row, options, index)
        else:
            own = ["-m", "benchmarks.quality", *sys.argv[1:], "--child", str(index)]
            figures = json.loads(_output(own).strip().splitlines()[-1])
        document["rows"].append({"name": row.name, "compiled": row.compiled, "pipeline": row.pipeline, **figures})
        harness.CONSOLE.print(f"[dim]{row.name}: {time.monotonic() - start:.0f} s[/dim]")
    if not document["rows"]:
        raise LbllmError(f"no row's name holds '{options.only}'; they are {', '.join(row.name for row in wanted)}")
    return document


if __name__ == "__main__":
    main()
