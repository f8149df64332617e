"""Threads on a busy machine. In: the size of a calculation. Out: how many threads it gets. cli.py and the probes call it.

The threads of a parallel loop wait for each other at its end, by default while they keep their cores busy. If another process has
one of the cores, each of the thousands of loops of a probe takes as long as that process's turn. Two measures, with numbers in
LOG.md: waiting threads sleep, and small loops have one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

SMALL = 1e8  # floating-point operations of one loop: about 3 ms of a core, as long as a turn on a busy one


def sleep_while_waiting(environment: MutableMapping[str, str]) -> None:
    """Threads that wait sleep. It counts for libraries that are loaded later; the results and a user's own setting stay."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
