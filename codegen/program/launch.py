"""Joins the calls of a function into few launches, because a parallel launch costs as much as a small kernel.

A function of one token, or of one token of each of a few sequences, is a sequence of kernel calls. It is cut into
segments, one for each decoder layer, and a segment becomes one TIR function with one parallel region, in which every
thread walks through the whole segment:

* A kernel with parallel loops does its share of them and waits for the others at a barrier, behind all of them where
  they stand in a serial loop. What it writes is shared.
* Any other kernel is small. Every thread runs all of it, on a private copy of what it writes, and waits for nobody.
  What a later segment needs is written by the first thread alone, and the others wait; where its size follows the
  number of past tokens, which has no place in a block, every segment that needs it computes it.

Weights, state and shared results are blocks of bytes; a segment gets the offsets of its tensors from a table. So the
layers of a model, which differ in nothing else, share one TIR function, and those that follow one another one launch.
Results have room for as many sequences as there may be.

Given::

    %h = call_tir(norm, %x, weights[0:2304]);  %q = call_tir(quantize, %h);  %y = call_tir(linear, %q, weights[...])

Result::

    %workspace = call_tir_inplace(segment, %weights, %state, %workspace, [[0, 2304, ...], [9504, 11808, ...], ...])
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import KernelError
from ..sizes import ALIGNMENT, FIXED_STATE, STATE, WEIGHTS
from ..tvm_api import PrimFunc, relax, renew_definitions, s_tir, tirx, tvm, tvm_ffi
from .floats import rounded
from .queries import bindings, has_parallel_loop, is_call, with_block

STACK_BYTES = 1024
"""Buffers of kernels up to this size are on the stack of a launch; larger ones it asks TVM's runtime for, once."""

WORKSPACE = "workspace"
"""The parameter with shared results: the last one of a function of few launches."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        block: name of an input, of a block or, for a result, of nothing yet.
        offset: in bytes within a block; in KV state per slot.
        shape, dtype: of the tensor.
        result: number of the kernel result it is (part of), -1 for inputs, weights and state.
    """

    block: str
    offset: int
    shape: tuple[Any, ...]
    dtype: str
    result: int = -1


@dataclass
class KernelCall:
    """One kernel call: the kernel, what it reads and the results it writes, in the order of its parameters.

    Attributes:
        name: the kernel's.
        kernel: a TIR function.
        arguments: tensors that it reads, and sizes.
        writes: its results.
        parallel: it shares work among threads.
    """

    name: str
    kernel: Any
    arguments: list[Any]
    writes: list[Place]
    parallel: bool

    @property
    def reads(self) -> list[Place]:
        """The tensors among the arguments."""
        return [a for a in self.arguments if isinstance(a, Place)]


@dataclass
class _Segment:
    calls: list[KernelCall] = field(default_factory=list)


def merge_launches(
    module: Any, name: str, begins_segment: Callable[[str], bool], most: Mapping[str, int] | None = None
) -> tuple[Any, int]:
    """Rewrites one function of a module, after its loops have been scheduled.

    Args:
        module: Relax functions and TIR kernels; changed in place.
        name: of the function, whose shapes are fixed except for state and mask, and for the symbols in ``most``.
        begins_segment: whether a kernel of that name is the first of a segment.
        most: how large symbols get, by name.

    Returns:
        ``(module, workspace)``: the function takes an additional last parameter, ``workspace`` bytes of memory.

    Raises:
        KernelError: the function has something else than kernel calls, reshapes and views.
    """
    function = module[name]
    calls, result = kernel_calls(module, function)
    segments: list[_Segment] = [_Segment()]
    for call in calls:
        if begins_segment(call.name) and segments[-1].calls:
            segments.append(_Segment())
        segments[-1].calls.append(call)
    limits = Limits(most or {})
    _compute_where_read(segments, limits)
    return _Rewrite(module, name, function, segments, result, limits).run()


@dataclass(frozen=True)
class Limits:
    """How large sizes get.

    Attributes:
        most: of symbols, by name.
    """

    most: Mapping[str, int]

    def highest(self, size: Any, known: Mapping[Any, Any] | None = None) -> int | None:
        """The most that a size is; None where no limit of it is known.

        Args:
            size: an int or an expression.
            known: what variables in it stand for.
        """
        if isinstance(size, (int, tirx.IntImm)):
            return int(size)
        analyzer: Any = tvm.sym.Analyzer()
        known = known or {}

        def bind(variables: Sequence[Any]) -> bool:
            for variable in variables:
                if variable in known:
                    if not bind(tirx.analysis.undefined_vars(known[variable])):
                        return False
                    analyzer.bind(variable, known[variable], True)
                elif variable.name in self.most:
                    one, end = (tirx.const(n, str(variable.ty.dtype)) for n in (1, self.most[variable.name] + 1))
                    analyzer.bind(variable, tvm.ir.Range(one, end), True)
                else:
                    return False
            return True

        return int(analyzer.const_int_bound(size).max_value) if bind(tirx.analysis.undefined_vars(size)) else None

    def of(self, shape: Sequence[Any], known: Mapping[Any, Any] | None = None) -> list[int] | None:
        """The most that each dimension is; None where one has no limit."""
        found = [self.highest(size, known) for size in shape]
        return None if None in found else [size for size in found if size is not None]


def _compute_where_read(segments: Sequence[_Segment], limits: Limits) -> None:
    """Repeats small kernels whose results have no limited size in the segments that read these, where they can be."""
    numbers = itertools.count(sum(len(call.writes) for segment in segments for call in segment.calls))
    for i, segment in enumerate(segments):
        for call in segment.calls:
            if all(limits.of(write.shape) is not None for write in call.writes):
                continue
            _make_serial(call)
            if any(r.result >= 0 for r in call.reads):
                continue
            for later in segments[i + 1 :]:
                if {w.result for w in call.writes} & {r.result for c in later.calls for r in c.reads}:
                    fresh = {write.result: next(numbers) for write in call.writes}
                    readers = [replace(c, arguments=[_renumbered(a, fresh) for a in c.arguments]) for c in later.calls]
                    later.calls = [replace(call, writes=[_renumbered(w, fresh) for w in call.writes]), *readers]


def _renumbered(argument: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(argument, Place) and argument.result in numbers:
        return replace(argument, result=numbers[argument.result])
    return argument


def _make_serial(call: KernelCall) -> None:
    """Makes the kernel of a call one that every thread runs by itself."""

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    if call.parallel:
        body = tvm_ffi.structural_map(call.kernel.body, (tirx.For, serial))
        call.kernel, call.parallel = call.kernel.with_body(body), False


def kernel_calls(module: Any, function: Any) -> tuple[list[KernelCall], Place]:
    """The kernel calls of a function in order, and where its result lies."""
    places: dict[Any, Any] = {p: Place(p.name, 0, tuple(p.ty.shape), str(p.ty.dtype)) for p in function.params}
    calls: list[KernelCall] = []
    numbers = itertools.count()
    for binding in bindings(function):
        value, kind = binding.value, binding.var.ty
        if isinstance(value, relax.Var):
            places[binding.var] = places[value]
        elif isinstance(value, relax.TupleGetItem):
            places[binding.var] = places[value.tuple_value][value.index]
        elif is_call(value, "relax.reshape"):
            old = places[value.args[0]]
            places[binding.var] = Place(old.block, old.offset, tuple(kind.shape), old.dtype, old.result)
        elif is_call(value, "relax.memory.view"):
            block = places[value.args[0]].block
            places[binding.var] = Place(block, _offset(value.args[3]), tuple(kind.shape), str(kind.dtype))
        elif is_call(value, "relax.call_tir"):
            kernel = module[value.args[0]]
            types = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
            writes = [Place("", 0, tuple(t.shape), str(t.dtype), next(numbers)) for t in types]
            places[binding.var] = writes if isinstance(kind, relax.TupleType) else writes[0]
            arguments = [places[a] if isinstance(a.ty, relax.TensorType) else a for a in value.args[1]]
            calls.append(KernelCall(value.args[0].name_hint, kernel, arguments, writes, has_parallel_loop(kernel.body)))
        else:
            raise KernelError(f"a function of few launches cannot hold {value}")
    return calls, places[function.body.body]


def _offset(value: Any) -> int:
    """The offset of a view: bytes, or for state what the number of sequences and slots is multiplied with."""
    if isinstance(value, tirx.Mul):
        return _offset(value.a) * _offset(value.b)
    return int(value) if isinstance(value, tirx.IntImm) else 1


def _with_barriers(statement: Any) -> Any:
    """The same statements, with a barrier behind each that has parallel loops."""
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_with_barriers(part) for part in statement.seq])
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, _with_barriers(statement.body))
    if isinstance(statement, s_tir.SBlockRealize):
        inner = with_block(statement.block, _with_barriers(statement.block.body), statement.block.alloc_buffers)
        return s_tir.SBlockRealize(statement.iter_values, statement.predicate, inner)
    # Parallel loops within a serial one write what does not depend on one another: one barrier is enough.
    return _barrier_behind(statement) if has_parallel_loop(statement) else statement


def without_memory(statement: Any, limits: Limits | None = None) -> tuple[list[Any], Any]:
    """The working memory that statements ask for at run time, and the statements without that.

    Asking again and again costs more than a small kernel does. What is small lies on the stack or in registers. Of
    memory whose size is only known at run time as much is taken as there may be; where there is no limit it stays.
    """
    memory: list[Any] = []
    limits, sizes = limits or Limits({}), _bound(statement)

    def taken(buffer: Any) -> list[Any] | None:
        """What stands for the allocation of a buffer that is taken; None for one that stays."""
        shape, dtype = buffer.ty.shape, buffer.ty.dtype
        most = limits.of(shape, sizes)
        if most is None:
            return None
        if not all(isinstance(size, tirx.IntImm) for size in shape):
            whole = tirx.decl_buffer(most, dtype, buffer.name)
            memory.append(whole)
            return [tirx.DeclBuffer(buffer, data=whole.data)]
        if math.prod(most) * tvm.DataType(dtype).itemsize <= STACK_BYTES:
            return None
        memory.append(buffer)
        return []

    def take(sequence: Any) -> Any:
        kept: list[Any] = []
        for part in sequence.seq:
            instead = taken(part.buffer) if isinstance(part, tirx.AllocBuffer) else None
            kept += [part] if instead is None else instead
        return _in_turn(kept)

    def take_of_block(block: Any) -> Any:
        found = [(buffer, taken(buffer)) for buffer in block.alloc_buffers]
        views = [view for _, instead in found for view in instead or ()]
        body = tirx.SeqStmt([*views, block.body]) if views else block.body
        return with_block(block, body, [buffer for buffer, instead in found if instead is None])

    callbacks = [(tirx.SeqStmt, take), (s_tir.SBlock, take_of_block)]
    return memory, tvm_ffi.structural_map(statement, callbacks)


def _bound(statement: Any) -> dict[Any, Any]:
    """The variables that statements bind, and their values."""
    found: dict[Any, Any] = {}

    def look(bind: Any) -> None:
        found[bind.var] = bind.value

    tvm_ffi.structural_walk(statement, (tirx.Bind, look))
    return found


def _in_turn(statements: Sequence[Any]) -> Any:
    """Statements in sequence; TVM's sequences hold at least two."""
    return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]


def _pragma(key: str, body: Any) -> Any:
    return tirx.AttrStmt(tvm.runtime.convert(""), f"pragma_{key}", tirx.IntImm("int32", 1), body)


def _barrier_behind(loop: Any) -> Any:
    return _pragma("parallel_barrier_when_finish", loop)


def _first_thread(body: Any) -> Any:
    """A statement that the first thread runs while the others wait for it."""
    index = tirx.Var("thread", "int32")
    zero = tirx.IntImm("int32", 0)
    # Two iterations, because a loop with one is no loop to TVM, and every thread would run its body.
    guarded = tirx.IfThenElse(tirx.EQ(index, zero), body, None)
    return _barrier_behind(tirx.For(index, zero, tirx.IntImm("int32", 2), tirx.ForKind.PARALLEL, guarded))


class _Rewrite:
    """Builds the segments' TIR functions and the function that calls them."""

    def __init__(
        self, module: Any, name: str, function: Any, segments: Sequence[_Segment], result: Place, limits: Limits
    ):
        self.module, self.name, self.function = module, name, function
        self.segments, self.result, self.limits = segments, result, limits
        self.home = {w.result: i for i, s in enumerate(segments) for c in s.calls for w in c.writes}
        self.shared_results = {w.result for s in segments for c in s.calls if c.parallel for w in c.writes}
        for i, segment in enumerate(segments):
            for call in segment.calls:
                self.shared_results.update(r.result for r in call.reads if r.result >= 0 and self.home[r.result] != i)
        for call in (c for s in segments for c in s.calls if not c.parallel):
            # The first thread alone runs a kernel of which anything is shared.
            if any(w.result in self.shared_results for w in call.writes):
                self.shared_results.update(w.result for w in call.writes)
        self.shared_results.discard(result.result)
        self.offsets, self.workspace = self._plan()
        self.functions: dict[int, list[tuple[PrimFunc, Any]]] = {}

    def _plan(self) -> tuple[dict[int, int], int]:
        """Offsets of shared results in the workspace: those of a segment lie side by side, and what no later segment
        reads is overwritten by the next but one, so that segments alternate between two regions."""
        lasting, passing = {}, {}
        for i, segment in enumerate(self.segments):
            for write in (w for call in segment.calls for w in call.writes if w.result in self.shared_results):
                last = max((j for j, s in enumerate(self.segments) for c in s.calls for r in c.reads
                            if r.result == write.result), default=i)  # fmt: skip
                (passing if last <= i + 1 else lasting)[write.result] = (i, write)
        offsets: dict[int, int] = {}
        end = 0
        for number, (_, write) in lasting.items():
            offsets[number], end = end, end + self._bytes(write)
        sizes = [0, 0]
        base: dict[int, int] = {}
        for number, (i, write) in passing.items():
            offset = base.get(i, 0)
            base[i] = offset + self._bytes(write)
            offsets[number] = offset
            sizes[i % 2] = max(sizes[i % 2], base[i])
        for number, (i, _) in passing.items():
            offsets[number] += end + (sizes[0] if i % 2 else 0)
        return offsets, end + sum(sizes)

    def _bytes(self, place: Place) -> int:
        """Most bytes of a tensor, aligned."""
        shape = self.limits.of(place.shape)
        if shape is None:
            raise KernelError(f"a tensor of {list(place.shape)} is shared by threads or layers; its size has no limit")
        size = math.prod(shape) * tvm.DataType(place.dtype).itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    def run(self) -> tuple[Any, int]:
        builder = relax.BlockBuilder(self.module)
        parameters = [*self.function.params, relax.Var(WORKSPACE, relax.TensorType([self.workspace], "uint8"))]
        last = len(self.segments) - 1
        built = [_SegmentFunction(self, segment, i == last).build() for i, segment in enumerate(self.segments)]
        calls = [(self._share(builder, function), offsets) for function, offsets in built]
        with builder.function(f"{self.name}_merged", parameters):
            with builder.dataflow():
                workspace = parameters[-1]
                for handle, group in itertools.groupby(calls, lambda call: call[0]):
                    table = relax.const(np.array([offsets for _, offsets in group], np.int64), "int64")
                    arguments = [*parameters[:-1], workspace, table]
                    if handle is calls[-1][0]:
                        kind = relax.TensorType(list(self.result.shape), self.result.dtype)
                        result = builder.emit_output(relax.call_tir(handle, arguments, kind))
                    else:
                        kind, index = relax.TensorType([self.workspace], "uint8"), len(parameters) - 1
                        workspace = builder.emit(relax.call_tir_inplace(handle, arguments, index, kind))
            builder.emit_func_output(result)
        module = builder.get()
        merged = module[f"{self.name}_merged"]
        del module[f"{self.name}_merged"]
        module.update_func(module.get_global_var(self.name), merged.with_attr("global_symbol", self.name))
        return module, self.workspace

    def _share(self, builder: Any, function: PrimFunc) -> Any:
        """The handle of a segment's function; equal functions are one."""
        key = tvm_ffi.structural_hash(function)
        for candidate, handle in self.functions.setdefault(key, []):
            if tvm_ffi.structural_equal(candidate, function):
                return handle
        name = f"{self.name}_segment_{sum(map(len, self.functions.values()))}"
        handle = builder.add_func(function.with_attr("global_symbol", name), name)
        self.functions[key].append((function, handle))
        return handle


class _SegmentFunction:
    """Builds the TIR function of one segment: ``(*inputs, weights, state, workspace, table[, out])``.

    It runs the segment once for every row of ``table``, int64 ``[repeats, offsets]``.
    """

    def __init__(self, rewrite: _Rewrite, segment: _Segment, last: bool):
        self.rewrite, self.segment = rewrite, segment
        # A symbol of the whole function becomes one of this function.
        self.symbols: dict[Any, Any] = {}
        self.parameters = {
            p.name: self._buffer(p.name, tuple(p.ty.shape), str(p.ty.dtype)) for p in rewrite.function.params
        }
        self.parameters[WORKSPACE] = self._buffer(WORKSPACE, (rewrite.workspace,), "uint8")
        self.out = self._buffer("out", rewrite.result.shape, rewrite.result.dtype) if last else None
        self.offsets: dict[tuple[str, Any], Any] = {}
        self.private: dict[int, Any] = {}

    def _dimension(self, size: Any, dtype: str) -> Any:
        if isinstance(size, (int, tirx.IntImm)):
            return tirx.IntImm(dtype, int(size))

        def own(symbol: Any) -> Any:
            return self.symbols.setdefault(symbol, tirx.Var(symbol.name, "int64"))

        own_size = tvm_ffi.structural_map(size, (tirx.Var, own))
        return own_size if dtype == "int64" else tirx.Cast(dtype, own_size)

    def _buffer(self, name: str, shape: Sequence[Any], dtype: str) -> Any:
        return tirx.decl_buffer([self._dimension(d, "int64") for d in shape], dtype, name)

    def build(self) -> tuple[PrimFunc, list[int]]:
        """The function and the row of offsets of this segment."""
        private, statements = [], []
        for call in self.segment.calls:
            for write in call.writes:
                if self._is_private(write):
                    most = self.rewrite.limits.of(write.shape)
                    buffer = self._buffer(f"private_{write.result}", write.shape if most is None else most, write.dtype)
                    self.private[write.result] = buffer
                    private.append(tirx.AllocBuffer(buffer))
            memory, statement = without_memory(self._inline(call), self.rewrite.limits)
            private += map(tirx.AllocBuffer, memory)
            statements.append(statement)
        repeats, repeat = tirx.Var("repeats", "int64"), tirx.Var("repeat", "int64")
        zero = tirx.IntImm("int64", 0)
        table = tirx.decl_buffer([repeats, tirx.IntImm("int64", len(self.offsets))], "int64", "table")
        offsets = [
            tirx.Bind(variable, tirx.BufferLoad(table, [repeat, tirx.IntImm("int64", i)]))
            for i, variable in enumerate(self.offsets.values())
        ]
        loop = tirx.For(repeat, zero, repeats, tirx.ForKind.SERIAL, _in_turn([*offsets, *statements]))
        region = _pragma("parallel_launch_point", _in_turn([*private, loop]))
        outputs = [self.out] if self.out is not None else []
        function: Any = PrimFunc([*self.parameters.values(), table, *outputs], region)
        return function.with_attr("s_tir", True), [offset for _, offset in self.offsets]

    def _is_private(self, place: Place) -> bool:
        rewrite = self.rewrite
        return place.result not in rewrite.shared_results and place.result != rewrite.result.result

    def _inline(self, call: KernelCall) -> Any:
        """The statements of one call, on the segment's memory."""
        # Two calls of one kernel must not share variables.
        kernel = renew_definitions(call.kernel)
        sizes: dict[Any, Any] = {}
        tensors = []
        for parameter, argument in zip(kernel.params, [*call.arguments, *call.writes], strict=True):
            if not isinstance(argument, Place):
                sizes[parameter] = self._dimension(argument, str(parameter.ty.dtype))
                continue
            tensors.append(parameter)
            for own, symbol in zip(argument.shape, parameter.ty.shape, strict=True):
                if isinstance(symbol, tirx.Var):
                    sizes[symbol] = self._dimension(own, str(symbol.ty.dtype))

        def size(variable: Any) -> Any:
            return sizes.get(variable, variable)

        kernel: Any = tvm_ffi.structural_map(PrimFunc(tensors, kernel.body), (tirx.Var, size))
        views = [
            tirx.DeclBuffer(parameter, data=self._pointer(place))
            for parameter, place in zip(kernel.params, [*call.reads, *call.writes], strict=True)
        ]
        body = tvm_ffi.structural_map(kernel.body, (tirx.BufferStore, rounded))
        shared = [w for w in call.writes if not self._is_private(w)]
        if call.parallel:
            body = _with_barriers(body)
        elif shared:
            return _first_thread(tirx.SeqStmt([*views, body]))
        return tirx.SeqStmt([*views, body])

    def _pointer(self, place: Place) -> Any:
        """The address of a tensor."""
        if place.result in self.private:
            return self.private[place.result].data
        if place.result >= 0 and place.result == self.rewrite.result.result:
            assert self.out is not None
            return self.out.data
        if place.result >= 0:
            return self._address(WORKSPACE, self.rewrite.offsets[place.result])
        if place.block in (WEIGHTS, STATE, FIXED_STATE):
            return self._address(place.block, place.offset)
        return self.parameters[place.block].data

    def _address(self, block: str, offset: int) -> Any:
        """A pointer into a block, at an offset from the table."""
        variable = self.offsets.setdefault((block, offset), tirx.Var(f"offset_{len(self.offsets)}", "int64"))
        # Bytes lie in the order of sequences and slots within each tensor, not across them.
        *leading, _ = self.parameters[block].shape
        byte = math.prod(leading, start=variable)
        first = [tirx.IntImm("int64", 0) for _ in leading]
        return tirx.address_of(tirx.BufferLoad(self.parameters[block], [*first, byte]))
