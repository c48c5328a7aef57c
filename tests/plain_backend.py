"""A backend from outside the package: plain integer loops on a CPU, two tensors a linear and no search.

What programs need besides linears, it takes from the CPU's portable kernels.
"""

# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.backend import EntryPoint, TirKernel
from lbllm_compile.codegen.cpu.backend import CpuBackend
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.format import Weight
from lbllm_compile.codegen.spec import AttentionSpec, ConvolutionSpec, EmbeddingSpec, LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import T, compile_functions, pure_intrinsic
from torch import Tensor


def linear(spec: LinearSpec) -> Any:
    """The kernel ``(values [M, K], x_scale [M, G], levels int8 [N, K], scales fp32 [N, G or 1], out [M, N])``.

    A bias is one more column of the scales.
    """
    rows, columns, groups = spec.out_features, spec.in_features, spec.groups
    group = spec.group or columns
    x_scales, w_scales = spec.x_scales, 1 if spec.kind == "int8" else groups

    def finished(total, scales, n):
        return total + scales[n, w_scales] if spec.bias else total

    @T.prim_func(s_tir=True)
    def kernel(values_: T.handle, x_scale_: T.handle, levels_: T.handle, scales_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        tokens = T.int32()
        values = T.match_buffer(values_, (tokens, columns), "int8", align=1)
        x_scale = T.match_buffer(x_scale_, (tokens, x_scales), "float32", align=4)
        levels = T.match_buffer(levels_, (rows, columns), "int8", align=1)
        scales = T.match_buffer(scales_, (rows, w_scales + spec.bias), "float32", align=4)
        out = T.match_buffer(out_, (tokens, rows), "float32", align=4)
        for n in T.parallel(rows):
            total = T.alloc_buffer((1,), "int32", scope="local")
            for m in T.serial(tokens):
                out[m, n] = T.float32(0)
                for g in T.serial(groups):
                    total[0] = 0
                    for i in T.serial(T.min(group, columns - g * group)):
                        total[0] = total[0] + T.cast(values[m, g * group + i], "int32") * T.cast(
                            levels[n, g * group + i], "int32"
                        )
                    scale: T.let = x_scale[m, T.min(g, x_scales - 1)] * scales[n, T.min(g, w_scales - 1)]
                    out[m, n] = pure_intrinsic("float32", "llvm.fma", T.cast(total[0], "float32"), scale, out[m, n])
                out[m, n] = finished(out[m, n], scales, n)

    return kernel


@dataclass
class PlainLinear:
    """The kernel of one linear, proven."""

    spec: LinearSpec
    function: Callable[..., None]

    @classmethod
    def build(cls, spec: LinearSpec, target: Target) -> PlainLinear:
        built = cls(spec, compile_functions({"linear": linear(spec)}, target.llvm)["linear"])
        for case in prove.linear_cases(spec):
            packed = built.pack(case.weight, case.bias)
            if not prove.agree(built(case.values, case.x_scale, packed), case.expected):
                raise prove.disproved(str(spec), case.name)
        return built

    def pack(self, weight: Weight, bias: Tensor | None = None) -> dict[str, Tensor]:
        if not isinstance(weight, tuple):
            levels, scales = weight.integer_levels().to(torch.int8), weight.scale.float()
        else:
            levels, scales = weight[0], weight[1].float()[:, None]
        scales = scales if bias is None else torch.cat([scales, bias[:, None]], 1)
        return {"levels": levels.contiguous(), "scales": scales.contiguous()}

    def __call__(self, values: Tensor, x_scale: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
        out = torch.empty(values.shape[0], self.spec.out_features)
        self.function(values, x_scale, packed["levels"], packed["scales"], out)
        return out

    def tir(self, bucket: str) -> TirKernel:
        spec = self.spec
        bias = "_bias" if spec.bias else ""
        name = f"plain_{spec.kind}_{spec.out_features}x{spec.in_features}_g{spec.group}_{spec.x_scales}{bias}"
        return TirKernel(name, lambda: linear(spec))


@dataclass
class PlainKernels:
    """Proven kernels: linears of our own, everything else shared with the CPU."""

    target: Target
    linears: Mapping[LinearSpec, PlainLinear]
    shared: KernelSet
    guessed: int = 0

    def linear(self, spec: LinearSpec) -> PlainLinear:
        return self.linears[spec]

    def quantizer(self, spec: QuantizeSpec) -> Any:
        return self.shared.quantizer(spec)

    def attention(self, spec: AttentionSpec, queries: int | None, parallel: bool) -> TirKernel:
        return self.shared.attention(spec, queries, parallel)

    def embedding(self, spec: EmbeddingSpec) -> TirKernel:
        return self.shared.embedding(spec)

    def convolution(self, spec: ConvolutionSpec, parallel: bool) -> TirKernel:
        return self.shared.convolution(spec, parallel)

    def dense(self, rows: int, columns: int, one_token: bool) -> TirKernel:
        return self.shared.dense(rows, columns, one_token)

    def order(self, dtype: str, descending: bool, parallel: bool) -> TirKernel:
        return self.shared.order(dtype, descending, parallel)

    def scatter(self, dtype: str, adds: bool, parallel: bool) -> TirKernel:
        return self.shared.scatter(dtype, adds, parallel)

    def records(self) -> list[dict[str, Any]]:
        return []

    def sources(self) -> dict[str, str]:
        return {}


class PlainKind:
    """One target, ``plain``: any CPU."""

    name = "plain"

    def parse(self, detail: str) -> list[Target]:
        if detail:
            raise LookupError(detail)
        return [dataclasses.replace(Target.parse("cpu:generic"), kind=self.name, name=self.name)]

    def known(self) -> list[str]:
        return [self.name]

    def runs_here(self, target: Target) -> bool:
        return True

    def lacks(self, target: Target) -> str:
        return ""


class PlainBackend(CpuBackend):
    """The CPU's loops, programs and memory, with other linears and one function for any number of tokens."""

    kind = PlainKind()
    searches = False
    entry_points: Sequence[EntryPoint] = (
        EntryPoint("tokens", None, None, True, "any"),
        EntryPoint("logits", None, None, False, "any"),
    )

    def build(
        self, linears: Iterable[LinearSpec], quantizers: Iterable[QuantizeSpec], target: Target, **options: Any
    ) -> PlainKernels:
        shared = KernelSet.build([], quantizers, Target.parse("cpu:generic"), trials=0)
        return PlainKernels(target, {spec: PlainLinear.build(spec, target) for spec in dict.fromkeys(linears)}, shared)
