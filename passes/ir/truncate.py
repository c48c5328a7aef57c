"""A model cut down to its first decoder layer, to rehearse a compile on.

The values that flow from the first layer into the second take the place of those that flow out of the last one::

    Given:   %h0 = layer 0 (%embedding); %h1 = layer 1 (%h0); ...; %h29 = layer 29 (%h28); return head(%h29)
    Result:  %h0 = layer 0 (%embedding); return head(%h0)

Precondition: the program is annotated.
"""

from __future__ import annotations

from torch import fx

from .program import LAYER, Program, prune_attributes


def first_layer_only(program: Program) -> Program | None:
    """The program with decoder layer 0 alone; None where its layers do not chain one value into the next."""
    after = program.copy()
    layers = sorted({n.meta[LAYER] for n in after.graph.nodes if n.meta.get(LAYER) is not None})
    if len(layers) < 2:
        return after
    into_second = _leaving(after.graph, layers[0])
    out_of_last = _leaving(after.graph, layers[-1])
    if len(into_second) != 1 or len(out_of_last) != 1:
        return None
    out_of_last[0].replace_all_uses_with(into_second[0], delete_user_cb=lambda user: user.meta.get(LAYER) != layers[-1])
    for node in reversed(after.graph.nodes):
        # Explicitly, because dead-code elimination keeps attention: with dropout it would draw random numbers.
        if node.meta.get(LAYER) in layers[1:] and not node.users:
            after.graph.erase_node(node)
    after.graph.eliminate_dead_code()
    prune_attributes(after.module)
    after.module.recompile()
    return after


def _leaving(graph: fx.Graph, layer: int) -> list[fx.Node]:
    """Nodes of a layer whose value is used outside it."""
    return [
        node
        for node in graph.nodes
        if node.meta.get(LAYER) == layer and any(user.meta.get(LAYER) != layer for user in node.users)
    ]
