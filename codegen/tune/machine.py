"""Where candidates run: this machine, or a device that a TVM RPC tracker lends.

Code is always generated here. A remote device needs TVM's runtime and nothing else: libraries and inputs are uploaded,
outputs fetched back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import KernelError
from ..kernels.tiles import request
from ..targets import Target, host, x86
from ..threads import thread_count
from ..tvm_api import RemoteSession, Tracker, compile_functions, export_library
from .measure import START_SECONDS, RemoteDevice
from .roofline import filler

COLD_BYTES = 48 << 20
"""Weights are cycled over copies of this many bytes in all, as a decoder's layers are; more than most L2 caches."""

MOST_COPIES = 1024
MOST_LAYOUTS = 2
"""Layouts of a linear's weights whose copies are kept between requests."""

FEWEST_CALLS = 2
REMOTE_CALLS = 5
"""Calls of a remote timing; each comes after the caches were flushed."""

PROBE_BYTES = 1 << 16
"""Bytes that are written on a remote device to see that code runs there."""

SYMBOL = "candidate"
"""Name of the one function of a candidate's library."""


class Kernel(Protocol):
    """A loaded function."""

    def __call__(self, values: Tensor, x_scale: Tensor, packed: Any, out: Tensor) -> None:
        """Runs a linear once; ``packed`` is placed, the rest is here."""
        ...

    def times(self, arguments: Sequence[Sequence[Any]], seconds: float) -> list[float]:
        """Seconds of single calls with placed arguments, cycling through ``arguments``, for about ``seconds``."""
        ...


class Session(Protocol):
    """A machine for the time of one request."""

    def place(self, tensor: Tensor) -> Any:
        """The tensor where kernels read it."""
        ...

    def allocate(self, count: int) -> Any:
        """``uint8 [count]`` with whatever it holds."""
        ...

    def cycle(self, packed: Any) -> tuple[list[Any], bool]:
        """Copies of placed weights to call a kernel with in turn, and whether no call finds its own in a cache."""
        ...

    def load(self, library: Any) -> Kernel:
        """The function :data:`SYMBOL` of a compiled library."""
        ...


class Machine(Protocol):
    """A machine to measure on.

    Attributes:
        threads: size of its kernels' thread pool.
    """

    threads: int

    def session(self, candidates: int) -> AbstractContextManager[Session]:
        """Access to the machine, long enough for so many candidates."""
        ...


class ThisMachine:
    """The machine this process runs on. Implements :class:`Machine` and :class:`Session`."""

    def __init__(self) -> None:
        self.threads = thread_count()
        self._copies: dict[int, list[Tensor]] = {}

    @contextmanager
    def session(self, candidates: int) -> Iterator[Session]:
        yield self

    def place(self, tensor: Tensor) -> Tensor:
        return tensor

    def allocate(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def cycle(self, packed: Tensor) -> tuple[list[Tensor], bool]:
        count = -(-COLD_BYTES // packed.numel())
        copies = self._copies.get(packed.data_ptr())
        if copies is None or copies[0] is not packed:
            while len(self._copies) >= MOST_LAYOUTS:
                self._copies.pop(next(iter(self._copies)))
            copies = [packed, *(packed.clone() for _ in range(min(count, MOST_COPIES) - 1))]
            self._copies[packed.data_ptr()] = copies
        return copies, count <= MOST_COPIES

    def load(self, library: Any) -> Kernel:
        return _LocalKernel(library[SYMBOL])


class _LocalKernel:
    def __init__(self, function: Any):
        self._function = function
        self._calls = 0

    def __call__(self, values: Tensor, x_scale: Tensor, packed: Tensor, out: Tensor) -> None:
        self._function(values, x_scale, packed, out)

    def times(self, arguments: Sequence[Sequence[Any]], seconds: float) -> list[float]:
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < FEWEST_CALLS or time.perf_counter() < end:
            chosen = arguments[self._calls % len(arguments)]
            start = time.perf_counter()
            self._function(*chosen)
            found.append(time.perf_counter() - start)
            self._calls += 1
        return found


class RemoteMachine:
    """A device behind a tracker. Implements :class:`Machine`.

    Each request gets a session of its own, which the device's server ends when its time is over, so a candidate that
    hangs there blocks the device no longer than that, and others may use it between requests.

    Raises:
        KernelError: the tracker cannot be reached, or has no such device.
    """

    def __init__(self, device: RemoteDevice, target: Target, candidate_seconds: float):
        self._compiler = device.compiler or _linker(target)
        self._candidate_seconds = candidate_seconds
        self._tracker = Tracker(device.host, device.port, device.key)
        self._request = None
        if x86.TILES in host.NEEDED_FLAGS.get(target.family, ()):
            self._request = compile_functions({SYMBOL: request()}, target.llvm)
        library = compile_functions({SYMBOL: filler(PROBE_BYTES)}, target.llvm)
        with self._session(START_SECONDS) as session:
            self.threads = session.threads()
            session.check(library, target)

    @contextmanager
    def session(self, candidates: int) -> Iterator[Session]:
        with self._session(self._candidate_seconds * (candidates + 1)) as session:  # one more for the roofline
            yield session

    @contextmanager
    def _session(self, seconds: float) -> Iterator[_RemoteSession]:
        with self._tracker.session(seconds) as session, TemporaryDirectory() as folder:
            remote = _RemoteSession(session, Path(folder), self._compiler)
            if self._request is not None:  # a server has a process of its own for each session
                remote.ask_for_tiles(self._request)
            yield remote


class _RemoteSession:
    def __init__(self, session: RemoteSession, folder: Path, compiler: str | None):
        self._session = session
        self._folder = folder
        self._compiler = compiler
        self._loaded = 0

    def place(self, tensor: Tensor) -> Any:
        return self._session.upload(tensor)

    def threads(self) -> int:
        return self._session.threads()

    def check(self, library: Any, target: Target) -> None:
        """Runs a filler's library, so that what is wrong with the linker or the target is said at once.

        Raises:
            KernelError: the library cannot be linked, loaded or run.
        """
        kernel = self.load(library)
        try:
            kernel.times([(self.allocate(PROBE_BYTES),)], 0)
        except Exception as error:  # TVM raises its own types for whatever goes wrong on the device
            reason = str(error).strip().rpartition("\n")[2]
            raise KernelError(
                f"the device cannot run code for {target.name} ({reason}); tune a target of its architecture"
            ) from error

    def ask_for_tiles(self, library: Any) -> None:
        """Runs a library of :func:`..kernels.tiles.request`.

        Raises:
            KernelError: the device's system does not grant tile registers, or has none.
        """
        answer = self._session.upload(torch.ones(1, dtype=torch.int32))
        self._module(library)[SYMBOL](answer)
        if answer.numpy()[0]:
            raise KernelError("the device does not grant tile registers; tune cpu:avx512-vpopcnt for it")

    def allocate(self, count: int) -> Any:
        return self._session.allocate(count)

    def cycle(self, packed: Any) -> tuple[list[Any], bool]:
        return [packed], True  # it is flushed from the caches before every call

    def load(self, library: Any) -> Kernel:
        return _RemoteKernel(self._session, self._module(library))

    def _module(self, library: Any) -> Any:
        self._loaded += 1
        file = self._folder / f"candidate{self._loaded}.so"
        export_library(library, file, self._compiler)
        return self._session.load(file)


class _RemoteKernel:
    def __init__(self, session: RemoteSession, module: Any):
        self._session = session
        self._module = module

    def __call__(self, values: Tensor, x_scale: Tensor, packed: Any, out: Tensor) -> None:
        placed = [self._session.upload(tensor) for tensor in (values, x_scale, out)]
        self._module[SYMBOL](placed[0], placed[1], packed, placed[2])
        out.copy_(torch.from_numpy(placed[2].numpy()))

    def times(self, arguments: Sequence[Sequence[Any]], seconds: float) -> list[float]:
        return self._session.times(self._module, SYMBOL, arguments[0], REMOTE_CALLS)


def _linker(target: Target) -> str | None:
    """The compiler that links for a target: its triple's where it names one, else this machine's (None)."""
    triple = target.llvm.get("mtriple")
    return f"{triple}-gcc" if triple else None
