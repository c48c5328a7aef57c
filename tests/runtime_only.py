"""Processes in which what only compiling needs is not installed."""

from __future__ import annotations

import sys

WITHOUT_COMPILER = """
import sys
absent = {"torch", "transformers", "tvm", "safetensors", "networkx", "plotly"}
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
"""What such a process runs first."""

_COMMAND = """
from lbllm_compile.cli import main
sys.argv[0] = "lbllm-compile"
main()
"""


def command(*arguments: str) -> list[str]:
    """What to start for ``lbllm-compile`` with some arguments."""
    return [sys.executable, "-c", WITHOUT_COMPILER + _COMMAND, *arguments]
