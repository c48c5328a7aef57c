"""Imports of what lies beside a ``model.py``, without a trace outside it.

While a model.py runs, ``import layers`` finds ``layers.py`` in its folder, as if the folder were first on ``sys.path``.
The module lives in ``sys.modules`` under the model's own name (``lbllm_user_model_….layers``) and under its short name
only for as long, so that two models, or a model and the program that compiles it, can each have a ``layers``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class Siblings(MetaPathFinder, Loader):
    """The modules and packages of a folder.

    The standard library comes before them, and so does a library that is imported already: a second copy of torch
    would break both.

    Args:
        folder: where they are.
        package: what they are submodules of; it has ``folder`` as its path.
    """

    def __init__(self, folder: Path, package: str):
        self._folder = folder
        self._package = package
        self._aliases: dict[str, ModuleType] = {}

    @contextlib.contextmanager
    def importable(self) -> Iterator[None]:
        """While this lasts, they can be imported under their short names."""
        names = {entry.name.partition(".")[0] for entry in self._folder.iterdir()}
        hidden = {n: m for n, m in sys.modules.items() if _top(n) in names and self._has(_top(n))}
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(self._aliases)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            prefix = f"{self._package}."
            ours = {id(m) for n, m in sys.modules.items() if n.startswith(prefix)}
            self._aliases = {n: m for n, m in sys.modules.items() if id(m) in ours and not n.startswith(prefix)}
            for name in self._aliases:
                del sys.modules[name]
            sys.modules.update(hidden)

    def forget(self) -> None:
        """The next import reads the files again."""
        self._aliases = {}
        for name in [n for n in sys.modules if n.startswith(f"{self._package}.")]:
            del sys.modules[name]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self._has(_top(fullname)) or importlib.util.find_spec(f"{self._package}.{fullname}") is None:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{self._package}.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It was run under its own name; importing it under a second one has replaced its specification.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def _has(self, name: str) -> bool:
        """Whether an import of this name by the model means a module of the folder."""
        if name in sys.stdlib_module_names or name in (_top(__name__), self._package):
            return False
        found = PathFinder.find_spec(name, [str(self._folder)])
        if found is None:
            return False
        if found.origin is None:  # a folder without __init__.py, for which Python looks everywhere else first
            elsewhere = PathFinder.find_spec(name)
            return elsewhere is None or elsewhere.origin is None
        loaded = sys.modules.get(name)
        file = getattr(loaded, "__file__", None)
        if loaded is None or loaded is sys.modules.get(f"{self._package}.{name}") or file is None:
            return True
        return Path(file).resolve() != Path(found.origin).resolve() and not _is_library(Path(file))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_library(file: Path) -> bool:
    """Whether a file was installed, in this environment or in one that it builds on."""
    return bool({"site-packages", "dist-packages"} & set(file.resolve().parts))
