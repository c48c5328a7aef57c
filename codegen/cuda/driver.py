"""The CUDA driver API by ctypes: memory, modules, launches, and graphs of launches.

It needs the driver's library alone: no CUDA toolkit, no CUDA build of torch, no torch at all.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, ClassVar

from ..errors import KernelError, OutOfMemoryError
from ..targets import cuda
from ..targets.cuda import CAPABILITY_MAJOR, CAPABILITY_MINOR

_MIB = 1 << 20

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

OVERLAP_VERSION = 12030
"""CUDA 12.3, of which a driver must be at least where launches overlap: it captures them in graphs."""

OVERLAP_ARCH = 90
"""The first architecture whose launches overlap."""

_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_: ClassVar = [("id", c_int), ("pad", c_int), ("value", c_int), ("rest", c_int * 15)]


class _Launch(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_: ClassVar = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    ]


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
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p),
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

_OVERLAPPING: dict[str, tuple[type, ...]] = {
    "cuLaunchKernelEx": (ctypes.POINTER(_Launch), c_void_p, ctypes.POINTER(c_void_p), ctypes.POINTER(c_void_p)),
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
    for name, arguments in (_PROTOTYPES | (_OVERLAPPING if version.value >= OVERLAP_VERSION else {})).items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return driver


class ImageError(KernelError):
    """A device does not load compiled kernels."""


_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_BAD_IMAGES = (200, 209, 218, 222)  # CUDA_ERROR_INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, UNSUPPORTED_PTX_VERSION


class _OfThread(threading.local):
    """What a driver keeps for every thread."""

    stream: c_void_p | None = None


class _Turns:
    """Lets one thread at a time capture, allocate or give back, whatever the device: a driver refuses the others during
    a capture, which then fails, too.

    What the garbage collector finds is given back at once where nobody has a turn, else at the end of that turn: it may
    be found during a capture, in the thread that captures.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._left: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()
        self._give_back()

    def leave(self, give_back: Callable[[], None]) -> None:
        """Calls ``give_back``, which raises nothing, as soon as nobody has a turn."""
        self._left.append(give_back)
        self._give_back()

    def _give_back(self) -> None:
        # What is left while another thread has the lock, that one sees behind its release.
        while self._left and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return
                self._depth += 1
                try:
                    self._left.popleft()()
                finally:
                    self._depth -= 1
            finally:
                self._lock.release()


_TURN = _Turns()


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

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives everything back; nothing of it may be used any more. A second time does nothing.

        Raises nothing: behind a kernel that has faulted the driver refuses all but the context's release.
        """
        with _TURN:
            if self._closed:
                return
            self._closed = True
            for name, handles in (
                ("cuGraphExecDestroy", self._graphs),
                ("cuStreamDestroy_v2", self._streams),
                ("cuMemFree_v2", self._memory),
                ("cuModuleUnload", self._modules),
                ("cuDevicePrimaryCtxRelease_v2", [self._ordinal]),
            ):
                for handle in handles:
                    self._result(name, handle)

    def leave_all(self) -> None:
        """As :meth:`close`, soon: may be called at any time, during a capture, too."""
        _TURN.leave(self.close)

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
        with _TURN:
            self.call("cuModuleLoadData", byref(module), cubin)
            self._modules.append(module)
        return module

    def function(self, module: c_void_p, symbol: str) -> c_void_p:
        """A function of a module."""
        function = c_void_p()
        self.call("cuModuleGetFunction", byref(function), module, symbol.encode())
        return function

    def allocate(self, size: int, stream: c_void_p | None = None) -> int:
        """A buffer of ``size`` bytes, which lives as long as this object, or until :meth:`free` or :meth:`leave`.

        Args:
            size: of it.
            stream: where zeros are written before anything else; None for the stream that others wait for.

        Raises:
            OutOfMemoryError: the device has not so much left.
        """
        pointer = c_uint64()
        with _TURN:
            self.call("cuMemAlloc_v2", byref(pointer), size)
            self._memory.append(pointer.value)
        self.call("cuMemsetD8Async", pointer, 0, size, stream)
        return pointer.value

    def new_stream(self) -> c_void_p:
        """A stream that waits for no other one."""
        stream = c_void_p()
        with _TURN:
            self.call("cuStreamCreate", byref(stream), _NON_BLOCKING)
            self._streams.append(stream)
        return stream

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin before the one in front of it has ended (programmatic dependent launch): where the
        architecture has that, the driver captures it, and ``LBLLM_CUDA_OVERLAP`` is not 0."""
        version = c_int()
        self.call("cuDriverGetVersion", byref(version))
        wanted = os.environ.get("LBLLM_CUDA_OVERLAP") != "0"
        return wanted and version.value >= OVERLAP_VERSION and int(self.arch.removeprefix("sm_")) >= OVERLAP_ARCH

    def launch(
        self,
        function: c_void_p,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Number],
        overlapping: bool = False,
    ) -> None:
        """Starts a kernel on :attr:`stream`.

        Args:
            function: the kernel.
            grid, block: thread blocks, and threads of each.
            arguments: buffers as ``c_uint64``, numbers as ``c_int`` or ``c_int64``.
            overlapping: it may begin before the launch in front of it has ended, for which it waits by itself
                (:data:`.text.BEGIN`); where the device :attr:`overlaps` launches.
        """
        slots = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        if not overlapping:
            self.call("cuLaunchKernel", function, *grid, *block, 0, self.stream, slots, None)
            return
        attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0, 1)
        launch = _Launch(grid, block, 0, self.stream, ctypes.pointer(attribute), 1)
        self.call("cuLaunchKernelEx", byref(launch), function, slots, None)

    def captured(self, stream: c_void_p, work: Callable[[], None]) -> c_void_p:
        """The launches in ``work`` as a graph that can be replayed.

        Raises:
            KernelError: ``work`` does what cannot be captured.
        """
        graph, executable, before = c_void_p(), c_void_p(), self.stream
        with _TURN:
            self.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD)
            self.stream = stream
            try:
                try:
                    work()
                finally:
                    self.stream = before
                    ended = self._result("cuStreamEndCapture", stream, byref(graph))
                self._check("cuStreamEndCapture", ended)
                self.call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
                self._graphs.append(executable)
            finally:
                if graph:
                    self._result("cuGraphDestroy", graph)
        return executable

    def replay(self, graph: c_void_p, stream: c_void_p) -> None:
        """Starts what was captured."""
        self.call("cuGraphLaunch", graph, stream)

    def forget(
        self, graphs: Iterable[c_void_p] = (), stream: c_void_p | None = None, memory: Iterable[int] = ()
    ) -> None:
        """Gives graphs, a stream and buffers back before the end; raises nothing, as :meth:`close`."""
        with _TURN:
            if self._closed:
                return
            all_given: list[tuple[str, list[Any], Iterable[Any]]] = [
                ("cuGraphExecDestroy", self._graphs, graphs),
                ("cuStreamDestroy_v2", self._streams, [] if stream is None else [stream]),
                ("cuMemFree_v2", self._memory, memory),
            ]
            for name, known, given in all_given:
                for handle in given:
                    known.remove(handle)
                    self._result(name, handle)

    def free(self, memory: Iterable[int]) -> None:
        """Gives buffers back before the end."""
        self.forget(memory=memory)

    def leave(self, graphs: Sequence[c_void_p], stream: c_void_p, memory: Sequence[int]) -> None:
        """As :meth:`forget`, soon: may be called at any time, during a capture, too."""
        _TURN.leave(lambda: self.forget(graphs, stream, memory))

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory: free ones, and all."""
        free, whole = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(whole))
        return free.value, whole.value

    def synchronize(self) -> None:
        """Waits for all work of the device, and for captures, which could not go on."""
        with _TURN:
            self.call("cuCtxSynchronize")

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the driver.

        Raises:
            OutOfMemoryError: it has too little memory.
            ImageError: it cannot use compiled kernels.
            KernelError: it reports another error.
        """
        self._check(name, self._result(name, *arguments))

    def _result(self, name: str, *arguments: object) -> int:
        """The error that a function of the driver reports, or 0.

        The context is the thread's, and another device's driver or torch may have put its own there since.
        """
        return self._driver.cuCtxSetCurrent(self._context) or getattr(self._driver, name)(*arguments)

    def _check(self, name: str, failed: int) -> None:
        if failed:
            text = c_char_p()
            self._driver.cuGetErrorString(failed, byref(text))
            reason = text.value.decode() if text.value else f"error {failed}"
            kind = {_OUT_OF_MEMORY: OutOfMemoryError, **dict.fromkeys(_BAD_IMAGES, ImageError)}.get(failed, KernelError)
            raise kind(f"the CUDA driver refuses {name}: {reason}")


@contextmanager
def reserved(
    driver: Driver, sizes: dict[str, int], purpose: str, stream: c_void_p | None = None
) -> Iterator[tuple[dict[str, int], list[c_void_p]]]:
    """Blocks of a device's memory, and a list of the graphs that are captured over them: all of it is given back where
    the work with them raises.

    Args:
        driver: the device.
        sizes: bytes by name. A block of no bytes has some all the same, which no kernel reads.
        purpose: what takes the memory, in words.
        stream: where blocks are zeroed; see :meth:`Driver.allocate`.

    Raises:
        OutOfMemoryError: it has not so much left; says how much there is.
    """
    blocks, graphs = dict[str, int](), list[c_void_p]()
    try:
        for name, size in sizes.items():
            blocks[name] = driver.allocate(max(size, 1), stream)
        yield blocks, graphs
    except BaseException as error:
        driver.forget(graphs, memory=blocks.values())
        if not isinstance(error, OutOfMemoryError):
            raise
        free, whole = (size / _MIB for size in driver.memory())
        raise OutOfMemoryError(
            f"{purpose} {sum(sizes.values()) / _MIB:.0f} MiB of {driver.name}'s memory, of which {free:.0f} of"
            f" {whole:.0f} MiB are free; stop what else uses the device, ask for fewer tokens or sequences, or use"
            " --target cpu"
        ) from error
