"""A compiled model in memory: logits, text generation, or a plain module's outputs, all from the lowered graph.

Two things can run the graph: the native program it was translated into, and the executor in torch, which holds every
graph and runs one operator after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbllm_compile.codegen.threads import one_torch_thread
from lbllm_compile.lowering.bounds import input_bounds
from lbllm_compile.lowering.executor import Executor, Kernels
from lbllm_compile.passes.ir.program import STATE, Program
from lbllm_compile.runtime.generate import GenerationError, Sampling
from lbllm_compile.runtime.language import InputBounds, LanguageModel, Steps
from lbllm_compile.runtime.native import NativeProgram
from lbllm_compile.runtime.state import KVState, positions

FEW_TOKENS = 16
"""Up to this many tokens a step, torch's operators between the kernels are too small to share among threads."""

SHORT_CONTEXT = 1024
"""Up to this many tokens to attend to, for each sequence; attention over more is worth sharing."""


class CompiledModel(LanguageModel):
    """Runs a lowered program.

    Args:
        program: the lowered graph and its canonical weights.
        kernels: the proven kernels it runs on.
        native: the program that the graph was translated into; without one the executor in torch runs the graph.
    """

    def __init__(self, program: Program, kernels: Kernels, native: NativeProgram | None = None):
        self.program = program
        self.kernels = kernels
        self.native = native
        self.config = program.config
        self.tokenizer = program.tokenizer
        self._executor = Executor(program, kernels) if native is None else None
        self._inputs = [str(n.target) for n in program.placeholders() if STATE not in n.meta and n.target != "past"]

    @property
    def is_language_model(self) -> bool:
        return self.program.kind == "causal-lm"

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
        return self.executor(*self.program.arguments(values))

    @functools.cached_property
    def _bounds(self) -> InputBounds:
        return input_bounds(self.program)

    @property
    def executor(self) -> Executor:
        """Runs the graph in torch, bound at first use where there is a native program."""
        if self._executor is None:
            self._executor = Executor(self.program, self.kernels)
        return self._executor

    def logits(self, ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, V]`` of whole sequences ``[B, S]``."""
        mask = torch.ones_like(ids) if mask is None else mask
        if self.native is not None and position_ids is None:
            session = self.native.session(*ids.shape)
            session.start(mask.numpy())
            return torch.from_numpy(session.logits(ids.numpy()))
        positions_given = positions(mask) if position_ids is None else position_ids
        if ids.numel():
            self._bounds.check_ids(int(ids.min()), int(ids.max()))
            self._bounds.check_length(int(positions_given.max()) + 1, ids.shape[1])
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_given}
        return self.executor(*self.program.arguments(inputs))

    def session(self, batch: int, capacity: int = 0) -> Steps:
        if self.native is not None:
            return self.native.session(batch, capacity)
        return Session(self.program, self.executor, batch, capacity)

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None, stop: Sequence[int] | None = None
    ) -> Iterator[list[int | None]]:
        """As :meth:`LanguageModel.generate_ids`.

        Raises:
            GenerationError: also where the model is not a language model.
        """
        if not self.is_language_model:
            raise GenerationError("the model is not a language model; call it on its inputs instead")
        return super().generate_ids(prompts, sampling, stop)


class Session:
    """One generation in progress in torch: the KV state and the attention mask of a batch of sequences."""

    def __init__(self, program: Program, executor: Executor, batch: int, capacity: int):
        self._executor = executor
        self._order = [n.target for n in program.placeholders()]
        self._state_names = [n.target for n in program.state_placeholders()]
        self.state = KVState.of(program, batch, capacity)
        self._mask = torch.zeros((batch, self.state.capacity), dtype=torch.int64)
        self._lengths = torch.zeros((batch, 1), dtype=torch.int64)
        self._prompt_mask: Tensor | None = None
        self._bounds = input_bounds(program)

    def start(self, mask: np.ndarray | Tensor) -> None:
        """Sets which tokens of the prompt, fed next, are not padding: ``[B, S]``."""
        self._prompt_mask = torch.as_tensor(mask)

    def step(self, ids: np.ndarray | Tensor) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits behind the last one, ``[B, V]``."""
        given = torch.as_tensor(ids)
        batch, length = given.shape
        small = batch * length <= FEW_TOKENS and batch * (self.state.past + length) <= SHORT_CONTEXT
        with one_torch_thread() if small else nullcontext():
            return self._executor.last_logits(*self._feed(given))[:, -1].numpy()

    def rewind(self, tokens: int) -> bool:
        """Forgets all but the first ``tokens`` of a single sequence without padding.

        Returns:
            False, with nothing changed, where the model keeps a state that cannot go back.
        """
        if tokens < self.state.past and self.state.has_fixed:
            return False
        self.state.past = tokens
        self._lengths[:], self._mask[:, tokens:] = tokens, 0
        return True

    def logits(self, ids: np.ndarray | Tensor) -> Tensor:
        """Feeds ``[B, S]`` more token ids; returns the logits of all of them, ``[B, S, V]``."""
        return self._executor(*self._feed(torch.as_tensor(ids)))

    def _feed(self, ids: Tensor) -> list[Any]:
        """Arguments of the next call; the state counts the new tokens as stored."""
        state, count = self.state, ids.shape[1]
        new = torch.ones_like(ids) if self._prompt_mask is None else self._prompt_mask
        if ids.numel():
            self._bounds.check_ids(int(ids.min()), int(ids.max()))
            tokens = int((self._lengths + new.sum(1, keepdim=True)).max())
            self._bounds.check_length(tokens, state.past + count)
        state.reserve(count)
        if self._mask.shape[1] < state.capacity:
            self._mask = torch.nn.functional.pad(self._mask, (0, state.capacity - self._mask.shape[1]))
        past, end = state.past, state.past + count
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
