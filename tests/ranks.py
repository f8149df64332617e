"""Starts a program on N ranks of this machine; if one fails, ends the others and exits with its status.

    python tests/ranks.py N PORT PROGRAM.py [WORD ...]

It does what `deepspeed --num_gpus N` does, but imports torch and DeepSpeed once and forks the ranks, so that a launch of the
tests starts seconds earlier. Tests of what the launcher itself does start `deepspeed`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

GRACE_SECONDS = 30  # between SIGTERM and SIGKILL, as DeepSpeed has it
SET_NAME = 15  # of prctl


def main() -> None:
    """Starts, watches, ends."""
    count, port, *words = sys.argv[1:]
    os.environ |= {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.path[0] = str(Path(words[0]).resolve().parent)
    import_libraries()
    ranks: dict[int, int | None] = {}  # process -> exit status
    for rank in range(int(count)):
        if (process := os.fork()) == 0:
            become(rank, words)
        ranks[process] = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        while None in ranks.values() and not any(ranks.values()):
            see(ranks)
            time.sleep(0.02)
        sys.exit(next((status % 256 for status in ranks.values() if status), 0))
    finally:
        end(ranks)


def import_libraries() -> None:
    """What every rank would import, seconds each."""
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401  # by torch's optimizers


def become(rank: int, words: list[str]) -> NoReturn:
    """Runs the program as this rank, as `python -u PROGRAM.py` does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    ctypes.CDLL(None).prctl(SET_NAME, f"rank{rank}".encode())
    sys.argv = [words[0], f"--local_rank={rank}", *words[1:]]
    status = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def see(ranks: dict[int, int | None]) -> None:
    """Notes the exit status of each rank that has ended."""
    for process, status in ranks.items():
        if status is None:
            ended, how = os.waitpid(process, os.WNOHANG)
            if ended:
                ranks[process] = os.waitstatus_to_exitcode(how)


def end(ranks: dict[int, int | None]) -> None:
    """SIGTERM, and SIGKILL for those that live on."""
    deadline = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in [process for process, status in ranks.items() if status is None]:
            os.kill(process, number)
        while None in ranks.values() and time.monotonic() < deadline:
            see(ranks)
            time.sleep(0.02)


if __name__ == "__main__":
    main()
