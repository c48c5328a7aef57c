"""Where results that cost time are kept between runs, and how files are written that survive a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """``LBLLM_CACHE_DIR`` where set, else the user's cache folder of this program; it need not exist yet."""
    configured = os.environ.get("LBLLM_CACHE_DIR")
    return (
        Path(configured).expanduser() if configured else platformdirs.user_cache_path("lbllm-compile", appauthor=False)
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failure(error: Exception) -> str:
    """Why a file could not be written, in words. safetensors tells the system's error number in its text alone."""
    told = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if code in _FULL:
        return "the disk is full"
    return os.strerror(code) if code else str(error)


def write_atomically(path: Path, contents: bytes) -> None:
    """Writes a file that other processes, and this machine after a crash, see whole or not at all.

    Its folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        replace_durably(Path(fresh), path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def replace_durably(fresh: Path, path: Path) -> None:
    """Renames a written file to its final name; after a crash there is the old or the whole new one."""
    sync(fresh)
    os.replace(fresh, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems have nothing to flush for a directory, and say so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


_CURRENT_DIRECTORY, _RENAME_EXCHANGE = -100, 2
"""``AT_FDCWD`` and ``RENAME_EXCHANGE`` of Linux."""


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names at once; False, and nothing is done, where the system or the file system cannot.

    Raises:
        OSError: it could, but not these two.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    here = ctypes.c_int(_CURRENT_DIRECTORY)
    if rename(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


_SMALL = 1 << 16
"""Bytes of a file up to which reading it costs no more than looking its checksum up."""

_CHECKSUMS, _MAX_CHECKSUMS = "checksums.json", 4096

_CLOCK_TICK_NS = 20_000_000
"""Within this time of a change another one may leave a file's times as they are."""


def read_sha256(path: Path) -> str:
    """:func:`sha256` of a file that is read now, and remembered for :func:`known_sha256`."""
    before, start = _identity(path), time.time_ns()
    digest = sha256(path)
    status = path.stat()
    settled = start - max(status.st_mtime_ns, status.st_ctime_ns) > _CLOCK_TICK_NS
    if settled and before == _identity(path):
        remember_sha256(path, digest)
    return digest


def known_sha256(path: Path) -> str:
    """:func:`sha256` of a file, which is read once for its device, inode, size and times."""
    if path.stat().st_size <= _SMALL:
        return sha256(path)
    return _checksums().get(_identity(path)) or read_sha256(path)


def remember_sha256(path: Path, digest: str) -> None:
    """Keeps the SHA-256 of a file for :func:`known_sha256`; where the cache cannot be written, nothing is kept."""
    if path.stat().st_size <= _SMALL:
        return
    known = _checksums()
    known.pop(_identity(path), None)
    kept = dict(list(known.items())[1 - _MAX_CHECKSUMS :])
    # Two processes at once may lose what one of them adds, which costs reading that file once more.
    with contextlib.suppress(OSError):
        write_atomically(cache_directory() / _CHECKSUMS, json.dumps({**kept, _identity(path): digest}).encode())


def _identity(path: Path) -> str:
    status = path.stat()
    return ":".join(
        str(fact) for fact in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


def _checksums() -> dict[str, str]:
    try:
        known = json.loads((cache_directory() / _CHECKSUMS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
