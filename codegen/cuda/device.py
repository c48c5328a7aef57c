"""A CUDA device through the driver API, by ctypes: all it takes to launch a cubin, prove it on arrival and time it.

It needs the driver's library alone, no CUDA toolkit and no CUDA build of torch.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p

import numpy as np
import torch
from torch import Tensor

from ..errors import KernelError
from .emulator import Launch, Sparse
from .kernel import CudaKernel
from .proof import check_outputs, proof_runs

_LIBRARY = "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, ctypes.POINTER(c_char_p)),
    "cuDeviceGetCount": (ctypes.POINTER(c_int),),
    "cuDeviceGet": (ctypes.POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (ctypes.POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8_v2": (c_uint64, ctypes.c_ubyte, c_size_t),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuModuleLoadData": (ctypes.POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (ctypes.POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, ctypes.POINTER(c_void_p), ctypes.POINTER(c_void_p)),
    "cuStreamCreate": (ctypes.POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, ctypes.POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuEventCreate": (ctypes.POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (ctypes.POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
}


def _driver(library: str = _LIBRARY) -> ctypes.CDLL:
    driver = ctypes.CDLL(library)
    for name, arguments in _PROTOTYPES.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return driver


def device_count() -> int:
    """CUDA devices of this machine; 0 where there is no driver."""
    count = c_int(0)
    try:
        driver = _driver()
    except (OSError, AttributeError):
        return 0
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)):
        return 0
    return count.value


class Device:
    """One CUDA device, used through its primary context (which torch shares).

    Args:
        ordinal: which device.
        library: the driver's library.

    Raises:
        KernelError: there is no driver or no such device.
    """

    def __init__(self, ordinal: int = 0, library: str = _LIBRARY):
        try:
            self._driver = _driver(library)
        except (OSError, AttributeError) as error:
            raise KernelError(f"the CUDA driver cannot be loaded ({error}); install the NVIDIA driver") from error
        device, context = c_int(), c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device.value)
        self._call("cuCtxSetCurrent", context)
        self._ordinal = device.value
        self._stream: c_void_p | None = None
        self._modules: list[c_void_p] = []
        self._memory: list[int] = []

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        for pointer in self._memory:
            self._call("cuMemFree_v2", pointer)
        for module in self._modules:
            self._call("cuModuleUnload", module)
        self._call("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    @property
    def name(self) -> str:
        """The device's name, e.g. ``"NVIDIA H200"``."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._ordinal)
        return text.value.decode()

    @property
    def arch(self) -> str:
        """Architecture, e.g. ``"sm_90"``."""
        major, minor = c_int(), c_int()
        self._call("cuDeviceGetAttribute", byref(major), _CAPABILITY_MAJOR, self._ordinal)
        self._call("cuDeviceGetAttribute", byref(minor), _CAPABILITY_MINOR, self._ordinal)
        return f"sm_{major.value}{minor.value}"

    def load(self, cubin: bytes, symbol: str) -> c_void_p:
        """A function of a cubin."""
        module, function = c_void_p(), c_void_p()
        self._call("cuModuleLoadData", byref(module), cubin)
        self._modules.append(module)
        self._call("cuModuleGetFunction", byref(function), module, symbol.encode())
        return function

    def allocate(self, size: int) -> int:
        """A zeroed buffer of ``size`` bytes, which lives as long as this object."""
        pointer = c_uint64()
        self._call("cuMemAlloc_v2", byref(pointer), size)
        self._memory.append(pointer.value)
        self._call("cuMemsetD8_v2", pointer, 0, size)
        return pointer.value

    def upload(self, tensor: Tensor, pointer: int | None = None) -> int:
        """Copies a tensor to ``pointer``, or to a buffer of its own."""
        array = tensor.detach().contiguous().cpu().numpy()
        target = self.allocate(array.nbytes) if pointer is None else pointer
        self._call("cuMemcpyHtoD_v2", target, array.ctypes.data, array.nbytes)
        return target

    def download(self, pointer: int, like: Tensor) -> Tensor:
        """A CPU tensor with the shape and type of ``like``, filled from ``pointer``."""
        array = np.empty(like.shape, like.numpy().dtype)
        self._call("cuMemcpyDtoH_v2", array.ctypes.data, pointer, array.nbytes)
        return torch.from_numpy(array)

    def launch(
        self,
        function: c_void_p,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[c_uint64 | c_int],
    ) -> None:
        """Starts a kernel; buffers are ``c_uint64``, numbers ``c_int``."""
        slots = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._call("cuLaunchKernel", function, *grid, *block, 0, self._stream, slots, None)

    def synchronize(self) -> None:
        """Waits for all work of the device."""
        self._call("cuCtxSynchronize")

    def microseconds(self, work: Callable[[], None], repeats: int = 15) -> float:
        """Median device time of the launches in ``work``.

        They are captured as a graph and replayed between two events, so the host's launch overhead does not count.
        """
        stream, graph, executable, start, end = (c_void_p() for _ in range(5))
        elapsed, times = c_float(), []
        self._call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self._call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD)
        self._stream = stream
        try:
            work()
        finally:
            self._stream = None
            self._call("cuStreamEndCapture", stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        for event in (start, end):
            self._call("cuEventCreate", byref(event), 0)
        for repeat in range(repeats + 1):
            self._call("cuEventRecord", start, stream)
            self._call("cuGraphLaunch", executable, stream)
            self._call("cuEventRecord", end, stream)
            self._call("cuEventSynchronize", end)
            self._call("cuEventElapsedTime", byref(elapsed), start, end)
            if repeat:  # the first replay warms up
                times.append(1e3 * elapsed.value)
        for event in (start, end):
            self._call("cuEventDestroy_v2", event)
        self._call("cuGraphExecDestroy", executable)
        self._call("cuGraphDestroy", graph)
        self._call("cuStreamDestroy_v2", stream)
        return statistics.median(times)

    def run(self, kernel: CudaKernel, launch: Launch) -> dict[str, Tensor]:
        """Runs a whole launch (its ``blocks`` are ignored) and returns the outputs by name.

        Raises:
            KernelError: the driver reports an error.
        """
        function = self.load(kernel.cubin, kernel.symbol)
        arguments: list[c_uint64 | c_int] = []
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

    def _call(self, name: str, *arguments: object) -> None:
        failed = getattr(self._driver, name)(*arguments)
        if failed:
            text = c_char_p()
            self._driver.cuGetErrorString(failed, byref(text))
            reason = text.value.decode() if text.value else f"error {failed}"
            raise KernelError(f"the CUDA driver refuses {name}: {reason}")


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
