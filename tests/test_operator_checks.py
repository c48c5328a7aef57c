"""What verifications of operators refuse, each by one sentence that names the node, the argument and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbllm_compile.codegen import operators, reference
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.registry import OperatorError
from rtn import planes
from torch import Tensor, fx

lbllm = torch.ops.lbllm
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
CLIP = torch.ones(2)
PLANES = torch.tensor(reference.UNIFORM_PLANES)
VALUES, SCALES = reference.quantize_activation(X, CLIP, 4, 32)
WEIGHT = {name.removeprefix("w."): tensor for name, tensor in planes("w", X[:3], 32).items()}
EXPERTS = {name: torch.stack([tensor, tensor]) for name, tensor in WEIGHT.items()}
ENDS = torch.tensor([2, 5])
HEADS = torch.zeros(2, 4, 3, 6)
"""Two sequences, four heads, three tokens."""

SHARED = HEADS[:, :2]
CODES, PARAMS = (torch.zeros(2, 2, 8, n, dtype=d) for n, d in ((3, torch.uint8), (2, torch.float16)))
"""State of two heads of six channels in 4 bits, with room for eight tokens."""

MASK = torch.ones(2, 5, dtype=torch.int64)
STATE = dict.fromkeys(("key_codes", "value_codes"), CODES) | dict.fromkeys(("key_params", "value_params"), PARAMS)
ATTENTION = {"query": HEADS, "key": SHARED, "value": SHARED, "scale": 0.4}
CACHED = {**ATTENTION, **STATE, "key_mask": MASK, "past": 2, "window": 0, "bits": 4}
BIT = {"values": VALUES, "x_scale": SCALES, **WEIGHT, "bias": torch.ones(3), "group": 32}
GROUPED_BIT = {"values": VALUES, "x_scale": SCALES, **EXPERTS, "offsets": ENDS, "group": 32}
INT8 = {"values": VALUES, "x_scale": SCALES, "weight": torch.ones(7, 40, dtype=torch.int8), "w_scale": torch.ones(7)}
INT8 |= {"bias": None, "group": 32}
INT4 = {
    "codes": torch.zeros(7, 20, dtype=torch.uint8),
    "table": torch.arange(16).char(),
    "w_scale": torch.ones(7, 2).half(),
}
CODED = {**INT4, "ids": torch.tensor([[6]]), "in_features": 40, "group": 32}
INT4 |= {"values": VALUES, "x_scale": SCALES, "bias": None, "group": 32}
ROWS = {"weight": torch.ones(7, 4, dtype=torch.int8), "scale": torch.ones(7), "ids": torch.tensor([[6]])}
CONVOLUTION = {"x": torch.ones(2, 3, 5), "weight": torch.ones(3, 1, 4), "bias": None, "state": torch.zeros(2, 3, 3)}
QUANTIZE = {"x": X, "clip": CLIP, "bits": 4, "group": 32}
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    lbllm.quantize_activation.default: QUANTIZE,
    lbllm.fake_quantize.default: QUANTIZE,
    lbllm.fake_quantize_kv.default: {"x": X, "bits": 8},
    lbllm.bit_linear.default: BIT,
    lbllm.grouped_bit_linear.default: GROUPED_BIT,
    lbllm.int8_linear.default: INT8,
    lbllm.int4_linear.default: INT4,
    lbllm.int4_embedding.default: CODED,
    lbllm.grouped_linear.default: {"x": X, "weight": torch.ones(2, 3, 40), "offsets": ENDS},
    lbllm.int8_embedding.default: ROWS,
    lbllm.attention.default: {**ATTENTION, "key": HEADS, "value": HEADS, "mask": torch.ones(2, 1, 3, 3).bool()},
    lbllm.cached_attention.default: CACHED,
    lbllm.cached_conv.default: CONVOLUTION,
}
"""Arguments that each operator with a verification takes."""


def changed(tensor: Tensor, value: float) -> Tensor:
    """The tensor with another first element."""
    result = tensor.clone()
    result.view(-1)[0] = value
    return result


def wide(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


NO_SCALES = "has values that are negative or not finite"
LEVELS = "levels has the shape [3, 2, 3] where [..., 3, 2, 4] belongs"
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (lbllm.quantize_activation, {"bits": 5}, "5 bits are not one of (4, 8, 16)"),
    (lbllm.quantize_activation, {"group": 48}, "groups of 48 channels are not one of (0, 32, 64, 128, 256)"),
    (lbllm.quantize_activation, {"x": X.int()}, "x is torch.int32, not a float"),
    (lbllm.quantize_activation, {"clip": CLIP.double()}, "clip is torch.float64, not torch.float32"),
    (lbllm.quantize_activation, {"clip": torch.ones(3)}, "clip has the shape [3] where [..., 2] belongs"),
    (lbllm.quantize_activation, {"clip": wide(CLIP)}, "clip is not one pair"),
    (lbllm.quantize_activation, {"clip": CLIP * 1.5}, "clip has values that are not above 0 and at most 1"),
    (lbllm.quantize_activation, {"knees": CLIP * 0}, "knees has values that are not above 0 and at most 1"),
    (lbllm.quantize_activation, {"knees": wide(CLIP)}, "knees is not one pair"),
    (lbllm.quantize_activation, {"bits": 8, "knees": CLIP}, "8-bit activations have no knees"),
    (lbllm.quantize_activation, {"bits": 8, "plane_scales": PLANES}, "8-bit activations have no plane scales"),
    (lbllm.quantize_activation, {"knees": CLIP, "plane_scales": PLANES}, "activations have knees and plane scales"),
    (lbllm.quantize_activation, {"plane_scales": PLANES * 3}, "plane_scales are not above 0 and at most 16"),
    (lbllm.quantize_activation, {"plane_scales": PLANES.flip(0)}, "plane_scales are below the sum of those before"),
    (lbllm.fake_quantize, {"bits": 3}, "3 bits are not one of (4, 8, 16)"),
    (lbllm.fake_quantize_kv, {"bits": 2}, "2 bits are not one of (4, 8, 16)"),
    (lbllm.bit_linear, {"group": 0}, "groups of 0 channels are not one of (32, 64, 128, 256)"),
    (lbllm.bit_linear, {"values": X}, "values are torch.float32, not quantized ones"),
    (lbllm.bit_linear, {"x_scale": torch.ones(5, 3)}, "x_scale has 3 scales a token, not 1 or 2"),
    (lbllm.bit_linear, {"x_scale": changed(SCALES, -1.0)}, f"x_scale {NO_SCALES}"),
    (lbllm.bit_linear, {"sign": WEIGHT["sign"][:, :4]}, "sign has the shape [3, 4] where [..., any, 5] belongs"),
    (lbllm.bit_linear, {"sign": wide(WEIGHT["sign"])}, "sign is no matrix"),
    (lbllm.bit_linear, {"bitmap": WEIGHT["bitmap"][:2]}, "bitmap has the shape [2, 5] where [..., 3, 5] belongs"),
    (lbllm.bit_linear, {"levels": WEIGHT["levels"].int()}, "levels is torch.int32, not torch.int8"),
    (lbllm.bit_linear, {"levels": WEIGHT["levels"][..., :3]}, LEVELS),
    (lbllm.bit_linear, {"scale": changed(WEIGHT["scale"], math.inf)}, f"scale {NO_SCALES}"),
    (lbllm.bit_linear, {"bias": torch.ones(4)}, "bias has the shape [4] where [..., 3] belongs"),
    (lbllm.bit_linear, {"bias": torch.ones(1, 3)}, "bias is not [3]"),
    (lbllm.grouped_bit_linear, {"sign": WEIGHT["sign"]}, "sign is not [experts, rows, bytes]"),
    (lbllm.grouped_bit_linear, {"values": wide(VALUES)}, "tokens are no rows"),
    (lbllm.grouped_bit_linear, {"offsets": ENDS[:1]}, "offsets are not 2 integers"),
    (lbllm.grouped_bit_linear, {"offsets": ENDS.float()}, "offsets are not 2 integers"),
    (lbllm.grouped_linear, {"weight": torch.ones(3, 40)}, "weight is not [experts, rows, columns]"),
    (lbllm.grouped_linear, {"weight": torch.ones(2, 3, 39)}, "weight is not [experts, rows, columns]"),
    (lbllm.grouped_linear, {"x": wide(X)}, "tokens are no rows"),
    (lbllm.grouped_linear, {"offsets": torch.tensor([1, 2, 5])}, "offsets are not 2 integers"),
    (lbllm.int8_linear, {"group": 16}, "groups of 16 channels are not one of (0, 32, 64, 128, 256)"),
    (lbllm.int8_linear, {"group": 0}, "x_scale has 2 scales a token, not 1"),
    (lbllm.int8_linear, {"weight": INT8["weight"].float()}, "weight is torch.float32, not torch.int8"),
    (lbllm.int8_linear, {"weight": wide(INT8["weight"])}, "weight is no matrix"),
    (lbllm.int8_linear, {"w_scale": torch.ones(6)}, "w_scale has the shape [6] where [..., 7] belongs"),
    (lbllm.int8_linear, {"w_scale": changed(INT8["w_scale"], math.nan)}, f"w_scale {NO_SCALES}"),
    (lbllm.int8_linear, {"bias": torch.ones(1, 7)}, "bias is not [7]"),
    (lbllm.int4_linear, {"group": 0}, "groups of 0 channels are not one of (32, 64, 128, 256)"),
    (lbllm.int4_linear, {"values": X}, "values are torch.float32, not quantized ones"),
    (lbllm.int4_linear, {"x_scale": torch.ones(5, 3)}, "x_scale has 3 scales a token, not 1 or 2"),
    (lbllm.int4_linear, {"codes": INT4["codes"][:, 1:]}, "codes has the shape [7, 19] where [..., any, 20] belongs"),
    (lbllm.int4_linear, {"codes": wide(INT4["codes"])}, "codes is no matrix"),
    (lbllm.int4_linear, {"table": INT4["table"][1:]}, "table has the shape [15] where [..., 16] belongs"),
    (lbllm.int4_linear, {"table": wide(INT4["table"])}, "table is not [16]"),
    (lbllm.int4_linear, {"w_scale": INT4["w_scale"].float()}, "w_scale is torch.float32, not torch.float16"),
    (lbllm.int4_linear, {"w_scale": changed(INT4["w_scale"], math.nan)}, "w_scale has values that are not finite"),
    (lbllm.int4_linear, {"bias": torch.ones(1, 7)}, "bias is not [7]"),
    (lbllm.int4_embedding, {"in_features": 42}, "codes has the shape [7, 20] where [..., any, 21] belongs"),
    (lbllm.int4_embedding, {"in_features": 0}, "a row cannot have 0 columns"),
    (lbllm.int4_embedding, {"w_scale": INT4["w_scale"][:6]}, "w_scale has the shape [6, 2] where [..., 7, 2] belongs"),
    (lbllm.int8_embedding, {"weight": wide(ROWS["weight"])}, "weight is no matrix"),
    (lbllm.int8_embedding, {"weight": ROWS["weight"].long()}, "weight is torch.int64, not torch.int8"),
    (lbllm.int8_embedding, {"scale": torch.ones(6)}, "scale has the shape [6] where [..., 7] belongs"),
    (lbllm.int8_embedding, {"scale": -ROWS["scale"]}, f"scale {NO_SCALES}"),
    (lbllm.attention, {"query": HEADS[0]}, "query is not [batch, heads, tokens, channels]"),
    (lbllm.attention, {"key": HEADS[:, :3]}, "4 heads cannot share 3 of the keys'"),
    (lbllm.attention, {"value": HEADS[:, :2]}, "4 heads cannot share 4 of the keys'"),
    (lbllm.attention, {"key": HEADS[..., :5]}, "queries and keys differ in their channels"),
    (lbllm.attention, {"softcap": -1.0}, "scores cannot be bounded by -1.0"),
    (lbllm.attention, {"softcap": math.inf}, "scores cannot be bounded by inf"),
    (lbllm.attention, {"softcap": math.nan}, "scores cannot be bounded by nan"),
    (lbllm.attention, {"sinks": torch.ones(3)}, "sinks has the shape [3] where [..., 4] belongs"),
    (lbllm.cached_attention, {"bits": 5}, "5 bits are not one of (4, 8, 16)"),
    (lbllm.cached_attention, {"window": -1}, "a window of -1 tokens is less than none"),
    (lbllm.cached_attention, {"chunk": -2}, "a chunk of -2 tokens is less than none"),
    (lbllm.cached_attention, {"softcap": -1.0}, "scores cannot be bounded by -1.0"),
    (lbllm.cached_attention, {"bits": 8}, "key_codes has the shape [2, 2, 8, 3] where [..., 2, any, 6] belongs"),
    (lbllm.cached_attention, {"key_params": PARAMS.float()}, "key_params is torch.float32, not torch.float16"),
    (lbllm.cached_attention, {"value_codes": CODES[:1]}, "value_codes is not the state of 2 sequences"),
    (lbllm.cached_attention, {"past": 6}, "key_codes has no room for 9 tokens"),
    (lbllm.cached_attention, {"value_params": PARAMS[:, :, :4]}, "value_params has no room for 5 tokens"),
    (lbllm.cached_attention, {"key_mask": MASK[:, :4]}, "key_mask is not [2, 5]"),
    (lbllm.cached_attention, {"slopes": torch.ones(2)}, "slopes has the shape [2] where [..., 4] belongs"),
    (lbllm.cached_conv, {"x": torch.ones(3, 5)}, "x is not [batch, channels, tokens]"),
    (lbllm.cached_conv, {"weight": torch.ones(3, 2, 4)}, "weight is not [3, 1, taps]"),
    (lbllm.cached_conv, {"bias": torch.ones(4)}, "bias is not [3]"),
    (lbllm.cached_conv, {"state": torch.zeros(2, 3, 4)}, "state is not [2, 3, 3]"),
]  # fmt: skip
"""An operator, arguments in place of :data:`GOOD`'s, and what is said of them."""


def verify(target: Callable[..., Any], given: dict[str, Any]) -> fx.Node:
    """Verifies a call; returns it."""
    graph, values = fx.Graph(), {}
    nodes = {name: graph.placeholder(name) if isinstance(value, Tensor) else value for name, value in given.items()}
    values = {node: given[name] for name, node in nodes.items() if isinstance(node, fx.Node)}
    node = graph.call_function(target, kwargs=nodes)
    known = operators.find(target)
    assert known is not None and known.verify is not None
    known.verify(Arguments(node, lambda value: values.get(value, value) if isinstance(value, fx.Node) else value))
    return node


def test_every_verification_has_calls_that_pass_and_fail() -> None:
    ours = [o for o in operators.operators() if o.verify is not None and o.name.startswith("lbllm")]
    verified = {o.target for o in ours if o.verify.__module__.startswith("lbllm_compile.")}
    assert verified == set(GOOD) == {packet.default for packet, _, _ in BAD}


@pytest.mark.parametrize("target", GOOD, ids=str)
def test_what_an_operator_takes_passes(target: Callable[..., Any]) -> None:
    verify(target, GOOD[target])
    if target is not lbllm.attention.default:  # it has an executor's form, and no kernel of torch's
        target(**GOOD[target])


@pytest.mark.parametrize(("packet", "change", "message"), BAD, ids=[message for _, _, message in BAD])
def test_what_it_does_not_take_is_one_sentence(packet: Any, change: dict[str, Any], message: str) -> None:
    target = packet.default
    with pytest.raises(OperatorError) as caught:
        verify(target, {**GOOD[target], **change})
    node, _, said = str(caught.value).partition(": ")
    assert said == message
    assert node.endswith(f"({target})")
