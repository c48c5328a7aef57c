"""A compiled model in memory: logits, text generation, or a plain module's outputs, all from the lowered graph.

Two things can run the graph: the native program it was translated into, and the executor in torch, which holds every
graph and runs one operator after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lbllm_compile.codegen.backend import EagerKernels
from lbllm_compile.lowering.bounds import input_bounds
from lbllm_compile.lowering.executor import Executor
from lbllm_compile.lowering.session import Session
from lbllm_compile.lowering.state import positions
from lbllm_compile.native.generate import GenerationError, Sampling, Steps
from lbllm_compile.native.language import InputBounds, LanguageModel
from lbllm_compile.native.program import StoredProgram
from lbllm_compile.passes.ir.program import STATE, Program


class CompiledModel(LanguageModel):
    """Runs a lowered program.

    Args:
        program: the lowered graph and its canonical weights.
        kernels: the proven kernels it runs on.
        native: the program that the graph was translated into; without one the executor in torch runs the graph.
    """

    def __init__(self, program: Program, kernels: EagerKernels, native: StoredProgram | None = None):
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
