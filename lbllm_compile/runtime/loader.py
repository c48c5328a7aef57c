"""``load()``: from an artifact to a model that runs."""

from __future__ import annotations

from pathlib import Path

from lbllm_compile import artifact
from lbllm_compile.codegen.backend import EagerKernels, Kernels, backend_of
from lbllm_compile.codegen.progress import Progress, warn
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.threads import in_words, thread_count
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.native.program import NativeProgram, find, forget, schedules_key
from lbllm_compile.runtime.model import CompiledModel


def load(
    directory: str | Path, *, target: str = "cpu", kernels: EagerKernels | None = None, progress: Progress | None = None
) -> CompiledModel:
    """Loads an artifact: checks it, builds and proves its kernels on this machine, prepares its native program.

    The program is stored, so that this takes long only once.

    Args:
        directory: what a compile wrote.
        target: what to run on, unless kernels say it; ``cpu`` picks the best kernels of this machine.
        kernels: kernels to use instead of building them (they must cover the program's). A program that was stored with
            other schedules is replaced; kernels that are not a backend's run without one.
        progress: told about each kernel.

    Raises:
        ArtifactError: the directory is not a whole artifact.
        KernelError: a kernel cannot be built or proved here. There is no slow path.
        TargetError: this machine cannot run the target.
    """
    return prepared(artifact.load(directory), target=target, kernels=kernels, progress=progress)


def prepared(
    loaded: artifact.Artifact,
    *,
    target: str = "cpu",
    kernels: EagerKernels | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """A model that runs, from an artifact that has been read and checked; otherwise as :func:`load`."""
    if kernels is not None:
        native = _stored_with(kernels, loaded, progress) if isinstance(kernels, Kernels) else None
    else:
        native = find(loaded.directory, target, progress)
        kernels = build_kernels(loaded, target, progress)
    if native is None and isinstance(kernels, Kernels):
        native = _prepare(loaded, kernels, progress)
    return CompiledModel(loaded.program, kernels, native)


def _stored_with(kernels: Kernels, loaded: artifact.Artifact, progress: Progress | None) -> NativeProgram | None:
    """The stored program of an artifact; None, and none is stored any more, where it has other kernels than these."""
    native = find(loaded.directory, kernels.target.name, progress)
    if native is None or native.description.schedules == schedules_key(kernels.records()):
        return native
    forget(loaded.directory, kernels.target.name)
    return None


def _prepare(loaded: artifact.Artifact, kernels: Kernels, progress: Progress | None) -> NativeProgram | None:
    """Builds and stores the native program of an artifact; None where the graph does not allow one."""
    # TVM takes seconds to import
    from lbllm_compile.lowering.build import build_native, keep_native, workshop

    with workshop() as folder:
        native = build_native(loaded.program, kernels, folder, progress)
        if native is not None:
            keep_native(native, loaded.digest, kernels.target.name)
        return native


def build_kernels(loaded: artifact.Artifact, target: str = "cpu", progress: Progress | None = None) -> Kernels:
    """Builds the kernels of an artifact from what was searched here and its tuning records, else from guesses.

    Raises:
        KernelError, TargetError: as :func:`load`.
    """
    needed, chosen, records = requirements(loaded.program), Target.parse(target), loaded.records
    build = backend_of(chosen).build
    built = build(needed.linears, needed.quantizers, chosen, trials=0, records=records, progress=progress)
    if built.guessed:
        warn(
            progress,
            "guessed schedules",
            f"the artifact was not tuned for {chosen.name} with {in_words(thread_count())}: "
            f"{built.guessed} of {len(built.records())} schedules are guesses, which may be slow"
            f" ('lbllm-compile tune {loaded.directory} --target {chosen.name}' searches them)",
        )
    return built
