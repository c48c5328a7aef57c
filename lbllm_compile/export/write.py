"""``lbllm-compile export``: reads an artifact, makes the form that is asked for, measures it, writes it at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from safetensors import SafetensorError
from torch import Tensor

from lbllm_compile import artifact, frontend
from lbllm_compile.codegen.cache import sync, write_failure
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.evaluate import Excerpt, Logits, Scores, check_numbers, read_text
from lbllm_compile.export.form import Form, chosen_dtype, chosen_type
from lbllm_compile.export.gguf import Gguf
from lbllm_compile.export.hf_dense import HfDense
from lbllm_compile.export.original import ExportError, original
from lbllm_compile.passes.ir import weight_only
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.report import terminal
from lbllm_compile.runtime.loader import prepared

FORMATS: Mapping[str, type[Form]] = {"hf-dense": HfDense, "gguf": Gguf}
"""Forms by the names that users give them."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how far it is from the artifact.

    Attributes:
        out: the file or folder.
        format: one of :data:`FORMATS`.
        dtype: of weights that are written as floating-point numbers.
        type: of W(1+1) matrices where the format has types; None elsewhere.
        nbytes: of all weights as written.
        graph_error: relative error of the original architecture's logits, with these weights before they are rounded,
            against those of the artifact's graph with float activations.
        facts: what the format says of its weights.
        scores: ``kld_mean, kld_p99, top1_agreement, ppl`` and, as ``ppl_teacher``, the artifact's, on a text; empty
            without one. KL is in nats, of the artifact with its own activations against the written weights with float
            ones. ``weights_kld_mean`` is that of the artifact's weights against the written ones, both with float
            activations.
    """

    out: Path
    format: str
    dtype: str
    type: str | None
    nbytes: int
    graph_error: float
    facts: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    directory: str | Path,
    format: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    type: str | None = None,
    text: str | Path | None = None,
    seq_len: int | None = None,
    chunks: int = 32,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes an artifact in the form of another engine. It appears complete or not at all, and replaces nothing.

    Args:
        directory: the artifact.
        format: one of :data:`FORMATS`.
        out: the file or folder to make.
        dtype: of weights that are written as floating-point numbers: ``float32``, ``bfloat16`` or ``float16``; by
            default that of ``type`` if it is one of them, then the one that the model's configuration names if it has
            16 bits, else ``bfloat16``.
        type: of W(1+1) matrices in ``gguf``, one of :data:`.ggml.TYPES`; by default ``q8_0``, which has them exactly.
        text: a UTF-8 text file on which artifact and written weights are compared.
        seq_len, chunks: how the text is cut, see :func:`lbllm_compile.evaluate.evaluate`.
        progress: told what goes on.

    Raises:
        ExportError: the artifact cannot be written in that form, or not to that place.
        ArtifactError: the artifact cannot be read.
        EvaluationError: the text cannot be used.
    """
    progress, out = progress or NoProgress(), Path(out)
    if format not in FORMATS:
        raise ExportError(f"there is no format '{format}'; use one of {', '.join(FORMATS)}")
    form = FORMATS[format]
    kind = chosen_type(format, form, type)
    check_place(out, form.suffix)
    check_numbers(seq_len, chunks)
    if text is not None:
        read_text(Path(text))
    loaded = artifact.load(directory)
    program = loaded.program
    chosen = chosen_dtype(dtype or form.dtype_with(kind), program.config)
    excerpt = None if text is None else Excerpt.of(program, Path(text), seq_len, chunks)
    found = original(program)
    ready = form(program, found, chosen, kind)
    progress.note(f"{out}: {terminal.size(ready.nbytes)} of weights")
    free = shutil.disk_usage(_existing(out)).free
    if free < ready.nbytes:
        raise ExportError(
            f"'{out}' needs {terminal.size(ready.nbytes)}, and there are {terminal.size(free)} free; make room or pass"
            " another --out"
        )
    scores: Mapping[str, Any] = {}
    if excerpt is not None:
        compiled = prepared(loaded, progress=progress)
        scores = {**excerpt.facts, **_scores(found.module, compiled.logits, program, excerpt.pieces, progress)}
    _write(ready, out)
    return ExportReport(out, format, chosen, kind, ready.nbytes, found.error, ready.facts(), scores)


def _scores(
    module: Any, compiled: Logits, program: Program, pieces: Sequence[Tensor], progress: Progress
) -> dict[str, Any]:
    """Of the weights as written, against the artifact and against its weights with float activations."""
    against_all, against_weights = Scores(), Scores()
    with progress.task("scoring", len(pieces)) as task, torch.no_grad():
        for ids in pieces:
            logits = module(input_ids=ids, use_cache=False).logits
            against_all.add(ids, logits, compiled(ids))
            against_weights.add(ids, logits, weight_only.run(program, frontend.language_model_inputs(ids)))
            task.advance()
    return {**against_all.summary(), "weights_kld_mean": against_weights.summary()["kld_mean"]}


def check_place(out: Path, suffix: str) -> None:
    """Checks that something new can be made at a path.

    Raises:
        ExportError: something is there, or the folder around it cannot be written.
    """
    if os.path.lexists(out) and not (not suffix and out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise ExportError(f"'{out}' exists; pass another --out")
    if suffix and out.suffix != suffix:
        raise ExportError(f"'{out}' is no {suffix} file; pass --out {out}{suffix}")
    parent = _existing(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write '{out}': '{parent}' is not writable; pass another --out")


def _existing(out: Path) -> Path:
    """The nearest folder around a path that is there."""
    return next(p for p in out.absolute().parents if p.exists())


def _write(ready: Form, out: Path) -> None:
    """Writes a form under another name and then gives it its own.

    Raises:
        ExportError: it cannot be written.
    """
    partial = out.absolute().with_name(f".{out.name}.lbllm-partial")
    try:
        _remove(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        ready.write(partial)
        for path in (partial, *partial.rglob("*")):
            sync(path)
        check_place(out, ready.suffix)
        os.rename(partial, out)
        sync(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write '{out}': {write_failure(error)}") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def render(report: ExportReport) -> list[RenderableType]:
    """The report for people."""
    rows: list[list[Any]] = [["size of the weights", terminal.size(report.nbytes)]]
    rows += [[name.replace("_", " "), value] for name, value in report.facts.items()]
    rows.append(["logits against the artifact's graph, float activations", report.graph_error])
    if report.scores:
        rows += [
            ["perplexity", report.scores["ppl"]],
            ["perplexity of the artifact", report.scores["ppl_teacher"]],
            ["KL divergence from the artifact, mean", report.scores["kld_mean"]],
            ["same top token", report.scores["top1_agreement"]],
            ["KL divergence from its weights, both with float activations, mean", report.scores["weights_kld_mean"]],
        ]
    return [terminal.table(f"{report.out} ({report.format})", ["", ""], rows)]
