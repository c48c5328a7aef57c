"""CUDA architectures and their names, and the devices of this machine."""

from __future__ import annotations

import ctypes
import difflib
import functools
from collections.abc import Sequence
from ctypes import byref, c_int
from dataclasses import dataclass

from ..errors import TargetError

LIBRARY = "libcuda.so.1"
"""The driver's library."""

LEAST_VERSION = 11040
"""CUDA 11.4, of which the driver must be at least: it made ``cuGraphInstantiateWithFlags``."""

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Attributes of a device: ``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR``."""

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
"""Architectures these kernels can be compiled for; a CUDA toolkit may know fewer."""

VIRTUAL_ARCHITECTURES = tuple(arch.replace("sm_", "compute_") for arch in ARCHITECTURES)
"""What PTX can be compiled for, which the driver of any device that is not older compiles for it."""

DEFAULT_ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_100")
"""What a plain ``cuda`` means where there is no device: a cubin runs on later minors of its architecture but for
Jetsons (https://github.com/jax-ml/jax/pull/40492), PTX on all that is later."""


@dataclass(frozen=True)
class Device:
    """A CUDA device of this machine.

    Attributes:
        name: e.g. ``"NVIDIA H200"``.
        arch: e.g. ``"sm_90"``.
    """

    name: str
    arch: str


@dataclass(frozen=True)
class Present:
    """What this machine has of CUDA.

    Attributes:
        devices: in the driver's order, which the environment may change.
        version: of CUDA that the driver is for, ``1000 * major + 10 * minor``; 0 without one.
        missing: why there are no devices, in words; empty where there are.
    """

    devices: tuple[Device, ...] = ()
    version: int = 0
    missing: str = ""


def present() -> Present:
    """The driver and the devices of this machine, asked for once in a process; makes no context on a device."""
    return _present(LIBRARY)


@functools.cache
def _present(library: str) -> Present:
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return Present(missing=f"there is no NVIDIA driver here ({library} cannot be loaded)")
    version, count = c_int(), c_int()
    driver.cuDriverGetVersion(byref(version))
    if version.value < LEAST_VERSION:
        return Present(version=version.value, missing=too_old(version.value))
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)) or not count.value:
        return Present(version=version.value, missing="the NVIDIA driver here finds no CUDA device")
    return Present(tuple(_device(driver, i) for i in range(count.value)), version.value)


def too_old(version: int) -> str:
    """What is wrong with a driver of a version that is below :data:`LEAST_VERSION`."""
    return (
        f"the NVIDIA driver is too old (it is for CUDA {in_words(version)}, and programs need"
        f" {in_words(LEAST_VERSION)} at least; update it)"
    )


def in_words(version: int) -> str:
    """A version of CUDA as the driver counts it, e.g. ``"11.4"`` for 11040."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _device(driver: ctypes.CDLL, ordinal: int) -> Device:
    name, major, minor, device = ctypes.create_string_buffer(256), c_int(), c_int(), c_int()
    driver.cuDeviceGet(byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(byref(major), CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(byref(minor), CAPABILITY_MINOR, device)
    return Device(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")


def device(ordinal: int) -> Device:
    """The device of that number.

    Raises:
        TargetError: there is none.
    """
    found = present()
    if ordinal >= len(found.devices):
        told = found.missing or f"its CUDA devices are {described(found.devices)}"
        raise TargetError(f"this machine has no CUDA device {ordinal}: {told}; use --target cpu, or a device it has")
    return found.devices[ordinal]


def ordinal(arch: str, wanted: int | None) -> int | None:
    """The number of a device.

    Args:
        arch: its architecture.
        wanted: the only number that will do; None for the first device of that architecture.

    Returns:
        None where there is no such device.
    """
    found = (i for i, there in enumerate(present().devices) if there.arch == arch and wanted in (None, i))
    return next(found, None)


def described(devices: Sequence[Device]) -> str:
    """Devices with their numbers, in words."""
    return ", ".join(f"{number} ({found.name}, {found.arch})" for number, found in enumerate(devices))


def check_architectures(names: Sequence[str]) -> None:
    """Refuses architectures that these kernels cannot be compiled for.

    Raises:
        TargetError: naming what is unknown and what was probably meant.
    """
    for name in names:
        if name not in (*ARCHITECTURES, *VIRTUAL_ARCHITECTURES):
            near = difflib.get_close_matches(name, (*ARCHITECTURES, *VIRTUAL_ARCHITECTURES), n=1, cutoff=0.4)
            hint = f"did you mean cuda:{near[0]}?" if near else f"known are {', '.join(ARCHITECTURES)}"
            raise TargetError(f"unknown CUDA architecture {name!r}; {hint}")
