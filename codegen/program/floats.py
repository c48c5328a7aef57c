"""Arithmetic on floats, kept from what TVM and LLVM make of it where loops and kernels are joined.

Where loops are joined, TVM simplifies what it puts in: ``x - x`` to 0, ``not x < y`` to ``y <= x``. Of floats that is
wrong wherever something is infinite or NaN. So while loops are joined and scheduled, a comparison or an operation on
floats is a call of a function that TVM knows nothing of. What updates a sum stays as it is, or it would not be known
for one. TVM simplifies once more when it compiles, so what is shown again has another form where that would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..tvm_api import PrimFunc, pure_intrinsic, s_tir, tirx, tvm, tvm_ffi

_PREFIX = "lbllm.float."

_KINDS = {kind.__name__: kind for kind in (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div)}
_KINDS |= {kind.__name__: kind for kind in (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)}

_TRANSPARENT = {"tirx.reinterpret", "tirx.bitwise_xor", "tirx.if_then_else", "tirx.likely"}
"""Calls of which LLVM sees the operands: among them the two that change a sign (:func:`_negated`)."""

_BITS = {f"float{bits}": f"int{bits}" for bits in (16, 32, 64)}
"""Integers of the same size."""


def hide_floats(function: PrimFunc) -> PrimFunc:
    """The same loops, in which operations on floats are calls of functions that TVM knows nothing of."""

    def hidden(old: Any) -> Any:
        if not str(old.a.ty.dtype).startswith(("float", "bfloat")):
            return old
        return tirx.call_pure_extern(str(old.ty.dtype), _PREFIX + type(old).__name__, old.a, old.b)

    def block(old: Any) -> Any:
        return old if old.init is None else _with_known_update(old)

    return _mapped(function, [*((kind, hidden) for kind in _KINDS.values()), (s_tir.SBlock, block)])


def show_floats(function: PrimFunc) -> PrimFunc:
    """Undoes :func:`hide_floats`; a difference becomes a sum, and zero, as a factor and a dividend, its bits."""
    return _mapped(function, [(tvm.ir.Call, _compiled)])


def rounded(store: Any) -> Any:
    """A store of what may be a product, which LLVM rounds before anything that reads it is added to it.

    TVM lets LLVM round a product and a sum once. Where a kernel reads what another one has written, LLVM may see both,
    also a product whose sign changes, one of several values, and one that a variable stands for.
    """
    value = store.value
    if not _is_float(value) or not _has_product(value):
        return store
    fenced = pure_intrinsic(str(value.ty.dtype), "llvm.arithmetic.fence", value)
    return tirx.BufferStore(store.buffer, fenced, store.indices)


def _has_product(value: Any) -> bool:
    """Whether a value is computed from a product of floats, or a variable, otherwise than by a function of it."""

    def look(part: Any) -> Any:
        if isinstance(part, tvm.ir.Call) and getattr(part.op, "name", "") not in _TRANSPARENT:
            return tvm_ffi.WalkResult.SKIP
        if isinstance(part, tvm.ir.TensorLoad):
            return tvm_ffi.WalkResult.SKIP
        if isinstance(part, (tirx.Mul, tirx.Var)) and _is_float(part):
            return tvm_ffi.VisitInterrupt()
        return None

    kinds = tvm.ir.Call, tvm.ir.TensorLoad, tirx.Mul, tirx.Var
    return tvm_ffi.structural_walk(value, (kinds, look), order="pre") is not None


def _is_float(value: Any) -> bool:
    return str(value.ty.dtype).startswith("float")


def _compiled(value: Any) -> Any:
    shown = _shown(value)
    if shown is value or str(shown.ty.dtype) not in _BITS:
        return shown
    if isinstance(shown, tirx.Sub):
        return tirx.Add(shown.a, _negated(shown.b))
    if isinstance(shown, (tirx.Mul, tirx.Div)):
        return type(shown)(_unknown_zero(shown.a), _unknown_zero(shown.b))
    return shown


def _negated(x: Any) -> Any:
    """``-x``, of which TVM does not know that it is. LLVM does."""
    dtype = str(x.ty.dtype)
    bits = _BITS[dtype]
    sign = tirx.const(-(1 << (int(bits.removeprefix("int")) - 1)), bits)
    return _reinterpreted(dtype, tirx.bitwise_xor(_reinterpreted(bits, x), sign))


def _unknown_zero(x: Any) -> Any:
    """An operand, of which TVM does not know that it is zero where it is. LLVM does."""
    dtype = str(x.ty.dtype)
    zero = isinstance(x, tirx.FloatImm) and x.value == 0
    return _reinterpreted(dtype, tirx.const(0, _BITS[dtype])) if zero else x


def _reinterpreted(dtype: str, x: Any) -> Any:
    return tirx.reinterpret(dtype, x)


def _with_known_update(block: Any) -> Any:
    """A block that reduces, with the operation that adds one more element as it was."""
    update = block.body
    if isinstance(update, tirx.BufferStore):
        update = tirx.BufferStore(update.buffer, _shown(update.value), update.indices)
    else:  # several reductions at once
        update = tvm_ffi.structural_map(update, (tvm.ir.Call, _shown))
    parts = block.init, block.alloc_buffers, block.match_buffers, block.annotations
    return s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, update, *parts)


def _shown(value: Any) -> Any:
    if not (isinstance(value, tvm.ir.Call) and getattr(value.op, "name", "") == "tirx.call_pure_extern"):
        return value
    arguments: Any = value.args
    name, *operands = arguments
    known = name.value.startswith(_PREFIX)
    return _KINDS[name.value.removeprefix(_PREFIX)](*operands) if known else value


def _mapped(function: Any, callbacks: list[tuple[Any, Callable[[Any], Any]]]) -> Any:
    body = tvm_ffi.structural_map(function.body, callbacks)
    return PrimFunc(function.params, body, function.ret_type).with_attr(dict(function.attrs))
