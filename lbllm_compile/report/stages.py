"""Whether the training stages did their part, judged by what they measured on held-out sequences.

Stage 2 should lower the reconstruction error of most layers markedly, and change planes in doing so: an error that
falls while no sign and no bitmap flips has another cause. What follows, stage 3 and ``finetune``, should bring the
whole model's output closer to the original's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbllm_compile.passes.calibrate.alignment import MEASURES
from lbllm_compile.passes.distill import layers_better, with_planes
from lbllm_compile.passes.pipeline import PassRecord
from lbllm_compile.records import Verdict
from lbllm_compile.report import terminal

LAYER_GAIN = 0.10
"""Share of its error that stage 2 should take from a layer."""

WAY_OUT = (
    "a larger --preset and text like the model's own (--calibration) give training more to go by; with random weights"
    " there is nothing to win"
)
"""What to do about a stage that did not do its part."""

LAYER_SHARE = 0.80
"""Share of the layers of which it should."""


def verdicts(records: Iterable[PassRecord]) -> list[Verdict]:
    """The verdicts on the passes that trained, as far as a pipeline has them."""
    records = list(records)
    found = [of_layers(r.rows) for r in records if r.name == "distill" and with_planes(r.rows)]
    if summaries := [r.summary for r in records if _measure(r.summary)]:
        found.append(of_output(summaries))
    return found


def of_layers(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on stage 2, from the rows of ``distill``: one a layer, of which those count that have planes."""
    rows = with_planes(rows)
    better = layers_better(rows, LAYER_GAIN)
    text = (
        f"{better} of {len(rows)} layers have flipped bits and a held-out error lower by {LAYER_GAIN:.0%} or more"
        f" (wanted: {LAYER_SHARE:.0%} of them)"
    )
    return _verdict("stage 2", better >= LAYER_SHARE * len(rows), text)


def of_output(summaries: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on what trained the model as a whole, from the summaries of those passes, in order."""
    before = summaries[0][f"{_measure(summaries[0])}_before"]
    after = summaries[-1][f"{_measure(summaries[-1])}_after"]
    what = "KL divergence from" if _measure(summaries[0]) == "kl" else "relative error against"
    figures = f"{terminal.figure(before)} before, {terminal.figure(after)} after (wanted: lower)"
    return _verdict("stage 3", after < before, f"{what} the original on held-out data: {figures}")


def _verdict(stage: str, passed: bool, text: str) -> Verdict:
    return Verdict(stage, passed, text if passed else f"{text}; {WAY_OUT}")


def _measure(summary: Mapping[str, Any]) -> str:
    """What a pass measured of the whole model, e.g. ``kl``; empty where nothing."""
    return next((m for m in MEASURES.values() if f"{m}_before" in summary), "")
