"""Processes in which what only compiling needs is not installed."""

from __future__ import annotations

import sys

from lbllm_compile.codegen.errors import COMPILE_PACKAGES

_WITHOUT = """
import sys
absent = set(sys.argv.pop(1).split(","))
class Without:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            return None
        found = (f.find_spec(name, path, target) for f in self.finders)
        return next((spec for spec in found if spec), None)
    def find_distributions(self, context):
        if context.name in (*absent, "apache-tvm"):
            return
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(context)
sys.meta_path[:] = [Without(list(sys.meta_path))]
"""
"""What such a process runs first, which takes its first argument."""

_COMMAND = """
from lbllm_compile.cli import main
sys.argv[0] = "lbllm-compile"
main()
"""


def command(*arguments: str) -> list[str]:
    """What to start for ``lbllm-compile`` with some arguments."""
    return script(_COMMAND, *arguments)


def script(code: str, *arguments: str) -> list[str]:
    """What to start for Python code with some arguments."""
    absent = set(COMPILE_PACKAGES) - {"pydantic"}  # typer and serving need it, too
    return [sys.executable, "-c", _WITHOUT + code, ",".join(absent), *arguments]
