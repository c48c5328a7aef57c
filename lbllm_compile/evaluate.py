"""How good a compiled model is: perplexity, divergence from the original model, size. All from one artifact.

The text is cut into chunks of equal length from its start, without overlap; in each, every token but the first is
scored from the tokens before it. The original model ("teacher") scores the same tokens, so that

* ``ppl`` and ``ppl_teacher`` are exp of the mean negative log-likelihood,
* ``kld_mean`` and ``kld_p99`` are the mean and the 99th percentile over positions of KL(teacher || compiled), in nats,
* ``top1_agreement`` is the share of positions at which both find the same token most likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from lbllm_compile import artifact, frontend, origin
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.native.language import COMPILED_CONTEXT, context_length
from lbllm_compile.passes.ir.annotations import linears
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.lower import stored_weights
from lbllm_compile.report import summary, terminal
from lbllm_compile.runtime.loader import prepared

Logits = Callable[[Tensor], Tensor]
"""Token ids ``[1, S]`` to logits ``[1, S, V]``."""

SEQUENCE_LENGTH = 512
"""Tokens of a chunk where none are asked for and the model's context holds them."""


class EvaluationError(LbllmError):
    """The text or the teacher that the user named cannot be used."""


@dataclass
class Scores:
    """Per-position figures of a text, gathered chunk by chunk."""

    nll: list[Tensor] = field(default_factory=list)
    teacher_nll: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)

    def add(self, ids: Tensor, logits: Tensor, teacher: Tensor | None) -> None:
        """Scores one chunk: token ids ``[1, S]``, logits ``[1, S, V]`` of the compiled model and the teacher's."""
        following = ids[0, 1:, None]
        log_q = torch.log_softmax(logits[0, :-1].float(), -1)
        self.nll.append(-log_q.gather(-1, following).squeeze(-1))
        if teacher is None:
            return
        log_p = torch.log_softmax(teacher[0, :-1].float(), -1)
        self.teacher_nll.append(-log_p.gather(-1, following).squeeze(-1))
        self.divergence.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp_min(0.0))
        self.agreement.append(log_p.argmax(-1) == log_q.argmax(-1))

    def summary(self) -> dict[str, float | None]:
        """``ppl``, ``ppl_teacher``, ``kld_mean``, ``kld_p99``, ``top1_agreement``; None without a teacher."""
        figures: dict[str, float | None] = {"ppl": _perplexity(self.nll)}
        if not self.divergence:
            return {**figures, "ppl_teacher": None, "kld_mean": None, "kld_p99": None, "top1_agreement": None}
        divergence = torch.cat(self.divergence)
        figures["ppl_teacher"] = _perplexity(self.teacher_nll)
        figures["kld_mean"] = float(divergence.mean())
        figures["kld_p99"] = percentile(divergence, 0.99)
        figures["top1_agreement"] = float(torch.cat(self.agreement).double().mean())
        return figures


@dataclass(frozen=True)
class Excerpt:
    """Chunks of a text that a model is scored on.

    Attributes:
        text: what was cut, in words.
        pieces: token ids, each ``[1, seq_len]``.
    """

    text: str
    pieces: Sequence[Tensor]

    @classmethod
    def of(cls, program: Program, path: Path, seq_len: int | None, chunks: int) -> Excerpt:
        """The start of a file as tokens of a language model.

        Args:
            program: the model; its tokenizer and its context count.
            path: a UTF-8 text file.
            seq_len: tokens of a chunk; by default see :func:`chunk_length`.
            chunks: how many at most; a shorter text gives fewer.

        Raises:
            EvaluationError: the model is no language model with a tokenizer, or the text cannot be cut so.
        """
        check_numbers(seq_len, chunks)
        content = read_text(path)
        if program.kind != "causal-lm" or program.tokenizer is None:
            raise EvaluationError(
                f"'{program.name}' is not a language model with a tokenizer, so it cannot be scored on text"
            )
        length = chunk_length(seq_len, context_length(program.config))
        return cls(str(path), cut(program.tokenizer(content)["input_ids"], length, chunks))

    @property
    def facts(self) -> dict[str, Any]:
        """``text``, ``seq_len``, ``chunks`` and ``tokens``, the number of tokens scored."""
        length = self.pieces[0].shape[1]
        tokens = len(self.pieces) * (length - 1)
        return {"text": self.text, "seq_len": length, "chunks": len(self.pieces), "tokens": tokens}


def percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = values.flatten().sort().values
    return float(ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))])


def compare(
    student: Logits, teacher: Logits | None, chunks: Sequence[Tensor], progress: Progress | None = None
) -> Scores:
    """Scores chunks of token ids, each ``[1, S]``."""
    scores = Scores()
    with (progress or NoProgress()).task("scoring", len(chunks)) as task, torch.no_grad():
        for ids in chunks:
            scores.add(ids, student(ids), teacher(ids) if teacher is not None else None)
            task.advance(f"ppl {_perplexity(scores.nll):.2f}")
    return scores


def cut(ids: Sequence[int], seq_len: int, chunks: int) -> list[Tensor]:
    """At most ``chunks`` whole chunks ``[1, seq_len]`` from the start of ``ids``.

    Raises:
        EvaluationError: not even one chunk fits, or a number is out of range.
    """
    check_numbers(seq_len, chunks)
    if len(ids) < seq_len:
        raise EvaluationError(f"the text has {len(ids)} tokens, fewer than one chunk of {seq_len}; use a longer text")
    count = min(chunks, len(ids) // seq_len)
    return [torch.tensor([ids[i * seq_len : (i + 1) * seq_len]]) for i in range(count)]


def check_numbers(seq_len: int | None, chunks: int) -> None:
    """Checks what a text is to be cut into.

    Raises:
        EvaluationError: a number is out of range.
    """
    if chunks < 1 or (seq_len is not None and seq_len < 2):
        raise EvaluationError("--seq-len must be at least 2 and --chunks at least 1")


def chunk_length(asked: int | None, context: int | None) -> int:
    """Tokens of a chunk: as asked for, or by default what the model's context holds, at most ``SEQUENCE_LENGTH``.

    Args:
        asked: None where the user did not say.
        context: tokens the model can attend to; None where unknown.

    Raises:
        EvaluationError: more were asked for than the context holds.
    """
    if asked is None:
        return min(SEQUENCE_LENGTH, context or SEQUENCE_LENGTH)
    if context is not None and asked > context:
        raise EvaluationError(f"--seq-len cannot be {asked}: the model's context holds {context} tokens; ask for fewer")
    return asked


def evaluate(
    directory: str | Path,
    text: str | Path,
    *,
    seq_len: int | None = None,
    chunks: int = 32,
    teacher: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates an artifact on a text file.

    Args:
        directory: the artifact.
        text: a UTF-8 text file.
        seq_len: tokens of a chunk; by default see :func:`chunk_length`.
        chunks: how many at most; a shorter text gives fewer.
        teacher: the original model, as a compile takes it. By default the one that the artifact was compiled from, if
            it is still where it was; otherwise the figures that need it are None.
        progress: told what goes on.

    Returns:
        ``text, seq_len, chunks, tokens, ppl, ppl_teacher, kld_mean, kld_p99, top1_agreement, bits_per_weight,
        bits_per_weight_file``.

    Raises:
        EvaluationError: the text is not UTF-8 or too short, a chunk does not fit the model's context, the model has no
            tokenizer, the teacher does not fit.
        ArtifactError, KernelError: the artifact cannot be loaded or run.
    """
    progress = progress or NoProgress()
    check_numbers(seq_len, chunks)
    read_text(Path(text))
    loaded = artifact.load(directory)
    excerpt = Excerpt.of(loaded.program, Path(text), seq_len, chunks)
    original = find_teacher(loaded, teacher, progress)
    model = prepared(loaded, progress=progress)
    scores = compare(model.logits, original, excerpt.pieces, progress)
    return {**excerpt.facts, **scores.summary(), **bits_per_weight(loaded.program)}


def render(directory: Path, figures: Mapping[str, Any]) -> list[RenderableType]:
    """The figures of :func:`evaluate` for people, and those of the layers that the artifact's passes measured.

    Raises:
        ArtifactError: what the passes measured is damaged.
    """
    rows = [
        ["perplexity", figures["ppl"], figures["ppl_teacher"]],
        ["KL divergence, mean", figures["kld_mean"], None],
        ["KL divergence, 99th percentile", figures["kld_p99"], None],
        ["same top token", figures["top1_agreement"], None],
        ["bits per weight, decoder linears", figures["bits_per_weight"], None],
        ["bits per weight, everything", figures["bits_per_weight_file"], None],
    ]
    title = (
        f"{directory} on {figures['text']}: {figures['chunks']} chunks of {figures['seq_len']} tokens,"
        f" {figures['tokens']} tokens scored"
    )
    parts: list[RenderableType] = [terminal.table(title, ["", "compiled", "original"], rows)]
    for table in summary.layer_tables(artifact.measured_passes(directory)):
        parts += [Text(), table]
    return parts


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        EvaluationError: it cannot be read, is empty or is not UTF-8.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise EvaluationError(f"cannot read the text '{path}': {error.strerror or error}") from error
    if not content.strip():
        raise EvaluationError(f"the text '{path}' is empty")
    return content


def find_teacher(loaded: artifact.Artifact, named: str | None, progress: Progress) -> Logits | None:
    """The original model as a function from ids to logits; None where it was not named and is not to be found.

    Raises:
        EvaluationError: the named model is no language model over the same vocabulary.
    """
    source = named
    if source is None:
        try:
            source = origin.source_of(loaded.directory, loaded.digest, loaded.lock)
        except origin.OriginError as error:
            warn(progress, None, f"no comparison with the original model: {error}; name it with --teacher")
            return None
    model = frontend.load(source)
    if model.kind != "causal-lm":
        raise EvaluationError(f"'{source}' is not a language model, so it cannot be the teacher")
    program = frontend.capture(model, loaded.program.config.get(COMPILED_CONTEXT))
    same = frontend.program_hash(program) == loaded.lock.get("model")
    if not same and named is None:
        warn(progress, None, f"no comparison with the original model: '{source}' has changed; name it with --teacher")
        return None
    if not same:
        warn(progress, None, f"'{source}' is not the very model that was compiled; comparing with it all the same")
    if model.config.get("vocab_size") != loaded.program.config.get("vocab_size"):
        raise EvaluationError(f"'{source}' has another vocabulary than the compiled model, so it cannot be its teacher")
    return lambda ids: model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def bits_per_weight(program: Program) -> dict[str, float | None]:
    """Bits per weight as stored: over the linears of decoder layers, and over everything in the artifact's weights.

    Linears are the W(1+1) ones and those that were kept float; None where there are neither.
    """
    matrices = stored_weights(program).values()
    decoder_weights = sum(math.prod(w.sign.shape[:-1]) * w.in_features for w in matrices)
    decoder_bits = sum(w.stored_bits for w in matrices)
    kept = {info.weight for _, info in linears(program) if info.role == "dense" and info.layer is not None}
    other_weights = other_bits = 0
    planes = {f"{path}.{part}" for path in stored_weights(program) for part in WEIGHT}
    for path, tensor in program.parameters():
        if path in planes:
            continue
        bits = 8 * tensor.numel() * tensor.element_size()
        if path in kept:
            decoder_weights += tensor.numel()
            decoder_bits += bits
            continue
        other_bits += bits
        # scales of int8 rows, clip factors and knees describe other weights
        other_weights += 0 if path.endswith((".row_scale", ".input_clip", ".input_knees")) else tensor.numel()
    whole = (decoder_bits + other_bits) / max(1, decoder_weights + other_weights)
    return {
        "bits_per_weight": decoder_bits / decoder_weights if decoder_weights else None,
        "bits_per_weight_file": whole,
    }


def _perplexity(nll: Sequence[Tensor]) -> float:
    return float(torch.cat(list(nll)).double().mean().exp())
