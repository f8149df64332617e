"""Watchdog: signs of life enter, heartbeat files leave; where they stop, the stacks of a hung rank, and the end of the job.

RUN_DIR/heartbeat/rank-00000.json tells every few seconds what a rank did last and when: step, phase, time (seconds since 1970),
host, pid, step_seconds (of its last step), written (when the file was); at its end the phase is one of `ENDED`, and "error" says
what ended it, if an error did. A rank without a sign of life for --hang_minutes writes the Python stacks of all its threads to
RUN_DIR/stacks/rank-0.txt (to stderr before `settle`) and ends with status 86 (`cli.HUNG`), upon which its launcher ends the
others. A collective waits for the slowest, so that all ranks seem to hang when one does: the one that stands elsewhere than the
others, or has no file because the whole process was stopped, is the culprit.

train.py and train/loop.py give the signs. In `FILE_PHASES`, which may honestly take hours, more counts as one: bytes that the
process reads or writes, and, when its own time is over, a younger sign of any other rank, for which it may be waiting.
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
from igpt_ds.files import read_json, write_json
from igpt_ds.train.run_lock import BEGINNING, ENDED, HEARTBEAT_SECONDS

FILE_PHASES = (*BEGINNING, "save", "consolidate")
LEAST_BYTES = 1 << 20  # between two looks: more than heartbeats take


class Watchdog:
    """A thread of one rank, from `start` to `close`.

    Args:
        hang_minutes: longer than anything between two signs of life takes, a step or a validation batch above all; 0: never ends
            a run, and only writes heartbeats.
    """

    def __init__(self, run_dir: Path, hang_minutes: float, every_seconds: float = HEARTBEAT_SECONDS) -> None:
        name = f"{dist.rank():05d}"
        self.file, self.stacks = run_dir / "heartbeat" / f"rank-{name}.json", run_dir / "stacks" / f"rank-{dist.rank()}.txt"
        self.limit, self.every = 60 * hang_minutes, every_seconds
        self.step, self.phase, self.step_seconds, self.error = 0, BEGINNING[0], 0.0, ""
        self.time, self._alive, self._bytes = time.time(), time.monotonic(), 0
        self._settled, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch, and writes no file yet; `cli.run` closes it, whatever ends the program."""
        cli.at_end(self.close_with)
        self._thread.start()

    def settle(self) -> None:
        """The run directory is this run's: from now on heartbeats are written, the first before this returns.

        Those of ranks that are no more are removed.
        """
        if dist.rank() == 0:
            for old in self.file.parent.glob("rank-*.json"):
                if int(old.stem.removeprefix("rank-")) >= dist.world_size():
                    old.unlink(missing_ok=True)
        # tools/diagnose.py asks by SIGUSR2. A handler in C answers also where no Python runs, as inside a collective.
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        self._live = open(self.stacks.with_suffix(".live.txt"), "a")  # noqa: SIM115  (closed in `close`)
        faulthandler.register(signal.SIGUSR2, self._live, all_threads=True)
        self.write()
        self._settled = True

    def alive(self, phase: str, step: int, step_seconds: float | None = None) -> None:
        """A sign of life: what begins now ("step", "validation", "save"), and the last completed step's seconds."""
        self.phase, self.step = phase, step
        self.step_seconds = self.step_seconds if step_seconds is None else step_seconds
        self._sign()

    def _sign(self) -> None:
        self.time, self._alive = time.time(), time.monotonic()

    def write(self) -> None:
        """Writes the heartbeat file. A disk that is full or gone for a moment is no reason to end a run."""
        what = {"step": self.step, "phase": self.phase, "time": self.time, "host": socket.gethostname(), "pid": os.getpid()}
        what |= {"step_seconds": self.step_seconds, "written": time.time()} | ({"error": self.error} if self.error else {})
        try:
            write_json(self.file, what)
        except OSError as error:
            print(f"heartbeat not written: {error}", file=sys.stderr, flush=True)

    def close(self, phase: str, error: str = "") -> None:
        """Ends the thread; the last heartbeat says how the run ended. Closing again changes nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self.error = error
        self.alive(phase, self.step)
        if self._settled:
            faulthandler.unregister(signal.SIGUSR2)
            self._live.close()
            self.write()

    def close_with(self, error: str) -> None:
        """What `cli.run` calls: the program ends, by an error or without one."""
        self.close("end", " ".join(error.split()))

    def _watch(self) -> None:
        wait = min(self.every, self.limit / 4) if self.limit else self.every
        written = time.monotonic()
        while not self._ended.wait(wait):
            if self.phase in FILE_PHASES:
                self._look_at_bytes()
            if self._settled and time.monotonic() - written >= self.every:
                self.write()
                written = time.monotonic()
            if self.limit and time.monotonic() - self._alive > self.limit and not self._others_live():
                self._give_up()

    def _look_at_bytes(self) -> None:
        seen = transferred_bytes()
        if seen - self._bytes >= LEAST_BYTES:
            self._sign()
        self._bytes = seen

    def _others_live(self) -> bool:
        """Whether, in a phase of long reading and writing, another rank gave a sign of life not longer ago than the limit."""
        if self.phase not in FILE_PHASES or not self._settled:
            return False
        return any(newest_sign(path) > time.time() - self.limit for path in self.file.parent.glob("*.json") if path != self.file)

    def _give_up(self) -> None:
        words = f"no sign of life for {self.limit / 60:g} minutes in phase {self.phase!r} after step {self.step}"
        if self._settled:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with open(self.stacks, "w") as file:  # not renamed into place: what could be written is better than nothing
                file.write(f"{words}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        else:
            print(words, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        where = self.stacks if self._settled else "its stacks stand above"
        print(f"rank {dist.rank()} hangs in phase {self.phase!r} after step {self.step}: {where}", file=sys.stderr, flush=True)
        os._exit(cli.HUNG)


def transferred_bytes(proc: Path = Path("/proc/self")) -> int:
    """What this process has read and written of files so far; 0 where the system does not say."""
    try:
        lines = (proc / "io").read_text().splitlines()
        return sum(int(value) for name, _, value in (line.partition(":") for line in lines) if name in ("rchar", "wchar"))
    except (OSError, ValueError):
        return 0


def newest_sign(path: Path) -> float:
    """When a rank that has not ended gave its last sign of life, by its heartbeat; 0 where there is none."""
    try:
        beat = read_json(path, "heartbeat")
        return 0.0 if beat["phase"] in ENDED else float(beat["time"])
    except (ValueError, KeyError, TypeError):
        return 0.0
