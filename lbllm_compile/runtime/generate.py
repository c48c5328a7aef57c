"""The former home of :mod:`lbllm_compile.native.generate`, kept because other code imports it from here."""

from lbllm_compile.native.generate import GenerationError, Sampling

__all__ = ["GenerationError", "Sampling"]
