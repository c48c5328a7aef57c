"""What the frontend refuses, and how it says why: in one sentence with the user's own line."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.passes.ir.dump import short_path


class ModelError(LbllmError):
    """What the user named is no model that can be compiled, or cannot be read."""


class CaptureError(LbllmError):
    """The model's forward cannot be written down as one graph."""


def a_word(word: str) -> str:
    return "None" if word == "NoneType" else f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def reason_of(error: BaseException, path: Path | None = None, frame: bool = True) -> str:
    """The first line of an exception, and the line of ``path`` (or of any code but torch's) that it came from."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    message = f"{name}: {text}" if text else name
    where = user_frame(error, path) if frame else ""
    return f"{message} ({where})" if where else message


def user_frame(error: BaseException, path: Path | None = None) -> str:
    """``file.py:12`` of the innermost frame outside torch and this package, or an empty string."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if (path is None or file.resolve() == path.resolve()) and is_users(frame.filename):
            found = source_line(frame.filename, frame.lineno or 0, file.name if path is not None else None)
    return found


def is_users(file: str) -> bool:
    """Whether a file of Python is neither torch's nor this package's."""
    own = str(Path(__file__).resolve().parent.parent)
    return not file.startswith(("<", own, str(Path(torch.__file__).resolve().parent)))


def source_line(file: str, number: int, name: str | None = None) -> str:
    """``file.py:12`` and what stands there; ``name`` is what to call the file, by default a short path."""
    line = linecache.getline(file, number).strip()
    return f"{name or short_path(file)}:{number}" + (f" `{line}`" if line else "")


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and what it came from, the outermost first."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return chain


def fixes_size(error: BaseException) -> bool:
    """Whether what stopped ``torch.export`` is that the forward fits some sizes only."""
    text = " ".join(str(e) for e in _chain(error))
    return any(sign in text for sign in ("ConstraintViolation", "Constraints violated", "Specializations unexpectedly"))


def capture_reason(error: BaseException) -> str:
    """What stopped ``torch.export``, in one sentence: the operation, the line, the way out."""
    chain = _chain(error)
    frame = next((f for e in reversed(chain) if (f := user_frame(e))), "")
    text = " ".join(str(e) for e in chain)
    if any(type(e).__name__.startswith("GuardOnDataDependent") for e in chain) or "data-dependent" in text.lower():
        reason = "a branch or a size depends on the values of a tensor; compute both sides and use torch.where"
    elif fixes_size(error):
        reason = "the batch or sequence size is fixed by the forward; derive shapes from the inputs' shapes"
    elif ".item()" in text or "aten._local_scalar_dense" in text:
        reason = "a tensor is read as a Python number; keep the computation in tensors"
    else:
        reason = reason_of(chain[-1] if not str(error).strip() else error)
        return f"{reason}; rewrite this with tensor operations that torch.export supports"
    return f"{reason} (at {frame})" if frame else reason
