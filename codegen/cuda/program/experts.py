"""Makes a GEMV of one matrix one of several: those of the experts of a mixture, each row with that of its expert.

Given::

    kernel(values, x_scale, packed, output):           thread blocks b for one row

Result::

    kernel(values, x_scale, packed, offsets, output):  thread blocks m * blocks + b for row m

each on the matrix of the expert whose rows end at the first offset behind m.

Rows lie sorted by expert. One behind those of the last expert becomes zero; whatever offsets are, no other matrix than
one of the experts is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...tvm_api import PrimFunc, renew_definitions, tirx, tvm, tvm_ffi
from .prologue import raveled, sizes, with_variables

_OF_ROWS = ("values", "x_scale", "output")


def gemv_by_expert(function: PrimFunc, matrices: Mapping[str, Sequence[int]], rows: int) -> PrimFunc:
    """The kernel for all experts.

    Args:
        function: of :func:`..dp4a.gemv`.
        matrices: by name of a parameter: the shape ``[E, elements]`` of all experts' tensors, of which a single one's
            elements are the first.
        rows: tokens times the experts of each.
    """
    kernel = renew_definitions(function)
    experts = next(iter(matrices.values()))[0]
    bindings, body = [], kernel.body
    while isinstance(body, tirx.AttrStmt) and body.attr_key == "thread_extent":
        bindings.append(body)
        body = body.body
    old = next(b for b in bindings if b.node.thread_tag == "blockIdx.x")
    blocks, item = int(old.value), tirx.Var("item", "int32")
    row = tirx.floordiv(item, blocks)
    found = tirx.decl_buffer([1], "int32", "expert", scope="local")
    offsets = tirx.decl_buffer([experts], "int32", "offsets")
    zero, end = tirx.const(0, "int32"), tirx.const(experts, "int32")
    expert = tirx.Cast("int64", tirx.Min(tirx.BufferLoad(found, [zero]), end - 1))
    new: dict[Any, Any] = {}
    for parameter in kernel.params:
        shape = matrices.get(parameter.name)
        if shape is not None:
            new[parameter] = tirx.decl_buffer([*shape], parameter.ty.dtype, parameter.name)
        elif parameter.name in _OF_ROWS:
            new[parameter] = tirx.decl_buffer([rows, *sizes(parameter)[1:]], parameter.ty.dtype, parameter.name)

    def load(before: Any) -> Any:
        for parameter, buffer in new.items():
            if parameter.same_as(before.source):
                if parameter.name in matrices:
                    return tirx.BufferLoad(buffer, [expert, raveled(before.indices, sizes(parameter))])
                return tirx.BufferLoad(buffer, [row, *before.indices[1:]])
        return before

    def store(before: Any) -> Any:
        for parameter, buffer in new.items():
            if parameter.same_as(before.buffer):
                known = tirx.LT(tirx.BufferLoad(found, [zero]), end)
                value = tirx.Select(known, before.value, tirx.const(0, before.value.ty.dtype))
                return tirx.BufferStore(buffer, value, [row, *before.indices[1:]])
        return before

    body = tvm_ffi.structural_map(body, [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store)])
    body = with_variables(body, {old.node.var: tirx.floormod(item, blocks)})
    other = tirx.Var("other", "int32")
    ended = tirx.LE(tirx.BufferLoad(offsets, [other]), row)
    # TVM looks for barriers in front of stores, not of conditions, and offsets may lie in shared memory.
    more = tirx.Select(ended, tirx.const(1, "int32"), zero)
    count = tirx.BufferStore(found, tirx.BufferLoad(found, [zero]) + more, [zero])
    body = tirx.SeqStmt(
        [
            tirx.AllocBuffer(found),
            tirx.BufferStore(found, zero, [zero]),
            tirx.For(other, zero, end, tirx.ForKind.SERIAL, count),
            body,
        ]
    )
    for binding in reversed(bindings):
        axis, extent = binding.node, binding.value
        if binding is old:
            extent = tirx.const(rows * blocks, "int32")
            axis = tirx.IterVar(tvm.ir.Range(zero, extent), item, axis.iter_type, axis.thread_tag)
        body = tirx.AttrStmt(axis, binding.attr_key, extent, body)
    of_experts: Any = PrimFunc([*new.values(), offsets], body)
    return of_experts.with_attr(dict(function.attrs))
