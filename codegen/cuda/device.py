"""A CUDA device for tensors: a cubin is run on them, proven on arrival, and timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_uint64, c_void_p

import numpy as np
import torch
from torch import Tensor

from .driver import Driver, Number
from .emulator import Launch, Sparse
from .kernel import CudaKernel
from .proof import check_outputs, proof_runs


class Device(Driver):
    """One CUDA device on tensors; see :class:`.driver.Driver`."""

    def __enter__(self) -> Device:
        return self

    def load(self, cubin: bytes, symbol: str) -> c_void_p:
        """A function of a cubin."""
        return self.function(self.module(cubin), symbol)

    def upload(self, tensor: Tensor, pointer: int | None = None) -> int:
        """Copies a tensor to ``pointer``, or to a buffer of its own."""
        array = tensor.detach().contiguous().cpu().numpy()
        target = self.allocate(array.nbytes) if pointer is None else pointer
        self.call("cuMemcpyHtoD_v2", target, array.ctypes.data, array.nbytes)
        return target

    def download(self, pointer: int, like: Tensor) -> Tensor:
        """A CPU tensor with the shape and type of ``like``, filled from ``pointer``."""
        array = np.empty(like.shape, like.numpy().dtype)
        self.call("cuMemcpyDtoH_v2", array.ctypes.data, pointer, array.nbytes)
        return torch.from_numpy(array)

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
        """Runs a whole launch (its ``blocks`` are ignored) and returns the outputs by name.

        Raises:
            KernelError: the driver reports an error.
        """
        function = self.load(kernel.cubin, kernel.symbol)
        arguments: list[Number] = []
        outputs: dict[str, int] = {}
        for name in kernel.parameters:
            value = launch.outputs[name] if name in launch.outputs else launch.inputs[name]
            if isinstance(value, int):
                arguments.append(c_int(value))
                continue
            if isinstance(value, Sparse):
                pointer = self.allocate(value.size)
                for offset, part in value.segments:
                    self.upload(part, pointer + offset)
            else:
                pointer = self.upload(value)
            if name in launch.outputs:
                outputs[name] = pointer
            arguments.append(c_uint64(pointer))
        self.launch(function, launch.grid, launch.block, arguments)
        self.synchronize()
        return {name: self.download(pointer, launch.outputs[name]) for name, pointer in outputs.items()}


def prove_on_device(kernel: CudaKernel, device: Device) -> str:
    """Runs a compiled kernel on a device against the reference.

    Returns:
        What to say about the proof.

    Raises:
        KernelError: a result differs, or the driver reports an error.
    """
    for name, launch, expected in proof_runs(kernel):
        check_outputs(kernel.symbol, name, device.run(kernel, launch), expected)
    return f"proven on {device.name}"
