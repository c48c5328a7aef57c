"""W(1+1) weights by bit-serial popcount: the sign and bitmap planes meet the bit planes of 4-bit activations.

The values of a group lie in a window of 16, so with ``zero = -min(values, 0)`` every ``u = value + zero`` has four bit
planes ``u_b``. Four levels picked by the bits *sign* and *bitmap* are ``level_0 + a * sign + b * bitmap - c * sign *
bitmap``, with ``a = level_3 - level_0``, ``b = level_1 - level_0`` and ``c = a + b - (level_2 - level_0)``, all in 0 ..
255. With ``U(mask) = sum_b 2^b * popcount(mask & u_b)`` the exact dot product of a group is therefore::

    level_0 * sum(values) + a * U(sign) + b * U(bitmap) - c * U(sign & bitmap) - zero * sum(level - level_0)

whose last factor is a constant of the weights. Three streams of popcounts take the place of all multiplications.

Where levels are additive, ``level_0 + level_3 == level_1 + level_2``, two will do. Then ``c = 2 * b``, so with a second
plane ``odd = sign ^ bitmap`` instead of the bitmap they are ``level_0 + (level_2 - level_0) * sign + (level_1 -
level_0) * odd``: the bits of the code, each with a factor.

Packed layout: blocks of 16 rows in one sequential stream; within a block, group after group:

* planes, 128 bytes per 32 columns: 16 words of 32 signs, one a row, then 16 words of bitmap bits; bit ``8 * j + f`` of
  a word is column ``4 * f + j``, so that a shift and a mask leave four columns in the four bytes of a lane; ``odd``
  stands in the bitmap's place;
* 64 bytes of levels: byte ``4 * row`` is ``level_0``, followed by ``a``, ``b`` and ``c``; for additive levels by the
  two factors and 0;
* 32 bytes of fp16 scales;
* 32 bytes of sums of ``level - level_0`` over the group, uint16.

A group of 128 columns takes 640 bytes. Rows are padded to a multiple of 32 with zero levels and scales, columns to 32
with zero bits. The bias, fp32, follows the last block.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..tvm_api import PrimFunc, T, pure_intrinsic
from .dot import (
    FIELDS,
    SLAB,
    VECTOR_BYTES,
    fused_multiply_add,
    load_float32,
    prefetch_group,
    row_vectors,
    store_row_vector,
)
from .grouped import SCALE_BYTES, BitOperand, load_scales
from .isa import InstructionSet
from .memory import scratch

WORD = 32
"""Columns of a word of a plane."""

ACTIVATION_PLANES = 4
"""Bit planes of 4-bit activations."""

WORD_BYTES = 2 * VECTOR_BYTES
LEVEL_BYTES = 64
SUM_BYTES = 32


def _words(slabs: int) -> int:
    """Words of a row in ``slabs`` slabs of 16 columns."""
    return -(-slabs * SLAB // WORD)


@dataclass(frozen=True)
class PlaneOperand(BitOperand):
    """W(1+1) weights in the layout above; for more than one token they are decoded like any other.

    Attributes:
        additive: the levels of every group are additive.
    """

    additive: bool = False

    def bytes_of(self, slabs: int) -> int:
        return _words(slabs) * WORD_BYTES + LEVEL_BYTES + SCALE_BYTES + SUM_BYTES

    def padded(self, slabs: int) -> int:
        return _words(slabs) * WORD

    def plane(self, isa: InstructionSet, packed: Any, address: Any) -> Any:
        """One word of a plane for every row of a row vector."""
        return T.reinterpret(isa.int32, packed[T.ramp(address, 1, 4 * isa.lanes)])

    def tables(self, isa: InstructionSet, packed: Any, address: Any, slabs: int) -> Any:
        """Offset levels; byte ``4 * row + 2 * bitmap + sign``, or ``odd`` in place of the bitmap."""
        terms = T.Bind(self.plane(isa, packed, address + _words(slabs) * WORD_BYTES))
        a, b, c = (T.Bind((terms >> isa.broadcast(8 * i)) & isa.broadcast(0xFF)) for i in (1, 2, 3))
        lowest = (terms & isa.broadcast(0xFF)) ^ isa.broadcast(0x80)
        # No byte of the sum exceeds 255, so none carries into the next.
        raised = (a << isa.broadcast(8)) + (b << isa.broadcast(16)) + ((a + b - c) << isa.broadcast(24))
        return T.Bind(isa.prepare(T.reinterpret(isa.uint8, lowest * isa.broadcast(0x01010101) + raised)))

    def fields(self, isa: InstructionSet, packed: Any, address: Any, slab: Any, tables: Any) -> list[Any]:
        start = address + slab // 2 * WORD_BYTES
        sign = T.Bind(self.plane(isa, packed, start))
        bitmap = T.Bind(self.plane(isa, packed, start + VECTOR_BYTES))
        # The two bits of every other field side by side, for both slabs of a word.
        even, odd = isa.broadcast(0x55555555), isa.broadcast(-0x55555556)
        one = isa.broadcast(1)
        codes = T.Bind((sign & even) | ((bitmap << one) & odd)), T.Bind(((sign >> one) & even) | (bitmap & odd))
        fields = []
        for f in range(FIELDS):
            code = codes[f % 2] >> isa.broadcast(slab % 2 * FIELDS + f // 2 * 2)
            fields.append(isa.shuffle(tables, (code & isa.broadcast(0x03030303)) | isa.row_index(0x04040404)))
        return fields

    def scale(self, isa: InstructionSet, packed: Any, block: Any, address: Any, half: int, slabs: int) -> Any:
        start = address + _words(slabs) * WORD_BYTES + LEVEL_BYTES + 2 * half
        return load_scales(isa, packed, start)

    def level_sum(self, isa: InstructionSet, packed: Any, address: Any, half: int, slabs: int) -> Any:
        """The sums of ``level - level_0`` of a row vector in the group at ``address``."""
        start = address + _words(slabs) * WORD_BYTES + LEVEL_BYTES + SCALE_BYTES + 2 * half
        return T.cast(T.reinterpret(f"uint16x{isa.lanes}", packed[T.ramp(start, 1, 2 * isa.lanes)]), isa.int32)

    def pack_groups(self, codes: Tensor, *sides: Tensor) -> Tensor:
        levels, scale = sides
        blocks, groups = codes.shape[0] // SLAB, levels.shape[1]
        codes = codes.reshape(blocks, SLAB, groups, -1)
        sign, second = codes >= 2, (codes & 1).bool() if self.additive else (codes == 1) | (codes == 2)
        bits = torch.stack([sign, second], -1).to(torch.uint8).reshape(blocks, SLAB, groups, -1, WORD // 4, 4, 2)
        place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8).reshape(-1, 1, 1)
        words = (bits * place).sum(4, dtype=torch.uint8)  # [B, 16, G, words, 4, 2]
        planes = words.permute(0, 2, 3, 5, 1, 4).reshape(blocks, groups, -1)
        low, inner_low, inner_high, high = levels.int().reshape(blocks, SLAB, groups, 4).unbind(-1)
        a, b = (inner_high if self.additive else high) - low, inner_low - low
        c = a + b - ((high if self.additive else inner_high) - low)
        if self.additive and bool(c.any()):
            raise KernelError("the levels of a group are not additive, as its linear's level rule says; report this")
        sums = a * sign.sum(-1) + b * second.sum(-1) - c * (sign & second).sum(-1)
        terms = (torch.stack([low, a, b, c], -1) & 0xFF).to(torch.uint8).transpose(1, 2).reshape(blocks, groups, -1)
        halves = scale.reshape(blocks, SLAB, groups).transpose(1, 2).contiguous().view(torch.uint8)
        sums = sums.to(torch.uint16).transpose(1, 2).contiguous().view(torch.uint8)
        return torch.cat([planes, terms, halves, sums], -1).flatten(1)


def _stage_group(
    load: Callable[[Any, int], Any],
    words: int,
    planes: Any,
    sums: Any,
    zeros: Any,
    shifted: Any,
    first: Any,
    index: Any,
) -> None:
    """Cuts one group of values into bit planes.

    Args:
        load: ``load(offset, lanes)`` is a vector of the group's values, zeros behind its columns.
        words: words of the group.
        planes: int32, four planes a word, of the same bit order as the weights' planes; written from word ``first`` on.
        sums, zeros: int32, written at ``index``: the sum of the values, and what makes them all non-negative.
        shifted: int8, one group of scratch.
    """
    chunks = words * WORD // SLAB
    lowest = T.Bind(load(0, SLAB))
    total = T.Bind(T.cast(lowest, "int32x16"))
    for i in range(1, chunks):
        chunk = T.Bind(load(i * SLAB, SLAB))
        lowest = T.Bind(T.min(lowest, chunk))
        total = T.Bind(total + T.cast(chunk, "int32x16"))
    # The zeros behind a tail take part in this minimum; they move no `u` out of 0 .. 15.
    least = T.min(pure_intrinsic("int8", "llvm.vector.reduce.smin", lowest), T.int8(0))
    zero = T.Bind(T.cast(-least, "int8"))
    T.buffer_store(zeros, T.cast(zero, "int32"), [index])
    T.buffer_store(sums, pure_intrinsic("int32", "llvm.vector.reduce.add", total), [index])
    for i in range(chunks):
        T.buffer_store(shifted, load(i * SLAB, SLAB) + T.broadcast(zero, SLAB), [T.ramp(i * SLAB, 1, SLAB)])

    def wide(value: int) -> Any:
        return T.broadcast(T.int32(value), ACTIVATION_PLANES)

    with T.serial(words) as word:
        bits = None
        for f in range(WORD // 4):
            quad = T.reinterpret("int32", shifted[T.ramp(word * WORD + 4 * f, 1, 4)])
            plane = T.broadcast(quad, ACTIVATION_PLANES) >> T.ramp(T.int32(0), 1, ACTIVATION_PLANES)
            moved = (plane & wide(0x01010101)) << wide(f)
            bits = moved if bits is None else bits | moved
        where = (first + word) * ACTIVATION_PLANES
        T.buffer_store(planes, bits, [T.ramp(where, 1, ACTIVATION_PLANES)])


def gemv(operand: PlaneOperand, isa: InstructionSet, rows: int, prefetch: int, parallel: bool) -> PrimFunc:
    """One token: every step multiplies ``rows`` rows, streaming their packed bytes once.

    Args:
        operand: the packed weights.
        isa: the vector instructions.
        rows: rows per step, a multiple of 16 that divides the padded rows.
        prefetch: distance of the software prefetch in bytes, 0 for none.
        parallel: split the steps over the thread pool.
    """
    p = operand.problem
    lanes, vectors = isa.lanes, row_vectors(isa, rows)
    steps, blocks = p.row_blocks * SLAB // rows, rows // SLAB
    group_words, tail_words, tail = _words(p.group_slabs), _words(p.tail_slabs), p.columns % p.group
    loop = T.parallel if parallel else T.serial
    packed_bytes = operand.packed_bytes + (4 * SLAB * p.row_blocks if p.bias else 0)
    scales = 1 if p.per_token else p.groups

    def count(words: Any) -> Any:
        """Set bits of every byte."""
        return pure_intrinsic(isa.uint8, "llvm.ctpop", T.reinterpret(isa.uint8, words))

    def masked_sums(packed, planes, address, first, words) -> list[Any]:
        """``U`` of the sign, the bitmap and, unless levels are additive, their intersection, for one row vector.

        Bits are counted by byte, at most 8 a word, so that up to 8 words sum up within a byte; one dot product with
        the plane's power of two then sums the bytes.
        """
        counts: dict[tuple[int, int], Any] = {}
        for word in range(words):
            sign = T.Bind(operand.plane(isa, packed, address + word * WORD_BYTES))
            second = T.Bind(operand.plane(isa, packed, address + word * WORD_BYTES + VECTOR_BYTES))
            masks = (sign, second) if operand.additive else (sign, second, T.Bind(sign & second))
            for b in range(ACTIVATION_PLANES):
                plane = T.Bind(isa.broadcast(planes[(first + word) * ACTIVATION_PLANES + b]))
                for k, mask in enumerate(masks):
                    bits = count(mask & plane)
                    counts[k, b] = T.Bind(counts[k, b] + bits if word else bits)
        powers = [isa.broadcast(0x01010101 << b) for b in range(ACTIVATION_PLANES)]
        return [
            T.Bind(isa.dot(isa.broadcast(0), [(counts[k, b], powers[b]) for b in range(ACTIVATION_PLANES)]))
            for k in range(2 if operand.additive else 3)
        ]

    def group(packed, planes, sums, zeros, x_scale, total, step, g, slabs) -> None:
        """Adds one group of all row vectors to ``total``."""
        words = _words(slabs)
        x = T.Bind(T.broadcast(x_scale[0, 0 if p.per_token else g], lanes))
        value_sum, zero = (T.Bind(isa.broadcast(buffer[g])) for buffer in (sums, zeros))
        for v, (block, half) in enumerate(vectors):
            start = T.Bind((step * blocks + block) * operand.block_bytes + g * operand.group_bytes)
            if half == 0:
                prefetch_group(operand, packed, start, slabs, prefetch)
            signs, seconds, *boths = masked_sums(packed, planes, start + 4 * half, g * group_words, words)
            terms = T.Bind(operand.plane(isa, packed, start + 4 * half + words * WORD_BYTES))
            low = (terms << isa.broadcast(24)) >> isa.broadcast(24)
            a, b, c = ((terms >> isa.broadcast(8 * i)) & isa.broadcast(0xFF) for i in (1, 2, 3))
            level_sum = operand.level_sum(isa, packed, start, half, slabs)
            accumulator = low * value_sum + a * signs + b * seconds - zero * level_sum
            for both in boths:
                accumulator = accumulator - c * both
            scale = operand.scale(isa, packed, step * blocks + block, start, half, slabs)
            where = T.ramp(v * lanes, 1, lanes)
            y = fused_multiply_add(isa, T.cast(accumulator, isa.float32), x * scale, total[where])
            T.buffer_store(total, y, [where])

    def store(packed, out, total, step) -> None:
        for v in range(len(vectors)):
            row = T.Bind(step * rows + v * lanes)
            y = total[T.ramp(v * lanes, 1, lanes)]
            if p.bias:
                y = y + load_float32(isa, packed, operand.packed_bytes + row * 4)
            store_row_vector(isa, p.rows, out, 0, row, y)

    def stage_full(values, planes, sums, zeros, shifted, g) -> None:
        def load(offset: Any, width: int) -> Any:
            return values[0, T.ramp(g * p.group + offset, 1, width)]

        _stage_group(load, group_words, planes, sums, zeros, shifted, g * group_words, g)

    def stage_tail(values, planes, sums, zeros, shifted, padded) -> None:
        with T.serial(tail_words * WORD) as i:
            inside = T.if_then_else(i < tail, values[0, p.full_groups * p.group + T.min(i, tail - 1)], T.int8(0))
            T.buffer_store(padded, inside, [i])

        def load(offset: Any, width: int) -> Any:
            return padded[T.ramp(offset, 1, width)]

        _stage_group(load, tail_words, planes, sums, zeros, shifted, p.full_groups * group_words, p.full_groups)

    @T.prim_func(s_tir=True)
    def kernel(values_: T.handle, x_scale_: T.handle, packed_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        values = T.match_buffer(values_, (1, p.columns), "int8", align=1)
        x_scale = T.match_buffer(x_scale_, (1, scales), "float32", align=4)
        packed = T.match_buffer(packed_, (packed_bytes,), "uint8", align=64)
        out = T.match_buffer(out_, (1, p.rows), "float32", align=4)
        planes = scratch((p.full_groups * group_words + tail_words) * ACTIVATION_PLANES, "int32")
        sums = scratch(p.groups, "int32")
        zeros = scratch(p.groups, "int32")
        shifted = scratch(max(group_words, tail_words) * WORD, "int8")
        padded = scratch(max(tail_words, 1) * WORD, "int8")
        for g in T.serial(p.full_groups):
            stage_full(values, planes, sums, zeros, shifted, g)
        if tail > 0:
            stage_tail(values, planes, sums, zeros, shifted, padded)
        for step in loop(steps):
            total = scratch(rows, "float32")
            for v in T.unroll(len(vectors)):
                total[T.ramp(v * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
            for g in T.serial(p.full_groups):
                group(packed, planes, sums, zeros, x_scale, total, step, g, p.group_slabs)
            if tail > 0:
                group(packed, planes, sums, zeros, x_scale, total, step, p.full_groups, p.tail_slabs)
            store(packed, out, total, step)

    return kernel
