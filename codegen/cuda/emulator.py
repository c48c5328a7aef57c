"""Runs generated CUDA kernels on a CPU, to prove them where there is no GPU.

The kernel's text is compiled by g++ against ``emulation.h``; ``emulation.cpp`` runs it with every CUDA thread a
fiber and sees every memory access, so races, divergent barriers and accesses outside a buffer are errors, not luck. The
program runs as a process of its own: a broken kernel cannot take the compiler down.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cache import write_atomically
from ..cuda.text import STEPS, signature
from ..errors import DisprovedError, KernelError

ASCENDING, DESCENDING = 0, 1
"""Orders in which the threads of a block run between barriers; larger numbers are seeds of a shuffled order."""

_HERE = Path(__file__).parent
_HEADER, _RUNTIME = _HERE / "emulation.h", _HERE / "emulation.cpp"
_COMMON = ["-std=c++17", "-ffp-contract=off", f"-I{_HERE}"]
_KERNEL = ["-O1", "-fno-strict-aliasing", "-fsanitize=thread", "-w"]
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Sparse:
    """A buffer of which only some parts are not zero.

    Attributes:
        size: bytes of the whole buffer.
        segments: ``(offset in bytes, contents)``.
    """

    size: int
    segments: Sequence[tuple[int, Tensor]]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        grid: thread blocks along x, y, z.
        block: threads along x, y, z.
        inputs: by parameter name, buffers or ``int``.
        outputs: by parameter name, buffers with their initial contents.
        blocks: coordinates of the thread blocks to run; ``None`` for the whole grid.
        order: see :data:`ASCENDING`.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    inputs: Mapping[str, Tensor | Sparse | int]
    outputs: Mapping[str, Tensor]
    blocks: Sequence[tuple[int, int, int]] | None = None
    order: int = ASCENDING


def compiler() -> str | None:
    """Path of g++, or ``None``: then nothing can be emulated."""
    return shutil.which("g++")


class Emulator:
    """One kernel's text, compiled to run on the CPU.

    Args:
        source: CUDA text of exactly one kernel.
        cache_dir: where the compiled runtime is kept; a temporary folder by default.
        step: which of :data:`.text.STEPS` the text is read for.

    Raises:
        KernelError: there is no g++, or the text does not compile.
    """

    def __init__(self, source: str, cache_dir: Path | None = None, step: int = STEPS[-1]):
        gpp = compiler()
        if gpp is None:
            raise KernelError("CUDA kernels cannot be emulated without g++; install it (apt install g++)")
        self.signature = signature(source)
        self._folder = tempfile.TemporaryDirectory(prefix="lbllm-emulate-")
        self._program = Path(self._folder.name) / "kernel"
        runtime = _runtime(gpp, cache_dir or Path(self._folder.name))
        text = f"""#include "{_HEADER.name}"
#line 1 "kernel.cu"
{source}
void emulation::call_kernel(void** arguments) {{ call({self.signature.symbol}, arguments); }}
"""
        file = Path(self._folder.name) / "kernel.cpp"
        file.write_text(text, encoding="utf-8")
        _compile([gpp, *_COMMON, *_KERNEL, f"-D__CUDA_ARCH__={step}", "-c", str(file), "-o", f"{file}.o"])
        _compile([gpp, f"{file}.o", str(runtime), "-o", str(self._program)])

    def run(self, launch: Launch) -> dict[str, Tensor]:
        """Launches the kernel and returns its outputs by name.

        Raises:
            DisprovedError: the kernel has a race, a divergent barrier or an access outside its buffers; the message
                names block and thread.
        """
        folder = Path(self._folder.name)
        job, result = folder / "job", folder / "result"
        with job.open("wb") as file:
            file.write(self._encode(launch))
        try:
            process = subprocess.run(
                [self._program, job, result],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise KernelError(f"the emulation of {self.signature.symbol} did not end in {_TIMEOUT_S:.0f} s") from None
        if process.returncode:
            reason = process.stderr.strip() or f"the emulator ended with code {process.returncode}"
            raise DisprovedError(f"{self.signature.symbol} is wrong: {reason}")
        data = result.read_bytes()
        outputs, start = {}, 0
        for parameter in self.signature.parameters:
            if parameter.name not in launch.outputs:
                continue
            like = launch.outputs[parameter.name]
            size = like.numel() * like.element_size()
            array = np.frombuffer(bytearray(data[start : start + size]), dtype=_as_array(like).dtype)
            outputs[parameter.name] = _as_tensor(array, like)
            start += size
        return outputs

    def _encode(self, launch: Launch) -> bytes:
        """The job file that ``emulation.cpp`` reads."""
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        if threads > self.signature.threads:
            raise KernelError(f"{threads} threads exceed the launch bound {self.signature.threads}")
        x, y, z = launch.grid
        blocks = launch.blocks
        if blocks is None:
            blocks = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        parts = [_numbers(*launch.grid, *launch.block, launch.order, len(blocks))]
        parts += [_numbers(*block) for block in blocks]
        parts.append(_numbers(len(self.signature.parameters)))
        for parameter in self.signature.parameters:
            output = parameter.name in launch.outputs
            value = launch.outputs[parameter.name] if output else launch.inputs.get(parameter.name)
            if value is None or isinstance(value, int) == parameter.pointer:
                raise KernelError(f"the launch gives no suitable argument for {parameter.name}")
            name = parameter.name.encode()
            parts.append(_numbers(2 if isinstance(value, int) else int(output), len(name)) + name)
            if isinstance(value, int):
                parts.append(_numbers(value))
                continue
            sparse = value if isinstance(value, Sparse) else Sparse(value.numel() * value.element_size(), [(0, value)])
            parts.append(_numbers(sparse.size, len(sparse.segments)))
            for offset, tensor in sparse.segments:
                contents = _as_array(tensor).tobytes()
                parts.append(_numbers(offset, len(contents)) + contents)
        return b"".join(parts)


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().cpu().numpy()


def _as_tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).view(like.shape)


def _runtime(gpp: str, cache_dir: Path) -> Path:
    """The compiled runtime, from the cache where it is there."""
    version = subprocess.run([gpp, "--version"], capture_output=True, text=True, errors="replace", check=True).stdout
    digest = hashlib.sha256(
        f"{version}{_HEADER.read_text(encoding='utf-8')}{_RUNTIME.read_text(encoding='utf-8')}".encode()
    ).hexdigest()[:16]
    target = cache_dir / f"emulator-{digest}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="lbllm-emulate-") as folder:
            fresh = Path(folder) / "runtime.o"
            _compile([gpp, *_COMMON, "-O2", "-c", str(_RUNTIME), "-o", str(fresh)])
            write_atomically(target, fresh.read_bytes())
    return target


def _compile(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    if process.returncode:
        raise KernelError(f"g++ rejects a generated CUDA kernel: {process.stderr.strip()[:2000]}")
