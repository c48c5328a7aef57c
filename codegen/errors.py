"""The errors a user can cause or must hear about: one sentence each, with the way out."""

import difflib
from collections.abc import Iterable
from typing import Any


class LbllmError(Exception):
    """Base of every error this project raises on purpose.

    The message is one sentence that says what is wrong and what to do. The command line prints it without a
    traceback and exits with ``exit_code``.
    """

    exit_code = 2


class FormatError(LbllmError):
    """Stored weights are not what the W(1+1) format allows (shape, dtype, padding, sorting, finiteness)."""


class KernelError(LbllmError):
    """A kernel is missing, failed to compile, or disagreed with the reference. Never answered by a slow path."""


class OutOfMemoryError(KernelError):
    """A device has too little memory left."""


class DisprovedError(KernelError):
    """A generated kernel gives other bits than the reference, or races: a bug, or a fault of this CPU."""


class TargetError(LbllmError):
    """A target string names nothing this build can generate code for."""


class MissingPackageError(LbllmError):
    """What is asked for needs packages that an install for running alone does not have."""


class UntranslatableError(KernelError):
    """The graph has an operator, or a form of one, that a program cannot hold.

    Attributes:
        node: the call, where one is known.
    """

    def __init__(self, why: str, node: Any = None):
        super().__init__(why)
        self.node = node


COMPILE_PACKAGES = ("torch", "transformers", "tvm", "safetensors", "networkx", "pydantic", "filelock", "plotly")
"""Modules of the extra ``compile``."""


def compiler_is_missing(error: ImportError) -> bool:
    """Whether an import failed because the extra ``compile`` is not installed, and not because something is broken."""
    return isinstance(error, ModuleNotFoundError) and error.name in COMPILE_PACKAGES


def missing_compiler(error: ImportError, purpose: str) -> MissingPackageError:
    """What to say when the extra ``compile`` is not installed.

    Args:
        error: the import that failed.
        purpose: what needs it.
    """
    return MissingPackageError(
        f"{purpose} needs the package {error.name}, which an install for running alone does not have; install it with"
        " `pip install 'lbllm-compile[compile]'`"
    )


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
