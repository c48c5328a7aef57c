"""Where results that cost time are kept between runs."""

from __future__ import annotations

import errno
import os
import re
import tempfile
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
    """Writes a file that other processes see whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        os.replace(fresh, path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise
