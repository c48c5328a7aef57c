"""The kernel that ends a step: it chooses the next token, the most likely one or one that is drawn.

A drawn token is the one of :func:`~...sampling.drawn`, to the bit: shares are integers, so it does not matter in which
order threads add them. Nothing is sorted. What a logit must be at least for those that are as great to reach a sum is
found by narrowing a range of logits, in :data:`WAYS` parts at a time; of equal logits the first ones are counted.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
# pyright: reportInvalidTypeForm=false
import struct
from typing import Any

from ...sampling import POWERS, share_bits
from ...tvm_api import PrimFunc, T
from ..limits import WARP

PARAMETERS = ("attention_mask", "input_ids", "logits", "past", "position_ids", "sampling", "shares")
"""Buffers of the kernel."""

WAYS = 8
"""Parts that a range is cut into at once: a warp adds up seven sums, and one that is always 0, in nine shuffles."""

_MOST_THREADS = 1024
_ALL_LANES = 0xFFFFFFFF
_INFINITY = 0x7F800000
_NO_NUMBER = 0x7FFFFFFF
_STEPS = (1, 2, 4, 8, 16)


def _call(name: str, *arguments: Any, dtype: str) -> Any:
    return T.call_pure_extern(dtype, name, *arguments)


def _constant(x: float) -> Any:
    """A number by its bits: TVM's text rounds it."""
    (bits,) = struct.unpack("<q", struct.pack("<d", x))
    return _call("__longlong_as_double", T.int64(bits), dtype="float64")


def _key(logit: Any) -> Any:
    """An int32 in the order of logits; both zeros have one, and what is no number has the greatest."""
    bits = _call("__float_as_int", logit, dtype="int32")
    size = T.bitwise_and(bits, T.int32(_NO_NUMBER))
    return T.Select(size > T.int32(_INFINITY), T.int32(_NO_NUMBER), T.Select(bits < 0, -size, size))


def _logit(key: Any) -> Any:
    """A logit that has a key."""
    negative = T.bitwise_or(T.cast(-key, "uint32"), T.uint32(0x80000000))
    return _call("__uint_as_float", T.Select(key < 0, negative, T.cast(key, "uint32")), dtype="float32")


def _other(value: Any, step: int) -> Any:
    return T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, step, WARP, WARP)


def threads(vocabulary: int) -> int:
    """Threads of the one block: one a token, as far as a block can have so many. Most of the time goes by waiting for
    logits."""
    return min(-(-vocabulary // WARP) * WARP, _MOST_THREADS)


def next_token(vocabulary: int) -> PrimFunc:
    """:data:`PARAMETERS`: ends a step and begins the next one.

    The token that is chosen becomes the input; position and length grow by one, and the mask shows the slot that the
    token will take, where there is one.

    ``sampling``, float64 ``[4]``, is :attr:`~...sampling.Draw.scale`, ``top_k``, ``top_p`` and ``place`` of a draw.
    Where the first one is 0, or the greatest logit is not finite, the token is that of the greatest logit, the first of
    equal ones; what is no number counts as greater than all numbers. ``shares``, int64 ``[V]``, is for the kernel
    alone.
    """
    bits = share_bits(vocabulary)
    block = threads(vocabulary)
    warps = block // WARP
    turns = -(-vocabulary // block)

    def greatest_of(logits: Any, sums: Any, parts: Any, thread: Any) -> None:
        """In ``sums[0]``: the greatest key and, in its lower half, how far from the end its first token is."""

        def in_warp() -> None:
            for step in _STEPS:
                T.buffer_store(sums, T.max(sums[0], _other(sums[0], step)), [0])

        T.buffer_store(sums, T.int64(-(1 << 63)), [0])
        with T.serial(turns) as turn:
            token = T.Bind(turn * block + thread)
            with T.If(token < vocabulary), T.Then():
                key = T.cast(_key(logits[0, 0, token]), "int64") * T.int64(1 << 32)
                T.buffer_store(sums, T.max(sums[0], key + T.cast(vocabulary - token, "int64")), [0])
        in_warp()
        with T.If(thread % WARP == 0), T.Then():
            T.buffer_store(parts, sums[0], [thread // WARP])
        T.evaluate(T.tvm_storage_sync("shared"))
        T.buffer_store(sums, parts[thread % WARP % warps], [0])
        in_warp()
        T.evaluate(T.tvm_storage_sync("shared"))

    def add_up(sums: Any, parts: Any, thread: Any) -> None:
        """Every thread's sums become those of all threads together.

        In three steps a lane gives half of its sums to another one for half of that one's; then each has one of the
        :data:`WAYS`, of eight lanes, and the number of the sum is that of the lane, its last three bits reversed.
        """
        lane, warp = thread % WARP, thread // WARP

        def lane_of(number: int) -> int:
            return int(f"{number:03b}"[::-1], 2)

        def in_warp() -> None:
            for step in _STEPS:
                half = WAYS // 2 // step
                for i in range(half):
                    upper = T.bitwise_and(lane, step) != 0
                    given = T.Bind(T.Select(upper, sums[i], sums[i + half]))
                    kept = T.Bind(T.Select(upper, sums[i + half], sums[i]))
                    T.buffer_store(sums, kept + _other(given, step), [i])
                if not half:
                    T.buffer_store(sums, sums[0] + _other(sums[0], step), [0])

        in_warp()
        with T.If(lane < WAYS), T.Then():
            T.buffer_store(parts, sums[0], [lane * warps + warp])
        T.evaluate(T.tvm_storage_sync("shared"))
        for i in range(WAYS):
            part = parts[lane_of(i) * warps + lane % warps]
            T.buffer_store(sums, T.Select(lane < warps, part, T.int64(0)), [i])
        in_warp()
        T.buffer_store(sums, sums[0], [WAYS])
        for i in range(WAYS):
            T.buffer_store(sums, T.tvm_warp_shuffle(T.uint32(_ALL_LANES), sums[WAYS], lane_of(i), WARP, WARP), [i])
        T.evaluate(T.tvm_storage_sync("shared"))

    def share(logit: Any, greatest: Any, scale: Any, exponent: Any, power: Any, found: Any) -> None:
        """:func:`~...sampling.shares` of one logit."""
        T.buffer_store(found, T.int64(0), [0])
        T.buffer_store(exponent, (T.cast(logit, "float64") - T.cast(greatest, "float64")) * scale, [0])
        with T.If(exponent[0] >= T.float64(-(bits + 1))), T.Then():
            T.buffer_store(exponent, _call("floor", exponent[0] + T.float64(0.5), dtype="float64"), [1])
            T.buffer_store(exponent, exponent[0] - exponent[1], [0])
            T.buffer_store(power, _constant(POWERS[-1]), [0])
            for coefficient in POWERS[-2::-1]:
                T.buffer_store(power, power[0] * exponent[0] + _constant(coefficient), [0])
            whole = T.cast(power[0] * _constant(2.0**bits), "int64")
            T.buffer_store(found, T.shift_right(whole, T.cast(-exponent[1], "int64")), [0])

    def narrow(
        logits: Any, shares: Any, counts: bool, goal: Any, span: Any, borders: Any, sums: Any, parts: Any, thread: Any
    ) -> None:
        """From a range of keys, the greatest key at which tokens of that key or a greater one reach a goal.

        Args:
            logits, shares: of all tokens.
            counts: whether tokens count, not their shares.
            goal: at most what those reach that have the least key of the range or a greater one.
            span: the range's least and greatest key, and what those behind the greatest reach, which is less than the
                goal; in the end both keys are the one that is sought.
            borders, sums: of a thread's own, at least WAYS.
            parts: shared by all threads.
        """
        with T.While(span[0] < span[1]):
            step = T.Bind((span[1] - span[0] + T.int64(WAYS)) // T.int64(WAYS))
            for i in range(WAYS - 1):
                border = T.min(span[0] + step * T.int64(i + 1), span[1] + T.int64(1))
                T.buffer_store(borders, T.cast(border, "int32"), [i])
                T.buffer_store(sums, T.int64(0), [i])
            with T.serial(turns) as turn:
                token = T.Bind(turn * block + thread)
                with T.If(token < vocabulary), T.Then():
                    key = T.Bind(_key(logits[0, 0, token]))
                    part = T.Bind(T.int64(1) if counts else shares[token])
                    for i in range(WAYS - 1):
                        with T.If(key >= borders[i]), T.Then():
                            T.buffer_store(sums, sums[i] + part, [i])
            T.buffer_store(sums, T.int64(0), [WAYS - 1])
            add_up(sums, parts, thread)
            # Borders ascend, so sums reach the goal up to some border.
            for i in range(WAYS - 1):
                last = T.Bind(T.cast(borders[i], "int64") - T.int64(1))
                with T.If(sums[i] >= goal):
                    with T.Then():
                        T.buffer_store(span, last + T.int64(1), [0])
                    with T.Else(), T.If(last < span[1]), T.Then():
                        T.buffer_store(span, last, [1])
                        T.buffer_store(span, sums[i], [2])

    def numbered(logits: Any, key: Any, number: Any, chosen: Any, own: Any, parts: Any, thread: Any) -> None:
        """Of the tokens with a key, the one that so many come before. Every thread looks at tokens side by side."""

        def of_key(work: Any) -> None:
            with T.serial(turns) as turn:
                token = T.Bind(thread * turns + turn)
                with T.If(token < vocabulary), T.Then(), T.If(_key(logits[0, 0, token]) == key), T.Then():
                    work(token)

        lane, warp = thread % WARP, thread // WARP
        T.buffer_store(own, 0, [0])
        of_key(lambda token: T.buffer_store(own, own[0] + 1, [0]))
        T.buffer_store(own, own[0], [1])
        for step in _STEPS:
            T.buffer_store(own, own[1] + _other(own[1], step), [1])
        with T.If(lane == 0), T.Then():
            T.buffer_store(parts, T.cast(own[1], "int64"), [warp])
        T.evaluate(T.tvm_storage_sync("shared"))
        T.buffer_store(own, 0, [1])
        for other in range(WARP):
            before = T.Bind(T.tvm_warp_shuffle(T.uint32(_ALL_LANES), own[0], other, WARP, WARP))
            with T.If(lane > other), T.Then():
                T.buffer_store(own, own[1] + before, [1])
        with T.serial(warps) as other, T.If(other < warp), T.Then():
            T.buffer_store(own, own[1] + T.cast(parts[other], "int32"), [1])

        def found(token: Any) -> None:
            with T.If(T.cast(own[1], "int64") == number), T.Then():
                T.buffer_store(chosen, token, [0])
            T.buffer_store(own, own[1] + 1, [1])

        of_key(found)
        T.evaluate(T.tvm_storage_sync("shared"))

    def draw(
        logits: Any, shares: Any, sampling: Any, greatest: Any, thread: Any, chosen: Any, parts: Any, local: Any
    ) -> None:
        """The token of :func:`~...sampling.drawn`."""
        span, borders, sums, exponent, power, found, goal, own = local
        scale = T.Bind(sampling[0])
        top_k = T.Bind(sampling[1])

        def part_of(key: Any) -> None:
            share(_logit(key), _logit(greatest), scale, exponent, power, found)

        # What a logit must be at least.
        T.buffer_store(span, T.int64(-_INFINITY), [0])
        with T.If(T.And(top_k > T.float64(0), top_k < T.float64(vocabulary))), T.Then():
            T.buffer_store(span, T.cast(greatest, "int64"), [1])
            T.buffer_store(span, T.int64(0), [2])
            T.buffer_store(goal, T.cast(top_k, "int64"), [0])
            narrow(logits, shares, True, goal[0], span, borders, sums, parts, thread)
        for i in range(WAYS):
            T.buffer_store(sums, T.int64(0), [i])
        with T.serial(turns) as turn:
            token = T.Bind(turn * block + thread)
            with T.If(token < vocabulary), T.Then():
                key = T.Bind(_key(logits[0, 0, token]))
                part_of(key)
                with T.If(T.cast(key, "int64") < span[0]), T.Then():
                    T.buffer_store(found, T.int64(0), [0])
                T.buffer_store(shares, found[0], [token])
                T.buffer_store(sums, sums[0] + found[0], [0])
        add_up(sums, parts, thread)
        # goal: what is to be reached, and the whole.
        T.buffer_store(goal, sums[0], [1])
        part = _call("ceil", sampling[2] * T.cast(goal[1], "float64"), dtype="float64")
        T.buffer_store(goal, T.max(T.int64(1), T.min(T.cast(part, "int64"), goal[1])), [0])
        T.buffer_store(span, T.cast(greatest, "int64"), [1])
        T.buffer_store(span, T.int64(0), [2])
        with T.If(goal[0] < goal[1]), T.Then():
            narrow(logits, shares, False, goal[0], span, borders, sums, parts, thread)
            part_of(T.cast(span[0], "int32"))
            count = (goal[0] - span[2] + found[0] - T.int64(1)) // found[0]
            T.buffer_store(goal, span[2] + count * found[0], [1])
            T.buffer_store(span, T.cast(greatest, "int64"), [1])
            T.buffer_store(span, T.int64(0), [2])
        place = T.cast(sampling[3] * T.cast(goal[1], "float64"), "int64")
        T.buffer_store(goal, T.min(place, goal[1] - T.int64(1)) + T.int64(1), [0])
        narrow(logits, shares, False, goal[0], span, borders, sums, parts, thread)
        part_of(T.cast(span[0], "int32"))
        T.buffer_store(goal, (goal[0] - T.int64(1) - span[2]) // found[0], [0])
        numbered(logits, T.cast(span[0], "int32"), goal[0], chosen, own, parts, thread)

    @T.prim_func(s_tir=True)
    def kernel(
        attention_mask_: T.handle,
        input_ids_: T.handle,
        logits_: T.handle,
        past_: T.handle,
        position_ids_: T.handle,
        sampling_: T.handle,
        shares_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        capacity = T.int32()
        attention_mask = T.match_buffer(attention_mask_, (1, capacity), "int64")
        input_ids = T.match_buffer(input_ids_, (1, 1), "int64")
        logits = T.match_buffer(logits_, (1, 1, vocabulary), "float32")
        past = T.match_buffer(past_, (1,), "int32")
        position_ids = T.match_buffer(position_ids_, (1, 1), "int64")
        sampling = T.match_buffer(sampling_, (4,), "float64")
        shares = T.match_buffer(shares_, (vocabulary,), "int64")
        T.launch_thread("blockIdx.x", 1)
        thread = T.launch_thread("threadIdx.x", block)
        parts = T.alloc_buffer((WAYS * warps,), "int64", scope="shared")
        chosen = T.alloc_buffer((1,), "int32", scope="shared")
        span = T.alloc_buffer((3,), "int64", scope="local")
        borders = T.alloc_buffer((WAYS,), "int32", scope="local")
        sums = T.alloc_buffer((WAYS + 1,), "int64", scope="local")
        exponent = T.alloc_buffer((2,), "float64", scope="local")
        power = T.alloc_buffer((1,), "float64", scope="local")
        found = T.alloc_buffer((1,), "int64", scope="local")
        goal = T.alloc_buffer((2,), "int64", scope="local")
        own = T.alloc_buffer((2,), "int32", scope="local")
        token = T.alloc_buffer((1,), "int32", scope="local")
        greatest_of(logits, sums, parts, thread)
        greatest: T.let = T.cast(T.shift_right(sums[0], T.int64(32)), "int32")
        token[0] = vocabulary - T.cast(T.bitwise_and(sums[0], T.int64(0xFFFFFFFF)), "int32")
        if sampling[0] > T.float64(0) and greatest < _INFINITY and greatest > -_INFINITY:
            draw(
                logits, shares, sampling, greatest, thread, chosen, parts,
                (span, borders, sums, exponent, power, found, goal, own),
            )  # fmt: skip
            token[0] = chosen[0]
        if thread == 0:
            input_ids[0, 0] = T.cast(token[0], "int64")
            position_ids[0, 0] = position_ids[0, 0] + T.int64(1)
            slot: T.let = past[0] + 1
            past[0] = slot
            if slot < capacity:
                attention_mask[0, slot] = T.int64(1)

    return kernel
