"""CPU kernels of a linear or quantizer: which family, how weights are packed, which schedules are valid."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import KernelError, TargetError
from ..format import QuantizedWeight
from ..spec import LinearSpec, QuantizeSpec
from ..targets import Target, generic, x86
from ..tvm_api import PrimFunc
from . import dot, quantize
from .dot import SLAB, Problem
from .int8 import Int8Operand
from .lut8 import Lut8Operand
from .portable import PortableLinear
from .x86 import instruction_set

Weight = QuantizedWeight | tuple[Tensor, Tensor]
"""A W(1+1) matrix, or int8 rows ``[N, K]`` with their fp32 scales ``[N]``."""

INT32_COLUMNS = 65536
"""Most columns of one int32 accumulator: more could overflow with offset weights and 8-bit values."""

INT32_COLUMNS_A16 = 512
"""The same for 16-bit values and weights of at most 128."""

PARALLEL_PRODUCTS = 1 << 20
"""Multiplications from which a parallel launch, some 8 microseconds, is likely to pay."""

PARALLEL_STAGE_CHUNK = 64
"""Chunks of that many tokens belong to calls with enough tokens to stage them in parallel, too."""

SCHEDULE_VERSION = 1
"""Counts changes of what a schedule's fields mean or of the code generated from them; part of the database key."""


@dataclass(frozen=True)
class Bucket:
    """A range of token counts served by one kernel.

    Attributes:
        name: as in records.
        lowest: fewest tokens.
        highest: most tokens; a call with more is cut into pieces of this many.
        probe: tokens at which candidates are measured.
    """

    name: str
    lowest: int
    highest: int
    probe: int


BUCKETS = (Bucket("1", 1, 1, 1), Bucket("2-16", 2, 16, 8), Bucket("17+", 17, 2048, 64))


def bucket_named(name: str) -> Bucket:
    """The bucket of that name.

    Raises:
        KernelError: there is none.
    """
    for bucket in BUCKETS:
        if bucket.name == name:
            return bucket
    raise KernelError(f"no token range is named {name!r}; use one of {', '.join(b.name for b in BUCKETS)}")


@dataclass(frozen=True)
class GemvSchedule:
    """How a one-token kernel runs; the fields are :func:`.dot.gemv`'s."""

    rows: int
    chains: int
    prefetch: int
    parallel: bool


@dataclass(frozen=True)
class GemmSchedule:
    """How a many-token kernel runs; the fields are :func:`.dot.gemm`'s."""

    rows: int
    tokens: int
    chunk: int
    parallel: bool


@dataclass(frozen=True)
class PortableSchedule:
    """How a portable kernel runs; the fields are :meth:`.portable.PortableLinear.function`'s."""

    rows: int
    parallel: bool


Schedule = GemvSchedule | GemmSchedule | PortableSchedule


class Implementation(Protocol):
    """One family's kernels of one linear."""

    @property
    def spec(self) -> LinearSpec:
        """What is computed."""
        ...

    def schedules(self, bucket: Bucket) -> list[Schedule]:
        """Every valid schedule of a bucket, a good guess first."""
        ...

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


@dataclass(frozen=True)
class X86Linear:
    """A linear on x86: look-up or int8 weights with 8-bit dot products.

    Attributes:
        spec: what is computed.
        family: ``"avx512-vnni"`` or ``"avx2"``.
    """

    spec: LinearSpec
    family: str

    @functools.cached_property
    def operand(self) -> Lut8Operand | Int8Operand:
        spec = self.spec
        group = spec.group or spec.in_features
        problem = Problem(spec.out_features, spec.in_features, group, spec.x_scales == 1 < spec.groups, spec.bias)
        return Lut8Operand(problem) if spec.kind == "bit" else Int8Operand(problem)

    def schedules(self, bucket: Bucket) -> list[Schedule]:
        padded_rows = self.operand.problem.row_blocks * SLAB
        isa = instruction_set(self.family, self.spec.act_bits)
        # Accumulators plus a few weight and activation vectors should fit the register file.
        registers = (32 if isa.lanes == 16 else 16) - 2
        found: list[Schedule] = []
        for parallel in _parallel_or_not(self.spec, bucket):
            if bucket.highest == 1:
                for prefetch in (3072, 0, 1024, 2048, 4096, 6144, 8192, 12288):
                    for rows in (16, 32, 48, 64, 96, 128):
                        if padded_rows % rows:
                            continue
                        fits = [c for c in (4, 2, 1) if c * (rows // isa.lanes) <= registers or c == 1]
                        found.extend(GemvSchedule(rows, chains, prefetch, parallel) for chains in fits)
                continue
            for rows in (32, 16, 48, 64, 96):
                fits = [t for t in (4, 8, 6, 12, 10, 5, 3, 2, 1) if t * (rows // isa.lanes) <= registers or t == 1]
                if padded_rows % rows:
                    continue
                for tokens in fits:
                    # TVM cannot lower tiles of a single token where there is a single group.
                    if tokens > bucket.highest or (tokens == 1 == self.spec.groups):
                        continue
                    # Whole tiles: all or half the tokens of a small bucket at once, some or many of a large one.
                    sizes = (16, 8) if bucket.highest <= 16 else (120, 60, 240, 480)
                    chunks = [-(-size // tokens) * tokens for size in sizes]
                    found.extend(GemmSchedule(rows, tokens, chunk, parallel) for chunk in chunks)
        return found

    def function(self, schedule: Schedule) -> PrimFunc:
        isa = instruction_set(self.family, self.spec.act_bits)
        if isinstance(schedule, GemvSchedule):
            return dot.gemv(self.operand, isa, **dataclasses.asdict(schedule))
        assert isinstance(schedule, GemmSchedule)
        stage = schedule.parallel and schedule.chunk >= PARALLEL_STAGE_CHUNK
        return dot.gemm(self.operand, isa, **dataclasses.asdict(schedule), parallel_stage=stage)

    def pack(self, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.operand
        if isinstance(weight, QuantizedWeight):
            assert isinstance(operand, Lut8Operand)
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

    def schedules(self, bucket: Bucket) -> list[Schedule]:
        counts = [r for r in (16, 8, 4, 32, 64, 2, 1, 128) if r == 1 or r <= self.spec.out_features]
        return [PortableSchedule(rows, parallel) for parallel in _parallel_or_not(self.spec, bucket) for rows in counts]

    def function(self, schedule: Schedule) -> PrimFunc:
        return PortableLinear(self.spec).function(**dataclasses.asdict(schedule))

    def pack(self, weight: Weight, bias: Tensor | None) -> Tensor:
        return PortableLinear(self.spec).pack(weight, bias)


def linear(spec: LinearSpec, target: Target) -> Implementation:
    """The kernels of ``spec`` on a CPU target.

    Raises:
        KernelError: no family computes it.
        TargetError: the target is no CPU.
    """
    if target.kind != "cpu":
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
        return Portable(spec)
    return X86Linear(spec, target.family)


def quantizer(spec: QuantizeSpec, target: Target, parallel: bool) -> PrimFunc:
    """The quantizer ``(x, clip, values, scale)`` on a CPU target."""
    lanes = x86.LANES.get(target.family, generic.LANES)
    return quantize.quantizer(spec.in_features, spec.group, spec.bits, lanes, parallel)


def schedule_from(record: dict[str, Any]) -> Schedule:
    """A schedule from its JSON form.

    Raises:
        KernelError: it is none.
    """
    for kind in (GemvSchedule, GemmSchedule, PortableSchedule):
        if {f.name for f in dataclasses.fields(kind)} == set(record):
            return kind(**record)
    raise KernelError(f"a stored schedule has unknown fields {sorted(record)}; recompile with --fresh")
