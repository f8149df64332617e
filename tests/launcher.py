"""Starts programs for tests as a user would, and ends every process that came of them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
MARK = "IGPT_DS_TEST_LAUNCH"  # in the environment of every process that a test launches, and of its children


@functools.cache
def server() -> socket.socket:
    """The connection to a server of ranks.py, which this process starts at its first launch."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-u", str(Path(__file__).with_name("ranks.py")), str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    atexit.register(process.kill)
    return ours


_ports = itertools.count(13 * os.getpid())


def free_port() -> int:
    """A TCP port that no other worker of pytest-xdist gets, and that the system does not hand out by itself."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 10_000 + 2_000 * worker + next(_ports) % 2_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Forked:
    """A program that ranks.py runs, with the members of subprocess.Popen that tests use."""

    def __init__(self, words: list[str], ranks: int | None, environment: dict[str, str]) -> None:
        self.args = words
        self.returncode: int | None = None
        reads, writes = zip(*(os.pipe() for _ in range(3)), strict=True)
        request = {"words": words, "ranks": ranks, "cwd": str(ROOT), "environment": environment}
        socket.send_fds(server(), [json.dumps(request).encode()], writes)
        for file in writes:
            os.close(file)
        self.stdout, self.stderr, self._answer = (os.fdopen(file, errors="replace") for file in reads)
        self.pid = int(self._answer.readline())
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        self.returncode = int(self._answer.readline())
        self._answer.close()

    def poll(self) -> int | None:
        """The exit status, None while the program runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, as soon as the program ends."""
        self._watcher.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that the program and its children print, after the end of all that hold its streams."""
        said = ["", ""]

        def read(number: int) -> None:
            with (self.stdout, self.stderr)[number] as stream:
                said[number] = stream.read()

        readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in (0, 1)]
        end = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else end - time.monotonic())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """Sends a signal, if the program still runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[str] | Forked


class Launcher:
    """Starts programs as a user would, and ends every process that came of them, in whatever session it hides."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._started: list[Process] = []
        self._sessions: set[int] = set()

    def __call__(
        self,
        command: Sequence[str | Path],
        ranks: int | None = None,
        timeout: float = 600,
        env: dict[str, str] | None = None,
        by: str = "ranks",
    ) -> subprocess.CompletedProcess[str]:
        """Runs to the end; what still lives afterwards is killed. Fails the test after `timeout` seconds."""
        process = self.start(command, ranks, env, by)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"{process.args} did not end in {timeout} s")
        self.end()
        return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)

    def start(
        self, command: Sequence[str | Path], ranks: int | None = None, env: dict[str, str] | None = None, by: str = "ranks"
    ) -> Process:
        """Starts at the repository root: on `ranks` CPU processes, by Python when a .py comes first, else as is.

        `by` is what starts a Python program: "ranks" is ranks.py; "deepspeed" is its launcher, six seconds slower; "python" is
        a new interpreter, for a program whose libraries read the environment when they are imported.
        """
        words, port = [str(word) for word in command], str(free_port())
        environment = os.environ | {MARK: self._mark} | (env or {})
        if ranks is not None:
            environment["MASTER_PORT"] = port
        process: Process
        if words[0].endswith(".py") and by == "ranks":
            process = Forked(words, ranks, environment)
        else:
            if ranks is not None:
                words = ["deepspeed", "--num_gpus", str(ranks), "--master_port", port, *words]
            elif words[0].endswith(".py"):
                words = [sys.executable, *words]
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        self._sessions.add(process.pid)
        return process

    def end(self) -> None:
        """SIGKILL for every process of ours until there is none, and no zombie."""
        while self._kill():
            time.sleep(0.02)
        for started in self._started:
            started.wait()
        self._sessions.clear()  # their numbers may be given to other processes now

    def _kill(self) -> int:
        """A forked process shows the environment of the server, so that its session tells whose it is."""
        found = 0
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) in self._sessions or process.environ().get(MARK) == self._mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found += 1
            except (psutil.Error, OSError):
                continue  # it has gone, or it is somebody else's
        return found

    def close(self) -> None:
        """The end, for processes that the test itself did not wait for."""
        self.end()
        for started in self._started:
            for pipe in (started.stdout, started.stderr):
                if pipe is not None:
                    pipe.close()
