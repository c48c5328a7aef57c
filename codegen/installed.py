"""What installed packages add to this one."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from .cache import sha256

OPERATORS = "lbllm_compile.operators"
"""Group of entry points that name the modules which define operators, by the operators' names."""


def facts(group: str) -> tuple[str, ...]:
    """What the modules are that installed packages name in a group of entry points.

    Returns:
        For each entry, in order, its name, its module, the version of the package where that is known, and the SHA-256
        of the module's file where it has one.
    """
    found: list[str] = []
    for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
        version = point.dist.version if point.dist is not None else ""
        found += [point.name, point.value, version, _file_hash(point.module)]
    return tuple(found)


def _file_hash(module: str) -> str:
    try:
        spec = find_spec(module)
    except ImportError:  # who needs the module says so
        return ""
    file = Path(spec.origin) if spec is not None and spec.origin else None
    return sha256(file) if file is not None and file.is_file() else ""
