"""Short causal convolutions over the sequence, whose last inputs are kept from call to call."""

from __future__ import annotations

from typing import Any

from ... import reference
from ...spec import ConvolutionSpec
from ..arguments import Arguments
from ..checks import require
from ..registry import define
from ..translator import Translator, refusal


def _verify(a: Arguments) -> None:
    require(a.x.dim() == 3, a, "x is not [batch, channels, tokens]")
    batch, channels, _ = a.x.shape
    width = a.weight.shape[-1]
    require([*a.weight.shape] == [channels, 1, width], a, f"weight is not [{channels}, 1, taps]")
    require(a.bias is None or [*a.bias.shape] == [channels], a, f"bias is not [{channels}]")
    require([*a.state.shape] == [batch, channels, width - 1], a, f"state is not [{batch}, {channels}, {width - 1}]")


def _translate(t: Translator, a: Arguments) -> Any:
    x, weight, bias, state = a.pick("x", "weight", "bias", "state")
    tensors = [x, weight, *([] if bias is None else [bias]), state]
    if any(t.dtype(tensor) != "float32" for tensor in tensors):
        raise refusal(a, "a program's convolutions with a state are in float32")
    spec = ConvolutionSpec(t.shape(x)[1], t.shape(weight)[-1], bias is not None)
    # A kernel that changes the state must not be run by every thread of a launch, as those that share nothing out are.
    kernel = t.kernels.convolution(spec, parallel=t.rows is None or t.blocks)
    return t.call(kernel, tensors, (t.shape(x), "float32"))


cached_conv = define(
    "cached_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state) -> Tensor",
    reference=reference.cached_conv,
    shape=lambda x, weight, bias, state: x.new_empty(x.shape),
    verify=_verify,
    translate=_translate,
    updates=("state",),
)
