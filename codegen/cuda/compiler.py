"""CUDA text to cubin: nvcc, or NVRTC through ``cuda-bindings`` where there is no nvcc."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError

FLAGS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
"""Flags of every compilation. No fast math, and no fused multiply-add but those written as ``__fmaf_rn``."""

_UNUSED_VARIABLE = "177"  # TVM names common subexpressions it then does not use.
_TIMEOUT_S = 300.0

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and what ptxas says of it.

    Attributes:
        cubin: the ELF image.
        registers: per thread.
        spills: bytes of spill stores and loads per thread.
        shared_bytes: static shared memory per block.
    """

    cubin: bytes
    registers: int
    spills: int
    shared_bytes: int

    @classmethod
    def from_log(cls, cubin: bytes, log: str) -> Binary:
        """Reads the resources from the output of ``ptxas -v``.

        Raises:
            KernelError: the output says nothing of registers.
        """
        registers = _REGISTERS.search(log)
        if registers is None:
            raise KernelError(f"ptxas reported no register count: {log.strip()[:500]!r}")
        spills, shared = _SPILLS.search(log), _SHARED.search(log)
        return cls(
            cubin=cubin,
            registers=int(registers[1]),
            spills=int(spills[1]) + int(spills[2]) if spills else 0,
            shared_bytes=int(shared[1]) if shared else 0,
        )


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler that turns kernel text into cubin.

    Attributes:
        path: of nvcc, or ``None`` for NVRTC.
        identity: name, version and flags; part of every cache key.
    """

    path: str | None
    identity: str

    @classmethod
    def find(cls) -> CudaCompiler:
        """nvcc from ``CUDA_HOME``, ``CUDA_PATH`` or the search path; else NVRTC.

        Raises:
            KernelError: there is neither.
        """
        flags = " ".join(FLAGS)
        nvcc = find_tool("nvcc")
        if nvcc:
            version = subprocess.run(
                [nvcc, "--version"], capture_output=True, text=True, errors="replace", check=False
            ).stdout
            return cls(nvcc, f"{version.strip()} {flags}")
        version = nvrtc_version()
        if version is None:
            raise KernelError(
                "a CUDA target needs nvcc or NVRTC; install the CUDA toolkit, or: pip install cuda-bindings"
                " nvidia-cuda-nvrtc"
            )
        return cls(None, f"nvrtc {version} {flags}")

    def compile(self, source: str, arch: str) -> Binary:
        """Compiles one kernel for one architecture.

        Raises:
            KernelError: the compiler rejects it, or does not know the architecture.
        """
        return self._nvcc(source, arch) if self.path else self._nvrtc(source, arch)

    def _nvcc(self, source: str, arch: str) -> Binary:
        assert self.path is not None
        with tempfile.TemporaryDirectory(prefix="lbllm-nvcc-") as folder:
            text, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
            text.write_text(source, encoding="utf-8")
            command = [self.path, "--cubin", f"-arch={arch}", *FLAGS, "-diag-suppress", _UNUSED_VARIABLE]
            command += ["-Xptxas", "-v", "-o", str(cubin), str(text)]
            try:
                process = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired:
                raise KernelError(f"nvcc did not finish a kernel for {arch} in {_TIMEOUT_S:.0f} s") from None
            log = process.stdout + process.stderr
            if process.returncode:
                raise KernelError(f"nvcc cannot compile a generated kernel for {arch}: {log.strip()[:2000]}")
            return Binary.from_log(cubin.read_bytes(), log)

    def _nvrtc(self, source: str, arch: str) -> Binary:
        nvrtc = _nvrtc()
        assert nvrtc is not None
        failed, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
        if failed:
            raise KernelError(f"NVRTC cannot start ({failed}); reinstall cuda-bindings and nvidia-cuda-nvrtc")
        try:
            options = [f"--gpu-architecture={arch}", *(f"-{flag}" for flag in FLAGS), "--ptxas-options=-v"]
            (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            output = _nvrtc_output(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            log = output.rstrip(b"\0").decode(errors="replace")
            if failed:
                raise KernelError(f"NVRTC cannot compile a generated kernel for {arch}: {log.strip()[:2000]}")
            return Binary.from_log(_nvrtc_output(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log)
        finally:
            nvrtc.nvrtcDestroyProgram(program)


def _nvrtc_output(program: Any, size: Any, fill: Any) -> bytes:
    failed, count = size(program)
    if failed:
        raise KernelError(f"NVRTC gives no result ({failed})")
    buffer = bytearray(count)
    fill(program, buffer)
    return bytes(buffer)


def find_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: in ``CUDA_HOME``, in ``CUDA_PATH`` or on the search path."""
    homes = [Path(home) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    return shutil.which(name, path=os.pathsep.join([*map(str, homes), os.environ.get("PATH", os.defpath)]))


def nvrtc_version() -> str | None:
    """Version of NVRTC, e.g. ``"12.8"``; None where it does not load."""
    nvrtc = _nvrtc()
    if nvrtc is None:
        return None
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _nvrtc() -> Any | None:
    """The module ``cuda.bindings.nvrtc`` if it and the library behind it load."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError):
        return None
    return nvrtc
