"""Questions to Relax functions and TIR kernels, and small changes of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..tvm_api import relax, s_tir, tirx, tvm, tvm_ffi

MOST_SIZE = 1 << 40
"""More than any size is."""

MOST_PRODUCTS = 64
"""Sizes of more products than this are not compared as sums of them."""


def is_call(value: Any, name: str) -> bool:
    """Whether a value is a call of Relax's operator of that name."""
    return isinstance(value, tvm.ir.Call) and getattr(value.op, "name", "") == name


def called_kernel(value: Any) -> str:
    """Name of the TIR function that a value is a call of; nothing where it is no such call."""
    return value.args[0].name_hint if is_call(value, "relax.call_tir") else ""


def bindings(function: Any) -> Iterator[Any]:
    """The bindings of a Relax function in order."""
    return itertools.chain.from_iterable(block.bindings for block in function.body.blocks)


def operations(part: Any) -> int:
    """How many operations, numbers, variables and loads an expression or a statement has, indices included."""
    found: list[Any] = []
    tvm_ffi.structural_walk(part, (tvm.ir.Expr, found.append))
    return len(found)


def has_parallel_loop(statement: Any) -> bool:
    """Whether a kernel's body shares work among threads."""
    found = []

    def look(loop: Any) -> None:
        found.append(loop.kind == tirx.ForKind.PARALLEL)

    tvm_ffi.structural_walk(statement, (tirx.For, look))
    return any(found)


def surely_equal(a: Any, b: Any) -> bool:
    """Whether two sizes, ints or expressions over symbols, are equal whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    analyzer: Any = tvm.sym.Analyzer()
    return _same_sum(a, b) or bool(analyzer.can_prove_equal(a, b))


def _same_sum(a: Any, b: Any) -> bool:
    """Whether two sizes are the same sum of products, which TVM finds only where factors come in the same order."""
    parts: list[Any] = []
    sums = [_sum_of_products(size, parts) for size in (a, b)]
    return None not in sums and sums[0] == sums[1]


def _sum_of_products(size: Any, parts: list[Any]) -> Counter[tuple[int, ...]] | None:
    """How often every product is in a size, by places of its factors in ``parts``, which grows by what is no sum and no
    product; None where there are more than :data:`MOST_PRODUCTS`."""
    if isinstance(size, (int, tirx.IntImm)):
        return _without_zeros({(): int(size)})
    if not isinstance(size, (tirx.Add, tirx.Sub, tirx.Mul)):
        place = next((i for i, part in enumerate(parts) if tvm_ffi.structural_equal(part, size)), len(parts))
        parts += [size] if place == len(parts) else []
        return Counter({(place,): 1})
    left, right = (_sum_of_products(side, parts) for side in (size.a, size.b))
    if left is None or right is None:
        return None
    found: Counter[tuple[int, ...]] = Counter()
    if isinstance(size, tirx.Mul):
        for (p, m), (q, n) in itertools.product(left.items(), right.items()):
            found[tuple(sorted(p + q))] += m * n
    else:
        sign = -1 if isinstance(size, tirx.Sub) else 1
        for product in {**left, **right}:
            found[product] = left[product] + sign * right[product]
    return _without_zeros(found) if len(found) <= MOST_PRODUCTS else None


def quotient(a: Any, b: Any) -> Any:
    """A size divided by another one that is a factor of it whatever the symbols are; None where that cannot be told."""
    parts: list[Any] = []
    whole, divisor = (_sum_of_products(size, parts) for size in (a, b))
    if whole is None or divisor is None or len(divisor) != 1:
        return None
    ((factors, divides),) = divisor.items()
    found: Any = 0
    for product, times in whole.items():
        left = Counter(product)
        left.subtract(factors)
        if times % divides or min(left.values(), default=0) < 0:
            return None
        size = math.prod((parts[place] for place in left.elements()), start=times // divides)
        found = size if isinstance(found, int) and not found else found + size
    return found


def _without_zeros(products: Mapping[tuple[int, ...], int]) -> Counter[tuple[int, ...]]:
    return Counter({product: times for product, times in products.items() if times})


def surely_true(condition: Any, known: Mapping[Any, Any] | None = None) -> bool:
    """Whether a comparison of sizes holds whatever the symbols are, which are not negative.

    Args:
        condition: the comparison.
        known: symbols of which more is known: expressions over others.
    """
    if hasattr(condition, "asobject"):  # what Python's == gives
        condition = condition.asobject()
    if isinstance(condition, (tirx.EQ, tirx.LE, tirx.GE)) and _same_sum(condition.a, condition.b):
        return True
    analyzer: Any = tvm.sym.Analyzer()
    known = known or {}
    symbols = [s for value in (condition, *known.values()) for s in tirx.analysis.undefined_vars(value)]
    for symbol in (s for s in symbols if s not in known):
        analyzer.bind(symbol, tvm.ir.Range(tirx.const(0, "int64"), tirx.const(MOST_SIZE, "int64")), True)
    for symbol, value in known.items():
        analyzer.bind(symbol, value)
    return bool(analyzer.can_prove(condition))


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are surely equal."""
    return len(a) == len(b) and all(map(surely_equal, a, b))


def same_elements(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether tensors of two shapes surely have equally many elements."""
    return surely_equal(math.prod(a), math.prod(b))


def index_sizes(function: Any) -> dict[tuple[str, ...], int]:
    """How large the tensors are that a Relax function's kernels index.

    Returns:
        By the symbols in a shape, sorted: elements of the largest such tensor where each symbol is one. A size with
        symbols is a product of them and a number.
    """
    largest: dict[tuple[str, ...], int] = {}
    for binding in bindings(function):
        if not called_kernel(binding.value):
            continue
        for tensor in (*_tensor_types(binding.value.args[1].ty), *_tensor_types(binding.var.ty)):
            symbols: dict[str, Any] = {}
            count = 1
            for size in tensor.shape:
                found = tirx.analysis.undefined_vars(size)
                symbols |= {variable.name: variable for variable in found}
                count *= size_at(size, dict.fromkeys(found, 1))
            key = tuple(sorted(symbols))
            largest[key] = max(count, largest.get(key, 0))
    return largest


def _tensor_types(kind: Any) -> Iterator[Any]:
    """The tensors of a tensor's or a tuple's type. A kernel's arguments are sizes, too, where no shape tells them."""
    members = kind.fields if isinstance(kind, relax.TupleType) else [kind]
    return (member for member in members if isinstance(member, relax.TensorType))


def size_at(size: Any, values: Mapping[Any, int]) -> int:
    """A size where each of its symbols has a value."""
    if isinstance(size, int):
        return size
    analyzer: Any = tvm.sym.Analyzer()
    for symbol, value in values.items():
        analyzer.bind(symbol, tirx.const(value, str(symbol.ty.dtype)))
    return int(analyzer.simplify(size))


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
