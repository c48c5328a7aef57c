"""What an operator's translation can ask for: the function that is being built, and the kernels it may call.

A translation gets the call's arguments by name, translated as they are asked for: tensors are values of the program,
sizes are integers or symbols, numbers stay numbers. It touches TVM through the translator alone, so that operators can
be known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import UntranslatableError
from .arguments import Arguments

Value = Any
"""A tensor of the program."""


@dataclass(frozen=True)
class Complex:
    """A tensor of complex numbers, which a program has as two.

    Attributes:
        real, imaginary: the parts, of one shape and dtype.
    """

    real: Value
    imaginary: Value


Size = Any
"""A dimension: an integer, or an expression over symbols."""


class Translator(Protocol):
    """Builds one function of a program.

    Attributes:
        op: the operators that values are made of (TVM's ``relax.op``).
        te: tensor expressions (TVM's ``te``), for what is no operator: see :meth:`compute`.
        tir: scalar expressions (TVM's ``tirx``), of which tensor expressions and sizes are made.
        kernels: the proven kernels.
        length: tokens of each sequence of a call, where that is known.
        rows: tokens of all sequences of a call, where that is known.
        blocks: the function runs in few launches.
    """

    op: Any
    te: Any
    tir: Any
    kernels: Any

    @property
    def length(self) -> int | None: ...

    @property
    def rows(self) -> int | None: ...

    @property
    def blocks(self) -> bool: ...

    def value(self, argument: Any) -> Any:
        """The translation of an argument of the graph."""
        ...

    def emit(self, expression: Any) -> Value:
        """The value of an expression.

        Operators of two operands require that their sizes surely agree; others rely on it (see :func:`ensure`).

        Raises:
            UntranslatableError: its operands do not fit each other, or not surely.
        """
        ...

    def compute(self, shape: Sequence[Size], element: Callable[..., Any], *values: Any) -> Value:
        """A tensor by its elements.

        Args:
            shape: its dimensions.
            element: gets the values, tensors as those of :attr:`te`, and gives a function of indices. Every size it
                computes with is one of a tensor's ``shape`` or a value.
            values: tensors and sizes.
        """
        ...

    def variable(self, x: Value) -> Value:
        """A value that any operator takes; only those of two operands take constants."""
        ...

    def constant(self, number: bool | int | float, dtype: str) -> Any:
        """A number as a tensor without dimensions."""
        ...

    def shape(self, x: Value) -> list[Size]:
        """The dimensions of a value."""
        ...

    def dtype(self, x: Value) -> str:
        """The dtype of a value, e.g. ``"float32"``."""
        ...

    def is_tensor(self, value: Any) -> bool:
        """Whether a translation is a tensor, and no size and no number."""
        ...

    def surely(self, condition: Any) -> bool:
        """Whether a comparison of sizes holds whatever the symbols are."""
        ...

    def quotient(self, a: Size, b: Size) -> Size | None:
        """A size divided by another one that surely is a factor of it; None where that cannot be told."""
        ...

    def reshape(self, x: Value, sizes: Sequence[Size]) -> Value:
        """A value in another shape.

        Raises:
            UntranslatableError: it has not surely as many elements.
        """
        ...

    def call(self, kernel: Any, arguments: Sequence[Value], *outputs: Any, by_rows: bool = False) -> Any:
        """Calls a kernel; ``outputs`` are shapes and dtypes of what it writes. Gives one value or a list.

        Raises:
            UntranslatableError: the sizes are not surely those that the kernel reads and writes.
        """
        ...

    def call_by_expert(
        self, kernel: Any, rows: Sequence[Value], matrices: Sequence[Value], offsets: Value, output: Any
    ) -> Value:
        """Calls a kernel of one matrix for stacked ones, on rows that are sorted by expert.

        Args:
            kernel: ``(*rows, *matrices, out)`` of one expert.
            rows: tensors ``[M, ...]``.
            matrices: tensors ``[E, ...]``.
            offsets: integers ``[E]``: where the rows of each expert end.
            output: shape ``[M, N]`` and dtype of the result; rows behind the last expert's are zero.
        """
        ...

    def mean_of_squares(self, x: Value) -> Value:
        """``mean(x * x)`` over the last dimension, which stays with size one."""
        ...

    def quantize(self, node: Any) -> list[Value]:
        """Translates a call of ``quantize_activation``: values and scales of the rows."""
        ...

    def linear(self, node: Any) -> Value:
        """Translates a call of a linear that runs as a kernel."""
        ...

    def add_to_linear(self, node: Any) -> Value | None:
        """An addition as part of the linear whose result it adds to; None where no linear waits for it."""
        ...


Translation = Callable[[Translator, Arguments], Any]
"""Makes a call part of a program."""


def refusal(arguments: Arguments, why: str) -> UntranslatableError:
    """The error of a call that no program can hold."""
    return UntranslatableError(why, arguments.node)


def ensure(t: Translator, what: str, *conditions: Any) -> None:
    """Requires that comparisons of sizes hold in every call: torch looks when it runs, which a program cannot.

    Raises:
        UntranslatableError: one does not surely hold; naming ``what`` cannot be told.
    """
    if not all(t.surely(condition) for condition in conditions):
        raise UntranslatableError(f"it cannot be told that {what}")


def broadcast(t: Translator, x: Value, sizes: Sequence[Size]) -> Value:
    """A value of these sizes: dimensions that it lacks in front are new ones, and one element is as many as needed.

    Raises:
        UntranslatableError: another dimension is not surely of its size.
    """
    old = t.shape(x)
    what = f"a tensor of {old} repeats to one of {list(sizes)}"
    ensure(t, what, len(old) <= len(sizes))
    for size, own in zip(sizes, [1] * (len(sizes) - len(old)) + old, strict=True):
        ensure(t, what, size >= 0 if isinstance(own, int) and own == 1 else size == own)
    return t.emit(t.op.broadcast_to(x, list(sizes)))


def permuted(t: Translator, x: Value, axes: Sequence[int]) -> Value:
    """A value with its dimensions in another order."""
    return t.emit(t.op.permute_dims(x, list(axes))) if list(axes) != sorted(axes) else x


def flat(t: Translator, x: Value) -> tuple[Value, list[Size], Size]:
    """A value as ``[M, K]``, its leading dimensions, and ``M``."""
    *leading, width = t.shape(x)
    count: Any = 1
    for size in leading:
        count = size if isinstance(count, int) and count == 1 else count * size
    return t.reshape(x, [count, width]), leading, count
