"""The only module that imports TVM: everything the compiler uses of it, under one roof.

Importing this module imports TVM (seconds); modules that only describe work (specs, targets, databases) never do.
TVM reads its thread count once, at the first parallel launch, and starts with one thread on some machines, so the count
is set here, before TVM is loaded.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import KernelError
from .targets import host
from .threads import thread_count

os.environ.setdefault("TVM_NUM_THREADS", str(thread_count()))
host.grants_tiles()  # whatever kernels run in this process may use them

try:
    import tvm
    import tvm_ffi
    from tvm import relax, rpc, s_tir, te, tirx
    from tvm.script import tirx as T
    from tvm.tirx import PrimFunc
    from tvm.tirx.build import split_host_device_mods
except (ImportError, OSError, AttributeError) as error:
    raise KernelError(
        f"TVM could not be loaded ({error}); install the tested versions: pip install 'apache-tvm==0.27.*'"
        " 'apache-tvm-ffi>=0.1.14,<0.1.15'"
    ) from error

__all__ = [
    "PrimFunc",
    "RemoteSession",
    "T",
    "Tracker",
    "VERSION",
    "assembly",
    "build_context",
    "compile_functions",
    "cuda_source",
    "export_library",
    "include_paths",
    "intrinsic",
    "llvm_version",
    "object_code",
    "prepared",
    "pure_intrinsic",
    "relax",
    "renew_definitions",
    "s_tir",
    "symbolic_dimension",
    "te",
    "tirx",
    "tvm",
    "tvm_ffi",
]

VERSION: str = tvm.__version__

# TVM's annotations admit less than its functions take: lists of numbers, say, where they name expressions.
relax: Any = relax
s_tir: Any = s_tir
te: Any = te
tirx: Any = tirx


def llvm_version() -> str:
    """The major version of the LLVM inside TVM."""
    return str(tvm.target.codegen.llvm_version_major())


def include_paths() -> list[str]:
    """Folders of the C headers that describe how kernels are called."""
    return [
        tvm.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_dlpack_include_path(),
    ]


def symbolic_dimension(name: str) -> Any:
    """A size that is known at run time only."""
    return tvm.tirx.Var(name, "int64")


def renew_definitions(function: PrimFunc) -> Any:
    """The same function with variables and buffers of its own."""
    return tvm_ffi.get_global_func("s_tir.RenewDefs")(function)


FAST_BUILD = ["s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim"]
"""Passes to leave out: four fifths of a kernel's compile time, for nothing. Our buffers are as small as they get, and
LLVM finds common subexpressions itself."""


def build_context() -> Any:
    """The settings with which kernels are compiled, for a measurement as for a program: what is timed is what runs.

    Storage rewriting is off. It reuses a buffer as soon as its last reader has begun, and in a merged launch another
    thread may still be reading; it also takes buffers off the stack (:mod:`.kernels.memory`).
    """
    return tvm.transform.PassContext(disabled_pass=FAST_BUILD, config={"tirx.disable_storage_rewrite": True})


def intrinsic(name: str) -> Any:
    """The identifier of an LLVM intrinsic, e.g. ``llvm.fma``.

    Raises:
        KernelError: this TVM's LLVM does not know it.
    """
    number = tvm.target.codegen.llvm_lookup_intrinsic_id(name)
    if not number:
        raise KernelError(
            f"TVM's LLVM has no intrinsic {name}; install the tested version: pip install apache-tvm==0.27.*"
        )
    return number


def pure_intrinsic(dtype: str, name: str, *args: Any) -> Any:
    """A call of a side-effect-free LLVM intrinsic."""
    return T.call_llvm_pure_intrin(dtype, intrinsic(name), *args)


def compile_functions(functions: dict[str, PrimFunc], target: dict[str, Any]) -> Any:
    """Compiles functions into one library: ``library[name](*tensors)`` runs one of them.

    Args:
        functions: by name; the name becomes the symbol.
        target: TVM's target description, e.g. ``{"kind": "llvm", "mcpu": "x86-64-v4"}``.

    Raises:
        KernelError: TVM rejects a function.
    """
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    try:
        with build_context():
            return tvm.compile(module, target=tvm.target.Target(target))
    except Exception as error:  # TVM raises many types; each means that this kernel cannot be built
        raise KernelError(f"TVM cannot compile {', '.join(functions)} for {target}: {error}") from error


def prepared(function: Any, *tensors: Any) -> Callable[[], None]:
    """A call of a compiled function with fixed torch tensors, converted once, which the result keeps alive."""
    return functools.partial(function, *(tvm_ffi.from_dlpack(tensor) for tensor in tensors))


def object_code(functions: dict[str, PrimFunc], target: dict[str, Any]) -> bytes:
    """Compiles functions, for any CPU that LLVM knows, into an object file; arguments as :func:`compile_functions`."""
    library = compile_functions(functions, target)
    with tempfile.TemporaryDirectory(prefix="lbllm-object-") as folder:
        path = Path(folder) / "kernels.o"
        library.mod.write_to_file(str(path))
        return path.read_bytes()


def assembly(functions: dict[str, PrimFunc], target: dict[str, Any]) -> str:
    """Compiles functions, for any CPU that LLVM knows, into assembly; arguments as :func:`compile_functions`."""
    return compile_functions(functions, target).mod.inspect_source("s")


def export_library(library: Any, file: Path, compiler: str | None = None) -> None:
    """Links a compiled library into a shared object.

    Args:
        library: from :func:`compile_functions`.
        file: ends in ``.so``.
        compiler: a C compiler that links for the target's machine; None for this machine's.

    Raises:
        KernelError: there is no such compiler, or it cannot link.
    """
    if compiler and not shutil.which(compiler):
        raise KernelError(f"there is no compiler {compiler!r} to link kernels with; install it or pass another --cc")
    try:
        library.export_library(str(file), **({"cc": compiler} if compiler else {}))
    except Exception as error:  # TVM lets through whatever the compiler's start raises
        last = str(error).strip().rpartition("\n")[2]
        raise KernelError(
            f"kernels cannot be linked with {compiler or 'the C compiler of this machine'} ({last}); pass another --cc"
        ) from error


TRACKER_SECONDS = 10.0
"""How long a tracker may take to answer, and a busy device to become free, in one of TVM's five attempts."""


class Tracker:
    """A TVM RPC tracker and the devices it lends under one key.

    TVM's servers let whoever reaches them run any code: a tracker belongs in a network of trusted machines.

    Args:
        host, port: where it listens.
        key: what its devices are registered under.

    Raises:
        KernelError: it does not answer, or has no such device.
    """

    def __init__(self, host: str, port: int, key: str):
        self._where = f"{host}:{port}"
        self._key = key
        try:
            # TVM repeats a refused connection for a minute, and waits forever for whoever is no tracker.
            socket.create_connection((host, port), TRACKER_SECONDS).close()
            socket.setdefaulttimeout(TRACKER_SECONDS)
            self._tracker = rpc.connect_tracker(host, port)
            known = {entry["key"].partition(":")[2] for entry in self._tracker.summary()["server_info"]}
        except (OSError, RuntimeError, ValueError) as error:
            raise KernelError(
                f"no TVM RPC tracker answers at {self._where} ({error}); start one with"
                " 'python -m tvm.exec.rpc_tracker' there, or correct --rpc"
            ) from error
        finally:
            socket.setdefaulttimeout(None)
        if key not in known:
            offered = f"its keys are {', '.join(sorted(known))}" if known else "no device is registered there"
            raise KernelError(
                f"the tracker at {self._where} has no device {key!r}; {offered}; start 'python -m tvm.exec.rpc_server"
                f" --tracker {self._where} --key {key}' on the device"
            )

    @contextmanager
    def session(self, seconds: float) -> Iterator[RemoteSession]:
        """A session on one of the devices, which its server ends after so long.

        Raises:
            KernelError: no device becomes free, or it fails.
        """
        try:
            session = self._tracker.request(self._key, session_timeout=math.ceil(seconds))
        except Exception as error:  # TVM raises its own types and the system's
            raise KernelError(
                f"no device {self._key!r} of the tracker at {self._where} can be reached ({error}); see that its"
                " server runs and is free"
            ) from error
        try:
            yield RemoteSession(session)
        finally:
            # The server serves nobody else before; waiting for Python to drop every reference could take long.
            session.get_function("CloseRPCConnection")()


class RemoteSession:
    """A device of a tracker for a while: files and tensors are uploaded to it, functions run there.

    An error there is one of TVM's here.
    """

    def __init__(self, session: Any):
        self._session = session
        self._device = session.cpu(0)

    def threads(self) -> int:
        """Size of its thread pool."""
        return int(self._session.get_function("runtime.NumThreads")())

    def upload(self, tensor: Tensor) -> Any:
        """A copy of a tensor in the device's memory, 64-byte aligned; its ``numpy()`` fetches it back."""
        return tvm.runtime.tensor(tensor.contiguous().numpy(), device=self._device)

    def allocate(self, count: int) -> Any:
        """``uint8 [count]`` in the device's memory, not written yet."""
        return tvm.runtime.empty((count,), "uint8", self._device)

    def load(self, file: Path) -> Any:
        """A shared object's functions by name: ``loaded[name](*tensors)`` runs one on uploaded tensors."""
        self._session.upload(str(file))
        return self._session.load_module(file.name)

    def times(self, module: Any, name: str, arguments: Sequence[Any], calls: int) -> list[float]:
        """Seconds of single calls, each with all arguments but the first flushed from the caches before it."""
        evaluator = module.time_evaluator(
            name, self._device, number=1, repeat=calls, f_preproc="cache_flush_cpu_non_first_arg"
        )
        return [float(seconds) for seconds in evaluator(*arguments).results]


_CUDA_COMPILER = "tvm_callback_cuda_compile"


def cuda_source(function: PrimFunc, name: str, arch: str) -> str:
    """Lowers a function with thread bindings to CUDA source text; no CUDA compiler and no device is needed.

    TVM hands the text it generates to a compiler callback; for the time of this call that is one that does nothing.

    Args:
        function: launches one kernel.
        name: the kernel's symbol becomes ``<name>_kernel``.
        arch: e.g. ``"sm_90"``; the text for a virtual one, e.g. ``"compute_90"``, is the same.

    Returns:
        The kernel, from ``extern "C" __global__`` on, without TVM's preamble of headers (these kernels need none).

    Raises:
        KernelError: TVM rejects the function.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": arch.replace("compute_", "sm_")}, host={"kind": "llvm"})
    previous = tvm_ffi.get_global_func(_CUDA_COMPILER, allow_missing=True)
    try:
        module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
        module = tvm.tirx.transform.BindTarget(target)(module)
        pipeline, _, finalize = tvm.tirx.get_default_tir_pipeline(target)  # pyright: ignore[reportGeneralTypeIssues]
        _, devices = split_host_device_mods(pipeline(module))
        ((device, kernels),) = devices.items()
        tvm_ffi.register_global_func(_CUDA_COMPILER, lambda code: b"", override=True)
        text = tvm.get_global_func("target.build.cuda")(finalize()(kernels), device).inspect_source()
    except Exception as error:  # as above
        raise KernelError(f"TVM cannot generate CUDA for {name}: {error}") from error
    finally:
        if previous is not None:
            tvm_ffi.register_global_func(_CUDA_COMPILER, previous, override=True)
    return text[text.index('extern "C" __global__') :]
