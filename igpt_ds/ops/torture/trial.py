"""One trial in a forked child. In: a function. Out: how it ended, within limits of time and memory.

A fork of a process that has imported everything starts in milliseconds. The child works in a directory of its own, by relative
paths, so that files that hold paths are the same in every trial. A file "ran" there shows that something was executed.
"""

from __future__ import annotations

import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from igpt_ds import cli
from igpt_ds.markdown import as_table

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 30.0  # limit of one trial
MEMORY = 4 << 30  # bytes that a trial may take beyond its parent
RAN = "ran"  # file that a gadget makes in the directory of its trial


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    how: "ok", "error" (one line and status 2), "traceback" (anything else that ended it), "hang", "killed" or "ran".
    """

    how: str
    text: str  # the result, or what it printed


@dataclass(frozen=True)
class Trial:
    """A function of a fresh directory, the current one, that returns a result; `name` says what the trial is of."""

    name: str
    work: Callable[[Path], str]
    seconds: float | None = None  # its limit; None: SECONDS


def tool(name: str, *arguments: object) -> None:
    """Runs tools/NAME.py, or NAME.py beside it, in this process, as `python tools/NAME.py` does.

    Raises:
        SystemExit: the tool ended with another status than 0.
    """
    sys.argv = [f"{name}.py", *map(str, arguments)]
    file = ROOT / "tools" / f"{name}.py"
    try:
        runpy.run_path(str(file if file.exists() else ROOT / file.name), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def run_all(trials: Iterable[Trial], where: Path, cores: int) -> Iterator[tuple[Trial, Ended]]:
    """Runs trials, some at the same time; each result comes with its trial, in the order in which they end."""
    waiting, live = iter(enumerate(trials)), dict[int, tuple[Trial, Path, float]]()
    more = True
    while more or live:
        while more and len(live) < cores:
            number, trial = next(waiting, (0, None))
            if trial is None:
                more = False
            else:
                place = where / f"trial-{number}"
                live[start(trial, place)] = (trial, place, time.monotonic() + (trial.seconds or SECONDS))
        for process, (trial, place, end) in list(live.items()):
            found, how = os.waitpid(process, os.WNOHANG)
            if not found and time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                found, how = process, -1
            if found:
                del live[process]
                yield trial, judge(place, how)
                shutil.rmtree(place, ignore_errors=True)
        time.sleep(0.002)


def run_one(work: Callable[[Path], str], where: Path, seconds: float | None = None) -> Ended:
    """Runs one trial to its end."""
    return next(run_all([Trial("", work, seconds)], where, 1))[1]


def start(trial: Trial, place: Path) -> int:
    """Forks a child that runs the trial in an empty directory; returns its process number."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if (process := os.fork()) == 0:
        _become(trial, place)
    return process


def _become(trial: Trial, place: Path) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)
        for number, name in ((0, os.devnull), (1, place / "stdout"), (2, place / "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = ["trial"]
        os.chdir(place)

        def main(argv: object) -> None:
            Path("result").write_text(trial.work(Path()), encoding="utf-8")

        cli.run(main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def judge(place: Path, how: int) -> Ended:
    """How a child ended that left its output in a directory; `how` is what waitpid said, -1 after the time limit."""
    said = (place / "stderr").read_text(encoding="utf-8", errors="replace") if (place / "stderr").exists() else ""
    if (place / RAN).exists():
        return Ended("ran", said)
    if how == -1:
        return Ended("hang", said)
    status = os.waitstatus_to_exitcode(how)
    if status == -signal.SIGKILL:
        return Ended("killed", said)
    if status == 0:
        return Ended("ok", (place / "result").read_text(encoding="utf-8"))
    lines = [line for line in said.splitlines() if ": error: " in line]
    if status in (1, 2) and len(lines) == 1 and "Traceback" not in said:
        return Ended("error", lines[0])
    return Ended("traceback", f"status {status}\n{said[-4000:]}")


@dataclass
class Figures:
    """What the trials of one kind led to."""

    name: str
    trials: int = 0
    error: int = 0
    same: int = 0
    silent: int = 0
    traceback: int = 0
    hang: int = 0
    stuck: int = 0
    lost: int = 0
    ran: int = 0
    left: int = 0

    def add(self, outcome: str) -> None:
        """Counts one trial."""
        self.trials += 1
        setattr(self, outcome, getattr(self, outcome) + 1)


HEADINGS: Mapping[str, str] = {
    "name": "of",
    "trials": "trials",
    "error": "one-line errors",
    "same": "same result",
    "silent": "silent",
    "traceback": "traceback",
    "hang": "hang",
    "stuck": "stuck",
    "lost": "lost rows",
    "ran": "ran",
    "left": "left over",
}
BARS = ("silent", "traceback", "hang", "stuck", "lost", "ran")  # none of these may happen


def total(rows: Iterable[Figures]) -> Figures:
    """The sums of all rows."""
    sums = Figures("total")
    for row in rows:
        for name in HEADINGS:
            if name != "name":
                setattr(sums, name, getattr(sums, name) + getattr(row, name))
    return sums


def table(rows: Iterable[Figures]) -> str:
    """The rows as a Markdown table, with their sums."""
    found = list(rows)
    return as_table(list(HEADINGS.values()), [[str(getattr(row, name)) for name in HEADINGS] for row in [*found, total(found)]])
