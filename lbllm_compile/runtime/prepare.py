"""The former home of :mod:`lbllm_compile.lowering.build`, kept because other code imports it from here."""

from lbllm_compile.lowering.build import build_native, keep_native, workshop

__all__ = ["build_native", "keep_native", "workshop"]
