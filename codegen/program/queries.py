"""Questions to Relax functions and TIR kernels, and small changes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ..tvm_api import s_tir, tirx, tvm


def is_call(value: Any, name: str) -> bool:
    """Whether a value is a call of Relax's operator of that name."""
    return isinstance(value, tvm.ir.Call) and getattr(value.op, "name", "") == name


def called_kernel(value: Any) -> str:
    """Name of the TIR function that a value is a call of; nothing where it is no such call."""
    return value.args[0].name_hint if is_call(value, "relax.call_tir") else ""


def bindings(function: Any) -> Iterator[Any]:
    """The bindings of a Relax function in order."""
    return itertools.chain.from_iterable(block.bindings for block in function.body.blocks)


def has_parallel_loop(statement: Any) -> bool:
    """Whether a kernel's body shares work among threads."""
    return any(isinstance(s, tirx.For) and s.kind == tirx.ForKind.PARALLEL for s in _top_statements(statement))


def _top_statements(statement: Any) -> Iterator[Any]:
    """The statements that a body runs in sequence, within blocks and attributes but not within loops."""
    if isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            yield from _top_statements(part)
    elif isinstance(statement, tirx.AttrStmt):
        yield from _top_statements(statement.body)
    elif isinstance(statement, s_tir.SBlockRealize):
        yield from _top_statements(statement.block.body)
    else:
        yield statement


def surely_equal(a: Any, b: Any) -> bool:
    """Whether two sizes, ints or expressions over symbols, are equal whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    analyzer: Any = tvm.sym.Analyzer()
    return bool(analyzer.can_prove_equal(a, b))


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are surely equal."""
    return len(a) == len(b) and all(map(surely_equal, a, b))


def elements(shape: Any) -> Any:
    """How many elements a tensor of that shape has."""
    count: Any = 1
    for size in shape:
        count = tirx.Cast("int64", size) * count if not isinstance(size, int) else size * count
    return count


def with_block(block: Any, body: Any, memory: Sequence[Any]) -> Any:
    """A TIR block with another body and other buffers of its own.

    It no longer says what it reads and writes, which nothing asks for behind scheduling.
    """
    return s_tir.SBlock(
        block.iter_vars, [], [], block.name_hint, body, block.init, memory, block.match_buffers, block.annotations
    )
