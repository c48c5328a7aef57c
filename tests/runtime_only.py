"""The command line in a process in which torch, transformers and TVM's compiler cannot be imported."""

from __future__ import annotations

import sys

_SCRIPT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers") or name.startswith("tvm."):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
from lbllm_compile.cli import main
sys.argv[0] = "lbllm-compile"
main()
"""


def command(*arguments: str) -> list[str]:
    """What to start for ``lbllm-compile`` with some arguments."""
    return [sys.executable, "-c", _SCRIPT, *arguments]
