"""What this process holds resident. Nothing is imported that would itself take memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
"""Where Linux says how much memory a process uses."""

_FIELDS = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}


def memory() -> dict[str, int]:
    """Bytes of this process: ``resident`` now, ``peak`` of it so far, and its ``anonymous`` and ``file`` parts.

    Empty where the system does not say.
    """
    if not STATUS.is_file():
        return {}
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    return {_FIELDS[name]: 1024 * int(text.split()[0]) for name, _, text in lines if name in _FIELDS}


def peak_memory() -> int:
    """Most bytes this process has held resident so far."""
    told = memory()
    if "peak" in told:
        return told["peak"]
    # On Linux this would begin with the peak of the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
