"""How many threads kernels use, and how many they leave to torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def thread_count() -> int:
    """Threads of the kernels' pool: ``TVM_NUM_THREADS`` where set, else :func:`usable_cpus`."""
    configured = os.environ.get("TVM_NUM_THREADS", "")
    if configured.isdigit() and int(configured) > 0:
        return int(configured)
    return usable_cpus()


def shares_work(threads: int) -> bool:
    """Whether kernels have anyone to share their work with: schedules of one thread and of several differ in kind."""
    return threads > 1


def in_words(threads: int) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


_counting = threading.Lock()
_inside = 0
"""Threads in a block of :func:`one_torch_thread`, under the lock."""

_outside = 1
"""Torch's threads before the first of them."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's operators on the calling thread alone, in this block.

    The threads of two pools, torch's and the kernels', spin on the same cores while they wait, and every change from
    one pool to the other costs as much as a whole small operator. Worth it where torch's share is small. Torch keeps a
    count for each thread and one for threads that are new to it; after the last of overlapping blocks all are what
    they were before the first. A thread that uses torch for the first time while another one is in this block has the
    count of one until it leaves a block of its own, as every thread does that generates: slower, with the same tokens.
    """
    # Not at the top: `doctor` counts threads, and must do so with a torch that cannot be imported too.
    import torch

    global _inside, _outside
    with _counting:
        # Asked for in every thread: one that is new to torch takes over the common count then, whatever was set in it.
        before = torch.get_num_threads()
        if not _inside:
            _outside = before
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            torch.set_num_threads(_outside)
