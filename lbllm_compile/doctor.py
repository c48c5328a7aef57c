"""Examines this machine: what the compiler and the kernels need, what is missing, and what each missing thing costs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lbllm_compile.report import terminal

_GIB = 1 << 30
_LOW_MEMORY = 4 * _GIB
_LOW_DISK = 5 * _GIB

_EXTRAS = {
    "gguf": ".gguf files cannot be read, so examples/smollm2.py does not run (pip install 'lbllm-compile[examples]')",
    "accelerate": ".gguf files cannot be read (pip install 'lbllm-compile[examples]')",
    "pyarrow": "--calibration FILE.parquet cannot be read (pip install 'lbllm-compile[data]')",
    "uvicorn": "artifacts cannot be served (pip install 'lbllm-compile[serve]')",
    "datasets": "--calibration hf:NAME cannot be read (pip install 'lbllm-compile[hub]')",
    "lm_eval": "eval --tasks cannot run (pip install 'lbllm-compile[eval]')",
}

_RUNS_ALONE = (
    "run, chat and serve take artifacts that another install has prepared, and nothing can be compiled"
    " (pip install 'lbllm-compile[compile]')"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: ``"ok"``, ``"note"`` (works, but something is slower or left out) or ``"missing"``.
        value: what was found.
        cost: what it costs that it is not better; empty when all is well.
    """

    area: str
    name: str
    status: str
    value: str
    cost: str = ""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def examine() -> list[Finding]:
    """Looks at everything. Takes a few seconds (torch and TVM are loaded); changes nothing."""
    areas: Sequence[Callable[[], Iterable[Finding]]] = (_cpu, _memory, _compilers, _packages, _cuda, _disk)
    return [finding for area in areas for finding in area()]


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table."""
    result = Table(box=None, pad_edge=False, title="This machine", title_justify="left", title_style="bold")
    for name in ("", "what", "found", "costs"):
        result.add_column(name, overflow="fold")
    styles = {"ok": "green", "note": "yellow", "missing": "red"}
    for f in findings:
        result.add_row(Text(f.status, style=styles[f.status]), Text(f.name), Text(f.value), Text(f.cost))
    return result


def target_rows() -> list[dict[str, Any]]:
    """Every target that code can be generated for, and whether this machine runs it."""
    from lbllm_compile.codegen import targets
    from lbllm_compile.codegen.backend import backend_of

    rows = []
    for text in targets.known_targets():
        meant = targets.parse_targets(text)
        names = ", ".join(target.name for target in meant)
        rows.append(
            {
                "target": text,
                "means": names if names != text else "",
                "kernels": meant[0].family,
                "arch": ", ".join(target.arch for target in meant),
                "features": " ".join(meant[0].features),
                "runs_here": any(backend_of(t).present(t) for t in meant),
            }
        )
    return rows


def render_targets(rows: Sequence[Mapping[str, Any]]) -> Table:
    return terminal.rows_table("Targets (several may be given, joined by commas)", rows)


def _cpu() -> Iterable[Finding]:
    from lbllm_compile.codegen.threads import thread_count

    yield from _cpu_family()
    threads, cores = thread_count(), os.cpu_count() or 1
    cost = "" if threads == cores else f"TVM_NUM_THREADS or the CPU affinity leaves {cores - threads} of them unused"
    yield Finding("cpu", "threads", "ok" if not cost else "note", f"{threads} of {cores}", cost)


def _cpu_family() -> Iterable[Finding]:
    from lbllm_compile.codegen.targets import generic, host, x86

    families = host.families()
    yield Finding("cpu", "CPU", "ok", f"{host.cpu_name()}, {platform.machine()}")
    known = sorted({flag for needed in host.NEEDED_FLAGS.values() for flag in needed} & host.cpu_flags())
    yield Finding("cpu", "CPU features", "ok" if known else "note", " ".join(known) or "none that the kernels use")
    if not {"avx512-vnni", "neon-i8mm"}.isdisjoint(families):
        yield Finding("cpu", "kernel family", "ok", families[0])
    elif families[0] == generic.FAMILY:
        cost = "no vector kernels for this CPU: generation is several times slower than with AVX2 or NEON dot products"
        yield Finding("cpu", "kernel family", "note", families[0], cost)
    else:
        missing = "AVX-512 VNNI" if families[0] in x86.CPU_FLAGS else "i8mm"
        cost = f"no {missing}: products of more than a few rows (prompts) are slower"
        yield Finding("cpu", "kernel family", "note", families[0], cost)


def _memory() -> Iterable[Finding]:
    total, available = memory()
    if total is None or available is None:
        yield Finding("memory", "memory", "note", "unknown", "plan cannot say whether a compile fits")
        return
    cost = "" if available >= _LOW_MEMORY else "only models of a few hundred million parameters compile"
    text = f"{available / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"
    yield Finding("memory", "memory", "ok" if not cost else "note", text, cost)


def memory() -> tuple[int | None, int | None]:
    """``(total, available)`` main memory in bytes; None where the system does not tell."""
    path = Path("/proc/meminfo")
    if path.is_file():
        fields = dict(line.split(":", 1) for line in path.read_text(errors="replace").splitlines() if ":" in line)
        if "MemTotal" in fields and "MemAvailable" in fields:
            total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
            return total, available
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None
    return total, total


def _compilers() -> Iterable[Finding]:
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if found:
        yield Finding("compilers", "C compiler", "ok", _first_line([found, "--version"]) or found)
    else:
        cost = "kernels cannot be linked into libraries and kept: install gcc or clang"
        yield Finding("compilers", "C compiler", "missing", "none (cc, gcc, clang)", cost)
    if _why_broken("lbllm_compile.codegen.cuda.compiler"):
        cost = f"it cannot be looked for, because torch {_lacks_torch()}"
        yield Finding("compilers", "CUDA compiler", "note", "unknown", cost)
        return
    from lbllm_compile.codegen.cuda import compiler as cuda_compiler

    nvcc, nvrtc = cuda_compiler.find_tool("nvcc"), cuda_compiler.nvrtc_version()
    neither = f"CUDA targets cannot be compiled: {cuda_compiler.NO_COMPILER}"
    if nvcc:
        lines = _lines([nvcc, "--version"])
        release = next((line for line in lines if "release" in line), "")
        fault = cuda_compiler.nvcc_fault(release)
        value = ", ".join(part for part in (release, nvcc) if part)
        yield Finding("compilers", "nvcc", "note" if fault else "ok", value, fault)
    else:
        cost = "CUDA kernels are compiled with NVRTC instead" if nvrtc else neither
        yield Finding("compilers", "nvcc", "note", "not found", cost)
    if nvrtc or not nvcc:
        cost = cuda_compiler.nvrtc_fault(nvrtc) if nvrtc else neither
        yield Finding("compilers", "NVRTC", "note" if cost else "ok", nvrtc or "not found", cost)


def _packages() -> Iterable[Finding]:
    yield Finding("packages", "Python", "ok", f"{platform.python_version()} at {sys.executable}")
    for name in ("torch", "transformers"):
        value = _version(name) or "not installed"
        if not _installed(name):
            yield Finding("packages", name, "note", "not installed", _RUNS_ALONE)
        elif reason := _why_broken(name):
            cost = f"no model can be compiled or run ({reason}); install it again: pip install --force-reinstall {name}"
            yield Finding("packages", name, "missing", f"{value}, does not load", cost)
        else:
            yield Finding("packages", name, "ok", value)
    if not _installed("tvm"):
        from lbllm_compile.codegen import tvm_runtime

        kept = f"the runtime of {tvm_runtime.version()}" if tvm_runtime.version() else "not installed"
        yield Finding("packages", "TVM", "note", kept, _RUNS_ALONE)
    elif reason := _why_broken("lbllm_compile.codegen.tvm_api"):
        cost = "TVM uses torch, which does not load either" if _why_broken("torch") else reason
        yield Finding("packages", "TVM", "missing", "does not load", cost)
    else:
        from lbllm_compile.codegen import tvm_api

        text = f"{_version('apache-tvm')}, ffi {_version('apache-tvm-ffi')}, LLVM {tvm_api.llvm_version()}"
        yield Finding("packages", "TVM", "ok", text)
    for name, cost in _EXTRAS.items():
        found = _installed(name)
        yield Finding(
            "packages", name, "ok" if found else "note", _version(name) or "not installed", "" if found else cost
        )


def _cuda() -> Iterable[Finding]:
    if _why_broken("torch"):
        yield Finding("cuda", "CUDA device", "note", "unknown", f"torch, which looks for devices, {_lacks_torch()}")
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            text = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / _GIB:.0f} GiB"
            )
            yield Finding("cuda", f"CUDA device {index}", "ok", text)
        return
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a build without CUDA"
    cost = "calibration runs on the CPU; --target cuda still generates and compiles kernels, unverified on a device"
    yield Finding("cuda", "CUDA device", "note", f"none; {built}", cost)


def _disk() -> Iterable[Finding]:
    from lbllm_compile.codegen.cache import cache_directory

    for name, path in (("disk, current directory", Path.cwd()), ("disk, kernel cache", cache_directory())):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        cost = "" if free >= _LOW_DISK else "a compile of more than a small model may not fit"
        if not os.access(existing, os.W_OK):
            cost = (
                "cannot be written: kernels would be tuned anew every time" if "cache" in name else "cannot be written"
            )
        yield Finding("disk", name, "ok" if not cost else "note", f"{free / _GIB:.0f} GiB free at {path}", cost)


@functools.cache
def _why_broken(module: str) -> str:
    """Why a module cannot be imported; empty where it can.

    Remembered, because a second attempt at a module that failed halfway fails for another reason.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged installation raises whatever it likes: ImportError, OSError, AttributeError
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _lacks_torch() -> str:
    return "does not load" if _installed("torch") else "is not installed"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _first_line(command: Sequence[str]) -> str:
    return next(iter(_lines(command)), "")


def _lines(command: Sequence[str]) -> list[str]:
    """What a program prints; nothing where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
