"""CPU kernels of a linear or quantizer: which family, how weights are packed, which schedules are valid."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backend
from ..backend import Bucket
from ..errors import KernelError, TargetError
from ..format import Int4Weight, QuantizedWeight, Weight
from ..kernels import code_table, dot, popcount, quantize, tiles
from ..kernels.dot import SLAB, Problem
from ..kernels.families import INSTRUCTION_SETS
from ..kernels.grouped import BitOperand
from ..kernels.int4 import Int4Operand
from ..kernels.int8 import Int8Operand
from ..kernels.isa import InstructionSet
from ..kernels.lut8 import Lut8Operand
from ..kernels.popcount import PlaneOperand
from ..kernels.portable import PortableLinear
from ..spec import LinearSpec, QuantizeSpec
from ..targets import Target, generic, x86
from ..tvm_api import PrimFunc
from .buckets import BUCKETS

INT32_COLUMNS = 65536
"""Most columns of one int32 accumulator: more could overflow with offset weights and 8-bit values."""

INT32_COLUMNS_A16 = 512
"""The same for 16-bit values and weights of at most 128."""

PARALLEL_PRODUCTS = 1 << 20
"""Multiplications from which a parallel launch, some 8 microseconds, is likely to pay."""

PARALLEL_STAGE_CHUNK = 64
"""Chunks of that many tokens belong to calls with enough tokens to stage them in parallel, too."""

PARALLEL_STAGE_TILE = 16
"""The same for tokens of a tile."""

NEAR_BYTES = 24 << 10
"""Half a first-level cache of the CPUs that have tiles: decoded weights of a row step beyond it are likely to cost more
than what more rows at once save."""

HIDING_TOKENS = 8
"""Tokens of a tile whose products take as long as decoding its weights, on other units of the CPU."""

ROW_VECTORS = 4
"""Most row vectors of a GEMM tile that are likely to pay: with more, few tokens fit the registers."""

SCHEDULE_VERSION = 3
"""Counts changes of what a schedule's fields mean or of the code generated from them; part of the database key."""


@dataclass(frozen=True)
class GemvSchedule:
    """How a one-token kernel of dot products runs; the other fields are :func:`..kernels.dot.gemv`'s."""

    layout: str
    rows: int
    chains: int
    prefetch: int
    parallel: bool


@dataclass(frozen=True)
class PopcountSchedule:
    """How a one-token kernel of popcounts runs; the other fields are :func:`..kernels.popcount.gemv`'s."""

    layout: str
    rows: int
    prefetch: int
    parallel: bool


@dataclass(frozen=True)
class GemmSchedule:
    """How a many-token kernel runs; the other fields are :func:`..kernels.dot.gemm`'s."""

    layout: str
    rows: int
    tokens: int
    chunk: int
    parallel: bool
    prefetch: int = 0  # artifacts of older versions have schedules without these
    parallel_stage: bool = False


@dataclass(frozen=True)
class TileSchedule:
    """How a many-token kernel of tiles runs; the other fields are :func:`..kernels.tiles.gemm`'s."""

    layout: str
    rows: int
    tokens: int
    prefetch: int
    parallel: bool


@dataclass(frozen=True)
class PortableSchedule:
    """How a portable kernel runs; the other fields are :meth:`..kernels.portable.PortableLinear.function`'s."""

    layout: str
    rows: int
    parallel: bool


Schedule = GemvSchedule | PopcountSchedule | GemmSchedule | TileSchedule | PortableSchedule


class Implementation(backend.Implementation, Protocol):
    """The kernels of one linear that read one layout of its weights, as TIR."""

    def schedules(self, bucket: Bucket) -> list[Schedule]: ...

    def function(self, schedule: Schedule) -> PrimFunc:
        """The kernel ``(values, x_scale, packed, out)`` a schedule describes."""
        ...

    def pack(self, weight: Weight, bias: Tensor | None) -> Tensor:
        """The kernel's weight layout, bias included, as ``uint8``, 64-byte aligned."""
        ...


def _parallel_or_not(spec: LinearSpec, bucket: Bucket) -> tuple[bool, bool]:
    """Both choices, the likely better one first."""
    worth = spec.out_features * spec.in_features * bucket.probe >= PARALLEL_PRODUCTS
    return worth, not worth


_OPERANDS = {"lut8": Lut8Operand, "int4": Int4Operand, "int8": Int8Operand}


@dataclass(frozen=True)
class VectorLinear:
    """A linear on a CPU with 8-bit dot products, which compute all but one token of the layout ``"popcount"``.

    Attributes:
        spec: what is computed.
        family: one of :data:`..kernels.families.INSTRUCTION_SETS`.
        layout: ``"lut8"``, ``"popcount"``, ``"int4"`` or ``"int8"``.
    """

    spec: LinearSpec
    family: str
    layout: str

    @property
    def isa(self) -> InstructionSet:
        return INSTRUCTION_SETS[self.family](self.spec.act_bits)

    @functools.cached_property
    def operand(self) -> Lut8Operand | PlaneOperand | Int4Operand | Int8Operand:
        spec = self.spec
        group = spec.group or spec.in_features
        problem = Problem(spec.out_features, spec.in_features, group, spec.x_scales == 1 < spec.groups, spec.bias)
        if self.layout == "popcount":
            return PlaneOperand(problem, spec.additive)
        return _OPERANDS[self.layout](problem)

    def schedules(self, bucket: Bucket) -> list[Schedule]:
        padded_rows = self.operand.problem.row_blocks * SLAB
        isa = self.isa
        # Accumulators plus a few weight and activation vectors should fit the register file.
        registers, fewest = isa.registers - 2, isa.tokens_per_dot
        found: list[Schedule] = []
        for parallel in _parallel_or_not(self.spec, bucket):
            if bucket.highest == 1:
                # Fetching far ahead made W(1+1) kernels 1.2 to 1.8 times as fast on a Zen 5, int8 ones no faster.
                first = (0,) if self.layout == "int8" else (12288, 0)
                for prefetch in dict.fromkeys((*first, 3072, 1024, 2048, 4096, 6144, 8192, 12288)):
                    for rows in (16, 32, 48, 64, 96, 128):
                        if padded_rows % rows:
                            continue
                        if self.layout == "popcount":
                            found.append(PopcountSchedule(self.layout, rows, prefetch, parallel))
                            continue
                        fits = [c for c in isa.chains if c * (rows // isa.lanes) <= registers or c == 1]
                        found.extend(GemvSchedule(self.layout, rows, c, prefetch, parallel) for c in fits)
                continue
            if isa.tiles:
                found.extend(self._tile_schedules(bucket, parallel))
            few = bucket.highest <= 16
            # Without decoding more rows at once only mean more streams from memory.
            likely = (16, 32, 48, 64, 96) if few or not self.operand.decodes else (32, 16, 48, 64, 96)
            widths = (8, 4, 6, 12, 10, 5, 3, 2, 1) if few or fewest == 1 else (4, 8, 6, 12, 10, 5, 3, 2, 1)
            for rows in sorted(likely, key=lambda rows: rows // isa.lanes > ROW_VECTORS):
                fits = [t for t in widths if t % fewest == 0]
                fits = [t for t in fits if t * (rows // isa.lanes) <= registers or t == fewest]
                if padded_rows % rows:
                    continue
                for tokens in fits:
                    # TVM cannot lower tiles of a single token where a token has a single scale.
                    if tokens > bucket.highest or (tokens == 1 == self.spec.x_scales):
                        continue
                    # Whole tiles: half or all the tokens of a small bucket at once, some or many of a large one.
                    sizes = [-(-size // tokens) * tokens for size in ((8, 16) if few else (120, 60, 240, 480))]
                    if fewest == 1:
                        # Decoding anew for every tile costs nothing where there are enough products to hide it.
                        sizes = [tokens, *sizes] if tokens >= HIDING_TOKENS else [*sizes, tokens]
                    for chunk in dict.fromkeys(sizes):
                        ahead = (12288, 0) if few else (12288,) if chunk == tokens else (0,)
                        stage = parallel and not few and (chunk == tokens or chunk >= PARALLEL_STAGE_CHUNK)
                        found.extend(
                            GemmSchedule(self.layout, rows, tokens, chunk, parallel, prefetch, stage)
                            for prefetch in ahead
                        )
        return found

    def _tile_schedules(self, bucket: Bucket, parallel: bool) -> list[TileSchedule]:
        problem = self.operand.problem
        rows = [rows for rows in (32, 16, 48, 64, 96) if problem.row_blocks * SLAB % rows == 0]
        return [
            TileSchedule(self.layout, r, tokens, prefetch, parallel)
            for prefetch in ((0,) if self.layout == "int8" else (0, 4096, 12288))
            # A small bucket's tokens are staged by each thread for itself, as functions of few launches need it.
            for tokens in ((8, 12, 4) if bucket.highest <= 16 else (16, 8))
            for r in sorted(rows, key=lambda r: r > SLAB and r * problem.columns > NEAR_BYTES)
        ]

    def function(self, schedule: Schedule) -> PrimFunc:
        isa = self.isa
        if isinstance(schedule, PopcountSchedule):
            assert isinstance(self.operand, PlaneOperand)
            return popcount.gemv(self.operand, isa, **_arguments(schedule))
        if isinstance(schedule, GemvSchedule):
            return dot.gemv(self.operand, isa, **_arguments(schedule))
        if isinstance(schedule, TileSchedule):
            assert isa.tiles
            stage = schedule.parallel and schedule.tokens >= PARALLEL_STAGE_TILE
            return tiles.gemm(self.operand, isa.tiles, **_arguments(schedule), parallel_stage=stage)
        assert isinstance(schedule, GemmSchedule)
        return dot.gemm(self.operand, isa, **_arguments(schedule))

    def pack(self, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.operand
        if isinstance(weight, QuantizedWeight):
            assert isinstance(operand, BitOperand)
            packed = operand.pack(weight)
        elif isinstance(weight, Int4Weight):
            assert isinstance(operand, Int4Operand)
            packed = operand.pack(weight)
        else:
            assert isinstance(operand, Int8Operand)
            packed = operand.pack(*weight)
        if bias is None:
            return packed
        padded = torch.nn.functional.pad(bias.float(), (0, operand.problem.row_blocks * SLAB - bias.numel()))
        return torch.cat([packed, padded.view(torch.uint8)])


@dataclass(frozen=True)
class Portable:
    """A linear on any LLVM target.

    Attributes:
        spec: what is computed.
    """

    spec: LinearSpec

    layout = "portable"

    def schedules(self, bucket: Bucket) -> list[Schedule]:
        counts = [r for r in (16, 8, 4, 32, 64, 2, 1, 128) if r == 1 or r <= self.spec.out_features]
        return [
            PortableSchedule(self.layout, rows, parallel)
            for parallel in _parallel_or_not(self.spec, bucket)
            for rows in counts
        ]

    def function(self, schedule: Schedule) -> PrimFunc:
        return PortableLinear(self.spec).function(**_arguments(schedule))

    def pack(self, weight: Weight, bias: Tensor | None) -> Tensor:
        return PortableLinear(self.spec).pack(weight, bias)


def _arguments(schedule: Schedule) -> dict[str, Any]:
    """What a schedule passes to the function that makes its kernel."""
    return {name: value for name, value in dataclasses.asdict(schedule).items() if name != "layout"}


def implementations(spec: LinearSpec, target: Target) -> list[Implementation]:
    """The kernels of ``spec`` on a CPU target, one entry per weight layout, a good guess first.

    Raises:
        KernelError: no family computes it.
        TargetError: the target is no CPU.
    """
    if target.family not in (generic.FAMILY, *INSTRUCTION_SETS):
        raise TargetError(f"{target.name} is not a CPU target")
    if (spec.group or spec.in_features) > INT32_COLUMNS:
        raise KernelError(
            f"{spec.in_features} inputs overflow one integer accumulator; quantize the activations per group"
        )
    if spec.act_bits == 16 and (spec.group or spec.in_features) > INT32_COLUMNS_A16:
        raise KernelError(
            f"{spec.in_features} inputs of 16 bits overflow one integer accumulator; quantize the activations per group"
        )
    if target.family == generic.FAMILY or spec.act_bits == 16:
        return [Portable(spec)]
    if spec.kind != "bit":
        return [VectorLinear(spec, target.family, spec.kind)]
    counts_bits = spec.act_bits == 4 and INSTRUCTION_SETS[target.family](spec.act_bits).counts_bits
    return [VectorLinear(spec, target.family, layout) for layout in (["lut8", "popcount"] if counts_bits else ["lut8"])]


def of_layout(candidates: Sequence[Implementation], layout: str) -> Implementation:
    """The implementation that reads a layout.

    Raises:
        KernelError: none does.
    """
    for implementation in candidates:
        if implementation.layout == layout:
            return implementation
    raise KernelError(f"no kernel of {candidates[0].spec} reads the weight layout {layout!r}; recompile with --fresh")


def quantizer(spec: QuantizeSpec, target: Target, parallel: bool) -> PrimFunc:
    """The quantizer ``(x, clip, values, scale)`` on a CPU target; what shapes a table stands behind ``clip``."""
    if spec.tabled:
        return code_table.quantizer(spec.in_features, spec.group, lanes(target), parallel, spec.planes)
    return quantize.quantizer(spec.in_features, spec.group, spec.bits, lanes(target), parallel)


def lanes(target: Target) -> int:
    """fp32 lanes of a CPU target's vectors."""
    instructions = INSTRUCTION_SETS.get(target.family)
    return instructions(8).lanes if instructions else generic.LANES


def schedule_from(record: dict[str, Any]) -> Schedule:
    """A schedule from its JSON form.

    Raises:
        KernelError: it is none.
    """
    for kind in (GemvSchedule, PopcountSchedule, GemmSchedule, TileSchedule, PortableSchedule):
        fields = dataclasses.fields(kind)
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        if needed <= record.keys() <= {field.name for field in fields}:
            if kind is GemmSchedule and "parallel_stage" not in record:
                stage = record["parallel"] and record["chunk"] >= PARALLEL_STAGE_CHUNK
                record = {**record, "parallel_stage": stage}
            return kind(**record)
    raise KernelError(f"a stored schedule has unknown fields {sorted(record)}; recompile with --fresh")


def measured_as(target: Target, bucket: Bucket) -> Target:
    """The target whose kernels for so many tokens a target has."""
    family = x86.ONE_TOKEN.get(target.family) if bucket.highest == 1 else None
    return target if family is None else Target.parse(f"{target.kind}:{family}")


class CpuSpace:
    """What the tuner chooses from on CPUs. Implements :class:`..backend.SearchSpace`."""

    buckets = BUCKETS
    version = SCHEDULE_VERSION

    def implementations(self, spec: LinearSpec, target: Target) -> list[Implementation]:
        return implementations(spec, target)

    def of_layout(self, candidates: Sequence[Implementation], layout: str) -> Implementation:
        return of_layout(candidates, layout)

    def schedule_from(self, record: dict[str, Any]) -> Schedule:
        return schedule_from(record)

    def measured_as(self, target: Target, bucket: Bucket) -> Target:
        return measured_as(target, bucket)


SPACE = CpuSpace()
