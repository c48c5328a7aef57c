"""What the CUDA benchmarks share: a device, timing on it, and how a benchmark ends.

It needs Python, NumPy and the driver's library alone, as a machine has that was lent for a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_float, c_int, c_void_p
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.cuda.driver import Driver
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.targets import cuda

from lbllm_compile.bench.turns import Runs, Spread

_MULTIPROCESSORS, _CLOCK_KHZ, _L2_BYTES = 16, 13, 38
"""Attributes of a device: ``CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT``, ``CLOCK_RATE`` and ``L2_CACHE_SIZE``."""

ROTATION = 4
"""Copies of what is read are this many times as large as the L2 cache, so none is in it when its turn comes again."""

LAUNCHES = 40
"""Launches of a graph, so that the host's work for one replay is a small share of it."""

PACKAGES = ("numpy", "torch", "transformers", "triton", "apache-tvm")


class Bench:
    """A device and a stream on which work is captured and timed.

    Args:
        driver: the device.
        quick: a smoke test: as little as shows that everything runs.
    """

    def __init__(self, driver: Driver, quick: bool = False):
        self.driver, self.quick = driver, quick
        self.stream = driver.new_stream()
        self.launches = 2 if quick else LAUNCHES
        self._start, self._end = c_void_p(), c_void_p()
        for event in (self._start, self._end):
            driver.call("cuEventCreate", byref(event), 0)

    def attribute(self, which: int) -> int:
        """A device attribute."""
        value = c_int()
        self.driver.call("cuDeviceGetAttribute", byref(value), which, cuda.ordinal(self.driver.arch, None) or 0)
        return value.value

    def copies(self, size: int) -> int:
        """How many copies of ``size`` bytes are used in turn, see :data:`ROTATION`."""
        return max(2, -(-ROTATION * self.attribute(_L2_BYTES) // size))

    def upload(self, array: np.ndarray) -> int:
        """A copy in the device's memory."""
        array = np.ascontiguousarray(array)
        pointer = self.driver.allocate(array.nbytes)
        self.driver.synchronize()  # memory is zeroed on a stream that copies do not wait for
        self.driver.call("cuMemcpyHtoD_v2", pointer, array.ctypes.data, array.nbytes)
        return pointer

    def download(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array from the device's memory."""
        array = np.empty(shape, dtype)
        self.driver.call("cuMemcpyDtoH_v2", array.ctypes.data, pointer, array.nbytes)
        return array

    def seconds(self, work: Callable[[], object]) -> float:
        """Device time of what ``work`` puts on :attr:`stream`, between two events."""
        elapsed = c_float()
        self.driver.call("cuEventRecord", self._start, self.stream)
        work()
        self.driver.call("cuEventRecord", self._end, self.stream)
        self.driver.call("cuEventSynchronize", self._end)
        self.driver.call("cuEventElapsedTime", byref(elapsed), self._start, self._end)
        return 1e-3 * elapsed.value

    def replayed(self, launch: Callable[[int], object]) -> Runs:
        """Seconds of a launch, as replays of a graph of :attr:`launches` take them.

        Args:
            launch: starts the launch of a number on the driver's stream.
        """

        def all_launches() -> None:
            for number in range(self.launches):
                launch(number)

        graph = self.driver.captured(self.stream, all_launches)

        def run(count: int) -> list[float]:
            found = []
            for _ in range(count):
                found.append(self.seconds(lambda: self.driver.replay(graph, self.stream)) / self.launches)
            return found

        return run

    def copying(self) -> tuple[int, Runs, list[int]]:
        """The largest usual yardstick of memory: copies on the device, larger than its caches.

        Returns:
            Bytes that a copy moves, read and written; its seconds; and buffers to give back.
        """
        size = (1 << 16) if self.quick else max(ROTATION * self.attribute(_L2_BYTES), 256 << 20)
        source, target = self.driver.allocate(size), self.driver.allocate(size)

        def copy() -> None:
            self.driver.call("cuMemcpyDtoDAsync_v2", target, source, size, self.stream)

        return 2 * size, lambda count: [self.seconds(copy) for _ in range(count)], [source, target]

    def facts(self) -> dict[str, Any]:
        """The device, the driver and the versions of what takes part, JSON-able."""
        found = cuda.present()
        return {
            "device": self.driver.name,
            "architecture": self.driver.arch,
            "driver_for_cuda": cuda.in_words(found.version),
            "multiprocessors": self.attribute(_MULTIPROCESSORS),
            "clock_mhz": self.attribute(_CLOCK_KHZ) / 1e3,
            "l2_bytes": self.attribute(_L2_BYTES),
            "memory_bytes": self.driver.memory()[1],
            "machine": platform.machine(),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds_row(name: str, seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    """One contender's result, JSON-able: median and quartiles in microseconds."""
    spread = asdict(Spread.of([1e6 * each for each in seconds]))
    return {"contender": name, **{k if k == "count" else f"{k}_microseconds": v for k, v in spread.items()}, **more}


def attempted(absent: dict[str, str], name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives; None where it fails, and the reason in ``absent``: one contender must not stop the others.

    A driver whose device has met an error refuses everything after it, so such a failure shows in all that follow.
    """
    try:
        return make()
    except Exception as error:  # of a library that may do anything on a machine that nobody has seen
        absent[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
        return None


def present_device() -> Driver:
    """The first device.

    Raises:
        LbllmError: there is none, and why.
    """
    found = cuda.present()
    if found.missing:
        raise LbllmError(f"this benchmark needs an NVIDIA GPU, and {found.missing}")
    return Driver()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all CUDA benchmarks have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--packed", type=Path, metavar="FOLDER", help="what cuda_all.sh pack wrote")
    found.add_argument("--quick", action="store_true", help="check that everything runs; the times mean nothing")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    return found


def write(document: Mapping[str, Any], path: Path | None) -> None:
    """Writes results to a file, or to stdout where none is named."""
    text = json.dumps(document, indent=1)
    if path:
        path.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def ended(main: Callable[[], int | None]) -> None:
    """Runs a benchmark and ends the process: what a user can mend is one sentence and exit code 2."""
    try:
        sys.exit(main())
    except LbllmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
