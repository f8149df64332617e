"""Runs tools that kill themselves with SIGKILL at their n-th file-system call. One process imports them and forks for each run.

    with killed.Tools() as tools:
        whole = tools.run("tools/consolidate.py", "--run_dir", ..., under=tmp_path)  # whole.calls: of an uninterrupted run
        tools.run("tools/consolidate.py", "--run_dir", ..., under=tmp_path, at=3).code  # -SIGKILL, before the third call

`start` and `wait` run several at the same time. A call counts if it makes, renames, opens for writing, empties, forces to disk or
removes something under `under`. By hand: `python tests/killed.py`, then lines of JSON, as `Tools` writes them.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "link", "symlink", "fsync", "ftruncate", "truncate", "chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Trial:
    """How one run ended: its exit status, negative for a signal, its counted calls, and what it printed."""

    code: int
    calls: int
    output: str


class Tools:
    """A process that imports tools and forks for each run."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> Tools:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")

    def start(self, tool: str, *argv: object, under: Path, at: int = 0) -> None:
        """Begins a run; `at` 0 never kills it."""
        self._tell({"tool": tool, "argv": list(map(str, argv)), "under": str(under.resolve()), "at": at})

    def wait(self) -> Trial:
        """The end of the oldest run that was started and not waited for."""
        self._tell({})
        assert self._process.stdout is not None
        return Trial(**json.loads(self._process.stdout.readline()))

    def run(self, tool: str, *argv: object, under: Path, at: int = 0) -> Trial:
        """Runs a tool to its end."""
        self.start(tool, *argv, under=under, at=at)
        return self.wait()

    def _tell(self, request: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of each file under a directory, hidden ones too; b"" marks a directory. Not RUN_DIR/lock: it names a process."""
    found = {str(path.relative_to(directory)): b"" if path.is_dir() else path.read_bytes() for path in directory.rglob("*")}
    found.pop("lock", None)
    return found


def begin(world: Path, before: Path | None = None) -> Path:
    """world/out, empty or a copy of `before`."""
    out = world / "out"
    shutil.rmtree(out, ignore_errors=True)
    if before is None:
        out.mkdir()
    else:
        shutil.copytree(before, out)
    return out


@dataclass(frozen=True)
class Case:
    """A tool, its arguments when it writes into a directory, and where the directories of its trials lie."""

    tools: Tools
    tool: str
    words: Callable[[Path], list[object]]
    world: Path

    def run(self, out: Path, at: int = 0) -> Trial:
        """Runs the tool."""
        return self.tools.run(self.tool, *self.words(out), under=self.world, at=at)

    def kills(self, kills: int, before: Path | None = None) -> None:
        """Kills the tool at some calls, the last ones among them, and compares what the same command makes of it."""
        out = begin(self.world, before)
        whole = self.run(out)
        assert whole.code == 0, whole.output
        expected, calls = contents(out), range(1, whole.calls + 1)
        for at in [*random.Random(0).sample(calls[:-3], min(kills, len(calls) - 3)), *calls[-3:]]:
            out = begin(self.world, before)
            assert self.run(out, at).code == -signal.SIGKILL
            again = self.run(out)
            assert again.code == 0, f"after a kill at call {at} of {whole.calls}: {again.output}"
            assert contents(out) == expected, f"killed at call {at} of {whole.calls}"

    def two_at_once(self, trials: int = 1) -> None:
        """Runs the tool twice at the same time. Each ends well or is refused in one line; the result is whole."""
        out = begin(self.world)
        assert self.run(out).code == 0
        expected = contents(out)
        for _ in range(trials):
            out = begin(self.world)
            for _ in range(2):
                self.tools.start(self.tool, *self.words(out), under=self.world)
            ended = [self.tools.wait() for _ in range(2)]
            assert sorted(one.code for one in ended) in ([0, 0], [0, 2]), ended
            for one in ended:
                assert one.code == 0 or any(why in one.output for why in ("being written by", "exists already")), one
            assert contents(out) == expected


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


@dataclass(frozen=True)
class _Child:
    """A forked run: its process, and the files of its output, of one byte for each call, and of the modules that it imported."""

    pid: int
    output: IO[bytes]
    counter: IO[bytes]
    modules: IO[bytes]

    def end(self) -> Trial:
        """Waits for it."""
        _, status = os.waitpid(self.pid, 0)
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        self.modules.seek(0)
        for name in self.modules.read().decode().split("\n"):
            if name and name not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(name)  # what a tool imports late, the next run has already
        return Trial(os.waitstatus_to_exitcode(status), os.fstat(self.counter.fileno()).st_size, text)


def _fork(main: Callable[[], None], argv: list[str], at: int, under: str) -> _Child:
    output, counter, modules = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115
    child = os.fork()
    if child:
        return _Child(child, output, counter, modules)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.argv = argv
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
            os.write(modules.fileno(), "\n".join(sys.modules).encode())
        os._exit(code)


def _serve(requests: Iterator[str]) -> None:
    from igpt_ds import cli  # what every tool imports

    entries: dict[str, Callable[..., None]] = {}
    children = deque[_Child]()
    for line in requests:
        if request := json.loads(line):
            tool = str(ROOT / request["tool"])
            if tool not in entries:
                entries[tool] = runpy.run_path(tool, run_name="killed_tool")["main"]
            main = partial(cli.run, entries[tool])
            children.append(_fork(main, [tool, *request["argv"]], request["at"], request["under"]))
        else:
            print(json.dumps(vars(children.popleft().end())), flush=True)


if __name__ == "__main__":
    _serve(iter(sys.stdin.readline, ""))
