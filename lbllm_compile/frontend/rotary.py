"""Rotary embeddings whose frequencies depend on the length of the sequence, held still for a capture.

transformers computes two kinds of them anew in every forward: *longrope* (Phi-3) has one table for sequences within the
length the model was first trained for and another for longer ones, *dynamic* (NTK) scaling has one for every length
beyond that. A graph has one table. That of the context asked for is taken, as transformers computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LONG, DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True)
class Frozen:
    """Which frequencies a capture holds.

    Attributes:
        kind: ``"longrope"`` or ``"dynamic"``.
        context: tokens that the frequencies are for.
        original: the longest sequence whose frequencies are the model's own, unscaled ones.
    """

    kind: str
    context: int
    original: int

    def __str__(self) -> str:
        if self.context <= self.original:
            return (
                f"the {self.kind} rotary frequencies are those of sequences of up to {self.original} tokens; for longer"
                " ones give --context"
            )
        if self.kind == LONG:
            return (
                f"the longrope frequencies are those of sequences of more than {self.original} and up to"
                f" {self.context} tokens; shorter ones get them too, where the original model would switch"
            )
        return (
            f"the dynamic rotary frequencies are those of a sequence of {self.context} tokens; shorter ones get them"
            " too, where the original model would compute its own for every length"
        )


def frozen_kind(module: nn.Module, context: int | None) -> Frozen | None:
    """What :func:`frozen` will hold still for a context; None where no frequencies depend on the length.

    Args:
        module: a transformers model.
        context: tokens asked for; by default the longest sequence with unscaled frequencies.
    """
    found = [(kind, _original(m, layer)) for m in module.modules() for layer, kind in _kinds(m)]
    if not found:
        return None
    original = min(length for _, length in found)
    kind = LONG if any(kind == LONG for kind, _ in found) else DYNAMIC
    return Frozen(kind, context or original, original)


@contextlib.contextmanager
def frozen(module: nn.Module, context: int) -> Iterator[None]:
    """While this lasts, every rotary embedding has the frequencies of a sequence of ``context`` tokens."""
    with contextlib.ExitStack() as restored:
        for rotary in module.modules():
            kinds = _kinds(rotary)
            if not kinds:
                continue
            restored.enter_context(_unchanged(rotary))
            # transformers' own rule, told of the last position
            last = torch.tensor([[context - 1]])
            for layer, _ in kinds:
                rotary(torch.zeros(1), last, **({} if layer is None else {"layer_type": layer}))
            still: Any = "default"
            if isinstance(rotary.rope_type, Mapping):
                still = {**rotary.rope_type, **{layer: "default" for layer, _ in kinds}}
            rotary.rope_type = still
        yield


def _kinds(module: nn.Module) -> list[tuple[str | None, str]]:
    """Types of layers (None for all) and kinds of the frequencies that a rotary embedding recomputes."""
    types: Any = getattr(module, "rope_type", None)
    by_layer = types if isinstance(types, Mapping) else {None: types}
    kinds = {layer: DYNAMIC if isinstance(t, str) and DYNAMIC in t else t for layer, t in by_layer.items()}
    return [(layer, kind) for layer, kind in kinds.items() if kind in (LONG, DYNAMIC)]


def _original(rotary: Any, layer: str | None) -> int:
    parameters = rotary.config.rope_parameters
    parameters = parameters[layer] if layer is not None else parameters
    if _kinds(rotary) and parameters["rope_type"] == LONG:
        return int(parameters["original_max_position_embeddings"])
    return int(rotary.original_max_seq_len)


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Puts a module's attributes and buffers back as they were, also those that were written in place."""
    attributes = dict(vars(module))
    buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
