"""Runs a tool that kills itself with SIGKILL at its n-th file-system call, any number of times after one import.

    with killed.Tool("tools/consolidate.py", under=tmp_path) as tool:
        whole = tool.run("--run_dir", ...)          # whole.calls: how many calls an uninterrupted run makes
        tool.run("--run_dir", ..., at=3).code       # -SIGKILL, before the third call

By hand: `python tests/killed.py UNDER tools/consolidate.py`, then a line of JSON for each trial: {"argv": [...], "at": 3}.
A call counts if it makes, renames, opens for writing, empties, forces to disk or removes something under `under`.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "link", "symlink", "fsync", "ftruncate", "truncate", "chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Trial:
    """How one run ended: its exit status, negative for a signal, its counted calls, and what it printed."""

    code: int
    calls: int
    output: str


class Tool:
    """A process that imported a tool and forks for each run."""

    def __init__(self, tool: str, under: Path) -> None:
        words = [sys.executable, __file__, str(under.resolve()), str(ROOT / tool)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")

    def start(self, *argv: object, at: int = 0) -> None:
        """Begins a run, so that several tools can run at the same time; `at` 0 never kills it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": list(map(str, argv)), "at": at}) + "\n")
        self._process.stdin.flush()

    def wait(self) -> Trial:
        """The end of the run that was started."""
        assert self._process.stdout is not None
        return Trial(**json.loads(self._process.stdout.readline()))

    def run(self, *argv: object, at: int = 0) -> Trial:
        """Runs the tool with these arguments."""
        self.start(*argv, at=at)
        return self.wait()


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of each file under a directory, hidden ones too; b"" marks a directory."""
    return {str(path.relative_to(directory)): b"" if path.is_dir() else path.read_bytes() for path in directory.rglob("*")}


def install(under: str, at: int, count: Callable[[], None]) -> None:
    """Makes this process count its file-system calls under a directory, and kill itself before number `at`."""
    made = 0

    def step(*places: Any) -> None:
        nonlocal made
        for place in places:
            with suppress(OSError, TypeError, ValueError):
                is_open = isinstance(place, int)
                name = Path(f"/proc/self/fd/{place}").readlink() if is_open else Path(os.fsdecode(place)).absolute()
                if name.is_relative_to(under):
                    made += 1
                    if made == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count()
                    return

    def counted(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dir_fd") is not None:  # shutil.rmtree names files within an open directory
                step(kwargs["dir_fd"])
            else:
                step(*args[: 2 if name in ("replace", "rename", "link", "symlink") else 1])
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name), name))
    plain_open, plain_os_open = builtins.open, os.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            step(file)
        return plain_open(file, mode, *args, **kwargs)

    def os_opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & WRITING:
            step(path)
        return plain_os_open(path, flags, *args, **kwargs)

    builtins.open = io.open = opened
    os.open = os_opened


def _trial(main: Callable[[], None], argv: list[str], at: int, under: str, tool: str) -> Trial:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counter:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = [tool, *argv]
            install(under, at, lambda: os.write(counter.fileno(), b"."))
            code = 1
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                with suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
        return Trial(os.waitstatus_to_exitcode(status), os.fstat(counter.fileno()).st_size, text)


def _serve(under: str, tool: str, requests: Iterator[str]) -> None:
    from igpt_ds import cli  # pulled in by every tool

    entry = runpy.run_path(tool, run_name="killed_tool")["main"]
    if torch := sys.modules.get("torch"):
        torch.empty(1, device="meta").normal_()  # imports 800 modules, once for all runs
    for line in requests:
        if line.strip():
            request = json.loads(line)
            found = _trial(lambda: cli.run(entry), request["argv"], request["at"], under, tool)
            print(json.dumps(vars(found)), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], iter(sys.stdin.readline, ""))
