"""CUDA kernels of the linears: codes to int8 levels by byte permutation, int8 dot products by ``dp4a``.

A *slice* is the run of inputs one warp multiplies at a time: the weight's group, or 64 inputs where the whole token is
one group. 32 rows of the weight are a *row block*: lane ``i`` of a warp owns row ``i``, so the integer accumulator of
a slice never leaves its lane. Slices are shared out over warps (split-K); their accumulators meet in shared memory and
are summed in ascending order, one ``fmaf`` a group, the order :mod:`..reference` states. GEMV and GEMM give equal bits.

Layouts (made by :func:`pack_weight`, rows padded to 32, inputs to whole slices):

* ``weight`` (W(1+1)): ``uint32 [row blocks, groups, chunks, 32, words]``, 16 codes a word. A lane loads ``words`` at
  once. Inputs ``4q .. 4q + 3`` of a word are its *quad* ``q``. The low bits of the nibbles of the word's lower half are
  quad 0 and their high bits quad 2; its upper half holds quads 1 and 3. One mask makes a quad's ``prmt`` selector.
* ``levels``: ``uint32 [row blocks, groups, 32]``, the four int8 levels of a group in one word, which ``prmt`` indexes.
* ``weight`` (4-bit codes): ``uint32 [row blocks, groups, group / 32, 32, 4]``, eight codes a word, the first in the
  lowest bits; ``levels``: ``uint32 [4]``, the matrix's 16 int8 levels.
* ``weight`` (int8): ``uint32 [row blocks, slices, slice / 16, 32, 4]``, four weights a word.
* ``w_scale``: the bits of the fp16 scale, ``uint16 [row blocks, groups, 32]``; fp32 ``[row blocks, 1, 32]`` for int8.

Activation values are ``int8 [M, pitch(K)]``, zero behind column ``K``: every load is aligned and needs no guard.

Kernel parameters are declared in alphabetical order, because TVM emits them so.
"""

# pyright: reportInvalidTypeForm=false
# (annotations of TVMScript functions are calls)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelError
from ..format import Int4Weight, QuantizedWeight, Weight
from ..spec import LinearSpec
from ..tvm_api import PrimFunc, T
from .floats import half_as_float, multiply, signed_half_as_float
from .limits import BLOCK_SHARED_BYTES

ROWS = 32
"""Rows of a row block: one a lane."""

VALUE_ALIGNMENT = 256
"""Columns of the activation values are padded to a multiple of this, the largest group."""

TOKEN_SLICE = 64
"""Inputs of a slice where the whole token is one group."""

PARTIAL_SLOTS = 64
"""Row-block slices whose accumulators fit into shared memory at once (256 bytes each)."""

ACCUMULATOR_LIMIT = 2**31 // (127 * 127)
"""Most inputs of one int32 accumulator that cannot overflow."""

DEFAULT_TILE, LARGEST_TILE = 64, 128
"""Tokens of a thread block's tile."""

CODES_MASK = 0x33333333

EIGHTHS_MASK, HALVES_MASK, BYTES_IN_ORDER = 0x77777777, 0x44444444, 0x32103210
"""Of 4-bit codes: which of eight levels a code picks, whether of the upper eight (after a shift), and the selector that
picks every byte from the lower ones."""

CODES_OF_WORD = {"bit": 16, "int4": 8, "int8": 4}
"""Weights of a 32-bit word by kind of linear."""


def pitch(in_features: int) -> int:
    """Columns of the activation values in memory: ``K`` rounded up to :data:`VALUE_ALIGNMENT`."""
    return -(-in_features // VALUE_ALIGNMENT) * VALUE_ALIGNMENT


@dataclass(frozen=True)
class Geometry:
    """Sizes of a linear as the kernels see it.

    Attributes:
        slice: inputs per slice.
        slices: slices along ``K``.
        row_blocks: blocks of :data:`ROWS` rows.
        words: 32-bit words of weight data a lane loads at once.
        chunks: such loads per slice.
        pitch_words: activation values of a token, in 32-bit words.
    """

    slice: int
    slices: int
    row_blocks: int
    words: int
    chunks: int
    pitch_words: int

    @classmethod
    def of(cls, spec: LinearSpec) -> Geometry:
        """The sizes of ``spec``.

        Raises:
            KernelError: there is no CUDA kernel for it.
        """
        if spec.act_bits == 16:
            raise KernelError("CUDA kernels take 4-bit and 8-bit activations; compile with --act-bits 4 or 8")
        if (spec.group or spec.in_features) > ACCUMULATOR_LIMIT:
            raise KernelError(
                f"{spec.in_features} inputs overflow one int32 accumulator; quantize the activations per group"
            )
        width = spec.group or TOKEN_SLICE
        words = min(4, width // CODES_OF_WORD[spec.kind])
        inputs_per_load = CODES_OF_WORD[spec.kind] * words
        return cls(
            slice=width,
            slices=-(-spec.in_features // width),
            row_blocks=-(-spec.out_features // ROWS),
            words=words,
            chunks=width // inputs_per_load,
            pitch_words=pitch(spec.in_features) // 4,
        )


@dataclass(frozen=True)
class GemvSchedule:
    """How a GEMV is cut.

    Attributes:
        row_warps: row blocks of a thread block.
        slice_warps: warps that share the slices of a row block.
    """

    row_warps: int = 1
    slice_warps: int = 8

    def valid(self, spec: LinearSpec) -> bool:
        """Whether the cut fits a thread block and leaves no warp without work."""
        geometry = Geometry.of(spec)
        warps = self.row_warps * self.slice_warps
        return warps <= 32 and self.slice_warps <= geometry.slices and self.row_warps <= geometry.row_blocks


@dataclass(frozen=True)
class GemmSchedule:
    """How a GEMM is cut.

    Attributes:
        tokens: tokens of a thread block's tile.
        rows: weight rows of the tile, a multiple of 32.
        thread_tokens: tokens of a thread, a multiple of 4.
        thread_rows: weight rows of a thread, a multiple of 4.
        depth: inputs per shared-memory tile, a divisor of the slice.
    """

    tokens: int = 64
    rows: int = 64
    thread_tokens: int = 4
    thread_rows: int = 4
    depth: int = 128

    @property
    def threads(self) -> tuple[int, int]:
        """Threads along the rows and along the tokens."""
        return self.rows // self.thread_rows, self.tokens // self.thread_tokens

    def valid(self, spec: LinearSpec) -> bool:
        """Whether the cut divides evenly and fits a thread block and 48 KiB of shared memory."""
        x, y = self.threads
        shared = self.depth * (self.tokens + self.rows + 8)
        return (
            self.rows % ROWS == 0
            and self.tokens % self.thread_tokens == 0
            and self.rows % self.thread_rows == 0
            and self.thread_tokens % 4 == 0
            and self.thread_rows % 4 == 0
            and Geometry.of(spec).slice % self.depth == 0
            and self.depth % 32 == 0
            and 32 <= x * y <= 1024
            and shared <= BLOCK_SHARED_BYTES
        )


def gemv_schedules(spec: LinearSpec) -> list[GemvSchedule]:
    """Every valid GEMV schedule, the default first."""
    space = [GemvSchedule(r, s) for r in (1, 2, 4) for s in (1, 2, 4, 8, 16)]
    valid = [s for s in space if s.valid(spec)]
    geometry = Geometry.of(spec)
    # A thread block of about eight warps; more along K the fewer row blocks there are to fill the device.
    wanted = GemvSchedule(1, 16) if geometry.row_blocks <= 128 else GemvSchedule(1, 8)
    valid.sort(key=lambda s: (s.row_warps != wanted.row_warps, abs(s.slice_warps - wanted.slice_warps)))
    return valid


def tile_distance(tile: int, tokens: int) -> int:
    """How far a tile is from the smallest one that has so many tokens, or from the largest one, in doublings."""
    wanted = min(1 << (tokens - 1).bit_length(), LARGEST_TILE)
    return abs(tile.bit_length() - wanted.bit_length())


def gemm_schedules(spec: LinearSpec, tokens: int = DEFAULT_TILE) -> list[GemmSchedule]:
    """Every valid GEMM schedule, that for so many tokens first."""
    width = Geometry.of(spec).slice
    space = [
        GemmSchedule(tile, rows, tt, tr, depth)
        for tile in (16, 32, 64, LARGEST_TILE)
        for rows in (32, 64, 128)
        for tt in (4, 8)
        for tr in (4, 8)
        for depth in dict.fromkeys((min(128, width), min(64, width)))
    ]
    rows = 64 if spec.out_features > ROWS else ROWS
    return sorted((s for s in space if s.valid(spec)), key=lambda s: (s.rows != rows, tile_distance(s.tokens, tokens)))


def pack_weight(weight: Weight, group: int) -> dict[str, Tensor]:
    """Lays a matrix out for the kernels of a linear.

    Args:
        weight: of any kind.
        group: of the linear, which may be smaller than the weight's.

    Returns:
        By parameter name; see the module docstring for the shapes. Bits of ``uint32`` are in int32 tensors, those of
        ``uint16`` in int16 ones.

    Raises:
        FormatError: the weight cannot have such groups.
    """
    if isinstance(weight, QuantizedWeight):
        return pack_bit_weight(weight.refined(group))
    if isinstance(weight, Int4Weight):
        return pack_int4_weight(weight.refined(group))
    return pack_int8_weight(*weight, group)


def pack_bit_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lays a canonical W(1+1) matrix out for the kernels.

    Returns:
        By parameter name: ``weight`` and ``levels`` (int32 tensors of uint32 bits) and ``w_scale`` (int16, fp16 bits);
        see the module docstring for the shapes.
    """
    n, groups = weight.out_features, weight.groups
    blocks, words = -(-n // ROWS), weight.group // 16
    vector = min(4, words)
    pad_k, pad_n = groups * weight.group - weight.in_features, blocks * ROWS - n
    codes = torch.nn.functional.pad(weight.codes(), (0, pad_k, 0, pad_n)).view(blocks, ROWS, groups, words, 16)
    packed = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for position in range(16):
        quad, byte = divmod(position, 4)
        shift = 4 * (byte + 4 * (quad % 2)) + 2 * (quad // 2)
        packed |= codes[..., position].to(torch.int32) << shift
    packed = packed.view(blocks, ROWS, groups, words // vector, vector).permute(0, 2, 3, 1, 4).contiguous()
    levels = torch.nn.functional.pad(weight.levels, (0, 0, 0, 0, 0, pad_n)).contiguous().view(torch.int32)
    return {
        "levels": levels.view(blocks, ROWS, groups).transpose(1, 2).contiguous(),
        "w_scale": _scale_bits(weight.scale, blocks),
        "weight": packed,
    }


def pack_int4_weight(weight: Int4Weight) -> dict[str, Tensor]:
    """Lays a canonical matrix of 4-bit codes out for the kernels.

    Returns:
        As :func:`pack_bit_weight`.
    """
    n, groups = weight.out_features, -(-weight.in_features // weight.group)
    blocks, words = -(-n // ROWS), weight.group // CODES_OF_WORD["int4"]
    pad_k, pad_n = groups * weight.group - weight.in_features, blocks * ROWS - n
    codes = torch.nn.functional.pad(weight.codes(), (0, pad_k, 0, pad_n))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)
    packed = packed.view(blocks, ROWS, groups, words // 4, 4).permute(0, 2, 3, 1, 4).contiguous()
    levels = weight.table.contiguous().view(torch.int32)
    return {"levels": levels, "w_scale": _scale_bits(weight.scale, blocks), "weight": packed}


def _scale_bits(scale: Tensor, blocks: int) -> Tensor:
    """The bits of fp16 scales ``[N, G]``, int16 ``[blocks, G, ROWS]``."""
    padded = torch.nn.functional.pad(scale, (0, 0, 0, blocks * ROWS - len(scale))).contiguous().view(torch.int16)
    return padded.view(blocks, ROWS, -1).transpose(1, 2).contiguous()


def pack_int8_weight(weight: Tensor, scale: Tensor, group: int) -> dict[str, Tensor]:
    """Lays an int8-per-row matrix ``[N, K]`` out for the kernels.

    Returns:
        By parameter name: ``weight`` (int32 tensor of four int8 each) and ``w_scale`` (float32).
    """
    n, k = weight.shape
    width = group or TOKEN_SLICE
    blocks, slices = -(-n // ROWS), -(-k // width)
    padded = torch.nn.functional.pad(weight, (0, slices * width - k, 0, blocks * ROWS - n))
    words = padded.contiguous().view(torch.int32).view(blocks, ROWS, slices, width // 16, 4)
    return {
        "w_scale": torch.nn.functional.pad(scale.float(), (0, blocks * ROWS - n)).view(blocks, 1, ROWS),
        "weight": words.permute(0, 2, 3, 1, 4).contiguous(),
    }


def _dp4a(a, b, c):
    """``c`` plus the dot product of the four int8 of ``a`` and ``b``."""
    return T.call_pure_extern("int32", "__dp4a", a, b, c)


def codes_of(word, pair: int):
    """The codes of quads ``2 * pair`` and ``2 * pair + 1`` of ``word``, one a nibble.

    The mask is an instruction of its own: CUDA's compiler, which knows that a quad needs 16 bits of it, would mask each
    quad by itself, three instructions more for 16 weights.
    """
    shifted = T.shift_right(word, T.uint32(2)) if pair else word
    return T.call_pure_extern("uint32", "ptx_and_b32", shifted, T.uint32(CODES_MASK))


def picked(levels, codes, upper: int):
    """The four int8 levels that a quad's codes pick: those in the lower or the upper half of ``codes``.

    ``__byte_perm`` would mask its selector once more.
    """
    selector = T.shift_right(codes, T.uint32(16)) if upper else codes
    return T.cast(T.call_pure_extern("uint32", "ptx_prmt_b32", levels, T.uint32(0), selector), "int32")


def places_of(word):
    """Of the eight 4-bit codes of a ``uint32``: which of eight levels each picks, and the selectors that choose between
    what these are among the lower levels and among the upper ones, ``uint32`` both."""
    upper = T.bitwise_and(T.shift_right(word, T.uint32(1)), T.uint32(HALVES_MASK))
    eighths = T.call_pure_extern("uint32", "ptx_and_b32", word, T.uint32(EIGHTHS_MASK))
    return T.Bind(eighths), T.Bind(T.bitwise_or(upper, T.uint32(BYTES_IN_ORDER)))


def _in_registers(levels):
    """The 16 int8 levels of a matrix of 4-bit codes, ``uint32 [4]``."""
    table = T.alloc_buffer((4,), "uint32", scope="local")
    T.buffer_store(table, levels[T.ramp(0, 1, 4)], [T.ramp(0, 1, 4)])
    return table


def looked_up(table, places, upper: int):
    """The four int8 levels that 4-bit codes pick: those in the lower or the upper half of a word.

    Args:
        table: of :func:`_in_registers`.
        places: of :func:`places_of`.
        upper: 0 or 1.
    """
    eighths, halves = (T.Bind(T.shift_right(each, T.uint32(16))) if upper else each for each in places)
    low = T.call_pure_extern("uint32", "ptx_prmt_b32", table[0], table[1], eighths)
    high = T.call_pure_extern("uint32", "ptx_prmt_b32", table[2], table[3], eighths)
    return T.cast(T.call_pure_extern("uint32", "ptx_prmt_b32", low, high, halves), "int32")


def _weight_scale(bits, kind: str):
    """A stored weight scale as fp32; the fp16 of a W(1+1) group is finite and not negative, that of 4-bit codes
    finite."""
    if kind == "int8":
        return bits
    return half_as_float(bits) if kind == "bit" else signed_half_as_float(bits)


def _scaled_add(accumulator, factor, y):
    """``fmaf(float(accumulator), factor, y)``, every step rounded to nearest even."""
    number = T.call_pure_extern("float32", "__int2float_rn", accumulator)
    return T.call_pure_extern("float32", "__fmaf_rn", number, factor, y)


def _shapes(spec: LinearSpec, shape: Geometry) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Shapes of ``levels`` and ``w_scale``, and the dtype of ``w_scale``."""
    of_groups = shape.row_blocks, shape.slices, ROWS
    if spec.kind == "int8":
        return of_groups, (shape.row_blocks, 1, ROWS), "float32"
    return (of_groups if spec.kind == "bit" else (4,)), of_groups, "uint16"


def gemv(spec: LinearSpec, schedule: GemvSchedule) -> PrimFunc:
    """One token times the matrix: every warp multiplies whole slices of one row block."""
    shape = Geometry.of(spec)
    n, slices, blocks, words, chunks = spec.out_features, shape.slices, shape.row_blocks, shape.words, shape.chunks
    row_warps, slice_warps = schedule.row_warps, schedule.slice_warps
    turns = min(-(-slices // slice_warps), max(1, PARTIAL_SLOTS // (slice_warps * row_warps)))
    slots = turns * slice_warps
    rounds = -(-slices // slots)
    slice_words = shape.slice // 4
    bit, int4, grouped = spec.kind == "bit", spec.kind == "int4", spec.group > 0
    levels_shape, scale_shape, scale_dtype = _shapes(spec, shape)

    @T.prim_func(s_tir=True)
    def kernel(
        bias: T.Buffer((n,), "float32"),
        levels: T.Buffer(levels_shape, "uint32"),
        output: T.Buffer((1, n), "float32"),
        values: T.Buffer((1, shape.pitch_words), "int32"),
        w_scale: T.Buffer(scale_shape, scale_dtype),
        weight: T.Buffer((blocks, slices, chunks, ROWS, words), "uint32"),
        x_scale: T.Buffer((1, spec.x_scales), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        block = T.launch_thread("blockIdx.x", -(-blocks // row_warps))
        warp = T.launch_thread("threadIdx.y", row_warps * slice_warps)
        lane = T.launch_thread("threadIdx.x", ROWS)
        partial = T.alloc_buffer((slots, row_warps, ROWS), "int32", scope="shared")
        factor = T.alloc_buffer((slots, row_warps, ROWS), "float32", scope="shared")
        y = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "int32", scope="local")
        sums = T.alloc_buffer((4,), "int32", scope="local")
        loaded = T.alloc_buffer((words,), "uint32", scope="local")
        x = T.alloc_buffer((4,), "int32", scope="local")
        table = T.meta_var(_in_registers(levels) if int4 else None)
        row_block: T.let = block * row_warps + warp % row_warps
        y[0] = T.float32(0)
        total[0] = 0
        for step in T.serial(rounds):
            for turn in T.serial(turns):
                slot: T.let = turn * slice_warps + warp // row_warps
                g: T.let = step * slots + slot
                if row_block < blocks and g < slices:
                    for quad in T.unroll(4):
                        sums[quad] = 0
                    for chunk in T.unroll(chunks):
                        loaded[T.ramp(0, 1, words)] = weight[row_block, g, chunk, lane, T.ramp(0, 1, words)]
                        if bit:
                            level: T.let = levels[row_block, g, lane]
                            for word in T.unroll(words):
                                first: T.let = g * slice_words + (chunk * words + word) * 4
                                x[T.ramp(0, 1, 4)] = values[0, T.ramp(first, 1, 4)]
                                low: T.let = codes_of(loaded[word], 0)
                                high: T.let = codes_of(loaded[word], 1)
                                sums[0] = _dp4a(x[0], picked(level, low, 0), sums[0])
                                sums[1] = _dp4a(x[1], picked(level, low, 1), sums[1])
                                sums[2] = _dp4a(x[2], picked(level, high, 0), sums[2])
                                sums[3] = _dp4a(x[3], picked(level, high, 1), sums[3])
                        elif int4:
                            for pair in T.unroll(words // 2):
                                first: T.let = g * slice_words + (chunk * words // 2 + pair) * 4
                                x[T.ramp(0, 1, 4)] = values[0, T.ramp(first, 1, 4)]
                                low = T.meta_var(places_of(loaded[2 * pair]))
                                high = T.meta_var(places_of(loaded[2 * pair + 1]))
                                sums[0] = _dp4a(x[0], looked_up(table, low, 0), sums[0])
                                sums[1] = _dp4a(x[1], looked_up(table, low, 1), sums[1])
                                sums[2] = _dp4a(x[2], looked_up(table, high, 0), sums[2])
                                sums[3] = _dp4a(x[3], looked_up(table, high, 1), sums[3])
                        else:
                            x[T.ramp(0, 1, 4)] = values[0, T.ramp(g * slice_words + chunk * 4, 1, 4)]
                            for quad in T.unroll(4):
                                sums[quad] = _dp4a(x[quad], T.cast(loaded[quad], "int32"), sums[quad])
                    partial[slot, warp % row_warps, lane] = sums[0] + sums[1] + sums[2] + sums[3]
                    if grouped:
                        factor[slot, warp % row_warps, lane] = multiply(
                            x_scale[0, 0 if spec.x_scales == 1 else g],
                            _weight_scale(w_scale[row_block, 0 if spec.kind == "int8" else g, lane], spec.kind),
                        )
            T.tvm_storage_sync("shared")
            if warp < row_warps and row_block < blocks:
                for slot in T.serial(slots):
                    if step * slots + slot < slices:
                        if grouped:
                            y[0] = _scaled_add(partial[slot, warp, lane], factor[slot, warp, lane], y[0])
                        else:
                            total[0] = total[0] + partial[slot, warp, lane]
            if rounds > 1:
                T.tvm_storage_sync("shared")
        row: T.let = row_block * ROWS + lane
        if warp < row_warps and row < n:
            if not grouped:
                y[0] = _scaled_add(total[0], multiply(x_scale[0, 0], w_scale[row_block, 0, lane]), y[0])
            if spec.bias:
                y[0] = T.call_pure_extern("float32", "__fadd_rn", y[0], bias[row])
            output[0, row] = y[0]

    return kernel


def gemm(spec: LinearSpec, schedule: GemmSchedule) -> PrimFunc:
    """Many tokens times the matrix: int8 tiles in shared memory, a rectangle of outputs in each thread's registers."""
    shape = Geometry.of(spec)
    n, slices, blocks, words, chunks = spec.out_features, shape.slices, shape.row_blocks, shape.words, shape.chunks
    tile_tokens, tile_rows = schedule.tokens, schedule.rows
    thread_tokens, thread_rows = schedule.thread_tokens, schedule.thread_rows
    threads_x, threads_y = schedule.threads
    threads = threads_x * threads_y
    depth = schedule.depth
    steps, step_chunks = shape.slice // depth, chunks * depth // shape.slice
    x_units, w_units = tile_tokens * depth // 16, tile_rows * step_chunks
    tile_blocks = tile_rows // ROWS
    # Padding spreads a column of a tile over the shared-memory banks; four words keep the 16-byte alignment of vector
    # loads. The tiles are flat, because TVM trims padding from a two-dimensional buffer.
    x_pitch, w_pitch = tile_tokens + 4, tile_rows + 4
    bit, int4, grouped = spec.kind == "bit", spec.kind == "int4", spec.group > 0
    levels_shape, scale_shape, scale_dtype = _shapes(spec, shape)

    @T.prim_func(s_tir=True)
    def kernel(
        bias: T.Buffer((n,), "float32"),
        levels: T.Buffer(levels_shape, "uint32"),
        output_: T.handle,
        values_: T.handle,
        w_scale: T.Buffer(scale_shape, scale_dtype),
        weight: T.Buffer((blocks, slices, chunks, ROWS, words), "uint32"),
        x_scale_: T.handle,
        tokens: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        output = T.match_buffer(output_, (tokens, n), "float32")
        values = T.match_buffer(values_, (tokens, shape.pitch_words), "int32")
        x_scale = T.match_buffer(x_scale_, (tokens, spec.x_scales), "float32")
        tile_y = T.launch_thread("blockIdx.y", T.ceildiv(tokens, tile_tokens))
        tile_x = T.launch_thread("blockIdx.x", -(-n // tile_rows))
        ty = T.launch_thread("threadIdx.y", threads_y)
        tx = T.launch_thread("threadIdx.x", threads_x)
        x_tile = T.alloc_buffer((depth // 4 * x_pitch,), "int32", scope="shared")
        w_tile = T.alloc_buffer((depth // 4 * w_pitch,), "int32", scope="shared")
        y = T.alloc_buffer((thread_tokens, thread_rows), "float32", scope="local")
        sums = T.alloc_buffer((thread_tokens, thread_rows), "int32", scope="local")
        a = T.alloc_buffer((thread_tokens,), "int32", scope="local")
        b = T.alloc_buffer((thread_rows,), "int32", scope="local")
        x_factor = T.alloc_buffer((thread_tokens,), "float32", scope="local")
        w_factor = T.alloc_buffer((thread_rows,), "float32", scope="local")
        x_loaded = T.alloc_buffer((4,), "int32", scope="local")
        loaded = T.alloc_buffer((words,), "uint32", scope="local")
        level = T.alloc_buffer((1,), "uint32", scope="local")
        table = T.meta_var(_in_registers(levels) if int4 else None)
        thread: T.let = ty * threads_x + tx
        first_token: T.let = tile_y * tile_tokens + ty * thread_tokens
        first_row: T.let = tile_x * tile_rows + tx * thread_rows
        for i in T.unroll(thread_tokens):
            for j in T.unroll(thread_rows):
                y[i, j] = T.float32(0)
                sums[i, j] = 0
        for g in T.serial(slices):
            for step in T.serial(steps):
                for turn in T.unroll(-(-x_units // threads)):
                    unit: T.let = turn * threads + thread
                    if unit < x_units:
                        at: T.let = unit // (depth // 16)
                        word: T.let = unit % (depth // 16) * 4
                        x_loaded[T.ramp(0, 1, 4)] = T.broadcast(T.int32(0), 4)
                        if tile_y * tile_tokens + at < tokens:
                            x_loaded[T.ramp(0, 1, 4)] = values[
                                tile_y * tile_tokens + at,
                                T.ramp(g * (shape.slice // 4) + step * (depth // 4) + word, 1, 4),
                            ]
                        for quad in T.unroll(4):
                            x_tile[(word + quad) * x_pitch + at] = x_loaded[quad]
                for turn in T.unroll(-(-w_units // threads)):
                    unit: T.let = turn * threads + thread
                    if unit < w_units:
                        lane: T.let = unit % ROWS
                        local_block: T.let = unit // ROWS % tile_blocks
                        chunk: T.let = unit // tile_rows
                        row_block: T.let = tile_x * tile_blocks + local_block
                        column: T.let = local_block * ROWS + lane
                        loaded[T.ramp(0, 1, words)] = T.broadcast(T.uint32(0), words)
                        level[0] = T.uint32(0)
                        if row_block < blocks:
                            loaded[T.ramp(0, 1, words)] = weight[
                                row_block, g, step * step_chunks + chunk, lane, T.ramp(0, 1, words)
                            ]
                            if bit:
                                level[0] = levels[row_block, g, lane]
                        for k in T.unroll(words):
                            if bit:
                                at: T.let = (chunk * words + k) * 4
                                low: T.let = codes_of(loaded[k], 0)
                                high: T.let = codes_of(loaded[k], 1)
                                w_tile[at * w_pitch + column] = picked(level[0], low, 0)
                                w_tile[(at + 1) * w_pitch + column] = picked(level[0], low, 1)
                                w_tile[(at + 2) * w_pitch + column] = picked(level[0], high, 0)
                                w_tile[(at + 3) * w_pitch + column] = picked(level[0], high, 1)
                            elif int4:
                                at: T.let = (chunk * words + k) * 2
                                places = T.meta_var(places_of(loaded[k]))
                                w_tile[at * w_pitch + column] = looked_up(table, places, 0)
                                w_tile[(at + 1) * w_pitch + column] = looked_up(table, places, 1)
                            else:
                                w_tile[(chunk * 4 + k) * w_pitch + column] = T.cast(loaded[k], "int32")
                T.tvm_storage_sync("shared")
                for quad in T.serial(depth // 4):
                    for i in T.unroll(thread_tokens // 4):
                        a[T.ramp(i * 4, 1, 4)] = x_tile[T.ramp(quad * x_pitch + ty * thread_tokens + i * 4, 1, 4)]
                    for j in T.unroll(thread_rows // 4):
                        b[T.ramp(j * 4, 1, 4)] = w_tile[T.ramp(quad * w_pitch + tx * thread_rows + j * 4, 1, 4)]
                    for i in T.unroll(thread_tokens):
                        for j in T.unroll(thread_rows):
                            sums[i, j] = _dp4a(a[i], b[j], sums[i, j])
                T.tvm_storage_sync("shared")
            if grouped or g == slices - 1:
                for i in T.unroll(thread_tokens):
                    x_factor[i] = T.float32(0)
                    if first_token + i < tokens:
                        x_factor[i] = x_scale[first_token + i, 0 if spec.x_scales == 1 else g]
                for j in T.unroll(thread_rows):
                    w_factor[j] = T.float32(0)
                    if first_row + j < blocks * ROWS:
                        w_factor[j] = _weight_scale(
                            w_scale[(first_row + j) // ROWS, 0 if spec.kind == "int8" else g, (first_row + j) % ROWS],
                            spec.kind,
                        )
                for i in T.unroll(thread_tokens):
                    for j in T.unroll(thread_rows):
                        y[i, j] = _scaled_add(sums[i, j], multiply(x_factor[i], w_factor[j]), y[i, j])
                        sums[i, j] = 0
        for i in T.unroll(thread_tokens):
            for j in T.unroll(thread_rows):
                if first_token + i < tokens and first_row + j < n:
                    if spec.bias:
                        y[i, j] = T.call_pure_extern("float32", "__fadd_rn", y[i, j], bias[first_row + j])
                    output[first_token + i, first_row + j] = y[i, j]

    return kernel
