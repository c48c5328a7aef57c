"""How many threads kernels use."""

from __future__ import annotations

import os


def thread_count() -> int:
    """Threads of the kernels' pool: ``TVM_NUM_THREADS`` where set, else the CPUs this process may use."""
    configured = os.environ.get("TVM_NUM_THREADS", "")
    if configured.isdigit() and int(configured) > 0:
        return int(configured)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
