"""CUDA as it is: kernels are generated, compiled to cubin and proven in emulation; no program runs on a device yet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..backend import Emitted, EntryPoint
from ..errors import TargetError
from ..progress import Progress
from ..spec import LinearSpec, QuantizeSpec
from ..targets import CudaKind, Target, TargetKind


class CudaBackend:
    """Implements :class:`..backend.Backend` for NVIDIA GPUs, which programs do not run on."""

    kind: TargetKind = CudaKind()
    searches = False
    entry_points: Sequence[EntryPoint] = ()

    def present(self, target: Target) -> bool:
        import torch  # takes seconds, and need not load for anything else here

        if not torch.cuda.is_available():
            return False
        capabilities = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        return target.arch in {f"sm_{major}{minor}" for major, minor in capabilities}

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
    ) -> NoReturn:
        self._refuse(target)

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
        binaries = {f"{kernel.name}.cubin": kernel.cubin for kernel in kernels}
        return Emitted(sources, binaries, sorted({f"{kernel.arch}: {kernel.proof}" for kernel in kernels}))

    def space(self) -> NoReturn:
        raise TargetError("schedules of CUDA kernels are not searched")

    def assembly(self, spec: LinearSpec, schedule: Mapping[str, Any], target: Target) -> NoReturn:
        raise TargetError(f"there is no assembly of kernels for {target.name}; --tir shows their text")

    def compile(self, module: Any, target: Target) -> NoReturn:
        self._refuse(target)

    def facts(self, target: Target) -> tuple[str | int, ...]:
        return ()

    def machine(self, file: Path) -> NoReturn:
        raise TargetError("programs do not run on CUDA devices yet; load the artifact with --target cpu")

    def _refuse(self, target: Target) -> NoReturn:
        target.check_runs_here()
        raise AssertionError("a CUDA target never runs here")
