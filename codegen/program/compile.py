"""From Relax functions to an executable: operators become loops, neighbouring loops one, and those are scheduled."""

from __future__ import annotations

from typing import Any

from ..errors import KernelError
from ..tvm_api import FAST_BUILD, PrimFunc, relax, s_tir, tvm


def compile_program(module: Any, target: dict[str, Any], lanes: int) -> Any:
    """Compiles a module of :class:`~.builder.ProgramBuilder`.

    Args:
        module: Relax functions and kernels.
        target: TVM's target description.
        lanes: fp32 lanes of the target's vectors.

    Returns:
        TVM's executable of the virtual machine.

    Raises:
        KernelError: TVM rejects the program.
    """
    description = tvm.target.Target(target)
    passes = relax.transform
    try:
        with description, tvm.transform.PassContext(disabled_pass=FAST_BUILD):
            module = passes.FastMathTransform()(module)
            module = tvm.transform.Sequential(
                [
                    passes.LegalizeOps(),
                    passes.AnnotateTIROpPattern(),
                    passes.FuseOps(),
                    passes.FuseTIR(),
                    passes.RewriteDataflowReshape(),
                    passes.DeadCodeElimination(),
                ]
            )(module)
            module = schedule_loops(module, lanes)
            module = tvm.transform.Sequential(
                [
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
            )(module)
            return relax.build(module, description, relax_pipeline=None)
    except Exception as error:  # TVM raises many types; each means that this program cannot be built
        raise KernelError(f"TVM cannot compile the program: {error}") from error


def schedule_loops(module: Any, lanes: int) -> Any:
    """Schedules every function that fusion made; kernels, which are opaque, stay as they are."""
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc) and int(function.attrs.get("op_pattern", 8)) != 8:
            module.update_func(name, schedule(function, lanes))
    return module


def schedule(function: PrimFunc, lanes: int) -> PrimFunc:
    """One loop nest: what is elementwise is computed where it is used, sums once per outer iteration.

    The outer iterations of a function with dynamic shapes are shared among the threads.
    """
    plan = s_tir.Schedule(function)
    blocks = plan.get_child_blocks(plan.get_sblock("root"))
    *inner, last = blocks
    width = _width(plan, last)
    kept = []
    for block in inner:
        if _is_sum(plan, block) or _width(plan, block) != width:
            kept.append(block)
        else:
            plan.compute_inline(block)
    *outer, columns = plan.get_loops(last)
    if outer:
        rows = plan.fuse(*outer)
        for block in reversed(kept):
            plan.compute_at(block, rows)
        if not isinstance(plan.get(rows).extent, tvm.tirx.IntImm):
            plan.parallel(rows)
    extent = plan.get(columns).extent
    if isinstance(extent, tvm.tirx.IntImm) and extent.value % lanes == 0:
        _, vector = plan.split(columns, [None, lanes])
        plan.vectorize(vector)
    return plan.mod["main"].with_attr(dict(function.attrs))


def _width(plan: Any, block: Any) -> Any:
    """Extent of a block's innermost spatial loop."""
    spatial = [v for v in plan.get(block).iter_vars if v.iter_type == tvm.tirx.IterVar.DataPar]
    return int(spatial[-1].dom.extent) if spatial and isinstance(spatial[-1].dom.extent, tvm.tirx.IntImm) else None


def _is_sum(plan: Any, block: Any) -> bool:
    return any(v.iter_type == tvm.tirx.IterVar.CommReduce for v in plan.get(block).iter_vars)
