"""Emits the functions of a program, operator by operator, as Relax: TVM's graph IR, which its virtual machine runs.

A value is a Relax variable with a :func:`shape` of integers and symbols. Kernels are calls of TIR functions, added once
each; everything else is one of Relax's own operators, which :mod:`.compile` turns into fused loops.

Weights, KV state and state of fixed size are one block of bytes each, so that a file of weights can be mapped into
memory as it is. A function takes them in one of two ways: as *blocks*, of which :mod:`.launch` makes pointers (a call
then takes a handful of arguments however deep the model is), or as *tuples* of tensors that lie in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UntranslatableError
from ..sizes import BATCH, CAPACITY, FIXED_STATE, LENGTH, ROWS, STATE, TOTAL, WEIGHTS
from ..tvm_api import PrimFunc, relax, symbolic_dimension, te, tirx, tvm
from .queries import same_sizes, surely_true

Dimension = Any
"""A dimension: an int, or an integer expression over symbols."""

Value = Any
"""A Relax variable holding a tensor."""

OPAQUE = 8
"""Relax's number for functions that it must neither fuse nor look into."""

KERNEL = "lbllm.kernel"
"""The attribute that marks kernels, whose loops are scheduled already."""

BY_ROWS = "lbllm.by_rows"
"""The attribute that marks kernels of one loop over the rows of their first parameter."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that a program is given; a string in the shape is a symbol."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of the tensor; of one with symbols, per unit of each."""
        return math.prod(d for d in self.shape if isinstance(d, int)) * tvm.DataType(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a block lie.

    Attributes:
        tensors: by name.
        offsets: by name, in bytes; in KV state per sequence and slot, in state of fixed size per sequence.
        bytes: of the whole block; of KV state per sequence and slot, of state of fixed size per sequence.
    """

    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]
    bytes: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec], alignment: int = 1) -> Layout:
        """One tensor behind the other."""
        tensors, offsets, end = {}, {}, 0
        for spec in specs:
            tensors[spec.name], offsets[spec.name] = spec, end
            end += -(-spec.bytes // alignment) * alignment
        return cls(tensors, offsets, end)


class ProgramBuilder:
    """Collects the functions of one program and the kernels they share.

    Args:
        weights: the layout of the weights.
        state: the layout of the KV state: tensors ``[batch, heads, capacity, ...]``.
        fixed: the layout of the state of fixed size: tensors ``[batch, ...]``.
    """

    def __init__(self, weights: Layout, state: Layout, fixed: Layout | None = None) -> None:
        self.weights, self.state, self.fixed = weights, state, fixed or Layout.of(())
        self.block = relax.BlockBuilder()
        self._kernels: dict[str, Any] = {}
        self._functions: dict[Any, Any] = {}

    def kernel(self, name: str, make: Callable[[], PrimFunc], by_rows: bool = False) -> Any:
        """The kernel of that name, generated where it is not there yet.

        Args:
            name: its symbol; kernels of one name are the same.
            make: generates it.
            by_rows: it is one loop over the rows of its first parameter.
        """
        if name not in self._kernels:
            attributes = {"op_pattern": OPAQUE, KERNEL: True, "global_symbol": name}
            attributes |= {BY_ROWS: True} if by_rows else {}
            function: Any = make()
            self._kernels[name] = self.block.add_func(function.with_attr(attributes), name)
            self._functions[self._kernels[name]] = function
        return self._kernels[name]

    def parameter_shapes(self, kernel: Any) -> list[list[Dimension]]:
        """The shapes of the tensors that a kernel takes; a symbol in several of them stands for one size."""
        parameters = self._functions[kernel].params
        return [[int(d) if isinstance(d, tirx.IntImm) else d for d in buffer.shape] for buffer in parameters]

    def finish(self) -> Any:
        """The finished module of functions and kernels."""
        return self.block.finalize()


class FunctionBuilder:
    """Builds one function. Its parameters are ``inputs``, then :data:`WEIGHTS`, :data:`STATE` and,
    where the program has such a state, :data:`FIXED_STATE`.

    Args:
        program: what the function becomes part of.
        name: the function's.
        inputs: tensors that change from call to call.
        sizes: what symbols stand for that are known; other strings in shapes become symbols of the function.
        blocks: take weights and state as blocks, not as tuples. Blocks of state may have room for more sequences than a
            call has, which are the first in them.
    """

    def __init__(
        self,
        program: ProgramBuilder,
        name: str,
        inputs: Sequence[TensorSpec],
        sizes: dict[str, Dimension],
        blocks: bool,
    ):
        self.program = program
        self._symbols: dict[str, Dimension] = dict(sizes)
        if BATCH in sizes:
            self._symbols[ROWS] = sizes[BATCH]
        parameters = {spec.name: relax.Var(spec.name, self._type(spec)) for spec in inputs}
        self._values: dict[str, Value] = dict(parameters)
        layouts = {WEIGHTS: program.weights, STATE: program.state}
        layouts |= {FIXED_STATE: program.fixed} if program.fixed.tensors else {}
        if blocks:
            leading = {WEIGHTS: (), STATE: (ROWS, CAPACITY), FIXED_STATE: (ROWS,)}
            for block, layout in layouts.items():
                spec = TensorSpec(block, (*leading[block], layout.bytes), "uint8")
                parameters[block] = relax.Var(block, self._type(spec))
        else:
            types = {
                name: relax.TupleType([self._type(spec) for spec in layout.tensors.values()])
                for name, layout in layouts.items()
            }
            parameters |= {name: relax.Var(name, members) for name, members in types.items()}
        self._blocks = blocks
        self._where = {
            name: (parameters[block], layout, index)
            for block, layout in layouts.items()
            for index, name in enumerate(layout.tensors)
        }
        self._scopes = [program.block.function(name, list(parameters.values())), program.block.dataflow()]
        for scope in self._scopes:
            scope.__enter__()

    def dimension(self, size: int | str) -> Dimension:
        """An int, or the symbol of that name."""
        if isinstance(size, int):
            return size
        return self._symbols.setdefault(size, symbolic_dimension(size))

    def _type(self, spec: TensorSpec) -> Any:
        return relax.TensorType([self.dimension(d) for d in spec.shape], spec.dtype)

    def value(self, name: str) -> Value:
        """The variable of an input, of a weight or of a tensor of a state."""
        if name not in self._values:
            block, layout, index = self._where[name]
            member = self._view(block, layout, name) if self._blocks else relax.TupleGetItem(block, index)
            self._values[name] = self.emit(member)
        return self._values[name]

    def _view(self, block: Value, layout: Layout, name: str) -> Any:
        spec, offset = layout.tensors[name], layout.offsets[name]
        if layout is self.program.state:
            offset = self.dimension(ROWS) * self.dimension(CAPACITY) * offset
        elif layout is self.program.fixed:
            offset = self.dimension(ROWS) * offset
        shape = [self.dimension(d) for d in spec.shape]
        return relax.op.memory.view(block, shape, tvm.DataType(spec.dtype), relax.prim_value(offset))

    def surely(self, condition: Any) -> bool:
        """Whether a comparison of sizes holds in every call, of whose inputs none is empty, and whose new tokens are
        all in :data:`TOTAL`."""
        symbols = {name: symbol for name, symbol in self._symbols.items() if not isinstance(symbol, int)}
        known = {symbol: symbolic_dimension(f"others_{name}") + 1 for name, symbol in symbols.items()}
        length, total = self._symbols.get(LENGTH), self._symbols.get(TOTAL)
        if total is not None and length is not None:
            known[total] = symbolic_dimension("past") + (length if isinstance(length, int) else known[length])
        return surely_true(condition, known)

    def emit(self, expression: Any) -> Value:
        """Binds an expression to a variable."""
        return self.program.block.emit(expression)

    def compute(self, expression: Callable[..., Any], *values: Value) -> Value:
        """Binds a tensor expression over tensors and sizes to a variable."""
        block = self.program.block
        call = block.call_te(expression, *values)
        name, arguments = call.args
        if not all(isinstance(argument.ty, relax.TensorType) for argument in arguments):
            # TVM's fusion cannot join functions of a size that is both a parameter and in the shape of a tensor.
            block.update_func(name, block.get()[name].with_attr("op_pattern", OPAQUE))
        return self.emit(call)

    def mean_of_squares(self, x: Value) -> Value:
        """``mean(x * x)`` over the last dimension, which stays with size one.

        One loop and not two operators: a compiler that sees both may round once where it would round twice, and whether
        it sees both differs between a launch for each kernel and one for many.
        """

        def expression(tensor: Any) -> Any:
            width = tensor.shape[-1]
            k = te.reduce_axis((0, width), "k")
            shape = [*tensor.shape[:-1], 1]
            total = te.compute(shape, lambda *i: te.sum(tensor[(*i[:-1], k)] * tensor[(*i[:-1], k)], axis=k))
            return te.compute(shape, lambda *i: total[i] / tirx.Cast(tensor.dtype, width))

        return self.compute(expression, x)

    def call(self, kernel: Any, arguments: Sequence[Value], *outputs: tuple[Sequence[Dimension], str]) -> Any:
        """Calls a kernel on tensors; ``outputs`` are the shapes and dtypes of what it writes. Returns one or a list.

        Raises:
            UntranslatableError: the tensors' sizes are not surely those that the kernel reads and writes.
        """
        self._check_sizes(kernel, [*map(shape, arguments), *(list(sizes) for sizes, _ in outputs)])
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outputs]
        result = self.emit(relax.call_tir(kernel, list(arguments), types if len(types) > 1 else types[0]))
        if len(types) == 1:
            return result
        return [self.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]

    def _check_sizes(self, kernel: Any, shapes: Sequence[Sequence[Dimension]]) -> None:
        sizes: dict[Any, Dimension] = {}
        for expected, given in zip(self.program.parameter_shapes(kernel), shapes, strict=True):
            sizes |= {s: own for s, own in zip(expected, given, strict=False) if s not in sizes}
            wanted = [size if isinstance(size, int) else sizes[size] for size in expected]
            if not same_sizes(wanted, given):
                raise UntranslatableError(f"it cannot be told that a tensor of {given} is of {expected}, as a kernel's")

    def finish(self, result: Value | Sequence[Value]) -> None:
        """Ends the function with its result, or several."""
        output = self.program.block.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
        self._scopes[1].__exit__(None, None, None)
        self.program.block.emit_func_output(output)
        self._scopes[0].__exit__(None, None, None)


def shape(value: Value) -> list[Dimension]:
    """The dimensions of a value; constant ones are ints."""
    return [int(d) if hasattr(d, "value") else d for d in value.ty.shape]


def dtype(value: Value) -> str:
    """The dtype of a value."""
    return str(value.ty.dtype)
