"""CUDA: kernels are generated, compiled to cubin and proven in emulation; programs are launch lists that replay."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..backend import Emitted, EntryPoint, Prediction, StateTensor
from ..errors import TargetError
from ..progress import Progress
from ..spec import LinearSpec, QuantizeSpec
from ..targets import CudaKind, Target, TargetKind, cuda
from .compiler import CudaCompiler
from .program.image import on_device
from .program.launches import PART, TOKEN

if TYPE_CHECKING:
    from .program.compile import CompiledLaunches
    from .program.kernels import ProgramKernels
    from .program.session import DeviceProgram


class CudaBackend:
    """Implements :class:`..backend.Backend` and :class:`..backend.SequenceBackend` for NVIDIA GPUs."""

    kind: TargetKind = CudaKind()
    eager = False
    searches = False
    entry_points: Sequence[EntryPoint] = (TOKEN, PART)

    def present(self, target: Target) -> bool:
        return self.kind.runs_here(target)

    def check(self, target: Target) -> None:
        """Nothing is refused: a compiler that is missing is found, and said, when it is needed."""

    def build(
        self,
        linears: Iterable[LinearSpec],
        quantizers: Iterable[QuantizeSpec],
        target: Target,
        *,
        cache_dir: Path | None = None,
        trials: int = 16,
        budget_s: float | None = None,
        progress: Progress | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
    ) -> ProgramKernels:
        """Kernels of programs, whose text is made when a program is translated; :meth:`prove` proves them once a device
        has loaded it, and the program as a whole is held against the graph."""
        target.check_runs_here()
        from .program.kernels import ProgramKernels  # TVM takes seconds to import

        return ProgramKernels(target)

    def emit(
        self,
        linears: Iterable[LinearSpec],
        quantizers: Iterable[QuantizeSpec],
        targets: Sequence[Target],
        *,
        progress: Progress | None = None,
    ) -> Emitted:
        from .emit import emit_cuda  # TVM takes seconds to import

        kernels = emit_cuda(linears, quantizers, [target.arch for target in targets], progress=progress)
        sources = {f"{kernel.name}.cu": kernel.source for kernel in kernels}
        sources["cuda.json"] = json.dumps([kernel.record() for kernel in kernels], indent=1)
        binaries = {kernel.file: kernel.cubin for kernel in kernels}
        return Emitted(sources, binaries, sorted({f"{kernel.arch}: {kernel.proof}" for kernel in kernels}))

    def predict(
        self, linears: Mapping[LinearSpec, int], quantizers: Collection[QuantizeSpec], layers: int
    ) -> list[Prediction]:
        from .predict import predict  # TVM takes seconds to import
        from .quantize import quantize_schedules

        for spec in quantizers:
            quantize_schedules(spec)  # raises where no kernel is
        return predict(linears, layers)

    def space(self) -> NoReturn:
        raise TargetError("schedules of CUDA kernels are not searched")

    def assembly(self, spec: LinearSpec, schedule: Mapping[str, Any], target: Target) -> NoReturn:
        raise TargetError(f"there is no assembly of kernels for {target.name}; --tir shows their text")

    def compile(self, module: Any, kernels: ProgramKernels) -> CompiledLaunches:
        from .program.compile import compile_launches  # TVM takes seconds to import

        return compile_launches(module, kernels)

    def facts(self, target: Target) -> tuple[str | int, ...]:
        """The device and the driver. A program runs without the compiler that it is of."""
        found, ordinal = cuda.present(), cuda.ordinal(target.arch, target.device)
        return () if ordinal is None else (found.devices[ordinal].name, found.version)

    def compiler(self, target: Target) -> str:
        return CudaCompiler.find().identity

    def machine(self, file: Path) -> NoReturn:
        raise TargetError("a program on a CUDA device has no functions to call; it decodes sequences")

    def sequences(self, file: Path, weights: Path, state: Sequence[StateTensor], target: Target) -> DeviceProgram:
        return on_device(file, weights, state, target)

    def prove(self, machine: DeviceProgram, kernels: ProgramKernels, progress: Progress | None = None) -> None:
        from .program.arrival import prove_on_arrival  # TVM takes seconds to import

        prove_on_arrival(machine, kernels, progress)
