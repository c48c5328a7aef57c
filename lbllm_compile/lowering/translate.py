"""Translates a lowered graph, operator by operator, into one program of proven kernels and fused loops.

What comes out is independent of torch: a module of Relax functions (:mod:`lbllm_compile.codegen.program`) and the
weights they take, packed into the kernels' layouts. Each :class:`EntryPoint` is the whole graph once more for another
number of tokens, because the best kernels differ.

A graph with an operator that has no translation is refused with :class:`UntranslatableError`; the caller runs it in
torch instead and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.codegen import operators
from lbllm_compile.codegen.backend import EntryPoint, Kernels, TirKernel, backend_of
from lbllm_compile.codegen.errors import UntranslatableError, first_line
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.translator import Complex, Translation, flat
from lbllm_compile.codegen.program import builder
from lbllm_compile.codegen.program.builder import FunctionBuilder, Layout, ProgramBuilder, TensorSpec, Value
from lbllm_compile.codegen.program.experts import by_expert
from lbllm_compile.codegen.program.fuse import with_residual
from lbllm_compile.codegen.program.queries import quotient, same_elements, same_sizes
from lbllm_compile.codegen.sizes import ALIGNMENT, BATCH, CAPACITY, LENGTH, PAST, TOTAL
from lbllm_compile.codegen.tvm_api import relax, symbolic_dimension, te, tirx, tvm
from lbllm_compile.lowering.bounds import input_bounds
from lbllm_compile.lowering.decompose import decompose, may_decompose
from lbllm_compile.lowering.executor import (
    last_token_graph,
    linear_spec,
    packed,
    packed_experts,
    quantize_spec,
    quantizer_of,
)
from lbllm_compile.native.language import InputBounds
from lbllm_compile.passes.contracts import describe
from lbllm_compile.passes.ir.program import PER_TOKEN, STATE, Program
from lbllm_compile.passes.ir.rewrite import (
    INTEGER_LINEARS,
    Node,
    calls,
    constant,
    is_constant,
    is_node,
)

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm


@dataclass
class Translated:
    """What a lowered graph became.

    Attributes:
        functions: builds the Relax functions, one per entry point, and the kernels, which takes a while.
        weights: every weight by name.
        layout: where each lies in the block of weights.
        state: where each tensor of the KV state lies.
        fixed: where each tensor of the state of fixed size lies.
        inputs: the arguments of every function before the blocks, in order.
        bounds: of the token ids and positions that the functions take.
    """

    functions: Callable[[], Any]
    weights: Mapping[str, Tensor]
    layout: Layout
    state: Layout
    fixed: Layout
    inputs: Sequence[TensorSpec]
    bounds: InputBounds

    def weight_bytes(self) -> Iterator[memoryview]:
        """The block of weights from its beginning to its end, in pieces."""
        end = 0
        for name, offset in self.layout.offsets.items():
            tensor = self.weights[name]
            yield memoryview(bytes(offset - end))
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            end = offset + tensor.nbytes
        yield memoryview(bytes(self.layout.bytes - end))


def translate(program: Program, kernels: Kernels, entries: Sequence[EntryPoint] | None = None) -> Translated:
    """Translates a language model after ``cache``.

    Args:
        program: the lowered graph.
        kernels: proven kernels of everything in it.
        entries: the functions to make; all of the kernels' backend where None.

    Raises:
        UntranslatableError: naming the operator and the user's line.
    """
    if program.kind != "causal-lm":
        raise UntranslatableError("only language models become a program")
    for node in program.graph.nodes:
        if node.op == "call_function" and _translation(node) is None and not may_decompose(node.target):
            raise UntranslatableError(f"the operator {node.target} has no translation: {describe(node)}", node)
    bounds = input_bounds(program)
    if bounds.vocabulary is None:
        raise UntranslatableError("the graph looks its tokens up in no table")
    weights = _Weights(program, kernels)
    layout = Layout.of(weights.specs(), ALIGNMENT)
    states = program.state_placeholders()
    state = Layout.of(_state_spec(n) for n in states if n.meta[STATE].kind == PER_TOKEN)
    fixed = Layout.of((_state_spec(n) for n in states if n.meta[STATE].kind != PER_TOKEN), ALIGNMENT)
    inputs = [_input_spec(n) for n in program.placeholders() if STATE not in n.meta and n.target != PAST]

    def functions() -> Any:
        whole = ProgramBuilder(layout, state, fixed)
        for entry in backend_of(kernels.target).entry_points if entries is None else entries:
            _Translator(program, kernels, whole, weights, entry, inputs).run()
        return whole.finish()

    return Translated(functions, weights.tensors, layout, state, fixed, inputs, bounds)


def translates(program: Program, kernels: Kernels) -> bool:
    """Whether a lowered graph becomes a program, as far as that shows before one is compiled."""
    try:
        translate(program, kernels).functions()
    except UntranslatableError:
        return False
    return True


def translate_graph(program: Program, kernels: Kernels, inputs: Sequence[TensorSpec], name: str = "graph") -> Any:
    """Translates a graph with any inputs, and no KV state, into one function, which takes weights as a tuple.

    Args:
        program: its placeholders are named as the inputs; it gives a tensor or several.
        kernels: the proven kernels.
        inputs: the function's arguments; strings in shapes are symbols.
        name: the function's.

    Returns:
        A module for :func:`~lbllm_compile.codegen.program.compile.compile_program`.

    Raises:
        UntranslatableError: naming the operator and the user's line.
    """
    weights = _Weights(program, kernels)
    whole = ProgramBuilder(Layout.of(weights.specs(), ALIGNMENT), Layout.of(()))
    _Translator(program, kernels, whole, weights, EntryPoint(name, None, None, False, "17+"), inputs).run()
    return whole.finish()


def graph_weights(program: Program, kernels: Kernels) -> list[Tensor]:
    """The weights that the function of :func:`translate_graph` takes, in order."""
    return list(_Weights(program, kernels).tensors.values())


def _state_spec(node: Node) -> TensorSpec:
    spec = node.meta[STATE]
    slots = (CAPACITY,) if spec.kind == PER_TOKEN else ()
    return TensorSpec(node.target, (BATCH, spec.heads, *slots, *spec.tail), _dtype(spec.dtype))


def _input_spec(node: Node) -> TensorSpec:
    shapes = {"attention_mask": (BATCH, TOTAL), "input_ids": (BATCH, LENGTH), "position_ids": (BATCH, LENGTH)}
    if node.target not in shapes:
        raise UntranslatableError(f"the graph has an input '{node.target}' that no language model has")
    return TensorSpec(node.target, shapes[node.target], "int64")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class _Weights:
    """The weights of a program: those of kernels packed, the rest as they are, each once.

    Attributes:
        tensors: by name.
        packed: by a linear's name, those that its kernel reads, in order.
    """

    program: Program
    kernels: Kernels
    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in calls(self.program.graph, *INTEGER_LINEARS):
            parts = {f"{node.name}.{name}": part for name, part in self._pack(node).items()}
            self.packed[node.name] = list(parts)
            self.tensors |= parts
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and not all(_packs(user) for user in node.users):
                self.tensors[node.target] = constant(self.program.module, node).detach().contiguous()

    def specs(self) -> list[TensorSpec]:
        """Every weight in order."""
        return [TensorSpec(name, tuple(t.shape), _dtype(t.dtype)) for name, t in self.tensors.items()]

    def _pack(self, node: Node) -> Mapping[str, Tensor]:
        kernel = self.kernels.linear(linear_spec(self.program, node))
        if node.target is not _lbllm.grouped_bit_linear.default:
            return packed(self.program, node, kernel)
        experts = packed_experts(self.program, node, kernel)
        return {name: torch.stack([_aligned(expert[name]) for expert in experts]) for name in experts[0]}


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor's elements, and zeros behind them, so that another one that follows is aligned."""
    elements = tensor.reshape(-1)
    return torch.nn.functional.pad(elements, (0, -tensor.nbytes % ALIGNMENT // tensor.itemsize))


def _packs(node: Node) -> bool:
    """Whether a node's weights are in a kernel's packed ones: a linear, or what joins the weights of one."""
    if node.target in INTEGER_LINEARS:
        return True
    return node.target is _aten.cat.default and is_constant(node) and all(_packs(user) for user in node.users)


def _translation(node: Node) -> Translation | None:
    known = operators.find(node.target)
    return None if known is None else known.translate


def _known(value: Value) -> Value:
    """The value.

    Raises:
        UntranslatableError: its shape cannot be told, because sizes meet that are not surely equal.
    """
    if isinstance(value.ty, relax.TensorType) and not isinstance(value.ty.shape, relax.ShapeExpr):
        raise UntranslatableError("the shape of its result cannot be told")
    return value


class _Translator:
    """Translates the graph into one function; what its operators' translations ask."""

    op, te, tir = relax.op, te, tirx

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        whole: ProgramBuilder,
        weights: _Weights,
        entry: EntryPoint,
        inputs: Sequence[TensorSpec],
    ):
        self.kernels, self.whole, self.entry, self.weights = kernels, whole, entry, weights
        self.module = program.module
        if entry.last:
            shortened = last_token_graph(program.module)
            if shortened is None:
                raise UntranslatableError("the output head is not the last linear of the graph")
            self.module = shortened
        self.program = program.with_module(self.module)
        sizes = {BATCH: entry.batch, LENGTH: entry.length}
        known: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        if entry.static:
            # A mask has a column for every slot.
            known[CAPACITY] = known[TOTAL] = symbolic_dimension(CAPACITY)
            inputs = [*inputs, TensorSpec(PAST, (1 if entry.length == 1 else 2,), "int32")]
        self.function = FunctionBuilder(whole, entry.name, inputs, known, entry.blocks)
        self.values: dict[Node, Any] = {}
        self.leading: dict[Node, list[Any]] = {}
        self.sources: dict[Value, Value] = {}

    def run(self) -> None:
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.function.finish(self.value(node.args[0]))
            elif node.op == "call_function":
                if (node.target in INTEGER_LINEARS or not _packs(node)) and not self.awaits_addition(node):
                    self.values[node] = self.translated(node)
            elif node.op == "placeholder":
                self.values[node] = self.past() if node.target == PAST else self.function.value(node.target)

    def past(self) -> Any:
        """The number of past tokens, padding included: a size, or a tensor where no size changes."""
        if self.entry.static:
            return self.function.value(PAST)
        return self.function.dimension(TOTAL) - self.function.dimension(LENGTH)

    def translated(self, node: Node) -> Any:
        """The translation of a call.

        Raises:
            UntranslatableError: no program can hold this form of the operator; naming the call.
        """
        try:
            return self._translated(node)
        except UntranslatableError as error:
            at = node if error.node is None else error.node
            raise UntranslatableError(f"{error}: {describe(at)}", at) from error

    def _translated(self, node: Node) -> Any:
        """The operator's own translation, or where it has none for this form, that of what it is made of."""
        translation = self._form(node)
        if translation is None:
            return self._decomposed(node)
        try:
            return self._applied(translation, node)
        except UntranslatableError as refused:
            try:
                return self._decomposed(node)
            except UntranslatableError:
                raise refused from None

    def _applied(self, translation: Translation, node: Node) -> Any:
        try:
            return translation(self, Arguments(node, self.value))
        except UntranslatableError:
            raise
        except Exception as error:  # TVM raises many types; each means that it does not build this form
            raise UntranslatableError(f"TVM does not build it ({first_line(error)})", node) from error

    def _form(self, node: Node) -> Translation | None:
        """A call's own translation for numbers of the kind of its arguments; None where it has none."""
        known = operators.find(node.target)
        if known is None or not self._is_complex(node):
            return _translation(node)
        return known.on_complex

    def _is_complex(self, node: Node) -> bool:
        return any(isinstance(self.values.get(n), Complex) for n in node.all_input_nodes)

    def _decomposed(self, node: Node) -> Any:
        if self._is_complex(node):
            raise UntranslatableError("this arithmetic on complex numbers has no translation", node)
        meanings = {n: self._meaning(self.value(n)) for n in node.all_input_nodes}
        graph, constants = decompose(node, meanings)
        inputs = iter(node.all_input_nodes)
        for part in graph.nodes:
            if part.op == "placeholder":
                self.values[part] = self.value(next(inputs))
            elif part.op == "get_attr":
                self.values[part] = relax.const(constants[part.target].numpy())
            elif part.op == "output":
                return self.value(part.args[0])
            elif (translation := self._form(part)) is None:
                raise UntranslatableError(f"the operator {node.target} has no translation", node)
            else:
                self.values[part] = self._applied(translation, part)
        raise AssertionError("a graph without an output")

    def _meaning(self, value: Any) -> Any:
        return (builder.dtype(value), builder.shape(value)) if self.is_tensor(value) else value

    def value(self, argument: Any) -> Any:
        """The translation of an operand: a value, a dimension, a number, or a list of them."""
        if isinstance(argument, (list, tuple)):
            return [self.value(a) for a in argument]
        if not is_node(argument):
            return argument
        if argument not in self.values:
            waited = self.awaits_addition(argument)
            self.values[argument] = self.linear(argument) if waited else self.function.value(argument.target)
        return self.values[argument]

    def awaits_addition(self, node: Node) -> bool:
        """Whether a node is a linear whose result is only added to something: it is translated with the addition."""
        linear = node.target in INTEGER_LINEARS and node.target is not _lbllm.grouped_bit_linear.default
        return self.entry.joined and linear and [user.target for user in node.users] == [_aten.add.Tensor]

    def call(
        self,
        kernel: TirKernel,
        arguments: Sequence[Value],
        *outputs: tuple[Sequence[Any], str],
        by_rows: bool = False,
    ) -> Any:
        """Calls a kernel, see :meth:`FunctionBuilder.call` and :meth:`ProgramBuilder.kernel`."""
        return self.function.call(self.whole.kernel(kernel.name, kernel.make, by_rows), arguments, *outputs)

    def call_by_expert(
        self,
        kernel: TirKernel,
        rows: Sequence[Value],
        matrices: Sequence[Value],
        offsets: Value,
        output: tuple[Sequence[Any], str],
    ) -> Value:
        make, shapes = kernel.make, [builder.shape(m) for m in matrices]
        if kernel.by_expert is not None:
            stacked = kernel.by_expert(shapes, builder.shape(rows[0])[0])
        else:
            name = f"{kernel.name}_{shapes[0][0]}_experts"
            stacked = TirKernel(name, lambda: by_expert(make(), shapes, len(rows)))
        ends = offsets if builder.dtype(offsets) == "int32" else self.emit(relax.op.astype(offsets, "int32"))
        return self.call(stacked, [*rows, *matrices, ends], output)

    def emit(self, expression: Any) -> Value:
        try:
            return _known(self.function.emit(expression))
        except ValueError as error:  # TVM's for operands that do not fit each other
            raise UntranslatableError(f"its operands do not fit each other ({first_line(error)})") from error

    def compute(self, shape: Sequence[Any], element: Callable[..., Any], *values: Any) -> Value:
        def expression(*given: Any) -> Any:
            of_values = element(*given[len(shape) :])
            return te.compute(given[: len(shape)], of_values)

        # Sizes are given like tensors, so that all are over the same symbols.
        given = [tirx.const(v, "int64") if isinstance(v, int) else v for v in (*shape, *values)]
        return _known(self.function.compute(expression, *given))

    def variable(self, x: Value) -> Value:
        if not isinstance(x, tvm.ir.Constant):
            return self.emit(x)
        stored: Any = x
        number = tirx.const(stored.value.numpy().item(), str(stored.ty.dtype))
        return self.compute((), lambda: lambda: number)

    def reshape(self, x: Value, sizes: Sequence[Any]) -> Value:
        """A value in another shape. Of several in a row only the last is left, and none where the shape is the same."""
        source = self.sources.get(x, x)
        shape = builder.shape(source)
        if same_sizes(shape, sizes):
            return source
        if not same_elements(shape, sizes):
            raise UntranslatableError(f"it cannot be told that a tensor of {shape} can be one of {list(sizes)}")
        result = self.emit(relax.op.reshape(source, sizes))
        self.sources[result] = source
        return result

    @property
    def length(self) -> int | None:
        return self.entry.length

    @property
    def rows(self) -> int | None:
        batch, length = self.entry.batch, self.entry.length
        return None if batch is None or length is None else batch * length

    @property
    def blocks(self) -> bool:
        return self.entry.blocks

    def constant(self, number: bool | int | float, dtype: str) -> Any:
        return relax.const(number, dtype)

    def shape(self, x: Value) -> list[Any]:
        return builder.shape(x)

    def dtype(self, x: Value) -> str:
        return builder.dtype(x)

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, relax.Expr) and hasattr(value.ty, "shape")

    def quotient(self, a: Any, b: Any) -> Any:
        return quotient(a, b)

    def surely(self, condition: Any) -> bool:
        return bool(condition) if isinstance(condition, bool) else self.function.surely(condition)

    def mean_of_squares(self, x: Value) -> Value:
        return self.function.mean_of_squares(x)

    def quantize(self, node: Node) -> list[Value]:
        """The rows of a quantizer's input, quantized: ``[values [M, K], scales [M, G]]``."""
        spec = quantize_spec(node)
        arguments = Arguments(node, self.value)
        x, self.leading[node], count = flat(self, arguments.x)
        kernel = self.kernels.quantizer(spec).tir(parallel=self.rows is None)
        kind = "int16" if spec.bits == 16 else "int8"
        factors = [factor for factor in arguments.pick("clip", "knees", "plane_scales") if factor is not None]
        *_, values, _ = self.whole.parameter_shapes(self.whole.kernel(kernel.name, kernel.make, by_rows=True))
        outputs = ([count, values[-1]], kind), ([count, spec.scales], "float32")  # there may be zeros behind a row
        return self.call(kernel, [x, *factors], *outputs, by_rows=True)

    def linear(self, node: Node, residual: Value | None = None) -> Value:
        """A linear on its packed weights, or those of experts, with what is added to its result."""
        arguments = Arguments(node, self.value)
        values, scale = arguments.pick("values", "x_scale")
        spec = linear_spec(self.program, node)
        count = builder.shape(values)[0]
        packed = [self.function.value(name) for name in self.weights.packed[node.name]]
        output = ([count, spec.out_features], "float32")
        kernel, operands = self.kernels.linear(spec).tir(self.entry.bucket), [values, scale, *packed]
        # A quantizer's result has two dimensions; here the graph's own come back.
        shape = [*self.leading[quantizer_of(node)], spec.out_features]
        if "offsets" in arguments:
            result = self.call_by_expert(kernel, [values, scale], packed, arguments.offsets, output)
            return self.reshape(result, shape)
        if residual is not None:
            make = kernel.make
            kernel = TirKernel(f"{kernel.name}_residual", lambda: with_residual(make()))
            operands.append(flat(self, residual)[0])
        return self.reshape(self.call(kernel, operands, output), shape)

    def add_to_linear(self, node: Node) -> Value | None:
        operands = Arguments(node)
        if operands.alpha != 1:
            return None
        for linear, other in ((operands.self, operands.other), (operands.other, operands.self)):
            if not is_node(linear) or linear in self.values or linear is other:
                continue
            residual = self.value(other) if self.awaits_addition(linear) else None
            if not self.is_tensor(residual) or builder.dtype(residual) != "float32":
                continue
            shape = [*self.leading[quantizer_of(linear)], linear_spec(self.program, linear).out_features]
            if same_sizes(builder.shape(residual), shape):
                return self.linear(linear, residual)
        return None
