"""Short causal convolutions over the sequence, whose last inputs are kept from call to call."""

from __future__ import annotations

from ... import reference
from ..arguments import Arguments
from ..checks import require
from ..registry import define


def _verify(a: Arguments) -> None:
    require(a.x.dim() == 3, a, "x is not [batch, channels, tokens]")
    batch, channels, _ = a.x.shape
    width = a.weight.shape[-1]
    require([*a.weight.shape] == [channels, 1, width], a, f"weight is not [{channels}, 1, taps]")
    require(a.bias is None or [*a.bias.shape] == [channels], a, f"bias is not [{channels}]")
    require([*a.state.shape] == [batch, channels, width - 1], a, f"state is not [{batch}, {channels}, {width - 1}]")


cached_conv = define(
    "cached_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state) -> Tensor",
    reference=reference.cached_conv,
    shape=lambda x, weight, bias, state: x.new_empty(x.shape),
    verify=_verify,
    updates=("state",),
)
