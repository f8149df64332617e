"""One run at a time in a run directory. `take` reserves it until this process ends, or refuses and names the run that uses it.

RUN_DIR/lock, held with flock, decides on one machine and on disks whose locks work across machines. On other disks the
heartbeats (train/heartbeat.py) decide: a heartbeat that keeps changing belongs to a live run. Under slurm/launch.sh,
RUN_DIR/owner decides first: an older start on a node that SLURM lost cannot save, so it must not block the start that replaces
it. Called by train/run_dir.py on rank 0.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from igpt_ds.train.heartbeat import HEARTBEAT_SECONDS, Heartbeat, heartbeat_file, heartbeat_files, read_heartbeat

YOUNG_SECONDS = 3 * HEARTBEAT_SECONDS  # a live run writes a heartbeat within this time
DYING_SECONDS = 5.0  # a killed process still exists until its memory is freed

_locks: dict[Path, int] = {}  # held until the process ends; the system releases them however it ends


def take(run_dir: Path, owned: bool = False, young: float = YOUNG_SECONDS, dying: float = DYING_SECONDS) -> None:
    """Reserves the run directory for this process, or refuses. Waits for a killed run to end.

    Args:
        owned: whether RUN_DIR/owner names this start; then nothing refuses it.
        young: seconds after which an unchanged heartbeat of another machine no longer counts as a live run.
        dying: seconds to wait for a lock, or for a process of this machine, that may be about to end.

    Raises:
        ValueError: another run uses the directory; the error names its machine and process.
    """
    where = run_dir.resolve()
    if where in _locks:
        return
    lock = os.open(where / "lock", os.O_RDWR | os.O_CREAT, 0o666)  # child programs do not inherit it
    try:
        _wait_for(run_dir, lock, owned, young, dying)
    except BaseException:
        os.close(lock)
        raise
    _locks[where] = lock


def _wait_for(run_dir: Path, lock: int, owned: bool, young: float, dying: float) -> None:
    until = time.monotonic() + dying
    while not (ours := _lock(lock)) and not owned and time.monotonic() < until:
        time.sleep(min(0.2, dying))
    if not ours and not owned:
        holder = os.read(lock, 1000).decode(errors="replace").strip()
        raise ValueError(_in_use(run_dir, _holders_heartbeat(run_dir, holder), holder))
    if not owned:
        for path in heartbeat_files(run_dir):
            _wait_for_heartbeat(run_dir, path, young, dying)
    if ours:
        os.ftruncate(lock, 0)
        os.write(lock, f"{socket.gethostname()} (pid {os.getpid()})\n".encode())


def _lock(lock: int) -> bool:
    """Whether this process holds the lock, or the disk supports no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # the heartbeats alone decide
    return True


def _wait_for_heartbeat(run_dir: Path, path: Path, young: float, dying: float) -> None:
    """Returns once this heartbeat certainly does not belong to a live run.

    Raises:
        ValueError: the heartbeat changes, or its process stays alive on this machine.
    """
    first = beat = read_heartbeat(path)
    began, told = time.monotonic(), False
    while beat and first and not beat.ended and time.time() - beat.written < young and time.monotonic() - began < young:
        if beat.local and (beat.pid == os.getpid() or not _is_running(beat.pid)):
            return
        if beat.written != first.written or (beat.local and time.monotonic() - began >= dying):
            raise ValueError(_in_use(run_dir, beat))
        if not told:
            print(
                f"{run_dir}: {_words(beat)}; waiting up to {dying if beat.local else young:.0f} s to see whether it changes",
                flush=True,
            )
        told = True
        time.sleep(min(0.5, young / 10))
        beat = read_heartbeat(path)


def _holders_heartbeat(run_dir: Path, holder: str) -> Heartbeat | None:
    """Rank 0's heartbeat, if the process that the lock names wrote it."""
    beat = read_heartbeat(heartbeat_file(run_dir, 0))
    return beat if beat and holder == f"{beat.host} (pid {beat.pid})" else None


def _is_running(pid: int) -> bool:
    """Whether a process of this machine exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _words(beat: Heartbeat) -> str:
    return f"rank {beat.rank} on {beat.host} (pid {beat.pid}) wrote {beat.file_age(time.time()):.0f} s ago"


def _in_use(run_dir: Path, beat: Heartbeat | None, holder: str = "") -> str:
    who = _words(beat) if beat else f"rank 0 on {holder or 'an unknown machine'} holds {run_dir / 'lock'}"
    return f"{run_dir} is in use: {who}; wait until that run ends, or choose another --run_dir"
