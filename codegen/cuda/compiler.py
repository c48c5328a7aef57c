"""CUDA text to cubin: nvcc, or NVRTC through ``cuda-bindings`` where there is no nvcc.

An architecture is a real one, e.g. ``"sm_90"``, for which the result is a cubin, or a virtual one, e.g.
``"compute_90"``, for which it is PTX that the driver of any later device compiles.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import KernelError

FLAGS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
"""Flags of every compilation that decide what it computes; docs/targets.md says what each is for. No fast math, and no
fused multiply-add but those written as ``__fmaf_rn``."""

MISCOMPILES = ((13, 2, 0), (13, 2, 86))
"""From the first build that drops the masks of byte reads to the first that does not: CUDA 13.2.0 (13.2.51) and 13.2.1
(13.2.78) do, 13.2.2 does not (https://github.com/ggml-org/llama.cpp/issues/28581)."""

NO_COMPILER = "a CUDA target needs nvcc or NVRTC; install the CUDA toolkit, or: pip install 'lbllm-compile[cuda]'"

_UNUSED = "177,550"  # TVM names common subexpressions and totals that it then does not use.
_TIMEOUT_S = 300.0

_BUILD = re.compile(r"\bV(\d+)\.(\d+)\.(\d+)")
_KERNEL = re.compile(r"Compiling entry function '(\w+)'")
_VERSION = re.compile(r"(?:release|nvrtc) (\d+\.\d+)")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"(\d+) bytes smem")


class SpillError(KernelError):
    """Kernels keep registers in memory, which makes them slow.

    Attributes:
        spilled: bytes a thread, by the kernel's symbol.
        cubin: what was compiled all the same, for where its speed does not matter; None where it is not known.
    """

    def __init__(self, spilled: Mapping[str, int], cubin: bytes | None = None):
        said = "; ".join(f"registers of {symbol} spill: {count} bytes a thread" for symbol, count in spilled.items())
        super().__init__(said)
        self.spilled, self.cubin = spilled, cubin


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor.

    Attributes:
        registers: per thread; none spills.
        shared_bytes: static shared memory per block.
    """

    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class Binary:
    """Compiled kernels and what ptxas says of them.

    Attributes:
        cubin: the ELF image, or the text of PTX.
        kernels: by symbol; empty for PTX, which the driver will compile.
    """

    cubin: bytes
    kernels: Mapping[str, Resources] = field(default_factory=dict)

    @classmethod
    def from_log(cls, cubin: bytes, log: str) -> Binary:
        """Reads the resources from the output of ``ptxas -v``.

        Raises:
            SpillError: registers spill.
            KernelError: the output says nothing of registers.
        """
        _, *parts = _KERNEL.split(log)
        kernels, spilled = {}, {}
        for symbol, said in zip(parts[::2], parts[1::2], strict=True):
            registers, spills, shared = _REGISTERS.search(said), _SPILLS.search(said), _SHARED.search(said)
            if registers is None:
                break
            if count := int(spills[1]) + int(spills[2]) if spills else 0:
                spilled[symbol] = count
            kernels[symbol] = Resources(int(registers[1]), int(shared[1]) if shared else 0)
        if 2 * len(kernels) != len(parts) or not kernels:
            raise KernelError(f"ptxas reported no register count: {log.strip()[:500]!r}")
        if spilled:
            raise SpillError(spilled, cubin)
        return cls(cubin, kernels)


def is_virtual(arch: str) -> bool:
    """Whether an architecture is one that PTX is for."""
    return arch.startswith("compute_")


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler that turns kernel text into cubin or PTX.

    Attributes:
        path: of nvcc, or ``None`` for NVRTC.
        identity: name, version and flags; part of every cache key.
    """

    path: str | None
    identity: str

    @property
    def version(self) -> str:
        """The version of CUDA that it is of, e.g. ``"13.0"``."""
        found = _VERSION.search(self.identity)
        return found[1] if found else "of unknown version"

    @classmethod
    def find(cls) -> CudaCompiler:
        """nvcc from ``CUDA_HOME``, ``CUDA_PATH`` or the search path; else NVRTC.

        Raises:
            KernelError: there is neither, or the one there is miscompiles.
        """
        flags = " ".join(FLAGS)
        nvcc = find_tool("nvcc")
        if nvcc:
            version = _output([nvcc, "--version"])
            if fault := nvcc_fault(version):
                raise KernelError(fault)
            return cls(nvcc, f"{version.strip()} {flags}")
        version = nvrtc_version()
        if version is None:
            raise KernelError(NO_COMPILER)
        if fault := nvrtc_fault(version):
            raise KernelError(fault)
        return cls(None, f"nvrtc {nvrtc_build(version) or version} {flags}")

    @property
    def architectures(self) -> frozenset[str]:
        """Those it compiles for, real ones; empty where it does not tell."""
        return _nvcc_architectures(self.path) if self.path else _nvrtc_architectures()

    def check(self, archs: Iterable[str]) -> None:
        """Refuses architectures that this compiler does not know.

        Raises:
            KernelError: naming them and those it knows.
        """
        known = self.architectures
        unknown = [arch for arch in archs if arch.replace("compute_", "sm_") not in known]
        if known and unknown:
            listed = ", ".join(sorted(known, key=lambda arch: int(re.sub(r"\D", "", arch))))
            raise KernelError(
                f"the {'nvcc' if self.path else 'NVRTC'} here cannot compile for {', '.join(unknown)}; update it, or"
                f" name others with --target cuda:ARCHITECTURE: it knows {listed}"
            )

    def compile(self, source: str, arch: str) -> Binary:
        """Compiles kernels for one architecture, real or virtual.

        Raises:
            SpillError: registers spill.
            KernelError: the compiler rejects them, or does not know the architecture.
        """
        return self._nvcc(source, arch) if self.path else self._nvrtc(source, arch)

    def _nvcc(self, source: str, arch: str) -> Binary:
        assert self.path is not None
        with tempfile.TemporaryDirectory(prefix="lbllm-nvcc-") as folder:
            text, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
            text.write_text(source, encoding="utf-8")
            command = [self.path, "--ptx" if is_virtual(arch) else "--cubin", f"-arch={arch}", *FLAGS]
            command += ["-diag-suppress", _UNUSED, "-Xptxas", "-v", "-o", str(cubin), str(text)]
            try:
                process = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired:
                raise KernelError(f"nvcc did not finish a kernel for {arch} in {_TIMEOUT_S:.0f} s") from None
            log = process.stdout + process.stderr
            if process.returncode:
                raise KernelError(f"nvcc cannot compile a generated kernel for {arch}: {log.strip()[:2000]}")
            return Binary(cubin.read_bytes()) if is_virtual(arch) else Binary.from_log(cubin.read_bytes(), log)

    def _nvrtc(self, source: str, arch: str) -> Binary:
        nvrtc = _nvrtc()
        assert nvrtc is not None
        failed, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
        if failed:
            raise KernelError(f"NVRTC cannot start ({failed}); reinstall cuda-bindings and nvidia-cuda-nvrtc")
        try:
            options = [f"--gpu-architecture={arch}", *(f"-{flag}" for flag in FLAGS), f"--diag-suppress={_UNUSED}"]
            if not is_virtual(arch):
                options.append("--ptxas-options=-v")
            (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            output = _nvrtc_output(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            log = output.rstrip(b"\0").decode(errors="replace")
            if failed:
                raise KernelError(f"NVRTC cannot compile a generated kernel for {arch}: {log.strip()[:2000]}")
            if is_virtual(arch):
                return Binary(_nvrtc_output(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0"))
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


def _output(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return process.stdout if process.returncode == 0 else ""


@functools.cache
def _nvcc_architectures(nvcc: str) -> frozenset[str]:
    return frozenset(re.findall(r"^sm_\d+$", _output([nvcc, "--list-gpu-code"]), re.MULTILINE))


def _nvrtc_architectures() -> frozenset[str]:
    nvrtc = _nvrtc()
    failed, numbers = nvrtc.nvrtcGetSupportedArchs() if nvrtc else (True, ())
    return frozenset() if failed else frozenset(f"sm_{number}" for number in numbers)


def nvcc_fault(version: str) -> str:
    """Why an nvcc must not be used, by what it says for ``--version``; empty where it may."""
    build = _BUILD.search(version)
    return _fault("nvcc", tuple(map(int, build.groups()))) if build else ""


def nvrtc_fault(version: str) -> str:
    """Why NVRTC of a version, e.g. ``"13.2"``, must not be used; empty where it may.

    NVRTC itself does not tell its build, the package that it came in does.
    """
    first, _ = MISCOMPILES
    if version != f"{first[0]}.{first[1]}":
        return ""
    build = nvrtc_build(version)
    return _fault("NVRTC", tuple(map(int, build.split(".")[:3])) if build else first)


def _fault(name: str, build: tuple[int, ...]) -> str:
    first, mended = MISCOMPILES
    if not first <= build < mended:
        return ""
    release, patch = ".".join(map(str, mended[:2])), mended[2]
    return (
        f"{name} of CUDA {release}.0 and {release}.1 miscompiles reads of bytes, and this one is or may be of these;"
        f" install CUDA {release}.2 (build {release}.{patch}) or later, or one before {release}"
    )


def nvrtc_build(version: str) -> str | None:
    """The build of NVRTC of a version, e.g. ``"13.2.86"``, where a package that tells it is what loads."""
    try:
        build = importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return None
    return build if build.startswith(f"{version}.") else None


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
