"""GEMM by tile registers: one instruction multiplies 16 rows of weights by up to 16 tokens.

A *weight tile* is up to 64 columns of 16 rows: a line for every 4 columns, byte ``4 * row + column``, which is a
decoded field (:mod:`.dot`). A *value tile* is the same columns of some tokens, a line a token. Their products are an
int32 tile: a line a token, a lane a row. So every row step decodes its weights once, to signed bytes, and then takes
the tokens tile by tile, each through all groups with its fp32 sums in vector registers.

The activations are staged as value tiles, one after the other. Where a group is no multiple of a tile its last one is
padded with zeros; whatever bytes of a weight tile these meet count for nothing.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from ..targets import host
from ..tvm_api import PrimFunc, T
from .dot import (
    FIELDS,
    SLAB,
    VECTOR_BYTES,
    Operand,
    Problem,
    fused_multiply_add,
    load_float32,
    prefetch_group,
    prefetch_slab,
    store_row_vector,
)
from .isa import TileSet
from .memory import scratch

MOST_TOKENS = 16
"""Lines of a tile."""

SHAPE_WORDS = 16
"""int32 words that describe the shapes of the tile registers."""

UNROLLED_TILES = 4
"""Groups of so many tiles, of 256 columns, are multiplied without a loop."""

VALUES, WEIGHTS, PRODUCTS = 0, 1, 2
"""Numbers of the tile registers."""


def tile_slabs(p: Problem) -> int:
    """Slabs of columns of a tile: as many as a group has and a line takes."""
    return min(VECTOR_BYTES // SLAB, p.group_slabs if p.full_groups else p.tail_slabs)


def request() -> PrimFunc:
    """A kernel ``(refused int32 [1])`` that does :func:`..targets.host.grants_tiles` where there is no Python of ours:
    writes 0 where the system grants the process tile registers."""
    numbers = [T.int64(number) for number in host.TILE_REQUEST]

    @T.prim_func(s_tir=True)
    def kernel(refused_: T.handle):
        refused = T.match_buffer(refused_, (1,), "int32", align=4)
        refused[0] = T.Cast("int32", T.call_extern("int64", "syscall", *numbers))

    return kernel


def gemm(
    operand: Operand, isa: TileSet, rows: int, tokens: int, prefetch: int, parallel: bool, parallel_stage: bool
) -> PrimFunc:
    """Any number of tokens: weights are decoded once per row step and reused for all of them.

    Args:
        operand: the packed weights.
        isa: the vector and tile instructions.
        rows: rows per step, a multiple of 16 that divides the padded rows.
        tokens: tokens of a tile, at most :data:`MOST_TOKENS`.
        prefetch: distance of the software prefetch in bytes, 0 for none.
        parallel: split the row steps over the thread pool.
        parallel_stage: split the staging of the tokens over the thread pool, too.
    """
    p = operand.problem
    lanes, blocks = isa.lanes, rows // SLAB
    steps = p.row_blocks // blocks
    slabs = tile_slabs(p)
    width, tail = slabs * SLAB, p.columns % p.group
    group_tiles, tail_tiles = -(-p.group_slabs // slabs), -(-p.tail_slabs // slabs)
    tiles = p.full_groups * group_tiles + tail_tiles
    weight_bytes, value_bytes = width * SLAB, width * tokens
    loop = T.parallel if parallel else T.serial
    stage_loop = T.parallel if parallel_stage else T.serial
    packed_bytes = operand.packed_bytes + (4 * SLAB * p.row_blocks if p.bias else 0)
    scales = 1 if p.per_token else p.groups
    last = scales - 1
    shapes = {VALUES: (tokens, width), WEIGHTS: (width // 4, VECTOR_BYTES), PRODUCTS: (tokens, VECTOR_BYTES)}

    def stage(values, staged, token, m) -> None:
        """Copies a token to line ``m % tokens`` of its value tiles."""
        line = T.Bind(m // tokens * (tiles * value_bytes) + m % tokens * width)

        def copy(column, tile, count) -> None:
            with T.serial(count // width) as t:
                part = values[token, T.ramp(column + t * width, 1, width)]
                T.buffer_store(staged, part, [T.ramp(line + (tile + t) * value_bytes, 1, width)])
            whole = count // width
            if whole * width < count:
                target = line + (tile + whole) * value_bytes
                with T.serial(count - whole * width) as i:
                    T.buffer_store(staged, values[token, column + whole * width + i], [target + i])
                with T.serial((whole + 1) * width - count) as i:
                    T.buffer_store(staged, T.int8(0), [target + (count - whole * width) + i])

        with T.serial(p.full_groups) as g:
            copy(g * p.group, g * group_tiles, p.group)
        if tail:
            copy(p.full_groups * p.group, p.full_groups * group_tiles, tail)

    def decode(packed, decoded, row_scales, step, block, g, group_slabs) -> None:
        """Writes one group of a block as weight tiles, and its scales."""
        address = T.Bind((step * blocks + block) * operand.block_bytes + g * operand.group_bytes)
        prefetch_group(operand, packed, address, group_slabs, prefetch)
        tables = operand.tables(isa, packed, address, group_slabs)
        target = T.Bind((block * tiles + g * group_tiles) * weight_bytes)
        with T.serial(group_slabs) as t:
            prefetch_slab(operand, packed, address, group_slabs, t, prefetch)
            for f, w in enumerate(operand.fields(isa, packed, address, t, tables)):
                T.buffer_store(decoded, w, [T.ramp(target + (t * FIELDS + f) * VECTOR_BYTES, 1, VECTOR_BYTES)])
        scale = operand.scale(isa, packed, step * blocks + block, address, 0, group_slabs)
        T.buffer_store(row_scales, scale, [T.ramp((block * p.groups + g) * lanes, 1, lanes)])

    def clear(sums) -> None:
        for y in sums:
            T.buffer_store(y, T.broadcast(T.float32(0), lanes), [T.ramp(0, 1, lanes)])

    def group(staged, decoded, row_scales, scale_stage, products, sums, block, part, padded, g, count) -> None:
        """Adds one group of ``count`` tiles to the sums of a block and the tokens of a value tile."""

        def multiply(t) -> None:
            isa.load_tile(VALUES, staged, (part * tiles + g * group_tiles + t) * value_bytes, width)
            isa.load_tile(WEIGHTS, decoded, (block * tiles + g * group_tiles + t) * weight_bytes, VECTOR_BYTES)
            isa.multiply_tiles(PRODUCTS, VALUES, WEIGHTS)

        isa.clear_tile(PRODUCTS)
        if count <= UNROLLED_TILES:
            for t in range(count):
                multiply(t)
        else:
            with T.serial(count) as t:
                multiply(t)
        isa.store_tile(PRODUCTS, products, 0, VECTOR_BYTES)
        scale = T.Bind(row_scales[T.ramp((block * p.groups + g) * lanes, 1, lanes)])
        first = T.Bind(T.min(g, last) * padded + part * tokens)
        for m in range(tokens):
            dot = T.cast(products[T.ramp(m * lanes, 1, lanes)], isa.float32)
            x = T.broadcast(scale_stage[first + m], lanes)
            y = fused_multiply_add(isa, dot, x * scale, sums[m][T.ramp(0, 1, lanes)])
            T.buffer_store(sums[m], y, [T.ramp(0, 1, lanes)])

    def store(packed, out, sums, results, step, block, part, m_count) -> None:
        row = T.Bind((step * blocks + block) * SLAB)
        for m in range(tokens):
            y = sums[m][T.ramp(0, 1, lanes)]
            if p.bias:
                y = y + load_float32(isa, packed, operand.packed_bytes + row * 4)
            T.buffer_store(results, y, [T.ramp(m * lanes, 1, lanes)])
        with T.serial(T.min(tokens, m_count - part * tokens)) as m:
            store_row_vector(isa, p.rows, out, part * tokens + m, row, results[T.ramp(m * lanes, 1, lanes)])

    @T.prim_func(s_tir=True)
    def kernel(values_: T.handle, x_scale_: T.handle, packed_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m_count = T.int32()
        values = T.match_buffer(values_, (m_count, p.columns), "int8", align=1)
        x_scale = T.match_buffer(x_scale_, (m_count, scales), "float32", align=4)
        packed = T.match_buffer(packed_, (packed_bytes,), "uint8", align=64)
        out = T.match_buffer(out_, (m_count, p.rows), "float32", align=4)
        padded: T.let = (m_count + tokens - 1) // tokens * tokens
        staged = T.alloc_buffer((tiles * width * padded,), "int8")
        scale_stage = T.alloc_buffer((scales * padded,), "float32")
        for m in stage_loop(padded):
            token: T.let = T.min(m, m_count - 1)
            for s in T.serial(scales):
                scale_stage[s * padded + m] = x_scale[token, s]
            stage(values, staged, token, m)
        for step in loop(steps):
            decoded = scratch(blocks * tiles * weight_bytes, "uint8")
            row_scales = scratch(blocks * p.groups * lanes, "float32")
            products = scratch(tokens * lanes, "int32")
            results = scratch(tokens * lanes, "float32")
            # A buffer for each: only small ones, at places that are constants, are registers to LLVM, for which a tile
            # instruction could change whatever is memory.
            sums = [scratch(lanes, "float32") for _ in range(tokens)]
            described = scratch(SHAPE_WORDS, "int32")
            isa.configure_tiles(described, shapes)
            for block in T.serial(blocks):
                for g in T.serial(p.full_groups):
                    decode(packed, decoded, row_scales, step, block, g, p.group_slabs)
                if tail > 0:
                    decode(packed, decoded, row_scales, step, block, p.full_groups, p.tail_slabs)
            for part in T.serial(padded // tokens):
                for block in T.serial(blocks):
                    clear(sums)
                    for g in T.serial(p.full_groups):
                        group(
                            staged, decoded, row_scales, scale_stage, products, sums, block, part, padded, g,
                            group_tiles,
                        )  # fmt: skip
                    if tail > 0:
                        group(
                            staged, decoded, row_scales, scale_stage, products, sums, block, part, padded,
                            p.full_groups, tail_tiles,
                        )  # fmt: skip
                    store(packed, out, sums, results, step, block, part, m_count)
            isa.release_tiles()

    return kernel
