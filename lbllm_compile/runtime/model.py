"""A compiled model in memory: logits, text generation, or a plain module's outputs, all from the lowered graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.passes.program import STATE, Program
from lbllm_compile.runtime.executor import Executor, Kernels
from lbllm_compile.runtime.generate import GenerationError, Sampling, TextStream, check_prompts, encode, tokens
from lbllm_compile.runtime.state import KVState, left_pad, positions


class CompiledModel:
    """Runs a lowered program.

    Attributes:
        program: the lowered graph and its canonical weights.
        kernels: the proven kernels it runs on.
        tokenizer: a transformers tokenizer, or None.
    """

    def __init__(self, program: Program, kernels: Kernels):
        self.program = program
        self.kernels = kernels
        self.tokenizer = program.tokenizer
        self._executor = Executor(program, kernels)
        self._inputs = [str(n.target) for n in program.placeholders() if STATE not in n.meta and n.target != "past"]

    @property
    def is_language_model(self) -> bool:
        return self.program.kind == "causal-lm"

    @property
    def context_length(self) -> int | None:
        """Tokens the model can attend to, as its configuration says; None where it does not say."""
        return self.program.context_length

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The graph's output on a plain module's inputs, by position or name; on a language model's, all logits.

        Raises:
            GenerationError: an input is missing or unknown.
        """
        values = dict(zip(self._inputs, inputs, strict=False))
        if len(inputs) > len(self._inputs) or set(values) & set(named) or set(named) - set(self._inputs):
            raise GenerationError(f"the model takes the inputs {', '.join(self._inputs)}, each once")
        values.update(named)
        if self.is_language_model and "input_ids" in values:
            return self.logits(values["input_ids"], values.get("attention_mask"), values.get("position_ids"))
        missing = [n for n in self._inputs if n not in values]
        if missing:
            raise GenerationError(f"the input '{missing[0]}' is missing; the model takes {', '.join(self._inputs)}")
        return self._executor(*self.program.arguments(values))

    def logits(self, ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, V]`` of whole sequences ``[B, S]``."""
        mask = torch.ones_like(ids) if mask is None else mask
        positions_given = positions(mask) if position_ids is None else position_ids
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_given}
        return self._executor(*self.program.arguments(inputs))

    def session(self, batch: int, capacity: int = 0) -> Session:
        """An empty conversation with ``batch`` sequences."""
        return Session(self.program, self._executor, batch, capacity)

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with ``chat`` as a user's turn in the tokenizer's chat template.

        Raises:
            GenerationError: there is no tokenizer, or no chat template.
        """
        return encode(self.tokenizer, prompt, chat=chat)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-text tokens that configuration and tokenizer name."""
        found = self.program.config.get("eos_token_id")
        ids = [*found] if isinstance(found, list) else [found]
        ids.append(getattr(self.tokenizer, "eos_token_id", None))
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None, stop: Sequence[int] | None = None
    ) -> Iterator[list[int | None]]:
        """Generates from token ids; yields one token per sequence and step, None where a sequence has ended.

        Prompts of different lengths are padded on the left. ``stop`` defaults to :meth:`stop_tokens`.

        Raises:
            GenerationError: a prompt is empty, or does not fit the context together with the new tokens.
        """
        sampling = sampling or Sampling()
        check_prompts(self.program, prompts, sampling)
        ids, mask = left_pad(prompts)
        session = self.session(len(prompts), ids.shape[1] + sampling.max_new_tokens)
        session.start(mask)
        return tokens(session.step, ids, sampling, self.stop_tokens() if stop is None else stop)

    def stream(self, prompt: str | Sequence[int], *, chat: bool = False, **options: Any) -> Iterator[str]:
        """Text of the answer, piece by piece. ``options`` are :class:`~.generate.Sampling`'s fields and ``stop``."""
        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else prompt
        stop = options.pop("stop", None)
        text = TextStream(self.decode)
        for step in self.generate_ids([ids], Sampling(**options), stop):
            if step[0] is not None and (piece := text.push(step[0])):
                yield piece
        if rest := text.end():
            yield rest

    def generate(self, prompt: str | Sequence[str], *, chat: bool = False, **options: Any) -> str | list[str]:
        """The answer to a prompt, or to several at once. ``options`` as in :meth:`stream`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        stop = options.pop("stop", None)
        answers: list[list[int]] = [[] for _ in prompts]
        for step in self.generate_ids([self.encode(p, chat=chat) for p in prompts], Sampling(**options), stop):
            for answer, token in zip(answers, step, strict=True):
                if token is not None:
                    answer.append(token)
        texts = [self.decode(a) for a in answers]
        return texts[0] if isinstance(prompt, str) else texts


class Session:
    """One generation in progress: the KV state and the attention mask of a batch of sequences."""

    def __init__(self, program: Program, executor: Executor, batch: int, capacity: int):
        self._executor = executor
        self._order = [n.target for n in program.placeholders()]
        self._state_names = [n.target for n in program.state_placeholders()]
        self.state = KVState.of(program, batch, capacity)
        self._mask = torch.zeros((batch, self.state.capacity), dtype=torch.int64)
        self._lengths = torch.zeros((batch, 1), dtype=torch.int64)
        self._prompt_mask: Tensor | None = None

    def start(self, mask: Tensor) -> None:
        """Sets which tokens of the prompt, fed next, are not padding: ``[B, S]``."""
        self._prompt_mask = mask

    def step(self, ids: Tensor) -> Tensor:
        """Feeds ``[B, S]`` more token ids; returns the logits behind the last one, ``[B, V]``."""
        return self._executor.last_logits(*self._feed(ids))[:, -1]

    def logits(self, ids: Tensor) -> Tensor:
        """Feeds ``[B, S]`` more token ids; returns the logits of all of them, ``[B, S, V]``."""
        return self._executor(*self._feed(ids))

    def _feed(self, ids: Tensor) -> list[Any]:
        """Arguments of the next call; the state counts the new tokens as stored."""
        state, count = self.state, ids.shape[1]
        state.reserve(count)
        if self._mask.shape[1] < state.capacity:
            self._mask = torch.nn.functional.pad(self._mask, (0, state.capacity - self._mask.shape[1]))
        past, end = state.past, state.past + count
        new = torch.ones_like(ids) if self._prompt_mask is None else self._prompt_mask
        self._prompt_mask = None
        self._mask[:, past:end] = new
        values = {
            "input_ids": ids,
            "attention_mask": self._mask[:, :end],
            "position_ids": (self._lengths + new.cumsum(1) - 1).clamp_min(0),
            "past": past,
            **dict(zip(self._state_names, state.tensors, strict=True)),
        }
        self._lengths += new.sum(1, keepdim=True)
        state.past = end
        return [values[name] for name in self._order]
