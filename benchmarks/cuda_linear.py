"""Times the CUDA kernels of W(1+1) linears on this machine's GPU, against fp16 matmul where torch has CUDA.

    python -m benchmarks.cuda_linear [--group 128] [--act-bits 4] [--tokens 1 16 256] [--shapes 4096x4096 14336x4096]

Every kernel is proven bit-exact on the device before it is timed. A time is the median over replays of a graph of
launches, divided by their number. Several copies of the weights are used in turn, more than the last-level cache holds,
as in decoding, where no layer's weights are still cached when their turn comes again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from ctypes import c_int, c_uint64

import torch
from lbllm_compile.codegen.cuda.device import Device, prove_on_device
from lbllm_compile.codegen.cuda.dp4a import pack_bit_weight, pitch
from lbllm_compile.codegen.cuda.emit import emit_cuda
from lbllm_compile.codegen.cuda.kernel import CudaKernel
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.format import QuantizedWeight, codes_to_planes
from lbllm_compile.codegen.spec import LinearSpec

CACHE_BYTES = 256 << 20
"""More than any GPU's last-level cache holds."""

LAUNCHES = 40
"""Launches of one measurement."""


def time_kernel(device: Device, kernel: CudaKernel, weight: QuantizedWeight, tokens: int) -> float:
    """Microseconds of one launch of a proven kernel."""
    spec = kernel.spec
    assert isinstance(spec, LinearSpec)
    function = device.load(kernel.cubin, kernel.symbol)
    packed = pack_bit_weight(weight)
    bytes_of_weight = sum(t.numel() * t.element_size() for t in packed.values())
    copies = [
        {name: device.upload(t) for name, t in packed.items()} for _ in range(max(2, CACHE_BYTES // bytes_of_weight))
    ]
    buffers = {
        "values": device.upload(torch.randint(-15, 16, (tokens, pitch(spec.in_features)), dtype=torch.int8)),
        "x_scale": device.upload(torch.rand(tokens, spec.x_scales)),
        "output": device.allocate(4 * tokens * spec.out_features),
    }
    arguments: list[list[c_uint64 | c_int]] = [
        [c_int(tokens) if name == "tokens" else c_uint64((copy | buffers)[name]) for name in kernel.parameters]
        for copy in copies
    ]
    grid = kernel.grid(tokens)

    def work() -> None:
        for i in range(LAUNCHES):
            device.launch(function, grid, kernel.block, arguments[i % len(arguments)])

    return device.microseconds(work) / LAUNCHES


def time_half(spec: LinearSpec, tokens: int) -> float | None:
    """Microseconds of torch's fp16 matmul of the same shape, ``None`` where torch has no CUDA."""
    if not torch.cuda.is_available():
        return None
    half = {"device": "cuda", "dtype": torch.float16}
    count = max(2, CACHE_BYTES // (2 * spec.out_features * spec.in_features))
    weights = [torch.randn(spec.out_features, spec.in_features, **half) for _ in range(count)]
    x, out = torch.randn(tokens, spec.in_features, **half), torch.empty(tokens, spec.out_features, **half)
    torch.mm(x, weights[0].T, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            torch.mm(x, weights[i % count].T, out=out)
    times = []
    for _ in range(16):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[1:]) / LAUNCHES


def random_weight(spec: LinearSpec) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    n, k, groups = spec.out_features, spec.in_features, spec.groups
    codes = torch.randint(4, (n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-127, 128, (n, groups, 4), generator=generator).sort(-1).values.to(torch.int8)
    return QuantizedWeight(*codes_to_planes(codes), levels, torch.rand(n, groups).half(), k, spec.group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--act-bits", type=int, default=4)
    options = parser.parse_args()
    with Device() as device:
        print(f"{device.name} ({device.arch}), group {options.group}, A{options.act_bits}, microseconds")
        print(f"{'shape':>14} {'tokens':>6} {'form':>5} {'kernel':>9} {'GB/s':>7} {'fp16':>9} {'ratio':>6}")
        for shape in options.shapes:
            n, k = map(int, shape.split("x"))
            spec = LinearSpec("bit", n, k, options.group, options.act_bits)
            weight = random_weight(spec)
            kernels = {kernel.form: kernel for kernel in emit_cuda([spec], [], (device.arch,))}
            for kernel in kernels.values():
                prove_on_device(kernel, device)
            for tokens in options.tokens:
                kernel = kernels["gemv" if tokens == 1 else "gemm"]
                ours, half = time_kernel(device, kernel, weight, tokens), time_half(spec, tokens)
                bandwidth = weight.stored_bits / 8 / ours / 1e3
                others = f"{half:9.1f} {half / ours:6.2f}" if half else f"{'-':>9} {'-':>6}"
                print(f"{shape:>14} {tokens:>6} {kernel.form:>5} {ours:9.1f} {bandwidth:7.0f} {others}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LbllmError as error:
        sys.exit(str(error))
