"""TVM's runtime alone: runs compiled programs without TVM's compiler, which is a hundred times its size, and torch.

Only :mod:`.tvm_api` and this module touch TVM. In a process that has loaded the compiler already, that one is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import KernelError
from .threads import thread_count

os.environ.setdefault("TVM_NUM_THREADS", str(thread_count()))

_CPU, _POOLED_ALLOCATOR = 1, 2
"""Numbers of the virtual machine's own interface: the device type, and an allocator that keeps what it has freed."""


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


def _load() -> Any:
    try:
        with _without_torch():
            import tvm_ffi
        if sys.modules.get("tvm") is None:
            found = importlib.util.find_spec("tvm")
            if found is None or not found.submodule_search_locations:
                raise ImportError("the package apache-tvm is missing")
            (folder,) = found.submodule_search_locations
            ctypes.CDLL(str(Path(folder) / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
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
        try:
            module = self._ffi.load_module(str(library))
            self._machine = module["vm_load_executable"]()
            self._machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        except (OSError, RuntimeError, AttributeError, ValueError) as error:
            raise KernelError(f"the compiled program {library} cannot be loaded ({error}); delete it") from error

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the program, on and to tensors."""
        return self._machine[name]

    def tensor(self, array: np.ndarray) -> Any:
        """A tensor in the memory of an array."""
        return self._ffi.from_dlpack(array)

    def tuple(self, arrays: Sequence[np.ndarray]) -> Any:
        """A tuple of tensors in the memory of arrays."""
        return self._ffi.convert([self.tensor(a) for a in arrays])


def array(tensor: Any) -> np.ndarray:
    """An array in the memory of a tensor."""
    return np.from_dlpack(tensor)
