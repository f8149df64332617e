"""Worker processes whose end is certain, also where one of them was killed.

In: a number. Out: a pool. Called by shards/encode.py, duplicates.py and tools/fit_palette.py.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


@contextmanager
def process_pool(
    workers: int, method: str = "forkserver", begin: Callable[..., None] | None = None, words: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, each of which calls begin(*words) first; on leaving, what has not begun is dropped.

    Raises:
        ValueError: a process died.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=begin, initargs=words)
    try:
        yield pool
    except (BrokenProcessPool, OSError) as error:
        if isinstance(error, OSError) and not _is_broken(pool):
            raise
        # One that started while the pool broke is not among those that Python's pool ends, and it would wait for it for ever.
        for child in multiprocessing.active_children():
            child.terminate()
        fix = "run the same command again; if memory was short, with fewer --workers"
        raise ValueError(f"one of {workers} worker processes died; {fix}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _is_broken(pool: ProcessPoolExecutor) -> bool:
    # To start a worker while the pool breaks is "OSError: handle is closed".
    try:
        pool.submit(int)
    except BrokenProcessPool:
        return True
    return False
