"""Every translation of the registry gives what torch gives, over drawn shapes, types, values and dynamic sizes."""

from __future__ import annotations

import itertools
import math
import operator
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import operators
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.errors import UntranslatableError
from lbllm_compile.codegen.operators import registry
from lbllm_compile.codegen.operators.aten import indexing
from lbllm_compile.codegen.program.builder import TensorSpec
from lbllm_compile.codegen.program.compile import compile_program
from lbllm_compile.codegen.program.queries import quotient, surely_equal, surely_true
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_api import symbolic_dimension
from lbllm_compile.codegen.tvm_runtime import Machine, array
from lbllm_compile.passes.ir.program import Program
from torch import Tensor, fx

from lbllm_compile.lowering.translate import translate_graph

aten = torch.ops.aten
LANES = 16
KERNELS = KernelSet(Target.parse("cpu"), {}, {}, [], {}, 0)
FLOATS, INTEGERS, BOOLS = torch.float32, torch.int64, torch.bool
SIZES = {"m": 5, "n": 3}
"""Values of the symbols of dynamic dimensions for which it is looked up how many tensors a call gives."""

TOGETHER = 12
"""Cases in one compiled program."""


WIDTH = "width"
"""A dimension that a program knows, one of :data:`WIDTHS` (:meth:`Case.at`)."""

WIDTHS = (4, 1, 64, 3, 16, 33)
"""Of a lane, of less and more than a vector's and of whole vectors."""

SMALLEST, LARGEST = 1e-45, torch.finfo(FLOATS).max
MODEST = (0.0, -0.0, math.nan, math.inf, -math.inf, SMALLEST, -1e-40)
"""Extremes of floats whose sums are the same in every order."""

EXTREMES = {
    FLOATS: (*MODEST, LARGEST, -LARGEST),
    **{kind: (0, -1, torch.iinfo(kind).min, torch.iinfo(kind).max) for kind in (INTEGERS, torch.int32, torch.int8)},
}


@dataclass(frozen=True)
class Input:
    """A tensor argument of a case.

    Attributes:
        shape: a string is a dynamic size.
        dtype: of the tensor.
        low, high: of its values. Where they are not given, values are small, and every so often of ``extremes``.
        distinct: no number is drawn twice.
        extremes: those of the dtype where None.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = FLOATS
    low: float | None = None
    high: float | None = None
    distinct: bool = False
    extremes: tuple[float, ...] | None = None

    def draw(self, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        shape = [sizes[d] if isinstance(d, str) else d for d in self.shape]
        if self.dtype == BOOLS:
            return torch.randint(0, 2, shape, generator=generator).bool()
        low, high = (-4, 4) if self.low is None or self.high is None else (self.low, self.high)
        if self.distinct:
            choice = torch.randperm(int(high) - int(low) + 1, generator=generator)[: math.prod(shape)]
            return (choice + int(low)).to(self.dtype).reshape(shape)
        if self.dtype.is_floating_point:
            values = (torch.rand(shape, generator=generator) * (high - low) + low).to(self.dtype)
        else:
            values = torch.randint(int(low), int(high) + 1, shape, generator=generator).to(self.dtype)
        return values if self.low is not None else self._some_extreme(values, generator)

    def _some_extreme(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Most, some or none of the values replaced."""
        extremes = torch.tensor(EXTREMES[self.dtype] if self.extremes is None else self.extremes, dtype=self.dtype)
        share = (0.0, 0.04, 0.6)[int(torch.randint(3, (), generator=generator))]
        places = torch.randint(len(extremes), values.shape, generator=generator)
        return torch.where(torch.rand(values.shape, generator=generator) < share, extremes[places], values)


@dataclass(frozen=True)
class Size:
    """An argument that is the size of a dimension of the case's first tensor."""

    dim: int
    plus: int = 0


@dataclass(frozen=True)
class Case:
    """A call: positional arguments, in which an :class:`Input` is a tensor and a :class:`Size` a dynamic size.

    Programs neither take nor give complex numbers: inputs are viewed as such, ``is_complex`` results as real ones.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_complex: bool = False

    def at(self, width: int) -> Case:
        """The same call with a number for :data:`WIDTH`."""

        def sized(value: Any) -> Any:
            if isinstance(value, Input):
                return replace(value, shape=tuple(width if d == WIDTH else d for d in value.shape))
            if isinstance(value, (list, tuple)):
                return [sized(v) for v in value]
            return width if isinstance(value, str) and value == WIDTH else value

        return replace(
            self, args=tuple(sized(v) for v in self.args), kwargs={k: sized(v) for k, v in self.kwargs.items()}
        )


class Graph:
    """The graph of several cases, each with inputs of its own."""

    def __init__(self, cases: Sequence[Case]):
        self.cases = cases
        self.graph, self.inputs = fx.Graph(), []
        results: list[fx.Node] = []
        self.owners: list[int] = []
        self.firsts: list[int] = []
        for number, case in enumerate(cases):
            self.firsts.append(len(self.inputs))
            nodes: list[fx.Node] = []

            def place(value: Any, nodes: list[fx.Node] = nodes) -> Any:
                if isinstance(value, Input):
                    node = self.graph.placeholder(f"x{len(self.inputs)}")
                    if value.dtype.is_complex:
                        value = Input((*value.shape, 2), FLOATS, -4, 4)
                        self.inputs.append((node.target, value))
                        node = self.graph.call_function(aten.view_as_complex.default, (node,))
                    else:
                        self.inputs.append((node.target, value))
                    nodes.append(node)
                    return node
                if isinstance(value, Size):
                    size = self.graph.call_function(aten.sym_size.int, (nodes[0], value.dim))
                    return self.graph.call_function(operator.add, (size, value.plus)) if value.plus else size
                if isinstance(value, (list, tuple)):
                    return [place(v) for v in value]
                return value

            args = tuple(place(v) for v in case.args)
            node = self.graph.call_function(case.target, args, {k: place(v) for k, v in case.kwargs.items()})
            count = self._results(node, case)
            parts = [self.graph.call_function(operator.getitem, (node, i)) for i in range(count)] if count else [node]
            if case.is_complex:
                parts = [self.graph.call_function(aten.view_as_real.default, (part,)) for part in parts]
            results += parts
            self.owners += [number] * len(parts)
        self.graph.output(results)
        # placeholders first, as every graph has them
        self.module = fx.GraphModule(torch.nn.Module(), _placeholders_first(self.graph))

    def _results(self, node: fx.Node, case: Case) -> int:
        """How many tensors a call gives; 0 where it is one by itself."""
        if not isinstance(case.target, torch._ops.OpOverload):
            return 0
        module = fx.GraphModule(torch.nn.Module(), _placeholders_first(_until(self.graph, node)))
        given = [i.draw(SIZES, torch.Generator().manual_seed(0)) for _, i in self.inputs]
        value = module(*given)
        return len(value) if isinstance(value, (list, tuple)) else 0

    def draw(self, sizes: dict[str, int], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [i.draw(sizes, generator) for _, i in self.inputs]


def _until(graph: fx.Graph, node: fx.Node) -> fx.Graph:
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        values[n] = copy.node_copy(n, lambda v: values[v])
    copy.output(values[node])
    copy.eliminate_dead_code()
    return copy


def _placeholders_first(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for n in sorted(graph.nodes, key=lambda n: n.op != "placeholder"):
        values[n] = copy.node_copy(n, lambda v: values[v])
    return copy


def run_natively(module: fx.GraphModule, inputs: Sequence[tuple[str, Input]], folder: Path) -> Callable[..., Any]:
    """Compiles a graph; what it gives takes and gives tensors."""
    specs = [TensorSpec(name, i.shape, str(i.dtype).removeprefix("torch.")) for name, i in inputs]
    built = translate_graph(Program(module, "module"), KERNELS, specs)
    compiled = compile_program(built, KERNELS.target.llvm, LANES, {})
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "graph.so"
    compiled.executable.export_library(str(library))
    machine = Machine(library)

    def run(*tensors: Tensor) -> list[Tensor]:
        arguments = [machine.tensor(t.contiguous().numpy()) for t in tensors]
        found = machine.function("graph")(*arguments, machine.tuple([]), machine.tuple([]))
        return [torch.from_numpy(np.array(array(part))) for part in found]

    return run


def _placed(case: Case, x: Tensor, places: Tensor) -> Tensor:
    """The elements at places along the dimension that a call orders, where no place comes twice."""
    names = (argument.name for argument in case.target._schema.arguments)
    dim = dict(zip(names, case.args, strict=False))["dim"]
    assert (places.sort(dim).values.diff(dim=dim) > 0).all(), f"{case.target} gives a place twice"
    return x.gather(dim, places)


def check(graph: Graph, run: Callable[..., Any], sizes: dict[str, int], seed: int) -> None:
    """Holds a graph's native form against torch."""
    tensors = graph.draw(sizes, seed)
    found, wanted = run(*tensors), graph.module(*tensors)
    for owner, ours, theirs in zip(graph.owners, found, wanted, strict=True):
        case = graph.cases[owner]
        if case.target in UNSTABLE and ours.dtype == INTEGERS:  # places
            x = tensors[graph.firsts[owner]]
            ours, theirs = (_placed(case, x, places) for places in (ours, theirs))
        said = f"{case.target} of {case.args} {case.kwargs} for {sizes}"
        assert ours.dtype == theirs.dtype, f"{said} gives {ours.dtype}, not {theirs.dtype}"
        assert ours.shape == theirs.shape, f"{said} gives {ours.shape}, not {theirs.shape}"
        if case.target in UNWRITTEN:
            continue
        exact = not ours.dtype.is_floating_point or (case.target in EXACT and not case.is_complex)
        bound = 0.0 if exact else TOLERANCE
        torch.testing.assert_close(
            ours, theirs, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, said=said: f"{said}: {m}"
        )


def case(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Case:
    return Case(target, args, kwargs)


X, WHOLE, B = (Input(("m", WIDTH), kind) for kind in (FLOATS, INTEGERS, BOOLS))
POSITIVE = Input(("m", WIDTH), FLOATS, 0.1, 4)
SMALL = Input(("m", WIDTH), torch.int32)
SCALAR, SCALAR_INTEGER = Input(()), Input((), INTEGERS)
ROW = Input((WIDTH,))
FOUR = Input(("m", 4))
CUBE, BRICK = Input(("m", 4, "n")), Input(("m", 3, WIDTH))
WITHIN = replace(X, extremes=(0.0, -0.0, SMALLEST, -0.9, 2.0**62, -(2.0**63)))
"""Floats that integers can hold: C, and so torch, does not say what others become."""

SUMMED, SUMMED_FOUR, SUMMED_CUBE, SUMMED_BRICK = (replace(i, extremes=MODEST) for i in (X, FOUR, CUBE, BRICK))
"""Whether a sum with the largest floats is infinite depends on its order."""

ONCE = Input((3,), INTEGERS, 0, 3, distinct=True)

TOLERANCE = 2e-5
"""Of float results, relative and absolute: exponentials and the like are approximated, sums taken in another order."""

EXACT = {
    *(getattr(aten, name).default for name in ("neg", "abs", "sign", "relu", "floor", "ceil", "trunc", "maximum")),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.clamp.default),
    *(aten.cat.default, aten.stack.default, aten.slice.Tensor, aten.select.int, aten.gather.default, aten.index.Tensor),
    *(aten.embedding.default, aten.topk.default, aten.sort.default, aten.amax.default, aten.amin.default),
    *(aten.expand.default, aten.permute.default, aten.transpose.int, aten.view.default, aten.constant_pad_nd.default),
}
"""Operators whose float results are torch's to the bit."""


UNWRITTEN = {aten.empty_like.default, aten.new_empty.default}
"""Operators that give memory as they find it."""

UNSTABLE = {aten.topk.default, aten.sort.default, aten.argsort.default}
"""Operators that may take equal elements in any order."""


COMPLEX = Input(("m", 1, 4), torch.complex64)
"""Products of infinite ones differ in torch with the number of elements."""

GIVING_COMPLEX = [
    (aten.view_as_complex.default, (Input(("m", 2)),)),
    (aten.polar.default, (X, X)),
    (aten.mul.Tensor, (COMPLEX, Input(("m", "n", 4), torch.complex64))),
    (aten.mul.Tensor, (COMPLEX, Input(("m", 4), FLOATS, -4, 4))),
    (aten.mul.Tensor, (Input(("m", 4), INTEGERS, -4, 4), COMPLEX)),
    (aten.mul.Tensor, (COMPLEX, 1.5)),
    (aten.neg.default, (COMPLEX,)),
    (aten.unsqueeze.default, (COMPLEX, 1)),
    (aten.transpose.int, (COMPLEX, 0, 2)),
    (aten.reshape.default, (COMPLEX, [-1, 2])),
    (aten.expand.default, (COMPLEX, [-1, 3, -1])),
    (aten.slice.Tensor, (COMPLEX, 2, 1, 3)),
]
"""Calls whose result is complex."""


def _pairs(name: str, *kinds: Input) -> list[Case]:
    """A binary operator on tensors of several types, and on tensors and numbers."""
    packet = getattr(aten, name)
    tensor = packet.default if name == "floor_divide" else packet.Tensor
    found = [case(tensor, x, y) for x, y in itertools.product(kinds, repeat=2)]
    if "Scalar" in packet.overloads():
        found += [case(packet.Scalar, x, 2) for x in kinds if x.dtype != BOOLS]
    return found


UNARY = (
    "rsqrt sqrt cos sin tan exp tanh log erf reciprocal sigmoid silu gelu log1p expm1 neg relu abs sign floor ceil"
    " round trunc isnan isinf isfinite square softplus leaky_relu elu hardtanh mish hardsigmoid hardswish relu6 selu"
)
"""Of them those behind ``isfinite`` have no translation of their own and are made of others."""

DIVISOR = Input(("m", WIDTH), INTEGERS, 1, 5)
ABOVE_MINIMUM = replace(WHOLE, extremes=(0, -torch.iinfo(INTEGERS).max, torch.iinfo(INTEGERS).max))
"""What minus one divides: the quotient of the minimum has no place in its type, and torch is killed by it."""

DIVIDED = replace(X, extremes=MODEST[:5])
"""What has a remainder in torch: where the quotient is beyond every float, it depends on the number of elements."""

DIVISIONS = (aten.remainder.Tensor, aten.fmod.Tensor, aten.floor_divide.default)

CASES = [
    *(case(getattr(aten, name).default, POSITIVE) for name in UNARY.split()),
    *(
        case(getattr(aten, n).default, X)
        for n in ["neg", "relu", "sigmoid", "silu", "abs", "sign", "floor", "round", "exp", "tanh"]
    ),
    *(
        case(getattr(aten, n).default, WHOLE)
        for n in ["neg", "cos", "sigmoid", "abs", "sign", "relu", "floor", "round", "isnan", "exp"]
    ),
    case(aten.gelu.default, replace(X, extremes=(0.0, -0.0, math.nan, SMALLEST, 1e18, -1e18))),
    case(aten.gelu.default, X, approximate="tanh"),
    *(c for name in ("add", "mul", "eq", "lt", "ge") for c in _pairs(name, X, WHOLE, SMALL, SCALAR)),
    *(c for name in ("sub", "ne", "le", "gt", "div") for c in _pairs(name, X, WHOLE, SCALAR_INTEGER)),
    *(case(t, WHOLE, i) for t in DIVISIONS for i in (DIVISOR, replace(DIVISOR, low=-5, high=-2))),
    *(case(t, ABOVE_MINIMUM, replace(DIVISOR, low=-3, high=-1)) for t in DIVISIONS),
    *(case(t, WHOLE, d) for t in (aten.remainder.Scalar, aten.fmod.Scalar) for d in (3, -2)),
    *(c for name in ("remainder", "fmod", "floor_divide") for v in (POSITIVE, DIVIDED) for c in _pairs(name, v)),
    *(c for name in ("bitwise_and", "bitwise_or", "bitwise_xor") for c in _pairs(name, WHOLE, B)),
    *(c for name in ("__and__", "__or__", "__xor__") for c in _pairs(name, WHOLE, B)),
]
CASES += [
    case(aten.add.Tensor, WHOLE, WHOLE, alpha=2),
    case(aten.add.Scalar, WHOLE, 0.5),
    case(aten.sub.Tensor, X, X, alpha=0.5),
    case(aten.mul.Tensor, B, B),
    case(aten.mul.Scalar, WHOLE, 0.5),
    case(aten.div.Scalar, WHOLE, 2),
    case(aten.remainder.Scalar_Tensor, 7, DIVISOR),
    case(aten.bitwise_and.Scalar_Tensor, 6, WHOLE),
    case(aten.bitwise_or.Scalar_Tensor, 6, WHOLE),
    case(aten.bitwise_xor.Scalar_Tensor, 6, WHOLE),
    *(
        case(aten.div.Tensor_mode, v, w, rounding_mode=r)
        for v, w in ((WHOLE, DIVISOR), (X, POSITIVE), (X, X))
        for r in (None, "floor", "trunc")
    ),
    *(case(aten.div.Scalar_mode, ABOVE_MINIMUM, d, rounding_mode=r) for d in (3, -2, -1) for r in ("floor", "trunc")),
    *(
        case(aten.pow.Tensor_Scalar, v, e)
        for v, e in (
            (X, 0),
            (X, 2),
            (X, 3),
            (WHOLE, 3),
            (POSITIVE, 0.5),
            (POSITIVE, -0.5),
            (POSITIVE, -1.0),
            (POSITIVE, 1.7),
            (WHOLE, 2.0),
        )
    ),
    case(aten.pow.Tensor_Tensor, POSITIVE, X),
    case(aten.pow.Scalar, 2.0, X),
    case(aten.maximum.default, X, WHOLE),
    case(aten.minimum.default, X, X),
    case(aten.clamp.default, X, -1, 1),
    case(aten.clamp.default, WHOLE, -1, 0.5),
    case(aten.clamp.default, X, None, 0.5),
    case(aten.clamp.Tensor, X, ROW, None),
    case(aten.clamp.Tensor, X, ROW, ROW),
    case(aten.clamp_min.default, X, 0.5),
    case(aten.clamp_max.default, X, 0.5),
    case(aten.bitwise_not.default, B),
    case(aten.bitwise_not.default, WHOLE),
    case(aten.logical_not.default, WHOLE),
    *(case(getattr(aten, f"logical_{n}").default, WHOLE, B) for n in ("and", "or", "xor")),
    case(aten.where.self, B, X, WHOLE),
    case(aten.where.ScalarOther, B, X, -math.inf),
    case(aten.where.ScalarSelf, B, 1, X),
    case(aten.masked_fill.Scalar, X, B, -math.inf),
    case(aten.masked_fill.Tensor, X, B, SCALAR),
    *(case(aten.to.dtype, v, d) for v, d in ((WHOLE, BOOLS), (B, FLOATS), (X, torch.float16), (X, BOOLS))),
    *(case(aten.to.dtype, v, d) for v, d in ((WHOLE, torch.int8), (WHOLE, FLOATS), (WITHIN, INTEGERS))),
    case(aten._to_copy.default, WHOLE, dtype=FLOATS),
    case(aten.to.device, X, torch.device("cpu"), FLOATS),
    case(aten.to.dtype_layout, WHOLE, dtype=FLOATS),
    case(aten.to.other, WHOLE, X),
    case(aten.type_as.default, WITHIN, WHOLE),
    case(aten.copy.default, X, ROW),
    case(aten.rsub.Scalar, X, 2.0),
    case(aten.addcmul.default, X, X, X),
    *(case(aten.view.default, CUBE, [Size(0), 2, 2, Size(2)]) for _ in range(1)),
    case(aten.reshape.default, FOUR, [-1, 2]),
    case(aten._unsafe_view.default, FOUR, [Size(0), 2, 2]),
    case(aten.view_as.default, FOUR, Input(("m", 2, 2))),
    case(aten.flatten.using_ints, CUBE, 0, 1),
    case(aten.flatten.using_ints, CUBE),
    case(aten.unflatten.int, FOUR, 1, [2, -1]),
    case(aten.squeeze.default, Input((3, 1, 4, 1))),
    case(aten.squeeze.dim, Input(("m", 1)), 1),
    case(aten.squeeze.dims, Input(("m", 1, 1, 3)), [1, 2, 3]),
    case(aten.transpose.int, CUBE, 0, -1),
    case(aten.t.default, X),
    case(aten.permute.default, CUBE, [2, 0, 1]),
    case(aten.movedim.int, CUBE, 0, 2),
    case(aten.movedim.intlist, CUBE, [0, 1], [-1, 0]),
    case(aten.unsqueeze.default, X, -1),
    case(aten.expand.default, Input((1, 4)), [Size(0), 3, -1]),
    case(aten.broadcast_to.default, ROW, [3, WIDTH]),
    case(aten.expand_as.default, Input((1, WIDTH)), X),
    case(aten.repeat.default, FOUR, [2, 3]),
    case(aten.repeat.default, FOUR, [2, 1, 1]),
    *(case(aten.repeat_interleave.self_int, v, r, d) for v, r, d in ((X, 2, -1), (CUBE, 3, 0), (X, 2, None))),
    *(
        case(aten.slice.Tensor, FOUR, *cut)
        for cut in (
            (0, 1, 3),
            (0, -2, 1000),
            (1, 0, 4, 2),
            (1, 0, Size(0)),
            (1, 1, Size(0)),
            (0, -1),
            (0, 0, -1),
            (0, 1000, 2000),
            (1, Size(0), 4),
            (0, 0, Size(0, 3)),
        )
    ),
    case(aten.narrow.default, FOUR, 1, 1, 2),
    *(case(aten.select.int, FOUR, d, p) for d, p in ((0, -1), (0, 0), (1, 2))),
    case(aten.split_with_sizes.default, FOUR, [1, 3], 1),
    case(aten.split.Tensor, X, 3, 1),
    case(aten.chunk.default, X, 3, -1),
    case(aten.unbind.int, X, 1),
    case(aten.cat.default, [X, WHOLE], 0),
    case(aten.stack.default, [X, X], -1),
    case(aten.flip.default, CUBE, [0, 2]),
    case(aten.roll.default, FOUR, [1, 3], [1, 0]),
    case(aten.constant_pad_nd.default, CUBE, [1, 2, 0, 1], 5.0),
    case(aten.tril.default, X, 1),
    case(aten.triu.default, CUBE, -1),
    case(aten.full.default, [3, 2], 2.5),
    case(aten.zeros.default, [3]),
    case(aten.ones.default, [2], dtype=BOOLS),
    case(aten.full_like.default, X, 2),
    case(aten.zeros_like.default, WHOLE),
    case(aten.ones_like.default, X, dtype=INTEGERS),
    case(aten.new_full.default, X, [Size(0), 2], 7),
    case(aten.new_zeros.default, X, [Size(0)]),
    case(aten.new_ones.default, WHOLE, [Size(0), 1]),
    case(aten.fill.Scalar, X, 3),
    case(aten.fill.Tensor, WHOLE, SCALAR_INTEGER),
    case(aten.scalar_tensor.default, 2.5),
    case(aten.arange.default, 7),
    case(aten.arange.start, 1, 9, dtype=FLOATS),
    case(aten.arange.start_step, 0.0, 1.0, 0.3),
    case(aten.arange.start_step, 9, 1, -3),
    case(aten.contiguous.default, X),
    case(aten.clone.default, X),
    case(aten.alias.default, X),
    case(aten.detach.default, X),
    case(aten.lift_fresh_copy.default, X),
    case(aten.sum.default, SUMMED_CUBE),
    *(
        case(aten.sum.dim_IntList, v, d, k)
        for v, d, k in ((WHOLE, [1], False), (SUMMED_CUBE, [0, 2], True), (B, [0], False))
    ),
    case(aten.sum.dim_IntList, SUMMED, [-1]),
    case(aten.sum.dim_IntList, SUMMED_BRICK, [1]),
    case(aten.mean.default, SUMMED),
    case(aten.mean.dim, SUMMED_CUBE, [0, -1], True),
    case(aten.mean.dim, SUMMED, [-1]),
    case(aten.var.correction, SUMMED, [1]),
    case(aten.var.correction, SUMMED, [1], correction=0, keepdim=True),
    case(aten.std.correction, SUMMED, [1]),
    case(aten.amax.default, CUBE, [1]),
    case(aten.amin.default, X, [0], True),
    *(case(getattr(aten, n).default, v, [-1]) for n in ("amax", "amin") for v in (X, WHOLE, SMALL)),
    *(case(getattr(aten, n).default, BRICK, [1, 2]) for n in ("amax", "amin")),
    *(case(getattr(aten, n).default, X) for n in ("max", "min", "argmax", "argmin")),
    *(case(getattr(aten, n).dim, v, d) for n in ("max", "min") for v, d in ((X, 1), (WHOLE, 1), (BRICK, 1))),
    case(aten.argmax.default, X, 1, True),
    case(aten.argmin.default, X, 0),
    *(case(getattr(aten, n).default, WHOLE, -1) for n in ("argmax", "argmin")),
    *(case(getattr(aten, n).default, B) for n in ("any", "all")),
    *(case(getattr(aten, n).dim, v, 1) for n in ("any", "all") for v in (X, WHOLE)),
    case(aten.softmax.int, CUBE, 1),
    case(aten.softmax.int, BRICK, -1),
    case(aten._softmax.default, X, -1, False),
    case(aten.log_softmax.int, X, 1),
    case(aten._log_softmax.default, X, 0, False),
    case(aten.logsumexp.default, X, [1]),
    *(case(aten.cumsum.default, v, d) for v, d in ((SUMMED, 1), (B, 0), (SUMMED_CUBE, 2))),
    case(aten.topk.default, FOUR, 2, 1),
    case(aten.topk.default, FOUR, 3, -1, False),
    case(aten.topk.default, X, 1, -1),
    case(aten.topk.default, X, WIDTH, -1),
    case(aten.sort.default, X, 0),
    case(aten.sort.stable, WHOLE, stable=True, dim=1, descending=True),
    case(aten.argsort.default, X, 1),
    case(aten.argsort.stable, WHOLE, stable=True, dim=0),
    case(aten.topk.default, CUBE, 2, 1),
    case(aten.sort.default, B, 1, True),
    case(aten.sort.default, Input(("m", "n")), 1),
    *(case(aten.histc.default, v, 4, 0, 3) for v in (X, Input(("m",), FLOATS, 0, 3), SCALAR)),
    case(aten.histc.default, CUBE, 7, -3.5, 2),
    case(aten.empty_like.default, WHOLE),
    case(aten.new_empty.default, X, [Size(0), 2], dtype=INTEGERS),
    case(aten.index_put.default, FOUR, [None, ONCE], Input(("m", 3))),
    case(aten.index_put.default, CUBE, [None, ONCE], SCALAR),
    case(aten.index_put.default, FOUR, [Input(("n",), INTEGERS, 0, 0), Input(("n",), INTEGERS, -4, 3)], SCALAR),
    case(aten.index_put.default, FOUR, [None, Input(("n",), INTEGERS, -4, 3)], Input(("n",)), True),
    case(
        aten.index_put.default,
        Input((3, "m", 4)),
        [Input((5,), INTEGERS, 0, 2), None, Input((5,), INTEGERS, 0, 3)],
        Input((5, 1)),
        True,
    ),
    *(
        case(aten.index_add.default, SUMMED_FOUR, 1, Input((6,), INTEGERS, 0, 3), replace(SUMMED, shape=("m", 6)), **k)
        for k in ({}, {"alpha": 2})
    ),
    case(aten.index_add.default, Input((7, "m", 2)), 0, Input(("n",), INTEGERS, 0, 6), Input(("n", "m", 2))),
    case(aten.index_copy.default, CUBE, 1, ONCE, Input(("m", 3, "n"))),
    *(case(aten.scatter.value, v, 1, Input(("m", 2), INTEGERS, 0, 3), 1.5) for v in (FOUR, Input(("m", 4), INTEGERS))),
    case(aten.scatter.src, FOUR, 1, Input((1, 1), INTEGERS, 0, 3), FOUR),
    case(aten.scatter_add.default, SUMMED_FOUR, -1, Input(("m", 6), INTEGERS, 0, 3), replace(SUMMED, shape=("m", 7))),
    case(aten.gather.default, FOUR, 1, Input(("m", 2), INTEGERS, 0, 3)),
    case(aten.index.Tensor, FOUR, [None, Input((3,), INTEGERS, -4, 3)]),
    case(aten.index.Tensor, FOUR, [Input(("n", 1), INTEGERS, -1, 0), Input((2,), INTEGERS, -4, 3)]),
    case(aten.index.Tensor, Input((3, "m", 4)), [Input((2,), INTEGERS, 0, 2), None, Input((2,), INTEGERS, 0, 3)]),
    case(aten.index_select.default, FOUR, 1, Input(("n",), INTEGERS, 0, 3)),
    case(aten.embedding.default, Input((9, 4)), Input(("m", "n"), INTEGERS, 0, 8)),
    case(aten.embedding.default, Input((9, 4)), Input(("m",), INTEGERS, 0, 8), 2, True, True),
    *(case(aten.layer_norm.default, SUMMED, [WIDTH], *rest) for rest in ((), (ROW,), (ROW, ROW), (None, ROW))),
    case(aten.rms_norm.default, SUMMED, [WIDTH], ROW, 1e-5),
    case(aten.rms_norm.default, SUMMED, [WIDTH]),
    case(aten.linear.default, replace(SUMMED, shape=("m", "n", WIDTH)), replace(SUMMED, shape=(5, WIDTH)), Input((5,))),
    case(aten.matmul.default, SUMMED_CUBE, replace(SUMMED, shape=("n", 3))),
    case(aten.mm.default, SUMMED, replace(SUMMED, shape=(WIDTH, "n"))),
    case(aten.bmm.default, replace(SUMMED, shape=(2, "m", 3)), replace(SUMMED, shape=(2, 3, "n"))),
    case(aten.addmm.default, Input((5,)), SUMMED, replace(SUMMED, shape=(WIDTH, 5))),
    case(aten.new_zeros.default, X, [Size(0, 2)]),
    *(Case(target, args, {}, is_complex=True) for target, args in GIVING_COMPLEX),
    case(aten.view_as_real.default, COMPLEX),
]
"""Calls of every operator that has a translation, and of some that are made of others."""

ON_SIZES = {operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, torch.sym_max, torch.sym_min}
"""Arithmetic on sizes: :func:`test_sizes_are_computed_as_in_python`."""

IMPLIED = {operator.getitem, operator.add, aten.sym_size.int, aten.sym_numel.default}
"""What other cases are made with."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[..., tuple[Graph, Callable[..., Any]]]:
    """Some cases, compiled as one program; the widths of all take ``turn`` steps."""
    known: dict[tuple[int, int], Any] = {}

    def get(number: int, turn: int = 0) -> tuple[Graph, Callable[..., Any]]:
        if (number, turn) not in known:
            places = range(number * TOGETHER, min((number + 1) * TOGETHER, len(CASES)))
            graph = Graph([CASES[i].at(WIDTHS[(i + turn) % len(WIDTHS)]) for i in places])
            run = run_natively(graph.module, graph.inputs, tmp_path_factory.mktemp("graph"))
            known[number, turn] = graph, run
        return known[number, turn]

    return get


def test_every_translation_of_torchs_operators_has_a_case():
    theirs = {o.target for o in operators.operators() if o.translate is not None and not o.name.startswith("lbllm")}
    missing = theirs - {c.target for c in CASES} - ON_SIZES - IMPLIED
    assert not missing, f"no case calls {sorted(map(str, missing))}"


def held(way: str, first: list[float], found: list[list[float]]) -> bool:
    """Whether results have the elements of a first argument, all of which are different, as ``moves`` says."""
    together = list(itertools.chain(*found))
    if way == "splits":
        return sorted(together) == first
    if way == "permutes":
        return len(found) == 1 and sorted(together) == first
    if way == "repeats":
        return len(found) == 1 and set(together) == set(first)
    if way == "selects":
        return len(found) == 1 and len(set(together)) == len(together) and set(together) <= set(first)
    return found == [first]


MOVING = [c.at(WIDTHS[0]) for c in CASES if (known := operators.find(c.target)) is not None and known.moves]


def test_operators_move_elements_as_they_say():
    assert {operators.find(c.target).moves for c in MOVING} == set(typing.get_args(registry.Way))
    for called in MOVING:
        graph = Graph([called])
        (_, first), *others = graph.inputs
        if first.dtype in (BOOLS, torch.int8, torch.uint8):
            continue
        shape = first.draw(SIZES, torch.Generator()).shape
        different = torch.arange(math.prod(shape), dtype=first.dtype).reshape(shape)
        results = graph.module(different, *(i.draw(SIZES, torch.Generator()) for _, i in others))
        found = [result.flatten().tolist() for result in results]
        assert held(operators.find(called.target).moves, different.flatten().tolist(), found), called


NUMBERS = range(math.ceil(len(CASES) / TOGETHER))
SOME = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DRAWN = given(m=st.integers(1, 40), n=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("number", NUMBERS)
@SOME
@DRAWN
def test_translations_give_what_torch_gives(compiled, number, m, n, seed):
    graph, run = compiled(number)
    check(graph, run, {"m": m, "n": n}, seed)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(1, len(WIDTHS)))
@pytest.mark.parametrize("number", NUMBERS)
@SOME
@DRAWN
def test_translations_give_what_torch_gives_in_every_width(compiled, number, turn, m, n, seed):
    graph, run = compiled(number, turn)
    check(graph, run, {"m": m, "n": n}, seed)


def _composed(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Calls that together are another one, or nothing, of real numbers.

    A difference of products is none of them: a program may round a product and a sum once.
    """

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return x.graph.call_function(target, args)

    total = call(aten.add.Tensor, x, y)
    comparisons = [call(target.Tensor, x, y) for target in (aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne)]
    return [
        *(call(aten.logical_not.default, c) for c in comparisons),
        *(call(aten.where.self, call(aten.logical_not.default, c), x, y) for c in comparisons),
        *(call(aten.logical_or.default, *comparisons[i : i + 2]) for i in (2, 4)),
        call(aten.logical_or.default, comparisons[0], comparisons[3]),
        *(call(target.Tensor, x, x) for target in (aten.sub, aten.div, aten.eq, aten.ne, aten.le, aten.lt)),
        call(aten.abs.default, call(aten.sub.Tensor, x, x)),
        call(aten.sub.Tensor, total, call(aten.add.Tensor, x, y)),
        call(aten.sub.Tensor, x, call(aten.sub.Tensor, x, y)),
        call(aten.lt.Tensor, call(aten.add.Tensor, x, y), x),
        *(call(aten.mul.Tensor, v, 0.0) for v in (x, total)),
        call(aten.add.Tensor, y, call(aten.mul.Tensor, x, 0)),
        call(aten.div.Tensor, call(aten.mul.Tensor, x, 0.0), x),
        call(aten.mul.Tensor, call(aten.reciprocal.default, x), 0.0),
    ]


def test_floats_are_no_real_numbers(tmp_path):
    """Where loops are joined, nothing is simplified that holds for real numbers alone."""
    graph = fx.Graph()
    graph.output(_composed(graph.placeholder("x"), graph.placeholder("y")))
    module = fx.GraphModule(torch.nn.Module(), graph)
    run = run_natively(module, [("x", Input(("m",))), ("y", Input(("m",)))], tmp_path)
    values = torch.tensor([*EXTREMES[FLOATS], 1.5, -2.5])
    x, y = (part.contiguous() for part in torch.cartesian_prod(values, values).unbind(1))
    wrong = [
        node.format_node()
        for node, ours, theirs in zip(graph.output_node().args[0], run(x, y), module(x, y), strict=True)
        if not torch.allclose(ours.float(), theirs.float(), equal_nan=True)
    ]
    assert not wrong


def test_sizes_are_computed_as_in_python(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(operator.add, (graph.call_function(aten.sym_size.int, (x, 0)), 20))
    results = []
    for function in sorted(ON_SIZES, key=str):
        operands = (size,) if function is operator.neg else (size, 3)
        value = graph.call_function(operator.add, (graph.call_function(function, operands), 100))
        value = graph.call_function(torch.sym_max, (value, 0))  # a size, whatever m is
        results.append(graph.call_function(aten.new_ones.default, (x, [value])))
    results.append(graph.call_function(aten.new_ones.default, (x, [graph.call_function(aten.sym_numel.default, (x,))])))
    graph.output(results)
    module = fx.GraphModule(torch.nn.Module(), graph)
    run = run_natively(module, [("x", FOUR)], tmp_path)
    for m in (1, 7, 50):
        given = FOUR.draw({"m": m}, torch.Generator().manual_seed(0))
        assert [r.shape for r in run(given)] == [r.shape for r in module(given)]


def test_nan_and_extremes_are_torchs(tmp_path):
    x, whole = Input(("m",)), Input(("m",), torch.int8)
    unary = ("isnan", "isinf", "isfinite", "relu", "erf", "exp", "tanh", "sigmoid")
    calls = [case(getattr(aten, name).default, x) for name in unary]
    calls += [case(aten.clamp.default, x, -1, 1), case(aten.maximum.default, x, SCALAR)]
    calls += [case(aten.minimum.default, SCALAR, x), case(aten.nan_to_num.default, x, 5.0, 6.0, 7.0)]
    calls += [case(target, whole, 7) for target in (aten.remainder.Scalar, aten.fmod.Scalar)]
    calls += [case(target, whole, -128) for target in (aten.remainder.Scalar, aten.fmod.Scalar)]
    graph = Graph(calls)
    run = run_natively(graph.module, graph.inputs, tmp_path)
    floats = torch.tensor([1, math.nan, -3, math.inf, -math.inf, math.nan, 0.0])
    numbers = torch.tensor([-128, -127, -1, 0, 1, 100, 127], dtype=torch.int8)
    given = [numbers if i.dtype == torch.int8 else floats if i.shape else torch.tensor(0.5) for _, i in graph.inputs]
    for called, ours, theirs in zip(calls, run(*given), graph.module(*given), strict=True):
        bound = TOLERANCE if ours.dtype.is_floating_point else 0.0
        if called.target is aten.exp.default:
            ours, theirs = ours[floats.isnan()], theirs[floats.isnan()]
        torch.testing.assert_close(
            ours, theirs, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, c=called: f"{c.target}: {m}"
        )


def test_an_index_outside_reads_the_nearest_row(tmp_path):
    """torch raises; a program that cannot must not read what is not the table's."""
    graph = Graph([case(aten.embedding.default, Input((9, 4)), Input(("m",), INTEGERS, 0, 8))])
    run = run_natively(graph.module, graph.inputs, tmp_path)
    table, ids = torch.randn(9, 4), torch.tensor([-5, 9, 1 << 40, 3])
    assert torch.equal(run(table, ids)[0], table[[0, 8, 8, 3]])


def test_sines_of_numbers_with_a_half_are_torchs(tmp_path):
    """Positions times a number that is none of their type: of the type that torch gives them, not of the tensor's."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    results = []
    for target, operand in (
        (aten.mul.Tensor, 0.5),
        (aten.add.Tensor, 0.5),
        (aten.div.Tensor, 2),
        (aten.div.Tensor, 0.5),
    ):
        value = graph.call_function(target, (x, operand))
        results += [value, graph.call_function(aten.sin.default, (value,))]
    graph.output(results)
    module = fx.GraphModule(torch.nn.Module(), graph)
    for dtype in (INTEGERS, torch.int32, torch.int8):
        given = Input(("m",), dtype, 0, 100)
        run = run_natively(module, [("x", given)], tmp_path / str(dtype))
        numbers = given.draw({"m": 23}, torch.Generator().manual_seed(0))
        for ours, theirs in zip(run(numbers), module(numbers), strict=True):
            assert ours.dtype == theirs.dtype == FLOATS
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


TABLE, AXIS, ALONG = Input((4, 3)), Input(("m",), INTEGERS, 0, 3), Input(("m", 3), INTEGERS, 0, 3)
PAIR = [Input((3,), INTEGERS, 0, 3), Input((3,), INTEGERS, 0, 3)]
OUTSIDE = [
    case(aten.index_select.default, TABLE, 0, AXIS),
    case(aten.gather.default, TABLE, 0, ALONG),
    case(aten.index.Tensor, TABLE, [AXIS]),
    case(aten.index.Tensor, Input((4, 4)), PAIR),
    *(case(aten.index_put.default, TABLE, [AXIS], Input(("m", 3)), adds) for adds in (False, True)),
    *(case(aten.index_put.default, Input((4, 4)), PAIR, Input((3,)), adds) for adds in (False, True)),
    case(aten.index_add.default, TABLE, 0, AXIS, Input(("m", 3))),
    case(aten.index_copy.default, TABLE, 0, AXIS, Input(("m", 3))),
    case(aten.scatter.value, TABLE, 0, ALONG, 1.5),
    case(aten.scatter.src, TABLE, 0, ALONG, Input(("m", 3))),
    case(aten.scatter_add.default, TABLE, 0, ALONG, Input(("m", 3))),
]
"""A call of each operator that looks into a dimension of 4 where other tensors say."""


def test_every_operator_that_takes_indices_is_held_to_stay_inside():
    assert set(indexing._TRANSLATIONS) - {aten.embedding.default} == {c.target for c in OUTSIDE}


def test_indices_outside_read_and_write_the_nearest_places_inside(tmp_path):
    """torch raises; a program that cannot must neither read nor write what is not the tensor's."""
    graph = Graph(OUTSIDE)
    run = run_natively(graph.module, graph.inputs, tmp_path)
    for indices, others in (([-5, 4, 2], [9, -6, 1]), ([-(1 << 40), 1 << 40, 1], [2, 1 << 62, -(1 << 62)])):
        given, nearest = graph.draw({"m": 3}, 0), []
        for (_, described), tensor in zip(graph.inputs, given, strict=True):
            if described.dtype == INTEGERS:
                chosen = others if described is PAIR[1] else indices
                tensor.copy_(torch.tensor(chosen).reshape(3, *[1] * (tensor.dim() - 1)).expand_as(tensor))
                tensor = tensor.clamp(0, 3)
            nearest.append(tensor)
        for called, ours, theirs in zip(OUTSIDE, run(*given), graph.module(*nearest), strict=True):
            said = f"{called.target} of {indices}: "
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m, said=said: said + m)


def test_a_size_that_no_shape_of_a_kernel_tells_reaches_it(tmp_path):
    """What uses a dynamic size as a number may read and write tensors of fixed shapes only."""
    graph = fx.Graph()
    x, fixed = graph.placeholder("x"), graph.placeholder("fixed")
    m, n = (graph.call_function(aten.sym_size.int, (x, d)) for d in (0, 1))
    calls = [
        graph.call_function(aten.roll.default, (fixed, [m], [1])),
        graph.call_function(aten.roll.default, (fixed, [n, m], [0, 1])),
        graph.call_function(aten.roll.default, (fixed, [graph.call_function(operator.mul, (m, 3))])),
        graph.call_function(aten.mul.Tensor, (fixed, m)),
        graph.call_function(aten.add.Tensor, (graph.call_function(aten.sum.default, (fixed,)), n)),
        graph.call_function(aten.full.default, ([2, 3], m)),
        graph.call_function(aten.scalar_tensor.default, (n,)),
        graph.call_function(aten.lt.Scalar, (fixed, m)),
        graph.call_function(aten.sigmoid.default, (graph.call_function(aten.div.Tensor, (fixed, m)),)),
    ]
    graph.output(calls)
    module = fx.GraphModule(torch.nn.Module(), graph)
    inputs = [("x", Input(("m", "n"))), ("fixed", Input((3, 4)))]
    run = run_natively(module, inputs, tmp_path)
    for sizes in ({"m": 1, "n": 1}, {"m": 2, "n": 7}, {"m": 50, "n": 3}):
        given = [i.draw(sizes, torch.Generator().manual_seed(0)) for _, i in inputs]
        for actual, expected in zip(run(*given), module(*given), strict=True):
            torch.testing.assert_close(actual, expected)


PLACES = Input((6,), INTEGERS, 0, 3)

UNSURE = [
    case(aten.expand.default, Input(("m", "n")), [5, 3]),
    case(aten.expand_as.default, FOUR, Input((5, 4))),
    case(aten.copy.default, FOUR, Input((5, 4))),
    case(aten.add.Tensor, FOUR, Input((5, 4))),
    case(aten.matmul.default, Input((2, "n")), Input((3, 2))),
    case(aten.mm.default, Input(("m", "n")), Input((3, 2))),
    case(aten.bmm.default, Input(("m", 2, 3)), Input((5, 3, 4))),
    case(aten.linear.default, Input(("m", "n")), Input((5, 3))),
    case(aten.layer_norm.default, Input(("m", "n")), [3]),
    case(aten.rms_norm.default, Input(("m", "n")), [3]),
    case(aten.view.default, FOUR, [10, 2]),
    case(aten.reshape.default, FOUR, [5, -1]),
    case(aten.view_as.default, FOUR, Input((5, 2, 2))),
    case(aten.cat.default, [FOUR, Input((5, 4))], 1),
    case(aten.stack.default, [FOUR, Input((5, 4))]),
    case(aten.narrow.default, FOUR, 0, 1, 2),
    case(aten.new_zeros.default, FOUR, [Size(0, -3)]),
    case(aten.repeat.default, FOUR, [Size(0, -3), 1]),
    case(aten.constant_pad_nd.default, FOUR, [0, 0, 0, -3]),
    case(aten.gather.default, FOUR, 1, Input((5, 2), INTEGERS, 0, 3)),
    case(aten.gather.default, Input(("m", "n")), 0, Input((2, 3), INTEGERS, 0, 1)),
    case(aten.scatter.value, FOUR, 1, Input((5, 2), INTEGERS, 0, 3), 1.5),
    case(aten.scatter.src, FOUR, 1, Input(("m", 3), INTEGERS, 0, 3), Input((5, 3))),
    case(aten.scatter_add.default, FOUR, 1, Input(("m", 6), INTEGERS, 0, 3), Input((5, 6))),
    case(aten.index_add.default, FOUR, 1, PLACES, Input((5, 6))),
    case(aten.index_add.default, FOUR, 1, Input(("n",), INTEGERS, 0, 3), Input(("m", 3))),
    case(aten.index_copy.default, CUBE, 1, ONCE, Input(("m", 3, 3))),
    case(aten.index_put.default, FOUR, [None, PLACES], Input((5, 6))),
    case(aten.index.Tensor, FOUR, [Input(("n",), INTEGERS, 0, 0), Input((3,), INTEGERS, 0, 3)]),
]
"""Calls that torch makes for :data:`SIZES`, and not for every other size."""


@pytest.mark.parametrize("number", range(len(UNSURE)))
def test_sizes_that_do_not_surely_agree_are_refused(number):
    """torch looks when it runs, and raises; a program would read what is not the tensor's."""
    graph = Graph([UNSURE[number]])
    specs = [TensorSpec(name, i.shape, str(i.dtype).removeprefix("torch.")) for name, i in graph.inputs]
    with pytest.raises(UntranslatableError, match=r"cannot be (told|solved)"):
        translate_graph(Program(graph.module, "module"), KERNELS, specs)


def test_a_place_of_what_may_be_empty_is_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    others = graph.call_function(aten.slice.Tensor, (x, 0, 1, 1 << 40))
    graph.output(graph.call_function(aten.select.int, (others, 0, 0)))
    program = Program(fx.GraphModule(torch.nn.Module(), graph), "module")
    with pytest.raises(UntranslatableError, match="cannot be told"):
        translate_graph(program, KERNELS, [TensorSpec("x", ("m", 4), "float32")])


def test_sizes_are_compared_whatever_the_order_of_their_factors():
    batch, length = (symbolic_dimension(name) for name in ("batch", "length"))
    ours, theirs = batch * length, length * batch
    assert all(map(surely_true, (ours == theirs, ours <= theirs, ours >= theirs)))
    assert not any(map(surely_true, (ours < theirs, ours > theirs, ours <= length)))


def test_a_size_is_divided_by_a_factor_of_it():
    batch, length = (symbolic_dimension(name) for name in ("batch", "length"))
    assert quotient(12, 4) == 3 and quotient(12, 5) is None and quotient(12, 0) is None
    assert surely_equal(quotient(length * batch * 4 * 72, 4 * 72), batch * length)
    assert surely_equal(quotient((length + 1) * batch * 6, batch * 2), 3 * length + 3)
    assert quotient(batch * 6, length * 2) is None and quotient(batch * 6, batch + 1) is None
