"""Translates a lowered graph, operator by operator, into one program of proven kernels and fused loops.

What comes out is independent of torch: a module of Relax functions (:mod:`lbllm_compile.codegen.program`) and the
weights they take, packed into the kernels' layouts. Each :class:`Form` is the whole graph once more for another number
of tokens, because the best kernels differ.

A graph with an operator that has no translation is refused with :class:`UntranslatableError`; the caller runs it in
torch instead and says so.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.codegen.build import KernelSet, TirKernel
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.codegen.program import builder
from lbllm_compile.codegen.program.builder import (
    BATCH,
    CAPACITY,
    LENGTH,
    TOTAL,
    FunctionBuilder,
    Layout,
    ProgramBuilder,
    TensorSpec,
    Value,
)
from lbllm_compile.codegen.program.fuse import with_residual
from lbllm_compile.codegen.program.queries import same_sizes
from lbllm_compile.codegen.sizes import ALIGNMENT
from lbllm_compile.codegen.spec import AttentionSpec, EmbeddingSpec
from lbllm_compile.codegen.tvm_api import relax
from lbllm_compile.lowering.executor import KERNEL_TARGETS, last_token_graph, linear_spec, quantize_spec, quantizer_of
from lbllm_compile.passes.contracts import describe
from lbllm_compile.passes.ir.program import STATE, Program
from lbllm_compile.passes.ir.rewrite import (
    Node,
    activation_knees,
    argument,
    calls,
    constant,
    is_call,
    is_constant,
    is_node,
)

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm


class UntranslatableError(KernelError):
    """The graph has an operator, or a form of one, that a program cannot hold."""


@dataclass(frozen=True)
class Form:
    """One function of a program.

    Attributes:
        name: the function's.
        batch, length: sequences and tokens of a call; None for any number.
        last: give the logits of the last token only.
        bucket: token bucket whose kernels are called.
        blocks: takes weights and state as blocks, and runs in few launches.
        joined: kernels take over what is before or behind them: quantizers norms, linears additions.
    """

    name: str
    batch: int | None
    length: int | None
    last: bool
    bucket: str
    blocks: bool = False
    joined: bool = True


FORMS = (
    Form("token", 1, 1, True, "1", blocks=True),
    Form("token_by_kernel", 1, 1, True, "1", joined=False),
    Form("tokens", None, None, True, "17+"),
    Form("logits", None, None, False, "17+"),
)
"""Decoding of one sequence, in few launches and (to prove that) kernel by kernel; a prompt or a batch of sequences; and
all logits."""


@dataclass
class Translation:
    """What a lowered graph became.

    Attributes:
        functions: builds the Relax functions, one per form, and the kernels, which takes a while.
        weights: every weight by name.
        layout: where each lies in the block of weights.
        state: where each tensor of the KV state lies.
        inputs: the arguments of every function before the two blocks, in order.
        vocabulary: rows of the token embedding.
    """

    functions: Callable[[], Any]
    weights: Mapping[str, Tensor]
    layout: Layout
    state: Layout
    inputs: Sequence[TensorSpec]
    vocabulary: int

    def weight_bytes(self) -> Iterator[memoryview]:
        """The block of weights from its beginning to its end, in pieces."""
        end = 0
        for name, offset in self.layout.offsets.items():
            tensor = self.weights[name]
            yield memoryview(bytes(offset - end))
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            end = offset + tensor.nbytes
        yield memoryview(bytes(self.layout.bytes - end))


def translate(program: Program, kernels: KernelSet, forms: Sequence[Form] = FORMS) -> Translation:
    """Translates a language model after ``cache``.

    Raises:
        UntranslatableError: naming the operator and the user's line.
    """
    if program.kind != "causal-lm":
        raise UntranslatableError("only language models become a program")
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target not in _OPERATORS:
            raise _refusal(node, f"the operator {node.target} has no translation")
    weights = _Weights(program, kernels)
    layout = Layout.of(weights.specs(), ALIGNMENT)
    state = Layout.of(_state_spec(n) for n in program.state_placeholders())
    inputs = [_input_spec(n) for n in program.placeholders() if STATE not in n.meta and n.target != "past"]

    def functions() -> Any:
        whole = ProgramBuilder(layout, state)
        for form in forms:
            _Translator(program, kernels, whole, weights, form, inputs).run()
        return whole.finish()

    return Translation(functions, weights.tensors, layout, state, inputs, _vocabulary(program))


def _vocabulary(program: Program) -> int:
    """Rows of the table that ``input_ids`` index."""
    (ids,) = (n for n in program.placeholders() if n.target == "input_ids")
    for node in calls(program.graph, _lbllm.int8_embedding.default, _aten.embedding.default):
        if ids in (node.args[-1], *node.args[-1].all_input_nodes):
            return constant(program.module, node.args[0]).shape[0]
    raise UntranslatableError("the graph looks its tokens up in no table")


def _state_spec(node: Node) -> TensorSpec:
    spec = node.meta[STATE]
    return TensorSpec(node.target, (BATCH, spec.heads, CAPACITY, *spec.tail), _dtype(spec.dtype))


def _input_spec(node: Node) -> TensorSpec:
    shapes = {"attention_mask": (BATCH, TOTAL), "input_ids": (BATCH, LENGTH), "position_ids": (BATCH, LENGTH)}
    if node.target not in shapes:
        raise UntranslatableError(f"the graph has an input '{node.target}' that no language model has")
    return TensorSpec(node.target, shapes[node.target], "int64")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class _Weights:
    """The weights of a program: those of kernels packed, the rest as they are, each once."""

    program: Program
    kernels: KernelSet
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in calls(self.program.graph, *KERNEL_TARGETS[1:]):
            self.tensors[self.packed_name(node)] = self._pack(node)
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and not all(_packs(user) for user in node.users):
                self.tensors[node.target] = constant(self.program.module, node).detach().contiguous()

    def packed_name(self, node: Node) -> str:
        """Name of a linear's packed weights."""
        return f"{node.name}.packed"

    def specs(self) -> list[TensorSpec]:
        """Every weight in order."""
        return [TensorSpec(name, tuple(t.shape), _dtype(t.dtype)) for name, t in self.tensors.items()]

    def _pack(self, node: Node) -> Tensor:
        spec = linear_spec(self.program, node)
        parts = [constant(self.program.module, a) for a in node.args[2:-2]]
        weight: Any = tuple(parts)
        if spec.kind == "bit":
            weight = QuantizedWeight(*parts, in_features=spec.in_features, group=spec.group)
        return self.kernels.linear(spec).pack(weight, constant(self.program.module, node.args[-2]))


def _packs(node: Node) -> bool:
    """Whether a node's weights are in a kernel's packed ones: a linear, or what joins the weights of one."""
    if node.target in KERNEL_TARGETS[1:]:
        return True
    return node.target is _aten.cat.default and is_constant(node) and all(_packs(user) for user in node.users)


def _is_tensor(value: Any) -> bool:
    """Whether a translation is a tensor, and no size and no number."""
    return isinstance(value, relax.Expr) and hasattr(value.ty, "shape")


def _refusal(node: Node, why: str) -> UntranslatableError:
    return UntranslatableError(f"{why}: {describe(node)}")


class _Translator:
    """Translates the graph into one function."""

    def __init__(
        self,
        program: Program,
        kernels: KernelSet,
        whole: ProgramBuilder,
        weights: _Weights,
        form: Form,
        inputs: Sequence[TensorSpec],
    ):
        self.kernels, self.whole, self.form, self.weights = kernels, whole, form, weights
        self.module = program.module
        if form.last:
            shortened = last_token_graph(program.module)
            if shortened is None:
                raise UntranslatableError("the output head is not the last linear of the graph")
            self.module = shortened
        self.program = program.with_module(self.module)
        sizes = {BATCH: form.batch, LENGTH: form.length}
        known = {name: size for name, size in sizes.items() if size is not None}
        self.function = FunctionBuilder(whole, form.name, inputs, known, form.blocks)
        self.values: dict[Node, Any] = {}
        self.leading: dict[Node, list[Any]] = {}
        self.sources: dict[Value, Value] = {}

    def run(self) -> None:
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.function.finish(self.value(node.args[0]))
            elif node.op == "call_function":
                if (node.target in KERNEL_TARGETS or not _packs(node)) and not self.awaits_addition(node):
                    self.values[node] = _OPERATORS[node.target](self, node)
            elif node.op == "placeholder" and node.target != "past":
                self.values[node] = self.function.value(node.target)

    def value(self, argument: Any) -> Any:
        """The translation of an operand: a value, a dimension, a number, or a list of them."""
        if isinstance(argument, (list, tuple)):
            return [self.value(a) for a in argument]
        if not is_node(argument):
            return argument
        if argument not in self.values:
            waited = self.awaits_addition(argument)
            self.values[argument] = _linear(self, argument) if waited else self.function.value(argument.target)
        return self.values[argument]

    def awaits_addition(self, node: Node) -> bool:
        """Whether a node is a linear whose result is only added to something: it is translated with the addition."""
        linear = node.target in KERNEL_TARGETS[1:]
        return self.form.joined and linear and [user.target for user in node.users] == [_aten.add.Tensor]

    def call(
        self,
        kernel: TirKernel,
        arguments: Sequence[Value],
        *outputs: tuple[Sequence[Any], str],
        by_rows: bool = False,
    ) -> Any:
        """Calls a kernel, see :meth:`FunctionBuilder.call` and :meth:`ProgramBuilder.kernel`."""
        return self.function.call(self.whole.kernel(kernel.name, kernel.make, by_rows), arguments, *outputs)

    def emit(self, expression: Any) -> Value:
        return self.function.emit(expression)

    def reshape(self, x: Value, sizes: Sequence[Any]) -> Value:
        """A value in another shape. Of several in a row only the last is left, and none where the shape is the same."""
        source = self.sources.get(x, x)
        if same_sizes(builder.shape(source), sizes):
            return source
        result = self.emit(relax.op.reshape(source, sizes))
        self.sources[result] = source
        return result

    def operands(self, node: Node) -> list[Value]:
        """Both operands as tensors; a number becomes a constant of the other operand's dtype."""
        found = [self.value(a) for a in node.args[:2]]
        tensors = [v for v in found if _is_tensor(v)]
        if not tensors:
            raise _refusal(node, "arithmetic on sizes has no translation")
        kind = builder.dtype(tensors[0])
        return [v if any(v is t for t in tensors) else relax.const(v, kind) for v in found]


Handler = Callable[[_Translator, Node], Any]


def _unary(expression: Callable[[Value], Any]) -> Handler:
    return lambda t, node: t.emit(expression(t.value(node.args[0])))


def _binary(expression: Callable[[Value, Value], Any]) -> Handler:
    def handler(t: _Translator, node: Node) -> Value:
        if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
            raise _refusal(node, "this form of the operator has no translation")
        a, b = t.operands(node)
        if builder.dtype(a) != builder.dtype(b):
            raise _refusal(node, "operands of different types have no translation")
        return t.emit(expression(a, b))

    return handler


def _add(t: _Translator, node: Node) -> Value:
    """An addition, which a linear takes over where its result is added to a tensor of the same shape."""
    for linear, other in (node.args[:2], node.args[1::-1]):
        if node.kwargs or not is_node(linear) or linear in t.values or linear is other:
            continue
        residual = t.value(other) if t.awaits_addition(linear) else None
        if not _is_tensor(residual) or builder.dtype(residual) != "float32":
            continue
        shape = [*t.leading[quantizer_of(linear)], linear_spec(t.program, linear).out_features]
        if same_sizes(builder.shape(residual), shape):
            return _linear(t, linear, residual)
    return _binary(relax.op.add)(t, node)


def _same(t: _Translator, node: Node) -> Any:
    return t.value(node.args[0])


def _size(t: _Translator, node: Node) -> Any:
    return builder.shape(t.value(node.args[0]))[node.args[1]]


def _item(t: _Translator, node: Node) -> Any:
    return t.value(node.args[0])[node.args[1]]


def _power(t: _Translator, node: Node) -> Value:
    x, exponent = t.value(node.args[0]), node.args[1]
    if exponent not in (2, 3):
        return t.emit(relax.op.power(x, relax.const(float(exponent), builder.dtype(x))))
    result = t.emit(relax.op.multiply(x, x))
    return t.emit(relax.op.multiply(result, x)) if exponent == 3 else result


def _mean(t: _Translator, node: Node) -> Value:
    x, dimensions, keep = node.args[0], list(node.args[1]), argument(node, 2, "keepdim", False)
    if keep and dimensions == [-1] and is_call(x, _aten.pow.Tensor_Scalar) and x.args[1] == 2:
        return t.function.mean_of_squares(t.value(x.args[0]))
    return t.emit(relax.op.mean(t.value(x), dimensions, keep))


def _reshape(t: _Translator, node: Node) -> Value:
    x, sizes = t.value(node.args[0]), t.value(node.args[1])
    if -1 in [s for s in sizes if isinstance(s, int)]:
        sizes = _infer(builder.shape(x), sizes)
    return t.reshape(x, sizes)


def _infer(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """``new`` with its one -1 replaced, so that it has as many elements as ``old``; equal symbols cancel."""
    symbols = [d for d in old if not isinstance(d, int)]
    for size in (d for d in new if not isinstance(d, int)):
        match = next((i for i, d in enumerate(symbols) if d.same_as(size)), None)
        if match is None:
            raise UntranslatableError(f"a reshape from {list(old)} to {list(new)} cannot be solved")
        symbols.pop(match)
    elements = math.prod(d for d in old if isinstance(d, int))
    missing, rest = divmod(elements, math.prod(d for d in new if isinstance(d, int) and d != -1))
    if rest:
        raise UntranslatableError(f"a reshape from {list(old)} to {list(new)} cannot be solved")
    for symbol in symbols:
        missing = symbol if missing == 1 else symbol * missing
    return [missing if isinstance(d, int) and d == -1 else d for d in new]


def _transpose(t: _Translator, node: Node) -> Value:
    x = t.value(node.args[0])
    axes = list(range(len(builder.shape(x))))
    a, b = node.args[1], node.args[2]
    axes[a], axes[b] = axes[b], axes[a]
    return t.emit(relax.op.permute_dims(x, axes))


def _permute(t: _Translator, node: Node) -> Value:
    return t.emit(relax.op.permute_dims(t.value(node.args[0]), list(node.args[1])))


def _unsqueeze(t: _Translator, node: Node) -> Value:
    return t.emit(relax.op.expand_dims(t.value(node.args[0]), node.args[1]))


def _expand(t: _Translator, node: Node) -> Value:
    x, sizes = t.value(node.args[0]), t.value(node.args[1])
    old = builder.shape(x)
    old = [1] * (len(sizes) - len(old)) + old
    return t.emit(
        relax.op.broadcast_to(x, [o if isinstance(s, int) and s == -1 else s for o, s in zip(old, sizes, strict=True)])
    )


def _cut(t: _Translator, x: Value, axis: int, start: int, end: Any) -> Value:
    return t.emit(relax.op.strided_slice(x, [axis], [start], [end], assume_inbound=True))


def _slice(t: _Translator, node: Node) -> Value:
    x, axis = t.value(node.args[0]), argument(node, 1, "dim", 0)
    start = t.value(argument(node, 2, "start")) or 0
    end = t.value(argument(node, 3, "end"))
    size = builder.shape(x)[axis]
    if argument(node, 4, "step", 1) != 1:
        raise _refusal(node, "a slice with steps has no translation")
    if end is None or (isinstance(end, int) and end >= sys.maxsize):
        end = size
    if isinstance(start, int) and start < 0:
        start = size + start
    if isinstance(end, int) and end < 0:
        end = size + end
    if isinstance(end, int) and isinstance(size, int):
        end = min(end, size)
    if isinstance(start, int) and start == 0 and end is size:
        return x
    return _cut(t, x, axis % len(builder.shape(x)), start, end)


def _parts(t: _Translator, node: Node, sizes: Sequence[int], axis: int) -> list[Value]:
    x, found, start = t.value(node.args[0]), [], 0
    for size in sizes:
        found.append(_cut(t, x, axis % len(builder.shape(x)), start, start + size))
        start += size
    return found


def _split_sizes(t: _Translator, node: Node) -> list[Value]:
    return _parts(t, node, node.args[1], node.args[2] if len(node.args) > 2 else 0)


def _split(t: _Translator, node: Node) -> list[Value]:
    axis = node.args[2] if len(node.args) > 2 else 0
    size, each = builder.shape(t.value(node.args[0]))[axis], node.args[1]
    if not isinstance(size, int):
        raise _refusal(node, "a split of a dynamic dimension has no translation")
    return _parts(t, node, [min(each, size - i) for i in range(0, size, each)], axis)


def _chunk(t: _Translator, node: Node) -> list[Value]:
    axis = node.args[2] if len(node.args) > 2 else 0
    size = builder.shape(t.value(node.args[0]))[axis]
    if not isinstance(size, int):
        raise _refusal(node, "a split of a dynamic dimension has no translation")
    each = -(-size // node.args[1])
    return _parts(t, node, [min(each, size - i) for i in range(0, size, each)], axis)


def _cat(t: _Translator, node: Node) -> Value:
    return t.emit(relax.op.concat(t.value(node.args[0]), node.args[1] if len(node.args) > 1 else 0))


def _cast(t: _Translator, node: Node) -> Value:
    kind = node.args[1] if len(node.args) > 1 else node.kwargs.get("dtype")
    x = t.value(node.args[0])
    if kind is None or _dtype(kind) == builder.dtype(x):
        return x
    return t.emit(relax.op.astype(x, _dtype(kind)))


def _sigmoid_of(x: Value) -> Any:
    one = relax.const(1.0, builder.dtype(x))
    return relax.op.divide(one, relax.op.add(one, relax.op.exp(relax.op.negative(x))))


def _silu(t: _Translator, node: Node) -> Value:
    x = t.value(node.args[0])
    one = relax.const(1.0, builder.dtype(x))
    return t.emit(relax.op.divide(x, relax.op.add(one, relax.op.exp(relax.op.negative(x)))))


def _gelu(t: _Translator, node: Node) -> Value:
    x = t.value(node.args[0])

    def number(value: float) -> Any:
        return relax.const(value, builder.dtype(x))

    if node.kwargs.get("approximate", "none") == "tanh":
        cube = relax.op.multiply(relax.op.multiply(x, x), x)
        inner = relax.op.add(x, relax.op.multiply(cube, number(0.044715)))
        gate = relax.op.tanh(relax.op.multiply(inner, number((2 / torch.pi) ** 0.5)))
    else:
        gate = relax.op.erf(relax.op.multiply(x, number(0.5**0.5)))
    half = relax.op.multiply(x, number(0.5))
    return t.emit(relax.op.multiply(half, relax.op.add(gate, number(1.0))))


def _layer_norm(t: _Translator, node: Node) -> Value:
    x, sizes = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    if weight is None or bias is None:
        raise _refusal(node, "a layer norm without weight and bias has no translation")
    axes = list(range(-len(sizes), 0))
    epsilon = argument(node, 4, "eps", 1e-5)
    return t.emit(relax.op.nn.layer_norm(t.value(x), t.value(weight), t.value(bias), axes, epsilon))


def _embedding(t: _Translator, node: Node) -> Value:
    return t.emit(relax.op.take(t.value(node.args[0]), t.value(node.args[1]), 0))


def _int8_embedding(t: _Translator, node: Node) -> Value:
    rows, scale, ids = t.value(node.args)
    spec = EmbeddingSpec(*builder.shape(rows))
    return t.call(t.kernels.embedding(spec), [rows, scale, ids], ([*builder.shape(ids), spec.columns], "float32"))


def _flat(t: _Translator, x: Value) -> tuple[Value, list[Any], Any]:
    """A value as ``[M, K]``, its leading dimensions, and ``M``."""
    *leading, width = builder.shape(x)
    count: Any = 1
    for size in leading:
        count = size if isinstance(count, int) and count == 1 else count * size
    return t.reshape(x, [count, width]), leading, count


def _quantize(t: _Translator, node: Node) -> list[Value]:
    spec = quantize_spec(node)
    x, t.leading[node], count = _flat(t, t.value(node.args[0]))
    kernel = t.kernels.quantizer(spec).tir(parallel=t.form.length is None)
    kind = "int16" if spec.bits == 16 else "int8"
    factors = [t.value(a) for a in (node.args[1], *activation_knees(node))]
    outputs = ([count, spec.in_features], kind), ([count, spec.scales], "float32")
    return t.call(kernel, [x, *factors], *outputs, by_rows=True)


def _linear(t: _Translator, node: Node, residual: Value | None = None) -> Value:
    values, scale = t.value(node.args[:2])
    spec = linear_spec(t.program, node)
    count = builder.shape(values)[0]
    packed = t.function.value(t.weights.packed_name(node))
    output = ([count, spec.out_features], "float32")
    kernel, operands = t.kernels.linear(spec).tir(t.form.bucket), [values, scale, packed]
    if residual is not None:
        make = kernel.make
        kernel = TirKernel(f"{kernel.name}_residual", lambda: with_residual(make()))
        operands.append(_flat(t, residual)[0])
    flat = t.call(kernel, operands, output)
    # A quantizer's result has two dimensions; here the graph's own come back.
    leading = t.leading[quantizer_of(node)]
    return t.reshape(flat, [*leading, spec.out_features])


def _float_linear(t: _Translator, node: Node) -> Value:
    x, weight = t.value(node.args[:2])
    if builder.dtype(x) != "float32" or builder.dtype(weight) != "float32" or len(builder.shape(weight)) != 2:
        raise _refusal(node, "a linear of this kind has no translation")
    rows, columns = builder.shape(weight)
    flat, leading, count = _flat(t, x)
    kernel = t.kernels.dense(rows, columns, t.form.length == 1)
    result = t.call(kernel, [flat, weight], ([count, rows], "float32"))
    result = t.reshape(result, [*leading, rows])
    bias = argument(node, 2, "bias")
    return result if bias is None else t.emit(relax.op.add(result, t.value(bias)))


def _attention(t: _Translator, node: Node) -> Value:
    query, key, value, *state, mask = t.value(node.args[:8])
    _, _, _, _, _, _, _, _, _, scale, window, bits = node.args
    heads, _, width = builder.shape(query)[1:]
    spec = AttentionSpec(heads, builder.shape(key)[1], width, builder.shape(value)[3], bits, window, scale)
    if bits == 16:
        state = [state[0], state[0], state[2], state[2]]
    output = ([*builder.shape(query)[:3], spec.value_width], "float32")
    # Within a launch that is there anyway, heads are worth sharing out even for one token.
    kernel = t.kernels.attention(spec, t.form.length, parallel=t.form.length is None or t.form.blocks)
    return t.call(kernel, [query, key, value, *state, mask], output)


_OPERATORS: dict[Any, Handler] = {
    operator.getitem: _item,
    _aten.sym_size.int: _size,
    _aten.add.Tensor: _add,
    _aten.sub.Tensor: _binary(relax.op.subtract),
    _aten.mul.Tensor: _binary(relax.op.multiply),
    _aten.div.Tensor: _binary(relax.op.divide),
    _aten.neg.default: _unary(relax.op.negative),
    _aten.rsqrt.default: _unary(relax.op.rsqrt),
    _aten.cos.default: _unary(relax.op.cos),
    _aten.sin.default: _unary(relax.op.sin),
    _aten.exp.default: _unary(relax.op.exp),
    _aten.tanh.default: _unary(relax.op.tanh),
    _aten.relu.default: _unary(relax.op.nn.relu),
    _aten.sigmoid.default: _unary(_sigmoid_of),
    _aten.silu.default: _silu,
    _aten.gelu.default: _gelu,
    _aten.pow.Tensor_Scalar: _power,
    _aten.mean.dim: _mean,
    _aten.layer_norm.default: _layer_norm,
    _aten.embedding.default: _embedding,
    _aten.reshape.default: _reshape,
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.expand.default: _expand,
    _aten.slice.Tensor: _slice,
    _aten.split_with_sizes.default: _split_sizes,
    _aten.split.Tensor: _split,
    _aten.chunk.default: _chunk,
    _aten.cat.default: _cat,
    _aten.to.dtype: _cast,
    _aten._to_copy.default: _cast,
    _aten.contiguous.default: _same,
    _aten.clone.default: _same,
    _aten.alias.default: _same,
    _lbllm.int8_embedding.default: _int8_embedding,
    _lbllm.quantize_activation.default: _quantize,
    _aten.linear.default: _float_linear,
    _lbllm.bit_linear.default: _linear,
    _lbllm.int8_linear.default: _linear,
    _lbllm.cached_attention.default: _attention,
}
