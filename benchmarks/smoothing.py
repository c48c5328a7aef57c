"""What the pass ``smooth`` does for 4-bit activations and keys: what docs/recipes.md shows.

    python -m benchmarks.smoothing --text FILE [--model MODEL] [--calibration FILE] [--chunks 8]

Weights stay float; activations and the KV cache are quantized without clipping, in simulation. So all that is lost is
lost by their rounding. Perplexity, and mean KL divergence from the float model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbllm_compile.codegen.errors import LbllmError

from . import harness

OPTIONS = ((False, 0.0), (True, 0.0), (True, 0.25), (True, 0.5), (True, 1.0))
"""Whether keys are centered, and the strength."""

SEQUENCES, LENGTH = 64, 256
"""Calibration sequences and their tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--model", default="examples/smollm2.py")
    parser.add_argument("--calibration", help="as of a compile; without it the model writes its own")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    options = parser.parse_args()
    try:
        measure(options)
    except LbllmError as error:
        sys.exit(str(error))


def measure(options: argparse.Namespace) -> None:
    """Prints the table."""
    from lbllm_compile.passes import pipeline
    from lbllm_compile.passes.activate import insert_quantizers
    from lbllm_compile.passes.base import PassContext
    from lbllm_compile.passes.smooth import Smooth

    from lbllm_compile import calibration, frontend
    from lbllm_compile.evaluate import Excerpt
    from lbllm_compile.report.terminal import make_progress
    from lbllm_compile.variants import Scorer

    progress = make_progress(harness.CONSOLE)
    model = frontend.load(options.model)
    program = frontend.capture(model)
    data = calibration.prepare(
        model, program, options.calibration, tokens=SEQUENCES * LENGTH, length=LENGTH, progress=progress
    )
    context = PassContext(calibration=data.calibration, probe=data.probe, progress=progress)
    program, _ = pipeline.run(program, pipeline.parse("canonicalize,annotate"), context)
    excerpt = Excerpt.of(program, options.text, options.seq_len, options.chunks)
    scorer = Scorer(program, excerpt.pieces, progress)
    formats = {"A4, KV16": (4, 64, 16), "A4, KV4": (4, 64, 4)}
    print(f"{excerpt.facts}; calibrated on {data.source}\n")
    print(f"| keys | strength | {' | '.join(formats)} |\n|---|---|{'---|' * len(formats)}")
    for centered, strength in OPTIONS:
        item = Smooth(strength=strength, center_keys=centered, sequences=SEQUENCES)
        smoothed = item.apply(program, context).program
        cells = []
        for bits, group, kv in formats.values():
            figures = scorer.score(insert_quantizers(smoothed, bits, group, kv))
            cells.append("not finite" if figures is None else f"{figures['ppl']:.2f} (KL {figures['kld_mean']:.3f})")
        print(f"| {'centered' if centered else 'as they are'} | {strength:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
