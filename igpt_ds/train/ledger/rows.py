"""Where the seconds of a start go. In: the phases that the watchdog sees. Out: rows of RUN_DIR/restarts.jsonl, and their reader.

Rank 0 adds a row when the run directory is its own (`begin`), before the first step (`train`), after each save (`save`), after a
rollback (`rollback`) and at the end (`exit`). Each row has the step, the time, and the seconds of each phase since the row before
it, so that the rows of a start add up to its wall clock. A batch job adds its own rows, with a "job", to the same file
(ops/restart_log.py). Rows are only ever added. goodput.py sums them up. Neither torch nor numpy is needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from igpt_ds.errors import naming
from igpt_ds.plain_files import open_plain
from igpt_ds.train.heartbeat import all_heartbeats
from igpt_ds.train.ledger.tail import timed_rows

BEGIN, TRAIN, SAVE, ROLLBACK, EXIT = "begin", "train", "save", "rollback", "exit"
IMPORTS = "imports"  # the phase from the start of the process to the watchdog's
_OLDEST = 3600.0  # seconds; a process that is older did something else before

_ends = [0.0]  # when the last start in this process ended, by the monotonic clock


class Ledger:
    """The seconds of one start of this rank by phase.

    Args:
        writes: whether this rank writes the rows.
    """

    def __init__(self, run_dir: Path, writes: bool) -> None:
        self._path, self._writes = run_dir / "restarts.jsonl", writes
        now = time.monotonic()
        self._since = max(now - process_age(), _ends[0])
        self.began = time.time() - (now - self._since)
        self._phase, self._seconds = IMPORTS, dict[str, float]()
        self._first_step: float | None = None
        self._stepped = False

    def enter(self, phase: str, step_seconds: float | None = None) -> None:
        """Ends the phase so far and begins another; the first `step_seconds` of a start are those of its first step."""
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since, self._phase = now, phase
        if step_seconds is not None and not self._stepped:
            self._first_step, self._stepped = step_seconds, True

    def begin(self, run_dir: Path) -> None:
        """The row of a start whose run directory is its own, with the last sign of life of the start before it.

        The heartbeats and the curves of that start must still be there.
        """
        if self._writes:
            run_dir.mkdir(parents=True, exist_ok=True)
            signs = [beat.written for beat in all_heartbeats(run_dir).values()] + [row.time for row in timed_rows(run_dir)]
            last = {"last_alive": timestamp(max(signs))} if signs else {}
            self.record(BEGIN, 0, began=timestamp(self.began), **last)

    def record(self, event: str, step: int, **more: object) -> None:
        """Adds a row.

        Args:
            step: the last completed one; of a rollback the one that it returned to.

        Raises:
            OSError: it cannot be written.
        """
        self.enter(self._phase)
        seconds = {phase: round(value, 3) for phase, value in self._seconds.items()}
        self._seconds.clear()
        if event == EXIT:
            _ends[0] = time.monotonic()
        if self._first_step is not None:
            more = {"first_step_seconds": round(self._first_step, 3)} | more
            self._first_step = None
        if self._writes:
            row = {"event": event, "time": timestamp(time.time()), "step": step, "seconds": seconds}
            append_row(self._path, row | more)


def timestamp(seconds: float) -> str:
    """A time in seconds since 1970 as restarts.jsonl has it: local, with its zone."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def read_time(text: object) -> float | None:
    """A time of restarts.jsonl or of SLURM in seconds since 1970; None for "Unknown" and what is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not tell, or if it did something else before."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100  # the kernel tells users 100 ticks a second
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if 0 < age < _OLDEST else 0.0


def append_row(path: Path, row: dict[str, object]) -> None:
    """Adds a row to restarts.jsonl.

    Raises:
        OSError: it cannot be written.
    """
    with naming(path), open(path, "a", encoding="utf-8", opener=open_plain) as file:
        file.write(json.dumps(row) + "\n")


def read_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The rows of restarts.jsonl, oldest first; lines that are no rows are left out. A missing file has none."""
    try:
        text = (run_dir / "restarts.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            row = json.loads(line[max(0, line.rfind('{"event"')) :])  # a row may follow one that a full disk tore
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
