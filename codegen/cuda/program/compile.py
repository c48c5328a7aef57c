"""From a module of Relax functions to what a device loads: a launch list and the cubin of its kernels, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import KernelError
from ...program.builder import Layout
from ...sizes import FIXED_STATE, STATE, WEIGHTS
from ..compiler import CudaCompiler, SpillError
from .image import Image
from .kernels import ProgramKernels
from .launches import PART, TOKEN
from .lower import lower


@dataclass(frozen=True)
class CompiledLaunches:
    """A program for one architecture; implements :class:`...backend.CompiledProgram`.

    Attributes:
        image: what a device loads.
        workspaces: none: sessions plan their memory themselves.
        index_sizes: of the functions, as far as sequences of any length have to know: none.
    """

    image: Image
    workspaces: Mapping[str, int] = field(default_factory=dict)
    index_sizes: Mapping[str, Mapping[tuple[str, ...], int]] = field(
        default_factory=lambda: {entry.name: {} for entry in (TOKEN, PART)}
    )

    def export(self, file: Path) -> None:
        """Writes what :meth:`~.image.Image.read` reads."""
        self.image.write(file)


def compile_launches(module: Any, kernels: ProgramKernels) -> CompiledLaunches:
    """Lowers a module of :class:`...program.builder.ProgramBuilder` to launches, and compiles their kernels.

    A kernel whose registers spill because of what it computes in front of its own work leaves that to launches of their
    own. One of a linear that spills by itself has its next schedule.

    Args:
        module: with the function :data:`~.launches.TOKEN`, and with :data:`~.launches.PART` where it is to take prompts
            in parts.
        kernels: what it was translated with.

    Raises:
        UntranslatableError: the function has something that no launch computes.
        KernelError: there is no compiler, or it refuses the kernels, or one spills whatever its schedule.
    """
    compiler = CudaCompiler.find()
    blocks = {p.name: p.ty.shape for p in module[TOKEN.name].params}
    layouts = [Layout({}, {}, int(blocks[b][-1]) if b in blocks else 0) for b in (WEIGHTS, STATE, FIXED_STATE)]
    launches, apart = lower(module, kernels, *layouts), frozenset[str]()
    arch = kernels.target.arch
    while True:
        try:
            cubin = compiler.compile(launches.source(), arch).cubin
        except SpillError as error:
            apart |= error.spilled.keys()
            before, launches = launches, lower(module, kernels, *layouts, apart=apart)
            if launches != before:
                continue
            if not kernels.give_up(error.spilled):
                raise KernelError(
                    f"the program cannot be compiled for {arch}: {error}; another release of CUDA, or another"
                    " architecture, may have registers enough"
                ) from error
            launches = lower(module, kernels, *layouts, apart=apart)
        else:
            return CompiledLaunches(Image(launches, cubin, arch, compiler.version))
