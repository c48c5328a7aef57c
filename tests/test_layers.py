"""Cutting programs into decoder layers, and running them layer by layer."""

from __future__ import annotations

import pytest
import torch
from lbllm_compile.passes.annotate import LAYER
from lbllm_compile.passes.calibrate import layers
from lbllm_compile.passes.ir.program import Program
from stages import annotated, apply, batches
from torch import fx, nn
from zoo import LAYERS


def _run(stages, batch):
    values = dict(batch)
    for stage in stages:
        values.update(stage.run({name: values[name] for name in stage.inputs}))
    return values


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_stages_compute_what_the_program_does(name):
    program = annotated(name)
    parts = layers.split(program)
    assert len(parts.layers) == LAYERS
    inputs = batches(2)
    expected = [program.run(batch) for batch in inputs]
    assert all(torch.equal(a, b) for a, b in zip(layers.run_through(parts, inputs), expected, strict=True))


def test_layers_take_shared_values_from_the_prologue():
    parts = layers.split(annotated())
    first, second = parts.layers
    hidden = set(second.inputs) - set(first.inputs)
    assert hidden == set(first.outputs) and len(hidden) == 1
    assert set(first.inputs) & set(second.inputs) <= set(parts.prologue.outputs)
    assert set(parts.epilogue.inputs) == set(second.outputs)


def test_a_chain_drops_what_nothing_needs():
    parts = layers.split(annotated())
    chain = layers.Activations(batches(1))
    chain.advance(parts.prologue)
    assert (
        set(chain[0])
        == set(parts.prologue.live)
        == {n for s in (*parts.layers, parts.epilogue) for n in s.inputs} - {n for s in parts.layers for n in s.outputs}
    )
    other = chain.fork()
    chain.advance(parts.layers[0])
    assert set(chain[0]) != set(other[0])


def test_a_chain_on_disk_gives_the_values_in_memory():
    """With their strides, for both of two chains that went apart, and whole batches at a time."""
    parts = layers.split(annotated())
    expected = [dict(b) for b in batches(3)]
    chain = layers.Activations(expected)
    for stage in (parts.prologue, *parts.layers):
        second = chain.fork()
        before = expected
        expected = [{n: v for n, v in {**b, **stage.run(b)}.items() if n in stage.live} for b in expected]
        seen = []
        chain.advance(stage, seen.append)
        for values in (list(chain), seen):
            for found, wanted in zip(values, expected, strict=True):
                assert found.keys() == wanted.keys()
                assert all(_same(found[n], wanted[n]) for n in wanted)
        assert all(_same(second[1][n], before[1][n]) for n in before[1])


def _same(a, b):
    return torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, torch.Tensor) else a == b


def test_nodes_without_layer_go_where_they_are_needed():
    graph = fx.Graph()
    x = graph.placeholder("x")
    before = graph.call_function(torch.sin, (x,))
    first = graph.call_function(torch.cos, (before,))
    between = graph.call_function(torch.exp, (first,))
    second = graph.call_function(torch.add, (between, before))
    after = graph.call_function(torch.neg, (second,))
    graph.output(after)
    for node, layer in ((before, None), (first, 0), (between, None), (second, 1), (after, None)):
        node.meta[LAYER] = layer
    program = Program(fx.GraphModule(nn.Module(), graph), "module")
    parts = layers.split(program)
    assert parts.prologue.outputs == ("sin",)
    assert [s.outputs for s in parts.layers] == [("exp",), ("add",)]
    assert parts.epilogue.outputs == ("neg",)
    batch = {"x": torch.randn(3)}
    assert torch.equal(layers.run_through(parts, [batch])[0], program.run(batch))


def test_segments_end_at_observers():
    program = apply(annotated(), "observe").program
    layer = layers.split(program).layers[0]
    observers = [n for n in layer.module.graph.nodes if n.target is torch.ops.lbllm.observe.default]
    parts = layers.segments(layer, observers)
    assert len(observers) == 4 and len(parts) == 5
    assert all(o.name in part.outputs for o, part in zip(observers, parts, strict=False))
    chain = layers.Activations(batches(1))
    chain.advance(layers.split(program).prologue)
    values = _run(parts, chain[0])
    assert torch.equal(values[layer.outputs[0]], layer.run(chain[0])[layer.outputs[0]])


def test_batches_are_merged_and_cut():
    program = annotated()
    long, short = batches(3, rows=3), batches(1, rows=3, length=5)
    made = layers.calibration_batches(program, [*long, *short], 4)
    assert [b["input_ids"].shape for b in made] == [(4, 24), (4, 24), (1, 24), (3, 5)]
    assert torch.equal(torch.cat([b["input_ids"] for b in made[:3]]), torch.cat([b["input_ids"] for b in long]))


def test_batches_of_the_first_sequences():
    """A language model's are cut behind whole batches; a plain module's stay, however many rows they have."""
    given = batches(8)  # of two sequences
    made = layers.calibration_batches(annotated(), given, 4, 6)
    assert torch.equal(torch.cat([b["input_ids"] for b in made]), torch.cat([b["input_ids"] for b in given[:4]]))
    plain = Program(annotated().module, kind="module")
    assert [*map(len, (layers.calibration_batches(plain, given, 4, n) for n in (6, None)))] == [8, 8]
