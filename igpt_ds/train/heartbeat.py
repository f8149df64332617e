"""The heartbeat files: what each rank did last and when. The one module that knows their format.

RUN_DIR/heartbeat/node-NNNNN.json holds the heartbeats of the ranks of a node, of which NNNNN is the first. One of them rewrites
it every few seconds: at 512 ranks a file a rank would be fifty new files a second on a shared disk. Earlier versions wrote such
files, rank-NNNNN.json, which are read as well. train/safety/node_beats.py writes; train/run_lock.py and ops/status.py read.
Neither torch nor numpy is needed, so tools/status.py starts fast.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igpt_ds.json_files import read_sealed, seal, write_json
from igpt_ds.train.health.pace import Pace, pace_from

HEARTBEAT_SECONDS = 10.0  # between two writes of a file
SILENT_SECONDS = 60.0  # age of a heartbeat at which a rank counts as silent: six writes missed
BEGINNING = ("joining", "verifying", "building", "loading", "start")  # phases before the first step
ENDED = ("stopped", "end")  # last phases


@dataclass(frozen=True)
class Heartbeat:
    """One heartbeat. Times are seconds since 1970."""

    rank: int
    step: int  # last completed step
    phase: str  # what the rank does now: one of BEGINNING, "step", "validation", "save", ..., or one of ENDED
    time: float  # of the last progress
    host: str
    pid: int
    step_seconds: float  # duration of the last step
    written: float  # when the rank wrote it: later than `time` while the rank makes no progress
    error: str = ""  # why the rank ended, if an error ended it
    pace: Pace | None = None  # how its last steps divide; None: not measured yet

    @property
    def ended(self) -> bool:
        """Whether the rank wrote its last heartbeat: its program ended."""
        return self.phase in ENDED

    @property
    def local(self) -> bool:
        """Whether the rank runs on this machine."""
        return self.host == socket.gethostname()

    @property
    def may_live(self) -> bool:
        """Whether the rank has not ended and is on another machine, or is a process that exists on this one."""
        return not self.ended and (not self.local or is_running(self.pid))

    def age(self, now: float) -> float:
        """Seconds since the last progress."""
        return max(0.0, now - self.time)

    def file_age(self, now: float) -> float:
        """Seconds since the rank wrote it."""
        return max(0.0, now - self.written)

    def silent(self, now: float) -> bool:
        """Whether the rank stopped writing without ending."""
        return not self.ended and now - self.written > SILENT_SECONDS

    def to_dict(self) -> dict[str, object]:
        """The JSON of one heartbeat; "error" and "pace" are in it only if there are any."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("error", "pace") or value}
        return plain | ({} if self.pace is None else {"pace": self.pace.to_dict()})


def is_running(pid: int) -> bool:
    """Whether a process of this machine exists and is not a zombie."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return about.rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def node_file(run_dir: Path, first: int) -> Path:
    """The heartbeats of a node whose first rank is `first`."""
    return run_dir / "heartbeat" / f"node-{first:05d}.json"


def heartbeat_files(run_dir: Path) -> list[Path]:
    """The files of heartbeats in a run directory."""
    return sorted(path for kind in ("node", "rank") for path in (run_dir / "heartbeat").glob(f"{kind}-*.json"))


def heartbeat_from(values: Any, rank: int | None = None) -> Heartbeat | None:
    """One heartbeat from its JSON; None if it is none.

    Args:
        rank: that in the name of an earlier version's file, whose JSON does not have it.
    """
    try:
        beat = Heartbeat(
            rank=int(values["rank"]) if rank is None else rank,
            step=int(values["step"]),
            phase=str(values["phase"]),
            time=float(values["time"]),
            host=str(values["host"]),
            pid=int(values["pid"]),
            step_seconds=float(values.get("step_seconds", 0.0)),
            written=float(values.get("written", values["time"])),
            error=str(values.get("error", "")),
            pace=pace_from(values.get("pace"), str(values["host"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    times = (beat.time, beat.written, beat.step_seconds)
    return beat if all(map(math.isfinite, times)) and 0 < beat.pid < 1 << 31 else None  # other numbers belong to no process


def _read(path: Path) -> list[Heartbeat | None]:
    """The heartbeats of one file; [] if it is missing or damaged, which a live run may cause at any moment."""
    try:
        values, number = read_sealed(path, "heartbeat", "remove it"), int(path.stem.partition("-")[2])
        return [heartbeat_from(values, number)] if path.stem.startswith("rank") else list(map(heartbeat_from, values["ranks"]))
    except (ValueError, KeyError, TypeError):
        return []


def all_heartbeats(run_dir: Path) -> dict[int, Heartbeat]:
    """Every heartbeat in a run directory, by rank; of a rank in several files the one that it wrote last."""
    found = [beat for path in heartbeat_files(run_dir) for beat in _read(path) if beat is not None]
    newest = {beat.rank: beat for beat in sorted(found, key=lambda beat: beat.written)}
    return {rank: newest[rank] for rank in sorted(newest)}


def read_heartbeats(run_dir: Path, world_size: int) -> list[Heartbeat | None]:
    """The heartbeats of ranks 0 to world_size - 1, None for each rank without one."""
    found = all_heartbeats(run_dir)
    return [found.get(rank) for rank in range(world_size)]


def write_heartbeats(run_dir: Path, beats: Sequence[Heartbeat]) -> None:
    """Writes the heartbeats of the ranks of a node, in the order of ranks.

    Raises:
        OSError: the disk is full or does not answer.
    """
    write_json(node_file(run_dir, beats[0].rank), seal({"ranks": [beat.to_dict() for beat in beats]}))


def remove_heartbeats(run_dir: Path) -> None:
    """Removes the heartbeats of an earlier start."""
    for path in heartbeat_files(run_dir):
        path.unlink(missing_ok=True)


def moving(run_dir: Path, ranks: Collection[int], seconds: float) -> set[int]:
    """Those of some ranks whose heartbeats change within some seconds.

    The clock of another node may be wrong, so only a change shows that a rank lives.
    """
    first, found, end = all_heartbeats(run_dir), set[int](), time.monotonic() + seconds
    while len(found) < len(ranks) and time.monotonic() < end:
        time.sleep(min(0.5, seconds / 10))
        now = all_heartbeats(run_dir)
        found |= {rank for rank in ranks if rank in now and now[rank] != first.get(rank)}
    return found


def signs(run_dir: Path) -> dict[int, float]:
    """When each rank that still runs last made progress, by its own clock."""
    return {rank: beat.time for rank, beat in all_heartbeats(run_dir).items() if not beat.ended}
