"""Sampling: from a step function over token ids to tokens, greedy or random, for one sequence or a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.threads import one_torch_thread
from lbllm_compile.passes.base import MAX_SEED
from lbllm_compile.passes.program import Program

FEW_TOKENS = 16
"""Up to this many tokens a step, torch's operators between the kernels are too small to share among threads."""

SHORT_CONTEXT = 1024
"""Up to this many tokens to attend to, for each sequence; attention over more is worth sharing."""


class GenerationError(LbllmError):
    """A request that cannot be answered: an empty prompt, one beyond the context, options out of range."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many tokens a sequence.
        temperature: 0 for the most likely token (greedy); else logits are divided by it.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together reach this probability; 1 for all.
        seed: start of the generator that draws; the global one is not touched.

    Raises:
        GenerationError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1")
        if not self.temperature >= 0.0:
            raise GenerationError(f"the temperature is {self.temperature}; use 0 (greedy) or more")
        if self.top_k < 0:
            raise GenerationError(f"top_k is {self.top_k}; use 0 (all tokens) or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise GenerationError(f"the seed is {self.seed}; use 0 to {MAX_SEED}")
        if not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p is {self.top_p}; use a probability above 0 and at most 1")


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt; with ``chat`` as a user's turn in the tokenizer's chat template.

    Raises:
        GenerationError: there is no tokenizer, or no chat template.
    """
    if tokenizer is None:
        raise GenerationError("the model has no tokenizer; pass token ids instead of text")
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise GenerationError("the tokenizer has no chat template; pass the prompt as plain text")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_prompts(program: Program, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Checks that a model can answer prompts of token ids; needs no kernels.

    Raises:
        GenerationError: it is no language model, a prompt is empty, or does not fit the context with the new tokens.
    """
    if program.kind != "causal-lm":
        raise GenerationError("the model is not a language model; call it on its inputs instead")
    if not prompts or any(not len(p) for p in prompts):
        raise GenerationError("the prompt is empty; give at least one token")
    longest, limit = max(len(p) for p in prompts), program.context_length
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise GenerationError(
            f"the prompt has {longest} tokens and {sampling.max_new_tokens} more were asked for, but the model's"
            f" context holds {limit}; "
            + ("shorten the prompt" if longest >= limit else f"ask for at most {limit - longest}")
        )


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token ids ``[B]`` from logits ``[B, V]``."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.double() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        # a token stays while those before it have not reached top_p, so that the first one always stays
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


Step = Callable[[Tensor], Tensor]
"""Feeds token ids ``[B, S]`` and returns the logits behind the last of them, ``[B, V]``."""


def tokens(step: Step, prompt: Tensor, sampling: Sampling, stop: Sequence[int]) -> Iterator[list[int | None]]:
    """Generates; yields one token per sequence and step, None where a sequence has ended.

    A stop token ends its sequence and is not yielded. Ended sequences are fed their stop token until all have ended.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    stop_ids = frozenset(stop)
    running = [True] * prompt.shape[0]
    ids, context = prompt, 0
    for _ in range(sampling.max_new_tokens):
        context += ids.shape[1]
        small = ids.numel() <= FEW_TOKENS and ids.shape[0] * context <= SHORT_CONTEXT
        with one_torch_thread() if small else nullcontext():
            chosen = choose(step(ids), sampling, generator).tolist()
        running = [r and token not in stop_ids for r, token in zip(running, chosen, strict=True)]
        if not any(running):
            return
        yield [token if r else None for r, token in zip(running, chosen, strict=True)]
        ids = torch.tensor(chosen, dtype=torch.int64).unsqueeze(1)


class TextStream:
    """Turns token ids into text piece by piece, holding back characters whose bytes are not complete."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that ``token`` adds; empty while a character is incomplete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd"):
            return ""
        # a few tokens of context keep spaces between words; older ones no longer matter
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """What was held back."""
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]
