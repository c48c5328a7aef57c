"""Builds, proves and calls the kernels of a model on a CPU.

:meth:`KernelSet.build` is the only way to get a callable kernel, and it hands out none that has not matched the
reference bit for bit on this machine in this process.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import prove
from ..backend import TirKernel, bucket_named
from ..cache import cache_directory
from ..errors import KernelError
from ..format import QuantizedWeight, Weight
from ..progress import NoProgress, Progress
from ..reference import value_dtype
from ..sizes import ALIGNMENT, MOST_ELEMENTS
from ..spec import AttentionSpec, ConvolutionSpec, EmbeddingSpec, LinearSpec, QuantizeSpec
from ..targets import Target
from ..threads import thread_count
from ..tune.database import Database, Key
from ..tune.measure import Measurer
from ..tune.tuner import Choice, Wanted, choose

if TYPE_CHECKING:
    from ..backend import Bucket
    from .space import Implementation, Schedule

__all__ = ["KernelSet", "LinearKernel", "LinearSpec", "QuantizeKernel", "QuantizeSpec", "Target"]

PACKED = "packed"
"""Name of the one tensor that a linear's kernels read."""

PARALLEL_QUANTIZER_ELEMENTS = 1 << 16
"""Elements from which a quantizer's tokens are worth a parallel launch."""


class LinearKernel:
    """The proven kernels of one :class:`LinearSpec`: one per token bucket, one weight layout for all.

    Example::

        packed = kernel.pack(weight, bias)
        y = kernel(values, x_scale, packed)
    """

    def __init__(
        self,
        spec: LinearSpec,
        implementation: Implementation,
        tir: Mapping[str, TirKernel],
        functions: list[tuple[int, Callable[..., None]]],
    ):
        self.spec = spec
        self._implementation = implementation
        self._tir = tir
        self._functions = functions

    def tir(self, bucket: str) -> TirKernel:
        """A token bucket's kernel ``(values, x_scale, packed, out)``, for whole programs."""
        return self._tir[bucket]

    def pack(self, weight: Weight, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The kernel's weight layout, bias included: :data:`PACKED`, ``uint8 [bytes]``, 64-byte aligned.

        Args:
            weight: of the spec's kind, in groups of which the spec's are parts.
            bias: fp32 ``[N]``, given exactly if the spec says so.

        Raises:
            KernelError: the weight or bias is not what the spec says.
        """
        spec = self.spec
        rows = isinstance(weight, tuple)
        shape = tuple(weight[0].shape) if rows else (weight.out_features, weight.in_features)
        kind = "int8" if rows else "bit" if isinstance(weight, QuantizedWeight) else "int4"
        if kind != spec.kind or shape != (spec.out_features, spec.in_features):
            raise KernelError(f"a weight of shape {shape} does not fit the kernel of {spec}")
        if not rows and weight.group % spec.group:
            raise KernelError(f"a weight with groups of {weight.group} does not fit the kernel of {spec}")
        if (bias is None) == spec.bias or (bias is not None and tuple(bias.shape) != (spec.out_features,)):
            raise KernelError(f"the kernel of {spec} needs {'a bias of its rows' if spec.bias else 'no bias'}")
        return {PACKED: self._implementation.pack(weight if rows else weight.refined(spec.group), bias)}

    def __call__(
        self, values: Tensor, x_scale: Tensor, packed: Mapping[str, Tensor], out: Tensor | None = None
    ) -> Tensor:
        """``values [..., K]`` times the packed weights.

        Args:
            values: int8 (int16 for 16-bit activations), contiguous.
            x_scale: float32 ``[..., G]`` or ``[..., 1]``, contiguous.
            packed: from :meth:`pack`.
            out: float32 ``[M, N]`` to write to.

        Returns:
            float32 ``[..., N]``.

        Raises:
            KernelError: a tensor has a wrong shape, dtype, device, layout or alignment.
        """
        if values.dim() != 2:
            flat = self(values.reshape(-1, values.shape[-1]), x_scale.reshape(-1, x_scale.shape[-1]), packed, out)
            return flat.reshape(*values.shape[:-1], self.spec.out_features)
        m = values.shape[0]
        if out is None:
            out = torch.empty((m, self.spec.out_features), dtype=torch.float32)
        weights = packed[PACKED]
        if weights.data_ptr() % ALIGNMENT:
            raise KernelError(f"packed weights must be {ALIGNMENT}-byte aligned; pass what pack() returned")
        if m == 0:
            return out
        for highest, function in self._functions:
            if m <= highest:
                try:
                    function(values, x_scale, weights, out)
                except (ValueError, TypeError, RuntimeError) as error:
                    raise self._explain(values, x_scale, weights, out, error) from error
                return out
        for start in range(0, m, highest):
            part = slice(start, start + highest)
            self(values[part], x_scale[part], packed, out[part])
        return out

    def _explain(self, values: Tensor, x_scale: Tensor, packed: Tensor, out: Tensor, error: Exception) -> KernelError:
        spec, m = self.spec, values.shape[0]
        expected = {
            "values": (values, value_dtype(spec.act_bits), (m, spec.in_features)),
            "x_scale": (x_scale, torch.float32, (m, spec.x_scales)),
            "packed": (packed, torch.uint8, tuple(packed.shape[:1])),
            "out": (out, torch.float32, (m, spec.out_features)),
        }
        for name, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                return KernelError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the kernel of {spec} needs {dtype} {shape}"
                )
            if tensor.device.type != "cpu":
                return KernelError(f"{name} is on {tensor.device}, the kernel of {spec} runs on the CPU")
            if not tensor.is_contiguous():
                return KernelError(f"{name} must be contiguous; call .contiguous() on it")
        return KernelError(f"the kernel of {spec} refused its arguments (is packed from another kernel?): {error}")


class QuantizeKernel:
    """The proven kernels of one :class:`QuantizeSpec`."""

    def __init__(
        self,
        spec: QuantizeSpec,
        tir: Mapping[bool, TirKernel],
        serial: Callable[..., None],
        parallel: Callable[..., None],
    ):
        self.spec = spec
        self._tir = tir
        self._serial = serial
        self._parallel = parallel

    def __call__(self, x: Tensor, clip: Tensor, *shape: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes ``x [..., K]`` (float32, contiguous) with clip factors ``[2]`` and what shapes the spec's table.

        Returns:
            ``(values [..., K], scale [..., G])``.

        Raises:
            KernelError: a tensor has a wrong shape, dtype, device or layout.
        """
        spec = self.spec
        if x.dim() != 2:
            values, scale = self(x.reshape(-1, x.shape[-1]), clip, *shape)
            return values.reshape(x.shape), scale.reshape(*x.shape[:-1], spec.scales)
        m = x.shape[0]
        values = torch.empty((m, spec.in_features), dtype=value_dtype(spec.value_bits))
        scale = torch.empty((m, spec.scales), dtype=torch.float32)
        if m == 0:
            return values, scale
        most = MOST_ELEMENTS // spec.in_features
        if m > most:
            for start in range(0, m, most):
                part = slice(start, start + most)
                values[part], scale[part] = self(x[part], clip, *shape)
            return values, scale
        wide = m > 1 and m * spec.in_features >= PARALLEL_QUANTIZER_ELEMENTS
        try:
            (self._parallel if wide else self._serial)(x, clip, *shape, values, scale)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self._explain(x, clip, shape, error) from error
        return values, scale

    def tir(self, parallel: bool) -> TirKernel:
        """The kernel ``(x, clip, [table's shape,] values, scale)``, for whole programs."""
        return self._tir[parallel]

    def _explain(self, x: Tensor, clip: Tensor, shape: tuple[Tensor, ...], error: Exception) -> KernelError:
        spec = self.spec
        name = "plane_scales" if spec.planes else "knees"
        if len(shape) != spec.tabled:
            return KernelError(f"the kernel of {spec} takes {'one tensor of' if spec.tabled else 'no'} {name}")
        expected = [
            ("x", x, (x.shape[0], spec.in_features)),
            ("clip", clip, (2,)),
            *((name, tensor, (spec.shape_size,)) for tensor in shape),
        ]
        for name, tensor, shape in expected:
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                return KernelError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the kernel of {spec} needs torch.float32 {shape}"
                )
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                return KernelError(f"{name} must be a contiguous CPU tensor for the kernel of {spec}")
        return KernelError(f"the kernel of {spec} refused its arguments: {error}")


class KernelSet:
    """Proven kernels for a model's distinct linears and quantizers on one target.

    Attributes:
        target: what they run on.
        guessed: how many of the schedules neither a search here nor an earlier build stands behind.
    """

    def __init__(
        self,
        target: Target,
        linears: Mapping[LinearSpec, LinearKernel],
        quantizers: Mapping[QuantizeSpec, QuantizeKernel],
        records: list[dict[str, Any]],
        sources: dict[str, str],
        guessed: int,
    ):
        self.target = target
        self._linears = dict(linears)
        self._quantizers = dict(quantizers)
        self._records = records
        self._sources = sources
        self.guessed = guessed

    @classmethod
    def build(
        cls,
        linears: Iterable[LinearSpec],
        quantizers: Iterable[QuantizeSpec],
        target: Target,
        *,
        cache_dir: Path | None = None,
        trials: int = 16,
        budget_s: float | None = None,
        progress: Progress | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
    ) -> KernelSet:
        """Picks schedules, compiles the kernels and proves them on this machine.

        Args:
            linears, quantizers: what is needed; duplicates are fine.
            target: one that LLVM compiles for and this machine can run.
            cache_dir: where tuning results live; the user's cache folder by default.
            trials: schedules measured per shape and token bucket where no result of such a search is stored; 0 takes
                what is stored, else the first guess.
            budget_s: seconds the search may take in all.
            progress: told about each shape.
            records: results of an earlier build (see :meth:`records`); they spare the search, never the proof.

        Raises:
            KernelError: TVM is missing, a kernel does not compile, or it disagrees with the reference.
            TargetError: this machine cannot run the target.
        """
        from . import space

        target.check_runs_here()
        progress = progress or NoProgress()
        implementations = {spec: space.implementations(spec, target) for spec in dict.fromkeys(linears)}
        choices = _choose_schedules(
            implementations, target, cache_dir or cache_directory(), trials, budget_s, progress, records or []
        )
        chosen = {(choice.spec, choice.bucket.name): choice.schedule for choice in choices}
        sources: dict[str, str] = {}
        with progress.task("prove kernels", len(implementations) + len(dict.fromkeys(quantizers))) as task:
            linear_kernels = {}
            for spec, candidates in implementations.items():
                schedules = {bucket: chosen[spec, bucket.name] for bucket in space.BUCKETS}
                implementation = space.of_layout(candidates, schedules[space.BUCKETS[0]].layout)
                linear_kernels[spec] = _prove_linear(implementation, target, schedules, sources)
                task.advance()
            quantize_kernels = {}
            for spec in dict.fromkeys(quantizers):
                quantize_kernels[spec] = _prove_quantizer(spec, target, sources)
                task.advance()
        stored = [
            {
                "spec": dataclasses.asdict(spec),
                "tokens": tokens,
                "target": space.measured_as(target, bucket_named(tokens, space.BUCKETS)).name,
                "threads": thread_count(),
                "schedule": dataclasses.asdict(schedule),
            }
            for (spec, tokens), schedule in chosen.items()
        ]
        guessed = sum(choice.guessed for choice in choices)
        return cls(target, linear_kernels, quantize_kernels, stored, sources, guessed)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        """The kernel of a linear.

        Raises:
            KernelError: it was not built.
        """
        if spec not in self._linears:
            raise KernelError(f"no kernel was built for {spec}; there is no slow path")
        return self._linears[spec]

    def quantizer(self, spec: QuantizeSpec) -> QuantizeKernel:
        """The kernel of a quantizer.

        Raises:
            KernelError: it was not built.
        """
        if spec not in self._quantizers:
            raise KernelError(f"no kernel was built for {spec}; there is no slow path")
        return self._quantizers[spec]

    @property
    def lanes(self) -> int:
        """fp32 lanes of the target's vectors."""
        from . import space

        return space.lanes(self.target)

    def attention(self, spec: AttentionSpec, queries: int | None, parallel: bool) -> TirKernel:
        """An attention kernel, see :func:`..kernels.attention.cached_attention`, for whole programs.

        Args:
            spec: the attention.
            queries: tokens of each sequence of a call, where that is known.
            parallel: split it over the thread pool; few tokens are not worth a launch of their own.
        """
        from ..kernels import attention

        tile = attention.tile_rows(spec, queries)
        name = f"attention_{spec.heads}x{spec.kv_heads}x{spec.key_width}x{spec.value_width}_kv{spec.bits}"
        name += f"_scale{_fp32_bits(spec.scale)}"
        name += f"_w{spec.window}" if spec.window else ""
        name += f"_cap{_fp32_bits(spec.softcap)}" if spec.softcap else ""
        name += "_sinks" if spec.sinks else ""
        name += "_alibi" if spec.slopes else ""
        name += f"_c{spec.chunk}" if spec.chunk else ""
        name += "_counted" if spec.places and spec.counted else ""
        name += f"_{tile}_{'parallel' if parallel else 'serial'}"
        return TirKernel(name, lambda: attention.cached_attention(spec, self.lanes, tile, parallel))

    def embedding(self, spec: EmbeddingSpec) -> TirKernel:
        """The kernel of an embedding, see :func:`..kernels.embedding.embedding`, for whole programs."""
        from ..kernels.embedding import embedding

        return TirKernel(f"embedding_{spec}", lambda: embedding(spec))

    def convolution(self, spec: ConvolutionSpec, parallel: bool) -> TirKernel:
        """A convolution with a state, see :func:`..kernels.convolution.cached_conv`, for whole programs."""
        from ..kernels.convolution import cached_conv

        name = f"cached_conv_{spec.channels}x{spec.taps}{'_bias' if spec.bias else ''}"
        name += "_parallel" if parallel else "_serial"
        return TirKernel(name, lambda: cached_conv(spec, parallel))

    def dense(self, rows: int, columns: int, one_token: bool) -> TirKernel:
        """The kernel of a float linear, see :func:`..kernels.dense.dense`, for whole programs."""
        from ..kernels.dense import dense

        name = f"dense_{rows}x{columns}_{'token' if one_token else 'tokens'}"
        return TirKernel(name, lambda: dense(rows, columns, self.lanes, one_token))

    def order(self, dtype: str, descending: bool, parallel: bool) -> TirKernel:
        """The kernel of an order, see :func:`..kernels.order.order`, for whole programs."""
        from ..kernels.order import order

        name = f"order_{dtype}_{'descending' if descending else 'ascending'}"
        name += "_parallel" if parallel else "_serial"
        return TirKernel(name, lambda: order(dtype, descending, parallel))

    def scatter(self, dtype: str, adds: bool, parallel: bool) -> TirKernel:
        """The kernel that writes rows to places, see :func:`..kernels.scatter.scatter`, for whole programs."""
        from ..kernels.scatter import scatter

        name = f"scatter_{dtype}{'_add' if adds else ''}_{'parallel' if parallel else 'serial'}"
        return TirKernel(name, lambda: scatter(dtype, adds, parallel))

    def records(self) -> list[dict[str, Any]]:
        """The chosen schedules, JSON-able, for ``build(records=...)``."""
        return self._records

    def sources(self) -> dict[str, str]:
        """Each kernel's generated TVMScript, for reading only."""
        return self._sources


def _choose_schedules(
    implementations: Mapping[LinearSpec, list[Implementation]],
    target: Target,
    cache_dir: Path,
    trials: int,
    budget_s: float | None,
    progress: Progress,
    records: Sequence[Mapping[str, Any]],
) -> list[Choice]:
    """A valid schedule for every linear and token bucket, one layout for all buckets of a linear."""
    from ..tvm_api import VERSION
    from . import space

    wanted = [
        Wanted(
            candidates,
            bucket,
            Key.here(
                spec, bucket.name, space.measured_as(target, bucket), thread_count(), VERSION, space.SCHEDULE_VERSION
            ),
        )
        for spec, candidates in implementations.items()
        for bucket in space.BUCKETS
    ]
    with Measurer() as measurer:
        return choose(
            wanted,
            target,
            Database(cache_dir),
            measurer,
            trials=trials,
            budget_s=budget_s,
            progress=progress,
            records=records,
        )


def _prove_linear(
    implementation: Implementation, target: Target, schedules: Mapping[Bucket, Schedule], sources: dict[str, str]
) -> LinearKernel:
    """Compiles a linear's kernels and holds them against the reference."""
    from ..tvm_api import compile_functions

    spec = implementation.spec
    functions = {}
    for i, schedule in enumerate(schedules.values()):
        functions[f"{_name(spec)}_{i}"] = implementation.function(schedule)
    library = compile_functions(functions, target.llvm)
    callables = [(bucket, library[name]) for bucket, name in zip(schedules, functions, strict=True)]
    for case in prove.linear_cases(spec):
        packed = implementation.pack(case.weight, case.bias)
        for bucket, function in callables:
            # A program calls the kernels of many tokens for what is left of a prompt or a batch, too.
            counts = sorted({m for first in (1, bucket.lowest) for m in prove.token_counts(first, bucket.highest)})
            if failure := prove.linear_failure(function, packed, case, counts):
                raise prove.disproved(str(spec), failure)
    sources |= {name: function.script() for name, function in functions.items()}
    made = {bucket.name: TirKernel.made(*item) for bucket, item in zip(schedules, functions.items(), strict=True)}
    return LinearKernel(spec, implementation, made, [(bucket.highest, function) for bucket, function in callables])


def _prove_quantizer(spec: QuantizeSpec, target: Target, sources: dict[str, str]) -> QuantizeKernel:
    """Compiles a quantizer's kernels and holds them against the reference."""
    from ..tvm_api import compile_functions
    from . import space

    functions = {_quantizer_name(spec, mode): space.quantizer(spec, target, mode) for mode in (False, True)}
    library = compile_functions(functions, target.llvm)
    callables = [library[name] for name in functions]
    for function in callables:
        if failure := prove.quantizer_failure(function, spec, [1, 7, prove.TOKENS]):
            raise prove.disproved(str(spec), failure)
    sources |= {name: function.script() for name, function in functions.items()}
    made = {mode: TirKernel.made(*item) for mode, item in zip((False, True), functions.items(), strict=True)}
    return QuantizeKernel(spec, made, *callables)


def _fp32_bits(value: float) -> str:
    """A number as it is in a kernel, for names: hexadecimal digits."""
    return struct.pack(">f", value).hex()


def _quantizer_name(spec: QuantizeSpec, parallel: bool) -> str:
    """A symbol and file name for a quantizer."""
    kind = "knees" if spec.knees else "planes" if spec.planes else "quantize"
    return f"{kind}{spec.bits}_{spec.in_features}_g{spec.group}_{'parallel' if parallel else 'serial'}"


def _name(spec: LinearSpec) -> str:
    """A symbol and file name for a linear."""
    token = "t" if spec.per_token else ""
    return f"{spec.kind}_{spec.out_features}x{spec.in_features}_g{spec.group}_a{spec.act_bits}{token}{spec.marks}"
