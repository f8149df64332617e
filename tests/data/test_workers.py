"""data/workers.py: a pool whose workers are killed at any moment ends in one line, and no error of another kind is swallowed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from igpt_ds.data.workers import process_pool
from igpt_ds.errors import InputError


def test_results_come_from_other_processes() -> None:
    with process_pool(2) as pool:
        assert os.getpid() not in {pool.submit(os.getpid).result() for _ in range(4)}
    assert multiprocessing.active_children() == []


def test_more_workers_than_a_system_has_are_refused() -> None:
    with pytest.raises(InputError, match="workers=99999999999 must be at most"), process_pool(99999999999):
        pass


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05, 0.2])
def test_a_killed_worker_is_told_whenever_it_dies(delay: float) -> None:
    """Also while the pool still starts the others, where Python's own pool would wait for ever."""

    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    def work() -> None:
        with process_pool(3) as pool:
            for _ in range(200):
                for done in [pool.submit(time.sleep, 0.01) for _ in range(9)]:
                    done.result()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ValueError, match="one of 3 worker processes died; run the same command again; if memory"):
        work()
    assert multiprocessing.active_children() == []


def test_an_error_of_the_callers_own_stays_what_it_is() -> None:
    with pytest.raises(FileNotFoundError), process_pool(2) as pool:
        pool.submit(open, "/nothing/here").result()
    with pytest.raises(KeyError), process_pool(2):
        raise KeyError
