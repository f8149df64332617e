"""The ranks of a run, from their heartbeats. In: RUN_DIR/heartbeat. Out: a `RankStatus` each. Called by ops/status.py.

The clock of a node may be wrong. So a rank whose heartbeat looks old is silent only if the heartbeat also stands still.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from igpt_ds.train.heartbeat import HEARTBEAT_SECONDS, Heartbeat, all_heartbeats, moving, read_heartbeats

WATCH_SECONDS = 1.5 * HEARTBEAT_SECONDS  # a live rank writes a heartbeat within this time


@dataclass(frozen=True)
class RankStatus:
    """One rank at the time of the status."""

    rank: int
    beat: Heartbeat | None  # None: the rank has no heartbeat
    now: float  # seconds since 1970
    moved: bool | None = None  # whether its heartbeat was seen to change; None: its times are believed

    @property
    def age(self) -> float | None:
        """Seconds since the last progress; None without a heartbeat. Of a rank that was seen to live, by its own clock."""
        return None if self.beat is None else self.beat.age(self.beat.written if self.moved else self.now)

    @property
    def silent(self) -> bool:
        """Whether the rank stopped writing heartbeats without ending, or never wrote one. One of this machine may be killed."""
        if self.beat and not self.beat.ended and not self.beat.may_live and self.beat.file_age(self.now) > WATCH_SECONDS:
            return True
        if self.beat is None or self.moved is None:
            return self.beat is None or self.beat.silent(self.now)
        return not self.beat.ended and not self.moved

    @property
    def error(self) -> str:
        """The error that ended the rank, or ""."""
        return "" if self.beat is None else self.beat.error

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: the heartbeat with "rank", "age" and "silent"; "phase" is None without a heartbeat."""
        if self.beat is None:
            return {"rank": self.rank, "phase": None, "step": 0, "age": None, "silent": True, "host": None, "pid": None}
        return self.beat.to_dict() | {"rank": self.rank, "age": self.age, "silent": self.silent}


def read_ranks(run_dir: Path, world_size: int, now: float, watch: float) -> tuple[RankStatus, ...]:
    """Every rank of a run. A heartbeat that looks old or lies ahead is watched for up to `watch` seconds."""
    beats = dict(enumerate(read_heartbeats(run_dir, world_size)))
    ahead = now + HEARTBEAT_SECONDS
    doubtful = {rank for rank, beat in beats.items() if beat and beat.may_live and (beat.silent(now) or beat.written > ahead)}
    if not watch or not doubtful or (run_dir / "FINISHED").exists():
        return tuple(RankStatus(rank, beat, now) for rank, beat in beats.items())
    alive = moving(run_dir, doubtful, watch)
    newest = all_heartbeats(run_dir) if alive else {}
    beats |= {rank: newest[rank] for rank in alive if rank in newest}
    return tuple(RankStatus(rank, beat, now, rank in alive if rank in doubtful else None) for rank, beat in beats.items())
