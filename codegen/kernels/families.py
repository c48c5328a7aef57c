"""The CPU families whose vector instructions are known."""

from __future__ import annotations

from . import arm, x86

INSTRUCTION_SETS = {**x86.INSTRUCTION_SETS, **arm.INSTRUCTION_SETS}
"""By family: the instructions for values of 4 or 8 bits."""
