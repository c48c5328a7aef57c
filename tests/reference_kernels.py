"""Stand-in kernels that run the reference, for tests of everything above the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from lbllm_compile.codegen import prove, reference
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from torch import Tensor


@dataclass(frozen=True)
class _Linear:
    spec: LinearSpec

    def pack(self, weight, bias):
        return weight, bias

    def __call__(self, values: Tensor, x_scale: Tensor, packed) -> Tensor:
        weight, bias = packed
        assert values.shape[1] == self.spec.in_features and x_scale.shape[1] == self.spec.x_scales
        assert (bias is not None) == self.spec.bias
        return reference.linear(values, x_scale, weight, bias, self.spec.group)


@dataclass(frozen=True)
class _Quantize:
    spec: QuantizeSpec

    def __call__(self, x: Tensor, clip: Tensor, *shape: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[1] == self.spec.in_features and len(shape) == self.spec.tabled
        return prove.quantized(self.spec, x, clip, *shape)


class ReferenceKernels:
    """Every kernel is the reference."""

    def linear(self, spec: LinearSpec) -> _Linear:
        return _Linear(spec)

    def quantizer(self, spec: QuantizeSpec) -> _Quantize:
        return _Quantize(spec)
