"""Attention over a quantized KV cache, for one sequence: of one token, or of a part of a prompt.

Of one token a thread block takes a KV head.

The block quantizes the new key and value, stores them, and lets its query heads attend one after the other. Keys are
taken in tiles of one a thread; what is behind a tile is a running maximum, a running sum and one weighted value a
channel (online softmax, Milakov and Gimelshein, arXiv 1805.02867), so a context may have any length.

Stored codes and parameters are exactly :func:`~...reference.quantize_kv`'s. The output agrees with
:func:`~...reference.cached_attention` up to the order of fp32 sums. The number of past tokens is read from the
device's memory: a launch has the same arguments whatever it is.

Halves are handled as their bits, which spares the kernels cuda_fp16.h.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
# pyright: reportInvalidTypeForm=false
from dataclasses import dataclass
from typing import Any

from ...errors import UntranslatableError
from ...spec import AttentionSpec
from ...tvm_api import PrimFunc, T
from ..dp4a import half_as_float

THREADS = 128
"""Threads of a block, and keys of a tile."""

HIDDEN = -3.0e38
"""The score of a key that a query must not see."""

_WARP = 32
_WARPS = THREADS // _WARP
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


def _signed_half_as_float(bits: Any) -> Any:
    wide = T.cast(bits, "uint32")
    size = half_as_float(T.bitwise_and(wide, T.uint32(0x7FFF)))
    sign = T.shift_left(T.bitwise_and(wide, T.uint32(0x8000)), T.uint32(16))
    return call("__uint_as_float", T.bitwise_or(call("__float_as_uint", size, dtype="uint32"), sign))


def _across_warp(function: str, value: Any, step: int) -> Any:
    other = T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, step, _WARP, _WARP)
    return call(function, value, other)


@dataclass(frozen=True)
class _Heads:
    """What thread blocks do for the heads of an attention.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """

    spec: AttentionSpec

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
            return _signed_half_as_float(codes[0, head, slot, channel])
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
            with T.serial(-(-width // _WARP)) as turn:
                channel = T.Bind(turn * _WARP + lane)
                with T.If(channel < width), T.Then():
                    T.buffer_store(codes, _signed_half_bits(new[channel]), [0, head, slot, channel])
            return
        T.buffer_store(bounds, T.float32(0), [0])
        T.buffer_store(bounds, T.float32(0), [1])
        with T.serial(-(-width // _WARP)) as turn:
            channel = T.Bind(turn * _WARP + lane)
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
        with T.serial(-(-stored // _WARP)) as turn:
            place = T.Bind(turn * _WARP + lane)
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

    def attend(
        self, query: Any, key_codes: Any, key_params: Any, value_codes: Any, value_params: Any, key_mask: Any,
        sinks: Any, out: Any, head: Any, row: Any, token: Any, past: Any, thread: Any, shared: Any, own: Any,
    ) -> None:  # fmt: skip
        """One query of a KV head, which sees slots up to ``past``: none where that is below 0."""
        asked, scores, sums, peaks, parts = shared
        spec, (lane, warp) = self.spec, (thread % _WARP, thread // _WARP)
        first = T.Bind(T.max(past - (spec.window - 1), 0)) if spec.window else T.int32(0)
        self.load(query, row, token, asked, spec.key_width, thread)
        T.evaluate(T.tvm_storage_sync("shared"))
        # own: best score so far, its sum of shares, this tile's score, the tile's share
        T.buffer_store(own, T.float32(HIDDEN) if sinks is None else sinks[row], [0])
        T.buffer_store(own, T.float32(0 if sinks is None else 1), [1])
        with T.unroll(self.turns) as turn:
            T.buffer_store(sums, T.float32(0), [turn])
        with T.serial((past + 1 - first + (THREADS - 1)) // THREADS) as tile:
            begin = T.Bind(first + tile * THREADS)
            slot = T.Bind(begin + thread)
            T.buffer_store(own, T.float32(HIDDEN), [2])
            with T.If(slot <= past), T.Then(), T.If(key_mask[0, slot] != T.int64(0)), T.Then():
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
            with T.serial(_WARPS) as other:
                T.buffer_store(own, call("fmaxf", own[4], peaks[other]), [4])
            share = call("expf", call("__fsub_rn", own[2], own[4]))
            T.buffer_store(own, T.if_then_else(own[2] > T.float32(HIDDEN), share, T.float32(0)), [3])
            T.buffer_store(scores, own[3], [thread])
            for step in (1, 2, 4, 8, 16):
                T.buffer_store(own, _across_warp("__fadd_rn", own[3], step), [3])
            with T.If(lane == 0), T.Then():
                T.buffer_store(parts, own[3], [warp])
            # What earlier tiles weigh now.
            T.buffer_store(own, call("expf", call("__fsub_rn", own[0], own[4])), [0])
            T.buffer_store(own, call("__fmul_rn", own[1], own[0]), [1])
            T.evaluate(T.tvm_storage_sync("shared"))
            with T.serial(_WARPS) as other:
                T.buffer_store(own, call("__fadd_rn", own[1], parts[other]), [1])
            count = T.Bind(T.min(past + 1 - begin, THREADS))
            with T.unroll(self.turns) as turn:
                channel = T.Bind(turn * THREADS + thread)
                with T.If(channel < spec.value_width), T.Then():
                    T.buffer_store(own, call("__fmul_rn", sums[turn], own[0]), [2])
                    with T.serial(count) as key:
                        T.buffer_store(own, scores[key], [3])
                        # A slot that was never written may hold anything, and has no share.
                        with T.If(own[3] > T.float32(0)), T.Then():
                            stored = self.number(value_codes, value_params, head, begin + key, channel)
                            T.buffer_store(own, call("__fmaf_rn", own[3], stored, own[2]), [2])
                    T.buffer_store(sums, own[2], [turn])
            T.buffer_store(own, own[4], [0])
            T.evaluate(T.tvm_storage_sync("shared"))
        with T.unroll(self.turns) as turn:
            channel = T.Bind(turn * THREADS + thread)
            with T.If(channel < spec.value_width), T.Then():
                mean = call("__fdiv_rn", sums[turn], own[1])
                T.buffer_store(out, T.if_then_else(own[1] > T.float32(0), mean, T.float32(0)), [0, row, token, channel])


def attention(spec: AttentionSpec) -> PrimFunc:
    """``(query, key, value, key_codes, key_params, value_codes, value_params, key_mask, past, [sinks,] out)``.

    Parameters are declared in alphabetical order.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, kv_heads, repeat, turns = _Heads(spec), spec.kv_heads, spec.repeat, _Heads(spec).turns
    key_width, value_width = spec.key_width, spec.value_width

    @T.prim_func(s_tir=True)
    def kernel(
        key_: T.handle,
        key_codes_: T.handle,
        key_mask_: T.handle,
        key_params_: T.handle,
        out_: T.handle,
        past_: T.handle,
        query_: T.handle,
        sinks_: T.handle,
        value_: T.handle,
        value_codes_: T.handle,
        value_params_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        capacity = T.int32()
        key = T.match_buffer(key_, (1, kv_heads, 1, key_width), "float32")
        key_codes = T.match_buffer(key_codes_, *heads.codes(key_width, capacity))
        key_mask = T.match_buffer(key_mask_, (1, capacity), "int64")
        key_params = T.match_buffer(key_params_, *heads.params(key_width, capacity))
        out = T.match_buffer(out_, (1, spec.heads, 1, value_width), "float32")
        past = T.match_buffer(past_, (1,), "int32")
        query = T.match_buffer(query_, (1, spec.heads, 1, key_width), "float32")
        sinks = T.match_buffer(sinks_, (spec.heads,), "float32")
        value = T.match_buffer(value_, (1, kv_heads, 1, value_width), "float32")
        value_codes = T.match_buffer(value_codes_, *heads.codes(value_width, capacity))
        value_params = T.match_buffer(value_params_, *heads.params(value_width, capacity))
        head = T.launch_thread("blockIdx.x", kv_heads)
        thread = T.launch_thread("threadIdx.x", THREADS)
        new_key = T.alloc_buffer((key_width,), "float32", scope="shared")
        new_value = T.alloc_buffer((value_width,), "float32", scope="shared")
        asked = T.alloc_buffer((key_width,), "float32", scope="shared")
        scores = T.alloc_buffer((THREADS,), "float32", scope="shared")
        sums = T.alloc_buffer((turns,), "float32", scope="local")
        peaks = T.alloc_buffer((_WARPS,), "float32", scope="shared")
        parts = T.alloc_buffer((_WARPS,), "float32", scope="shared")
        own = T.alloc_buffer((5,), "float32", scope="local")
        slot: T.let = past[0]
        heads.load(key, head, 0, new_key, key_width, thread)
        heads.load(value, head, 0, new_value, value_width, thread)
        T.tvm_storage_sync("shared")
        if thread // _WARP == 0:
            heads.append(new_key, key_width, key_codes, key_params, head, slot, thread, own)
        if thread // _WARP == 1:
            heads.append(new_value, value_width, value_codes, value_params, head, slot, thread % _WARP, own)
        T.tvm_storage_sync("shared")
        for r in T.serial(repeat):
            heads.attend(
                query, key_codes, key_params, value_codes, value_params, key_mask, sinks if spec.sinks else None, out,
                head, head * repeat + r, 0, slot, thread, (asked, scores, sums, peaks, parts), own,
            )  # fmt: skip

    return kernel


def append_part(spec: AttentionSpec, tokens: int) -> PrimFunc:
    """``(key, value, key_codes, key_params, value_codes, value_params, past)``: stores the keys and values of a part.

    ``past`` is int32 ``[2]``: the number of past tokens, and how many of the part's are none of its padding. These are
    the last ones; nothing is stored for the others. A thread block takes one token for one KV head.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, kv_heads, key_width, value_width = _Heads(spec), spec.kv_heads, spec.key_width, spec.value_width

    @T.prim_func(s_tir=True)
    def kernel(
        key_: T.handle,
        key_codes_: T.handle,
        key_params_: T.handle,
        past_: T.handle,
        value_: T.handle,
        value_codes_: T.handle,
        value_params_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        capacity = T.int32()
        key = T.match_buffer(key_, (1, kv_heads, tokens, key_width), "float32")
        key_codes = T.match_buffer(key_codes_, *heads.codes(key_width, capacity))
        key_params = T.match_buffer(key_params_, *heads.params(key_width, capacity))
        past = T.match_buffer(past_, (2,), "int32")
        value = T.match_buffer(value_, (1, kv_heads, tokens, value_width), "float32")
        value_codes = T.match_buffer(value_codes_, *heads.codes(value_width, capacity))
        value_params = T.match_buffer(value_params_, *heads.params(value_width, capacity))
        block = T.launch_thread("blockIdx.x", kv_heads * tokens)
        thread = T.launch_thread("threadIdx.x", THREADS)
        new_key = T.alloc_buffer((key_width,), "float32", scope="shared")
        new_value = T.alloc_buffer((value_width,), "float32", scope="shared")
        own = T.alloc_buffer((4,), "float32", scope="local")
        head: T.let = block // tokens
        token: T.let = block % tokens
        padding: T.let = tokens - past[1]
        slot: T.let = past[0] + token - padding
        heads.load(key, head, token, new_key, key_width, thread)
        heads.load(value, head, token, new_value, value_width, thread)
        T.tvm_storage_sync("shared")
        if token >= padding and thread // _WARP == 0:
            heads.append(new_key, key_width, key_codes, key_params, head, slot, thread, own)
        if token >= padding and thread // _WARP == 1:
            heads.append(new_value, value_width, value_codes, value_params, head, slot, thread % _WARP, own)

    return kernel


def attend_part(spec: AttentionSpec, tokens: int) -> PrimFunc:
    """``(query, key_codes, key_params, value_codes, value_params, key_mask, past, [sinks,] out)``: attention of a part
    over what :func:`append_part` has stored.

    Each token sees itself and those before it, as :func:`attention` would have it, to the bit; the output of padding is
    0. A thread block takes one token for one head.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, repeat, turns = _Heads(spec), spec.repeat, _Heads(spec).turns
    key_width, value_width = spec.key_width, spec.value_width

    @T.prim_func(s_tir=True)
    def kernel(
        key_codes_: T.handle,
        key_mask_: T.handle,
        key_params_: T.handle,
        out_: T.handle,
        past_: T.handle,
        query_: T.handle,
        sinks_: T.handle,
        value_codes_: T.handle,
        value_params_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        capacity = T.int32()
        key_codes = T.match_buffer(key_codes_, *heads.codes(key_width, capacity))
        key_mask = T.match_buffer(key_mask_, (1, capacity), "int64")
        key_params = T.match_buffer(key_params_, *heads.params(key_width, capacity))
        out = T.match_buffer(out_, (1, spec.heads, tokens, value_width), "float32")
        past = T.match_buffer(past_, (2,), "int32")
        query = T.match_buffer(query_, (1, spec.heads, tokens, key_width), "float32")
        sinks = T.match_buffer(sinks_, (spec.heads,), "float32")
        value_codes = T.match_buffer(value_codes_, *heads.codes(value_width, capacity))
        value_params = T.match_buffer(value_params_, *heads.params(value_width, capacity))
        block = T.launch_thread("blockIdx.x", spec.heads * tokens)
        thread = T.launch_thread("threadIdx.x", THREADS)
        asked = T.alloc_buffer((key_width,), "float32", scope="shared")
        scores = T.alloc_buffer((THREADS,), "float32", scope="shared")
        sums = T.alloc_buffer((turns,), "float32", scope="local")
        peaks = T.alloc_buffer((_WARPS,), "float32", scope="shared")
        parts = T.alloc_buffer((_WARPS,), "float32", scope="shared")
        own = T.alloc_buffer((5,), "float32", scope="local")
        row: T.let = block // tokens
        token: T.let = block % tokens
        padding: T.let = tokens - past[1]
        slot: T.let = T.Select(token >= padding, past[0] + token - padding, -1)
        heads.attend(
            query, key_codes, key_params, value_codes, value_params, key_mask, sinks if spec.sinks else None, out,
            row // repeat, row, token, slot, thread, (asked, scores, sums, peaks, parts), own,
        )  # fmt: skip

    return kernel
