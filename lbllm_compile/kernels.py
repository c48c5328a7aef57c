"""Every kernel a lowered program needs, for every target that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbllm_compile.codegen.backend import Kernels, backend_named, backend_of
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tune.database import Database, Key
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.passes.ir.program import Program

TIMES = ("microseconds", "default_microseconds", "roofline_microseconds")
"""What a search measured: a call with the schedule, with the one that is used without a search, and the least time."""


@dataclass(frozen=True)
class BuiltKernels:
    """Kernels by target.

    Attributes:
        host: the ones this machine runs, and checks the compile with.
        records: tuning records, JSON-able.
        sources: text of every kernel by file name, for reading.
        binaries: kernels compiled for machines elsewhere, by file name.
        proofs: by kind of target, how those were checked.
    """

    host: Kernels
    records: Sequence[Mapping[str, Any]]
    sources: Mapping[str, str]
    binaries: Mapping[str, bytes] = field(default_factory=dict)
    proofs: Mapping[str, Sequence[str]] = field(default_factory=dict)


def build_kernels(
    program: Program,
    targets: Sequence[Target],
    *,
    trials: int,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> BuiltKernels:
    """Tunes, generates and proves kernels.

    The first target whose programs run is tuned, and used for the compile's own checks; kernels of targets elsewhere
    are compiled. Where none that runs was asked for, this machine's CPU is built for without a search, for the checks
    alone.

    Raises:
        KernelError: a target has no kernel for what the program holds, or one does not compile or disagrees with the
            reference.
        TargetError: a target was asked for that this machine cannot run, so that nothing can be proven.
    """
    progress = progress or NoProgress()
    needed = requirements(program)
    runnable = next((target for target in targets if backend_of(target).eager), None)
    chosen = runnable or Target.parse("cpu")
    host = backend_of(chosen).build(
        needed.linears,
        needed.quantizers,
        chosen,
        trials=trials if runnable else 0,
        budget_s=budget_s,
        progress=progress,
    )
    if runnable is None:
        name = host.target.name
        text = f"no target that runs here was asked for; the compile checks itself on untuned {name} kernels"
        warn(progress, "untuned checks", text)
    sources = {f"{name}.py": text for name, text in host.sources().items()} if runnable else {}
    binaries: dict[str, bytes] = {}
    proofs: dict[str, Sequence[str]] = {}
    elsewhere = [target for target in targets if not backend_of(target).eager]
    for kind in dict.fromkeys(target.kind for target in elsewhere):
        of_kind = [target for target in elsewhere if target.kind == kind]
        emitted = backend_named(kind).emit(needed.linears, needed.quantizers, of_kind, progress=progress)
        sources |= emitted.sources
        binaries |= emitted.binaries
        proofs[kind] = emitted.proofs
    return BuiltKernels(host, host.records() if runnable or not targets else [], sources, binaries, proofs)


def measured(kernels: Kernels) -> list[dict[str, Any]]:
    """What searches on a CPU like this one measured of the schedules that kernels use; others are left out.

    Returns:
        One row a linear and token bucket, JSON-able: ``spec``, ``tokens``, ``target``, ``threads``, ``schedule`` as in
        tuning records, ``microseconds`` a call, ``default_microseconds`` of the schedule that is used without a search,
        and ``roofline_microseconds``, the least that the machine allows, both None where they are not known;
        ``candidates`` and ``discarded`` as :class:`~.codegen.tune.database.Result` has them.
    """
    from lbllm_compile.codegen.tvm_api import VERSION

    if not kernels.records():
        return []
    database, version = Database(cache_directory()), backend_of(kernels.target).space().version
    rows = []
    for record in kernels.records():
        spec = LinearSpec(**record["spec"])
        target = Target.parse(record["target"])
        key = Key.here(spec, record["tokens"], target, record["threads"], VERSION, version)
        found = database.find(key)
        if found is not None and found.schedule == record["schedule"]:
            times = {name: getattr(found, name) for name in TIMES}
            tried = {"candidates": [dict(item) for item in found.candidates], "discarded": list(found.discarded)}
            rows.append({**record, **times, **tried})
    return rows
