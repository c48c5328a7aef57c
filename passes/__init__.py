"""Graph passes: an FX program in, an FX program out.

What is offered is imported when it is asked for: the names of passes are known without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Contract, Pass, PassContext, PassResult
    from .ir.program import Program

__all__ = ["Contract", "Pass", "PassContext", "PassResult", "Program"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(".ir.program" if name == "Program" else ".base", __name__), name)
