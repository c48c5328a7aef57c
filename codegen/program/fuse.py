"""Joins kernels with their neighbours, so that what passes between them never becomes a tensor of its own.

* :func:`with_residual`: a linear adds a tensor to its result where it stores it.
* :func:`fuse_rows`: a quantizer computes every row it quantizes: the norm or the gate in front of it.
* :func:`view_results`: a function's result is not copied to change its shape.

None of them changes what is computed: every value goes through the same operations in the same order, and a product of
one kernel is rounded before a sum of its neighbour.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Any

from ..tvm_api import PrimFunc, relax, renew_definitions, s_tir, tirx, tvm, tvm_ffi
from .builder import BY_ROWS, KERNEL
from .floats import rounded
from .queries import bindings, called_kernel, elements, has_parallel_loop, is_call, surely_equal, with_block


def with_residual(function: Any) -> PrimFunc:
    """A kernel that also adds a tensor to its result.

    Given::

        kernel(values, x_scale, packed, out):            out[m, n] = y

    Result::

        kernel(values, x_scale, packed, residual, out):  out[m, n] = y + residual[m, n]

    A kernel that keeps its sums in the result adds the tensor behind everything else.

    Args:
        function: a TIR function, whose last parameter is the result, float32 ``[M, N]``.
    """
    *inputs, out = function.params
    residual = tirx.decl_buffer(out.ty.shape, out.ty.dtype, "residual", data_alignment=out.ty.data_alignment)

    def fence(store: Any) -> Any:
        return rounded(store) if store.buffer.same_as(out) else store

    def add(store: Any) -> Any:
        if not store.buffer.same_as(out):
            return store
        value = rounded(store).value + tirx.BufferLoad(residual, store.indices)
        return tirx.BufferStore(out, value, store.indices)

    if _is_read(function.body, out):
        sums = tvm_ffi.structural_map(function.body, (tirx.BufferStore, fence))
        body = tirx.SeqStmt([sums, _add_behind(residual, out, has_parallel_loop(function.body))])
    else:
        body = tvm_ffi.structural_map(function.body, (tirx.BufferStore, add))
    return _function([*inputs, residual, out], body, function)


def _is_read(statement: Any, buffer: Any) -> bool:
    read = []

    def look(load: Any) -> None:
        read.append(load.source.same_as(buffer))

    tvm_ffi.structural_walk(statement, (tvm.ir.TensorLoad, look))
    return any(read)


def _add_behind(residual: Any, out: Any, parallel: bool) -> Any:
    """``out += residual``; threads share the tokens, or the columns of a single one."""
    token, column = (tirx.Var(name, size.ty) for name, size in zip(("token", "column"), out.ty.shape, strict=True))
    where = [token, column]
    loops = list(zip(where, out.ty.shape, strict=True))
    if surely_equal(out.ty.shape[0], 1):
        loops.reverse()
    kinds = [tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL, tirx.ForKind.SERIAL]
    body: Any = tirx.BufferStore(out, tirx.BufferLoad(out, where) + tirx.BufferLoad(residual, where), where)
    for (variable, extent), kind in zip(reversed(loops), reversed(kinds), strict=True):
        body = tirx.For(variable, tirx.const(0, variable.ty), extent, kind, body)
    return body


def _function(parameters: list[Any], body: Any, like: Any) -> Any:
    """A TIR function with the attributes of another one, but for its name."""
    attributes = {key: value for key, value in like.attrs.items() if key != "global_symbol"}
    return PrimFunc(parameters, body).with_attr(attributes)


def fuse_rows(module: Any, apart: Collection[str] = ()) -> Any:
    """Lets quantizers compute their rows, after loops have been scheduled.

    Given::

        %h = call_tir(norm, %x, %weight)
        %q = call_tir(quantize, reshape(%h), %clip)

    Result::

        %q = call_tir(norm_quantize, %x, %weight, %clip)

    where the new kernel has one loop over tokens, in which a row of ``%h`` is computed and quantized. A tensor that is
    read elsewhere, too, or whose loops are of another kind (:func:`join_rows`), stays.

    Args:
        module: Relax functions and TIR kernels; quantizers have the attribute :data:`.builder.BY_ROWS`.
        apart: functions that stay as they are.
    """
    return relax.transform.DeadCodeElimination()(_RowFusion(module, apart).run())


def view_results(module: Any) -> Any:
    """Makes views of loops that only copy in order, which Relax leaves where a reshape gives a function's result."""
    return relax.transform.DeadCodeElimination()(_Views(module, ()).run())


class _Rewriter(relax.expr_functor.PyExprMutator):
    """Rewrites calls in the functions of a module.

    Args:
        module: Relax functions and TIR kernels.
        apart: functions that stay as they are.
    """

    def __init__(self, module: Any, apart: Collection[str]):
        super().__init__(module)
        self.module, self.apart = module, apart
        self.values: dict[Any, Any] = {}
        self.uses: collections.Counter[Any] = collections.Counter()

    def run(self) -> Any:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function) and variable.name_hint not in self.apart:
                self.values = {binding.var: binding.value for binding in bindings(function)}
                expressions = [*self.values.values(), function.body.body]
                self.uses = collections.Counter(u for e in expressions for u in relax.analysis.used_vars(e))
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def has(self, name: str, attribute: str) -> bool:
        """Whether there is a kernel of that name with an attribute."""
        return bool(name) and attribute in self.module[name].attrs


@relax.expr_functor.mutator
class _Views(_Rewriter):
    """Rewrites the calls of loops that only copy in order."""

    def visit_call_(self, call: Any) -> Any:
        """Overrides the visitor's."""
        name = called_kernel(call)
        if not name or self.has(name, KERNEL) or len(call.args[1]) != 1 or len(call.ty_args) != 1:
            return call
        source, result = call.args[1][0], call.ty_args[0]
        if not hasattr(source.ty, "shape"):
            return call
        # A slice from the beginning copies in order, too.
        whole = hasattr(result, "shape") and surely_equal(elements(source.ty.shape), elements(result.shape))
        if whole and relax.analysis.has_reshape_pattern(self.module[name]):
            return relax.op.reshape(source, result.shape)
        return call


@relax.expr_functor.mutator
class _RowFusion(_Rewriter):
    """Rewrites the calls of quantizers."""

    def __init__(self, module: Any, apart: Collection[str]):
        super().__init__(module, apart)
        self.fused: dict[tuple[str, str], Any] = {}

    def visit_call_(self, call: Any) -> Any:
        """Overrides the visitor's."""
        if self.has(called_kernel(call), BY_ROWS):
            producer = self._producer(call.args[1][0])
            if producer is not None and (kernel := self._kernel(producer, call)) is not None:
                arguments = [*producer.args[1], *list(call.args[1])[1:]]
                return relax.call_tir(kernel, arguments, list(call.ty_args[0].fields))
        return call

    def _producer(self, value: Any) -> Any:
        """The call of scheduled loops that computes a value for nothing else; None where it is something else."""
        while self.uses[value] == 1 and value in self.values:
            value = self.values[value]
            if is_call(value, "relax.reshape"):
                value = value.args[0]
            elif not isinstance(value, relax.Var):
                break
        name = called_kernel(value)
        # Sizes that a call passes by themselves would have to be passed on.
        return value if name and not self.has(name, KERNEL) and len(value.args) == 2 else None

    def _kernel(self, producer: Any, call: Any) -> Any:
        names = called_kernel(producer), called_kernel(call)
        if names not in self.fused:
            kernel = join_rows(*(self.module[name] for name in names))
            self.fused[names] = kernel and self.builder_.add_func(kernel, "_".join(names))
        return self.fused[names]


def join_rows(producer: Any, quantizer: Any) -> PrimFunc | None:
    """One kernel ``(*inputs of the producer, *other parameters of the quantizer)`` for both.

    Args:
        producer: a TIR function of scheduled loops with the result float32 ``[..., K]``, which the quantizer reads.
        quantizer: a TIR function of one loop over the rows of its first parameter, float32 ``[M, K]``.

    Returns:
        The kernel; None where the producer is not one loop over rows of ``K``.
    """
    producer, quantizer = renew_definitions(producer), renew_definitions(quantizer)
    *inputs, result = producer.params
    x, *others = quantizer.params
    loop, outer = _row_loop(producer.body), quantizer.body
    *rows, columns = result.ty.shape
    if loop is None or not rows or not surely_equal(columns, x.ty.shape[1]):
        return None
    if not surely_equal(loop.extent, elements(rows)) or result.ty.dtype != x.ty.dtype:
        return None
    row = tirx.decl_buffer([x.ty.shape[1]], x.ty.dtype, "row")
    index = tirx.Cast(loop.loop_var.ty, outer.loop_var)

    def load(old: Any) -> Any:
        between = old.source.same_as(result) or old.source.same_as(x)
        return tirx.BufferLoad(row, [old.indices[-1]]) if between else old

    def store(old: Any) -> Any:
        return tirx.BufferStore(row, rounded(old).value, [old.indices[-1]]) if old.buffer.same_as(result) else old

    def block(old: Any) -> Any:
        # What it reads and writes names tensors that are no more.
        return with_block(old, old.body, old.alloc_buffers)

    def variable(old: Any) -> Any:
        return index if old.same_as(loop.loop_var) else old

    callbacks = [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store), (s_tir.SBlock, block), (tirx.Var, variable)]
    parts = [tvm_ffi.structural_map(part, callbacks) for part in (loop.body, outer.body)]
    body = tirx.SeqStmt([tirx.AllocBuffer(row), *parts])
    return _function([*inputs, *others], tirx.For(outer.loop_var, outer.min, outer.extent, outer.kind, body), quantizer)


def _row_loop(statement: Any) -> Any:
    """The only loop of a body, within blocks that allocate nothing; None where there is none."""
    while isinstance(statement, s_tir.SBlockRealize) and not statement.block.alloc_buffers:
        statement = statement.block.body
    return statement if isinstance(statement, tirx.For) else None
