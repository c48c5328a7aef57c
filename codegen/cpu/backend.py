"""CPUs through LLVM: kernels of TIR families, loops scheduled for vectors, programs for TVM's virtual machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import tvm_runtime
from ..backend import Emitted, EntryPoint, Kernels, SearchSpace
from ..progress import Progress
from ..sizes import BATCH
from ..spec import LinearSpec, QuantizeSpec
from ..targets import CpuKind, Target, TargetKind, host
from ..threads import thread_count
from .buckets import FEW, MANY, ONE
from .machine import CpuMachine

if TYPE_CHECKING:
    from ..program.compile import Compiled


class CpuBackend:
    """Implements :class:`..backend.Backend` on this machine's CPU."""

    kind: TargetKind = CpuKind()
    eager = True
    searches = True

    # Decoding of one sequence, in few launches and (to prove that) kernel by kernel; of a few in few launches; a short
    # prompt, or a few sequences kernel by kernel; any prompt or batch; and all logits.
    entry_points: Sequence[EntryPoint] = (
        EntryPoint("token", 1, 1, True, ONE.name, blocks=True),
        EntryPoint("token_by_kernel", 1, 1, True, ONE.name, joined=False),
        EntryPoint("token_of_few", None, 1, True, FEW.name, most=FEW.highest, blocks=True),
        EntryPoint("few_tokens", None, None, True, FEW.name, most=FEW.highest),
        EntryPoint("tokens", None, None, True, MANY.name),
        EntryPoint("logits", None, None, False, MANY.name),
    )

    def present(self, target: Target) -> bool:
        return self.kind.runs_here(target)

    def check(self, target: Target) -> None:
        target.check_runs_here()

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
    ) -> Kernels:
        from .build import KernelSet  # TVM takes seconds to import

        return KernelSet.build(
            linears,
            quantizers,
            target,
            cache_dir=cache_dir,
            trials=trials,
            budget_s=budget_s,
            progress=progress,
            records=records,
        )

    def emit(
        self,
        linears: Iterable[LinearSpec],
        quantizers: Iterable[QuantizeSpec],
        targets: Sequence[Target],
        *,
        progress: Progress | None = None,
    ) -> Emitted:
        return Emitted()  # a CPU makes its kernels itself when it loads an artifact

    def space(self) -> SearchSpace:
        from .space import SPACE  # TVM takes seconds to import

        return SPACE

    def assembly(self, spec: LinearSpec, schedule: Mapping[str, Any], target: Target) -> str:
        from ..tvm_api import assembly  # TVM takes seconds to import

        space = self.space()
        made = space.schedule_from(dict(schedule))
        implementation = space.of_layout(space.implementations(spec, target), made.layout)
        return assembly(
            {f"{spec.kind}_{spec.out_features}x{spec.in_features}": implementation.function(made)}, target.llvm
        )

    def compile(self, module: Any, kernels: Kernels) -> Compiled:
        from ..program.compile import compile_program
        from .space import lanes  # TVM takes seconds to import

        given = {name.name_hint for name in module.get_global_vars()}
        entries = [entry for entry in self.entry_points if entry.name in given]
        merged = {entry.name: {} if entry.most is None else {BATCH: entry.most} for entry in entries if entry.blocks}
        apart = [entry.name for entry in entries if not entry.joined]
        target = kernels.target
        return compile_program(module, target.llvm, lanes(target), merged, apart)

    def facts(self, target: Target) -> tuple[str | int, ...]:
        """The CPU, the number of threads, and TVM."""
        return thread_count(), host.cpu_name(), *sorted(host.cpu_flags()), tvm_runtime.version()

    def compiler(self, target: Target) -> str:
        return ""  # TVM's own

    def machine(self, file: Path) -> CpuMachine:
        return CpuMachine(file)
