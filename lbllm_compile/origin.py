"""Where what an artifact was made from is: its ``lbllm.lock`` has names and hashes, this user's cache has places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbllm_compile import artifact
from lbllm_compile.codegen.errors import LbllmError


class OriginError(LbllmError):
    """What an artifact was made from is not to be found, or not to be used unless the user names it."""


def source_of(directory: Path, digest: str, lock: Mapping[str, Any]) -> str:
    """The model that an artifact was compiled from, as a compile takes it.

    It is where it was, or beside the artifact. A ``model.py`` is code, and an artifact must not decide which code runs:
    it is used only where this machine compiled the artifact from it.

    Args:
        directory: the artifact.
        digest: its own.
        lock: contents of its ``lbllm.lock``.

    Raises:
        OriginError: why it cannot be used; the message leaves it to the caller to say how to name another.
    """
    name = lock.get("source")
    if name is None:
        raise OriginError("it was an object in memory")
    compiled_from = artifact.compiled_from(digest)
    # Locks of older artifacts have whole paths.
    source = (compiled_from or {}).get("source") or str(directory.resolve().parent / str(name))
    path = Path(source)
    if not path.exists():
        raise OriginError(f"'{name}' is not on this machine")
    if compiled_from is None and not path.is_dir() and path.suffix != ".gguf":
        raise OriginError(
            f"'{source}' is code, and this user's cache does not record that it compiled this artifact from it"
        )
    return source


def calibration_of(directory: Path, digest: str, lock: Mapping[str, Any]) -> str | None:
    """The text that was named to calibrate an artifact on, where it was or beside the artifact; None where none was.

    Raises:
        OriginError: as :func:`source_of`.
    """
    name = lock.get("calibration_text")
    if name is None:
        return None
    found = (artifact.compiled_from(digest) or {}).get("calibration") or str(directory.resolve().parent / str(name))
    if not Path(found).exists():
        raise OriginError(f"'{name}' is not on this machine")
    return found
