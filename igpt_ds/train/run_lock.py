"""One run in a run directory at a time. A run directory enters; it is ours until this process ends, or who is there is named.

RUN_DIR/lock, held by flock, decides on one machine and on disks whose locks reach across machines. Where they do not, the
heartbeats of safety/watchdog.py do: one that goes on moving is a run at work. Under slurm/launch.sh RUN_DIR/owner has decided
before: an older start that lives on, on a node that SLURM lost, cannot save and must not keep its successor waiting. Called by
train/run_dir.py on rank 0.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 10.0  # between two writes of a rank's heartbeat
BEGINNING = ("joining", "verifying", "building", "loading", "start")  # phases of a heartbeat before the first step
ENDED = ("stopped", "end")  # last phases of a heartbeat
YOUNG_SECONDS = 3 * HEARTBEAT_SECONDS  # a live run has written a heartbeat by then
DYING_SECONDS = 5.0  # a process that was killed is there until its memory is given back

_locks: dict[Path, int] = {}  # held until the process ends; the system lets go of them however it ends


def take(run_dir: Path, owned: bool = False, young: float = YOUNG_SECONDS, dying: float = DYING_SECONDS) -> None:
    """Makes the run directory ours, or refuses. Waits for what may be the last signs of a run that was killed.

    Args:
        owned: whether RUN_DIR/owner says that it is ours: then nobody refuses us.
        young: seconds for which a heartbeat of another machine may be that of a run at work.
        dying: seconds for which a lock, or a process of this machine, may be one that is ending.

    Raises:
        ValueError: another run is at work there; the machine and the process are named.
    """
    where = run_dir.resolve()
    if where in _locks:
        return
    lock = os.open(where / "lock", os.O_RDWR | os.O_CREAT, 0o666)  # children that are other programs do not inherit it
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
        raise ValueError(_at_work(run_dir, _beat_of(run_dir, holder), holder))
    if not owned:
        for path in sorted((run_dir / "heartbeat").glob("rank-*.json")):
            _outlive(run_dir, path, young, dying)
    if ours:
        os.ftruncate(lock, 0)
        os.write(lock, f"{socket.gethostname()} (pid {os.getpid()})\n".encode())


def _lock(lock: int) -> bool:
    """Whether the lock is ours, or this disk knows none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # the heartbeats alone decide
    return True


def _outlive(run_dir: Path, path: Path, young: float, dying: float) -> None:
    """Returns once this heartbeat is surely none of a run at work.

    Raises:
        ValueError: it moves, or its process goes on living on this machine.
    """
    first = beat = _read(path)
    began, told = time.monotonic(), False
    while beat and beat["phase"] not in ENDED and time.time() - beat["written"] < young and time.monotonic() - began < young:
        here = beat["host"] == socket.gethostname()
        if here and (beat["pid"] == os.getpid() or not _lives(beat["pid"])):
            return
        if beat["written"] != first["written"] or (here and time.monotonic() - began >= dying):
            raise ValueError(_at_work(run_dir, beat))
        if not told:
            print(
                f"{run_dir}: rank {beat['rank']} on {beat['host']} (pid {beat['pid']}) wrote {_age(beat):.0f} s ago; "
                f"waiting up to {dying if here else young:.0f} s to see whether it moves",
                flush=True,
            )
        told = True
        time.sleep(min(0.5, young / 10))
        beat = _read(path)


def _read(path: Path) -> dict[str, Any]:
    """A heartbeat with its rank; {} for what is none: it was removed, or nobody's."""
    try:
        beat = json.loads(path.read_text())
        beat = {name: beat[name] for name in ("host", "phase")} | {
            "rank": int(path.stem.removeprefix("rank-")),
            "pid": int(beat["pid"]),
            "written": float(beat.get("written", beat["time"])),
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return beat


def _beat_of(run_dir: Path, holder: str) -> dict[str, Any]:
    beat = _read(run_dir / "heartbeat" / "rank-00000.json")
    return beat if beat and holder == f"{beat['host']} (pid {beat['pid']})" else {}


def _lives(pid: int) -> bool:
    """Whether a process of this machine exists; not a zombie, which is only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _age(beat: dict[str, Any]) -> float:
    return max(0.0, time.time() - beat["written"])


def _at_work(run_dir: Path, beat: dict[str, Any], holder: str = "") -> str:
    if beat:
        who = f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']}) wrote {_age(beat):.0f} s ago"
    else:
        who = f"rank 0 on {holder or 'some machine'} holds {run_dir / 'lock'}"
    return f"{run_dir} is at work: {who}; wait for it, or choose another --run_dir"
