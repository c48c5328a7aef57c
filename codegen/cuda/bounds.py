"""What is known of a compiled kernel without running it: its registers, its occupancy, its main loop, its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..errors import KernelError
from ..format import TABLE_LEVELS
from ..spec import LinearSpec, QuantizeSpec
from .compiler import Binary, CudaCompiler
from .disassembly import MainLoop, disassemble, instructions, main_loop, nvdisasm
from .dp4a import ROWS, Geometry, pitch
from .limits import occupancy


class Launched(Protocol):
    """A kernel's name in what was compiled, and its threads along x, y, z."""

    @property
    def symbol(self) -> str: ...

    @property
    def block(self) -> tuple[int, int, int]: ...


Kernel = TypeVar("Kernel", bound=Launched)


@dataclass(frozen=True)
class Bound(Generic[Kernel]):
    """What is known of one kernel on one architecture.

    Attributes:
        kernel: which one.
        arch: a real architecture.
        registers: per thread; none spills.
        shared_bytes: per block.
        occupancy: share of the warps that a multiprocessor could hold which it holds of this kernel.
        main: instructions of the main loop.
    """

    kernel: Kernel
    arch: str
    registers: int
    shared_bytes: int
    occupancy: float
    main: MainLoop


def bounds(
    kernels: Sequence[Kernel], binary: Binary, arch: str, compiler: CudaCompiler, source: str
) -> list[Bound[Kernel]]:
    """What is known of kernels that were compiled together.

    Args:
        kernels: in any order.
        binary: what ``compiler`` made of ``source``, the text of all of them, for ``arch``.

    Raises:
        KernelError: one of them is not there, or cannot be read.
    """
    if nvdisasm():
        text, read = disassemble(binary.cubin), "SASS"
    else:
        text, read = compiler.compile(source, arch.replace("sm_", "compute_")).cubin.decode(), "PTX"
    found = []
    for kernel in kernels:
        if kernel.symbol not in binary.kernels:
            raise KernelError(f"there is no kernel {kernel.symbol} in what was compiled")
        taken = binary.kernels[kernel.symbol]
        x, y, z = kernel.block
        share = occupancy(arch, x * y * z, taken.registers, taken.shared_bytes)
        loop = main_loop(instructions(text, kernel.symbol), read)
        found.append(Bound(kernel, arch, taken.registers, taken.shared_bytes, share, loop))
    return found


def bytes_moved(spec: LinearSpec | QuantizeSpec, tokens: int) -> int:
    """Bytes that a kernel reads and writes at least, each once: packed weights, values, scales, bias, output."""
    columns = pitch(spec.in_features)
    if isinstance(spec, QuantizeSpec):
        return tokens * (4 * spec.in_features + columns + 4 * spec.scales) + 4 * (2 + spec.shape_size)
    geometry = Geometry.of(spec)
    rows, inputs = geometry.row_blocks * ROWS, geometry.slices * geometry.slice
    of_row = {
        "bit": inputs // 4 + 6 * geometry.slices,
        "int4": inputs // 2 + 2 * geometry.slices,
        "int8": inputs + 4,
    }
    weights = rows * of_row[spec.kind]
    bias = 4 * spec.out_features if spec.bias else 0
    levels = TABLE_LEVELS if spec.kind == "int4" else 0
    return weights + levels + bias + tokens * (columns + 4 * spec.x_scales + 4 * spec.out_features)
