"""CUDA architectures and their names."""

from __future__ import annotations

import difflib

from ..errors import TargetError

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
"""Architectures these kernels can be compiled for; a CUDA toolkit may know fewer."""

DEFAULT_ARCHITECTURES = ("sm_80", "sm_90")
"""What a plain ``cuda`` means."""


def parse_architectures(text: str) -> tuple[str, ...]:
    """Architectures of a target text: ``cuda``, ``cuda:sm_80``, ``cuda:sm_80,sm_90``, ``cuda:sm_80,cuda:sm_90``.

    Raises:
        TargetError: naming what is unknown and what was probably meant.
    """
    found: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        kind, _, arch = part.partition(":") if part.startswith("cuda") else ("cuda", ":", part)
        if kind != "cuda" or (":" in part and not arch):
            raise TargetError(f"target {part!r} is not understood; write cuda or, for example, cuda:sm_90")
        if arch and arch not in ARCHITECTURES:
            near = difflib.get_close_matches(arch, ARCHITECTURES, n=1, cutoff=0.4)
            hint = f"did you mean cuda:{near[0]}?" if near else f"known are {', '.join(ARCHITECTURES)}"
            raise TargetError(f"unknown CUDA architecture {arch!r}; {hint}")
        found += [arch] if arch else DEFAULT_ARCHITECTURES
    return tuple(dict.fromkeys(found))
