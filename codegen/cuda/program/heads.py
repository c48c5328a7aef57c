"""What thread blocks do for the heads of an attention: store keys and values, attend, merge; and how the keys that a
token sees are shared out over them. The kernels made of it are :mod:`.attention`'s.

Halves are handled as their bits, which spares the kernels cuda_fp16.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import UntranslatableError
from ...spec import AttentionSpec
from ...tvm_api import T
from ..floats import half_as_float, signed_half_as_float
from ..limits import MULTIPROCESSORS, WARP
from .prologue import MOST_BLOCKS

THREADS = 128
"""Threads of a block, and keys of a tile."""

LEAST_TILES = 2
"""Tiles of a share of the keys at least: fewer keys are not worth a second launch. That has not been measured."""

MOST_SHARES = 64
"""Shares that are merged one after the other at most."""

BLOCKS_PER_MULTIPROCESSOR = 2
"""Thread blocks of the launch that shares keys out. Which number is best has not been measured."""

HIDDEN = -3.0e38
"""The score of a key that a query must not see."""

WARPS = THREADS // WARP

_ALL_LANES = 0xFFFFFFFF
_MIN_SCALE = 2.0**-24
_MAX_HALF = 65504.0
_LEAST_NORMAL = 0x38800000
"""Bits of the fp32 number that is the smallest normal half."""


def call(name: str, *arguments: Any, dtype: str = "float32") -> Any:
    """A call of a CUDA function."""
    return T.call_pure_extern(dtype, name, *arguments)


def half_bits(x: Any) -> Any:
    """The half nearest to a number between 0 and the largest half, ties to even, as its bits in uint32."""
    bits = call("__float_as_uint", x, dtype="uint32")
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(13)), T.uint32(1))
    normal = T.shift_right(bits - T.uint32(0x37FFF001) + odd, T.uint32(13))
    # Half of one has the spacing of subnormal halves: the addition rounds to them.
    shifted = call("__float_as_uint", call("__fadd_rn", x, T.float32(0.5)), dtype="uint32")
    return T.Select(bits < T.uint32(_LEAST_NORMAL), shifted - T.uint32(0x3F000000), normal)


def _signed_half_bits(x: Any) -> Any:
    clamped = call("fminf", call("fmaxf", x, T.float32(-_MAX_HALF)), T.float32(_MAX_HALF))
    bits = call("__float_as_uint", clamped, dtype="uint32")
    sign = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(0x8000))
    return T.cast(T.bitwise_or(half_bits(call("fabsf", clamped)), sign), "uint16")


def _across_warp(function: str, value: Any, step: int) -> Any:
    other = T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, step, WARP, WARP)
    return call(function, value, other)


@contextmanager
def _where(condition: Any) -> Iterator[None]:
    """Statements under a condition; under none where that is None."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


@dataclass(frozen=True)
class Split:
    """How the keys that a query sees are shared out: evenly, in whole tiles, into as few shares as have enough each.

    Of ``n`` keys in ``t = ceil(n / THREADS)`` tiles every share has ``max(tiles, ceil(t / shares))`` tiles; the last
    one may have fewer.

    Attributes:
        shares: how many there are at most.
        tiles: how many a share has at least.
    """

    shares: int = 1
    tiles: int = LEAST_TILES

    @property
    def undivided(self) -> int:
        """Up to so many keys are one share."""
        return self.tiles * THREADS

    def left(self, spec: AttentionSpec) -> tuple[int, int, int]:
        """Shape of what the shares of a token leave to be merged: by head and share the weighted values, the best score
        and the sum of weights beside it."""
        return spec.heads, self.shares, spec.value_width + 2


def split_of(spec: AttentionSpec, arch: str) -> Split:
    """How an architecture shares the keys of an attention out.

    There are as many shares as give all KV heads together :data:`BLOCKS_PER_MULTIPROCESSOR` thread blocks for each
    multiprocessor of the architecture's largest device, but no more than :data:`~.prologue.MOST_BLOCKS` blocks and
    :data:`MOST_SHARES` shares, and no more than a window has of the smallest shares.
    """
    blocks = min(BLOCKS_PER_MULTIPROCESSOR * MULTIPROCESSORS[arch], MOST_BLOCKS)
    shares = min(blocks // spec.kv_heads, MOST_SHARES)
    if spec.window:
        shares = min(shares, -(-spec.window // (THREADS * LEAST_TILES)))
    return Split(max(shares, 1))


@dataclass(frozen=True)
class Heads:
    """What thread blocks do for the heads of an attention.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """

    spec: AttentionSpec
    split: Split = Split()

    def __post_init__(self) -> None:
        if self.spec.places:
            raise UntranslatableError("CUDA kernels have no attention by places (ALiBi, chunks)")

    @property
    def limit(self) -> float:
        """The largest code."""
        return float((1 << self.spec.bits) - 1)

    @property
    def turns(self) -> int:
        """Channels of a value that a thread has."""
        return -(-self.spec.value_width // THREADS)

    def codes(self, width: int, capacity: Any) -> tuple[Any, str]:
        """Shape and dtype of the stored codes of keys or values."""
        shape = 1, self.spec.kv_heads, capacity, self.spec.stored(width)
        return shape, "uint16" if self.spec.bits == 16 else "uint8"

    def params(self, width: int, capacity: Any) -> tuple[Any, str]:
        """Shape and dtype of their parameters; of 16 bits there are none, and nothing is read."""
        shape = 1, self.spec.kv_heads, capacity, self.spec.stored(width) if self.spec.bits == 16 else 2
        return shape, "uint16"

    def number(self, codes: Any, params: Any, head: Any, slot: Any, channel: Any) -> Any:
        """A channel of a stored key or value."""
        bits = self.spec.bits
        if bits == 16:
            return signed_half_as_float(codes[0, head, slot, channel])
        if bits == 8:
            code = T.cast(codes[0, head, slot, channel], "int32")
        else:
            byte = T.cast(codes[0, head, slot, channel // 2], "int32")
            code = T.bitwise_and(T.shift_right(byte, channel % 2 * 4), 15)
        zero = half_as_float(params[0, head, slot, 1])
        difference = call("__fsub_rn", call("__int2float_rn", code), zero)
        return call("__fmul_rn", difference, half_as_float(params[0, head, slot, 0]))

    def code(self, x: Any, scale: Any, zero: Any) -> Any:
        shifted = call("__fadd_rn", call("rintf", call("__fdiv_rn", x, scale)), zero)
        clamped = call("fminf", call("fmaxf", shifted, T.float32(0)), T.float32(self.limit))
        return call("__float2int_rn", clamped, dtype="int32")

    def load(self, source: Any, head: Any, token: Any, target: Any, width: int, thread: Any) -> None:
        """The block takes a query, a key or a value into shared memory. It reads each element once: a prologue computes
        it there."""
        with T.serial(-(-width // THREADS)) as turn:
            channel = T.Bind(turn * THREADS + thread)
            with T.If(channel < width), T.Then():
                T.buffer_store(target, source[0, head, token, channel], [channel])

    def append(
        self, new: Any, width: int, codes: Any, params: Any, head: Any, slot: Any, lane: Any, bounds: Any
    ) -> None:
        """One warp quantizes and stores one key or value."""
        bits = self.spec.bits
        if bits == 16:
            with T.serial(-(-width // WARP)) as turn:
                channel = T.Bind(turn * WARP + lane)
                with T.If(channel < width), T.Then():
                    T.buffer_store(codes, _signed_half_bits(new[channel]), [0, head, slot, channel])
            return
        T.buffer_store(bounds, T.float32(0), [0])
        T.buffer_store(bounds, T.float32(0), [1])
        with T.serial(-(-width // WARP)) as turn:
            channel = T.Bind(turn * WARP + lane)
            with T.If(channel < width), T.Then():
                T.buffer_store(bounds, call("fmaxf", bounds[0], new[channel]), [0])
                T.buffer_store(bounds, call("fminf", bounds[1], new[channel]), [1])
        for step in (1, 2, 4, 8, 16):
            T.buffer_store(bounds, _across_warp("fmaxf", bounds[0], step), [0])
            T.buffer_store(bounds, _across_warp("fminf", bounds[1], step), [1])
        spread = call("__fdiv_rn", call("__fsub_rn", bounds[0], bounds[1]), T.float32(self.limit))
        clamped = call("fminf", call("fmaxf", spread, T.float32(_MIN_SCALE)), T.float32(_MAX_HALF))
        half = T.Bind(half_bits(clamped))
        T.buffer_store(bounds, half_as_float(half), [2])
        zero = call("rintf", call("__fdiv_rn", -bounds[1], bounds[2]))
        T.buffer_store(bounds, call("fminf", call("fmaxf", zero, T.float32(0)), T.float32(self.limit)), [3])
        with T.If(lane == 0), T.Then():
            T.buffer_store(params, T.cast(half, "uint16"), [0, head, slot, 0])
            T.buffer_store(params, T.cast(half_bits(bounds[3]), "uint16"), [0, head, slot, 1])
        stored = self.spec.stored(width)
        with T.serial(-(-stored // WARP)) as turn:
            place = T.Bind(turn * WARP + lane)
            with T.If(place < stored), T.Then():
                if bits == 8:
                    whole = self.code(new[place], bounds[2], bounds[3])
                else:
                    low = self.code(new[2 * place], bounds[2], bounds[3])
                    last = T.min(2 * place + 1, width - 1)
                    high = self.code(new[last], bounds[2], bounds[3])
                    if width % 2:
                        high = T.Select(2 * place + 1 < width, high, 0)
                    whole = T.bitwise_or(low, T.shift_left(high, 4))
                T.buffer_store(codes, T.cast(whole, "uint8"), [0, head, slot, place])

    def store(
        self, new: Any, state: Any, head: Any, token: Any, slot: Any, thread: Any, fresh: Any, own: Any,
        where: Any = None,
    ) -> None:  # fmt: skip
        """The block takes a new key and value, and a warp each quantizes and stores them.

        Args:
            new: ``(key, value)`` of all tokens.
            state: ``(key_codes, key_params, value_codes, value_params)``.
            fresh: shared memory for both.
            where: whether this block has something to store; None where every block has.
        """
        widths = self.spec.key_width, self.spec.value_width
        with _where(where):
            for source, target, width in zip(new, fresh, widths, strict=True):
                self.load(source, head, token, target, width, thread)
        T.evaluate(T.tvm_storage_sync("shared"))
        for warp, (target, width) in enumerate(zip(fresh, widths, strict=True)):
            mine, (codes, params) = thread // WARP == warp, state[2 * warp : 2 * warp + 2]
            with _where(mine if where is None else T.And(where, mine)):
                self.append(target, width, codes, params, head, slot, thread % WARP, own)

    def first(self, past: Any) -> Any:
        """The first slot that a query sees which sees slots up to ``past``."""
        return T.Bind(T.max(past - (self.spec.window - 1), 0)) if self.spec.window else T.int32(0)

    def cut(self, past: Any, into: Any) -> tuple[Any, Any, Any]:
        """The first slot that a query sees which sees slots up to ``past``; how many keys a share has; and how many
        shares there are.

        Args:
            past: the last slot.
            into: three int32, where they are kept: TVM would write the divisions wherever one of them is used.
        """
        split = self.split
        T.buffer_store(into, self.first(past), [0])
        tiles = T.Bind((past + 1 - into[0] + (THREADS - 1)) // THREADS)
        each = T.Bind(T.max((tiles + (split.shares - 1)) // split.shares, split.tiles))
        T.buffer_store(into, each * THREADS, [1])
        T.buffer_store(into, (tiles + each - 1) // each, [2])
        return into[0], into[1], into[2]

    def attend_share(
        self, state: Any, sinks: Any, head: Any, row: Any, share: Any, begin: Any, end: Any, thread: Any, shared: Any,
        own: Any,
    ) -> None:  # fmt: skip
        """One query, which lies in shared memory, over the slots from ``begin`` on and before ``end``.

        Leaves in ``own`` the best score and the sum of all keys' weights beside it, and in the sums of ``shared`` the
        weighted values; without a key to see :data:`HIDDEN` and zeros. The sink is of the first share.
        """
        key_codes, key_params, value_codes, value_params, key_mask = state
        asked, scores, sums, peaks, parts = shared
        spec, (lane, warp) = self.spec, (thread % WARP, thread // WARP)
        # own: best score so far, its sum of weights, this tile's score, the tile's weight
        T.buffer_store(own, T.float32(HIDDEN), [0])
        T.buffer_store(own, T.float32(0), [1])
        if sinks is not None:
            with T.If(share == 0), T.Then():
                T.buffer_store(own, sinks[row], [0])
                T.buffer_store(own, T.float32(1), [1])
        with T.unroll(self.turns) as turn:
            T.buffer_store(sums, T.float32(0), [turn])
        with T.serial((end - begin + (THREADS - 1)) // THREADS) as tile:
            start = T.Bind(begin + tile * THREADS)
            slot = T.Bind(start + thread)
            T.buffer_store(own, T.float32(HIDDEN), [2])
            with T.If(slot < end), T.Then(), T.If(key_mask[0, slot] != T.int64(0)), T.Then():
                T.buffer_store(own, T.float32(0), [2])
                with T.serial(spec.key_width) as channel:
                    stored = self.number(key_codes, key_params, head, slot, channel)
                    T.buffer_store(own, call("__fmaf_rn", asked[channel], stored, own[2]), [2])
                score = call("__fmul_rn", own[2], T.float32(spec.scale))
                if spec.softcap:
                    bounded = call("tanhf", call("__fdiv_rn", score, T.float32(spec.softcap)))
                    score = call("__fmul_rn", bounded, T.float32(spec.softcap))
                T.buffer_store(own, score, [2])
            T.buffer_store(own, own[2], [3])
            for step in (1, 2, 4, 8, 16):
                T.buffer_store(own, _across_warp("fmaxf", own[3], step), [3])
            with T.If(lane == 0), T.Then():
                T.buffer_store(peaks, own[3], [warp])
            T.evaluate(T.tvm_storage_sync("shared"))
            T.buffer_store(own, own[0], [4])
            with T.serial(WARPS) as other:
                T.buffer_store(own, call("fmaxf", own[4], peaks[other]), [4])
            weight = call("expf", call("__fsub_rn", own[2], own[4]))
            T.buffer_store(own, T.if_then_else(own[2] > T.float32(HIDDEN), weight, T.float32(0)), [3])
            T.buffer_store(scores, own[3], [thread])
            for step in (1, 2, 4, 8, 16):
                T.buffer_store(own, _across_warp("__fadd_rn", own[3], step), [3])
            with T.If(lane == 0), T.Then():
                T.buffer_store(parts, own[3], [warp])
            # What earlier tiles weigh now.
            T.buffer_store(own, call("expf", call("__fsub_rn", own[0], own[4])), [0])
            T.buffer_store(own, call("__fmul_rn", own[1], own[0]), [1])
            T.evaluate(T.tvm_storage_sync("shared"))
            with T.serial(WARPS) as other:
                T.buffer_store(own, call("__fadd_rn", own[1], parts[other]), [1])
            count = T.Bind(T.min(end - start, THREADS))
            with T.unroll(self.turns) as turn:
                channel = T.Bind(turn * THREADS + thread)
                with T.If(channel < spec.value_width), T.Then():
                    T.buffer_store(own, call("__fmul_rn", sums[turn], own[0]), [2])
                    with T.serial(count) as key:
                        T.buffer_store(own, scores[key], [3])
                        # A slot that was never written may hold anything, and has no weight.
                        with T.If(own[3] > T.float32(0)), T.Then():
                            stored = self.number(value_codes, value_params, head, start + key, channel)
                            T.buffer_store(own, call("__fmaf_rn", own[3], stored, own[2]), [2])
                    T.buffer_store(sums, own[2], [turn])
            T.buffer_store(own, own[4], [0])
            T.evaluate(T.tvm_storage_sync("shared"))

    def attend(
        self, query: Any, key_codes: Any, key_params: Any, value_codes: Any, value_params: Any, key_mask: Any,
        sinks: Any, out: Any, head: Any, row: Any, token: Any, past: Any, thread: Any, shared: Any, own: Any,
    ) -> None:  # fmt: skip
        """One query of a KV head, which sees slots up to ``past``: none where that is below 0."""
        asked, _, sums, *_ = shared
        self.load(query, row, token, asked, self.spec.key_width, thread)
        T.evaluate(T.tvm_storage_sync("shared"))
        state, first = (key_codes, key_params, value_codes, value_params, key_mask), self.first(past)
        self.attend_share(state, sinks, head, row, T.int32(0), first, past + 1, thread, shared, own)
        self.finish(out, row, token, sums, own[1], thread)

    def finish(self, out: Any, row: Any, token: Any, weighted: Any, total: Any, thread: Any) -> None:
        """The output of one query: weighted values, a turn each, over the sum of weights."""
        for turn in range(self.turns):
            channel = T.Bind(turn * THREADS + thread)
            with T.If(channel < self.spec.value_width), T.Then():
                mean = call("__fdiv_rn", weighted[turn], total)
                T.buffer_store(out, T.if_then_else(total > T.float32(0), mean, T.float32(0)), [0, row, token, channel])

    def split_block(
        self, new: Any, state: Any, sinks: Any, shares: Any, head: Any, share: Any, past: Any, thread: Any,
        fresh: Any, shared: Any, own: Any, into: Any,
    ) -> None:  # fmt: skip
        """A thread block of :func:`~.attention.split_attention`. One of a share that there is not does nothing."""
        spec, (query, *rest) = self.spec, new
        asked, _, sums, *_ = shared
        first, each, count = self.cut(past, into)
        begin = T.Bind(first + share * each)
        end = T.Bind(T.min(begin + each, past + 1))
        self.store(rest, state[:4], head, 0, past, thread, fresh, own, share == count - 1)
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.serial(T.Select(share < count, spec.repeat, 0)) as r:
            row = T.Bind(head * spec.repeat + r)
            self.load(query, row, 0, asked, spec.key_width, thread)
            T.evaluate(T.tvm_storage_sync("shared"))
            self.attend_share(state, sinks, head, row, share, begin, end, thread, shared, own)
            for turn in range(self.turns):
                channel = T.Bind(turn * THREADS + thread)
                with T.If(channel < spec.value_width), T.Then():
                    T.buffer_store(shares, sums[turn], [row, share, channel])
            with T.If(thread == 0), T.Then():
                T.buffer_store(shares, own[0], [row, share, spec.value_width])
                T.buffer_store(shares, own[1], [row, share, spec.value_width + 1])

    def merge_block(
        self, shares: Any, out: Any, row: Any, past: Any, thread: Any, sums: Any, own: Any, into: Any
    ) -> None:  # fmt: skip
        """A thread block of :func:`~.attention.merge`: one share after the other, in order."""
        width = self.spec.value_width
        # own: best score so far, its sum of weights, the share's best score; what weighs earlier shares, and this one
        for place, number in enumerate((HIDDEN, 0, HIDDEN, 0, 0)):
            T.buffer_store(own, T.float32(number), [place])
        for turn in range(self.turns):
            T.buffer_store(sums, T.float32(0), [turn])
        _, _, count = self.cut(past, into)
        with T.serial(count) as share:
            T.buffer_store(own, shares[row, share, width], [2])
            best = T.Bind(call("fmaxf", own[0], own[2]))
            T.buffer_store(own, call("expf", call("__fsub_rn", own[0], best)), [3])
            T.buffer_store(own, call("expf", call("__fsub_rn", own[2], best)), [4])
            T.buffer_store(own, best, [0])
            before = call("__fmul_rn", own[1], own[3])
            T.buffer_store(own, call("__fmaf_rn", shares[row, share, width + 1], own[4], before), [1])
            for turn in range(self.turns):
                channel = T.Bind(turn * THREADS + thread)
                with T.If(channel < width), T.Then():
                    before = call("__fmul_rn", sums[turn], own[3])
                    T.buffer_store(sums, call("__fmaf_rn", shares[row, share, channel], own[4], before), [turn])
        self.finish(out, row, 0, sums, own[1], thread)
