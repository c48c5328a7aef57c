"""How many threads kernels use, and how many they leave to torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def thread_count() -> int:
    """Threads of the kernels' pool: ``TVM_NUM_THREADS`` where set, else the CPUs this process may use."""
    configured = os.environ.get("TVM_NUM_THREADS", "")
    if configured.isdigit() and int(configured) > 0:
        return int(configured)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def shares_work(threads: int) -> bool:
    """Whether kernels have anyone to share their work with: schedules of one thread and of several differ in kind."""
    return threads > 1


def in_words(threads: int) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's operators on the calling thread alone, in this block.

    The threads of two pools, torch's and the kernels', spin on the same cores while they wait, and every change from
    one pool to the other costs as much as a whole small operator. Worth it where torch's share is small. A thread
    that uses torch for the first time while another one is in this block keeps the count of one.
    """
    # Not at the top: `doctor` counts threads, and must do so with a torch that cannot be imported too.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
