"""Starts the tests' programs, on one rank or several, in processes that have imported torch and DeepSpeed already.

    python -u tests/ranks.py FD

A server imports the libraries once, which takes seconds, and forks a process for each program that launcher.py asks for through
socket FD. On several ranks that process does what `deepspeed --num_gpus N` does: it starts the ranks, and if one fails, ends the
others and exits with its status. Tests of what the launcher itself does start `deepspeed`.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

GRACE_SECONDS = 30  # between SIGTERM and SIGKILL, as DeepSpeed has it
IMPORTED = ("deepspeed", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets")  # torch's optimizers import _dynamo
IMPORTED += ("igpt_ds.train.session", "igpt_ds.data.shards.build", "igpt_ds.data.sources")
SET_PARENT_DEATH_SIGNAL, SET_NAME = 1, 15  # of prctl


def serve(connection: socket.socket) -> None:
    """Starts a program for each message, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes in its foreground
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            report(json.loads(message), *files)
            return
        for file in files:
            os.close(file)


def report(request: dict[str, Any], stdout: int, stderr: int, answer: int) -> None:
    """Forks the program and returns in its process; in this one writes the program's process number and its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (process := os.fork()) == 0:
        os.close(answer)
        begin(request, stdout, stderr)
        return
    for file in (stdout, stderr):
        os.close(file)
    os.write(answer, f"{process}\n".encode())
    os.write(answer, f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n".encode())
    os._exit(0)


def begin(request: dict[str, Any], stdout: int, stderr: int) -> None:
    """Runs the program of a request, as `python -u PROGRAM.py` would, in a session of its own."""
    os.setsid()
    for file, number in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ |= request["environment"]
    if os.environ.get("PYTHONWARNINGS") == "error":  # which an interpreter reads when it starts
        warnings.simplefilter("error")
    words = request["words"]
    sys.path[0] = str(Path(words[0]).resolve().parent)
    if request["ranks"] is None:
        execute(words)
    else:
        start_ranks(request["ranks"], words)


def start_ranks(count: int, words: list[str]) -> None:
    """Starts the ranks, watches them, ends them."""
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    ranks: dict[int, int | None] = {}  # process -> exit status
    for rank in range(count):
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


def become(rank: int, words: list[str]) -> NoReturn:
    """Runs the program as this rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    ctypes.CDLL(None).prctl(SET_NAME, f"rank{rank}".encode())
    execute([words[0], f"--local_rank={rank}", *words[1:]])


def execute(words: list[str]) -> NoReturn:
    """Runs the program to its end, and leaves out the end of the interpreter, which would copy the server's memory."""
    sys.argv = words
    status = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
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
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
