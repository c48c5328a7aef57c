"""Emits the functions of a program, operator by operator, as Relax: TVM's graph IR, which its virtual machine runs.

What a value is: a Relax variable with a :func:`shape` of integers and symbols. Kernels are calls of TIR functions, added
once each; everything else is one of Relax's own operators, which :mod:`.compile` turns into fused loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tvm_api import PrimFunc, relax, symbolic_dimension

Dimension = Any
"""A dimension: an int, or an integer expression over symbols."""

Value = Any
"""A Relax variable holding a tensor."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that a program is given; a string in the shape is a symbol."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class ProgramBuilder:
    """Collects the functions of one program and the kernels they share."""

    def __init__(self) -> None:
        self._block = relax.BlockBuilder()
        self._kernels: dict[str, Any] = {}

    def kernel(self, name: str, function: PrimFunc) -> Any:
        """Adds a kernel under its name; the same name gives the one that is there."""
        if name not in self._kernels:
            # Eight is "opaque": Relax must neither fuse it nor look into it.
            opaque = function.with_attr("op_pattern", 8).with_attr("global_symbol", name)
            self._kernels[name] = self._block.add_func(opaque, name)
        return self._kernels[name]

    def finish(self) -> Any:
        """The finished module of functions and kernels."""
        return self._block.finalize()


class FunctionBuilder:
    """Builds one function.

    Args:
        program: what the function becomes part of.
        name: the function's.
        inputs: tensors that change from call to call.
        tuples: name to the tensors of a tuple that is passed whole: weights, state.
        sizes: values of symbols that are known; other strings in shapes become symbols of the function.
    """

    def __init__(
        self,
        program: ProgramBuilder,
        name: str,
        inputs: Sequence[TensorSpec],
        tuples: dict[str, Sequence[TensorSpec]],
        sizes: dict[str, int],
    ):
        self.program = program
        self._name = name
        self._symbols: dict[str, Dimension] = dict(sizes)
        variables = {spec.name: relax.Var(spec.name, self._type(spec)) for spec in inputs}
        packs = {
            pack: relax.Var(pack, relax.TupleType([self._type(spec) for spec in specs]))
            for pack, specs in tuples.items()
        }
        self._parameters = [*variables.values(), *packs.values()]
        self._values: dict[str, Value] = dict(variables)
        self._members = {
            spec.name: (packs[pack], i) for pack, specs in tuples.items() for i, spec in enumerate(specs)
        }
        self._block = program._block
        self._scopes = [self._block.function(name, self._parameters), self._block.dataflow()]
        for scope in self._scopes:
            scope.__enter__()

    def _type(self, spec: TensorSpec) -> Any:
        return relax.TensorType([self.dimension(d) for d in spec.shape], spec.dtype)

    def dimension(self, size: int | str) -> Dimension:
        """An int, or the symbol of that name."""
        if isinstance(size, int):
            return size
        return self._symbols.setdefault(size, symbolic_dimension(size))

    def value(self, name: str) -> Value:
        """The variable of an input or of a member of a tuple."""
        if name not in self._values:
            pack, index = self._members[name]
            self._values[name] = self.emit(relax.TupleGetItem(pack, index))
        return self._values[name]

    def emit(self, expression: Any) -> Value:
        """Binds an expression to a variable."""
        return self._block.emit(expression)

    def call(self, kernel: Any, arguments: Sequence[Value], *outputs: tuple[Sequence[Dimension], str]) -> Any:
        """Calls a kernel on tensors; ``outputs`` are the shapes and dtypes of what it writes. Returns one or a list."""
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outputs]
        result = self.emit(relax.call_tir(kernel, list(arguments), types if len(types) > 1 else types[0]))
        if len(types) == 1:
            return result
        return [self.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]

    def finish(self, result: Value) -> None:
        """Ends the function with its result."""
        output = self._block.emit_output(result)
        self._scopes[1].__exit__(None, None, None)
        self._block.emit_func_output(output)
        self._scopes[0].__exit__(None, None, None)


def shape(value: Value) -> list[Dimension]:
    """The dimensions of a value; constant ones are ints."""
    return [int(d) if hasattr(d, "value") else d for d in value.ty.shape]


def dtype(value: Value) -> str:
    """The dtype of a value."""
    return str(value.ty.dtype)
