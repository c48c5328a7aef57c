"""What a launch computes before its own work: the small calls in front of it, in every thread block.

A launch costs more time than a norm does. So a kernel that is worth a launch, a linear, say, takes the loops and the
quantizer that lead to its inputs along, and each of its thread blocks computes them for itself:

* An elementwise loop has no memory. Its elements are computed where they are read, unless one takes very many
  operations: those are computed once.
* Of a sum, a maximum or a minimum, each warp computes elements, or a share of one where there are more warps.
* A quantizer's groups are shared out over the warps.

What is computed once, sums and quantized values lie in shared memory. What later launches read, too, the first thread
block writes for them.

Given::

    h = x + y;  n = norm(h);  q = quantize(n);  out = linear(q)      and later  z = h + ...

Result::

    linear's kernel:  q = quantize(norm(x + y)) in shared memory;  the first block writes h;  out = linear(q)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UntranslatableError
from ...program.floats import show_floats
from ...program.queries import operations
from ...tvm_api import PrimFunc, T, renew_definitions, tirx, tvm, tvm_ffi
from ..limits import WARP
from .loops import MOST_OPERATIONS, exact_functions

MOST_STEPS = 1 << 15
"""Loops of more iterations than this are worth a launch of their own: every thread block would repeat them."""

MOST_BLOCKS = 256
"""Thread blocks of a launch with a prologue, which all repeat it: where the kernel has more of them, they take turns. A
few for each multiprocessor of a large device; which number is best has not been measured."""

_ALIGNMENT = 64
"""Bytes at a multiple of which TVM lets every buffer begin."""

_ALL_LANES = 0xFFFFFFFF
_COMBINING = (tirx.Add, tirx.Max, tirx.Min)

Element = Callable[[Sequence[Any]], Any]
"""The element of a tensor at some indices, as an expression."""


class JoinError(UntranslatableError):
    """A kernel cannot compute for itself what a call in front of it gives it; they need launches of their own."""


@dataclass(frozen=True)
class Stage:
    """One loop nest of a function: ``result[over] = value``, or what :attr:`combine` makes of all ``value[over, of]``.

    Attributes:
        result: the buffer that it writes.
        over: variables of the result's indices, in order.
        of: variables that it combines over, each with its extent; none where it is elementwise.
        value: an element, or a part of one.
        combine: how two parts become one, a class of expressions.
        start: what combining begins with.
    """

    result: Any
    over: Sequence[Any]
    of: Sequence[tuple[Any, int]] = ()
    value: Any = None
    combine: Any = None
    start: Any = None

    @property
    def parts(self) -> int:
        """How many parts an element has."""
        return math.prod(extent for _, extent in self.of)

    @property
    def steps(self) -> int:
        """Iterations of the whole nest."""
        return math.prod(sizes(self.result)) * self.parts


def sizes(buffer: Any) -> list[int]:
    """The shape of a buffer whose sizes are known."""
    return [int(size) for size in buffer.ty.shape]


@dataclass(frozen=True)
class Loops:
    """The loop nests of a function, in order.

    Attributes:
        reads: its parameters that none of them writes.
        writes: the others.
        stages: the nests.
    """

    reads: Sequence[Any]
    writes: Sequence[Any]
    stages: Sequence[Stage]

    @classmethod
    def of(cls, function: Any) -> Loops | None:
        """The nests of a function; None where one is of another form, or of an unknown size, or takes a number.

        Args:
            function: of :func:`~...program.compile.fused_loops`: results are its last parameters.
        """
        if not all(hasattr(parameter.ty, "shape") for parameter in function.params):
            return None
        if not all(isinstance(size, tirx.IntImm) for buffer in function.params for size in buffer.ty.shape):
            return None
        own = exact_functions(show_floats(renew_definitions(function)))
        body = own.body.block.body
        found = [_stage(nest) for nest in (body.seq if isinstance(body, tirx.SeqStmt) else [body])]
        stages = [stage for stage in found if stage is not None]
        if len(stages) < len(found):
            return None
        writes = [p for p in own.params if any(stage.result.same_as(p) for stage in stages)]
        return cls(own.params[: len(own.params) - len(writes)], writes, stages)


def _stage(nest: Any) -> Stage | None:
    while isinstance(nest, tirx.For):
        nest = nest.body
    block = getattr(nest, "block", None)
    if block is None or not isinstance(block.body, tirx.BufferStore) or not _is_number(nest.predicate, True):
        return None
    if not all(_is_number(variable.dom.min, 0) for variable in block.iter_vars):
        return None
    store, kinds = block.body, [variable.iter_type for variable in block.iter_vars]
    extents = [variable.dom.extent for variable in block.iter_vars]
    if not all(isinstance(extent, tirx.IntImm) for extent in (*extents, *store.buffer.ty.shape)):
        return None
    over = [v.var for v, kind in zip(block.iter_vars, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    of = [
        (v.var, int(extent))
        for v, kind, extent in zip(block.iter_vars, kinds, extents, strict=True)
        if kind == tirx.IterVar.CommReduce
    ]
    value = store.value
    if not store.indices and all(int(extent) == 1 for extent in extents):
        # A tensor without dimensions has a variable that stands for nothing.
        value = with_variables(value, {variable: tirx.const(0, "int32") for variable in over})
        kinds, over = [], []
    whole = len(over) == len(store.indices) and all(a.same_as(b) for a, b in zip(over, store.indices, strict=True))
    if not whole or len(over) + len(of) != len(kinds):
        return None
    if not of:
        return Stage(store.buffer, over, (), value)
    update, init = value, block.init
    if not isinstance(update, _COMBINING) or not isinstance(init, tirx.BufferStore):
        return None
    sides = [update.a, update.b]
    own = [isinstance(side, tvm.ir.TensorLoad) and side.source.same_as(store.buffer) for side in sides]
    if own.count(True) != 1:
        return None
    # Each lane begins with it.
    if isinstance(update, tirx.Add) and not _is_number(init.value, 0):
        return None
    return Stage(store.buffer, over, of, sides[own.index(False)], type(update), init.value)


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, (tirx.IntImm, tirx.FloatImm)) and value.value == number


@dataclass(frozen=True)
class Value:
    """A tensor as a kernel knows it.

    Attributes:
        shape: its sizes.
        element: an element of it.
        memory: the buffer of those bytes, where it has any.
    """

    shape: Sequence[int]
    element: Element
    memory: Any = None

    @classmethod
    def of(cls, buffer: Any) -> Value:
        """The tensor in a buffer."""
        return cls(sizes(buffer), lambda indices: tirx.BufferLoad(buffer, indices), buffer)

    def shaped(self, shape: Sequence[int]) -> Element:
        """An element by its indices in another shape of equally many elements."""
        if list(shape) == list(self.shape):
            return self.element
        return lambda indices: self.element(unraveled(raveled(indices, shape), self.shape))

    def seen(self, shape: Sequence[Any]) -> Value:
        """The same tensor in another shape of equally many elements."""
        known = [int(size) for size in shape]
        return Value(known, self.shaped(known), self.memory)


def raveled(indices: Sequence[Any], shape: Sequence[int]) -> Any:
    """The place of an element among all of a tensor; of several, where the last index is a vector."""
    place: Any = tirx.const(0, "int32")
    for index, size in zip(indices, shape, strict=True):
        place = place * size + (index if "x" in str(index.ty.dtype) else tirx.Cast("int32", index))
    return place


def unraveled(place: Any, shape: Sequence[int]) -> list[Any]:
    """The indices of the element at a place; zeros in dimensions of an empty tensor, of which nobody takes any."""
    indices: list[Any] = []
    for size in reversed(shape):
        indices.insert(0, tirx.floormod(place, size) if size > 1 else tirx.const(0, "int32"))
        place = tirx.floordiv(place, max(size, 1))
    return indices


class Prologue:
    """Puts small calls in front of a kernel.

    Args:
        kernel: a TIR function that launches thread blocks along x, whose threads are whole warps.
    """

    def __init__(self, kernel: PrimFunc):
        self._kernel = renew_definitions(kernel)
        self._bindings: list[Any] = []
        body = self._kernel.body
        while isinstance(body, tirx.AttrStmt) and body.attr_key == "thread_extent":
            self._bindings.append(body)
            body = body.body
        self._body = body
        extents = {b.node.thread_tag: int(b.value) for b in self._bindings if b.node.thread_tag != "blockIdx.x"}
        variables = {b.node.thread_tag: b.node.var for b in self._bindings}
        self._block = variables["blockIdx.x"]
        self._items = next(int(b.value) for b in self._bindings if b.node.thread_tag == "blockIdx.x")
        columns = extents["threadIdx.x"]
        self._threads = math.prod(extents.values())
        self._thread = variables["threadIdx.x"]
        if "threadIdx.y" in variables:
            self._thread = variables["threadIdx.y"] * columns + self._thread
        self._lane = tirx.floormod(self._thread, WARP) if columns != WARP else variables["threadIdx.x"]
        self._warp = tirx.floordiv(self._thread, WARP) if columns != WARP else variables.get("threadIdx.y", 0)
        self.warps = self._threads // WARP
        self._parameters: list[Any] = []
        self._shared: list[Any] = []
        self._before: list[Any] = []

    @property
    def blocks(self) -> int:
        """Thread blocks of a launch."""
        return min(self._items, MOST_BLOCKS)

    @property
    def names(self) -> list[str]:
        """Of the parameters of :meth:`parameter`."""
        return [buffer.name for buffer in self._parameters]

    @property
    def shared_bytes(self) -> int:
        """Most shared memory that the kernel takes so far, its own and that of quantizers included."""
        own: list[Any] = []
        for part in (*self._before, self._body):
            tvm_ffi.structural_walk(part, (tirx.AllocBuffer, lambda found: own.append(found.buffer)))
        buffers = [buffer for buffer in own if buffer.scope() == "shared"] + self._shared
        taken = (math.prod(sizes(b)) * tvm.DataType(str(b.ty.dtype)).itemsize for b in buffers)
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in taken)

    def parameter(self, shape: Sequence[Any], dtype: str) -> Any:
        """A buffer in the device's memory that is one more parameter."""
        buffer = tirx.decl_buffer([*shape], dtype, f"p{len(self._parameters):03d}")
        self._parameters.append(buffer)
        return buffer

    def loops(self, loops: Loops, given: Sequence[Value]) -> list[Value]:
        """Computes the loop nests of a function.

        Args:
            loops: the nests.
            given: what stands for the function's inputs, in order.

        Returns:
            Its results.
        """
        known: dict[Any, Value] = dict(zip(loops.reads, given, strict=True))
        for stage in loops.stages:
            value = _on_values(stage.value, known)
            found = self._combined(stage, value) if stage.of else _elementwise(stage, value)
            # What reads it several times would be as many times as large, and what reads that again.
            large = not stage.of and stage.steps and operations(value) > MOST_OPERATIONS
            known[stage.result] = self._computed_once(found, stage.result.ty.dtype) if large else found
        return [known[result] for result in loops.writes]

    def quantizer(self, function: Any, x: Value, clip: Value, *shape: Value) -> tuple[Value, Value]:
        """Computes ``(values, scale)`` of a quantizer.

        Args:
            function: the quantizer's kernel, of :func:`..quantize.quantize`, in as many warps as this one has.
            x: what it quantizes.
            clip: its clip factors.
            shape: what shapes its table, if it has one.
        """
        function = renew_definitions(function)
        tokens = next(parameter for parameter in function.params if parameter.name == "tokens")
        rows = math.prod(x.shape[:-1])
        function = function.specialize({tokens: tirx.const(rows, "int32")})
        by_name = {parameter.name: parameter for parameter in function.params}
        row = tirx.Var("row", "int32")
        here = {"blockIdx.x": row, "threadIdx.y": self._warp, "threadIdx.x": self._lane}
        body, variables = function.body, {}
        while isinstance(body, tirx.AttrStmt) and body.attr_key == "thread_extent":
            variables[body.node.var] = here[body.node.thread_tag]
            body = body.body
        outs = [self._new_shared(sizes(by_name[name]), by_name[name].ty.dtype) for name in ("values", "scale")]
        given = (by_name[name] for name in ("x", "clip", "shape"))
        known: dict[Any, Value] = dict(zip(given, (x, clip, *shape), strict=False))
        memory = dict(zip([by_name["values"], by_name["scale"]], outs, strict=True))
        body = _on_memory(_on_values(with_variables(body, variables), known), memory)
        # Its own shared memory serves one row after the other.
        self._then(_loop(row, rows, tirx.SeqStmt([body, tirx.Evaluate(T.tvm_storage_sync("shared"))])))
        values, scale = map(Value.of, outs)
        return values, scale

    def keep(self, tensor: Value, out: Any) -> None:
        """The first thread block writes a tensor to a parameter, for other launches.

        Args:
            tensor: what a call has computed.
            out: the parameter.
        """
        first = tirx.EQ(self._block, tirx.const(0, "int32"))
        self._before.append(tirx.IfThenElse(first, self._written(tensor, out), None))

    def kernel(self, given: Mapping[str, Value]) -> PrimFunc:
        """The whole kernel; parameters are those of :meth:`parameter`, and behind them its own that are left.

        Args:
            given: by the name of a parameter of its own: the tensor that stands for it.

        Raises:
            JoinError: a tensor has no memory, and other elements than the parameter.
        """
        known, memory, views, left = {}, {}, [], []
        for parameter in self._kernel.params:
            value = given.get(parameter.name)
            if value is None:
                left.append(parameter)
            elif value.memory is None or str(value.memory.ty.dtype) == str(parameter.ty.dtype):
                known[parameter] = value  # of elements without memory, reading them as another type is refused
            else:  # the same bytes as numbers of another type
                view = tirx.decl_buffer(parameter.ty.shape, parameter.ty.dtype, parameter.name, scope="shared")
                views.append(tirx.DeclBuffer(view, data=value.memory.data))
                memory[parameter] = view
        body = _on_memory(_on_values(self._body, known), memory)
        memories = [tirx.AllocBuffer(buffer) for buffer in self._shared]
        steps = [*memories, *self._before, *views, self._in_turn(body)]
        body = tirx.SeqStmt(steps) if len(steps) > 1 else steps[0]  # there is no sequence of one
        for binding in reversed(self._bindings):
            own = binding.node.thread_tag != "blockIdx.x"
            extent = binding.value if own else tirx.const(self.blocks, "int32")
            body = tirx.AttrStmt(_of_extent(binding.node, extent), binding.attr_key, extent, body)
        whole: Any = PrimFunc([*self._parameters, *left], body)
        return whole.with_attr({"s_tir": True, "tirx.noalias": True})

    def _in_turn(self, body: Any) -> Any:
        """What the kernel's thread blocks do, done by fewer of them."""
        if self._items == self.blocks:
            return body
        turn, item = tirx.Var("turn", "int32"), tirx.Var("item", "int32")
        one = _guarded(item, self._items, self.blocks, with_variables(body, {self._block: item}))
        # Shared memory of one turn is not written while it is still read.
        behind = tirx.Evaluate(T.tvm_storage_sync("shared"))
        steps = [tirx.Bind(item, turn * self.blocks + self._block), one, behind]
        return _loop(turn, -(-self._items // self.blocks), tirx.SeqStmt(steps))

    def _combined(self, stage: Stage, value: Any) -> Value:
        """Warps compute elements, or shares of them; what a lane has combined meets across its warp.

        Without parts an element is what combining begins with.
        """
        shape, dtype = sizes(stage.result), stage.result.ty.dtype
        if not stage.steps:
            return Value(shape, lambda indices: stage.start)
        elements = math.prod(shape)
        shares = max(1, min(self.warps // elements, -(-stage.parts // WARP)))
        partial = self._new_shared([elements * shares], dtype)
        own = tirx.decl_buffer([1], dtype, "own", scope="local")
        zero = [tirx.const(0, "int32")]

        def combined(part: Any) -> Any:
            return tirx.BufferStore(own, stage.combine(tirx.BufferLoad(own, zero), part), zero)

        def share(place: Any) -> Any:
            turn = tirx.Var("turn", "int32")
            element, number = tirx.floordiv(place, shares), tirx.floormod(place, shares)
            part = (turn * shares + number) * WARP + self._lane
            where = dict(zip(stage.over, unraveled(element, shape), strict=True))
            where |= zip((v for v, _ in stage.of), unraveled(part, [n for _, n in stage.of]), strict=True)
            add = _guarded(part, stage.parts, shares * WARP, combined(with_variables(value, where)))
            across = [
                combined(T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), tirx.BufferLoad(own, zero), step, WARP, WARP))
                for step in (1, 2, 4, 8, 16)
            ]
            store = tirx.BufferStore(partial, tirx.BufferLoad(own, zero), [place])
            return tirx.SeqStmt(
                [
                    tirx.BufferStore(own, stage.start, zero),
                    _loop(turn, -(-stage.parts // (shares * WARP)), add),
                    *across,
                    tirx.IfThenElse(tirx.EQ(self._lane, tirx.const(0, "int32")), store, None),
                ]
            )

        self._then(tirx.SeqStmt([tirx.AllocBuffer(own), self._turns(elements * shares, self._warp, self.warps, share)]))
        if shares == 1:
            return Value(shape, lambda indices: tirx.BufferLoad(partial, [raveled(indices, shape)]))
        whole = self._new_shared(shape, dtype)

        def meet(place: Any) -> Any:
            first = place * shares
            parts = [tirx.BufferLoad(partial, [first + number]) for number in range(shares)]
            return tirx.BufferStore(whole, functools.reduce(stage.combine, parts), unraveled(place, shape))

        self._then(self._shared_out(elements, meet))
        return Value.of(whole)

    def _computed_once(self, tensor: Value, dtype: Any) -> Value:
        """The same tensor in shared memory."""
        memory = self._new_shared(tensor.shape, dtype)
        self._then(self._written(tensor, memory))
        return Value.of(memory)

    def _written(self, tensor: Value, out: Any) -> Any:
        """All elements of a tensor stored to a buffer, by all threads of a block."""
        shape = sizes(out)
        element = tensor.shaped(shape)

        def store(place: Any) -> Any:
            indices = unraveled(place, shape)
            return tirx.BufferStore(out, element(indices), indices)

        return self._shared_out(math.prod(shape), store)

    def _new_shared(self, shape: Sequence[int], dtype: Any) -> Any:
        buffer = tirx.decl_buffer([*shape], dtype, f"shared{len(self._shared)}", scope="shared")
        self._shared.append(buffer)
        return buffer

    def _then(self, statement: Any) -> None:
        """What the whole block has done before it goes on."""
        self._before += [statement, tirx.Evaluate(T.tvm_storage_sync("shared"))]

    def _shared_out(self, count: int, at: Callable[[Any], Any]) -> Any:
        """A statement for each of so many places, shared out over the threads."""
        return self._turns(count, self._thread, self._threads, at)

    def _turns(self, count: int, worker: Any, workers: int, at: Callable[[Any], Any]) -> Any:
        turn = tirx.Var("turn", "int32")
        place = turn * workers + worker
        return _loop(turn, -(-count // workers), _guarded(place, count, workers, at(place)))


def _of_extent(thread: Any, extent: Any) -> Any:
    """A thread axis of another extent."""
    whole = tvm.ir.Range(tirx.const(0, "int32"), extent)
    return tirx.IterVar(whole, thread.var, thread.iter_type, thread.thread_tag)


def _guarded(place: Any, count: int, step: int, statement: Any) -> Any:
    """A statement for places below a count, which are taken so many at a time."""
    if count % step == 0:
        return statement
    return tirx.IfThenElse(tirx.LT(place, tirx.const(count, "int32")), statement, None)


def _loop(variable: Any, extent: int, body: Any) -> Any:
    zero, end = tirx.const(0, "int32"), tirx.const(extent, "int32")
    return tirx.For(variable, zero, end, tirx.ForKind.SERIAL, body)


def _elementwise(stage: Stage, value: Any) -> Value:
    def element(indices: Sequence[Any]) -> Any:
        return with_variables(value, dict(zip(stage.over, indices, strict=True)))

    return Value(sizes(stage.result), element)


def with_variables(part: Any, values: Mapping[Any, Any]) -> Any:
    """An expression or a statement with something else for variables."""

    def other(variable: Any) -> Any:
        for old, new in values.items():
            if old.same_as(variable):
                return tirx.Cast(str(old.ty.dtype), new) if str(old.ty.dtype) != str(_type_of(new)) else new
        return variable

    return tvm_ffi.structural_map(part, (tirx.Var, other))


def _type_of(value: Any) -> Any:
    return value.ty.dtype if hasattr(value, "ty") else "int32"


def _on_values(part: Any, known: Mapping[Any, Value]) -> Any:
    """An expression or a statement that reads tensors where it has loaded buffers.

    Raises:
        JoinError: a tensor has elements of another type.
    """

    refused: list[str] = []  # TVM makes another exception of one that is raised in its walk.

    def load(old: Any) -> Any:
        for buffer, tensor in known.items():
            if buffer.same_as(old.source):
                new = tensor.shaped(sizes(buffer))(list(old.indices))
                if str(new.ty.dtype) != str(old.ty.dtype):
                    refused.append(f"{buffer.name} is read as {old.ty.dtype}, and its elements are {new.ty.dtype}")
                    return old
                return new
        return old

    mapped = tvm_ffi.structural_map(part, (tvm.ir.TensorLoad, load))
    if refused:
        raise JoinError(refused[0])
    return mapped


def _on_memory(statement: Any, memory: Mapping[Any, Any]) -> Any:
    """A statement on other buffers of the same shapes."""

    def other(buffer: Any) -> Any:
        return next((new for old, new in memory.items() if old.same_as(buffer)), buffer)

    def load(old: Any) -> Any:
        return tirx.BufferLoad(other(old.source), old.indices)

    def store(old: Any) -> Any:
        return tirx.BufferStore(other(old.buffer), old.value, old.indices)

    return tvm_ffi.structural_map(statement, [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store)])
