"""lbllm-compile: turn a causal language model into W(1+1)A4 and run it on generated kernels."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout passes/ and codegen/ lie beside this folder; an installed package has them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "passes" / "program.py").is_file() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))
