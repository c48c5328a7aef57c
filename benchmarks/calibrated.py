"""What benchmarks that quantize a model in simulation begin with: the model, its calibration set, and who scores it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import harness

if TYPE_CHECKING:
    from lbllm_compile.passes.base import PassContext
    from lbllm_compile.passes.ir.program import Program

    from lbllm_compile.variants import Scorer

SEQUENCES, LENGTH = 64, 256
"""Calibration sequences and their tokens."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`prepared` reads."""
    parser.add_argument("--model", default="examples/smollm2.py")
    parser.add_argument("--calibration", help="as of a compile; without it the model writes its own")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`scored` reads beside these, but for the text."""
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)


def prepared(
    options: argparse.Namespace,
    passes: str = "canonicalize,annotate",
    check: Callable[[Program], None] = lambda program: None,
) -> tuple[Program, PassContext, str]:
    """A model behind its first passes.

    Args:
        options: of :func:`add_options`.
        passes: the pipeline's text.
        check: refuses the captured program by raising, before anything is calibrated.

    Returns:
        The program, what passes are given, and where the calibration set is from.
    """
    from lbllm_compile.passes import pipeline
    from lbllm_compile.passes.base import PassContext

    from lbllm_compile import calibration, frontend
    from lbllm_compile.report.terminal import make_progress

    progress = make_progress(harness.CONSOLE)
    model = frontend.load(options.model)
    program = frontend.capture(model)
    check(program)
    data = calibration.collect(
        model, program, options.calibration, tokens=SEQUENCES * LENGTH, length=LENGTH, progress=progress
    )
    context = PassContext(calibration=data.calibration, probe=data.probe, progress=progress)
    program, _ = pipeline.run(program, pipeline.parse(passes), context)
    return program, context, data.source


def scored(options: argparse.Namespace) -> tuple[Program, PassContext, Scorer]:
    """As :func:`prepared`, and what scores programs on a text beside the float one; prints what text that is."""
    from lbllm_compile.evaluate import Excerpt
    from lbllm_compile.variants import Scorer

    program, context, source = prepared(options)
    excerpt = Excerpt.of(program, options.text, options.seq_len, options.chunks)
    scorer = Scorer(program, excerpt.pieces, context.progress)
    print(f"{excerpt.facts}; calibrated on {source}\n")
    return program, context, scorer
