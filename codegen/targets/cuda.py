"""CUDA architectures and their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import TargetError

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
"""Architectures these kernels can be compiled for; a CUDA toolkit may know fewer."""

DEFAULT_ARCHITECTURES = ("sm_80", "sm_90")
"""What a plain ``cuda`` means."""


def check_architectures(names: Sequence[str]) -> None:
    """Refuses architectures that these kernels cannot be compiled for.

    Raises:
        TargetError: naming what is unknown and what was probably meant.
    """
    for name in names:
        if name not in ARCHITECTURES:
            near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.4)
            hint = f"did you mean cuda:{near[0]}?" if near else f"known are {', '.join(ARCHITECTURES)}"
            raise TargetError(f"unknown CUDA architecture {name!r}; {hint}")
