"""The speed and size sheet: what a compile bought and what it cost, measured on the artifact just written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_compile import evaluate, greedy
from lbllm_compile.calibration import CalibrationSet
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.frontend import UserModel
from lbllm_compile.kernels import BuiltKernels
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.compare import relative_error
from lbllm_compile.records import NOT_MEASURED
from lbllm_compile.runtime import Sampling, load
from lbllm_compile.runtime.model import CompiledModel

CHECK_TOKENS = 16
"""Greedy tokens that the compile records and a loaded artifact must repeat."""

WARM_UP = 4
"""Decode steps before the clock starts."""

DECODE_TOKENS = 32
"""Decode steps timed in each of the alternating rounds."""

ROUNDS = 3


class SelfCheckError(LbllmError):
    """The artifact, loaded again, does not give what the compile gave: a bug, or a broken disk."""

    exit_code = 1


def check_outputs(model: CompiledModel, probe: Mapping[str, Any]) -> dict[str, Any]:
    """What the model gives on the probe; a loaded artifact must give the same, to the bit.

    A language model: ``prompt`` and the greedy ``tokens`` behind it. A plain module: ``sha256`` of its output.
    """
    if not model.is_language_model:
        output = model(**probe).contiguous()
        return {"sha256": hashlib.sha256(output.view(torch.uint8).numpy().data).hexdigest()}
    prompt = probe["input_ids"][0].tolist()
    return {"prompt": prompt, "tokens": _greedy(model, prompt, CHECK_TOKENS)}


def measure(
    original: UserModel,
    out: Path,
    data: CalibrationSet,
    kernels: BuiltKernels,
    check: Mapping[str, Any],
    progress: Progress,
    *,
    sizes_only: bool = False,
) -> dict[str, Any]:
    """Loads the artifact again, checks it and compares it with the original model.

    Args:
        original: the model it was compiled from.
        out: the artifact.
        data: held-out inputs and a probe.
        kernels: the compile's.
        check: what the compile gave on the probe.
        progress: told what goes on.
        sizes_only: measure neither quality nor speed; ``NOT_MEASURED`` says so among the figures.

    Returns:
        JSON-able figures: those of :func:`lbllm_compile.evaluate.sizes`; ``cuda_kernels`` (how each architecture's were
        proven) where there are any; for a language model also
        ``text``, ``ppl_teacher``, ``ppl``, ``kld_mean``, ``top1_agreement`` and the tokens per second of greedy
        decoding with a KV cache, ``decode_original`` (eager torch, float32) and ``decode_compiled``; for another module
        ``relative_error`` on the validation inputs.

    Raises:
        SelfCheckError: the loaded artifact does not give what the compile gave.
    """
    loaded = load(out, kernels=kernels.host)
    if check_outputs(loaded, data.probe) != check:
        raise SelfCheckError(f"the artifact at '{out}', loaded again, does not give what the compile gave; report this")
    figures = evaluate.sizes(loaded.program, original)
    for kind, proofs in kernels.proofs.items():
        figures[f"{kind}_kernels"] = ", ".join(proofs)
    if sizes_only:
        return {**figures, NOT_MEASURED: "quality and speed"}
    if not loaded.is_language_model:
        errors = [relative_error(original.module(**batch), loaded(**batch)) for batch in data.validation]
        return {**figures, "relative_error": sum(errors) / len(errors)}
    chunks = [ids[None] for batch in data.validation for ids in batch["input_ids"]]

    def teacher(ids: Tensor) -> Tensor:
        with spool.streamed(original.module):
            return original.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    scores = evaluate.compare(loaded.logits, teacher, chunks, progress).summary()
    text = f"{len(chunks)} held-out sequences of {chunks[0].shape[1]} tokens from {data.source}"
    figures |= {"text": text, **{k: scores[k] for k in ("ppl_teacher", "ppl", "kld_mean", "top1_agreement")}}
    return figures | _decoding_speeds(original, loaded, data.probe["input_ids"][0], progress)


def _greedy(model: CompiledModel, prompt: Sequence[int], count: int) -> list[int | None]:
    """``count`` greedy tokens behind ``prompt``, not stopping at an end token."""
    return [step[0] for step in model.generate_ids([prompt], Sampling(max_new_tokens=count), stop=())]


def _decoding_speeds(
    original: UserModel, loaded: CompiledModel, prompt: Tensor, progress: Progress
) -> dict[str, float]:
    """Tokens per second of both models, in alternation; the best round of each counts, as the least disturbed."""
    steps = WARM_UP + DECODE_TOKENS
    best = {"decode_original": 0.0, "decode_compiled": 0.0}
    with progress.task("decoding speed", ROUNDS) as task:
        for _ in range(ROUNDS):
            compiled = loaded.generate_ids([prompt.tolist()], Sampling(max_new_tokens=steps), stop=())
            eager = greedy.original_tokens(original, prompt[None])
            for name, tokens in (("decode_original", eager), ("decode_compiled", compiled)):
                for _ in islice(tokens, WARM_UP):
                    pass
                start = time.perf_counter()
                for _ in islice(tokens, DECODE_TOKENS):
                    pass
                best[name] = max(best[name], DECODE_TOKENS / (time.perf_counter() - start))
            task.advance(f"{best['decode_compiled']:.1f} tokens/s")
    spool.release()
    return best
