"""A CUDA device for tensors: a cubin is run on them, proven on arrival, and timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_uint64, c_void_p

import numpy as np
import torch
from torch import Tensor

from .driver import Driver, reserved
from .emulator import Launch, Sparse
from .kernel import CudaKernel, EmittedKernel
from .proof import check_outputs, proof_runs


class Device(Driver):
    """One CUDA device on tensors; see :class:`.driver.Driver`."""

    def __enter__(self) -> Device:
        return self

    def load(self, cubin: bytes, symbol: str) -> c_void_p:
        """A function of a cubin."""
        return self.function(self.module(cubin), symbol)

    def microseconds(self, work: Callable[[], None], repeats: int = 15) -> float:
        """Median device time of the launches in ``work``.

        They are captured as a graph and replayed between two events, so the host's launch overhead does not count.
        """
        start, end, elapsed, times = c_void_p(), c_void_p(), c_float(), []
        stream = self.new_stream()
        graph = self.captured(stream, work)
        for event in (start, end):
            self.call("cuEventCreate", byref(event), 0)
        for repeat in range(repeats + 1):
            self.call("cuEventRecord", start, stream)
            self.replay(graph, stream)
            self.call("cuEventRecord", end, stream)
            self.call("cuEventSynchronize", end)
            self.call("cuEventElapsedTime", byref(elapsed), start, end)
            if repeat:  # the first replay warms up
                times.append(1e3 * elapsed.value)
        for event in (start, end):
            self.call("cuEventDestroy_v2", event)
        self.forget([graph], stream)
        return statistics.median(times)

    def run(self, kernel: CudaKernel, launch: Launch) -> dict[str, Tensor]:
        """Runs a whole launch; see :func:`run`."""
        return run(self, self.load(kernel.cubin, kernel.symbol), kernel, launch)


def run(driver: Driver, function: c_void_p, kernel: EmittedKernel, launch: Launch) -> dict[str, Tensor]:
    """Runs a whole launch (its ``blocks`` are ignored) in memory that is given back.

    Args:
        driver: the device.
        function: the kernel there.
        kernel: the same as text.
        launch: of it.

    Returns:
        The outputs by name.

    Raises:
        OutOfMemoryError: the device has no room for it; says how much it takes.
        KernelError: the driver reports another error.
    """
    every = {**launch.inputs, **launch.outputs}
    given = {name: every[name] for name in kernel.parameters}
    buffers = {
        name: value if isinstance(value, Sparse) else Sparse(value.nbytes, [(0, value)])
        for name, value in given.items()
        if not isinstance(value, int)
    }
    sizes = {name: buffer.size for name, buffer in buffers.items()}
    with reserved(driver, sizes, f"the proof of {kernel.symbol} takes") as (blocks, _):
        for name, buffer in buffers.items():
            for offset, part in buffer.segments:
                array = part.detach().contiguous().cpu().numpy()
                driver.call("cuMemcpyHtoD_v2", blocks[name] + offset, array.ctypes.data, array.nbytes)
        arguments = [c_uint64(blocks[name]) if name in blocks else c_int(value) for name, value in given.items()]
        driver.launch(function, launch.grid, launch.block, arguments)
        driver.synchronize()
        found = {name: _download(driver, blocks[name], like) for name, like in launch.outputs.items()}
    driver.free(blocks.values())
    return found


def _download(driver: Driver, pointer: int, like: Tensor) -> Tensor:
    """A CPU tensor with the shape and type of ``like``, filled from ``pointer``."""
    array = np.empty(like.shape, like.numpy().dtype)
    driver.call("cuMemcpyDtoH_v2", array.ctypes.data, pointer, array.nbytes)
    return torch.from_numpy(array)


def prove_on_device(kernel: CudaKernel, device: Device) -> str:
    """Runs a compiled kernel on a device against the reference.

    Returns:
        What to say about the proof.

    Raises:
        KernelError: a result differs, or the driver reports an error.
    """
    prove_loaded(device, device.load(kernel.cubin, kernel.symbol), kernel)
    return f"proven on {device.name}"


def prove_loaded(driver: Driver, function: c_void_p, kernel: EmittedKernel) -> None:
    """Runs a kernel that a device has loaded against the reference.

    Raises:
        DisprovedError: a result differs.
        KernelError: the driver reports an error.
    """
    for name, launch, expected in proof_runs(kernel):
        check_outputs(kernel.symbol, name, run(driver, function, kernel, launch), expected)
