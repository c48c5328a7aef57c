"""``load()``: from an artifact to a model that runs."""

from __future__ import annotations

from pathlib import Path

from lbllm_compile import artifact
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.runtime.executor import Kernels, requirements
from lbllm_compile.runtime.model import CompiledModel


def load(
    directory: str | Path | artifact.Artifact,
    *,
    target: str = "cpu",
    kernels: Kernels | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Loads an artifact: checks it, builds and proves its kernels on this machine, packs its weights.

    Args:
        directory: what a compile wrote; or that, already read and checked.
        target: what to run on; ``cpu`` picks the best kernels of this machine.
        kernels: kernels to use instead of building them (they must cover the program's).
        progress: told about each kernel.

    Raises:
        ArtifactError: the directory is not a whole artifact.
        KernelError: a kernel cannot be built or proved here. There is no slow path.
        TargetError: this machine cannot run the target.
    """
    loaded = directory if isinstance(directory, artifact.Artifact) else artifact.load(directory)
    return CompiledModel(loaded.program, kernels or build_kernels(loaded, target, progress))


def build_kernels(loaded: artifact.Artifact, target: str = "cpu", progress: Progress | None = None) -> Kernels:
    """Builds the kernels of an artifact from its tuning records; what they do not cover takes the first guess.

    Raises:
        KernelError, TargetError: as :func:`load`.
    """
    # TVM takes seconds to import, and reading an artifact does not need it
    from lbllm_compile.codegen.build import KernelSet
    from lbllm_compile.codegen.targets import Target

    needed, chosen, records = requirements(loaded.program), Target.parse(target), loaded.records
    if progress is not None and not any(record["target"] == chosen.name for record in records):
        progress.note(
            f"the artifact was not tuned for {chosen.name}; its kernels take the first schedule that works, which may"
            f" be slow (compile with --target {chosen.name} to tune them)"
        )
    return KernelSet.build(needed.linears, needed.quantizers, chosen, trials=0, records=records, progress=progress)
