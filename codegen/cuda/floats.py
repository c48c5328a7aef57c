"""Floats inside CUDA kernels: products that stay products, and numbers of halves."""

from __future__ import annotations

from typing import Any

from ..tvm_api import T

HALF_TO_FLOAT = 2.0**112


def multiply(a: Any, b: Any) -> Any:
    """fp32 product that no compiler contracts into an fma."""
    return T.call_pure_extern("float32", "__fmul_rn", a, b)


def half_as_float(bits: Any) -> Any:
    """The fp32 number of the bits of a half that is finite and not negative.

    Shifting them into place and multiplying by 2^112 is exact, subnormals included, and spares the kernels
    cuda_fp16.h.
    """
    shifted = T.shift_left(T.cast(bits, "uint32"), T.uint32(13))
    return multiply(T.call_pure_extern("float32", "__uint_as_float", shifted), T.float32(HALF_TO_FLOAT))


def signed_half_as_float(bits: Any) -> Any:
    """The same of a half of either sign."""
    wide = T.cast(bits, "uint32")
    size = half_as_float(T.bitwise_and(wide, T.uint32(0x7FFF)))
    return T.Select(T.bitwise_and(wide, T.uint32(0x8000)) == T.uint32(0), size, -size)
