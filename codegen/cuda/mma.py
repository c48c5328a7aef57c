"""CUDA kernels of W(1+1) linears for several tokens on tensor cores: int8 products by ``mma.sync`` m16n8k32.

They read what :mod:`.dp4a` packs. The weight is the matrix of 16 rows, the tokens are the 8 columns. Which input of a
group meets which lane is free, as long as both matrices agree, because an integer sum has no order. So lane ``4i + t``
takes the word ``t`` of 64 inputs of row ``i`` (of a group of 32 inputs: half of the word ``t // 2``), whose 16 codes
are, decoded in registers, two fragments' share of that row; the same inputs of a token are 16 bytes side by side.

A thread block has a *tile* of rows and tokens and goes through the groups in ascending order. Of each it copies codes,
levels, scales and values to shared memory, by ``cp.async`` (on sm_75 through registers) and some groups ahead. A warp
decodes the group's weights of its rows once and multiplies them with its tokens, eight at a time. Accumulators begin at
:data:`SEED`: read as a float, what they end at is ``1.5 * 2^23`` plus the sum, exactly, up to a sum of
:data:`LARGEST_SUM`, which no group of a valid schedule exceeds. Then follows the ``fmaf`` a group that
:mod:`..reference` states, so bits are those of :mod:`.dp4a`.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
# pyright: reportInvalidTypeForm=false
from dataclasses import dataclass
from typing import Any

from ..reference import INT4_MAX, INT8_MAX
from ..spec import LinearSpec
from ..tvm_api import PrimFunc, T
from .dp4a import (
    DEFAULT_TILE,
    LARGEST_TILE,
    ROWS,
    Geometry,
    codes_of,
    picked,
    tile_distance,
)
from .floats import half_as_float, multiply
from .limits import BLOCK_SHARED_BYTES, WARP

MATRIX_ROWS, MATRIX_TOKENS, MATRIX_INPUTS = 16, 8, 32
"""Rows, tokens and inputs of one product of a warp."""

PIECE = 64
"""Inputs of a row that four lanes decode at once, a word each, and of a token that they load at once."""

SEED = 0x4B400000
SEED_AS_FLOAT = 1.5 * 2.0**23

LARGEST_SUM = 2**22
"""Largest sum of a group, of either sign, that is read off its accumulator exactly."""

_LEAST_LEVEL = -128
MOST_WARPS = 8

_SMALLEST_TILE = 8

_MOST_KEPT = 96
"""Most words of a thread for outputs and decoded weights, of 255 registers."""

_WIDE = 128
"""Row blocks of a matrix above which thread blocks have 64 rows: fewer of them fill a device."""


@dataclass(frozen=True)
class MmaSchedule:
    """How a kernel for tensor cores is cut.

    Attributes:
        tokens: of a thread block's tile.
        rows: of it, a multiple of 32.
        warp_tokens: of a warp, a multiple of 8.
        warp_rows: of a warp, a multiple of 16.
        stages: groups whose operands are in shared memory or on their way there.
    """

    tokens: int = 64
    rows: int = 32
    warp_tokens: int = 32
    warp_rows: int = 16
    stages: int = 3

    @property
    def threads(self) -> tuple[int, int]:
        """Lanes and warps."""
        return WARP, self.rows // self.warp_rows * (self.tokens // self.warp_tokens)

    def shared_bytes(self, group: int) -> int:
        """Shared memory of a thread block: values, codes, levels, scales of rows and of tokens."""
        return self.stages * (self.tokens * (group + 4) + self.rows * (group // 4 + 6))

    def valid(self, spec: LinearSpec) -> bool:
        """Whether the cut divides evenly and fits a thread block, its shared memory and its registers, and the sums of
        groups are exact."""
        largest = -_LEAST_LEVEL * {4: INT4_MAX, 8: INT8_MAX}[spec.act_bits]
        divides = (
            self.rows % ROWS == 0
            and self.rows % self.warp_rows == 0
            and self.tokens % self.warp_tokens == 0
            and self.warp_rows % MATRIX_ROWS == 0
            and self.warp_tokens % MATRIX_TOKENS == 0
        )
        kept = self.warp_rows * (spec.group // 4 + self.warp_tokens) // WARP
        return (
            divides
            and spec.group * largest <= LARGEST_SUM
            and self.threads[1] <= MOST_WARPS
            and kept <= _MOST_KEPT
            and self.stages >= 2
            and self.shared_bytes(spec.group) <= BLOCK_SHARED_BYTES
        )


def mma_schedules(spec: LinearSpec, tokens: int = DEFAULT_TILE) -> list[MmaSchedule]:
    """Every valid schedule, that for so many tokens first; none for linears other than W(1+1)."""
    if spec.kind != "bit":
        return []
    wide = Geometry.of(spec).row_blocks > _WIDE
    space = [
        MmaSchedule(tile, rows, warp_tokens, warp_rows, stages)
        for tile in (_SMALLEST_TILE, 16, 32, 64, LARGEST_TILE)
        for rows in (32, 64)
        for warp_tokens in (8, 16, 32, 64)
        for warp_rows in (16, 32)
        for stages in (2, 3, 4)
    ]
    wanted = MmaSchedule(
        rows=64 if wide else 32,
        # With a group of 256 inputs, too, registers of some architectures would spill.
        warp_tokens=64 if wide and spec.group <= 2 * PIECE else 32,
        stages=4 if spec.group <= PIECE else 2,
    )
    valid = [schedule for schedule in space if schedule.valid(spec)]
    # What is nearest to it first. None of this has been tuned on a GPU.
    valid.sort(
        key=lambda s: (
            tile_distance(s.tokens, max(tokens, _SMALLEST_TILE)),
            s.rows != wanted.rows,
            s.warp_rows != wanted.warp_rows,
            abs(s.warp_tokens - min(wanted.warp_tokens, s.tokens)),
            abs(s.stages - wanted.stages),
        )
    )
    return valid


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    return T.call_pure_extern(dtype, name, *arguments)


def _do(name: str, *arguments: Any) -> None:
    T.evaluate(T.call_extern("void", name, *arguments))


def mma_gemm(spec: LinearSpec, schedule: MmaSchedule) -> PrimFunc:
    """Several tokens times the matrix."""
    shape = Geometry.of(spec)
    n, group, groups, blocks, words = spec.out_features, shape.slice, shape.slices, shape.row_blocks, shape.words
    tile_tokens, tile_rows, stages = schedule.tokens, schedule.rows, schedule.stages
    warps = schedule.threads[1]
    row_warps, tile_blocks = tile_rows // schedule.warp_rows, tile_rows // ROWS
    row_matrices, token_matrices = schedule.warp_rows // MATRIX_ROWS, schedule.warp_tokens // MATRIX_TOKENS
    steps = group // MATRIX_INPUTS
    # Values lie piece by piece in shared memory, and in a piece token by token: 8 lanes then load from all banks.
    piece = min(PIECE, group)
    piece_words, pieces = piece // 4, group // piece
    steps_of_piece = piece // MATRIX_INPUTS
    code_words = group // 16  # of a row
    threads = WARP * warps

    def each_unit(units: int, thread: Any, work: Any) -> None:
        """Shares units of a copy out over the threads."""
        for turn in range(-(-units // threads)):
            unit = turn * threads + thread
            if (turn + 1) * threads <= units:
                work(unit)
            else:
                with T.If(unit < units), T.Then():
                    work(unit)

    def copy(g: Any, inputs: Any, tiles: Any, tile_x: Any, tile_y: Any, thread: Any, tokens: Any) -> None:
        """Begins the copies of a group. Tokens and rows behind the last are copies of it, whose products none reads."""
        levels, values, w_scale, weight, x_scale = inputs
        x_tile, w_tile, level_tile, scale_tile, x_scale_tile = tiles
        stage = T.Bind(g % stages)

        def token(at: Any) -> Any:
            return T.min(tile_y * tile_tokens + at, tokens - 1)

        def row_block(at: Any) -> Any:
            found = tile_x * tile_blocks + at
            return found if blocks % tile_blocks == 0 else T.min(found, blocks - 1)

        def of_values(unit: Any) -> None:
            at, part = unit // (group // 16), unit % (group // 16)
            chunk, word = part // (piece_words // 4), part % (piece_words // 4) * 4
            to = ((stage * pieces + chunk) * tile_tokens + at) * piece_words + word
            source = values[token(at), g * (group // 4) + part * 4]
            _do("copy_begin_16", T.address_of(x_tile[to]), T.address_of(source))

        def of_codes(unit: Any) -> None:
            of_block = ROWS * code_words
            block, word = unit * 4 // of_block, unit * 4 % of_block
            chunk, row, first = word // (ROWS * words), word // words % ROWS, word % words
            to, source = stage * (tile_rows * code_words) + unit * 4, weight[row_block(block), g, chunk, row, first]
            _do("copy_begin_16", T.address_of(w_tile[to]), T.address_of(source))

        def of_levels(unit: Any) -> None:
            source = levels[row_block(unit // (ROWS // 4)), g, unit % (ROWS // 4) * 4]
            _do("copy_begin_16", T.address_of(level_tile[stage * tile_rows + unit * 4]), T.address_of(source))

        def of_scales(unit: Any) -> None:
            source = w_scale[row_block(unit // (ROWS // 8)), g, unit % (ROWS // 8) * 8]
            _do("copy_begin_16", T.address_of(scale_tile[stage * tile_rows + unit * 8]), T.address_of(source))

        def of_token_scales(unit: Any) -> None:
            source = x_scale[token(unit), 0 if spec.x_scales == 1 else g]
            _do("copy_begin_4", T.address_of(x_scale_tile[stage * tile_tokens + unit]), T.address_of(source))

        each_unit(tile_tokens * group // 16, thread, of_values)
        each_unit(tile_rows * code_words // 4, thread, of_codes)
        each_unit(tile_rows // 4, thread, of_levels)
        each_unit(tile_rows // 8, thread, of_scales)
        each_unit(tile_tokens, thread, of_token_scales)

    def decode(stage: Any, tiles: Any, first_row: Any, lane: Any, a: Any) -> None:
        """The fragments of a warp's rows: of a product of 32 inputs, quads of rows ``i`` and ``i + 8``, twice."""
        _, w_tile, level_tile, _, _ = tiles
        quarter = lane % 4
        for m in range(row_matrices):
            rows = [first_row + m * MATRIX_ROWS + half * 8 + lane // 4 for half in range(2)]
            level = [T.Bind(level_tile[stage * tile_rows + row]) for row in rows]
            for p in range(pieces):
                own = quarter if piece == PIECE else quarter // 2
                loaded = []
                for row in rows:
                    of_block = (row // ROWS * (code_words // words) + p) * (ROWS * words) + row % ROWS * words
                    loaded.append(T.Bind(w_tile[stage * (tile_rows * code_words) + of_block + own]))
                if piece != PIECE:
                    shift = T.cast(quarter % 2 * 2, "uint32")
                    loaded = [T.Bind(T.shift_right(word, shift)) for word in loaded]
                for pair in range(steps_of_piece):
                    codes = [T.Bind(codes_of(word, pair)) for word in loaded]
                    first = ((m * pieces + p) * steps_of_piece + pair) * 4
                    for upper in range(2):
                        for half in range(2):
                            quad = T.cast(picked(level[half], codes[half], upper), "uint32")
                            T.buffer_store(a, quad, [first + 2 * upper + half])

    def accumulate(stage: Any, tiles: Any, first_row: Any, first_token: Any, lane: Any, own: Any) -> None:
        """Multiplies a group of a warp's rows with its tokens and adds the products to the outputs."""
        x_tile, _, _, scale_tile, x_scale_tile = tiles
        y, a, b, sums, w_factor, x_factor = own
        row_in_matrix, quarter = lane // 4, lane % 4
        for m in range(row_matrices):
            for half in range(2):
                row = first_row + m * MATRIX_ROWS + half * 8 + row_in_matrix
                T.buffer_store(w_factor, half_as_float(scale_tile[stage * tile_rows + row]), [2 * m + half])
        for t in range(token_matrices):
            token = first_token + t * MATRIX_TOKENS
            at = stage * tile_tokens + token + quarter * 2
            T.buffer_store(x_factor, x_scale_tile[T.ramp(at, 1, 2)], [T.ramp(0, 1, 2)])
            count = piece_words // 4  # words of a piece that a lane multiplies
            for p in range(pieces):
                at = ((stage * pieces + p) * tile_tokens + token + row_in_matrix) * piece_words + quarter * count
                T.buffer_store(b, x_tile[T.ramp(at, 1, count)], [T.ramp(p * count, 1, count)])
            for m in range(row_matrices):
                T.buffer_store(sums, T.broadcast(T.int32(SEED), 4), [T.ramp(0, 1, 4)])
                for step in range(steps):
                    fragments = a[(m * steps + step) * 4], b[step * 2]
                    _do("mma_m16n8k32", T.address_of(sums[0]), *(T.address_of(words) for words in fragments))
                for i in range(4):
                    number = _call("float32", "__uint_as_float", T.cast(sums[i], "uint32"))
                    number = _call("float32", "__fsub_rn", number, T.float32(SEED_AS_FLOAT))
                    factor = multiply(x_factor[i % 2], w_factor[2 * m + i // 2])
                    to = (t * row_matrices + m) * 4 + i
                    T.buffer_store(y, _call("float32", "__fmaf_rn", number, factor, y[to]), [to])

    def store(first_row: Any, first_token: Any, lane: Any, tokens: Any, y: Any, bias: Any, output: Any) -> None:
        for t in range(token_matrices):
            for m in range(row_matrices):
                for i in range(4):
                    row = first_row + m * MATRIX_ROWS + i // 2 * 8 + lane // 4
                    token = first_token + t * MATRIX_TOKENS + lane % 4 * 2 + i % 2
                    with T.If(T.And(token < tokens, row < n)), T.Then():
                        found = y[(t * row_matrices + m) * 4 + i]
                        if spec.bias:
                            found = _call("float32", "__fadd_rn", found, bias[row])
                        T.buffer_store(output, found, [token, row])

    @T.prim_func(s_tir=True)
    def kernel(
        bias: T.Buffer((n,), "float32"),
        levels: T.Buffer((blocks, groups, ROWS), "uint32"),
        output_: T.handle,
        values_: T.handle,
        w_scale: T.Buffer((blocks, groups, ROWS), "uint16"),
        weight: T.Buffer((blocks, groups, shape.chunks, ROWS, words), "uint32"),
        x_scale_: T.handle,
        tokens: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        output = T.match_buffer(output_, (tokens, n), "float32")
        values = T.match_buffer(values_, (tokens, shape.pitch_words), "uint32")
        x_scale = T.match_buffer(x_scale_, (tokens, spec.x_scales), "float32")
        tile_y = T.launch_thread("blockIdx.y", T.ceildiv(tokens, tile_tokens))
        tile_x = T.launch_thread("blockIdx.x", -(-n // tile_rows))
        warp = T.launch_thread("threadIdx.y", warps)
        lane = T.launch_thread("threadIdx.x", WARP)
        x_tile = T.alloc_buffer((stages * tile_tokens * group // 4,), "uint32", scope="shared")
        w_tile = T.alloc_buffer((stages * tile_rows * code_words,), "uint32", scope="shared")
        level_tile = T.alloc_buffer((stages * tile_rows,), "uint32", scope="shared")
        scale_tile = T.alloc_buffer((stages * tile_rows,), "uint16", scope="shared")
        x_scale_tile = T.alloc_buffer((stages * tile_tokens,), "float32", scope="shared")
        y = T.alloc_buffer((4 * row_matrices * token_matrices,), "float32", scope="local")
        a = T.alloc_buffer((4 * row_matrices * steps,), "uint32", scope="local")
        b = T.alloc_buffer((2 * steps,), "uint32", scope="local")
        sums = T.alloc_buffer((4,), "int32", scope="local")
        w_factor = T.alloc_buffer((2 * row_matrices,), "float32", scope="local")
        x_factor = T.alloc_buffer((2,), "float32", scope="local")
        inputs = T.meta_var((levels, values, w_scale, weight, x_scale))
        tiles = T.meta_var((x_tile, w_tile, level_tile, scale_tile, x_scale_tile))
        own = T.meta_var((y, a, b, sums, w_factor, x_factor))
        thread: T.let = warp * WARP + lane
        first_row: T.let = warp % row_warps * schedule.warp_rows
        first_token: T.let = warp // row_warps * schedule.warp_tokens
        for i in T.unroll(4 * row_matrices * token_matrices):
            y[i] = T.float32(0)
        for ahead in T.unroll(stages - 1):
            if ahead < groups:
                copy(ahead, inputs, tiles, tile_x, tile_y, thread, tokens)
            T.evaluate(T.call_extern("void", "copies_commit"))
        for g in T.serial(groups):
            T.evaluate(T.call_extern("void", f"copies_wait<{stages - 2}>"))
            # Behind this, what all threads copied is there, and none reads the stage of the group before any more.
            T.tvm_storage_sync("shared")
            if g + (stages - 1) < groups:
                copy(g + (stages - 1), inputs, tiles, tile_x, tile_y, thread, tokens)
            T.evaluate(T.call_extern("void", "copies_commit"))
            decode(g % stages, tiles, first_row, lane, a)
            accumulate(g % stages, tiles, first_row, first_token, lane, own)
        store(tile_x * tile_rows + first_row, tile_y * tile_tokens + first_token, lane, tokens, y, bias, output)

    return kernel
