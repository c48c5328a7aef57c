"""Runs kernels generated for one CPU on another, to prove them where there is no such machine.

The kernels are linked with ``emulation.c`` into a program that runs as a process of its own, under QEMU where the
architecture is another. A :class:`ForeignLibrary` is called like the library of kernels that this machine runs, so
:mod:`..prove` works on it unchanged.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import KernelError
from ..tvm_api import include_paths, intrinsic, tirx, tvm, tvm_ffi

PACKED_ALIGNMENT = 64
"""Alignment in bytes that kernels expect of packed weights, the only ``uint8`` arguments; others have their dtype's."""

_RUNTIME = Path(__file__).parent / "emulation.c"
_COMPILE_S = 120.0
_DTYPES = {torch.int8: (0, 8), torch.int16: (0, 16), torch.uint8: (1, 8), torch.float32: (2, 32)}
"""DLPack's code and bits."""


@dataclass(frozen=True)
class Machine:
    """How programs are made for a CPU and run here.

    Attributes:
        compiler: a C compiler for it and its options.
        runner: what a program's command starts with.
        packages: Debian's names of the packages with both.
    """

    compiler: tuple[str, ...]
    runner: tuple[str, ...]
    packages: str

    @property
    def missing(self) -> str | None:
        """Why nothing can be run here and what to install, or None."""
        lacking = [words[0] for words in (self.compiler, self.runner) if words and not shutil.which(words[0])]
        return f"no {' and no '.join(lacking)} (apt install {self.packages})" if lacking else None


HERE = Machine(("cc",), (), "gcc")
"""This machine itself: for kernels of a family that it does not run as they are."""

AARCH64 = Machine(
    ("aarch64-linux-gnu-gcc", "-static", "-march=armv8.2-a+dotprod+i8mm"),
    ("qemu-aarch64", "-cpu", "max"),
    "qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
)
"""An ARM CPU with every extension, emulated by QEMU."""


_TILE_INTRINSICS = tuple(
    f"llvm.x86.{name}" for name in ("ldtilecfg", "tilerelease", "tilezero", "tileloadd64", "tilestored64", "tdpbssd")
)


def with_emulated_tiles(function: Any) -> Any:
    """The same kernel, whose tile instructions are calls of the functions of ``emulation.c`` that bear their names."""
    names = {intrinsic(name): name.rpartition(".")[2] for name in _TILE_INTRINSICS}

    def replaced(call: Any) -> Any:
        if getattr(call.op, "name", "") != "tirx.call_llvm_intrin" or int(call.args[0]) not in names:
            return call
        operands = [tirx.IntImm("int32", int(a)) if str(a.ty) == "int8" else a for a in call.args[1:]]
        return tirx.call_extern("int32", names[int(call.args[0])], *operands)

    return function.with_body(tvm_ffi.structural_map(function.body, (tvm.ir.Call, replaced)))


class ForeignLibrary:
    """Kernels for another CPU: ``library[name](*tensors)`` runs one of them and changes the tensors in place.

    Use as a context manager; the process ends with it.

    Args:
        code: object code or assembly of kernels, from :mod:`..tvm_api`.
        names: the kernels in it.
        machine: what they run on.

    Raises:
        KernelError: something is missing here, or the kernels do not assemble or link.
    """

    def __init__(self, code: bytes | str, names: Sequence[str], machine: Machine):
        if machine.missing:
            raise KernelError(f"the kernels cannot be run here: {machine.missing}")
        self._index = {name: i for i, name in enumerate(names)}
        self._folder = tempfile.TemporaryDirectory(prefix="lbllm-foreign-")
        folder = Path(self._folder.name)
        kernels = folder / ("kernels.s" if isinstance(code, str) else "kernels.o")
        kernels.write_bytes(code.encode() if isinstance(code, str) else code)
        table, program = folder / "table.c", folder / "program"
        table.write_text(_table(names), encoding="utf-8")
        include = [f"-I{path}" for path in include_paths()]
        # LLVM's line table is of this version, and older forms do not assemble.
        options = ["-O1", "-gdwarf-5", *include]
        command = [*machine.compiler, *options, table, _RUNTIME, kernels, "-lm", "-o", program]
        process = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_S, check=False
        )
        if process.returncode:
            raise KernelError(f"{machine.compiler[0]} rejects generated kernels: {process.stderr.strip()[:2000]}")
        self._complaints = (folder / "complaints").open("w+b")
        self._process = subprocess.Popen(
            [*machine.runner, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints
        )

    def __enter__(self) -> ForeignLibrary:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()
        self._folder.cleanup()

    def __getitem__(self, name: str) -> Callable[..., None]:
        """One kernel, to be called with contiguous CPU tensors.

        A call raises :class:`KernelError` if the kernel refuses its arguments or leaves their memory; the library is
        of no more use then.
        """
        return functools.partial(self._call, name)

    def _call(self, name: str, *tensors: Tensor) -> None:
        arrays = [tensor.numpy() for tensor in tensors]
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            stdin.write(struct.pack("<2q", self._index[name], len(tensors)) + b"".join(map(_encode, tensors)))
            stdin.flush()
            answer = bytearray(stdout.read(sum(array.nbytes for array in arrays)))
        except BrokenPipeError:
            answer = bytearray()
        if len(answer) < sum(array.nbytes for array in arrays):
            code = self._process.wait()
            self._complaints.seek(0)
            reason = self._complaints.read().decode(errors="replace").strip() or f"it ended with code {code}"
            raise KernelError(f"the kernel {name} is wrong: {reason}")
        start = 0
        for array in arrays:
            array[...] = np.frombuffer(answer, array.dtype, array.size, start).reshape(array.shape)
            start += array.nbytes


def _table(names: Sequence[str]) -> str:
    """C text of the table of kernels in which ``emulation.c`` looks them up."""
    declarations = "".join(f"int __tvm_ffi_{name}(void*, const void*, int, void*);\n" for name in names)
    entries = ", ".join(f"__tvm_ffi_{name}" for name in names)
    return f"{declarations}int (*const kernels[])(void*, const void*, int, void*) = {{{entries}}};\n"


def _encode(tensor: Tensor) -> bytes:
    """A tensor as ``emulation.c`` reads it."""
    if not tensor.is_contiguous():
        raise KernelError("the arguments of a kernel must be contiguous; call .contiguous() on them")
    alignment = PACKED_ALIGNMENT if tensor.dtype == torch.uint8 else tensor.element_size()
    head = (*_DTYPES[tensor.dtype], alignment, tensor.dim(), *tensor.shape)
    return struct.pack(f"<{len(head)}q", *head) + tensor.numpy().tobytes()
