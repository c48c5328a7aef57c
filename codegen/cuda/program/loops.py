"""Fused loops of a program as kernels: each loop nest is a launch, and threads share its elements.

A nest without a sum has a thread for each element. In one with a sum a thread block computes an element: its threads
sum shares of equal size, and those meet in shared memory. What one nest leaves for the next lies in the device's
memory, because between two launches everything written is seen.

Nothing here is approximate: TVM's CUDA code calls the fast and inexact functions of the hardware (``__expf``,
``__cosf``) where it is asked for an exponential or a cosine, so :func:`exact_functions` names those of CUDA's library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UntranslatableError, first_line
from ...program.compile import possible, sums
from ...program.floats import show_floats
from ...program.queries import operations, with_block
from ...tvm_api import PrimFunc, s_tir, tirx, tvm, tvm_ffi
from ..limits import WARP

THREADS = 256
"""Threads of a block that computes elements."""

SUM_THREADS = 128
"""Most threads of a block that computes a sum."""

MOST_OPERATIONS = 1024
"""What takes more operations for an element than this is computed once, not wherever it is read: expressions of stages
that each read the one before several times would grow exponentially. Llama's take 276, those of a router 906."""


_FUNCTIONS = {
    "tirx.exp": "expf",
    "tirx.exp2": "exp2f",
    "tirx.exp10": "exp10f",
    "tirx.log": "logf",
    "tirx.log2": "log2f",
    "tirx.log10": "log10f",
    "tirx.log1p": "log1pf",
    "tirx.sin": "sinf",
    "tirx.cos": "cosf",
    "tirx.tan": "tanf",
    "tirx.pow": "powf",
    "tirx.tanh": "tanhf",
    "tirx.erf": "erff",
    "tirx.sqrt": "__fsqrt_rn",
}
"""CUDA's functions of fp32 that TVM would take a fast form of, or another one."""


@dataclass(frozen=True)
class Nest:
    """One loop nest as a kernel.

    Attributes:
        function: a TIR function with thread bindings over :attr:`buffers`, named :func:`parameter_name` in order.
        buffers: what it reads and writes: parameters of the function it was part of, and buffers between nests.
        work: elements of the result, of which there are some; an int or an expression.
        per_block: elements of a thread block.
        threads: of a block.
    """

    function: PrimFunc
    buffers: Sequence[Any]
    work: Any
    per_block: int
    threads: int


def parameter_name(index: int) -> str:
    """Name of a kernel's parameter; their order is the alphabetical one, in which TVM emits them."""
    return f"p{index:03d}"


def nests(function: PrimFunc) -> list[Nest]:
    """The kernels of a function of fused loops, in order.

    Args:
        function: of :func:`~...program.compile.fused_loops`.

    Raises:
        UntranslatableError: a loop nest is of a form that threads cannot share.
    """
    try:
        plan, shares = _shared_out(function)
    except UntranslatableError:
        raise
    except Exception as error:  # TVM raises many types; each means that it does not take these loops
        raise UntranslatableError(f"threads cannot share a fused loop ({first_line(error)})") from error
    scheduled = exact_functions(show_floats(plan.mod["main"]))
    realized = scheduled.body
    block = realized.block
    statements = list(block.body.seq) if isinstance(block.body, tirx.SeqStmt) else [block.body]
    if len(statements) != len(shares):
        raise UntranslatableError("a fused loop is not a sequence of loop nests")
    known = [*scheduled.params, *block.alloc_buffers]
    result = []
    for statement, (work, per_block, threads) in zip(statements, shares, strict=True):
        if _is(work, 0):
            continue
        used = _used(statement, known)
        names = [_named(buffer, parameter_name(i)) for i, buffer in enumerate(used)]
        inside = with_block(block, _on_buffers(statement, used, names), [])
        body = s_tir.SBlockRealize(realized.iter_values, realized.predicate, inside)
        whole: Any = PrimFunc(names, body)
        result.append(Nest(whole.with_attr({"s_tir": True, "tirx.noalias": True}), used, work, per_block, threads))
    return result


def _shared_out(function: PrimFunc) -> tuple[Any, list[tuple[Any, int, int]]]:
    """A schedule of the loops, what is elementwise computed where it is read, and of every nest what :func:`_schedule`
    says."""
    plan = s_tir.Schedule(function)
    *inner, _ = plan.get_child_blocks(plan.get_sblock("root"))
    for block in inner:
        if not sums(plan, block) and not _grows(plan, block):
            possible(plan.compute_inline, block)
    return plan, [_schedule(plan, block) for block in plan.get_child_blocks(plan.get_sblock("root"))]


def _grows(plan: Any, block: Any) -> bool:
    """Whether what reads a block would take too many operations if it computed the block's elements where it reads
    them."""
    store = plan.get(block).body
    if not isinstance(store, tirx.BufferStore):
        return False
    own = operations(store)

    def larger(body: Any) -> int:
        loads: list[Any] = []
        tvm_ffi.structural_walk(body, (tvm.ir.TensorLoad, loads.append))
        return operations(body) + own * sum(load.source.same_as(store.buffer) for load in loads)

    return any(larger(plan.get(reader).body) > MOST_OPERATIONS for reader in plan.get_consumers(block))


def _schedule(plan: Any, block: Any) -> tuple[Any, int, int]:
    """Binds a nest's loops to threads: its elements, those of a thread block, and its threads."""
    loops = plan.get_loops(block)
    variables = list(plan.get(block).iter_vars)
    if len(loops) < len(variables):  # those that take one value may have no loop
        variables = [variable for variable in variables if not _is(variable.dom.extent, 1)]
    if len(loops) != len(variables):
        raise UntranslatableError("a fused loop runs in an order that threads cannot share")
    for extent in (plan.get(loop).extent for loop in loops):
        if _is(extent, 0):
            return extent, 1, 1
    kinds = [variable.iter_type for variable in variables]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.CommReduce]
    if len(spatial) + len(reduced) != len(loops):
        raise UntranslatableError("a fused loop runs in an order that threads cannot share")
    plan.reorder(*spatial, *reduced)
    elements = plan.fuse(*spatial) if spatial else plan.add_unit_loop(reduced[0] if reduced else block)
    work = plan.get(elements).extent
    if not reduced:
        threads = _threads(work, THREADS)
        outer, inner = plan.split(elements, [None, threads])
        plan.bind(outer, "blockIdx.x")
        plan.bind(inner, "threadIdx.x")
        return work, threads, threads
    shares = plan.fuse(*reduced)
    threads = _threads(plan.get(shares).extent, SUM_THREADS)
    _, share = plan.split(shares, [None, threads])
    plan.bind(elements, "blockIdx.x")
    plan.bind(share, "threadIdx.x")
    return work, 1, threads


def _is(extent: Any, value: int) -> bool:
    return isinstance(extent, tirx.IntImm) and int(extent) == value


def _threads(extent: Any, most: int) -> int:
    """Whole warps, no more than there is work for."""
    if not isinstance(extent, tirx.IntImm):
        return most
    return min(most, -(-int(extent) // WARP) * WARP)


def _used(statement: Any, known: Sequence[Any]) -> list[Any]:
    """Those buffers that a statement reads or writes."""
    found: list[Any] = []

    def note(buffer: Any) -> None:
        if not any(buffer.same_as(other) for other in found):
            found.append(buffer)

    tvm_ffi.structural_walk(
        statement,
        [(tvm.ir.TensorLoad, lambda load: note(load.source)), (tirx.BufferStore, lambda store: note(store.buffer))],
    )
    return [buffer for buffer in known if any(buffer.same_as(other) for other in found)]


def _named(buffer: Any, name: str) -> Any:
    kind = buffer.ty
    return tirx.decl_buffer(kind.shape, kind.dtype, name, data_alignment=kind.data_alignment)


def _on_buffers(statement: Any, old: Sequence[Any], new: Sequence[Any]) -> Any:
    """The same statement on other buffers."""

    def other(buffer: Any) -> Any:
        return next((b for a, b in zip(old, new, strict=True) if a.same_as(buffer)), buffer)

    def region(part: Any) -> Any:
        return tirx.BufferRegion(other(part.source), part.region)

    def load(old: Any) -> Any:
        return tirx.BufferLoad(other(old.source), old.indices)

    def store(old: Any) -> Any:
        return tirx.BufferStore(other(old.buffer), old.value, old.indices)

    def block(old: Any) -> Any:
        reads, writes = ([region(part) for part in parts] for parts in (old.reads, old.writes))
        rest = old.name_hint, old.body, old.init, old.alloc_buffers, old.match_buffers, old.annotations
        return s_tir.SBlock(old.iter_vars, reads, writes, *rest)

    return tvm_ffi.structural_map(
        statement, [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store), (s_tir.SBlock, block)]
    )


def exact_functions(function: Any) -> Any:
    """The same loops, with functions of floats by the name that CUDA's library has for the accurate one.

    Raises:
        UntranslatableError: one is of another type than fp32.
    """

    refused: list[str] = []  # TVM makes another exception of one that is raised in its walk.

    def exact(call: Any) -> Any:
        name = getattr(call.op, "name", "")
        dtype = str(call.ty.dtype)
        if name in ("tirx.sigmoid", "tirx.rsqrt") or name in _FUNCTIONS:
            if dtype != "float32":
                refused.append(f"CUDA kernels have no {name.removeprefix('tirx.')} of {dtype}")
                return call
            arguments = list(call.args)
            if name == "tirx.sigmoid":
                power = tirx.call_pure_extern(dtype, "expf", tirx.const(0.0, dtype) - arguments[0])
                return tirx.call_pure_extern(dtype, "__fdiv_rn", tirx.const(1.0, dtype), tirx.const(1.0, dtype) + power)
            if name == "tirx.rsqrt":
                root = tirx.call_pure_extern(dtype, "__fsqrt_rn", arguments[0])
                return tirx.call_pure_extern(dtype, "__fdiv_rn", tirx.const(1.0, dtype), root)
            return tirx.call_pure_extern(dtype, _FUNCTIONS[name], *arguments)
        return call

    body = tvm_ffi.structural_map(function.body, [(tvm.ir.Call, exact)])
    if refused:
        raise UntranslatableError(refused[0])
    return PrimFunc(function.params, body, function.ret_type).with_attr(dict(function.attrs))
