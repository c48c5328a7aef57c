"""Runs a lowered graph on generated kernels.

The graph stays the truth. Binding replaces the target of every ``quantize_activation``, ``bit_linear``,
``grouped_bit_linear``, ``int4_linear`` and ``int8_linear`` node by a callable around a proven kernel, with the weights
packed once into the kernel's layout (merged ones concatenated first); every other node runs as the ``aten`` operator it
is. A node without a kernel is an error: the slow reference operators are never run here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lbllm_compile.codegen import levels as level_rules
from lbllm_compile.codegen import operators as operators
from lbllm_compile.codegen.backend import EagerKernels, EagerLinear, EagerQuantizer
from lbllm_compile.codegen.errors import KernelError, first_line
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT, WEIGHTS, weight_of
from lbllm_compile.codegen.sizes import product_group
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.passes.contracts import describe
from lbllm_compile.passes.ir.annotations import LINEAR
from lbllm_compile.passes.ir.program import Program, copy_module, get_attribute
from lbllm_compile.passes.ir.rewrite import (
    INTEGER_LINEARS,
    Node,
    bias_of,
    calls,
    calls_of_role,
    constant,
    is_call,
    is_constant,
    is_node,
    table_shape,
)
from lbllm_compile.passes.lower import IN_FEATURES

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm

_POINTWISE = frozenset(
    (
        "neg",
        "mul",
        "add",
        "sub",
        "div",
        "tanh",
        "to",
        "type_as",
        "alias",
        "clone",
        "sigmoid",
        "exp",
        "log",
        "abs",
        "clamp",
    )
)
"""Operations behind the output head through which a slice of the sequence may be moved forward."""


@dataclass(frozen=True)
class Requirements:
    """Every distinct kernel a program needs, in order of first use."""

    linears: tuple[LinearSpec, ...]
    quantizers: tuple[QuantizeSpec, ...]


def requirements(program: Program) -> Requirements:
    """The kernels that running a lowered program takes.

    Raises:
        KernelError: a node has a form that no kernel implements.
    """
    linears: dict[LinearSpec, None] = {}
    quantizers: dict[QuantizeSpec, None] = {}
    for node in calls_of_role(program.graph, "kernel"):
        if node.target is _lbllm.quantize_activation.default:
            quantizers[quantize_spec(node)] = None
        elif node.target in INTEGER_LINEARS:
            linears[linear_spec(program, node)] = None
        else:
            raise KernelError(f"{describe(node)} runs as a kernel only, and no kernel computes it")
    return Requirements(tuple(linears), tuple(quantizers))


def _in_features(node: Node) -> int:
    if IN_FEATURES not in node.meta:
        raise KernelError(f"{describe(node)} does not say its in_features; make integer operators with 'lower' only")
    return node.meta[IN_FEATURES]


def quantize_spec(node: Node) -> QuantizeSpec:
    """What a ``quantize_activation`` node computes."""
    arguments = Arguments(node)
    tables = {"knees": arguments.knees is not None, "planes": arguments.plane_scales is not None}
    return QuantizeSpec(_in_features(node), arguments.group, arguments.bits, **tables)


def quantizer_of(node: Node) -> Node:
    """The ``quantize_activation`` whose values and scales a linear reads.

    Raises:
        KernelError: it reads something else.
    """
    read = [Arguments(part) for part in Arguments(node).pick("values", "x_scale") if is_call(part, operator.getitem)]
    pair = read[0].value if read else None
    both = [(part.value, part.index) for part in read] == [(pair, 0), (pair, 1)]
    if not is_call(pair, _lbllm.quantize_activation.default) or not both:
        raise KernelError(f"{describe(node)} does not read the values and scales of a quantized activation")
    return pair


def linear_spec(program: Program, node: Node) -> LinearSpec:
    """What a node of :data:`..passes.ir.rewrite.INTEGER_LINEARS` computes.

    Raises:
        KernelError: no kernel can: its input is not quantized, or its weights are computed.
    """
    quantizer = quantize_spec(quantizer_of(node))
    arguments, bias = Arguments(node), bias_of(node)
    kind, names = WEIGHTS[node.target]
    weights = arguments.pick(*names)
    if not all(is_constant(w) for w in (*weights, bias)):
        raise KernelError(f"the weights of {describe(node)} are computed from inputs; kernels need stored ones")
    scales = constant(program.module, weights[-1])
    return LinearSpec(
        kind=kind,
        out_features=scales.shape[-1] if kind == "int8" else scales.shape[-2],
        in_features=_in_features(node),
        group=arguments.group if kind == "int8" else product_group(arguments.group, quantizer.group),
        act_bits=quantizer.value_bits,
        per_token=quantizer.group == 0,
        bias=bias is not None,
        additive=kind == "bit" and quantizer.value_bits == 4 and _additive(node),
    )


def _additive(node: Node) -> bool:
    """Whether a linear's level rule has additive levels only; loading holds its weights against the rule."""
    return LINEAR in node.meta and level_rules.get(node.meta[LINEAR].scheme.levels).additive


def packed(program: Program, node: Node, kernel: EagerLinear) -> Any:
    """The weights of an integer linear of one matrix in its kernel's layout."""
    arguments = Arguments(node, lambda value: constant(program.module, value))
    return kernel.pack(weight_of(arguments, _in_features(node)), arguments.bias)


def packed_experts(program: Program, node: Node, kernel: EagerLinear) -> list[Any]:
    """The weights of a ``grouped_bit_linear`` in its kernel's layout, expert by expert."""
    arguments = Arguments(node, lambda value: constant(program.module, value))
    planes = arguments.pick(*WEIGHT)
    width, group = _in_features(node), arguments.group
    return [
        kernel.pack(QuantizedWeight(*tensors, in_features=width, group=group), None)
        for tensors in zip(*planes, strict=True)
    ]


class _Quantize:
    """``quantize_activation`` on a kernel: ``[..., K]`` to values ``[..., K]`` and scales ``[..., G]``."""

    __name__ = "quantize"

    def __init__(self, kernel: EagerQuantizer, in_features: int):
        self._kernel, self._in_features = kernel, in_features

    def __call__(self, x: Tensor, clip: Tensor, *shape: Tensor) -> tuple[Tensor, Tensor]:
        leading = x.shape[:-1]
        if x.shape[-1] != self._in_features:
            raise KernelError(f"an input has {x.shape[-1]} channels where the model needs {self._in_features}")
        flat = x.reshape(-1, self._in_features).contiguous()
        values, scale = self._kernel(flat if flat.dtype == torch.float32 else flat.float(), clip, *shape)
        return values.view(*leading, self._in_features), scale.view(*leading, scale.shape[-1])


class _Linear:
    """An integer linear of one matrix on a kernel, its weights packed."""

    __name__ = "linear"

    def __init__(self, kernel: EagerLinear, packed: Any, spec: LinearSpec):
        self._kernel, self._packed, self._spec = kernel, packed, spec

    def __call__(self, values: Tensor, x_scale: Tensor) -> Tensor:
        spec = self._spec
        leading = values.shape[:-1]
        out = self._kernel(values.reshape(-1, spec.in_features), x_scale.reshape(-1, x_scale.shape[-1]), self._packed)
        return out.view(*leading, spec.out_features)


class _GroupedLinear:
    """``grouped_bit_linear`` on a kernel: every expert's rows with that expert's packed weights."""

    __name__ = "grouped_linear"

    def __init__(self, kernel: EagerLinear, packed: Sequence[Any], spec: LinearSpec):
        self._kernel, self._packed, self._spec = kernel, packed, spec

    def __call__(self, values: Tensor, x_scale: Tensor, offsets: Tensor) -> Tensor:
        out = values.new_zeros((values.shape[0], self._spec.out_features), dtype=torch.float32)
        start = 0
        for packed, end in zip(self._packed, offsets.tolist(), strict=True):
            if end > start:
                out[start:end] = self._kernel(values[start:end], x_scale[start:end], packed)
            start = end
        return out


class Executor:
    """A lowered program bound to kernels.

    Args:
        program: after ``lower`` (and ``cache`` for a language model).
        kernels: proven kernels for the device that runs.

    Raises:
        KernelError: a node has no kernel, or the graph is not lowered.
    """

    def __init__(self, program: Program, kernels: EagerKernels):
        simulated = calls_of_role(program.graph, "simulates")
        if simulated:
            raise KernelError(f"{describe(simulated[0])} is simulated quantization; only lowered graphs run ('lower')")
        self.inputs = [n.target for n in program.placeholders()]
        module = copy_module(program.module)
        _bind(program.with_module(module), kernels)
        self._full = _Lifted(module)
        last = last_token_graph(module)
        self._last = _Lifted(last) if last is not None else None

    def __call__(self, *inputs: Any) -> Tensor:
        """Runs the graph on its placeholders' values, in order.

        Raises:
            KernelError: an operator cannot take what it gets with these inputs.
        """
        return _run(self._full, inputs)

    def last_logits(self, *inputs: Any) -> Tensor:
        """A language model's logits of the last position, ``[B, 1, V]``; the head runs on that position alone where
        the graph allows.

        Raises:
            KernelError: an operator cannot take what it gets with these inputs.
        """
        return _run(self._last, inputs) if self._last is not None else _run(self._full, inputs)[:, -1:]


def _run(graph: _Lifted, inputs: Sequence[Any]) -> Tensor:
    try:
        with torch.inference_mode():
            return graph(*inputs)
    # of torch's operators, whose checks of sizes and values these are
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise KernelError(f"the graph does not run on these inputs: {first_line(error)[:300]}") from error


def _bind(program: Program, kernels: EagerKernels) -> None:
    """Replaces every kernel operator of the program's graph by a callable on packed weights, in place."""
    graph = program.graph
    for node in calls(graph, *INTEGER_LINEARS):
        spec = linear_spec(program, node)
        kernel = kernels.linear(spec)
        arguments = Arguments(node)
        if node.target is _lbllm.grouped_bit_linear.default:
            bound: Any = _GroupedLinear(kernel, packed_experts(program, node, kernel), spec)
            given = arguments.pick("values", "x_scale", "offsets")
        else:
            bound = _Linear(kernel, packed(program, node, kernel), spec)
            given = arguments.pick("values", "x_scale")
        node.target, node.args = bound, tuple(given)
    for node in calls(graph, _lbllm.quantize_activation.default):
        spec = quantize_spec(node)
        node.args = (*Arguments(node).pick("x", "clip"), *table_shape(node))
        node.target = _Quantize(kernels.quantizer(spec), spec.in_features)
    graph.eliminate_dead_code()


class _Lifted:
    """A graph module as one function whose weights are arguments, which saves attribute look-ups at every step."""

    def __init__(self, module: fx.GraphModule):
        graph = fx.Graph()
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        weights = list(dict.fromkeys(n.target for n in module.graph.nodes if n.op == "get_attr"))
        copies = {n: graph.placeholder(n.name) for n in inputs}
        lifted = {w: graph.placeholder(f"weight_{i}") for i, w in enumerate(weights)}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                copies[node] = lifted[node.target]
            elif node.op == "output":
                graph.output(fx.map_arg(node.args[0], copies.__getitem__))
            elif node.op != "placeholder":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        self._weights = [get_attribute(module, w) for w in weights]
        self._forward = fx.GraphModule(torch.nn.Module(), graph).forward

    def __call__(self, *inputs: Any) -> Tensor:
        return self._forward(*inputs, *self._weights)


def _operand(node: Node, name: str) -> Node:
    """The first operand of a call; what is bound to a kernel has no schema any more that would tell its name."""
    return node.args[0] if isinstance(node.target, (_Linear, _Quantize)) else getattr(Arguments(node), name)


def last_token_graph(module: fx.GraphModule) -> fx.GraphModule | None:
    """The same graph with the output head on the last position only; None where the head is not last."""
    module = copy_module(module)
    node: Node = module.graph.output_node().args[0]
    while is_node(node) and LINEAR not in node.meta:
        target = node.target
        pointwise = (
            isinstance(target, torch._ops.OpOverload) and target._schema.name.removeprefix("aten::") in _POINTWISE
        )
        if not pointwise or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    if not is_node(node) or node.meta[LINEAR].role == "decoder":
        return None
    if is_call(node, _aten.linear.default):
        reader = node
    elif isinstance(node.target, _Linear) or node.target in INTEGER_LINEARS:
        reader = _operand(_operand(node, "values"), "value")  # the quantizer
    else:
        return None
    with module.graph.inserting_before(reader):
        hidden = _operand(reader, "input" if reader is node else "x")
        last = module.graph.call_function(_aten.slice.Tensor, (hidden, 1, -1, (1 << 63) - 1))
    reader.replace_input_with(hidden, last)
    module.recompile()
    return module
