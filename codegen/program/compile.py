"""From Relax functions to an executable: operators become loops, neighbouring loops one, and those are scheduled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError, UntranslatableError, first_line
from ..tvm_api import PrimFunc, build_context, relax, s_tir, tirx, tvm
from .builder import KERNEL
from .floats import hide_floats, show_floats
from .fuse import fuse_rows, view_results
from .launch import merge_launches
from .queries import index_sizes

ATTENTION = "attention"
"""How the names of attention kernels begin. They come once a decoder layer, so a segment of a launch begins there."""


@dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        executable: TVM's executable of the virtual machine.
        workspaces: bytes of working memory that functions of few launches take, by function.
        index_sizes: by function, what :func:`~.queries.index_sizes` says of it.
    """

    executable: Any
    workspaces: Mapping[str, int]
    index_sizes: Mapping[str, Mapping[tuple[str, ...], int]]

    def export(self, file: Path) -> None:
        """Links the program into a shared library."""
        self.executable.export_library(str(file))


def compile_program(
    module: Any,
    target: dict[str, Any],
    lanes: int,
    merged: Mapping[str, Mapping[str, int]],
    apart: Collection[str] = (),
    segment: str = ATTENTION,
) -> Compiled:
    """Compiles a module of :class:`~.builder.ProgramBuilder`.

    Args:
        module: Relax functions and kernels.
        target: TVM's target description.
        lanes: fp32 lanes of the target's vectors.
        merged: functions taking blocks that are to run in few launches, and the most that symbols of theirs are. One
            with symbols is left out where something in it follows another size.
        apart: functions whose quantizers stay kernels of their own.
        segment: prefix of the name of a segment's first kernel.

    Raises:
        UntranslatableError: TVM rejects the program.
    """
    try:
        sizes = {
            name.name_hint: index_sizes(f) for name, f in module.functions_items() if isinstance(f, relax.Function)
        }
        module = fuse_rows(operators_to_loops(module, lanes), apart)
        workspaces = {}
        for name, most in merged.items():
            try:
                module, workspaces[name] = merge_launches(module, name, lambda kernel: kernel.startswith(segment), most)
            except KernelError:
                if not most:
                    raise
                del module[name], sizes[name]
        return Compiled(build_loops(module, target), workspaces, sizes)
    except Exception as error:  # TVM raises many types; each means that this program cannot be built
        raise UntranslatableError(f"TVM cannot compile the program ({first_line(error)})") from error


def operators_to_loops(module: Any, lanes: int) -> Any:
    """Makes every operator a loop, neighbouring loops one, and schedules them; kernels stay as they are.

    Args:
        module: Relax functions and kernels.
        lanes: fp32 lanes of the target's vectors.
    """
    return on_loops(lambda function: show_floats(schedule(function, lanes)), fused_loops(module, approximate=True))


def fused_loops(module: Any, approximate: bool) -> Any:
    """Makes every operator a loop and neighbouring loops one; their floats are hidden (:mod:`.floats`).

    Args:
        module: Relax functions and kernels.
        approximate: exponentials and the like become polynomials, where no library has them for vectors.
    """
    passes = relax.transform
    grouping = [
        *([passes.FastMathTransform()] if approximate else []),
        passes.LegalizeOps(skip_ops=["relax.memory.view"]),
        passes.AnnotateTIROpPattern(),
        passes.FuseOps(),
    ]
    fusion = [passes.FuseTIR(), passes.RewriteDataflowReshape()]
    module = on_loops(hide_floats, tvm.transform.Sequential(grouping)(module))
    return view_results(tvm.transform.Sequential(fusion)(module))


def on_loops(change: Callable[[PrimFunc], PrimFunc], module: Any) -> Any:
    """Changes every TIR function of a module that is no kernel."""
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc) and KERNEL not in function.attrs:
            module.update_func(name, change(function))
    return module


def build_loops(module: Any, target: dict[str, Any]) -> Any:
    """Compiles kernels and loops, and turns what calls them into instructions of TVM's virtual machine.

    Args:
        module: Relax functions that call kernels and loops.
        target: TVM's target description.
    """
    passes = relax.transform
    lowering = [
        passes.DeadCodeElimination(),
        passes.ToNonDataflow(),
        passes.RemovePurityChecking(),
        passes.CallTIRRewrite(),
        passes.StaticPlanBlockMemory(),
        passes.LowerAllocTensor(),
        passes.KillAfterLastUse(),
        passes.LowerRuntimeBuiltin(),
        passes.ComputePrimValue(),
        passes.VMShapeLower(),
        passes.AttachGlobalSymbol(),
    ]
    description = tvm.target.Target(target)
    with description, build_context():
        return relax.build(tvm.transform.Sequential(lowering)(module), description, relax_pipeline=None)


def schedule(function: PrimFunc, lanes: int) -> PrimFunc:
    """One loop nest: what is elementwise is computed where it is used, and sums once per row, in vectors.

    Rows are all but the innermost dimension of the result. Where their number is not known they are shared among the
    threads.
    """
    plan = s_tir.Schedule(function)
    *inner, last = plan.get_child_blocks(plan.get_sblock("root"))
    width = _width(plan, last)
    kept, partial_sums = [], []
    for block in inner:
        if sums(plan, block):
            partial = _partial_sums(plan, block, lanes)
            partial_sums += partial
            kept += [*partial, block]
        elif _width(plan, block) < width or not possible(plan.compute_inline, block):
            kept.append(block)
    loops = plan.get_loops(last)
    outer, columns = (loops[: _spatial(plan, last)], []) if sums(plan, last) else (loops[:-1], loops[-1:])
    if outer:
        rows = plan.fuse(*outer)
        for block in reversed(kept):
            possible(plan.compute_at, block, rows)
        for block in partial_sums:
            lane, chunk = plan.get_loops(block)[-2:]
            plan.reorder(chunk, lane)
            plan.vectorize(lane)
        if not isinstance(plan.get(rows).extent, tirx.IntImm):
            plan.parallel(rows)
    for loop in columns:
        _vectorize(plan, loop, lanes)
    # Intermediate results shrink to what one row needs. Kernels skip this: their buffers are as small as they get.
    lowered = tvm.transform.Sequential(
        [
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.CompactBufferAllocation(),
        ]
    )
    with tvm.transform.PassContext():
        return lowered(plan.mod)["main"].with_attr(dict(function.attrs))


def possible(primitive: Callable[..., None], *arguments: Any) -> bool:
    """Applies a schedule primitive where it is valid; a block that cannot be moved stays a loop nest of its own."""
    try:
        primitive(*arguments)
    except s_tir.ScheduleError:
        return False
    return True


def _partial_sums(plan: Any, block: Any, lanes: int) -> list[Any]:
    """Cuts a sum into one for each lane; returns the block of those, or nothing where the lanes do not divide it."""
    *_, loop = plan.get_loops(block)
    extent = plan.get(loop).extent
    if not isinstance(extent, tirx.IntImm) or extent.value % lanes or extent.value == lanes:
        return []
    _, lane = plan.split(loop, [None, lanes])
    return [plan.rfactor(lane, 0)]


def _vectorize(plan: Any, loop: Any, lanes: int) -> None:
    extent = plan.get(loop).extent
    if isinstance(extent, tirx.IntImm) and extent.value % lanes == 0:
        _, vector = plan.split(loop, [None, lanes])
        plan.vectorize(vector)


def _width(plan: Any, block: Any) -> float:
    """Extent of a block's innermost spatial loop; infinite where it is not known."""
    spatial = [v for v in plan.get(block).iter_vars if v.iter_type == tirx.IterVar.DataPar]
    extent = spatial[-1].dom.extent if spatial else 1
    return int(extent) if isinstance(extent, (int, tirx.IntImm)) else math.inf


def _spatial(plan: Any, block: Any) -> int:
    """How many loops of a block, its first ones, are over the dimensions of its result."""
    return sum(v.iter_type == tirx.IterVar.DataPar for v in plan.get(block).iter_vars)


def sums(plan: Any, block: Any) -> bool:
    return any(v.iter_type == tirx.IterVar.CommReduce for v in plan.get(block).iter_vars)
