"""The only module that imports TVM: everything the compiler uses of it, under one roof.

Importing this module imports TVM (seconds); modules that only describe work (specs, targets, databases) never do.
TVM reads its thread count once, at the first parallel launch, and starts with one thread on some machines, so the count
is set here, before TVM is loaded.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import KernelError
from .threads import thread_count

os.environ.setdefault("TVM_NUM_THREADS", str(thread_count()))

try:
    import tvm
    import tvm_ffi
    from tvm import relax, s_tir, tirx
    from tvm.script import tirx as T
    from tvm.tirx import PrimFunc
    from tvm.tirx.build import split_host_device_mods
except (ImportError, OSError, AttributeError) as error:
    raise KernelError(
        f"TVM could not be loaded ({error}); install the tested versions: pip install 'apache-tvm==0.27.*'"
        " 'apache-tvm-ffi>=0.1.14,<0.1.15'"
    ) from error

__all__ = [
    "FAST_BUILD",
    "PrimFunc",
    "T",
    "VERSION",
    "assembly",
    "compile_functions",
    "cuda_source",
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
    "tirx",
    "tvm",
    "tvm_ffi",
]

VERSION: str = tvm.__version__


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


def renew_definitions(function: PrimFunc) -> PrimFunc:
    """The same function with variables and buffers of its own."""
    return tvm_ffi.get_global_func("s_tir.RenewDefs")(function)


FAST_BUILD = ["s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim"]
"""Passes to leave out: four fifths of a kernel's compile time, for nothing. Our buffers are as small as they get, and LLVM finds common
subexpressions itself."""


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
        with tvm.transform.PassContext(disabled_pass=FAST_BUILD):
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


_CUDA_COMPILER = "tvm_callback_cuda_compile"


def cuda_source(function: PrimFunc, name: str, arch: str) -> str:
    """Lowers a function with thread bindings to CUDA source text; no CUDA compiler and no device is needed.

    TVM hands the text it generates to a compiler callback; for the time of this call that is one that does nothing.

    Args:
        function: launches one kernel.
        name: the kernel's symbol becomes ``<name>_kernel``.
        arch: e.g. ``"sm_90"``.

    Returns:
        The kernel, from ``extern "C" __global__`` on, without TVM's preamble of headers (these kernels need none).

    Raises:
        KernelError: TVM rejects the function.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
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
