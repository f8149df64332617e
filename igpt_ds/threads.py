"""Threads and memory of calculations on a CPU. cli.py, the probes and train/engine.py call it.

The threads of a parallel loop wait for each other at its end, by default while they keep their cores busy. If another process has
one of the cores, each of the thousands of loops of a probe takes as long as that process's turn. Two measures, with numbers in
LOG.md: waiting threads sleep, and small loops have one thread.

A training step allocates the same large arrays again and again. By default glibc returns them to the system, which clears each
page again at its next use.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

SMALL = 1e8  # floating-point operations of one loop: about 3 ms of a core, as long as a turn on a busy one


def sleep_while_waiting(environment: MutableMapping[str, str]) -> None:
    """Threads that wait sleep. It counts for libraries that are loaded later; the results and a user's own setting stay."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> None:
    """glibc keeps the memory that this process frees. The peak and the results stay, and so do a user's own settings.

    A step of cifar10_nano_ar_16 in bf16 takes 2.10 instead of 2.30 s on one core of an Intel Xeon.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # None: another C library
    if mallopt is None or not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}.isdisjoint(os.environ):
        return
    for largest in (1 << 25, 1 << 30):  # M_MMAP_THRESHOLD; an older glibc refuses the second
        mallopt(-3, largest)
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """One thread for a block whose parallel loops are small, so that its result is the same on machines with other cores.

    In large loops the sums of other numbers of threads differ in their last bits.

    Args:
        flops: floating-point operations of its largest loop, such as one matrix product.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if flops < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
