"""A device beside the CPU that every machine has: it computes on the CPU, and refuses what a GPU would refuse.

Its tensors hold CPU tensors. An operator that gets tensors of both devices fails, as on CUDA, unless it copies between
them, or works element by element and the CPU's is a single number.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "other"

_everything, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


@functools.cache
def other_device() -> torch.device:
    """The device; use it within :class:`OnOtherDevice`."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    # ``torch.tensor`` makes its tensors behind the back of modes.
    for name in ("empty.memory_format", "empty_strided"):
        torch.library.impl(
            f"aten::{name}", "privateuseone", functools.partial(_make, getattr(torch, name.split(".")[0]))
        )
    torch.library.impl("aten::_copy_from", "privateuseone", _copy)
    _everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for product in (torch.ops.aten.linear, torch.ops.aten.matmul, torch.ops.aten.scaled_dot_product_attention):
        _aten.impl(product.default._schema.name, functools.partial(_lowered, product.default), "AutocastPrivateUse1")
    return torch.device(NAME, 0)


def _lowered(product: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A product under autocast, as CUDA takes it."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        args, kwargs = tree_map(_narrow, (args, kwargs))
        return product(*args, **kwargs)


def _narrow(value: Any) -> Any:
    narrows = isinstance(value, Tensor) and value.dtype is torch.float32
    return value.to(torch.get_autocast_dtype(NAME)) if narrows else value


def _copy(source: Tensor, target: _Elsewhere, non_blocking: bool = False) -> Tensor:
    target.inner.copy_(source)
    return target


def _make(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    return _Elsewhere(function(*args, **kwargs))


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device besides operators."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Elsewhere(Tensor):
    """A tensor of the device, which is a CPU tensor inside."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=other_device(),
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"_Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class OnOtherDevice(TorchDispatchMode):
    """A context in which tensors can be made on and copied to the device.

    Attributes:
        calls: operators that computed there, copies apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(value, _Elsewhere) for value in tree_leaves((args, kwargs)))
        if not there and not _names_it(kwargs.get("device")):
            return func(*args, **kwargs)
        self.calls += func not in _COPIES
        return _compute(func, args, kwargs)


def _names_it(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    numbers = torch.Tag.pointwise in func.tags
    strangers = [t for t in tensors if not isinstance(t, _Elsewhere) and not (numbers and t.dim() == 0)]
    if strangers and func not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on one device, found CPU tensors among {NAME}'s")
    out = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    target = kwargs.get("device", args[0].device if args and isinstance(args[0], Tensor) else None)
    if func in _COPIES and not _names_it(target):
        return args[0] if func is _COPIES[1] else out
    known = {id(t.inner): t for t in tensors if isinstance(t, _Elsewhere)}
    return tree_map(lambda value: _outside(value, known), out)


def _inside(value: Any) -> Any:
    if isinstance(value, _Elsewhere):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _outside(value: Any, known: dict[int, _Elsewhere]) -> Any:
    """A result as a tensor of the device; the one it was, where an operator changed it in place."""
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else _Elsewhere(value)
