"""What the figures of an artifact say, in sentences: which layer was hurt most, by which stage it was repaired, which
kernel it runs, what was gained, and why that may be believed."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbllm_compile.html_report.contents import Contents, Kernel, short_name
from lbllm_compile.records import NOT_MEASURED, MeasuredPass
from lbllm_compile.report import summary, terminal

STAGES = {
    "ptq": "stage 1 (fitting)",
    "distill": "stage 2 (training weights)",
    "activate": "stage 3 (quantized activations)",
    "finetune": "finetune (whole model)",
}
"""What the calibrating passes are called."""

ONE_TOKEN = "1"
"""The token bucket of decoding."""


PROOFS = "_kernels"
"""How a sheet's figures end that say how kernels for a kind of target were checked which this machine does not run."""

UNPROVEN = "not run"
"""What such a figure says of kernels that nothing has run."""


@dataclass(frozen=True)
class LayerErrors:
    """Reconstruction errors of the decoder layers against the float model, at one point of the pipeline.

    Attributes:
        stage: what the pass is called that was the last one (:func:`titles`).
        name: of the point, for people.
        errors: by decoder layer.
    """

    stage: str
    name: str
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Tile:
    """One large figure: what it is, its value, and what it is compared with. ``good`` says whether it is a gain."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Answer:
    """A question that everyone has, and its answer."""

    question: str
    text: str


@dataclass(frozen=True)
class Reason:
    """Why the artifact may be trusted, or where not."""

    passed: bool
    name: str
    text: str


def titles(measured: Sequence[MeasuredPass]) -> list[str]:
    """What each pass is called; one that the pipeline names again has a number."""
    seen: Counter[str] = Counter()
    found = []
    for item in measured:
        seen[item.name] += 1
        title = STAGES.get(item.name, item.name)
        found.append(title if seen[item.name] == 1 else f"{title} {seen[item.name]}")
    return found


def layer_errors(measured: Sequence[MeasuredPass]) -> list[LayerErrors]:
    """The layers' errors after every stage that measured them, in order.

    What came before the first such stage stands for stage 1. Without any, stage 1's own errors do, averaged over a
    layer's linears.
    """
    found: list[LayerErrors] = []
    for item, title in zip(measured, titles(measured), strict=True):
        rows = [row for row in item.rows if row.get("layer") is not None]
        if not rows or not all(isinstance(row.get("after"), float) for row in rows):
            continue
        after = {row["layer"]: row["after"] for row in rows}
        before = {row["layer"]: row["before"] for row in rows if isinstance(row.get("before"), float)}
        if before and not found:
            found.append(LayerErrors(STAGES["ptq"], STAGES["ptq"], before))
        elif before and item.name == "activate":
            found.append(LayerErrors(title, "activations quantized", before))
        found.append(LayerErrors(title, title, after))
    fitted = next((item for item in measured if item.name == "ptq" and item.rows), None)
    if not found and fitted is not None:
        errors = {row["layer"]: row["error"] for row in summary.by_layer(fitted.rows)}
        found.append(LayerErrors(STAGES["ptq"], STAGES["ptq"], errors))
    return found


def tiles(contents: Contents) -> list[Tile]:
    """The figures that everyone asks for first."""
    sheet = contents.report.sheet if contents.report else {}
    return list(_tiles(sheet))


def _tiles(sheet: Mapping[str, Any]) -> Iterator[Tile]:
    before, after = sheet.get("bytes_original"), sheet.get("bytes_compiled")
    if before and after:
        note = f"{terminal.size(after)} instead of {terminal.size(before)} in 16 bit"
        yield Tile("smaller", f"{before / after:.1f}x", note, after < before)
    before, after = sheet.get("decode_original"), sheet.get("decode_compiled")
    if before and after:
        note = f"{terminal.figure(after)} tokens/s instead of {terminal.figure(before)} in eager torch"
        yield Tile("as fast" if after >= before else "as fast: SLOWER", f"{after / before:.1f}x", note, after >= before)
    if sheet.get("ppl") is not None:
        note = f"the original has {terminal.figure(sheet.get('ppl_teacher'))}"
        yield Tile("perplexity", terminal.figure(sheet["ppl"]), note)
    if sheet.get("kld_mean") is not None:
        yield Tile("KL divergence", terminal.figure(sheet["kld_mean"]), "mean, from the original, in nats a token")
    if sheet.get("top1_agreement") is not None:
        yield Tile("same top token", f"{100 * sheet['top1_agreement']:.1f} %", "as the original's likeliest")
    if sheet.get("relative_error") is not None:
        yield Tile("relative error", terminal.figure(sheet["relative_error"]), "of the output, on held-out inputs")
    if sheet.get("bits_per_weight") is not None:
        whole = terminal.figure(sheet.get("bits_per_weight_file"))
        yield Tile("bits per weight", terminal.figure(sheet["bits_per_weight"]), f"decoder linears; {whole} with all")
    if sheet.get(NOT_MEASURED):
        yield Tile(f"{sheet[NOT_MEASURED]}", "not measured", "as --no-sheet asked")


def answers(contents: Contents) -> list[Answer]:
    """What someone who has never seen the method wants to know."""
    found = []
    points = layer_errors(contents.measured)
    if points:
        layer, text = _hurt(points[0])
        found.append(Answer("Which layer was hurt most?", text))
        if len(points) > 1:
            found.append(Answer("Which stage repaired it?", _repaired(points, layer)))
        own = [kernel for kernel in contents.kernels if kernel.layer == layer and kernel.spec]
        if own:
            found.append(Answer("Which kernels does it run?", _kernels(own)))
    sheet = contents.report.sheet if contents.report else {}
    gained = [f"{tile.value} {tile.name} ({tile.note})" for tile in _tiles(sheet) if tile.good is not None]
    if gained:
        found.append(Answer("How much smaller and faster is it?", "; ".join(gained) + "."))
    return found


def _hurt(point: LayerErrors) -> tuple[int, str]:
    """The layer with the largest error, and a sentence about it."""
    layer = max(point.errors, key=lambda number: point.errors[number])
    median = statistics.median(point.errors.values())
    worst = f"{point.name} left it with a reconstruction error of {terminal.figure(point.errors[layer])}"
    return layer, f"Layer {layer}: {worst}; the median of all {len(point.errors)} layers is {terminal.figure(median)}."


def _repaired(points: Sequence[LayerErrors], layer: int) -> str:
    """The stage that took most of a layer's error, from the end of the one before to its own end."""
    ends = list({point.stage: point for point in points}.values())
    steps = [
        (before.errors[layer] - after.errors[layer], before, after)
        for before, after in itertools.pairwise(ends)
        if layer in before.errors and layer in after.errors
    ]
    gain, before, after = max(steps, key=lambda step: step[0], default=(0.0, ends[0], ends[0]))
    if gain <= 0:
        return f"None: no later stage lowered the error of layer {layer}."
    old, new = before.errors[layer], after.errors[layer]
    stage, figures = f"{after.name[:1].upper()}{after.name[1:]}", f"{terminal.figure(old)} to {terminal.figure(new)}"
    text = f"{stage} lowered the error of layer {layer} from {figures}, by {gain / old:.0%}."
    last = ends[-1]
    if last is not after and layer in last.errors:
        text += f" At the end of the pipeline it is {terminal.figure(last.errors[layer])}."
    return text


def _kernels(kernels: Sequence[Kernel]) -> str:
    parts = []
    for kernel in kernels:
        assert kernel.spec is not None
        layout = ", ".join(dict.fromkeys(f"{r['schedule'].get('layout', r['target'])}" for r in kernel.schedules))
        text = f"{short_name(kernel.linear)} ({kernel.spec.out_features}x{kernel.spec.in_features}): "
        text += layout or "untuned"
        time = next((r["microseconds"] for r in kernel.schedules if r["tokens"] == ONE_TOKEN), None)
        parts.append(text + (f", {time:.1f} µs a token" if time else ""))
    return "; ".join(parts) + "."


def _proofs(kernels: Sequence[Kernel], sheet: Mapping[str, Any]) -> Iterator[Reason]:
    """How the kernels of each target were checked: by running them, or as their compiler's backend says."""
    for target in dict.fromkeys(row["target"] for kernel in kernels for row in kernel.schedules):
        specs = {kernel.spec for kernel in kernels if any(row["target"] == target for row in kernel.schedules)}
        kinds = f"{len(specs)} kind{'' if len(specs) == 1 else 's'} of linears"
        tokens = {row["tokens"] for kernel in kernels for row in kernel.schedules if row["target"] == target}
        # Kernels for one token may be another target's, whose name their schedules have.
        which = f"of {kinds} for one token" if tokens == {ONE_TOKEN} else f"of {kinds}"
        yield Reason(True, f"Kernels for {target}", f"{which}: they gave the reference's bits before they were used")
    for name, proofs in sheet.items():
        if name.endswith(PROOFS):
            text = str(proofs)
            yield Reason(UNPROVEN not in text, f"Kernels for {name.removesuffix(PROOFS)}", text)


def reasons(contents: Contents) -> list[Reason]:
    """What was checked, and what came of it."""
    found = [
        Reason(True, "Files", f"all {len(contents.files)} files have the size and SHA-256 that the manifest lists"),
    ]
    report = contents.report
    if report is None:
        found.append(Reason(False, "Report", "the compile's own report is not there, so its checks cannot be shown"))
        return found
    kept = [record for record in report.records if record.contract != "calibrating"]
    exact = sum(record.error == 0 for record in kept)
    promise = "promise to keep the model's output and were held to it on a probe"
    text = f"{len(kept)} of {len(report.records)} passes {promise}; {exact} of them kept it bit for bit"
    found.append(Reason(True, "Contracts", text))
    found += _proofs(contents.kernels, report.sheet)
    check = contents.lock.get("check")
    if isinstance(check, Mapping) and check.get("tokens"):
        text = f"the artifact, loaded again, gave the compile's {len(check['tokens'])} greedy tokens"
        found.append(Reason(True, "Self-check", text))
    elif check:
        found.append(Reason(True, "Self-check", "the artifact, loaded again, gave the compile's output to the bit"))
    found += [Reason(v.passed, v.stage[:1].upper() + v.stage[1:], v.text) for v in report.verdicts]
    return found
