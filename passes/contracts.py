"""Checks after every pass: the graph is well formed, its shapes propagate, and the numeric contract holds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..codegen import operators as operators
from ..codegen.errors import LbllmError, first_line
from ..codegen.operators import Arguments
from ..codegen.operators.arguments import changed
from ..codegen.operators.checks import check_types, require
from ..codegen.operators.registry import OperatorError
from .base import Pass, PassError
from .ir import compare, dump, exact, parting, sizes
from .ir.compare import relative_error
from .ir.parting import Parting, first_output
from .ir.program import IN_FEATURES, Program
from .ir.rewrite import computed

_fake_log = logging.getLogger("torch._subclasses.fake_tensor")


class ContractError(LbllmError):
    """A pass produced a graph that does not hold together or changed outputs more than it promised.

    ``str(error)`` is one sentence; ``error.excerpt`` has the graph text around the offending node; ``error.parting``
    has the smallest piece of both programs that shows a change of outputs, None where none could be cut.
    """

    exit_code = 1

    def __init__(self, message: str, excerpt: str = "", parting: Parting | None = None):
        super().__init__(message)
        self.excerpt = excerpt
        self.parting = parting


class ReplacementError(PassError):
    """What a pass put in the place of a node gives something else.

    ``error.parting`` has the piece of both programs, None where none could be cut.
    """

    def __init__(self, message: str, parting: Parting | None):
        super().__init__(message)
        self.parting = parting


def check_structure(item: Pass, program: Program, probe: Mapping[str, Any]) -> None:
    """Lints and recompiles the graph, then propagates fake tensors of the probe's shapes through it.

    Every operator verifies its arguments on the way. Every node's ``meta["shape"]`` is refreshed with its dtype and
    shape, sizes that inputs choose by name (:mod:`.ir.sizes`), e.g. ``f32[batch, length, 576]``.

    Raises:
        ContractError: naming the pass and the node.
    """
    try:
        program.graph.lint()
        program.module.recompile()
    except Exception as error:
        raise ContractError(f"the pass '{item.name}' left a malformed graph: {error}") from error
    propagation = Propagation(program.module)
    try:
        shapes = propagation.shapes(program, probe)
    except Exception as error:
        node = propagation.current
        what = f"shapes do not propagate at {describe(node)}: {first_line(error)}"
        if isinstance(error, OperatorError):
            what = str(error)  # which names the node
        raise ContractError(
            f"after the pass '{item.name}' {what}", dump.excerpt(program, node) if node is not None else ""
        ) from error
    names = sizes.choose(program, probe)
    others = _shapes_elsewhere(program, names)
    for node, text in shapes.items():
        node.meta["shape"] = names.text(text, others[node]) if names and node in others else text


def _shapes_elsewhere(program: Program, names: sizes.Names | None) -> Mapping[fx.Node, str]:
    """Dtypes and shapes for the inputs of other sizes, nothing for a graph that takes the probe's sizes alone.

    Such a graph holds as far as a pass is asked; where it is to be stored it is refused.
    """
    if names is None:
        return {}
    try:
        return Propagation(program.module).shapes(program, names.inputs)
    except Exception:
        return {}


class Propagation(fx.Interpreter):
    """Runs a graph on fake tensors, and verifies the arguments of every call; constants are given as they are.

    Attributes:
        current: the node it is at, or failed at.
        result: what the graph gives, tensors being fake.
        computed: bytes of all tensors that the graph makes.
    """

    current: fx.Node | None = None
    result: Any = None

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.extra_traceback = False  # torch would add to an error's message
        self.computed = 0
        self._shapes: dict[fx.Node, str] = {}
        self._given: list[FakeTensor] = []
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def shapes(self, program: Program, inputs: Mapping[str, Any]) -> dict[fx.Node, str]:
        """Dtype and shape of every tensor for inputs of these shapes.

        Raises:
            OperatorError: a call's arguments are not what its operator takes, or it would change an input or a weight;
                naming the node.
            Exception: what an operator raises.
        """
        with self._mode:  # so that a state is not made, either
            arguments = [self._fake(a) if isinstance(a, Tensor) else a for a in program.arguments(inputs)]
        self._given += [a for a in arguments if isinstance(a, FakeTensor)]
        # What fails is raised; torch would also log it, with a traceback.
        silenced, _fake_log.disabled = _fake_log.disabled, True
        try:
            with self._mode, torch.no_grad():
                self.result = self.run(*arguments)
        finally:
            _fake_log.disabled = silenced
        return self._shapes

    def _fake(self, tensor: Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor, static_shapes=True)

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        if isinstance(n.target, torch._ops.OpOverload):
            arguments = computed(n, self.env)
            # Values of constants are looked at, which a fake mode would not let.
            with unset_fake_temporarily():
                self._verify(arguments)
        value = super().run_node(n)
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise OperatorError(f"{describe(n)} gives an integer of more than 64 bits")
        if isinstance(value, Tensor):
            self._shapes[n] = dump.shape_text(value)
        if n.op == "get_attr" and isinstance(value, Tensor):
            self._given.append(self._fake(value))
        elif n.op == "call_function":
            self.computed += sum(t.numel() * t.element_size() for t in _tensors(value))
        return value

    def _verify(self, arguments: Arguments) -> None:
        node = arguments.node
        known = operators.find(node.target)
        if known is not None and known.verify is not None:
            check_types(arguments)
            known.verify(arguments)
        channeled = next((name for name in ("x", "values") if name in arguments), None)
        if channeled and known is not None and known.kernel and IN_FEATURES in node.meta:
            channels, told = getattr(arguments, channeled).shape[-1], node.meta[IN_FEATURES]
            require(channels == told, arguments, f"its input has {channels} channels, not {told}")
        for name in changed(node.target):
            if known is None or name not in known.updates:
                with self._mode:
                    storage = self._fake(getattr(arguments, name)).untyped_storage()._cdata
                kept = any(storage == given.untyped_storage()._cdata for given in self._given)
                require(not kept, arguments, f"{name}, which it changes, is an input or a weight")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors that an operator gave."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def probe_outputs(program: Program, probe: Mapping[str, Any]) -> Tensor:
    """The program's output on the probe batch, as float32, in the integer arithmetic it stands for."""
    return first_output(exact.run(program, probe))


def check_outputs(
    item: Pass, before: Program, after: Program, old: Tensor, new: Tensor, probe: Mapping[str, Any]
) -> float:
    """Measures a pass against its contract.

    Returns:
        The relative error on the probe.

    Raises:
        ContractError: the contract is broken; the message names the pass, the first node that differs and the line of
            the user's source it comes from.
    """
    error = relative_error(old, new)
    kind = item.contract.kind
    if kind == "calibrating":
        if error == float("inf"):
            found, failure = _cut(parting.find, before, after, probe, sys.float_info.max)
            raise ContractError(
                f"after the pass '{item.name}' the model's output on the probe is not finite", parting=found
            ) from failure
        return error
    allowed = 0.0 if kind == "exact" else item.contract.bound
    if error <= allowed:
        return error
    found, failure = _cut(parting.find, before, after, probe, min(allowed, item.contract.each))
    node = None if found is None else found.node if found.node.op != "output" else found.node.all_input_nodes[0]
    raise ContractError(
        f"the pass '{item.name}' promised {item.contract} but changed the probe's output by {error:.3g};"
        f" the first node that differs is {describe(node)}",
        dump.excerpt(after, node) if node is not None else "",
        found,
    ) from failure


def _cut(cut: Callable[..., Parting], *arguments: Any) -> tuple[Parting | None, Exception | None]:
    """The piece that shows a broken contract; or why none can be cut, which must not take the place of what is said of
    the contract: a program that a pass broke may do anything."""
    try:
        return cut(*arguments), None
    except Exception as failure:
        return None, failure


def check_replaced(
    before: Program,
    after: Program,
    replaced: Mapping[str, fx.Node],
    probe: Mapping[str, Any],
    bound: float,
    compared: Callable[[Tensor], Tensor] = lambda value: value,
) -> float:
    """Holds each replaced node against its replacement, on the same inputs (:mod:`.ir.compare`).

    Args:
        compared: the part of a value that counts: a selection of its elements.

    Returns:
        The largest relative error; 0 without a probe.

    Raises:
        ReplacementError: one is larger than ``bound``; the message names the node.
    """
    found = compare.errors(before, after, replaced, probe, compared)
    for name, error in found.items():
        if not error <= bound:
            node = next(n for n in before.graph.nodes if n.name == name)
            piece, failure = _cut(parting.at, before, after, name, replaced[name], probe, bound, compared)
            raise ReplacementError(
                f"{describe(node)} differs by {error:.2g} from what takes its place; report this", piece
            ) from failure
    return max(found.values(), default=0.0)


def describe(node: fx.Node | None) -> str:
    """A node for a message: its name, operation and the user's source line."""
    if node is None:
        return "an unknown node"
    line = dump.source_line(node)
    return f"'{node.name}' ({dump.target_text(node)}{', from ' + line if line else ''})"
