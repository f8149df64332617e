"""The heartbeat file: what a rank did last and when. The one module that knows its format.

Each rank owns RUN_DIR/heartbeat/rank-NNNNN.json and rewrites it every few seconds. train/safety/watchdog.py writes;
train/run_lock.py and ops/status.py read. Neither torch nor numpy is needed, so tools/status.py starts fast.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from igpt_ds.json_files import read_sealed, seal, write_json

HEARTBEAT_SECONDS = 10.0  # between two writes of the file
SILENT_SECONDS = 60.0  # age of the file at which a rank counts as silent: six writes missed
BEGINNING = ("joining", "verifying", "building", "loading", "start")  # phases before the first step
ENDED = ("stopped", "end")  # last phases


@dataclass(frozen=True)
class Heartbeat:
    """One heartbeat. Times are seconds since 1970."""

    rank: int  # from the name of the file
    step: int  # last completed step
    phase: str  # what the rank does now: one of BEGINNING, "step", "validation", "save", ..., or one of ENDED
    time: float  # of the last progress
    host: str
    pid: int
    step_seconds: float  # duration of the last step
    written: float  # when the file was written: later than `time` while the rank makes no progress
    error: str = ""  # why the rank ended, if an error ended it

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
        return not self.ended and (not self.local or _is_running(self.pid))

    def age(self, now: float) -> float:
        """Seconds since the last progress."""
        return max(0.0, now - self.time)

    def file_age(self, now: float) -> float:
        """Seconds since the file was written."""
        return max(0.0, now - self.written)

    def silent(self, now: float) -> bool:
        """Whether the rank stopped writing without ending."""
        return not self.ended and now - self.written > SILENT_SECONDS

    def to_dict(self) -> dict[str, object]:
        """The JSON of the file. The rank is not in it, and "error" only if there was one."""
        return {name: value for name, value in asdict(self).items() if name != "rank" and (name != "error" or value)}


def _is_running(pid: int) -> bool:
    """Whether a process of this machine exists and is not a zombie."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return about.rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    """The path of a rank's heartbeat."""
    return run_dir / "heartbeat" / f"rank-{rank:05d}.json"


def heartbeat_files(run_dir: Path) -> list[Path]:
    """The heartbeats in a run directory, by rank."""
    return sorted((run_dir / "heartbeat").glob("rank-*.json"))


def rank_of(path: Path) -> int:
    """The rank in the name of a heartbeat file.

    Raises:
        ValueError: the name has another form.
    """
    return int(path.stem.removeprefix("rank-"))


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Reads one heartbeat; None if the file is missing, damaged or not a heartbeat, which a live run may cause at any moment."""
    try:
        values = read_sealed(path, "heartbeat", "remove it")
        beat = Heartbeat(
            rank=rank_of(path),
            step=int(values["step"]),
            phase=str(values["phase"]),
            time=float(values["time"]),
            host=str(values["host"]),
            pid=int(values["pid"]),
            step_seconds=float(values.get("step_seconds", 0.0)),
            written=float(values.get("written", values["time"])),
            error=str(values.get("error", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    times = (beat.time, beat.written, beat.step_seconds)
    return beat if all(map(math.isfinite, times)) and 0 < beat.pid < 1 << 31 else None  # other numbers belong to no process


def read_heartbeats(run_dir: Path, world_size: int) -> list[Heartbeat | None]:
    """The heartbeats of ranks 0 to world_size - 1, None for each rank without one."""
    return [read_heartbeat(heartbeat_file(run_dir, rank)) for rank in range(world_size)]


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> None:
    """Writes a rank's heartbeat.

    Raises:
        OSError: the disk is full or does not answer.
    """
    write_json(heartbeat_file(run_dir, beat.rank), seal(beat.to_dict()))


def remove_heartbeats(run_dir: Path, world_size: int) -> None:
    """Removes the heartbeats of ranks that this start does not have."""
    for path in heartbeat_files(run_dir):
        if rank_of(path) >= world_size:
            path.unlink(missing_ok=True)


def moving(run_dir: Path, ranks: Collection[int], seconds: float) -> set[int]:
    """Those of some ranks whose heartbeats change within some seconds.

    The clock of another node may be wrong, so only a change shows that a rank lives.
    """
    first = {rank: _content(heartbeat_file(run_dir, rank)) for rank in ranks}
    found, end = set[int](), time.monotonic() + seconds
    while len(found) < len(first) and time.monotonic() < end:
        time.sleep(min(0.5, seconds / 10))
        found |= {rank for rank, content in first.items() if _content(heartbeat_file(run_dir, rank)) != content}
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def newest_sign(path: Path) -> float:
    """When a rank that still runs last made progress, by its own clock; 0 if it ended or has no heartbeat."""
    beat = read_heartbeat(path)
    return 0.0 if beat is None or beat.ended else beat.time
