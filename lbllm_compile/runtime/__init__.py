"""Compiled models as users load them, whatever runs their graph: the native program, or the executor in torch.

What is offered is imported when it is asked for: generating text from a prepared program needs neither torch nor TVM's
compiler.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbllm_compile.lowering.session import Session
    from lbllm_compile.native.generate import GenerationError, Sampling
    from lbllm_compile.runtime.loader import load
    from lbllm_compile.runtime.model import CompiledModel

__all__ = ["CompiledModel", "GenerationError", "Sampling", "Session", "load"]

_HOMES = {
    "CompiledModel": "runtime.model",
    "GenerationError": "native.generate",
    "Sampling": "native.generate",
    "Session": "lowering.session",
    "load": "runtime.loader",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"lbllm_compile.{_HOMES[name]}"), name)
