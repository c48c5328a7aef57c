"""The proof of a program's linears and quantizers on the device that it will run on, bit for bit, before it is used.

A kernel that the program launches as it is, is proven as the program has it loaded: the gemms and quantizers of parts
of prompts, the head. One that the program launches with a prologue alone (:mod:`.prologue`), or for the matrices of
experts, is not proven itself. Of these the kernel that was made part of it is compiled apart and proven; how it was
made one is held against the graph, with the whole program.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import DisprovedError
from ...progress import NoProgress, Progress
from ..compiler import CudaCompiler, SpillError
from ..device import prove_loaded
from ..emit import emit, of_text, schedules
from ..kernel import EmittedKernel, kernel_name
from ..text import PREAMBLE
from .kernels import ProgramKernels
from .launches import PART
from .session import DeviceProgram


def prove_on_arrival(machine: DeviceProgram, kernels: ProgramKernels, progress: Progress | None = None) -> None:
    """Runs the kernels of every linear and quantizer of a program on its device, against the reference.

    Args:
        machine: the program.
        kernels: what it was translated with.
        progress: told of each.

    Raises:
        DisprovedError: a result differs.
        KernelError: a kernel cannot be compiled, or the driver reports an error.
    """
    progress, driver = progress or NoProgress(), machine.driver
    functions = {symbol: function for symbol, (function, _) in machine.functions.items()}
    every = [*_kernels(machine, kernels)]
    apart = [kernel for kernel in every if kernel.symbol not in functions]
    with progress.task(f"proving kernels on {driver.name}", len(every)) as task:
        if apart:
            module = driver.module(_compiled(apart, kernels.target.arch or ""))
            functions |= {kernel.symbol: driver.function(module, kernel.symbol) for kernel in apart}
        for kernel in every:
            try:
                prove_loaded(driver, functions[kernel.symbol], kernel)
            except DisprovedError as error:
                raise DisprovedError(
                    f"on {driver.name} {error}; the model is not used there: please report it, and use --target cpu"
                ) from error
            task.advance(kernel.symbol)


def _kernels(machine: DeviceProgram, kernels: ProgramKernels) -> Iterator[EmittedKernel]:
    """What is to be proven, with the text of the program where it has it."""
    texts = {kernel.symbol: kernel.source for kernel in machine.launches.all_kernels()}
    arch = kernels.target.arch or ""
    for spec, linear in kernels.linears.items():
        text = texts.get(f"{kernel_name(spec, 'gemv')}_kernel")
        cut = kernels.cut(spec)
        yield emit(spec, "gemv", arch, cut) if text is None else of_text(PREAMBLE + text, spec, "gemv", cut)
        tile = kernels.tile(spec, PART.length or 1)
        if (text := texts.get(f"{linear.of_tile(tile)}_kernel")) is not None:
            yield of_text(PREAMBLE + text, spec, "gemm", tile)
    for spec in kernels.quantizers:
        text = texts.get(f"{kernel_name(spec, 'quantize')}_kernel")
        only = schedules(spec, "quantize")[0]
        yield emit(spec, "quantize", arch) if text is None else of_text(PREAMBLE + text, spec, "quantize", only)


def _compiled(kernels: list[EmittedKernel], arch: str) -> bytes:
    """The cubin of several kernels. One whose registers spill is as good a proof."""
    source = "\n".join([PREAMBLE, *(kernel.source.removeprefix(PREAMBLE) for kernel in kernels)])
    try:
        return CudaCompiler.find().compile(source, arch).cubin
    except SpillError as error:
        if error.cubin is None:
            raise
        return error.cubin
