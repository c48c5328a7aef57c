"""Names of passes and where they live. A pass is imported only when a pipeline names it."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from ..codegen.errors import LbllmError, suggestion

if TYPE_CHECKING:
    from .base import Pass

ENTRY_POINT_GROUP = "lbllm_compile.passes"
"""Third-party packages register passes here: ``my-pass = "my_package.my_module:MyPass"``."""

_BUILTIN = {
    "canonicalize": "canonicalize:Canonicalize",
    "annotate": "annotate:Annotate",
    "smooth": "smooth:Smooth",
    "budget": "budget:Budget",
    "outliers": "outliers:Outliers",
    "observe": "observe:Observe",
    "ptq": "ptq:Ptq",
    "distill": "distill:Distill",
    "activate": "activate:Activate",
    "finetune": "finetune:Finetune",
    "head": "head:Head",
    "merge": "merge:Merge",
    "lower": "lower:Lower",
    "cache": "cache:Cache",
    "cleanup": "cleanup:Cleanup",
}


class PassNameError(LbllmError):
    """A pipeline names a pass that does not exist, or a third-party pass that cannot be used."""


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Every pass that a pipeline may name, the built-in ones first, in pipeline order."""
    return [*_BUILTIN, *sorted(set(_third_party()) - set(_BUILTIN))]


def get(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        PassNameError: there is none of that name (the message suggests the nearest), or a third-party one is broken.
    """
    if name in _BUILTIN:
        module, attribute = _BUILTIN[name].split(":")
        return getattr(importlib.import_module(f".{module}", __package__), attribute)
    from .base import Pass  # torch takes seconds to import

    points = _third_party()
    if name not in points:
        raise PassNameError(f"there is no pass '{name}'{suggestion(name, names())}; see `lbllm-compile passes`")
    try:
        found = points[name].load()
    except Exception as error:
        raise PassNameError(
            f"the third-party pass '{name}' ({points[name].value}) cannot be imported: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)) or found.name != name:
        raise PassNameError(f"the entry point '{name}' ({points[name].value}) is not a Pass named '{name}'")
    return found
