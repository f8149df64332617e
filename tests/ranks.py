"""Starts a program on N ranks of this machine; if one fails, ends the others and exits with its status.

    python tests/ranks.py N PORT PROGRAM.py [WORD ...]

It does what `deepspeed --num_gpus N` does, without importing torch twice, so that a launch of the tests starts seconds earlier.
Tests of what the launcher itself does start `deepspeed`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 30  # between SIGTERM and SIGKILL, as DeepSpeed has it


def main() -> None:
    """Starts, watches, ends."""
    count, port, *words = sys.argv[1:]
    world = os.environ | {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(int(count)):
            command = [sys.executable, "-u", words[0], f"--local_rank={rank}", *words[1:]]
            ranks.append(subprocess.Popen(command, env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        while any(rank.poll() is None for rank in ranks):
            if failed := [rank.returncode for rank in ranks if rank.returncode]:
                sys.exit(failed[0] % 256)
            time.sleep(0.02)
        sys.exit(next((rank.returncode % 256 for rank in ranks if rank.returncode), 0))
    finally:
        end(ranks)


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, and SIGKILL for those that live on."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()


if __name__ == "__main__":
    main()
