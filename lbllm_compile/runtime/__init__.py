"""Running compiled models: the native program, the executor in torch, KV state, generation.

What is offered is imported when it is asked for: generating text from a prepared program needs neither torch nor TVM's
compiler.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbllm_compile.runtime.generate import GenerationError, Sampling
    from lbllm_compile.runtime.loader import load
    from lbllm_compile.runtime.model import CompiledModel, Session

__all__ = ["CompiledModel", "GenerationError", "Sampling", "Session", "load"]

_HOMES = {
    "CompiledModel": "model",
    "GenerationError": "generate",
    "Sampling": "generate",
    "Session": "model",
    "load": "loader",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"lbllm_compile.runtime.{_HOMES[name]}"), name)
