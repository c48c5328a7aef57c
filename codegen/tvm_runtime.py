"""TVM's runtime alone: runs compiled programs without TVM's compiler, which is a hundred times its size, and torch.

Only :mod:`.tvm_api` and this module touch TVM. In a process that has loaded the compiler already, that one is used. An
install that only runs what others have compiled need not have the package: whoever loads a program with it keeps its
runtime library in the cache directory, where the program is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .cache import cache_directory, known_sha256, write_atomically
from .errors import KernelError
from .targets import host
from .threads import thread_count

os.environ.setdefault("TVM_NUM_THREADS", str(thread_count()))
host.grants_tiles()  # whatever kernels run in this process may use them

_CPU, _POOLED_ALLOCATOR = 1, 2
"""Numbers of the virtual machine's own interface: the device type, and an allocator that keeps what it has freed."""


_LIBRARY = "libtvm_runtime.so"
_KEPT = re.compile(r"libtvm_runtime-(?P<version>.+)-(?P<sha256>[0-9a-f]{64})\.so")


def version() -> str:
    """The version of the TVM whose runtime is used: of the package, else of what was kept last; empty without both."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("apache-tvm")
    kept = _kept()
    return kept[1]["version"] if kept else ""


def _keep() -> None:
    """Keeps the package's runtime library in the cache directory; nothing where that cannot be written."""
    library = _packaged()
    if library is None:
        return
    with contextlib.suppress(OSError):
        place = _runtimes() / f"libtvm_runtime-{version()}-{known_sha256(library)}.so"
        if place.is_file():
            os.utime(place)
        else:
            write_atomically(place, library.read_bytes())


def _runtimes() -> Path:
    return cache_directory() / "runtimes"


def _kept() -> tuple[Path, re.Match[str]] | None:
    """The runtime library that was kept last, or used last where it was kept, with its name taken apart."""
    try:
        found = [(path, name) for path in _runtimes().iterdir() if (name := _KEPT.fullmatch(path.name))]
    except OSError:
        return None
    return max(found, key=lambda kept: kept[0].stat().st_mtime_ns, default=None)


def _packaged() -> Path | None:
    """The runtime library of the installed package; None where it is not installed."""
    found = importlib.util.find_spec("tvm")
    folders = (found.submodule_search_locations if found else None) or []  # any folder called tvm is a package
    return next((file for folder in folders if (file := Path(folder) / "lib" / _LIBRARY).is_file()), None)


def _library() -> Path:
    """The runtime library to use.

    Raises:
        ImportError: there is none, or the one that was kept is not the file that it was.
    """
    if packaged := _packaged():
        return packaged
    kept = _kept()
    if kept is None:
        raise ImportError("the package apache-tvm is missing")
    path, name = kept
    if known_sha256(path) != name["sha256"]:
        raise ImportError(f"'{path}' is damaged; delete it, and prepare the artifact again where TVM is installed")
    return path


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch: the foreign-function package would import it for the mere case that it is used later."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] - what makes an import fail
    try:
        yield
    finally:
        del sys.modules["torch"]


@functools.cache
def _load() -> Any:
    """The foreign-function package, with the runtime loaded; once, because two copies of it exclude each other."""
    try:
        with _without_torch():
            import tvm_ffi
        if sys.modules.get("tvm") is None:
            ctypes.CDLL(str(_library()), ctypes.RTLD_GLOBAL)
    except (ImportError, OSError, AttributeError) as error:
        raise KernelError(
            f"TVM's runtime could not be loaded ({error}); install the tested versions: pip install"
            " 'apache-tvm==0.27.*' 'apache-tvm-ffi>=0.1.14,<0.1.15'"
        ) from error
    return tvm_ffi


class Machine:
    """A compiled program, loaded into TVM's virtual machine.

    Args:
        library: the shared library of a program.

    Raises:
        KernelError: TVM's runtime or the library cannot be loaded.
    """

    def __init__(self, library: Path):
        self._ffi = _load()
        self._functions: dict[str, Callable[..., Any]] = {}
        _keep()
        try:
            module = self._ffi.load_module(str(library))
            self._machine = module["vm_load_executable"]()
            self._machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        except (OSError, RuntimeError, AttributeError, ValueError) as error:
            raise KernelError(f"the compiled program {library} cannot be loaded ({error}); delete it") from error

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the program, on and to tensors."""
        if name not in self._functions:
            self._functions[name] = self._machine[name]  # looked up once: that takes microseconds
        return self._functions[name]

    def tensor(self, array: np.ndarray) -> Any:
        """A tensor in the memory of an array."""
        return self._ffi.from_dlpack(array)

    def tuple(self, arrays: Sequence[np.ndarray]) -> Any:
        """A tuple of tensors in the memory of arrays."""
        return self._ffi.convert([self.tensor(a) for a in arrays])


def array(tensor: Any) -> np.ndarray:
    """An array in the memory of a tensor."""
    return np.from_dlpack(tensor)
