"""``load()``: from an artifact to a model that runs."""

from __future__ import annotations

from pathlib import Path

from lbllm_compile import artifact
from lbllm_compile.codegen.backend import EagerKernels, Kernels, backend_of
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.progress import Progress, warn
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.threads import in_words, thread_count
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.native.program import StoredProgram, find, forget, schedules_key
from lbllm_compile.runtime.model import CompiledModel


def load(
    directory: str | Path, *, target: str = "cpu", kernels: EagerKernels | None = None, progress: Progress | None = None
) -> CompiledModel:
    """Loads an artifact: checks it, builds and proves its kernels on this machine, prepares its native program.

    The program is stored, so that this takes long only once.

    Args:
        directory: what a compile wrote.
        target: what to run on, unless kernels say it; ``cpu`` picks the best kernels of this machine, ``cuda`` the CUDA
            device that is present, ``cuda:N`` the one of that number.
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
    if kernels is None and not backend_of(Target.parse(target)).eager:
        return _on_device(loaded, target, progress)
    if kernels is not None:
        native = _stored_with(kernels, loaded, progress) if isinstance(kernels, Kernels) else None
    else:
        native = find(loaded.directory, target, progress)
        kernels = build_kernels(loaded, target, progress)
    if native is None and isinstance(kernels, Kernels):
        native = _prepare(loaded, kernels, progress)
    return CompiledModel(loaded.program, kernels, native)


def _stored_with(kernels: Kernels, loaded: artifact.Artifact, progress: Progress | None) -> StoredProgram | None:
    """The stored program of an artifact; None, and none is stored any more, where it has other kernels than these."""
    native = find(loaded.directory, kernels.target.name, progress)
    if native is None or native.description.schedules == schedules_key(kernels.records()):
        return native
    forget(loaded.directory, kernels.target.name)
    return None


def _on_device(loaded: artifact.Artifact, target: str, progress: Progress | None) -> CompiledModel:
    """A model of which the program runs on a target whose kernels run in nothing else, and the graph on the CPU's.

    Raises:
        KernelError: no program can hold the graph, or it is wrong on this device.
        TargetError: this machine cannot run the target.
    """
    chosen = Target.parse(target)
    chosen.check_runs_here()
    if loaded.program.kind != "causal-lm":
        raise KernelError(f"only language models run on {chosen.name}; load the artifact with --target cpu")
    native = find(loaded.directory, target, progress)
    executor = _built(loaded, Target.parse("cpu"), progress)
    if native is None:
        native = _prepare(loaded, _built(loaded, chosen, progress), progress, executor)
    return CompiledModel(loaded.program, executor, native)


def _prepare(
    loaded: artifact.Artifact, kernels: Kernels, progress: Progress | None, executor: EagerKernels | None = None
) -> StoredProgram | None:
    """Builds and stores the native program of an artifact; None where the graph does not allow one."""
    # TVM takes seconds to import
    from lbllm_compile.lowering.build import build_native, keep_native, workshop

    with workshop() as folder:
        native = build_native(loaded.program, kernels, folder, progress, executor)
        if native is not None:
            keep_native(native, loaded.digest, kernels.target)
        return native


def build_kernels(loaded: artifact.Artifact, target: str = "cpu", progress: Progress | None = None) -> Kernels:
    """Builds the kernels of an artifact from what was searched here and its tuning records, else from guesses.

    Raises:
        KernelError, TargetError: as :func:`load`.
    """
    chosen = Target.parse(target)
    built = _built(loaded, chosen, progress)
    if built.guessed:
        warn(
            progress,
            "guessed schedules",
            f"the artifact was not tuned for {chosen.name} with {in_words(thread_count())}: "
            f"{built.guessed} of {len(built.records())} schedules are guesses, which may be slow"
            f" ('lbllm-compile tune {loaded.directory} --target {chosen.name}' searches them)",
        )
    return built


def _built(loaded: artifact.Artifact, target: Target, progress: Progress | None) -> Kernels:
    needed = requirements(loaded.program)
    build = backend_of(target).build
    return build(needed.linears, needed.quantizers, target, trials=0, records=loaded.records, progress=progress)
