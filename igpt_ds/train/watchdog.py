"""Watchdog: signs of life enter, heartbeat files leave; where they stop, the stacks of a hung rank, and the end of the job.

RUN_DIR/heartbeat/rank-00000.json tells every few seconds what a rank did last and when: step, phase, time (seconds since 1970),
host, pid, step_seconds (of its last step), written (when the file was). A rank without a sign of life for --hang_minutes writes
the Python stacks of all its threads to RUN_DIR/stacks/rank-0.txt and ends with status 86 (`cli.HUNG`), upon which its launcher
ends the others. A collective waits for the slowest, so that all ranks seem to hang when one does: the one that stands elsewhere
than the others, or has no file because the whole process was stopped, is the culprit. train/loop.py gives the signs.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from igpt_ds import cli, dist
from igpt_ds.files import write_json

HEARTBEAT_SECONDS = 10.0


class Watchdog:
    """A thread of one rank, from `start` to `close`.

    Args:
        hang_minutes: longer than anything between two signs of life takes, the saving of a checkpoint above all; 0: never ends a
            run, and only writes heartbeats.
    """

    def __init__(self, run_dir: Path, hang_minutes: float, every_seconds: float = HEARTBEAT_SECONDS) -> None:
        name = f"{dist.rank():05d}"
        self.file, self.stacks = run_dir / "heartbeat" / f"rank-{name}.json", run_dir / "stacks" / f"rank-{dist.rank()}.txt"
        self.limit, self.every = 60 * hang_minutes, every_seconds
        self.step, self.phase, self.step_seconds = 0, "start", 0.0
        self.time, self._alive = time.time(), time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch; the first heartbeat is on disk when this returns. Those of ranks that are no more are removed."""
        if dist.rank() == 0:
            for old in self.file.parent.glob("rank-*.json"):
                if int(old.stem.removeprefix("rank-")) >= dist.world_size():
                    old.unlink(missing_ok=True)
        # tools/diagnose.py asks by SIGUSR2. A handler in C answers also where no Python runs, as inside a collective.
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        self._live = open(self.stacks.with_suffix(".live.txt"), "a")  # noqa: SIM115  (closed in `close`)
        faulthandler.register(signal.SIGUSR2, self._live, all_threads=True)
        self.write()
        self._thread.start()

    def alive(self, phase: str, step: int, step_seconds: float | None = None) -> None:
        """A sign of life: what begins now ("step", "validation", "save"), and the last completed step's seconds."""
        self.phase, self.step = phase, step
        self.step_seconds = self.step_seconds if step_seconds is None else step_seconds
        self.time, self._alive = time.time(), time.monotonic()

    def write(self) -> None:
        """Writes the heartbeat file. A disk that is full or gone for a moment is no reason to end a run."""
        what = {"step": self.step, "phase": self.phase, "time": self.time, "host": socket.gethostname(), "pid": os.getpid()}
        try:
            write_json(self.file, what | {"step_seconds": self.step_seconds, "written": time.time()})
        except OSError as error:
            print(f"heartbeat not written: {error}", file=sys.stderr, flush=True)

    def close(self, phase: str) -> None:
        """Ends the thread; the last heartbeat says how the run ended."""
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        self._live.close()
        self.alive(phase, self.step)
        self.write()

    def _watch(self) -> None:
        wait = min(self.every, self.limit / 4) if self.limit else self.every
        written = time.monotonic()
        while not self._ended.wait(wait):
            if time.monotonic() - written >= self.every:
                self.write()
                written = time.monotonic()
            if self.limit and time.monotonic() - self._alive > self.limit:
                self._give_up()

    def _give_up(self) -> None:
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self.stacks, "w") as file:  # not renamed into place: what could be written of it is better than nothing
            file.write(f"no sign of life for {self.limit / 60:g} minutes in phase {self.phase!r} after step {self.step}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"rank {dist.rank()} hangs in phase {self.phase!r} after step {self.step}: {self.stacks}", file=sys.stderr, flush=True
        )
        os._exit(cli.HUNG)
