"""The arguments of a call by the names of its operator's schema, however they were given."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

_REQUIRED = object()

_PAIR = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, torch.sym_max, torch.sym_min)

_FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    operator.getitem: ("value", "index"),
    operator.neg: ("value",),
    **dict.fromkeys(_PAIR, ("a", "b")),
}
"""Names of the arguments of functions that have no schema."""


class Arguments:
    """A call's arguments as attributes; one that was not given has the schema's default.

    Example::

        group = Arguments(node).group

    Args:
        node: an ``fx.Node`` that calls an operator.
        read: what to make of an argument when it is asked for; as it stands in the graph by default.

    Raises:
        AttributeError: the operator has no argument of that name.
        TypeError: an argument is given that the operator does not take.
    """

    __slots__ = ("_read", "_values", "node")

    def __init__(self, node: Any, read: Callable[[Any], Any] | None = None):
        names = parameters(node.target)
        if len(node.args) > len(names) or not names.keys() >= node.kwargs.keys():
            raise TypeError(f"'{node.name}' has arguments that {node.target} does not take")
        self.node = node
        self._read = read
        self._values = {**names, **dict(zip(names, node.args, strict=False)), **node.kwargs}

    def __getattr__(self, name: str) -> Any:
        try:
            value = self._values[name]
        except KeyError:
            raise AttributeError(f"{self.node.target} has no argument '{name}'") from None
        if value is _REQUIRED:
            raise AttributeError(f"'{self.node.name}' lacks the argument '{name}' of {self.node.target}")
        return value if self._read is None else self._read(value)

    def __contains__(self, name: str) -> bool:
        """Whether the operator has an argument of that name."""
        return name in self._values

    @property
    def graph(self) -> Arguments:
        """The arguments as they stand in the graph."""
        return Arguments(self.node)

    def through(self, change: Callable[[Any], Any]) -> Arguments:
        """The same arguments, each changed as it is read."""
        read = self._read
        return Arguments(self.node, change if read is None else lambda value: change(read(value)))

    def pick(self, *names: str) -> list[Any]:
        """Several arguments in the order of ``names``."""
        return [getattr(self, name) for name in names]


@functools.cache
def parameters(target: Callable[..., Any]) -> dict[str, Any]:
    """Names of an operator's arguments in order, each with its default.

    Raises:
        TypeError: the target is no operator whose arguments have names.
    """
    if isinstance(target, torch._ops.OpOverload):
        return {a.name: a.default_value if a.has_default_value() else _REQUIRED for a in target._schema.arguments}
    if target in _FUNCTIONS:
        return dict.fromkeys(_FUNCTIONS[target], _REQUIRED)
    raise TypeError(f"the arguments of {target} have no names")


@functools.cache
def changed(target: torch._ops.OpOverload) -> tuple[str, ...]:
    """Names of the tensors that an operator changes in place."""
    return tuple(a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def first_argument(node: Any) -> Any:
    """The argument that the operator's schema names first, as it stands in the graph.

    An operator that may do nothing gives that back then; a linear multiplies it by its weight.
    """
    return getattr(Arguments(node), next(iter(parameters(node.target))))


def set_argument(node: Any, name: str, value: Any) -> None:
    """Gives a call another value for the argument of that name."""
    position = [*parameters(node.target)].index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
