"""``load()``: from an artifact to a model that runs."""

from __future__ import annotations

from pathlib import Path

from lbllm_compile import artifact
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.runtime.executor import Kernels, requirements
from lbllm_compile.runtime.model import CompiledModel


def load(
    directory: str | Path, *, target: str = "cpu", kernels: Kernels | None = None, progress: Progress | None = None
) -> CompiledModel:
    """Loads an artifact: checks it, builds and proves its kernels on this machine, packs its weights.

    Args:
        directory: what a compile wrote.
        target: what to run on; ``cpu`` picks the best kernels of this machine.
        kernels: kernels to use instead of building them (they must cover the program's).
        progress: told about each kernel.

    Raises:
        ArtifactError: the directory is not a whole artifact.
        KernelError: a kernel cannot be built or proved here. There is no slow path.
        TargetError: this machine cannot run the target.
    """
    loaded = artifact.load(directory)
    return CompiledModel(loaded.program, kernels or build_kernels(loaded, target, progress))


def build_kernels(loaded: artifact.Artifact, target: str = "cpu", progress: Progress | None = None) -> Kernels:
    """Builds the kernels of an artifact from its tuning records; what they do not cover takes the first guess.

    Raises:
        KernelError, TargetError: as :func:`load`.
    """
    # TVM takes seconds to import, and reading an artifact does not need it
    from lbllm_compile.codegen.build import KernelSet
    from lbllm_compile.codegen.targets import Target

    needed = requirements(loaded.program)
    records = loaded.records if isinstance(loaded.records, list) else None
    return KernelSet.build(
        needed.linears, needed.quantizers, Target.parse(target), trials=0, records=records, progress=progress
    )
