"""Every kernel a lowered program needs, for every target that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lbllm_compile.codegen.build import KernelSet
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.codegen.targets import Target
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.passes.ir.program import Program

if TYPE_CHECKING:
    from lbllm_compile.codegen.cuda.kernel import CudaKernel


@dataclass(frozen=True)
class BuiltKernels:
    """Kernels by target.

    Attributes:
        host: the ones this machine runs, and checks the compile with.
        records: tuning records, JSON-able.
        sources: text of every kernel by file name, for reading.
        binaries: compiled CUDA kernels by file name.
        cuda: facts about each CUDA kernel.
    """

    host: KernelSet
    records: Sequence[Mapping[str, Any]]
    sources: Mapping[str, str]
    binaries: Mapping[str, bytes] = field(default_factory=dict)
    cuda: Sequence[CudaKernel] = ()


def build_kernels(
    program: Program,
    targets: Sequence[Target],
    *,
    trials: int,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> BuiltKernels:
    """Tunes, generates and proves kernels.

    The first CPU target that this machine can run is tuned and used for the compile's own checks. Where none was asked
    for, this machine's default is built without a search, for the checks alone.

    Raises:
        KernelError: a kernel does not compile or disagrees with the reference.
        TargetError: a CPU target was asked for that this machine cannot run, so that nothing can be proven.
    """
    progress = progress or NoProgress()
    needed = requirements(program)
    cpu = next((t for t in targets if t.kind == "cpu"), None)
    host = KernelSet.build(
        needed.linears,
        needed.quantizers,
        cpu or Target.parse("cpu"),
        trials=trials if cpu else 0,
        budget_s=budget_s,
        progress=progress,
    )
    if cpu is None:
        text = f"no CPU target was asked for; the compile checks itself on untuned {host.target.name} kernels"
        warn(progress, "untuned checks", text)
    sources = {f"{name}.py": text for name, text in host.sources().items()} if cpu else {}
    archs = [t.arch for t in targets if t.kind == "cuda"]
    if not archs:
        return BuiltKernels(host, host.records(), sources)
    from lbllm_compile.codegen.cuda.emit import emit_cuda

    cuda = emit_cuda(needed.linears, needed.quantizers, archs, progress=progress)
    sources |= {f"{k.name}.cu": k.source for k in cuda}
    sources["cuda.json"] = json.dumps([k.record() for k in cuda], indent=1)
    binaries = {f"{k.name}.cubin": k.cubin for k in cuda}
    return BuiltKernels(host, host.records() if cpu else [], sources, binaries, cuda)
