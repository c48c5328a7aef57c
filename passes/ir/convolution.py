"""Short causal convolutions over the sequence, found in a captured graph and given a state.

Given::

    %c = aten.conv1d(%x, %w, %b, [1], [2], [1], 72)  # every channel with its own three taps, padded at both ends
    %y = aten.slice.Tensor(%c, 2, 0, %tokens)  # without what lies behind the last token

Result::

    %state = state conv_0_state {kind="fixed", heads=72, tail=(2,), dtype=torch.float32}
    %y = lbllm.cached_conv(%x, %w, %b, %state)

A sequence that begins is as good as one behind zeros, which is how the convolution pads and how a state begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ...codegen.operators import Arguments
from .program import FIXED, STATE, StateSpec
from .rewrite import Node, calls, is_call, is_node, replace_call

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm


def cache_convolutions(graph: fx.Graph, shapes: Mapping[Node, torch.Size], tokens: int) -> int:
    """Gives every short causal convolution of a graph a state, in place.

    Args:
        graph: of a language model.
        shapes: of the graph's tensors at some probe.
        tokens: in a sequence of that probe.

    Returns:
        How many there were.
    """
    found = [cut for node in calls(graph, _aten.conv1d.default) if (cut := _causal_part(node, shapes, tokens))]
    for index, cut in enumerate(found):
        a = Arguments(Arguments(cut).self)
        channels, taps = shapes[a.input][1], shapes[a.weight][-1]
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            state = graph.placeholder(f"conv_{index}_state")
        state.meta[STATE] = StateSpec(channels, (taps - 1,), torch.float32, FIXED)
        replace_call(cut, _lbllm.cached_conv.default, (a.input, a.weight, a.bias, state))
    return len(found)


def _causal_part(conv: Node, shapes: Mapping[Node, torch.Size], tokens: int) -> Node | None:
    """What takes the first tokens of a convolution whose taps all lie before them; None where it is another kind."""
    a = Arguments(conv)
    if len(shapes[a.input]) != 3 or len(shapes[a.weight]) != 3:
        return None
    channels, length = shapes[a.input][1:]
    taps = shapes[a.weight][-1]
    steps = ([*a.stride], [*a.padding], [*a.dilation]) if not isinstance(a.padding, str) else ()
    depthwise = a.groups == channels and [*shapes[a.weight]] == [channels, 1, taps] and length == tokens
    if steps != ([1], [taps - 1], [1]) or not depthwise or taps < 2 or len(conv.users) != 1:
        return None
    (cut,) = conv.users
    if not is_call(cut, _aten.slice.Tensor) or shapes[cut] != shapes[a.input]:
        return None
    part = Arguments(cut)
    return cut if part.start in (0, None) and is_node(part.end) and part.dim in (2, -1) else None
