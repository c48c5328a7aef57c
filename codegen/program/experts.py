"""Makes a kernel of one matrix one of several: those of the experts of a mixture, each for rows of its own.

Given::

    kernel(values, x_scale, packed, out):           out[m] = f(values[m], x_scale[m], packed)

Result::

    kernel(values, x_scale, packed, offsets, out):  out[m] = f(values[m], x_scale[m], packed[e])
                                                    where offsets[e - 1] <= m < offsets[e]

Rows lie sorted by expert, so each expert runs the kernel, unchanged, on a part of the tensors. One without rows runs
nothing, and its matrix is not read. Rows behind those of the last expert become zero. Offsets are data: whatever they
are, no row outside is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tvm_api import PrimFunc, renew_definitions, tirx


def by_expert(function: Any, matrices: Sequence[Sequence[int]], rows: int) -> PrimFunc:
    """The kernel ``(*inputs, *matrices, offsets, out)`` for all experts; ``offsets`` is int32 ``[E]``.

    Parallel loops of the function stand in serial ones then; what they write does not depend on one another.

    Args:
        function: a TIR function ``(*inputs, *matrices, out)`` for any number of rows, or for one.
        matrices: shapes of the experts' matrices. The first dimension is the expert; what the function takes of one
            lies, contiguous, at the beginning of the others.
        rows: how many of its parameters are inputs. They and the result have as many rows.
    """
    kernel = renew_definitions(function)
    *inputs, out = kernel.params
    total, count = tirx.Var("total", "int32"), tirx.Var("count", "int32")
    shapes = [*([total, *p.ty.shape[1:]] for p in inputs[:rows]), *matrices]
    parameters = [_buffer(p, shape) for p, shape in zip(inputs, shapes, strict=True)]
    result = _buffer(out, [total, *out.ty.shape[1:]])
    experts = int(matrices[0][0])
    offsets = tirx.decl_buffer([experts], "int32", "offsets")
    ends = tirx.decl_buffer([experts], "int32", "ends")
    expert, other, first = tirx.Var("expert", "int64"), tirx.Var("other", "int64"), tirx.Var("first", "int32")
    zero, last = tirx.IntImm("int32", 0), tirx.IntImm("int64", experts - 1)

    def start(e: Any) -> Any:
        """Where the rows of the expert before end."""
        return tirx.Select(e > 0, ends[tirx.Max(e - 1, tirx.IntImm("int64", 0))], zero)

    def on(row: Any, size: Any) -> Any:
        """The function on some rows of the expert."""
        of_rows = [*inputs[:rows], out]
        own = kernel.specialize({p: _buffer(p, [size, *p.ty.shape[1:]]) for p in of_rows})
        places = [*((tensor, row) for tensor in parameters[:rows]), *((m, expert) for m in parameters[rows:])]
        views = [
            tirx.DeclBuffer(p, data=_address(tensor, index))
            for p, (tensor, index) in zip(own.params, [*places, (result, row)], strict=True)
        ]
        return tirx.SeqStmt([*views, own.body])

    size = out.ty.shape[0]
    if isinstance(size, tirx.IntImm):
        row = tirx.Var("row", "int32")
        work = _loop(row, count, on(first + row, size))
    else:
        work = on(first, count)
    end = tirx.Max(tirx.Min(offsets[other], total), start(other))
    mine = [
        tirx.Bind(first, start(expert)),
        tirx.Bind(count, ends[expert] - first),
        tirx.IfThenElse(count > zero, work, None),
    ]
    steps = [
        tirx.AllocBuffer(ends),
        _loop(other, experts, tirx.BufferStore(ends, end, [other])),
        _zeros(result, ends[last]),
        _loop(expert, experts, tirx.SeqStmt(mine)),
    ]
    stacked: Any = PrimFunc([*parameters, offsets, result], tirx.SeqStmt(steps))
    return stacked.with_attr(dict(function.attrs))


def _buffer(parameter: Any, shape: Sequence[Any]) -> Any:
    """A parameter like another one, of another shape."""
    kind = parameter.ty
    return tirx.decl_buffer([*shape], kind.dtype, parameter.name, data_alignment=kind.data_alignment)


def _address(tensor: Any, index: Any) -> Any:
    """Where a slice of a tensor's first dimension lies."""
    # Matrices of all experts may have more elements than 32 bits count.
    rest = [tirx.IntImm("int64", 0)] * (len(tensor.ty.shape) - 1)
    return tirx.address_of(tirx.BufferLoad(tensor, [tirx.Cast("int64", index), *rest]))


def _loop(variable: Any, extent: Any, body: Any) -> Any:
    kind = str(variable.ty)
    end = tirx.IntImm(kind, extent) if isinstance(extent, int) else extent
    return tirx.For(variable, tirx.IntImm(kind, 0), end, tirx.ForKind.SERIAL, body)


def _zeros(tensor: Any, first: Any) -> Any:
    """Fills the rows from one on with zeros."""
    count, width = tensor.ty.shape
    row, column = tirx.Var("row", "int32"), tirx.Var("column", "int32")
    zero = tirx.BufferStore(tensor, tirx.const(0, tensor.ty.dtype), [first + row, column])
    return _loop(row, count - first, _loop(column, tirx.Cast("int32", width), zero))
