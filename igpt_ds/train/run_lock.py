"""One run at a time in a run directory. `take` reserves it until this process ends, or refuses and names the run that uses it.

RUN_DIR/lock, held with flock, decides on one machine and on disks whose locks work across machines. On other disks the
heartbeats (train/heartbeat.py) decide: a heartbeat that keeps changing belongs to a live run. Under slurm/launch.sh,
RUN_DIR/owner decides first: an older start on a node that SLURM lost cannot save, so it must not block the start that replaces
it. Called by train/run_dir.py on rank 0.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.locks import holder_of, note_holder, open_lock, try_lock
from igpt_ds.train.heartbeat import HEARTBEAT_SECONDS, Heartbeat, all_heartbeats

YOUNG_SECONDS = 3 * HEARTBEAT_SECONDS  # a live run writes a heartbeat within this time
DYING_SECONDS = 5.0  # a killed process still exists until its memory is freed

_locks: dict[Path, int] = {}  # held until the process ends; the system releases them however it ends


def take(run_dir: Path, owned: bool = False, young: float = YOUNG_SECONDS, dying: float = DYING_SECONDS) -> None:
    """Reserves the run directory for this process, or refuses. Waits for a killed run to end.

    Args:
        owned: whether RUN_DIR/owner names this start; then nothing refuses it.
        young: seconds after which an unchanged heartbeat no longer counts as a live run.
        dying: seconds to wait for a lock, or for a process of this machine, that may be about to end.

    Raises:
        ValueError: another run uses the directory; the error names its machine and process.
    """
    where = run_dir.resolve()
    if where in _locks:
        return
    lock = open_lock(where / "lock")  # child programs do not inherit it
    try:
        _wait_for(run_dir, lock, owned, young, dying)
    except BaseException:
        os.close(lock)
        raise
    _locks[where] = lock


def _wait_for(run_dir: Path, lock: int, owned: bool, young: float, dying: float) -> None:
    until = time.monotonic() + dying
    while (ours := try_lock(lock)) is False and not owned and time.monotonic() < until:
        time.sleep(min(0.2, dying))
    if ours is False and not owned:
        holder = holder_of(lock)
        raise InputError(_in_use(run_dir, _holders_heartbeat(run_dir, holder), holder))
    if not owned:
        _wait_for_heartbeats(run_dir, young, dying)
    if ours is not False:
        note_holder(lock)


def _wait_for_heartbeats(run_dir: Path, young: float, dying: float) -> None:
    """Returns once no heartbeat can belong to a live run. Clocks of other machines may be wrong, so a change decides.

    Raises:
        ValueError: a heartbeat changes, or its process stays alive on this machine.
    """
    first = {rank: beat for rank, beat in all_heartbeats(run_dir).items() if _may_live(beat)}
    began, told = time.monotonic(), False
    while first:
        waited, now = time.monotonic() - began, all_heartbeats(run_dir)
        for rank, before in list(first.items()):
            beat = now.get(rank)
            if beat is None or not _may_live(beat) or waited >= young:
                del first[rank]
            elif beat != before or (beat.local and beat.file_age(time.time()) < young and waited >= dying):
                raise InputError(_in_use(run_dir, beat))
            elif not told:
                seconds = dying if beat.local else young
                print(f"{run_dir}: {_words(beat)}; waiting up to {seconds:.0f} s to see whether it changes", flush=True)
                told = True
        if first:
            time.sleep(min(0.5, young / 10))


def _may_live(beat: Heartbeat) -> bool:
    return beat.may_live and not (beat.local and beat.pid == os.getpid())


def _holders_heartbeat(run_dir: Path, holder: str) -> Heartbeat | None:
    """Rank 0's heartbeat, if the process that the lock names wrote it."""
    beat = all_heartbeats(run_dir).get(0)
    return beat if beat and holder == f"{beat.host} (pid {beat.pid})" else None


def _words(beat: Heartbeat) -> str:
    return f"rank {beat.rank} on {beat.host} (pid {beat.pid}) wrote {beat.file_age(time.time()):.0f} s ago"


def _in_use(run_dir: Path, beat: Heartbeat | None, holder: str = "") -> str:
    who = _words(beat) if beat else f"rank 0 on {holder} holds {run_dir / 'lock'}"
    return f"{run_dir} is in use: {who}; wait until that run ends, or choose another --run_dir"
