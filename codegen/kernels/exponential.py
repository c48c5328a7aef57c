"""The exponential and the hyperbolic tangent as vector arithmetic: LLVM has no vector form of them and would call the C
library lane by lane."""

from __future__ import annotations

from typing import Any

from ..tvm_api import T

LOWEST = -87.33654
"""``exp`` of anything smaller is taken as ``exp`` of this, the smallest normal fp32 number."""

HIGHEST = 88.02969
"""``exp`` of anything larger is taken as ``exp`` of this, which is still finite."""

_LOG2_E = 1.4426950408889634
# ln 2 in two parts: a product of the first with a small integer is exact in fp32.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Minimax polynomial of ``(exp(r) - 1 - r) / r**2`` on ``|r| <= ln 2 / 2`` (Cephes' ``expf``)."""


def exponential(x: Any, lanes: int) -> Any:
    """``exp(x)`` of fp32 vectors of ``lanes`` lanes, with a relative error below 2e-7."""

    def wide(value: float) -> Any:
        return T.broadcast(T.float32(value), lanes)

    x = T.Bind(T.max(T.min(x, wide(HIGHEST)), wide(LOWEST)))
    power = T.Bind(T.nearbyint(x * wide(_LOG2_E)))
    r = T.Bind(x - power * wide(_LN2_HIGH) - power * wide(_LN2_LOW))
    y = wide(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        y = y * r + wide(coefficient)
    y = T.Bind(y * r * r + r + wide(1.0))
    exponent = (T.cast(power, f"int32x{lanes}") + T.broadcast(T.int32(127), lanes)) << T.broadcast(T.int32(23), lanes)
    return y * T.reinterpret(f"float32x{lanes}", exponent)


_SMALL = 0.625
_TANH_COEFFICIENTS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
"""Minimax polynomial of ``(tanh(x) / x - 1) / x**2`` in ``x**2`` on ``|x| <= 0.625`` (Cephes' ``tanhf``)."""


def hyperbolic_tangent(x: Any, lanes: int) -> Any:
    """``tanh(x)`` of fp32 vectors of ``lanes`` lanes, with a relative error below 4e-7."""

    def wide(value: float) -> Any:
        return T.broadcast(T.float32(value), lanes)

    x = T.Bind(x)
    square = T.Bind(x * x)
    y = wide(_TANH_COEFFICIENTS[0])
    for coefficient in _TANH_COEFFICIENTS[1:]:
        y = y * square + wide(coefficient)
    near = T.Bind(y * square * x + x)
    size = T.Bind(T.max(x, wide(0.0) - x))
    far = T.Bind(wide(1.0) - wide(2.0) / (exponential(size + size, lanes) + wide(1.0)))
    far = T.Select(x < wide(0.0), wide(0.0) - far, far)
    return T.Select(size < wide(_SMALL), near, far)
