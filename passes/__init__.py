"""Graph passes: an FX program in, an FX program out."""

from .base import Contract, Pass, PassContext, PassResult
from .ir.program import Program

__all__ = ["Contract", "Pass", "PassContext", "PassResult", "Program"]
