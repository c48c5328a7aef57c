"""Attention over a quantized KV cache, for one sequence: of one token, or of a part of a prompt.

Of one token a thread block takes a KV head, or a share of the keys of one.

The block quantizes the new key and value, stores them, and lets its query heads attend one after the other. Keys are
taken in tiles of one a thread; what is behind a tile is a running maximum, a running sum and one weighted value a
channel (online softmax, Milakov and Gimelshein, arXiv 1805.02867), so a context may have any length.

One block a head leaves most of a device idle, and a long context keeps it busy for long. So the keys are shared out
over several blocks (:class:`~.heads.Split`, as in Flash-Decoding), each of which leaves its maximum, its sum and its
weighted values, and a second launch merges these in order (:func:`split_attention`, :func:`merge`). How the keys are
shared out depends on how many there are, and on nothing else. Few are one share, which gives the bits of
:func:`attention`: so a token's attention does not depend on how many slots the KV state has.

Stored codes and parameters are exactly :func:`~...reference.quantize_kv`'s. The output agrees with
:func:`~...reference.cached_attention` up to the order of fp32 sums. The number of past tokens is read from the
device's memory: a launch has the same arguments whatever it is.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
# pyright: reportInvalidTypeForm=false
from ...spec import AttentionSpec
from ...tvm_api import PrimFunc, T
from .heads import THREADS, WARPS, Heads, Split


def attention(spec: AttentionSpec) -> PrimFunc:
    """``(query, key, value, key_codes, key_params, value_codes, value_params, key_mask, past, [sinks,] out)``, of one
    token, without sharing keys out: a thread block takes a KV head.

    Parameters are declared in alphabetical order.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, kv_heads, repeat, turns = Heads(spec), spec.kv_heads, spec.repeat, Heads(spec).turns
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
        peaks = T.alloc_buffer((WARPS,), "float32", scope="shared")
        parts = T.alloc_buffer((WARPS,), "float32", scope="shared")
        own = T.alloc_buffer((5,), "float32", scope="local")
        slot: T.let = past[0]
        state = T.meta_var((key_codes, key_params, value_codes, value_params))
        heads.store((key, value), state, head, 0, slot, thread, (new_key, new_value), own)
        T.tvm_storage_sync("shared")
        for r in T.serial(repeat):
            heads.attend(
                query, key_codes, key_params, value_codes, value_params, key_mask, sinks if spec.sinks else None, out,
                head, head * repeat + r, 0, slot, thread, (asked, scores, sums, peaks, parts), own,
            )  # fmt: skip

    return kernel


def split_attention(spec: AttentionSpec, split: Split) -> PrimFunc:
    """``(query, key, value, key_codes, key_params, value_codes, value_params, key_mask, past, [sinks,] shares)``, of
    one token: a thread block takes one share of the keys of a KV head.

    ``shares`` is float32 of the shape :meth:`~.heads.Split.left`, for :func:`merge`; of a share that there is not,
    nothing is written. The block of the last share stores the new key and value.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, kv_heads = Heads(spec, split), spec.kv_heads
    turns, most = heads.turns, split.shares
    key_width, value_width = spec.key_width, spec.value_width

    @T.prim_func(s_tir=True)
    def kernel(
        key_: T.handle,
        key_codes_: T.handle,
        key_mask_: T.handle,
        key_params_: T.handle,
        past_: T.handle,
        query_: T.handle,
        shares_: T.handle,
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
        past = T.match_buffer(past_, (1,), "int32")
        query = T.match_buffer(query_, (1, spec.heads, 1, key_width), "float32")
        shares = T.match_buffer(shares_, split.left(spec), "float32")
        sinks = T.match_buffer(sinks_, (spec.heads,), "float32")
        value = T.match_buffer(value_, (1, kv_heads, 1, value_width), "float32")
        value_codes = T.match_buffer(value_codes_, *heads.codes(value_width, capacity))
        value_params = T.match_buffer(value_params_, *heads.params(value_width, capacity))
        block = T.launch_thread("blockIdx.x", kv_heads * most)
        thread = T.launch_thread("threadIdx.x", THREADS)
        new_key = T.alloc_buffer((key_width,), "float32", scope="shared")
        new_value = T.alloc_buffer((value_width,), "float32", scope="shared")
        asked = T.alloc_buffer((key_width,), "float32", scope="shared")
        scores = T.alloc_buffer((THREADS,), "float32", scope="shared")
        sums = T.alloc_buffer((turns,), "float32", scope="local")
        peaks = T.alloc_buffer((WARPS,), "float32", scope="shared")
        parts = T.alloc_buffer((WARPS,), "float32", scope="shared")
        own = T.alloc_buffer((5,), "float32", scope="local")
        into = T.alloc_buffer((3,), "int32", scope="local")
        head: T.let = block // most
        share: T.let = block % most
        slot: T.let = past[0]
        heads.split_block(
            (query, key, value), (key_codes, key_params, value_codes, value_params, key_mask),
            sinks if spec.sinks else None, shares, head, share, slot, thread, (new_key, new_value),
            (asked, scores, sums, peaks, parts), own, into,
        )  # fmt: skip

    return kernel


def merge(spec: AttentionSpec, split: Split) -> PrimFunc:
    """``(past, shares, out)``: the output of :func:`split_attention`'s shares. A thread block takes one head."""
    heads, value_width = Heads(spec, split), spec.value_width
    turns = heads.turns

    @T.prim_func(s_tir=True)
    def kernel(out_: T.handle, past_: T.handle, shares_: T.handle):
        T.func_attr({"tirx.noalias": True})
        out = T.match_buffer(out_, (1, spec.heads, 1, value_width), "float32")
        past = T.match_buffer(past_, (1,), "int32")
        shares = T.match_buffer(shares_, split.left(spec), "float32")
        row = T.launch_thread("blockIdx.x", spec.heads)
        thread = T.launch_thread("threadIdx.x", THREADS)
        sums = T.alloc_buffer((turns,), "float32", scope="local")
        own = T.alloc_buffer((5,), "float32", scope="local")
        into = T.alloc_buffer((3,), "int32", scope="local")
        heads.merge_block(shares, out, row, past[0], thread, sums, own, into)

    return kernel


def append_part(spec: AttentionSpec, tokens: int) -> PrimFunc:
    """``(key, value, key_codes, key_params, value_codes, value_params, past)``: stores the keys and values of a part.

    ``past`` is int32 ``[2]``: the number of past tokens, and how many of the part's are none of its padding. These are
    the last ones; nothing is stored for the others. A thread block takes one token for one KV head.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, kv_heads, key_width, value_width = Heads(spec), spec.kv_heads, spec.key_width, spec.value_width

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
        state = T.meta_var((key_codes, key_params, value_codes, value_params))
        heads.store((key, value), state, head, token, slot, thread, (new_key, new_value), own, token >= padding)

    return kernel


def attend_part(spec: AttentionSpec, tokens: int) -> PrimFunc:
    """``(query, key_codes, key_params, value_codes, value_params, key_mask, past, [sinks,] out)``: attention of a part
    over what :func:`append_part` has stored.

    Each token sees itself and those before it, as :func:`attention` would have it, to the bit; the output of padding is
    0. A thread block takes one token for one head: a part has enough of them, and no keys are shared out.

    Raises:
        UntranslatableError: there is no CUDA kernel for ``spec``.
    """
    heads, repeat, turns = Heads(spec), spec.repeat, Heads(spec).turns
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
        peaks = T.alloc_buffer((WARPS,), "float32", scope="shared")
        parts = T.alloc_buffer((WARPS,), "float32", scope="shared")
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
