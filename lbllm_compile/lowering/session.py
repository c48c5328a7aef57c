"""A conversation with a language model in torch: its graph on the executor, with the KV state that it keeps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbllm_compile.codegen.threads import one_torch_thread
from lbllm_compile.lowering.bounds import input_bounds
from lbllm_compile.lowering.executor import Executor
from lbllm_compile.lowering.state import KVState
from lbllm_compile.passes.ir.program import Program

FEW_TOKENS = 16
"""Up to this many tokens a step, torch's operators between the kernels are too small to share among threads."""

SHORT_CONTEXT = 1024
"""Up to this many tokens to attend to, for each sequence; attention over more is worth sharing."""


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
