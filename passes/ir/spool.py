"""Tensors in files: what is too big to be held in memory is read from disk while it is used.

Both kinds of storage are files without a name, so nothing is left behind however the process ends.

* :func:`mapped` gives ordinary tensors whose memory is a mapping of a file: weights. They are read from disk when they
  are touched and stay resident until :func:`release` drops what is resident of all of them; their values stay as they
  are. So after a decoder layer, or after a tensor that was looked at once, there is a call of :func:`release`.
* :class:`Records` keeps tensors to be read back whole: activations, whose place is used again once they are forgotten.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ...codegen.errors import LbllmError

ALIGNMENT = 64
"""Bytes that a mapped tensor's address is a multiple of, as torch's own memory is: the speed, and in some libraries the
last bit, of a matrix product depends on it."""

RESIDENT = 64 << 20
"""Bytes of weights that may be touched between two calls of :func:`release` where there are no layers to go by."""

LARGE = 8 << 20
"""Bytes from which on a block of memory is the system's own; see :func:`apart`."""

_M_MMAP_THRESHOLD = -3

_mappings: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()
"""Every mapping that a tensor still uses, and its address."""


class SpoolError(LbllmError):
    """There is no room on the disk, or no folder that can be written."""


def directory() -> Path:
    """Where the files are: ``TMPDIR`` where set, else ``/var/tmp``, because ``/tmp`` is often memory."""
    configured, disk = os.environ.get("TMPDIR"), Path("/var/tmp")
    return disk if not configured and os.access(disk, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def mapped(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies tensors, which may be made one by one, into a file; returns contiguous ones in its mapping by their names.

    Raises:
        SpoolError: the file cannot be written.
    """
    places: list[tuple[str, int, torch.dtype, torch.Size]] = []
    end = 0
    with _file() as file:
        for name, tensor in tensors:
            _write(file, end, tensor.detach().cpu().contiguous())
            places.append((name, end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            del tensor  # before the next one is made
        if end == 0:
            return {name: torch.empty(shape, dtype=dtype) for name, _, dtype, shape in places}
        file.truncate(end)
        mapping = mmap.mmap(file.fileno(), end)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    _mappings[mapping] = whole.data_ptr()
    return {
        name: whole[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, start, dtype, shape in places
    }


def spooled(tensor: Tensor) -> Tensor:
    """:func:`mapped` of one tensor, whose memory is dropped."""
    copy = mapped([("", tensor)])[""]
    release()
    return copy


def release() -> None:
    """Drops from memory what is resident of all mapped tensors; they are read again when they are next touched."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in list(_mappings):
            mapping.madvise(mmap.MADV_DONTNEED)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is that of :func:`mapped`."""
    return tensor.untyped_storage().data_ptr() in _mappings.values()


def apart() -> None:
    """From now on a block of ``LARGE`` bytes or more is mapped for itself, so that freeing it gives all of it back.

    The GNU C library does so from its start, but raises the size to 32 MiB as such blocks are freed. A stage's matrices
    then lie in its heap among small ones that stay, and what the heap needs depends on the order in which they came.
    """
    _of_c_library("mallopt")(_M_MMAP_THRESHOLD, LARGE)


def trim() -> None:
    """:func:`release`, and gives back to the system what the C library has kept of freed memory: after a layer."""
    _of_c_library("malloc_trim")(0)
    release()


def _of_c_library(name: str) -> Callable[..., int]:
    """A function that only the GNU C library has; elsewhere one that does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *_: 0)


def reclaim(module: nn.Module) -> None:
    """:func:`trim`, behind a search for objects that refer to each other and to nothing else: after a pass.

    The search looks at every object of the process and takes up to a second, so a module whose weights have fewer than
    ``RESIDENT`` bytes goes without.
    """
    if sum(t.nbytes for t in itertools.chain(module.parameters(), module.buffers())) >= RESIDENT:
        gc.collect()
    trim()


class Gauge:
    """Calls :func:`release` whenever ``RESIDENT`` bytes of weights have been used."""

    def __init__(self) -> None:
        self._used = 0

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors whose use is over."""
        self._used += sum(t.nbytes for t in tensors)
        if self._used >= RESIDENT:
            release()
            self._used = 0


@contextlib.contextmanager
def streamed(module: nn.Module) -> Iterator[None]:
    """While a module runs in this context, its mapped weights are dropped from memory behind the submodules in use."""
    gauge = Gauge()
    hooks = [
        m.register_forward_hook(lambda owner, *_: gauge.use(owner.parameters(recurse=False)))
        for m in module.modules()
        if any(True for _ in m.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        release()


@dataclass(frozen=True)
class _Layout:
    """How a dense tensor becomes one of other strides: a permutation of its dimensions, then repetition along some."""

    dtype: torch.dtype
    dense: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        repeated = [n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        once = [1 if r else n for n, r in zip(tensor.shape, repeated, strict=True)]
        outer_first = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
        order = tuple(outer_first.index(d) for d in range(tensor.dim()))
        return cls(tensor.dtype, tuple(once[d] for d in outer_first), order, tuple(tensor.shape))

    def pack(self, tensor: Tensor) -> Tensor:
        outer_first = [self.order.index(i) for i in range(tensor.dim())]
        for dim, size in enumerate(tensor.shape):
            if self.dense[self.order[dim]] != size:
                tensor = tensor.narrow(dim, 0, 1)
        return tensor.permute(outer_first).contiguous()

    def unpack(self, raw: Tensor) -> Tensor:
        return raw.view(self.dtype).view(self.dense).permute(self.order).expand(self.shape)


class Records:
    """A file of tensors. The place of one that is no longer referred to is used again by the next of its size."""

    def __init__(self) -> None:
        self._file = _file()
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def put(self, tensor: Tensor) -> Record:
        """Writes a tensor.

        Raises:
            SpoolError: there is no room for it.
        """
        layout = _Layout.of(tensor)
        dense = layout.pack(tensor.detach())
        free = self._free.get(dense.nbytes)
        if free:
            start = free.pop()
        else:
            start, self._end = self._end, self._end + dense.nbytes
        _write(self._file, start, dense)
        return Record(self, start, dense.nbytes, layout)

    def get(self, record: Record) -> Tensor:
        raw = torch.empty(record.size, dtype=torch.uint8)
        view, done = memoryview(raw.numpy()), 0
        while done < record.size:
            count = os.preadv(self._file.fileno(), [view[done:]], record.start + done)
            if not count:
                raise SpoolError(f"the file of activations in {directory()} was cut short; run the same command again")
            done += count
        return record.layout.unpack(raw)

    def forget(self, record: Record) -> None:
        self._free.setdefault(record.size, []).append(record.start)


class Record:
    """One tensor of :class:`Records`: ``size`` bytes from ``start``."""

    def __init__(self, records: Records, start: int, size: int, layout: _Layout):
        self._records = records
        self.start, self.size, self.layout = start, size, layout

    def read(self) -> Tensor:
        """The tensor, with the strides it had, in memory of its own."""
        return self._records.get(self)

    def __del__(self) -> None:
        self._records.forget(self)


def _file() -> BinaryIO:
    try:
        return tempfile.TemporaryFile(dir=directory(), buffering=0)  # type: ignore[return-value]
    except OSError as error:
        raise _failure(error) from error


def _write(file: Any, start: int, tensor: Tensor) -> None:
    """Writes a contiguous tensor's bytes from ``start``. They are written, not mapped: a full disk is an error here."""
    view, done = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), 0
    try:
        while done < len(view):
            done += os.pwrite(file.fileno(), view[done:], start + done)
    except OSError as error:
        raise _failure(error) from error


def _failure(error: OSError) -> SpoolError:
    return SpoolError(
        f"cannot keep weights and activations in {directory()}: {error.strerror}; make room there, or set TMPDIR to a"
        " folder on another disk"
    )
