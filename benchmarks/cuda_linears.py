"""Linears on a GPU: every schedule of a kernel, the best of them against cuBLAS and torch, and copy bandwidth.

Copies of the weights are used in turn, four times as large as the L2 cache in all, as in decoding, where no layer's
weights are still cached when their turn comes again; writing over the cache between two launches instead would be
timed, too. A time is that of a replayed graph of launches between two events, divided by their number. Schedules are
looked at once; the fastest, the default, and what they are compared with then take turns. The kernels give equal bits,
which is checked before any is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.errors import KernelError

from lbllm_compile.bench.turns import Runs, alternate

from . import cuda_packed, cuda_peers, cuda_timing
from .cuda_packed import PackedKernel
from .cuda_timing import Bench, attempted

COPY, CUBLAS, TORCH, TORCH_COMPILED = "copy", "cuBLAS bf16", "torch bf16", "torch bf16, compiled"

KERNELS = "kernels"


class Operands:
    """A linear's buffers on a device, drawn at random: the weight in copies, activations of some tokens, an output."""

    def __init__(self, bench: Bench, kernel: PackedKernel, tokens: int):
        draw = np.random.default_rng(0)
        driver = bench.driver
        weight: dict[str, np.ndarray] = {
            name: np.frombuffer(draw.bytes(size), np.uint8) for name, size in kernel.sizes.items()
        }
        scales = draw.uniform(0.5e-3, 1.5e-3, kernel.sizes["w_scale"] // 2).astype(np.float16)
        weight["w_scale"] = scales
        largest = (1 << (kernel.act_bits - 1)) - 1
        values = np.zeros((tokens, kernel.pitch), np.int8)
        values[:, : kernel.shape[1]] = draw.integers(-largest, largest + 1, (tokens, kernel.shape[1]))
        self._shape = (tokens, kernel.shape[0])
        first = {name: bench.upload(part) for name, part in weight.items()}
        self._shared = {
            "values": bench.upload(values),
            "x_scale": bench.upload(draw.random((tokens, kernel.x_scales), np.float32)),
            "output": driver.allocate(4 * tokens * kernel.shape[0]),
        }
        self.weights = [first]
        for _ in range(bench.copies(sum(kernel.sizes.values())) - 1):
            copy = {name: driver.allocate(part.nbytes) for name, part in weight.items()}
            driver.synchronize()
            for name, part in weight.items():
                driver.call("cuMemcpyDtoDAsync_v2", copy[name], first[name], part.nbytes, bench.stream)
            self.weights.append(copy)
        driver.synchronize()
        self._bench = bench

    def launch(self, function: Any, kernel: PackedKernel, tokens: int) -> Callable[[int], None]:
        """Starts a kernel on the copy of a number."""
        grid = kernel.grid(tokens)
        arguments = [kernel.arguments(weight | self._shared, tokens) for weight in self.weights]

        def start(number: int) -> None:
            self._bench.driver.launch(function, grid, kernel.block, arguments[number % len(arguments)])

        return start

    def output(self) -> np.ndarray:
        """What the last launch gave."""
        return self._bench.download(self._shared["output"], self._shape, np.float32)

    def clear(self) -> None:
        """Fills the output with NaN."""
        self._bench.driver.call("cuMemsetD8_v2", self._shared["output"], 0xFF, 4 * self._shape[0] * self._shape[1])
        self._bench.driver.synchronize()

    def free(self) -> None:
        """Gives the memory back."""
        for buffers in (*self.weights, self._shared):
            self._bench.driver.free(buffers.values())


@contextmanager
def folder_of(packed: Path | None, arch: str) -> Iterator[Path]:
    """The folder of packed kernels; without one they are made here for a device's architecture."""
    if packed is not None:
        yield packed / KERNELS
        return
    from .cuda_pack import SCHEDULES, SHAPES, pack_kernels  # TVM and torch take seconds to import

    with tempfile.TemporaryDirectory(prefix="lbllm-cuda-") as made:
        pack_kernels(Path(made) / KERNELS, SHAPES, [arch], SCHEDULES)
        yield Path(made) / KERNELS


def measured(bench: Bench, folder: Path, form: str, counts: Sequence[int]) -> dict[str, Any]:
    """Results of every shape and number of tokens, JSON-able.

    Args:
        bench: the device.
        folder: of packed kernels.
        form: ``"gemv"`` or ``"gemm"``.
        counts: numbers of tokens.

    Raises:
        LbllmError: there are no kernels for the device.
    """
    kernels, left_out = cuda_packed.read_index(folder, bench.driver.arch, form)
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    cases = []
    cublas = attempted(absent, CUBLAS, lambda: cuda_peers.Cublas(bench))
    device = attempted(absent, TORCH, cuda_peers.torch_device)
    for shape, group in dict.fromkeys((kernel.shape, kernel.group) for kernel in kernels):
        own = [kernel for kernel in kernels if (kernel.shape, kernel.group) == (shape, group)]
        for tokens in counts:
            name = f"{shape[0]}x{shape[1]}:{group}, {tokens} tokens"
            found = attempted(failed, name, lambda o=own, t=tokens: _case(bench, folder, o, t, cublas, device))
            if found is not None:
                cases.append(found)
    if cublas is not None:
        cublas.close()
    return {"cases": cases, "absent": absent, "failed": failed, "left_out": left_out}


def _case(
    bench: Bench, folder: Path, kernels: Sequence[PackedKernel], tokens: int, cublas: Any, device: str | None
) -> dict[str, Any]:
    """One shape and number of tokens."""
    rows, columns = kernels[0].shape
    absent: dict[str, str] = {}
    operands = Operands(bench, kernels[0], tokens)
    freed: list[int] = []
    try:
        launches = {kernel.name: _proven(bench, folder, kernel, operands, tokens) for kernel in kernels}
        _agree(bench, launches, operands)
        looked = {name: bench.replayed(launch) for name, launch in launches.items()}
        first = {name: min(seconds) for name, seconds in alternate(looked, quick=True).items()}
        best, default = min(first, key=lambda name: first[name]), kernels[0].name
        moved, copy, buffers = bench.copying()
        freed += buffers
        runs: dict[str, Runs] = {name: looked[name] for name in dict.fromkeys((best, default))}
        runs[COPY] = copy
        if cublas is not None:
            made = attempted(absent, CUBLAS, lambda: cublas.linear(rows, columns, tokens))
            if made is not None:
                runs[CUBLAS] = made[0]
                freed += made[1]
        if device is not None:
            for name, compiled in ((TORCH, False), (TORCH_COMPILED, True)):
                run = attempted(
                    absent,
                    name,
                    lambda c=compiled: cuda_peers.torch_linear(bench, rows, columns, tokens, compiled=c, device=device),
                )
                if run is not None:
                    runs[name] = run
        times = alternate(runs, bench.quick)
    finally:
        bench.driver.synchronize()
        operands.free()
        bench.driver.free(freed)
    bandwidth = moved / float(np.median(times[COPY]))
    results = [_row(kernels, name, seconds, bandwidth, 2 * rows * columns) for name, seconds in times.items()]
    medians = {row["contender"]: row["median_microseconds"] for row in results if row["contender"] != COPY}
    return {
        "shape": [rows, columns],
        "group": kernels[0].group,
        "act_bits": kernels[0].act_bits,
        "tokens": tokens,
        "copies": len(operands.weights),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "best": best,
        "default": default,
        "results": results,
        "multiples_of_best": {name: median / medians[best] for name, median in medians.items()},
        "schedules_microseconds": {name: 1e6 * seconds for name, seconds in first.items()},
        "absent": absent,
    }


def _row(
    kernels: Sequence[PackedKernel], name: str, seconds: Sequence[float], bandwidth: float, dense: int
) -> dict[str, Any]:
    if name == COPY:
        return cuda_timing.seconds_row(name, seconds)
    own = next((kernel for kernel in kernels if kernel.name == name), None)
    size = own.stored_bytes if own else dense
    achieved = size / float(np.median(seconds))
    return cuda_timing.seconds_row(
        name,
        seconds,
        weight_bytes=size,
        gigabytes_per_second=achieved / 1e9,
        share_of_copy_bandwidth=achieved / bandwidth,
        **({"registers": own.registers} if own else {}),
    )


def _proven(bench: Bench, folder: Path, kernel: PackedKernel, operands: Operands, tokens: int) -> Callable[[int], None]:
    """Starts a kernel that has passed its cases on this device."""
    function = cuda_packed.load(bench.driver, folder, kernel)
    if kernel.proof:
        prove(bench, folder, kernel, function)
    return operands.launch(function, kernel, tokens)


def _agree(bench: Bench, launches: dict[str, Callable[[int], None]], operands: Operands) -> None:
    """Checks that all schedules give equal bits.

    Raises:
        KernelError: naming one that does not.
    """
    expected: bytes | None = None
    for name, launch in launches.items():
        operands.clear()
        launch(0)
        bench.driver.synchronize()
        found = operands.output()
        if not np.isfinite(found).all():
            raise KernelError(f"{name} leaves outputs that are infinite or no numbers")
        if expected is not None and found.tobytes() != expected:
            raise KernelError(f"{name} gives other bits than {next(iter(launches))}")
        expected = found.tobytes()


def prove(bench: Bench, folder: Path, kernel: PackedKernel, function: Any) -> int:
    """Runs a kernel's cases against the reference, bit for bit.

    Returns:
        How many there are.

    Raises:
        KernelError: a result differs.
    """
    driver, count = bench.driver, 0
    for case in cuda_packed.read_cases(folder / kernel.proof):
        buffers = {name: driver.allocate(size) for name, size in case.sizes.items()}
        buffers["output"] = driver.allocate(4 * case.output[0] * case.output[1])
        driver.call("cuMemsetD8_v2", buffers["output"], 0xFF, 4 * case.output[0] * case.output[1])
        driver.synchronize()
        for name, offset, part in case.parts:
            driver.call("cuMemcpyHtoD_v2", buffers[name] + offset, part.ctypes.data, part.nbytes)
        driver.launch(function, case.grid, kernel.block, kernel.arguments(buffers, case.tokens))
        driver.synchronize()
        found = bench.download(buffers["output"], case.output, np.float32)[:, case.columns]
        driver.free(buffers.values())
        wrong = int((found.view(np.uint32) != case.expected.view(np.uint32)).sum())
        if wrong and not np.array_equal(found, case.expected, equal_nan=True):
            raise KernelError(f"{kernel.name} is wrong: {wrong} of {found.size} outputs differ for {case.name}")
        count += 1
    return count


def main(description: str, form: str, counts: Sequence[int]) -> int:
    """Runs a benchmark of one form from its command line; returns its exit code."""
    parser = cuda_timing.parser(description)
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    options = parser.parse_args()
    counts = options.tokens or counts[: 2 if options.quick else None]
    with cuda_timing.present_device() as driver, folder_of(options.packed, driver.arch) as folder:
        bench = Bench(driver, options.quick)
        document = {"machine": bench.facts(), **measured(bench, folder, form, counts)}
    cuda_timing.write(document, options.json)
    return 1 if document["failed"] else 0
