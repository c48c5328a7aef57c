"""What a form to export to is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.export.original import ExportError, Original
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.program import Program

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights may be written in, by name."""

DEFAULT_DTYPE = "bfloat16"


class Form(ABC):
    """An artifact in the form of another engine, ready to be written.

    Making one gives the module the weights that will be written: what they are rounded to, in float32.

    Attributes:
        program: the artifact's program.
        original: its weights in the original architecture.
        dtype: of the weights that are written as floating-point numbers.
        kind: one of ``types``; None where there are none.
    """

    suffix = ""
    """Of the file that is written; empty for a folder."""

    types: tuple[str, ...] = ()
    """That W(1+1) matrices can be written in, the one that is taken by default first; empty where they have the dtype
    of all weights."""

    def __init__(self, program: Program, original: Original, dtype: str, kind: str | None):
        self.program, self.original, self.dtype, self.kind = program, original, dtype, kind

    @classmethod
    def dtype_with(cls, kind: str | None) -> str | None:
        """The dtype that goes with a type where none is asked for; None where that does not follow from the type."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all weights as written."""

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What a user should know of the weights as written, JSON-able."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """Writes the file or folder.

        Raises:
            OSError: it cannot be written.
        """


def chosen_dtype(asked: str | None, config: Mapping[str, Any]) -> str:
    """The type of weights: as asked for, else a 16-bit one, the configuration's where that names one.

    Raises:
        ExportError: it is none of :data:`DTYPES`.
    """
    if asked is not None and asked not in DTYPES:
        raise ExportError(f"there is no dtype '{asked}'; use one of {', '.join(DTYPES)}")
    own = config.get("dtype")
    return asked or (own if own in ("bfloat16", "float16") else DEFAULT_DTYPE)


def chosen_type(name: str, form: type[Form], asked: str | None) -> str | None:
    """The type of W(1+1) matrices: as asked for, else the form's own; None for a form without types.

    Raises:
        ExportError: the form has no such type.
    """
    if asked is not None and asked not in form.types:
        if not form.types:
            raise ExportError(f"{name} has all weights in one dtype; use --dtype in place of --type, or --format gguf")
        raise ExportError(f"{name} has no type '{asked}'; use one of {', '.join(form.types)}")
    return asked or next(iter(form.types), None)


def rounded(path: str, tensor: Tensor, dtype: str) -> Tensor:
    """A float32 weight rounded to what a type can hold, in float32.

    Raises:
        ExportError: it is too large for the type.
    """
    kept = tensor.to(DTYPES[dtype]).float()
    if not bool(torch.isfinite(kept).all()):
        raise ExportError(f"the weight '{path}' is too large for {dtype}; use --dtype bfloat16")
    return kept


def round_weights(module: Any, rounding: Callable[[str, Tensor], Tensor]) -> None:
    """Gives a module other weights, one at a time.

    Args:
        module: its parameters, tied ones once, are mapped again.
        rounding: makes the new weight from path and parameter, in float32.
    """
    names = dict(module.named_parameters())
    fresh = spool.mapped((path, rounding(path, parameter.data)) for path, parameter in names.items())
    for path, parameter in names.items():
        parameter.data = fresh[path]
    spool.release()
