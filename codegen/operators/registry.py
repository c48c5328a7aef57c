"""What is known of an operator, and where it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

import torch

from ..errors import LbllmError
from ..installed import OPERATORS
from .arguments import Arguments
from .translator import Translation

NAMESPACE = "lbllm"
"""The namespace of operators that :func:`define` makes."""

Verification = Callable[[Arguments], None]
"""Raises :class:`OperatorError` where arguments are not what an operator takes.

Tensors may be fake ones, of which only shape and dtype are known.
"""


Way = Literal["aliases", "copies", "reshapes", "permutes", "repeats", "selects", "splits"]
"""What an operator that computes nothing does with the elements of its first argument.

It gives them as they are, in the same memory or in its own; in the same order under other sizes; in another order; each
one or more times; some of them; or all of them as several tensors.
"""


class OperatorError(LbllmError):
    """A call has arguments that its operator does not take."""


@dataclass(frozen=True)
class Operator:
    """An operator.

    Attributes:
        target: what a graph's node calls: an overload of ``torch.ops``, or a function.
        translate: makes a call part of a program; None where no program can hold it.
        on_complex: the same for a call with complex numbers among its arguments (:class:`.translator.Complex`).
        verify: checks the arguments of a call.
        simulates: it stands for integer arithmetic and is computed in floats; none is left in a lowered graph.
        integer: it takes or gives quantized values; ``lower`` makes it.
        kernel: in a compiled model it only ever runs as a proven kernel, never as its slow reference.
        updates: names of the arguments that are state, which it changes in place.
        moves: the way in which it moves the elements of its first argument; None where it gives anything else.
    """

    target: Callable[..., Any]
    translate: Translation | None = None
    verify: Verification | None = None
    simulates: bool = False
    integer: bool = False
    kernel: bool = False
    updates: tuple[str, ...] = ()
    on_complex: Translation | None = None
    moves: Way | None = None

    @property
    def name(self) -> str:
        """What it is called in a stored graph, e.g. ``aten.add.Tensor`` or ``operator.mul``."""
        if isinstance(self.target, torch._ops.OpOverload):
            return str(self.target)
        return f"{self.target.__module__.removeprefix('_')}.{self.target.__name__}"


_registered: dict[Callable[..., Any], Operator] = {}
_library = torch.library.Library(NAMESPACE, "DEF")


def register(operator: Operator) -> Operator:
    """Makes an operator known.

    Raises:
        ValueError: its target is known already.
    """
    if operator.target in _registered:
        raise ValueError(f"the operator {operator.name} is registered already")
    _registered[operator.target] = operator
    return operator


def define(schema: str, *, reference: Callable[..., Any], shape: Callable[..., Any] | None, **facts: Any) -> Operator:
    """Makes a new operator ``lbllm::NAME``, for torch and for graphs.

    Args:
        schema: torch's, without the namespace, e.g. ``"double(Tensor x) -> Tensor"``.
        reference: what it computes, exactly; its eager implementation on every device.
        shape: the same on fake tensors: shapes and dtypes alone. None for a reference that torch itself takes apart
            into its own operators, to differentiate it and to find shapes.
        facts: see :class:`Operator`.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    if shape is None:
        _library.impl(name, reference, "CompositeImplicitAutograd")
    else:
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=_library)
    return register(Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, **facts))


def find(target: Any) -> Operator | None:
    """What is known of a node's target."""
    return _registered.get(target)


def named(name: str) -> Operator | None:
    """The ``lbllm`` operator of a name, e.g. ``lbllm.bit_linear.default``; None where there is none.

    One that is not known yet is looked for among those that installed packages define.

    Raises:
        OperatorError: the module that defines it cannot be imported.
    """
    known = {operator.name: operator for operator in operators()}
    if name not in known:
        short = name.removeprefix(f"{NAMESPACE}.").partition(".")[0]
        for point in entry_points(group=OPERATORS, name=short):
            try:
                point.load()
            except Exception as error:
                raise OperatorError(f"the operator '{short}' ({point.value}) cannot be imported: {error}") from error
        known = {operator.name: operator for operator in operators()}
    return known.get(name)


def operators() -> Iterator[Operator]:
    """Every operator that is known."""
    yield from _registered.values()
