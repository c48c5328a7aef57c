"""Short causal convolutions behind a state: fp32, the taps of a token summed in ascending order.

torch may sum in another order; no other kernel has to agree with this one bit for bit.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from ..spec import ConvolutionSpec
from ..tvm_api import PrimFunc, T


def cached_conv(spec: ConvolutionSpec, parallel: bool) -> PrimFunc:
    """``(x, weight, [bias,] state, out)``, all fp32: ``[B, C, S]``, ``[C, 1, K]``, ``[C]``, ``[B, C, K - 1]`` and
    ``[B, C, S]``.

    ``state`` gets the last inputs, in place.

    Args:
        spec: the convolution.
        parallel: shares channels out among the threads.
    """
    channels, taps, past = spec.channels, spec.taps, spec.taps - 1
    loop = T.parallel if parallel else T.serial

    def channel(x, weight, bias, state, out, row, length) -> None:
        b, c = T.Bind(row // channels), T.Bind(row % channels)

        def entry(place):
            """An element of the state and the new tokens behind it."""
            new = x[b, c, T.max(place - past, 0)]
            return T.if_then_else(place < past, state[b, c, T.min(place, past - 1)], new)

        with T.serial(length) as s:
            total = T.float32(0) if bias is None else bias[c]
            for k in range(taps):
                total = total + weight[c, 0, k] * entry(s + k)
            T.buffer_store(out, total, [b, c, s])
        # In ascending order an entry is read before it is overwritten, because there is at least one new token.
        with T.serial(past) as k:
            T.buffer_store(state, entry(length + k), [b, c, k])

    def body(x, weight, bias, state, out, batch, length) -> None:
        # A loop with one iteration is no loop to TVM, and in a launch of many kernels every thread would run its body.
        with loop(T.max(batch * channels, 2)) as row, T.If(row < batch * channels), T.Then():
            channel(x, weight, bias, state, out, row, length)

    if spec.bias:

        @T.prim_func(s_tir=True)
        def kernel(x_: T.handle, weight_: T.handle, bias_: T.handle, state_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            batch = T.int32()
            length = T.int32()
            x = T.match_buffer(x_, (batch, channels, length), "float32", align=4)
            weight = T.match_buffer(weight_, (channels, 1, taps), "float32", align=4)
            bias = T.match_buffer(bias_, (channels,), "float32", align=4)
            state = T.match_buffer(state_, (batch, channels, past), "float32", align=4)
            out = T.match_buffer(out_, (batch, channels, length), "float32", align=4)
            body(x, weight, bias, state, out, batch, length)

        return kernel

    @T.prim_func(s_tir=True)
    def plain(x_: T.handle, weight_: T.handle, state_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch = T.int32()
        length = T.int32()
        x = T.match_buffer(x_, (batch, channels, length), "float32", align=4)
        weight = T.match_buffer(weight_, (channels, 1, taps), "float32", align=4)
        state = T.match_buffer(state_, (batch, channels, past), "float32", align=4)
        out = T.match_buffer(out_, (batch, channels, length), "float32", align=4)
        body(x, weight, None, state, out, batch, length)

    return plain
