"""Where what an artifact was made from is: its ``lbllm.lock`` has names and hashes, this user's cache has places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbllm_compile import artifact
from lbllm_compile.calibration import OWN_SAMPLES
from lbllm_compile.codegen.errors import LbllmError


class OriginError(LbllmError):
    """What an artifact was made from is not to be found, or not to be used unless the user names it."""


def source_of(directory: Path, digest: str, lock: Mapping[str, Any]) -> str:
    """The model that an artifact was compiled from, as a compile takes it.

    It is where it was, or else beside the artifact. A ``model.py`` is code, and an artifact must not decide which code
    runs: it is used only where this machine compiled the artifact from it.

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
    source = _place(directory, compiled_from, "source", str(name))
    # Locks of older artifacts have whole paths, and that of one that was compiled here is our own word.
    compiled_here = compiled_from is not None and source in (compiled_from.get("source"), name)
    if not compiled_here and not Path(source).is_dir() and Path(source).suffix != ".gguf":
        raise OriginError(
            f"'{source}' is code, and this user's cache does not record that it compiled this artifact from it"
        )
    return source


def calibration_of(directory: Path, digest: str, lock: Mapping[str, Any]) -> str | None:
    """The text that was named to calibrate an artifact on, where it was or else beside the artifact; None where none
    was, so that the model brings what it is calibrated on, or writes it itself.

    Raises:
        OriginError: as :func:`source_of`.
    """
    if lock.get("calibration_object") is not None:
        raise OriginError("what it was calibrated on were objects in memory")
    if "calibration_text" not in lock and lock.get("calibration_source") != OWN_SAMPLES:
        raise OriginError("its lbllm.lock does not say which text it was calibrated on")
    name = lock.get("calibration_text")
    return None if name is None else _place(directory, artifact.compiled_from(digest), "calibration", str(name))


def _place(directory: Path, compiled_from: Mapping[str, str] | None, key: str, name: str) -> str:
    """Where a file or folder is: where it was, or else beside the artifact.

    Raises:
        OriginError: it is at neither place.
    """
    for place in ((compiled_from or {}).get(key), str(directory.resolve().parent / name)):
        if place and Path(place).exists():
            return place
    raise OriginError(f"'{name}' is not on this machine")
