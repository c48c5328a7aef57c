"""Joins kernels with their neighbours, so that what passes between them never becomes a tensor of its own.

* :func:`with_residual`: a linear adds a tensor to its result where it stores it.
* :func:`fuse_rows`: a quantizer computes every row it quantizes: the norm, the gate or the sum in front of it.
* :func:`view_results`: a function's result is not copied to change its shape.

None of them changes what is computed: every value goes through the same operations in the same order.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable
from typing import Any

from ..tvm_api import PrimFunc, relax, renew_definitions, s_tir, tirx, tvm, tvm_ffi
from .builder import KERNEL
from .launch import has_parallel_loop


def with_residual(function: PrimFunc) -> PrimFunc:
    """A kernel that also adds a tensor to its result.

    Given::

        kernel(values, x_scale, packed, out):            out[m, n] = y

    Result::

        kernel(values, x_scale, packed, residual, out):  out[m, n] = y + residual[m, n]

    A kernel that keeps its sums in the result adds the tensor behind everything else.

    Args:
        function: its last parameter is the result, float32 ``[M, N]``.
    """
    *inputs, out = function.params
    residual = tirx.decl_buffer(out.ty.shape, out.ty.dtype, "residual", data_alignment=out.ty.data_alignment)

    def add(store: Any) -> Any:
        if not store.buffer.same_as(out):
            return store
        return tirx.BufferStore(out, store.value + tirx.BufferLoad(residual, store.indices), store.indices)

    if _is_read(function.body, out):
        body = tirx.SeqStmt([function.body, _add_behind(residual, out, has_parallel_loop(function.body))])
    else:
        body = tvm_ffi.structural_map(function.body, (tirx.BufferStore, add))
    return PrimFunc([*inputs, residual, out], body).with_attr(dict(function.attrs))


def _is_read(statement: Any, buffer: Any) -> bool:
    read = []

    def look(load: Any) -> None:
        read.append(load.source.same_as(buffer))

    tvm_ffi.structural_walk(statement, (tvm.ir.TensorLoad, look))
    return any(read)


def _add_behind(residual: Any, out: Any, parallel: bool) -> Any:
    """``out += residual``, column by column."""
    tokens, columns = out.ty.shape
    token, column = tirx.Var("token", tokens.ty), tirx.Var("column", columns.ty)
    where = [token, column]
    add = tirx.BufferStore(out, tirx.BufferLoad(out, where) + tirx.BufferLoad(residual, where), where)
    inner = tirx.For(token, tirx.const(0, tokens.ty), tokens, tirx.ForKind.SERIAL, add)
    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    return tirx.For(column, tirx.const(0, columns.ty), columns, kind, inner)


def fuse_rows(module: Any, quantizers: tuple[str, ...]) -> Any:
    """Lets quantizers compute their rows, after loops have been scheduled.

    Given::

        %h = call_tir(norm, %x, %weight)
        %q = call_tir(quantize, reshape(%h), %clip)

    Result::

        %q = call_tir(norm_quantize, %x, %weight, %clip)

    where the new kernel has one loop over tokens, in which a row of ``%h`` is computed and quantized. A tensor that is
    read elsewhere, too, or whose loops are of another kind, stays.

    Args:
        module: Relax functions and TIR kernels.
        quantizers: how the names of quantizers begin; they are one loop over the rows of their first parameter.
    """
    return relax.transform.DeadCodeElimination()(_RowFusion(module, quantizers).run())


@relax.expr_functor.mutator
class _RowFusion(relax.expr_functor.PyExprMutator):
    """Rewrites the calls of quantizers."""

    def __init__(self, module: Any, quantizers: tuple[str, ...]):
        super().__init__(module)
        self.module, self.quantizers = module, quantizers
        self.fused: dict[tuple[str, str], Any] = {}
        self.values: dict[Any, Any] = {}
        self.uses: collections.Counter[Any] = collections.Counter()

    def run(self) -> Any:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                bindings = list(itertools.chain.from_iterable(block.bindings for block in function.body.blocks))
                self.values = {binding.var: binding.value for binding in bindings}
                expressions = [*self.values.values(), function.body.body]
                self.uses = collections.Counter(u for e in expressions for u in relax.analysis.used_vars(e))
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        """Overrides the visitor's."""
        if _tir_name(call).startswith(self.quantizers):
            producer = self._producer(call.args[1][0])
            if producer is not None and (kernel := self._kernel(producer, call)) is not None:
                arguments = [*producer.args[1], *list(call.args[1])[1:]]
                return relax.call_tir(kernel, arguments, list(call.ty_args[0].fields))
        return call

    def _producer(self, value: Any) -> Any:
        """The call of scheduled loops that computes a value for nothing else; None where it is something else."""
        while self.uses[value] == 1 and value in self.values:
            value = self.values[value]
            if getattr(getattr(value, "op", None), "name", "") == "relax.reshape":
                value = value.args[0]
            elif not isinstance(value, relax.Var):
                break
        name = _tir_name(value)
        # Sizes that a call passes by themselves would have to be passed on.
        return value if name and KERNEL not in self.module[name].attrs and len(value.args) == 2 else None

    def _kernel(self, producer: Any, call: Any) -> Any:
        names = _tir_name(producer), _tir_name(call)
        if names not in self.fused:
            kernel = join_rows(*(self.module[name] for name in names))
            self.fused[names] = kernel and self.builder_.add_func(kernel, "_".join(names))
        return self.fused[names]


def view_results(module: Any) -> Any:
    """Makes views of loops that only copy in order, which Relax leaves where a reshape gives a function's result."""
    return _Views(module).run()


@relax.expr_functor.mutator
class _Views(relax.expr_functor.PyExprMutator):
    """Rewrites the calls of such loops."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module

    def run(self) -> Any:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        """Overrides the visitor's."""
        name = _tir_name(call)
        if name and KERNEL not in self.module[name].attrs and relax.analysis.has_reshape_pattern(self.module[name]):
            return relax.op.reshape(call.args[1][0], call.ty_args[0].shape)
        return call


def _tir_name(value: Any) -> str:
    """Name of the kernel that a value is the result of, or nothing."""
    if getattr(getattr(value, "op", None), "name", "") != "relax.call_tir":
        return ""
    return value.args[0].name_hint


def join_rows(producer: PrimFunc, quantizer: PrimFunc) -> PrimFunc | None:
    """One kernel ``(*inputs of the producer, *other parameters of the quantizer)`` for both.

    Args:
        producer: scheduled loops, whose result, float32 ``[..., K]``, is the quantizer's first parameter.
        quantizer: one loop over the rows of its first parameter, float32 ``[M, K]``.

    Returns:
        The kernel; None where the producer is not one loop over rows of ``K``.
    """
    producer, quantizer = renew_definitions(producer), renew_definitions(quantizer)
    *inputs, result = producer.params
    x, *others = quantizer.params
    loop, outer = _row_loop(producer.body), quantizer.body
    columns = x.ty.shape[1]
    if loop is None or not isinstance(result.ty.shape[-1], tirx.IntImm) or int(result.ty.shape[-1]) != int(columns):
        return None
    row = tirx.decl_buffer([columns], x.ty.dtype, "row")
    index = tirx.Cast(loop.loop_var.ty, outer.loop_var)

    def load(old: Any) -> Any:
        return tirx.BufferLoad(row, [old.indices[-1]]) if _any_same(old.source, (result, x)) else old

    def store(old: Any) -> Any:
        return tirx.BufferStore(row, old.value, [old.indices[-1]]) if old.buffer.same_as(result) else old

    def block(old: Any) -> Any:
        # What it says it reads and writes names tensors that are no more.
        return s_tir.SBlock(
            old.iter_vars, [], [], old.name_hint, old.body, old.init, old.alloc_buffers, old.match_buffers,
            old.annotations,
        )  # fmt: skip

    def variable(old: Any) -> Any:
        return index if old.same_as(loop.loop_var) else old

    callbacks = [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store), (s_tir.SBlock, block), (tirx.Var, variable)]
    parts = [tvm_ffi.structural_map(part, callbacks) for part in (loop.body, outer.body)]
    body = tirx.SeqStmt([tirx.AllocBuffer(row), *parts])
    joined = tirx.For(outer.loop_var, outer.min, outer.extent, outer.kind, body)
    return PrimFunc([*inputs, *others], joined).with_attr(dict(quantizer.attrs))


def _any_same(value: Any, candidates: Iterable[Any]) -> bool:
    return any(value.same_as(candidate) for candidate in candidates)


def _row_loop(statement: Any) -> Any:
    """The only loop of a body, within blocks that allocate nothing; None where there is none."""
    while isinstance(statement, s_tir.SBlockRealize) and not statement.block.alloc_buffers:
        statement = statement.block.body
    return statement if isinstance(statement, tirx.For) else None
