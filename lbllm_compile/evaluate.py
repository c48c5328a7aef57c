"""How good a compiled model is: perplexity, divergence from the original model, size. All from one artifact.

The text is cut into chunks of equal length from its start, without overlap; in each, every token but the first is
scored from the tokens before it. The original model ("teacher") scores the same tokens, so that

* ``ppl`` and ``ppl_teacher`` are exp of the mean negative log-likelihood,
* ``kld_mean`` and ``kld_p99`` are the mean and the 99th percentile over positions of KL(teacher || compiled), in nats,
* ``ppl_ratio`` is ``ppl / ppl_teacher``,
* ``top1_agreement`` is the share of positions at which both find the same token most likely,
* ``flips`` is the share of positions at which the likeliest token is the right one in one of the two models alone,
* ``loops`` and ``loops_teacher`` are the shares of greedy continuations that end in a loop
  (:mod:`lbllm_compile.greedy`).

``intervals`` has 95 % confidence intervals, of the percentile bootstrap over chunks: tokens of a chunk depend on one
another, chunks hardly do. Chunks are drawn with replacement, ``RESAMPLES`` times, from a fixed seed, the same chunks
for both models, so that what both find difficult cancels in ``ppl_ratio``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from lbllm_compile import artifact, frontend, greedy, origin
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.codegen.targets import Target
from lbllm_compile.frontend import UserModel
from lbllm_compile.native.language import COMPILED_CONTEXT, context_length
from lbllm_compile.passes.calibrate.layers import CODED
from lbllm_compile.passes.ir.annotations import linears
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.lower import coded_linears, planes_of_heads, readers, stored_int4, stored_weights
from lbllm_compile.records import ORIGINAL_BYTES
from lbllm_compile.report import summary, terminal
from lbllm_compile.runtime.loader import prepared
from lbllm_compile.runtime.model import CompiledModel

Logits = Callable[[Tensor], Tensor]
"""Token ids ``[1, S]`` to logits ``[1, S, V]``."""

SEQUENCE_LENGTH = 512
"""Tokens of a chunk where none are asked for and the model's context holds them."""

RESAMPLES = 2000
"""Draws of the bootstrap: enough for two digits of an interval's ends."""

CONFIDENCE = 0.95
"""The share of intervals that hold what more and more text of the same kind would give."""

INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"


class EvaluationError(LbllmError):
    """The text or the teacher that the user named cannot be used."""


@dataclass
class Scores:
    """Per-position figures of a text, gathered chunk by chunk."""

    nll: list[Tensor] = field(default_factory=list)
    teacher_nll: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    flips: list[Tensor] = field(default_factory=list)

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
        first, teacher_first = log_q.argmax(-1), log_p.argmax(-1)
        self.agreement.append(first == teacher_first)
        right = following.squeeze(-1)
        self.flips.append((first == right) != (teacher_first == right))

    def summary(self) -> dict[str, float | None]:
        """``ppl``, ``ppl_teacher``, ``ppl_ratio``, ``kld_mean``, ``kld_p99``, ``top1_agreement``, ``flips``; None
        without a teacher."""
        ppl = _perplexity(self.nll)
        if not self.divergence:
            missing = ("ppl_teacher", "ppl_ratio", "kld_mean", "kld_p99", "top1_agreement", "flips")
            return {"ppl": ppl, **dict.fromkeys(missing)}
        teacher, divergence = _perplexity(self.teacher_nll), torch.cat(self.divergence)
        return {
            "ppl": ppl,
            "ppl_teacher": teacher,
            "ppl_ratio": ppl / teacher,
            "kld_mean": float(divergence.mean()),
            "kld_p99": percentile(divergence, 0.99),
            "top1_agreement": float(torch.cat(self.agreement).double().mean()),
            "flips": float(torch.cat(self.flips).double().mean()),
        }

    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """Confidence intervals of the figures of :meth:`summary` but percentiles, None where there is no figure; all
        are None where fewer than two chunks were scored, which say nothing of how chunks differ."""
        names = {"ppl": self.nll, "kld_mean": self.divergence, "top1_agreement": self.agreement, "flips": self.flips}
        means = {name: _resampled_means(values) for name, values in {**names, "ppl_teacher": self.teacher_nll}.items()}
        mean, teacher = means["ppl"], means["ppl_teacher"]
        drawn = {
            **means,
            "ppl": None if mean is None else mean.exp(),
            "ppl_teacher": None if teacher is None else teacher.exp(),
            "ppl_ratio": None if mean is None or teacher is None else (mean - teacher).exp(),
        }
        tail = (1 - CONFIDENCE) / 2
        return {
            name: None if values is None else (percentile(values, tail), percentile(values, 1 - tail))
            for name, values in drawn.items()
        }


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
        tokenizer = tokenizer_of(program)
        length = chunk_length(seq_len, context_length(program.config))
        return cls(str(path), cut(tokenizer(content)["input_ids"], length, chunks))

    @property
    def facts(self) -> dict[str, Any]:
        """``text``, ``seq_len``, ``chunks`` and ``tokens``, the number of tokens scored."""
        length = self.pieces[0].shape[1]
        tokens = len(self.pieces) * (length - 1)
        return {"text": self.text, "seq_len": length, "chunks": len(self.pieces), "tokens": tokens}

    @property
    def digest(self) -> str:
        """Stands for the chunks, whatever text they are from."""
        digest = hashlib.sha256(str(self.pieces[0].shape[1]).encode())
        for piece in self.pieces:
            digest.update(piece.numpy().tobytes())
        return digest.hexdigest()[:16]


def tokenizer_of(program: Program) -> Any:
    """The tokenizer of a language model.

    Raises:
        EvaluationError: the program is no language model, or has none.
    """
    if program.kind != "causal-lm" or program.tokenizer is None:
        raise EvaluationError(
            f"'{program.name}' is not a language model with a tokenizer, so it cannot be scored on text"
        )
    return program.tokenizer


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
    greedy_tokens: int | None = None,
    target: str = "cpu",
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
        greedy_tokens: length of the greedy continuations whose loops are counted; 0 makes none. By default
            :data:`.greedy.CONTINUATION`, or what the model's context has room for.
        target: what the artifact runs on; the original runs in torch on the CPU.
        progress: told what goes on.

    Returns:
        ``text, seq_len, chunks, tokens``; the figures of :meth:`Scores.summary` and, under ``intervals``, of
        :meth:`Scores.intervals`; ``greedy_tokens, loops, loops_teacher``, None where there was no room for
        :data:`.greedy.SHORTEST` tokens or none were asked for; and those of :func:`sizes`.

    Raises:
        EvaluationError: the text is not UTF-8 or too short, a chunk does not fit the model's context, the model has no
            tokenizer, the teacher does not fit.
        ArtifactError, KernelError: the artifact cannot be loaded or run.
        TargetError: this machine cannot run the target.
    """
    progress = progress or NoProgress()
    Target.parse(target).check_runs_here()
    check_numbers(seq_len, chunks)
    read_text(Path(text))
    loaded = artifact.load(directory)
    excerpt = Excerpt.of(loaded.program, Path(text), seq_len, chunks)
    prompts = greedy.prompts(excerpt.pieces, context_length(loaded.program.config))
    count = greedy_length(greedy_tokens, len(prompts[0]), context_length(loaded.program.config))
    original = find_teacher(loaded, teacher, progress)
    model = prepared(loaded, target=target, progress=progress)
    scores = compare(model.logits, None if original is None else logits_of(original), excerpt.pieces, progress)
    return {
        **excerpt.facts,
        **scores.summary(),
        "intervals": scores.intervals(),
        **loop_rates(model, original, prompts, count, progress),
        **sizes(loaded.program, original),
    }


def greedy_length(asked: int | None, prompt: int, context: int | None) -> int:
    """Tokens of a greedy continuation; 0 where there are none.

    Args:
        asked: None where the user did not say.
        prompt: tokens in front.
        context: tokens the model can attend to; None where unknown.

    Raises:
        EvaluationError: too few to tell a loop, or more than the context holds.
    """
    room = None if context is None else context - prompt
    if asked is None:
        count = greedy.CONTINUATION if room is None else min(greedy.CONTINUATION, room)
        return count if count >= greedy.SHORTEST else 0
    if asked and asked < greedy.SHORTEST:
        raise EvaluationError(
            f"--greedy-tokens cannot be {asked}: a loop shows in {greedy.SHORTEST} tokens or more; 0 leaves them out"
        )
    if room is not None and asked > room:
        raise EvaluationError(
            f"--greedy-tokens cannot be {asked}: behind a prompt of {prompt} tokens the model's context has room for"
            f" {room}; ask for fewer"
        )
    return asked


def loop_rates(
    model: CompiledModel,
    original: UserModel | None,
    prompts: Sequence[Sequence[int]],
    count: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """``greedy_tokens``, ``loops`` and ``loops_teacher`` behind prompts of one length; None for what there is not."""
    progress = progress or NoProgress()
    if not count:
        return {"greedy_tokens": None, "loops": None, "loops_teacher": None}
    rate = None
    if original is not None:
        rate = greedy.original_rate(original, prompts, count, model.stop_tokens(), progress)
    return {
        "greedy_tokens": count,
        "loops": greedy.compiled_rate(model, prompts, count, progress),
        "loops_teacher": rate,
    }


def render(directory: Path, figures: Mapping[str, Any]) -> list[RenderableType]:
    """The figures of :func:`evaluate` for people, and those of the layers that the artifact's passes measured.

    Raises:
        ArtifactError: what the passes measured is damaged.
    """
    intervals = figures["intervals"]

    def row(title: str, name: str, original: str | None = None) -> list[Any]:
        ends = intervals.get(name)
        shown = None if ends is None else " to ".join(terminal.figure(end) for end in ends)
        return [title, figures[name], shown, figures[original] if original else None]

    rows = [
        row("perplexity", "ppl", "ppl_teacher"),
        row("times the original's", "ppl_ratio"),
        row("KL divergence, mean", "kld_mean"),
        row("KL divergence, 99th percentile", "kld_p99"),
        row("same top token", "top1_agreement"),
        row("right in one of the two alone (flips)", "flips"),
        row("greedy continuations that loop", "loops", "loops_teacher"),
        row("bits per weight, decoder linears", "bits_per_weight"),
        row("bits per weight, everything", "bits_per_weight_file"),
        ["MB, decoder linears", figures["bytes_decoder"] / 1e6, None, None],
        ["MB, everything with embeddings", *_megabytes(figures)],
    ]
    title = (
        f"{directory} on {figures['text']}: {figures['chunks']} chunks of {figures['seq_len']} tokens,"
        f" {figures['tokens']} tokens scored"
    )
    columns = ["", "compiled", INTERVAL, "original"]
    parts: list[RenderableType] = [terminal.table(title, columns, rows), Text(_caption(figures))]
    for table in summary.layer_tables(artifact.measured_passes(directory)):
        parts += [Text(), table]
    return parts


def _megabytes(figures: Mapping[str, Any]) -> tuple[float, None, float | None]:
    original = figures["bytes_original"]
    return figures["bytes_compiled"] / 1e6, None, None if original is None else original / 1e6


def _caption(figures: Mapping[str, Any]) -> str:
    """What the table's figures are."""
    parts = [f"Intervals: percentile bootstrap over {figures['chunks']} chunks, {RESAMPLES} draws."]
    if figures["greedy_tokens"]:
        parts.append(f"Greedy: {figures['greedy_tokens']} tokens behind the beginning of each chunk.")
    if figures["bytes_original"] is not None:
        parts.append("The original's size is that in 16 bit.")
    return " ".join(parts)


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


def find_teacher(loaded: artifact.Artifact, named: str | None, progress: Progress) -> UserModel | None:
    """The original model; None where it was not named and is not to be found.

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
    return model


def logits_of(model: UserModel) -> Logits:
    """An original model as a function from ids to logits."""
    return lambda ids: model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def sizes(program: Program, original: UserModel | None) -> dict[str, Any]:
    """``bytes_original``, the original's weights in 16 bit (None without it); ``bytes_compiled``, all weights of the
    artifact, embedding and head included; ``bytes_decoder``, those of its decoder layers' linears; and the figures of
    :func:`bits_per_weight`."""
    planes = stored_weights(program).keys() - planes_of_heads(program)
    parts = {f"{path}.{part}" for path in planes for part in WEIGHT} | _kept_float(program)
    parts |= {f"{path}.{part}" for path in coded_linears(program) for part in CODED}
    parts |= {path for path, _ in program.parameters() if path.startswith(_outliers(program))}
    stored = {path: tensor.numel() * tensor.element_size() for path, tensor in program.parameters()}
    whole = None
    if original is not None:
        tied = {p.data_ptr(): p.numel() for p in original.module.parameters()}
        whole = ORIGINAL_BYTES * sum(tied.values())
    return {
        "bytes_original": whole,
        "bytes_compiled": sum(stored.values()),
        "bytes_decoder": sum(size for path, size in stored.items() if path in parts),
        **bits_per_weight(program),
    }


def _kept_float(program: Program) -> set[str]:
    """Weights of the decoder layers' linears that were kept float."""
    return {info.weight for _, info in linears(program) if info.role == "dense" and info.layer is not None}


def _describing(program: Program) -> set[str]:
    """Tensors that describe other weights than W(1+1) ones: scales of rows and codes, clip factors, what shapes codes,
    and orders of channels."""
    weights = {"weight", "codes"}
    return {path for path, read in readers(program).items() if all(name not in weights for _, name in read)}


def _outliers(program: Program) -> tuple[str, ...]:
    """What the paths of tensors of outlier columns begin with."""
    return tuple(f"{info.weight}." for _, info in linears(program) if info.role == "outliers")


def bits_per_weight(program: Program) -> dict[str, float | None]:
    """Bits per weight as stored: over the linears of decoder layers, and over everything in the artifact's weights.

    Linears are the W(1+1) ones, with their outlier columns, those of 4-bit codes, and those that were kept float; None
    where there are none.
    """
    heads, matrices = planes_of_heads(program), stored_weights(program)
    coded, shared = coded_linears(program), stored_int4(program)
    decoder = [weight for path, weight in matrices.items() if path not in heads]
    decoder_weights = sum(_weights(w) for w in decoder) + sum(
        shared[path].out_features * shared[path].in_features for path in coded
    )
    decoder_bits = sum(w.stored_bits for w in decoder)
    kept = _kept_float(program)
    other_weights = other_bits = 0
    planes = {f"{path}.{part}" for path in matrices.keys() - heads for part in WEIGHT}
    codes_inside = {f"{path}.{part}" for path in coded for part in CODED}
    stored = dict(program.parameters())
    # A head that was tied to an embedding of another form is stored again, but is no further weights.
    codes = {
        f"{path}.codes": 0 if f"{path}.rows" in stored else w.out_features * w.in_features for path, w in shared.items()
    }
    codes |= {
        f"{path}.sign": 0 if {f"{path}.rows", f"{path}.codes"} & stored.keys() else _weights(matrices[path])
        for path in heads
    }
    outliers, describing = _outliers(program), _describing(program)
    for path, tensor in stored.items():
        if path in planes:
            continue
        bits = 8 * tensor.numel() * tensor.element_size()
        if path in codes_inside:
            decoder_bits += bits
            continue
        if path in kept or path.startswith(outliers):
            decoder_weights += 0 if path in describing else tensor.numel()
            decoder_bits += bits
            continue
        other_bits += bits
        other_weights += codes.get(path, 0 if path in describing else tensor.numel())
    whole = (decoder_bits + other_bits) / max(1, decoder_weights + other_weights)
    return {
        "bits_per_weight": decoder_bits / decoder_weights if decoder_weights else None,
        "bits_per_weight_file": whole,
    }


def _weights(matrix: QuantizedWeight) -> int:
    """Weights of a W(1+1) matrix, or of a stack of them."""
    return math.prod(matrix.sign.shape[:-1]) * matrix.in_features


def _resampled_means(values: Sequence[Tensor]) -> Tensor | None:
    """Means over tokens in ``RESAMPLES`` draws of chunks with replacement, float64 ``[RESAMPLES]``; None where there
    are fewer than two chunks. The draws are the same for all figures of the same chunks."""
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    sums = torch.stack([chunk.double().sum() for chunk in values])
    counts = torch.tensor([chunk.numel() for chunk in values], dtype=torch.float64)
    return sums[drawn].sum(-1) / counts[drawn].sum(-1)


def _perplexity(nll: Sequence[Tensor]) -> float:
    return float(torch.cat(list(nll)).double().mean().exp())
