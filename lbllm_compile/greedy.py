"""Greedy text: how models continue prompts, and how often that ends in a loop.

Models that were compressed too far repeat themselves for ever where the original still moves on, which neither
perplexity nor divergence shows: both are measured behind text that people wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lbllm_compile.codegen.progress import Progress
from lbllm_compile.frontend import UserModel
from lbllm_compile.passes.ir import spool
from lbllm_compile.runtime import Sampling
from lbllm_compile.runtime.model import CompiledModel

PROMPT = 32
"""Tokens of a text that are continued, where the model's context has room for them."""

CONTINUATION = 256
"""Greedy tokens behind them, where nothing else is asked for and the model's context has room."""

SHORTEST = 24
"""Tokens of the shortest continuation that can be told to loop."""

REPEATS = 3
"""So often a period must fit into the second half of a continuation."""

_TOGETHER = 8
"""Prompts that are continued at a time."""


def loops(tokens: Sequence[int]) -> bool:
    """Whether a continuation ends in a loop: its second half repeats with one period from its beginning to its end,
    ``REPEATS`` times or more."""
    tail = tokens[len(tokens) // 2 :]
    return any(tail[period:] == tail[:-period] for period in range(1, len(tail) // REPEATS + 1))


def prompts(pieces: Sequence[Tensor], context: int | None) -> list[list[int]]:
    """The beginnings of chunks ``[1, S]``, all of one length: ``PROMPT`` tokens, or a quarter of a short context."""
    length = min(PROMPT, pieces[0].shape[1], max(1, (context or 4 * PROMPT) // 4))
    return [piece[0, :length].tolist() for piece in pieces]


def compiled_rate(model: CompiledModel, given: Sequence[Sequence[int]], count: int, progress: Progress) -> float:
    """The share of prompts of one length behind which ``count`` greedy tokens of a compiled model loop.

    What an end token ends does not loop.

    Raises:
        GenerationError: prompt and continuation do not fit the model's context.
    """
    sampling = Sampling(max_new_tokens=count)
    ended = 0
    with progress.task("greedy text, compiled", len(given)) as task:
        for batch in _batches(given):
            steps = list(model.generate_ids(batch, sampling))
            for tokens in zip(*steps, strict=True):
                ended += len(tokens) == count and None not in tokens and loops(tokens)
                task.advance()
    return ended / len(given)


def original_rate(
    model: UserModel, given: Sequence[Sequence[int]], count: int, stop: Sequence[int], progress: Progress
) -> float:
    """As :func:`compiled_rate`, of the original module in eager torch; ``stop`` are the end tokens."""
    ended = 0
    with progress.task("greedy text, original", len(given)) as task:
        for batch in _batches(given):
            steps = original_tokens(model, torch.tensor(batch))
            made = torch.stack([next(steps) for _ in range(count)], -1).tolist()
            for tokens in made:
                ended += not set(tokens) & set(stop) and loops(tokens)
                task.advance()
    spool.release()
    return ended / len(given)


@torch.inference_mode()
def original_tokens(model: UserModel, ids: Tensor) -> Iterator[Tensor]:
    """Greedy tokens ``[B]``, step by step, of the original module behind ``[B, S]``, with its own KV cache."""
    cache = None
    while True:
        result = model.module(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = result.logits[:, -1:].argmax(-1), result.past_key_values
        yield ids[:, 0]


def _batches(given: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(given), _TOGETHER):
        yield [list(prompt) for prompt in given[start : start + _TOGETHER]]
