"""Attention over a quantized KV cache: new keys and values are quantized and stored, then every query attends.

A task is one KV head of one sequence and a tile of its query rows (the query heads that share the KV head, token after
token). Keys are read ``lanes`` at a time with one key a lane, so that a score needs no sum across lanes: the codes of a
block of keys are transposed word by word into a small buffer, and zero points and scales are applied to finished dot
products. Values are read with one channel a lane.

Stored codes and parameters are exactly :func:`~..reference.quantize_kv`'s. The output agrees with
:func:`~..reference.cached_attention` up to fp32 rounding: sums are taken in another order, and the exponential is a
polynomial.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from typing import Any

from ..sizes import ALIGNMENT
from ..spec import AttentionSpec
from ..tvm_api import PrimFunc, T, tvm_ffi
from .exponential import exponential, hyperbolic_tangent
from .memory import prefetch_line, scratch

HIDDEN = -3.0e38
"""The score of a key that a query must not see."""

SHOWN = 3.0e38
"""The upper bound of other scores."""

SUMS = 24
"""fp32 sums that the vector registers hold beside what is multiplied; has many divisors."""

FETCHED_LINES = 64
"""Most cache lines of a tensor of the state that a head asks for ahead of time."""

_WORD = 4
_MIN_SCALE = 2.0**-24
_MAX_HALF = 65504.0


def tile_rows(spec: AttentionSpec, queries: int | None) -> int:
    """Query rows of a task: as many as there are vector registers for one sum each.

    Args:
        spec: the attention.
        queries: tokens of each sequence of a call, where that is known.
    """
    return SUMS if queries is None else min(SUMS, queries * spec.repeat)


class _Kernel:
    """Builds the statements of one attention kernel for vectors of ``lanes`` fp32 lanes and tiles of ``tile`` rows.

    Attributes:
        value_rows: rows of a tile whose weighted values are summed at once, because their sums fit the registers.
        out_vectors: vectors of a row's sums.
    """

    def __init__(self, spec: AttentionSpec, lanes: int, tile: int):
        self.spec, self.lanes, self.tile = spec, lanes, tile
        self.float32, self.int32 = f"float32x{lanes}", f"int32x{lanes}"
        self.key_bytes, self.value_bytes = spec.stored(spec.key_width), spec.stored(spec.value_width)
        self.words = spec.key_width if spec.bits == 16 else -(-self.key_bytes // _WORD)
        self.word_type = "float32" if spec.bits == 16 else "int32"
        self.value_vectors = -(-self.value_bytes // lanes)
        self.out_vectors = self.value_vectors * (2 if spec.bits == 4 else 1)
        fitting = max(1, SUMS // self.out_vectors)
        self.value_rows = max(rows for rows in range(1, fitting + 1) if tile % rows == 0)

    def all(self, value: Any) -> Any:
        return T.broadcast(value, self.lanes)

    def at(self, start: Any) -> Any:
        return T.ramp(start, 1, self.lanes)

    def quantize(self, width: int, load: Any, codes: Any, params: Any, quantized: Any, bounds: Any, slot: Any) -> None:
        """Quantizes one key or value as the reference does. ``load(index)`` gives one of its channels or a vector."""
        bits, lanes = self.spec.bits, self.lanes
        if bits == 16:
            with T.serial(width) as i:
                clamped = T.max(T.min(load(i), T.float32(_MAX_HALF)), T.float32(-_MAX_HALF))
                T.buffer_store(codes, T.cast(clamped, "float16"), [*slot, i])
            return
        limit = float((1 << bits) - 1)
        vectors, rest = divmod(width, lanes)
        high, low = self.at(0), self.at(lanes)
        T.buffer_store(bounds, self.all(T.float32(0)), [high])
        T.buffer_store(bounds, self.all(T.float32(0)), [low])
        with T.serial(vectors) as i:
            x = T.Bind(load(self.at(i * lanes)))
            T.buffer_store(bounds, T.max(bounds[high], x), [high])
            T.buffer_store(bounds, T.min(bounds[low], x), [low])
        with T.serial(rest) as i:
            T.buffer_store(bounds, T.max(bounds[0], load(vectors * lanes + i)), [0])
            T.buffer_store(bounds, T.min(bounds[lanes], load(vectors * lanes + i)), [lanes])
        with T.unroll(lanes - 1) as i:
            T.buffer_store(bounds, T.max(bounds[0], bounds[i + 1]), [0])
            T.buffer_store(bounds, T.min(bounds[lanes], bounds[lanes + 1 + i]), [lanes])
        spread = (bounds[0] - bounds[lanes]) / T.float32(limit)
        half = T.Bind(T.cast(T.max(T.min(spread, T.float32(_MAX_HALF)), T.float32(_MIN_SCALE)), "float16"))
        scale = T.Bind(T.cast(half, "float32"))
        zero = T.Bind(T.min(T.nearbyint((T.float32(0) - bounds[lanes]) / scale), T.float32(limit)))
        T.buffer_store(params, half, [*slot, 0])
        T.buffer_store(params, T.cast(zero, "float16"), [*slot, 1])

        def code(x: Any, wide: Any, suffix: str) -> Any:
            shifted = T.nearbyint(x / wide(scale)) + wide(zero)
            clamped = T.max(T.min(shifted, wide(T.float32(limit))), wide(T.float32(0)))
            return T.cast(T.cast(clamped, "int32" + suffix), "uint8" + suffix)

        with T.serial(vectors) as i:
            where = self.at(i * lanes)
            T.buffer_store(quantized, code(load(where), self.all, f"x{lanes}"), [where])
        with T.serial(rest) as i:
            where = vectors * lanes + i
            T.buffer_store(quantized, code(load(where), lambda value: value, ""), [where])
        if bits == 8:
            with T.serial(width) as i:
                T.buffer_store(codes, quantized[i], [*slot, i])
            return
        T.buffer_store(quantized, T.uint8(0), [width])
        with T.serial((width + 1) // 2) as i:
            T.buffer_store(codes, quantized[2 * i] | (quantized[2 * i + 1] << T.uint8(4)), [*slot, i])

    def transpose(self, key_codes: Any, block: Any, b: Any, h: Any, first: Any) -> None:
        """The codes of the keys from ``first`` on: word ``w`` of lane ``l`` to ``block[w, l]``."""
        with T.serial(self.lanes) as lane:
            if self.spec.bits == 16:
                with T.serial(self.words) as i:
                    T.buffer_store(block, T.cast(key_codes[b, h, first + lane, i], "float32"), [i * self.lanes + lane])
            else:
                whole = self.key_bytes // _WORD
                with T.serial(whole) as w:
                    word = T.reinterpret("int32", key_codes[b, h, first + lane, T.ramp(w * _WORD, 1, _WORD)])
                    T.buffer_store(block, word, [w * self.lanes + lane])
                if self.key_bytes % _WORD:
                    rest = T.int32(0)
                    for i in range(self.key_bytes % _WORD):
                        byte = T.cast(key_codes[b, h, first + lane, whole * _WORD + i], "int32")
                        rest = rest | (byte << T.int32(8 * i))
                    T.buffer_store(block, rest, [whole * self.lanes + lane])

    def add_channel(self, queries: Any, sums: Any, channel: Any, key: Any) -> None:
        """Adds one channel's products of a block of keys to every row's sums."""
        keys = T.Bind(key)
        for r in range(self.tile):
            where = self.at(r * self.lanes)
            query = self.all(queries[r * self.spec.key_width + channel])
            T.buffer_store(sums, sums[where] + keys * query, [where])

    def multiply(self, block: Any, queries: Any, sums: Any) -> None:
        """Dot products of every row with the codes of a block."""
        spec = self.spec
        for r in range(self.tile):
            T.buffer_store(sums, self.all(T.float32(0)), [self.at(r * self.lanes)])
        if spec.bits == 16:
            with T.serial(spec.key_width) as i:
                self.add_channel(queries, sums, i, block[self.at(i * self.lanes)])
            return
        codes_per_word = 8 * _WORD // spec.bits
        mask = self.all(T.int32((1 << spec.bits) - 1))

        def add_word(w: Any, count: int) -> None:
            codes = T.Bind(block[self.at(w * self.lanes)])
            for i in range(count):
                code = (codes >> self.all(T.int32(spec.bits * i))) & mask
                self.add_channel(queries, sums, w * codes_per_word + i, T.cast(code, self.float32))

        with T.serial(spec.key_width // codes_per_word) as w:
            add_word(w, codes_per_word)
        if spec.key_width % codes_per_word:
            add_word(spec.key_width // codes_per_word, spec.key_width % codes_per_word)

    def factors(self, params: Any, buffer: Any, b: Any, h: Any, first: Any) -> None:
        """Scales and zero points of the keys from slot ``first`` on, as two fp32 vectors."""
        for i, factor in enumerate(self.pairs(params, b, h, first)):
            T.buffer_store(buffer, factor, [self.at(i * self.lanes)])

    def pairs(self, params: Any, b: Any, h: Any, first: Any) -> list[Any]:
        """Scales and zero points from slot ``first`` on, fp32 vectors."""
        # The two halves of a slot, and those of the next slots, follow one another: one load for all of them.
        halves = params[b, h, first, T.ramp(0, 1, 2 * self.lanes)]
        words = T.Bind(T.reinterpret(self.int32, halves))
        parts = [words, words >> self.all(T.int32(16))]
        bits = [T.reinterpret(f"float16x{self.lanes}", T.cast(part, f"int16x{self.lanes}")) for part in parts]
        return [T.cast(half, self.float32) for half in bits]

    def add_value(
        self, value_codes: Any, row: Any, scores: Any, sums: Any, first: Any, stride: Any, b: Any, h: Any, key: Any
    ) -> None:
        """Adds one value, weighted by the scores of :attr:`value_rows` rows from ``first`` on, to the rows' sums.

        At 4 bits the sums of low nibbles come before those of high ones.
        """
        lanes, bits = self.lanes, self.spec.bits
        padded = self.value_bytes % lanes != 0
        if padded:
            with T.serial(self.value_bytes) as i:
                T.buffer_store(row, value_codes[b, h, key, i], [i])
        weights = [T.Bind(self.all(scores[(first + r) * stride + key])) for r in range(self.value_rows)]
        for i in range(self.value_vectors):
            stored = T.Bind(row[self.at(i * lanes)] if padded else value_codes[b, h, key, self.at(i * lanes)])
            if bits == 4:
                wide = T.Bind(T.cast(stored, self.int32))
                parts = [wide & self.all(T.int32(15)), wide >> self.all(T.int32(4))]
            else:
                parts = [T.cast(stored, self.int32) if bits == 8 else stored]
            for j, part in enumerate(parts):
                channels = T.Bind(T.cast(part, self.float32))
                for r in range(self.value_rows):
                    where = self.at((r * self.out_vectors + j * self.value_vectors + i) * lanes)
                    T.buffer_store(sums, sums[where] + channels * weights[r], [where])

    def channel(self, d: Any) -> Any:
        """Where channel ``d`` stands in a row's sums."""
        if self.spec.bits == 4:
            return d % 2 * (self.value_vectors * self.lanes) + d // 2
        return d

    def capped(self, score: Any) -> Any:
        """Scores within the bound of their magnitude."""
        bound = self.spec.softcap
        if not bound:
            return score
        return hyperbolic_tangent(score / self.all(T.float32(bound)), self.lanes) * self.all(T.float32(bound))

    def biased(self, score: Any, places: Any, block: Any, slot: Any, slope: Any) -> Any:
        """Scores of a block of keys with what their distance from the query's slot adds."""
        if slope is None:
            return score
        distance = places[self.at(block * self.lanes)] - self.all(places[slot])
        return score + T.cast(distance, self.float32) * self.all(slope)

    def soften(
        self, scores: Any, limits: Any, lane_buffer: Any, totals: Any, zeros: Any, value_factors: Any,
        row: Any, slot: Any, stride: Any, front: Any, blocks: Any, places: Any, sink: Any, slope: Any,
    ) -> None:  # fmt: skip
        """One row's scores to softmax numerators times value scales; their sum, and that of the zero points' share.

        ``slot`` is the query's own; ``front`` the first that is no padding; ``limits`` are upper bounds of scores;
        ``value_factors`` the scales of the values and, ``stride`` behind them, their zero points; ``places`` those of
        all slots; ``sink`` and ``slope`` the head's. What the attention has not, is None.
        """
        lanes, window = self.lanes, self.spec.window
        scaled = self.spec.bits < 16
        T.buffer_store(lane_buffer, self.all(T.float32(HIDDEN)), [self.at(0)])
        with T.serial(front // lanes, blocks) as i:
            where = self.at(row * stride + i * lanes)
            slots = T.Bind(T.ramp(i * lanes, 1, lanes))
            score = self.biased(self.capped(scores[where]), places, i, slot, slope)
            score = T.min(score, limits[self.at(i * lanes)])
            score = T.Select(slots <= self.all(slot), score, self.all(T.float32(HIDDEN)))
            if window:
                score = T.Select(slots > self.all(slot - window), score, self.all(T.float32(HIDDEN)))
            if self.spec.chunk:
                first = places[slot] - places[slot] % self.spec.chunk
                score = T.Select(places[self.at(i * lanes)] >= self.all(first), score, self.all(T.float32(HIDDEN)))
            bounded = T.Bind(score)
            T.buffer_store(scores, bounded, [where])
            T.buffer_store(lane_buffer, T.max(lane_buffer[self.at(0)], bounded), [self.at(0)])
        T.buffer_store(totals, lane_buffer[0], [row])
        with T.serial(lanes - 1) as lane:
            T.buffer_store(totals, T.max(totals[row], lane_buffer[lane + 1]), [row])
        if sink is not None:
            T.buffer_store(totals, T.max(totals[row], sink), [row])
        best = T.Bind(totals[row])
        rest: Any = T.float32(0)
        if sink is not None:
            T.buffer_store(lane_buffer, exponential(self.all(sink - best), lanes), [self.at(0)])
            rest = T.Bind(lane_buffer[0])
        T.buffer_store(lane_buffer, self.all(T.float32(0)), [self.at(0)])
        T.buffer_store(lane_buffer, self.all(T.float32(0)), [self.at(lanes)])
        with T.serial(front // lanes, blocks) as i:
            where = self.at(row * stride + i * lanes)
            score = T.Bind(scores[where])
            power = exponential(score - self.all(best), lanes)
            share = T.Bind(T.Select(score > self.all(T.float32(HIDDEN)), power, self.all(T.float32(0))))
            T.buffer_store(lane_buffer, lane_buffer[self.at(0)] + share, [self.at(0)])
            if scaled:
                scale = value_factors[self.at(i * lanes)]
                zero = value_factors[self.at(stride + i * lanes)]
                # A slot that was never written may hold anything; its share is zero, and so must its product be.
                product = share * scale
                weighted = T.Bind(T.Select(share > self.all(T.float32(0)), product, self.all(T.float32(0))))
                T.buffer_store(scores, weighted, [where])
                offset = T.Select(share > self.all(T.float32(0)), weighted * zero, self.all(T.float32(0)))
                T.buffer_store(lane_buffer, lane_buffer[self.at(lanes)] + offset, [self.at(lanes)])
            else:
                T.buffer_store(scores, share, [where])
        T.buffer_store(totals, rest, [row])
        T.buffer_store(zeros, T.float32(0), [row])
        with T.serial(lanes) as i:
            lane = T.Bind((front + i) % lanes)
            T.buffer_store(totals, totals[row] + lane_buffer[lane], [row])
            T.buffer_store(zeros, zeros[row] + lane_buffer[lanes + lane], [row])


def cached_attention(spec: AttentionSpec, lanes: int, tile: int, parallel: bool) -> PrimFunc:
    """``(query, key, value, key_codes, key_params, value_codes, value_params, key_mask, out)``; for an attention with
    numbers of every head ``(..., key_mask, sinks, slopes, out)``.

    ``query`` fp32 ``[B, H, S, D]``, ``key`` ``[B, Hkv, S, D]``, ``value`` ``[B, Hkv, S, Dv]``; the state as the
    reference lays it out, changed in place, its capacity a multiple of :data:`~..sizes.CAPACITY_MULTIPLE`;
    ``key_mask`` int64 ``[B, T]`` with ``T = past + S``; ``out`` fp32 ``[B, H, S, Dv]``. Numbers of 16 bits have no
    parameters; the codes are passed again in their place. ``sinks`` and ``slopes`` are fp32 ``[H]``; of one that the
    attention has not, nothing is read.

    Args:
        spec: the attention.
        lanes: fp32 lanes of the target's vectors, a divisor of that multiple.
        tile: query rows of a task.
        parallel: split the tasks over the thread pool.
    """
    k = _Kernel(spec, lanes, tile)
    repeat, width, value_width = spec.repeat, spec.key_width, spec.value_width
    code_type = "float16" if spec.bits == 16 else "uint8"
    scaled = spec.bits < 16
    key_parameters, value_parameters = (2, 2) if scaled else (k.key_bytes, k.value_bytes)
    loop = T.parallel if parallel else T.serial

    def fetch(state, b, h, front, past) -> None:
        """Asks for the first slots of a head's state behind padding, which other layers have put out of the cache."""
        size = tvm_ffi.dtype(state.dtype).itemsize
        slot = state.shape[-1] * size
        with T.serial(T.min(((past - front) * slot + ALIGNMENT - 1) // ALIGNMENT, FETCHED_LINES)) as line:
            start = line * ALIGNMENT
            prefetch_line(state, b, h, front + start // slot, start % slot // size)

    def append(source, channels, codes, params, b, h, s, past) -> None:
        quantized = scratch(channels + 1, "uint8")
        bounds = scratch(2 * lanes, "float32")
        k.quantize(channels, lambda i: source[b, h, s, i], codes, params, quantized, bounds, (b, h, past + s))

    def load_queries(query, queries, query_sums, b, h, first, last_row) -> None:
        """The tile's queries times the softmax scale, and their sums; rows beyond the last repeat it."""
        with T.serial(tile) as r:
            row = T.Bind(T.min(first + r, last_row))
            T.buffer_store(query_sums, T.float32(0), [r])
            with T.serial(width) as d:
                x = T.Bind(query[b, h * repeat + row % repeat, row // repeat, d] * T.float32(spec.scale))
                T.buffer_store(queries, x, [r * width + d])
                T.buffer_store(query_sums, query_sums[r] + x, [r])

    def score(key_codes, key_params, block, factors, queries, query_sums, sums, scores, stride, b, h, first) -> None:
        k.transpose(key_codes, block, b, h, first)
        k.multiply(block, queries, sums)
        if scaled:
            k.factors(key_params, factors, b, h, first)
        for r in range(tile):
            y = sums[k.at(r * lanes)]
            if scaled:
                y = (y - factors[k.at(lanes)] * k.all(query_sums[r])) * factors[k.at(0)]
            T.buffer_store(scores, y, [k.at(r * stride + first)])

    def weigh(value_codes, scores, stride, sums, first, begin, count, b, h) -> None:
        row = scratch(k.value_vectors * lanes, code_type)
        for i in range(k.value_rows * k.out_vectors):
            T.buffer_store(sums, k.all(T.float32(0)), [k.at(i * lanes)])
        with T.serial(begin, count) as key:
            k.add_value(value_codes, row, scores, sums, first, stride, b, h, key)

    def store(out, sums, totals, zeros, b, h, row, local) -> None:
        inverse = T.Bind(T.Select(totals[local] > T.float32(0), T.float32(1) / totals[local], T.float32(0)))
        with T.serial(value_width) as d:
            y = sums[local % k.value_rows * (k.out_vectors * lanes) + k.channel(d)] - zeros[local]
            T.buffer_store(out, y * inverse, [b, h * repeat + row % repeat, row // repeat, d])

    def find_front(key_mask, front, b, count) -> None:
        """The first slot that is no padding; the last one where all are."""
        T.buffer_store(front, T.int32(0), [0])
        with T.While(T.And(front[0] < count - 1, key_mask[b, front[0]] == T.int64(0))):
            T.buffer_store(front, front[0] + 1, [0])

    def place(key_mask, places, b, count, blocks) -> None:
        """Where every slot stands in its sequence, see :func:`~..reference.attention_places`."""
        passed = scratch(1, "int32")
        T.buffer_store(passed, T.int32(-1), [0])
        with T.serial(blocks * lanes) as j:
            here = key_mask[b, T.min(j, count - 1)] != T.int64(0)
            if not spec.counted:
                here = T.Or(here, passed[0] >= T.int32(0))
            T.buffer_store(passed, passed[0] + T.Select(here, T.int32(1), T.int32(0)), [0])
            T.buffer_store(places, passed[0], [j])

    def attend(
        query,
        key_codes,
        key_params,
        value_codes,
        value_params,
        key_mask,
        out,
        b,
        h,
        first,
        length,
        past,
        stride,
        sinks,
        slopes,
    ) -> None:
        last_row = T.Bind(length * repeat - 1)
        # Keys up to the last query of the tile.
        count = T.Bind(past + T.min(first + tile - 1, last_row) // repeat + 1)
        blocks = T.Bind((count + lanes - 1) // lanes)
        queries = scratch(tile * width, "float32")
        query_sums = scratch(tile, "float32")
        block = scratch(k.words * lanes, k.word_type)
        factors = scratch(2 * lanes, "float32")
        sums = scratch(tile * lanes, "float32")
        lane_buffer = scratch(2 * lanes, "float32")
        totals = scratch(tile, "float32")
        zeros = scratch(tile, "float32")
        value_sums = scratch(k.value_rows * k.out_vectors * lanes, "float32")
        scores = T.alloc_buffer((tile * stride,), "float32")
        limits = T.alloc_buffer((stride,), "float32")
        value_factors = T.alloc_buffer((2 * stride,), "float32")
        first_shown = scratch(1, "int32")
        find_front(key_mask, first_shown, b, count)
        front = T.Bind(first_shown[0])
        load_queries(query, queries, query_sums, b, h, first, last_row)
        with T.serial(blocks * lanes) as j:
            shown = key_mask[b, T.min(j, count - 1)] != T.int64(0)
            T.buffer_store(limits, T.Select(shown, T.float32(SHOWN), T.float32(HIDDEN)), [j])
        places = T.alloc_buffer((stride,), "int32") if spec.places else None
        if places is not None:
            place(key_mask, places, b, count, blocks)
        if scaled:
            with T.serial(front // lanes, blocks) as block_index:
                for i, factor in enumerate(k.pairs(value_params, b, h, block_index * lanes)):
                    T.buffer_store(value_factors, factor, [k.at(i * stride + block_index * lanes)])
        with T.serial(front // lanes, blocks) as i:
            score(
                key_codes, key_params, block, factors, queries, query_sums, sums, scores, stride, b, h, i * lanes
            )  # fmt: skip
        with T.serial(tile) as r:
            slot = T.Bind(past + T.min(first + r, last_row) // repeat)
            head = h * repeat + T.min(first + r, last_row) % repeat
            sink = T.Bind(sinks[head]) if spec.sinks else None
            slope = T.Bind(slopes[head]) if spec.slopes else None
            k.soften(
                scores, limits, lane_buffer, totals, zeros, value_factors,
                r, slot, stride, front, blocks, places, sink, slope,
            )  # fmt: skip
        with T.serial(tile // k.value_rows) as part:
            weigh(value_codes, scores, stride, value_sums, part * k.value_rows, front, count, b, h)
            with T.serial(T.min(k.value_rows, T.max(last_row + 1 - first - part * k.value_rows, 0))) as r:
                local = T.Bind(part * k.value_rows + r)
                store(out, value_sums, totals, zeros, b, h, first + local, local)

    def buffers(
        batch, length, total, capacity,
        query, key, value, key_codes, key_params, value_codes, value_params, key_mask, out,
    ) -> Any:  # fmt: skip
        return (
            T.match_buffer(query, (batch, spec.heads, length, width), "float32", align=4),
            T.match_buffer(key, (batch, spec.kv_heads, length, width), "float32", align=4),
            T.match_buffer(value, (batch, spec.kv_heads, length, value_width), "float32", align=4),
            T.match_buffer(key_codes, (batch, spec.kv_heads, capacity, k.key_bytes), code_type, align=1),
            T.match_buffer(key_params, (batch, spec.kv_heads, capacity, key_parameters), "float16", align=2),
            T.match_buffer(value_codes, (batch, spec.kv_heads, capacity, k.value_bytes), code_type, align=1),
            T.match_buffer(value_params, (batch, spec.kv_heads, capacity, value_parameters), "float16", align=2),
            T.match_buffer(key_mask, (batch, total), "int64", align=8),
            T.match_buffer(out, (batch, spec.heads, length, value_width), "float32", align=4),
        )

    def steps(
        batch, length, total,
        query, key, value, key_codes, key_params, value_codes, value_params, key_mask, out, sinks=None, slopes=None,
    ) -> None:  # fmt: skip
        past = T.Bind(total - length)
        tiles = T.Bind((length * repeat + tile - 1) // tile)
        # A buffer's size must be known outside the loop that uses it, so a task has room for all keys.
        stride = T.Bind((total + lanes - 1) // lanes * lanes)
        with loop(batch * spec.kv_heads) as i:
            front = scratch(1, "int32")
            find_front(key_mask, front, i // spec.kv_heads, past + 1)
            for state in (key_codes, value_codes, *((key_params, value_params) if scaled else ())):
                fetch(state, i // spec.kv_heads, i % spec.kv_heads, front[0], past)
            with T.serial(length) as s:
                append(key, width, key_codes, key_params, i // spec.kv_heads, i % spec.kv_heads, s, past)
                append(value, value_width, value_codes, value_params, i // spec.kv_heads, i % spec.kv_heads, s, past)
        with loop(batch * spec.kv_heads * tiles) as task:
            attend(
                query, key_codes, key_params, value_codes, value_params, key_mask, out,
                task // tiles // spec.kv_heads, task // tiles % spec.kv_heads, task % tiles * tile,
                length, past, stride, sinks, slopes,
            )  # fmt: skip

    @T.prim_func(s_tir=True)
    def kernel(
        query_: T.handle,
        key_: T.handle,
        value_: T.handle,
        key_codes_: T.handle,
        key_params_: T.handle,
        value_codes_: T.handle,
        value_params_: T.handle,
        key_mask_: T.handle,
        sinks_: T.handle,
        slopes_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch = T.int32()
        length = T.int32()
        total = T.int32()
        capacity = T.int32()
        query, key, value, key_codes, key_params, value_codes, value_params, key_mask, out = buffers(
            batch, length, total, capacity,
            query_, key_, value_, key_codes_, key_params_, value_codes_, value_params_, key_mask_, out_,
        )  # fmt: skip
        sinks = T.match_buffer(sinks_, (spec.heads,), "float32", align=4)
        slopes = T.match_buffer(slopes_, (spec.heads,), "float32", align=4)
        steps(
            batch, length, total,
            query, key, value, key_codes, key_params, value_codes, value_params, key_mask, out, sinks, slopes,
        )  # fmt: skip

    if spec.per_head:
        return kernel
    *inputs, _, _, out = kernel.params
    without: Any = PrimFunc([*inputs, out], kernel.body)
    return without.with_attr(dict(kernel.attrs))
