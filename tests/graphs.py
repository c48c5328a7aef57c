"""Small hand-written graphs, and graphs as comparable text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lbllm_compile.codegen import operators as operators
from lbllm_compile.passes.annotate import LAYER, LINEAR, LINEAR_TARGETS, LinearInfo
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import calls
from torch import Tensor, fx, nn


class Weights(nn.Module):
    """Tensors under dotted paths, as buffers."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for path, tensor in tensors.items():
            *parents, leaf = path.split(".")
            owner: nn.Module = self
            for part in parents:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_buffer(leaf, tensor)


def program(
    weights: Mapping[str, Tensor], forward: Callable[..., object], kind: str = "causal-lm", head: str = "head"
) -> Program:
    """Traces ``forward(root, *inputs)``, in which operators are called as ``torch.ops``; annotates its linears.

    A weight path that starts with ``head`` is the output head's; all others are decoder layer 0's.
    """

    class Root(Weights):
        pass

    Root.forward = forward
    graph_module = fx.symbolic_trace(Root(weights))
    for node in calls(graph_module.graph, *LINEAR_TARGETS):
        if node.args[1].op == "get_attr":
            path = node.args[1].target.removesuffix(".weight")
            role = "head" if path.startswith(head) else "decoder"
            layer = None if role == "head" else 0
            node.meta[LINEAR] = LinearInfo(path, node.args[1].target, layer, role, 0, "test")
            node.meta[LAYER] = layer
    return Program(graph_module, kind)


def lines(item: Program) -> list[str]:
    """The graph without inputs: every node after the weights it is the first to use, names and shapes left out.

    ``%N`` is the N-th computed node, so that texts do not depend on how nodes were named.
    """
    numbers: dict[str, str] = {}
    computed = 0
    for node in item.graph.nodes:
        if node.op == "call_function":
            numbers[node.name] = f"%{computed}"
            computed += 1
        else:
            numbers[node.name] = str(node.target)

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return numbers[value.name]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(text(v) for v in value) + "]"
        return str(value)

    result = []
    for node in item.graph.nodes:
        if node.op == "call_function":
            arguments = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
            result.append(f"{numbers[node.name]} = {dump.target_text(node)}({', '.join(arguments)})")
        elif node.op == "output":
            result.append(f"return {text(node.args[0])}")
    return result


def expected(block: str) -> list[str]:
    """An indented text as :func:`lines` gives it."""
    return [line.strip() for line in block.strip().splitlines()]


def token_inputs(batch: int = 2, length: int = 9, padding: int = 3, vocabulary: int = 11) -> dict[str, Tensor]:
    """A language model's inputs; the first sequence has left padding."""
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def context(inputs: Mapping[str, Tensor] | None = None) -> PassContext:
    """A context with ``inputs`` as its probe; without, passes check nothing by running the program."""
    return PassContext(probe=inputs or {})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
