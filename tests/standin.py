"""Builds the stand-in driver (``standin_driver.cpp``) and modules of kernels for it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from lbllm_compile.codegen import cuda
from lbllm_compile.codegen.cuda.text import begins

TESTS = Path(__file__).parent
EMULATION = Path(cuda.__file__).parent
_FLAGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-D__CUDA_ARCH__=900",
    "-w",
    f"-I{TESTS}",
    f"-I{EMULATION}",
    "-fPIC",
]
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\([^)]*\) \{')

_WAITS = re.compile(r"__sync|__shfl|\bmma_|\bcop(?:y|ies)_")
"""What fibers are needed for: barriers, and what lanes or copies of a thread do together."""

_FOLDER = tempfile.TemporaryDirectory(prefix="standin-")


@functools.cache
def driver() -> str:
    """Path of the compiled stand-in. A process has one: modules find its functions by their names."""
    library = Path(_FOLDER.name) / "libcuda.so.1"
    _compile(["-O1", "-shared", "-o", str(library), str(TESTS / "standin_driver.cpp"), "-ldl"])
    return str(library)


def cubin(source: str, folder: Path) -> bytes:
    """Kernels as the stand-in loads them."""
    heads = list(_KERNEL.finditer(source))
    ends = [*(head.start() for head in heads[1:]), len(source)]
    rows = []
    for head, end in zip(heads, ends, strict=True):
        body = source[head.start() : end]
        waits, first = (str(bool(found)).lower() for found in (_WAITS.search(body), begins(body)))
        entry = f"standin::Entry<{head[2]}>"
        rows.append(f'{{"{head[2]}", {head[1]}, {waits}, {first}, {entry}::count, {entry}::sizes, {entry}::run}}')
    text = f"""#include "emulation.h"
#include "standin_module.h"
{source}
extern "C" char __start_cuda_shared __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared __attribute__((weak, visibility("hidden")));
extern "C" void standin_shared(char** begin, char** end) {{
  *begin = &__start_cuda_shared;
  *end = &__stop_cuda_shared;
}}
extern "C" const standin::Kernel standin_kernels[] = {{
{",".join(rows)}, {{nullptr, 0, false, false, 0, nullptr, nullptr}}}};
"""
    file, library = folder / "module.cpp", folder / "module.so"
    file.write_text(text)
    _compile(["-O1", "-shared", "-o", str(library), str(file)])
    return library.read_bytes()


def _compile(arguments: list[str]) -> None:
    process = subprocess.run(["g++", *_FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[:4000]
