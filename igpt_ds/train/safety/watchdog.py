"""The watchdog. In: reported progress. Out: heartbeat files. If progress stops, it dumps the stacks and ends the job.

A thread of each rank writes the rank's heartbeat (train/heartbeat.py) every few seconds. After --hang_minutes without progress
it writes the Python stacks of all threads to RUN_DIR/stacks/rank-0.txt (to stderr before `settle`) and the last collectives to
RUN_DIR/flight_recorder, and ends the process with status 86 (`cli.HUNG`); the launcher then ends the other ranks. A collective
waits for its slowest rank, so one hung rank makes all ranks seem to hang. The cause is the rank that is in another place than the
others, or the one without a stack file because its whole process was stopped.

train.py and train/loop.py report progress with `alive`. The phases in `FILE_PHASES` may take hours, so there two more things
count as progress: bytes that the process reads or writes, and recent progress of another rank, for which this one may be waiting.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from igpt_ds import cli, dist
from igpt_ds.errors import error_text
from igpt_ds.plain_files import open_plain
from igpt_ds.train.health.pace import Pace
from igpt_ds.train.heartbeat import BEGINNING, HEARTBEAT_SECONDS, Heartbeat, signs
from igpt_ds.train.ledger.rows import EXIT, Ledger
from igpt_ds.train.safety import flight_recorder
from igpt_ds.train.safety.node_beats import NodeBeats

FILE_PHASES = (*BEGINNING, "save", "consolidate")
LEAST_BYTES = 1 << 20  # that count as progress between two checks: more than heartbeats take


class Watchdog:
    """A thread of one rank, from `start` to `close`.

    Args:
        hang_minutes: limit of the time between two calls of `alive`; choose it longer than a step and than a validation batch.
            0 never ends a run and only writes heartbeats.
    """

    def __init__(self, run_dir: Path, hang_minutes: float, every_seconds: float = HEARTBEAT_SECONDS) -> None:
        self.run_dir, self.stacks = run_dir, run_dir / "stacks" / f"rank-{dist.rank()}.txt"
        self.limit, self.every = 60 * hang_minutes, every_seconds
        self._wait = min(self.every / 2, self.limit / 4) if self.limit else self.every / 2
        self.step, self.phase, self.step_seconds, self.error = 0, BEGINNING[0], 0.0, ""
        self.time, self._alive, self._bytes = time.time(), time.monotonic(), 0
        self.ledger = Ledger(run_dir, writes=dist.rank() == 0)
        self.ledger.enter(self.phase)
        self._beats: NodeBeats | None = None
        self.pace: Pace | None = None  # of this rank's last steps
        self._signs, self._others = dict[int, float](), -math.inf  # of other ranks' progress: the last seen, and when it changed
        self._settled, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def time_limit(self) -> timedelta:
        """The limit of a collective: later than this watchdog's, whose report says more than the abort of a collective."""
        return timedelta(seconds=max(2 * self.limit, self.limit + 300)) if self.limit else timedelta(days=7)

    def start(self) -> None:
        """Starts the thread, which writes no file yet. `cli.run` closes it however the program ends."""
        cli.at_end(self.close_with)
        self._thread.start()

    def settle(self) -> None:
        """The run directory belongs to this run now: writes the first heartbeat, and starts to write the others.

        Every rank calls this. It removes the heartbeats of an earlier start.
        """
        self.ledger.begin(self.run_dir)
        # Ranks that wait must see within the limit that this one lives.
        self._beats = NodeBeats.meet(self.run_dir, min(self.every, self.limit / 4) if self.limit else self.every)
        # tools/diagnose.py asks for stacks with SIGUSR2. A handler in C answers even where no Python runs, as in a collective.
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        flight_recorder.make_directory(os.environ)
        self._live = open(self.stacks.with_suffix(".live.txt"), "a", encoding="utf-8", opener=open_plain)  # noqa: SIM115  (see `close`)
        faulthandler.register(signal.SIGUSR2, self._live, all_threads=True)
        self.write()
        self._settled = True

    def alive(self, phase: str, step: int, step_seconds: float | None = None) -> None:
        """Reports progress.

        Args:
            phase: what begins now ("step", "validation", "save").
            step: the last completed step.
            step_seconds: its duration; None keeps the last one.
        """
        self.phase, self.step = phase, step
        self.ledger.enter(phase, step_seconds)
        self.step_seconds = self.step_seconds if step_seconds is None else step_seconds
        self._mark_progress()

    def _mark_progress(self) -> None:
        self.time, self._alive = time.time(), time.monotonic()

    def write(self) -> None:
        """Writes this rank's heartbeat. A full or absent disk does not end the run."""
        beat = Heartbeat(
            rank=dist.rank(),
            step=self.step,
            phase=self.phase,
            time=self.time,
            host=socket.gethostname(),
            pid=os.getpid(),
            step_seconds=self.step_seconds,
            written=time.time(),
            error=self.error,
            pace=self.pace,
        )
        if self._beats is not None:
            try:
                self._beats.write(beat, first=not self._settled)
            except OSError as error:
                print(f"heartbeat not written: {error_text(error)}", file=sys.stderr, flush=True)

    def close(self, phase: str, error: str = "") -> None:
        """Ends the thread and writes the last heartbeat, which says how the run ended. A second call does nothing."""
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
            with contextlib.suppress(OSError):  # a full disk must not hide how the run ended
                self.ledger.record(EXIT, self.step, phase=phase, **({"error": error} if error else {}))

    def close_with(self, error: str) -> None:
        """`cli.run` calls this when the program ends, with the error or with ""."""
        self.close("end", " ".join(error.split()))

    def _watch(self) -> None:
        while not self._ended.wait(self._wait):
            if self.phase in FILE_PHASES:
                self._count_bytes()
            if self._settled:
                self.write()
            idle = time.monotonic() - self._alive
            if self.limit and idle > self.limit / 2 and self.phase in FILE_PHASES and self._settled:
                self._watch_others()
            if self.limit and idle > self.limit and not self._others_live():
                self._give_up()

    def _count_bytes(self) -> None:
        total = transferred_bytes()
        if total - self._bytes >= LEAST_BYTES:
            self._mark_progress()
        self._bytes = total

    def _others_live(self) -> bool:
        """Whether this phase may wait for other ranks, and one of them was seen to make progress within the limit."""
        return self.phase in FILE_PHASES and self._settled and time.monotonic() - self._others < self.limit

    def _watch_others(self) -> None:
        # Their clocks may be wrong, so a change counts, not the time in the file.
        now = {rank: sign for rank, sign in signs(self.run_dir).items() if rank != dist.rank()}
        if any(sign != self._signs.get(rank, sign) for rank, sign in now.items()):
            self._others = time.monotonic()
        self._signs = now

    def _give_up(self) -> None:
        phase, step = self.phase, self.step  # the main thread may go on after all
        words = f"no progress for {self.limit / 60:g} minutes in phase {phase!r} after step {step}"
        if self._settled:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            # not renamed into place: part of the stacks is better than none
            with open(self.stacks, "w", encoding="utf-8", opener=open_plain) as file:
                file.write(f"{words}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            flight_recorder.dump(os.environ, dist.rank())
        else:
            print(words, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        where = self.stacks if self._settled else "its stacks are above"
        print(f"rank {dist.rank()} hangs in phase {phase!r} after step {step}: {where}", file=sys.stderr, flush=True)
        # The other ranks look as often: the launcher ends them before their own reports if this one leaves.
        time.sleep(self._wait)
        os._exit(cli.HUNG)


def transferred_bytes(proc: Path = Path("/proc/self")) -> int:
    """Bytes that this process has read and written so far; 0 where the system does not count them."""
    try:
        lines = (proc / "io").read_text(encoding="utf-8").splitlines()
        return sum(int(value) for name, _, value in (line.partition(":") for line in lines) if name in ("rchar", "wchar"))
    except (OSError, ValueError):
        return 0
