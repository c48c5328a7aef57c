"""``Program``: the one thing that flows through the compiler: an FX graph at ATen level and its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .spool import Gauge, release

CPU = torch.device("cpu")
"""Where programs are."""

STATE = "lbllm_state"
"""Key in a placeholder's meta that marks it as KV state: see :class:`StateSpec`."""


LAYER = "lbllm_layer"
"""Key of a node's decoder-layer index (or None) in ``node.meta``, which the pass ``annotate`` sets."""

IN_FEATURES = "lbllm_in_features"
"""Meta key with ``K`` on every integer operator: the packed planes alone tell it only up to eight."""

STAT = "lbllm_stat"
"""Meta key of an observer: the statistics it collects."""

PER_TOKEN, FIXED = "per_token", "fixed"
"""Kinds of state: one entry for every token so far, or a size that does not grow with them."""


@dataclass(frozen=True)
class StateSpec:
    """Shape of one placeholder that holds state between calls, zeros at first.

    Attributes:
        heads: key/value heads, or channels.
        tail: trailing dimensions (packed codes, or scale and zero point).
        dtype: torch dtype of the tensor.
        kind: ``PER_TOKEN`` for ``[batch, heads, capacity, *tail]``, ``FIXED`` for ``[batch, heads, *tail]``.
    """

    heads: int
    tail: tuple[int, ...]
    dtype: torch.dtype
    kind: str = PER_TOKEN

    def allocate(self, batch: int, capacity: int) -> Tensor:
        """An empty state of ``batch`` sequences with room for ``capacity`` tokens."""
        slots = (capacity,) if self.kind == PER_TOKEN else ()
        return torch.zeros((batch, self.heads, *slots, *self.tail), dtype=self.dtype)


@dataclass(frozen=True)
class Program:
    """A captured model at some point of the pipeline. Passes return a new one; they never change the one they got.

    Attributes:
        module: the graph and its weights. Weights are ``get_attr`` nodes whose targets are the original module paths.
            A language model's placeholders are ``input_ids``, ``attention_mask`` (int64 ``[B, T]``, T = past + S) and
            ``position_ids``; after the pass ``cache`` also ``past`` (an int) and the KV state. The graph returns one
            tensor (logits ``[B, S, V]`` for a language model).
        kind: ``"causal-lm"`` or ``"module"`` (anything else with linears).
        name: the model's name, for messages and the artifact.
        config: the model's configuration as JSON-able values; empty for a plain module.
        tokenizer: a transformers tokenizer, or None.
        metadata: facts that later stages and the artifact carry along (JSON-able).
    """

    module: fx.GraphModule
    kind: str = "causal-lm"
    name: str = "model"
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def with_module(self, module: fx.GraphModule, **metadata: Any) -> Program:
        """The same program around another graph, with ``metadata`` added."""
        return replace(self, module=module, metadata={**self.metadata, **metadata})

    def copy(self) -> Program:
        """A copy whose graph and attribute table can be changed; the tensors themselves are shared."""
        return replace(self, module=copy_module(self.module))

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def state_placeholders(self) -> list[fx.Node]:
        return [n for n in self.placeholders() if STATE in n.meta]

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight the graph uses, by its original path, in graph order, each once."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(node.target)
                value = get_attribute(self.module, node.target)
                if isinstance(value, Tensor):
                    yield node.target, value

    def arguments(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Orders ``inputs`` by placeholder, and adds a fresh KV state and ``past = 0`` where the graph wants them.

        Raises:
            KeyError: a placeholder has no value in ``inputs``.
        """
        values = []
        for node in self.placeholders():
            if node.target in inputs:
                values.append(inputs[node.target])
            elif STATE in node.meta:
                batch, length = inputs["attention_mask"].shape
                values.append(node.meta[STATE].allocate(batch, length))
            elif node.target == "past":
                values.append(0)
            else:
                raise KeyError(f"no value for the graph input '{node.target}'")
        return values

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """Runs the graph once, without past, on a mapping from placeholder name to value; see :class:`Runner`."""
        return Runner(self.module).run(*self.arguments(inputs))


class Runner(fx.Interpreter):
    """Runs a graph on little memory: what depends on weights alone is computed right before its first use, and weights
    that are mapped from a file are dropped from memory behind it. The values are those of the module.

    Subclasses say in :meth:`evaluate` what else a node may compute.
    """

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, graph=_weights_late(module.graph))
        self._gauge = Gauge()

    def evaluate(self, n: fx.Node) -> Any:
        """The value of a node, whose arguments are in ``self.env``."""
        return super().run_node(n)

    def run_node(self, n: fx.Node) -> Any:
        value = self.evaluate(n)
        weights = (self.env[a] for a in n.all_input_nodes if a.op == "get_attr")
        self._gauge.use(w for w in weights if isinstance(w, Tensor))
        return value

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            release()


def _weights_late(graph: fx.Graph) -> fx.Graph:
    """A copy in which every node that depends on weights alone stands right before its first user."""
    constant: set[fx.Node] = set()
    late = fx.Graph()
    late.set_codegen(graph._codegen)
    values: dict[fx.Node, fx.Node] = {}

    def place(node: fx.Node) -> None:
        for needed in node.all_input_nodes:
            if needed not in values:
                place(needed)
        values[node] = late.node_copy(node, lambda n: values[n])

    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
        else:
            place(node)
    return late


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """Copies graph and attribute tree; parameters and buffers are shared, not cloned."""
    root = torch.nn.Module()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            set_attribute(root, node.target, get_attribute(module, node.target))
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, values)
    graph.output(output)
    for old, new in values.items():
        new.meta = dict(old.meta)
    for old in module.graph.nodes:
        if old.op == "output":
            next(n for n in reversed(graph.nodes) if n.op == "output").meta = copy.copy(old.meta)
    return fx.GraphModule(root, graph)


def get_attribute(module: torch.nn.Module, path: str) -> Any:
    """The attribute at a dotted path.

    Raises:
        AttributeError: naming the path.
    """
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            raise AttributeError(f"the graph has no attribute '{path}'")
        value = getattr(value, part)
    return value


def set_attribute(module: torch.nn.Module, path: str, value: Tensor | torch.nn.Module) -> None:
    """Sets a tensor (as a buffer, without gradient) or a module at a dotted path, making the modules on the way."""
    *parents, leaf = path.split(".")
    for part in parents:
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            if hasattr(module, part):
                delattr(module, part)
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if leaf in module._modules or leaf in module._parameters or leaf in module._buffers:
        delattr(module, leaf)
    if isinstance(value, torch.nn.Module):
        module.add_module(leaf, value)
    else:
        module.register_buffer(leaf, value.detach())


def delete_attribute(module: torch.nn.Module, path: str) -> None:
    """Removes the tensor at a dotted path; the modules on the way stay."""
    *parents, leaf = path.split(".")
    owner = get_attribute(module, ".".join(parents)) if parents else module
    delattr(owner, leaf)


def discard_attributes(module: fx.GraphModule) -> None:
    """Takes every tensor from a module that is used no more."""
    for owner in module.modules():
        owner._buffers.clear()


def prune_attributes(module: fx.GraphModule) -> None:
    """Drops every tensor that no ``get_attr`` node names, so that freed weights really are free."""
    module.delete_all_unused_submodules()
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            delete_attribute(module, name)
