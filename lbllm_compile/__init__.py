"""lbllm-compile: turn a causal language model into W(1+1)A4 and run it on generated kernels."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_compile.pretrained import hook
from lbllm_compile.version import __version__

if TYPE_CHECKING:
    from lbllm_compile.driver import compile
    from lbllm_compile.options import CompileOptions
    from lbllm_compile.records import CompileReport
    from lbllm_compile.runtime import CompiledModel, load

__all__ = ["CompileOptions", "CompileReport", "CompiledModel", "__version__", "compile", "load"]

# In a checkout passes/ and codegen/ lie beside this folder; an installed package has them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "passes" / "base.py").is_file() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))

hook.install()

_HOMES = {
    "CompileOptions": "options",
    "CompileReport": "records",
    "CompiledModel": "runtime",
    "compile": "driver",
    "load": "runtime",
}


def __getattr__(name: str) -> Any:
    """Imports what the package offers when it is asked for: torch and TVM take seconds to load.

    Raises:
        MissingPackageError: it needs the extra ``compile``, which is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'lbllm_compile' has no attribute '{name}'")
    from importlib import import_module

    from lbllm_compile.codegen.errors import compiler_is_missing, missing_compiler

    try:
        return getattr(import_module(f"lbllm_compile.{_HOMES[name]}"), name)
    except ImportError as error:
        if not compiler_is_missing(error):
            raise
        raise missing_compiler(error, f"lbllm_compile.{name}") from error
