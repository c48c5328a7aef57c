"""Decoder-layer sub-graphs, and streaming activations through them.

A calibration works on one decoder layer at a time. :func:`split` cuts an annotated program into a prologue (embedding,
masks, rotary tables, symbolic sizes), one sub-graph per decoder layer and an epilogue (last norm, lm_head); what a
stage needs from an earlier one is an input by the name of the node that computed it. Run one after the other, the
stages compute what the whole graph does, with the same operations.

Given (node: layer)::

    %h: None, %cos: None, %a(%h, %cos): 0, %b(%a, %cos): 1, %y(%b): None

Result::

    prologue() -> %h, %cos      layer 0 (%h, %cos) -> %a      layer 1 (%a, %cos) -> %b      epilogue (%b) -> %y

:class:`Activations` holds a chain: the values alive between two stages, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ...codegen.format import Int4Weight, QuantizedWeight
from ...codegen.operators.lbllm.linears import WEIGHT
from ..base import batches_of
from ..ir.program import CPU, LAYER, Program, copy_module, discard_attributes, get_attribute, set_attribute
from ..ir.rewrite import become_reshape
from ..ir.spool import Record, Records, release
from .precision import Precision, matrix_products, restored

LAYER_SEQUENCES = 256
"""Calibration sequences that layers are fitted to one by one, where a pass is not told how many. All layers together
overfit to that many: what trains them so draws from every sequence there is."""

Values = dict[str, Any]
"""Values of one batch by node name: tensors, and ints for symbolic sizes."""


@dataclass(frozen=True)
class Stage:
    """A sub-graph with named inputs and outputs.

    Attributes:
        module: takes ``inputs`` by position and returns a tuple of ``outputs``. Its tensors are shared with the
            program; its graph and attribute table are its own.
        inputs: names of the nodes (or graph inputs) whose values it takes.
        outputs: names of the nodes whose values it computes for later stages, or for the program's result.
        live: names of all values that anything after this stage needs.
        device: where its tensors are, and its inputs must be.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: frozenset[str]
    device: torch.device = CPU

    def on(self, device: torch.device) -> Stage:
        """The stage on a device: itself where it is there already, else with copies of its tensors.

        Other than the CPU's, a copy takes any strides: its views are reshapes.
        """
        if device == self.device:
            return self
        module = copy_module(self.module)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                set_attribute(module, node.target, get_attribute(self.module, node.target).to(device))
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
            )
            if node.target is torch.ops.aten.view.default:
                # The capture saw the strides that operators give their results on the CPU.
                become_reshape(node)
        module.recompile()
        return replace(self, module=module, device=device)

    def discard(self) -> None:
        """Lets go of the tensors of a stage that is used no more; graph and module refer to each other, and would keep
        them until Python looks for cycles."""
        discard_attributes(self.module)

    def run(self, values: Mapping[str, Any]) -> Values:
        """The outputs for one batch."""
        return dict(zip(self.outputs, self.module(*[values[name] for name in self.inputs]), strict=True))


@dataclass(frozen=True)
class Layers:
    """A program cut at its decoder layers.

    Attributes:
        prologue: what comes before the first layer.
        layers: one stage per decoder layer; a plain module is a single one.
        epilogue: what comes after the last layer.
        results: names of the values that the program returns.
    """

    prologue: Stage
    layers: tuple[Stage, ...]
    epilogue: Stage
    results: tuple[str, ...]


class Runnable(Protocol):
    """What a chain can be moved past: a stage, or a stage with its parameters filled in."""

    @property
    def live(self) -> frozenset[str]: ...

    def on(self, device: torch.device) -> Runnable: ...

    def discard(self) -> None: ...

    def run(self, values: Mapping[str, Any]) -> Values: ...


class Activations:
    """The values alive between two stages, one mapping per batch. On disk, read a batch at a time; only this class
    knows that.

    Attributes:
        device: where values are once they are read, and stages run.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], device: torch.device = CPU):
        self.device = device
        self._records = Records()
        self._batches: list[dict[str, Any]] = [{n: self._kept(v) for n, v in b.items()} for b in batches]

    def _kept(self, value: Any) -> Any:
        return self._records.put(value.cpu()) if isinstance(value, Tensor) else value

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Values]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Values:
        return {n: v.read().to(self.device) if isinstance(v, Record) else v for n, v in self._batches[index].items()}

    def read(self, names: Sequence[str]) -> Iterator[Values]:
        """Some of the values of every batch, on the device."""
        for batch in self._batches:
            kept = {name: batch[name] for name in names}
            yield {n: v.read().to(self.device) if isinstance(v, Record) else v for n, v in kept.items()}

    def fork(self) -> Activations:
        """A second chain that starts from the same values; what is kept of them is shared."""
        second = Activations((), self.device)
        second._batches = [dict(b) for b in self._batches]
        return second

    @torch.no_grad()
    def advance(
        self, stage: Runnable, visit: Callable[[Values], None] | None = None, precision: Precision = "float32"
    ) -> None:
        """Runs a stage on every batch and drops what nothing needs any more, the stage's weights from memory too.

        Args:
            stage: the next stage of the chain.
            visit: called with each batch's live values after the stage, on the device.
            precision: of the stage's matrix products.
        """
        moved = stage.on(self.device)
        for index, kept in enumerate(self._batches):
            values = self[index]
            with matrix_products(precision, self.device):
                outputs = moved.run(values)
            fresh = {name: restored(value, precision) for name, value in outputs.items() if name in stage.live}
            kept = {name: value for name, value in kept.items() if name in stage.live and name not in fresh}
            if visit is not None:
                visit({name: values[name] for name in kept} | fresh)
            self._batches[index] = kept | {name: self._kept(value) for name, value in fresh.items()}
        if moved is not stage:
            moved.discard()
        release()


def split(program: Program) -> Layers:
    """Cuts an annotated program into prologue, decoder layers and epilogue.

    A node that belongs to no layer goes to the prologue where it depends on none, to the epilogue where no layer needs
    it, else to the layer it depends on.
    """
    indices = sorted({n.meta[LAYER] for n in program.graph.nodes if n.meta.get(LAYER) is not None})
    last = len(indices) + 1
    rank = {index: position for position, index in enumerate(indices, start=1)}
    needed = _needed_by_layer(program.graph)
    stage_of: dict[fx.Node, int] = {}
    for node in _computed(program.graph):
        floor = max((stage_of[n] for n in node.all_input_nodes if n in stage_of), default=0)
        layer = node.meta.get(LAYER)
        if layer is not None:
            stage_of[node] = max(rank[layer], floor)
        else:
            stage_of[node] = floor if floor == 0 or node in needed else last
    stages = partition(program.module, stage_of, last + 1)
    results = tuple(n.name for n in _results(program.graph))
    return Layers(stages[0], tuple(stages[1:last]), stages[last], results)


def partition(
    module: fx.GraphModule,
    stage_of: Mapping[fx.Node, int],
    count: int,
    live: Iterable[str] = (),
    device: torch.device = CPU,
) -> list[Stage]:
    """Cuts a graph into ``count`` stages.

    Args:
        module: the graph. Weights (``get_attr``) are repeated in every stage that uses them.
        stage_of: the stage of every computing node; never lower than that of a node it depends on.
        count: number of stages.
        live: names that stay alive past the last stage, besides the graph's results.
        device: where the graph's tensors are.
    """
    results = _results(module.graph)
    members: list[list[fx.Node]] = [[] for _ in range(count)]
    for node in _computed(module.graph):
        members[stage_of[node]].append(node)
    inputs = [_inputs(nodes) for nodes in members]
    stages: list[Stage] = []
    alive = frozenset(live) | {n.name for n in results}
    for index in reversed(range(count)):
        outputs = [n for n in members[index] if n.name in alive]
        built = _build(module, members[index], inputs[index], outputs)
        names = tuple(n.name for n in inputs[index])
        stages.append(Stage(built, names, tuple(n.name for n in outputs), alive, device))
        alive = (alive - set(stages[-1].outputs)) | set(names)
    return stages[::-1]


def segments(stage: Stage, after: Iterable[fx.Node]) -> list[Stage]:
    """Cuts a stage behind each of the given nodes of its graph.

    A node's segment is the largest number of cuts on any way to it, so independent cuts fall together. Run one after
    the other, the segments compute what the stage does; every cut node is an output of its segment.
    """
    cuts = set(after)
    stage_of: dict[fx.Node, int] = {}
    for node in _computed(stage.module.graph):
        stage_of[node] = max((stage_of[n] + (n in cuts) for n in node.all_input_nodes if n in stage_of), default=0)
    return partition(stage.module, stage_of, max(stage_of.values(), default=0) + 1, stage.live, stage.device)


def stored_weight(tensors: Mapping[str, Tensor], path: str, group: int, in_features: int) -> QuantizedWeight:
    """The quantized weight kept under ``<path>.sign`` and so on."""
    parts = (tensors[f"{path}.{name}"] for name in WEIGHT)
    return QuantizedWeight(*parts, in_features, group)


CODED = ("codes", "table", "code_scale")
"""Tensors of a 4-bit weight behind its path, in the order of :class:`Int4Weight`."""


def stored_codes(tensors: Mapping[str, Tensor], path: str, group: int, in_features: int) -> Int4Weight:
    """The 4-bit weight kept under ``<path>.codes`` and so on."""
    parts = (tensors[f"{path}.{name}"] for name in CODED)
    return Int4Weight(*parts, in_features, group)


def set_weight(stage: Stage, path: str, value: Tensor) -> None:
    """Puts another tensor in the place of a stage's weight; the program keeps its own."""
    set_attribute(stage.module, path, value)


def calibration_batches(
    program: Program, batches: Sequence[Mapping[str, Any]], size: int, sequences: int | None = None
) -> list[dict[str, Any]]:
    """A language model's batches as ones of ``size`` sequences (the last of each length may be smaller).

    A plain module keeps its batches: it may not take others.

    Args:
        sequences: how many of a language model's to use at most, rounded up to whole batches; all by default.
    """
    # FX renames inputs that are called like a builtin of Python's; values go by node name.
    names = {node.target: node.name for node in program.placeholders()}
    batches = [{names.get(key, key): value for key, value in batch.items()} for batch in batches]
    if program.kind != "causal-lm":
        return batches
    runs: list[list[Mapping[str, Any]]] = []
    for batch in batches:
        if runs and _shapes(runs[-1][0]) == _shapes(batch):
            runs[-1].append(batch)
        else:
            runs.append([batch])
    merged = [
        {k: torch.cat([b[k] for b in run]) if isinstance(v, Tensor) else v for k, v in run[0].items()} for run in runs
    ]
    pieces = [piece for batch in merged for piece in batches_of(batch, size)]
    return pieces if sequences is None else pieces[: -(-sequences // size)]


def _shapes(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: (v.shape[1:], v.dtype) if isinstance(v, Tensor) else v for k, v in batch.items()}


def run_through(layers: Layers, batches: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The program's first result for every batch, stage by stage."""
    chain = Activations(batches)
    for stage in (layers.prologue, *layers.layers, layers.epilogue):
        chain.advance(stage)
    return [values[layers.results[0]] for values in chain]


def finish(layers: Layers, values: Values) -> Any:
    """The program's first result from the values behind its last layer, which may already hold it."""
    return {**values, **layers.epilogue.run(values)}[layers.results[0]]


def _computed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that do something: no inputs, weights or output."""
    return [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


def _results(graph: fx.Graph) -> list[fx.Node]:
    return next(n for n in reversed(graph.nodes) if n.op == "output").all_input_nodes


def _needed_by_layer(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that some decoder layer depends on."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output" and (node.meta.get(LAYER) is not None or node in needed):
            needed.update(node.all_input_nodes)
    return needed


def _inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What ``nodes`` take from elsewhere, weights excepted, in the order of first use."""
    inside = set(nodes)
    found = (n for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr")
    return list(dict.fromkeys(found))


def _build(
    module: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    root = torch.nn.Module()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        for weight in node.all_input_nodes:
            if weight.op == "get_attr" and weight not in copies:
                copies[weight] = graph.node_copy(weight)
                set_attribute(root, weight.target, get_attribute(module, weight.target))
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
    graph.output(tuple(copies[n] for n in outputs))
    return fx.GraphModule(root, graph)
