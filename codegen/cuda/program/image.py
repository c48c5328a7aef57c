"""A launch list and the cubin of its kernels in one file, and how a device loads it. Needs neither torch nor TVM."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...backend import StateTensor
from ...errors import KernelError
from ...targets import Target, cuda
from ..driver import Driver, ImageError
from .launches import LaunchList
from .session import DeviceProgram

PIECE = 64 << 20
"""Bytes of weights that are copied at once."""


@dataclass(frozen=True)
class Image:
    """What a device needs of a program besides its weights.

    Attributes:
        launches: a step.
        cubin: its compiled kernels.
        arch: the architecture they are for.
        compiler: the version of CUDA of what compiled them, e.g. ``"13.0"``.
    """

    launches: LaunchList
    cubin: bytes
    arch: str
    compiler: str

    def write(self, file: Path) -> None:
        """One line of JSON, and the cubin behind it."""
        head = {"launches": self.launches.to_json(), "arch": self.arch, "compiler": self.compiler}
        file.write_bytes(json.dumps(head).encode() + b"\n" + self.cubin)

    @classmethod
    def read(cls, file: Path) -> Image:
        """What :meth:`write` wrote.

        Raises:
            KernelError: it did not write that.
            OSError: the file cannot be read.
        """
        head, _, cubin = file.read_bytes().partition(b"\n")
        try:
            fields = json.loads(head)
            return cls(LaunchList.from_json(fields["launches"]), cubin, fields["arch"], fields["compiler"])
        except (ValueError, KeyError, TypeError) as error:
            raise KernelError(f"the program {file} is damaged ({error})") from error


def on_device(file: Path, weights: Path, state: Sequence[StateTensor], target: Target) -> DeviceProgram:
    """A program in the memory of a device of this machine, which it gives back at its end.

    Args:
        file: what :meth:`Image.write` wrote.
        weights: the file of its weights.
        state: the tensors of its KV state.
        target: which device.

    Raises:
        TargetError: this machine has no such device.
        KernelError: the file is damaged, or for another architecture; the device has too little memory; the driver is
            too old, or reports another error.
        OSError: a file cannot be read.
    """
    target.check_runs_here()
    image = Image.read(file)
    if image.arch != target.arch:
        raise KernelError(
            f"the program {file} is for {image.arch}, and the device is {target.arch}; use another device"
        )
    driver = Driver(cuda.ordinal(target.arch, target.device) or 0)
    with ExitStack() as undone:
        undone.callback(driver.close)
        try:
            program = DeviceProgram(driver, image.launches, image.cubin, _pieces(weights), state)
        except ImageError as error:
            raise KernelError(
                f"{driver.name} ({driver.arch}, with a driver for CUDA {cuda.in_words(cuda.present().version)}) does"
                f" not load kernels that CUDA {image.compiler} compiled for {image.arch} ({error}); update the NVIDIA"
                " driver, or install a CUDA toolkit that is no newer than it"
            ) from error
        undone.pop_all()
    weakref.finalize(program, driver.leave_all).atexit = False
    return program


def _pieces(weights: Path) -> Iterator[memoryview]:
    content = np.memmap(weights, np.uint8, "r") if weights.stat().st_size else np.empty(0, np.uint8)
    return (content[i : i + PIECE].data for i in range(0, content.nbytes, PIECE))
