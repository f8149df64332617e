"""Worker processes that always end, even if one of them is killed.

In: the number of processes. Out: a pool. Called by shards/encode.py, duplicates.py and tools/fit_palette.py.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from igpt_ds.errors import InputError

MAX_WORKERS = 1024  # each opens files and takes memory; a system's own limits end in errors of its libraries


@contextmanager
def process_pool(
    workers: int, method: str = "forkserver", begin: Callable[..., None] | None = None, words: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, each of which calls begin(*words) first. On exit, tasks that have not begun are cancelled.

    Raises:
        ValueError: a process died, or there are too many.
    """
    if workers > MAX_WORKERS:
        raise InputError(f"workers={workers} must be at most {MAX_WORKERS}; use the number of cores")
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=begin, initargs=words)
    try:
        yield pool
    except (BrokenProcessPool, OSError) as error:
        if isinstance(error, OSError) and not _is_broken(pool):
            raise
        # Python's pool does not end a process that started while the pool broke, and would wait for it forever.
        for child in multiprocessing.active_children():
            child.terminate()
        fix = "run the same command again; if memory was short, use fewer --workers"
        raise InputError(f"one of {workers} worker processes died; {fix}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _is_broken(pool: ProcessPoolExecutor) -> bool:
    # Starting a worker while the pool breaks raises "OSError: handle is closed".
    try:
        pool.submit(int)
    except BrokenProcessPool:
        return True
    return False
