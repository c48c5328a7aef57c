"""What a machine can do at best: kernels that only read memory, or only multiply, and the time they bound.

Both are measured on the machine, in the process and with the thread pool that candidates are measured with, so a
fraction of them says how much of a candidate's time is the machine's and how much the schedule's.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from dataclasses import dataclass
from typing import Any

from ..kernels.dot import FIELDS, SLAB
from ..kernels.families import INSTRUCTION_SETS
from ..kernels.isa import InstructionSet, TileSet
from ..kernels.tiles import MOST_TOKENS, PRODUCTS, SHAPE_WORDS, VALUES, WEIGHTS
from ..targets import Target
from ..tvm_api import PrimFunc, T

PARTS = 64
"""Pieces of a measurement, handed to the thread pool: more than it has threads, so that none waits long."""

READ_LANES = 16
READ_BYTES = 4 * READ_LANES
STREAMS = 4
"""Independent sums of a reading thread, which hide the latency of an addition."""

SLABS = 16
"""Slabs of columns a multiplying thread cycles through; its operands stay in the first-level cache."""

PASSES = 256
"""Times it does so in a call."""

TILES = ((2, 4), (2, 6), (2, 10), (4, 4), (4, 5))
"""(row vectors, tokens) of the register tiles tried; how many accumulators fit depends on the register file."""


TILE_BYTES = 1024
"""Bytes of a full tile."""

CYCLED_TILES = 8
"""Tiles of weights, and of values, that a thread which multiplies tiles cycles through."""


@dataclass(frozen=True)
class Roofline:
    """The measured limits of a machine.

    Attributes:
        bandwidth: bytes per second that its threads together read from beyond their own caches.
        products: 8-bit multiply-adds per second, None where the target's family has no dot product of its own.
    """

    bandwidth: float
    products: float | None

    def microseconds(self, read_bytes: float, products: float) -> float:
        """The least time of a call that reads so much memory and multiplies so often; 0 where nothing bounds it."""
        seconds = read_bytes / self.bandwidth
        return 1e6 * (max(seconds, products / self.products) if self.products else seconds)


def reader(count: int) -> PrimFunc:
    """A kernel ``(sums int32 [PARTS * 16], data uint8 [count])`` that reads all data once.

    Args:
        count: bytes, a multiple of :data:`PARTS` times :data:`STREAMS` times 64.
    """
    steps = count // (PARTS * STREAMS * READ_BYTES)
    int32 = f"int32x{READ_LANES}"

    @T.prim_func(s_tir=True)
    def kernel(sums_: T.handle, data_: T.handle):
        T.func_attr({"tirx.noalias": True})
        data = T.match_buffer(data_, (count,), "uint8", align=64)
        sums = T.match_buffer(sums_, (PARTS * READ_LANES,), "int32", align=64)
        for part in T.parallel(PARTS):
            total = T.alloc_buffer((STREAMS * READ_LANES,), "int32")
            for s in T.unroll(STREAMS):
                total[T.ramp(s * READ_LANES, 1, READ_LANES)] = T.broadcast(T.int32(0), READ_LANES)
            for i in T.serial(steps):
                for s in T.unroll(STREAMS):
                    at: T.let = ((part * steps + i) * STREAMS + s) * READ_BYTES
                    total[T.ramp(s * READ_LANES, 1, READ_LANES)] = total[
                        T.ramp(s * READ_LANES, 1, READ_LANES)
                    ] + T.reinterpret(int32, data[T.ramp(at, 1, READ_BYTES)])
            for s in T.unroll(STREAMS - 1):
                total[T.ramp(0, 1, READ_LANES)] = (
                    total[T.ramp(0, 1, READ_LANES)] + total[T.ramp((s + 1) * READ_LANES, 1, READ_LANES)]
                )
            sums[T.ramp(part * READ_LANES, 1, READ_LANES)] = total[T.ramp(0, 1, READ_LANES)]

    return kernel


def filler(count: int) -> PrimFunc:
    """A kernel ``(data uint8 [count])`` that writes all data, as memory never written costs nothing to read.

    Args:
        count: bytes, a multiple of :data:`PARTS` times 64.
    """
    steps = count // (PARTS * READ_BYTES)

    @T.prim_func(s_tir=True)
    def kernel(data_: T.handle):
        data = T.match_buffer(data_, (count,), "uint8", align=64)
        for part in T.parallel(PARTS):
            for i in T.serial(steps):
                data[T.ramp((part * steps + i) * READ_BYTES, 1, READ_BYTES)] = T.broadcast(T.uint8(1), READ_BYTES)

    return kernel


def instructions(target: Target, act_bits: int) -> InstructionSet | None:
    """The target's 8-bit dot product, or None where its kernels have none or the values are too wide for it."""
    return INSTRUCTION_SETS[target.family](act_bits) if target.family in INSTRUCTION_SETS and act_bits <= 8 else None


def tiles(isa: InstructionSet) -> list[tuple[int, int]]:
    """Those of :data:`TILES` that the instructions can make."""
    return [tile for tile in TILES if tile[1] % isa.tokens_per_dot == 0]


def multiplier(isa: InstructionSet, vectors: int, tokens: int) -> PrimFunc:
    """A kernel ``(weights, values, sums)`` of nothing but the dot products of a register tile, on first-level data.

    ``weights`` are ``uint8 [weight_bytes]``, ``values`` ``int8 [value_bytes]``, ``sums`` ``int32 [sum_count]`` of
    :func:`multiplier_sizes`.
    """
    lanes, together = isa.lanes, isa.tokens_per_dot
    weight_bytes, value_bytes, sum_count = multiplier_sizes(isa, vectors, tokens)
    width = vectors * tokens * lanes

    def where(m: int, v: int) -> Any:
        return T.ramp((m * vectors + v) * lanes, 1, lanes)

    def slab(weights: Any, values: Any, total: Any, t: Any) -> None:
        """The products of a slab, in the order of :func:`..kernels.dot.gemm`'s tile."""
        for f in range(0, FIELDS, isa.pairs_per_dot):
            w = {}
            for k in range(isa.pairs_per_dot):
                for v in range(vectors):
                    start = ((t * FIELDS + f + k) * vectors + v) * (4 * lanes)
                    w[k, v] = T.Bind(weights[T.ramp(start, 1, 4 * lanes)])
            for m in range(0, tokens, together):
                x = [T.Bind(value) for value in isa.load_values(values, (t * tokens + m) * SLAB, f)]
                for v in range(vectors):
                    places = [where(m + i, v) for i in range(together)]
                    fields = [w[k, v] for k in range(isa.pairs_per_dot)]
                    for place, y in zip(places, isa.multiply([total[i] for i in places], fields, x), strict=True):
                        T.buffer_store(total, y, [place])

    @T.prim_func(s_tir=True)
    def kernel(weights_: T.handle, values_: T.handle, sums_: T.handle):
        T.func_attr({"tirx.noalias": True})
        weights = T.match_buffer(weights_, (weight_bytes,), "uint8", align=64)
        values = T.match_buffer(values_, (value_bytes,), "int8", align=64)
        sums = T.match_buffer(sums_, (sum_count,), "int32", align=64)
        for part in T.parallel(PARTS):
            total = T.alloc_buffer((width,), "int32")
            for a in T.unroll(vectors * tokens):
                total[T.ramp(a * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for _ in T.serial(PASSES):
                for t in T.serial(SLABS):
                    slab(weights, values, total, t)
            for a in T.unroll(vectors * tokens):
                sums[T.ramp(part * width + a * lanes, 1, lanes)] = total[T.ramp(a * lanes, 1, lanes)]

    return kernel


def tile_multiplier(isa: TileSet) -> PrimFunc:
    """A kernel of the parameters of :func:`multiplier` that does nothing but load and multiply tiles."""
    weight_bytes, value_bytes, sum_count = tile_multiplier_sizes()
    shapes = {number: (MOST_TOKENS, TILE_BYTES // MOST_TOKENS) for number in (VALUES, WEIGHTS, PRODUCTS)}
    stride = TILE_BYTES // MOST_TOKENS

    def begin(described: Any) -> None:
        isa.configure_tiles(described, shapes)
        isa.clear_tile(PRODUCTS)

    def tile(weights: Any, values: Any, t: Any) -> None:
        isa.load_tile(VALUES, values, t * TILE_BYTES, stride)
        isa.load_tile(WEIGHTS, weights, t * TILE_BYTES, stride)
        isa.multiply_tiles(PRODUCTS, VALUES, WEIGHTS)

    def end(sums: Any, part: Any) -> None:
        isa.store_tile(PRODUCTS, sums, part * (TILE_BYTES // 4), stride)
        isa.release_tiles()

    @T.prim_func(s_tir=True)
    def kernel(weights_: T.handle, values_: T.handle, sums_: T.handle):
        T.func_attr({"tirx.noalias": True})
        weights = T.match_buffer(weights_, (weight_bytes,), "uint8", align=64)
        values = T.match_buffer(values_, (value_bytes,), "int8", align=64)
        sums = T.match_buffer(sums_, (sum_count,), "int32", align=64)
        for part in T.parallel(PARTS):
            described = T.alloc_buffer((SHAPE_WORDS,), "int32")
            begin(described)
            for _ in T.serial(PASSES):
                for t in T.serial(CYCLED_TILES):
                    tile(weights, values, t)
            end(sums, part)

    return kernel


def tile_multiplier_sizes() -> tuple[int, int, int]:
    """Elements of a :func:`tile_multiplier`'s weights, values and sums."""
    return CYCLED_TILES * TILE_BYTES, CYCLED_TILES * TILE_BYTES, PARTS * TILE_BYTES // 4


def tile_multiplications() -> int:
    """Multiply-adds of one call of a :func:`tile_multiplier`."""
    return PARTS * PASSES * CYCLED_TILES * TILE_BYTES * MOST_TOKENS


def multiplier_sizes(isa: InstructionSet, vectors: int, tokens: int) -> tuple[int, int, int]:
    """Elements of a :func:`multiplier`'s weights, values and sums."""
    return SLABS * FIELDS * vectors * 4 * isa.lanes, SLABS * tokens * SLAB, PARTS * vectors * tokens * isa.lanes


def multiplications(isa: InstructionSet, vectors: int, tokens: int) -> int:
    """Multiply-adds of one call of a :func:`multiplier`."""
    return PARTS * PASSES * SLABS * SLAB * vectors * tokens * isa.lanes
