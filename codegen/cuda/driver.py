"""The CUDA driver API by ctypes: memory, modules, launches, and graphs of launches.

It needs the driver's library alone: no CUDA toolkit, no CUDA build of torch, no torch at all.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p

from ..errors import KernelError
from ..targets import cuda
from ..targets.cuda import CAPABILITY_MAJOR, CAPABILITY_MINOR

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (ctypes.POINTER(c_int),),
    "cuGetErrorString": (c_int, ctypes.POINTER(c_char_p)),
    "cuDeviceGetCount": (ctypes.POINTER(c_int),),
    "cuDeviceGet": (ctypes.POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t)),
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
    "cuStreamSynchronize": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
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


def _driver(library: str) -> ctypes.CDLL:
    """The driver's library.

    Raises:
        KernelError: it cannot be loaded, or is too old.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise KernelError(f"the CUDA driver cannot be loaded ({error}); install the NVIDIA driver") from error
    version = c_int()
    driver.cuDriverGetVersion(byref(version))
    if version.value < cuda.LEAST_VERSION:
        raise KernelError(cuda.too_old(version.value))
    for name, arguments in _PROTOTYPES.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return driver


class OutOfMemoryError(KernelError):
    """A device has too little memory left."""


class ImageError(KernelError):
    """A device does not load compiled kernels."""


class _OfThread(threading.local):
    """What a driver keeps for every thread."""

    current = False
    stream: c_void_p | None = None


Number = ctypes.c_uint64 | ctypes.c_int64 | ctypes.c_int
"""An argument of a launch: the address of memory, or a number."""


class Driver:
    """One CUDA device, used through its primary context (which torch shares).

    Args:
        ordinal: which device.
        library: the driver's library; that of the system where None.

    Raises:
        KernelError: there is no driver or no such device, or the driver is too old.
    """

    def __init__(self, ordinal: int = 0, library: str | None = None):
        self._driver = _driver(cuda.LIBRARY if library is None else library)
        device, self._context = c_int(), c_void_p()
        # A context is current in one thread, and a device is used from any.
        self._thread = _OfThread()
        self._check("cuInit", self._driver.cuInit(0))
        self._check("cuDeviceGet", self._driver.cuDeviceGet(byref(device), ordinal))
        retained = self._driver.cuDevicePrimaryCtxRetain(byref(self._context), device.value)
        self._check("cuDevicePrimaryCtxRetain", retained)
        self._ordinal = device.value
        self._modules: list[c_void_p] = []
        self._memory: list[int] = []
        self._graphs: list[c_void_p] = []
        self._streams: list[c_void_p] = []
        self._closed = False
        self._left: deque[Callable[[], None]] = deque()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives everything back; nothing of it may be used any more. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        self._left.clear()
        for graph in self._graphs:
            self.call("cuGraphExecDestroy", graph)
        for stream in self._streams:
            self.call("cuStreamDestroy_v2", stream)
        for pointer in self._memory:
            self.call("cuMemFree_v2", pointer)
        for module in self._modules:
            self.call("cuModuleUnload", module)
        self.call("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    @property
    def stream(self) -> c_void_p | None:
        """Where this thread's launches go; None for the stream that others wait for."""
        return self._thread.stream

    @stream.setter
    def stream(self, stream: c_void_p | None) -> None:
        self._thread.stream = stream

    @property
    def name(self) -> str:
        """The device's name, e.g. ``"NVIDIA H200"``."""
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), self._ordinal)
        return text.value.decode()

    @property
    def arch(self) -> str:
        """Architecture, e.g. ``"sm_90"``."""
        major, minor = c_int(), c_int()
        self.call("cuDeviceGetAttribute", byref(major), CAPABILITY_MAJOR, self._ordinal)
        self.call("cuDeviceGetAttribute", byref(minor), CAPABILITY_MINOR, self._ordinal)
        return f"sm_{major.value}{minor.value}"

    def module(self, cubin: bytes) -> c_void_p:
        """A cubin on the device, which stays there as long as this object.

        Raises:
            ImageError: it is none that the device and the driver load.
        """
        module = c_void_p()
        try:
            self.call("cuModuleLoadData", byref(module), cubin)
        except OutOfMemoryError:
            raise
        except KernelError as error:
            raise ImageError(str(error)) from error
        self._modules.append(module)
        return module

    def function(self, module: c_void_p, symbol: str) -> c_void_p:
        """A function of a module."""
        function = c_void_p()
        self.call("cuModuleGetFunction", byref(function), module, symbol.encode())
        return function

    def allocate(self, size: int) -> int:
        """A zeroed buffer of ``size`` bytes, which lives as long as this object, or until :meth:`leave`.

        Raises:
            OutOfMemoryError: the device has not so much left.
        """
        self._give_back()
        pointer = c_uint64()
        self.call("cuMemAlloc_v2", byref(pointer), size)
        self._memory.append(pointer.value)
        self.call("cuMemsetD8_v2", pointer, 0, size)
        return pointer.value

    def new_stream(self) -> c_void_p:
        """A stream that waits for no other one."""
        stream = c_void_p()
        self.call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self._streams.append(stream)
        return stream

    def launch(
        self,
        function: c_void_p,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Number],
    ) -> None:
        """Starts a kernel on :attr:`stream`; buffers are ``c_uint64``, numbers ``c_int`` or ``c_int64``."""
        slots = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self.call("cuLaunchKernel", function, *grid, *block, 0, self.stream, slots, None)

    def captured(self, stream: c_void_p, work: Callable[[], None]) -> c_void_p:
        """The launches in ``work`` as a graph that can be replayed.

        Raises:
            KernelError: ``work`` does what cannot be captured.
        """
        graph, executable, before = c_void_p(), c_void_p(), self.stream
        self.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD)
        self.stream = stream
        try:
            work()
        finally:
            self.stream = before
            ended = self._driver.cuStreamEndCapture(stream, byref(graph))
        self._check("cuStreamEndCapture", ended)
        self.call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        self.call("cuGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def replay(self, graph: c_void_p, stream: c_void_p) -> None:
        """Starts what was captured."""
        self.call("cuGraphLaunch", graph, stream)

    def forget(self, graphs: Sequence[c_void_p], stream: c_void_p | None = None, memory: Iterable[int] = ()) -> None:
        """Gives graphs, a stream and buffers back before the end."""
        for graph in graphs:
            self._graphs.remove(graph)
            self.call("cuGraphExecDestroy", graph)
        if stream is not None:
            self._streams.remove(stream)
            self.call("cuStreamDestroy_v2", stream)
        self.free(memory)

    def free(self, memory: Iterable[int]) -> None:
        """Gives buffers back before the end."""
        for pointer in memory:
            self._memory.remove(pointer)
            self.call("cuMemFree_v2", pointer)

    def leave(self, graphs: Sequence[c_void_p], stream: c_void_p, memory: Sequence[int]) -> None:
        """As :meth:`forget`, when memory is asked for next: may be called at any time, during a capture, too."""
        self._left.append(lambda: self.forget(graphs, stream, memory))

    def _give_back(self) -> None:
        while self._left:
            self._left.popleft()()

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory: free ones, and all."""
        free, whole = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(whole))
        return free.value, whole.value

    def synchronize(self) -> None:
        """Waits for all work of the device."""
        self.call("cuCtxSynchronize")

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the driver.

        Raises:
            OutOfMemoryError: it has too little memory.
            KernelError: it reports another error.
        """
        if not self._thread.current:
            self._check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))
            self._thread.current = True
        self._check(name, getattr(self._driver, name)(*arguments))

    def _check(self, name: str, failed: int) -> None:
        if failed:
            text = c_char_p()
            self._driver.cuGetErrorString(failed, byref(text))
            reason = text.value.decode() if text.value else f"error {failed}"
            kind = OutOfMemoryError if failed == _OUT_OF_MEMORY else KernelError
            raise kind(f"the CUDA driver refuses {name}: {reason}")
