"""The state of a run, from its directory alone. In: files. Out: a `Status`. ops/status_text.py prints it.

Called by tools/status.py and tools/diagnose.py. The run may write at the same time, on other machines. Neither torch nor numpy is
imported, so that tools/status.py starts fast; only the end of a long train.jsonl is read.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json, read_json_lines, read_sealed
from igpt_ds.ops.rank_status import RankStatus, read_ranks
from igpt_ds.ops.restart_log import fast_images
from igpt_ds.schema import record_from
from igpt_ds.train.checkpoint.directory import complete_checkpoints, step_of
from igpt_ds.train.health.pace import Pace, SlowRank, slow_ranks
from igpt_ds.train.heartbeat import BEGINNING
from igpt_ds.train.ledger.tail import tail_rows
from igpt_ds.train.run_dir import read_run

SPEED_ROWS = 10  # whose median is the speed
HANG_SECONDS, HANG_STEPS = 120.0, 20  # a run hangs if a step takes this long and this many times as long as the step before it


@dataclass(frozen=True)
class SavedCheckpoint:
    """The newest complete checkpoint."""

    step: int
    age: float  # seconds
    path: str


@dataclass(frozen=True)
class DivergedRun:
    """RUN_DIR/LOST.json: the loss guards ended the run. Fields are None if the file is torn."""

    step: int | None = None
    loss: float | None = None  # nats per token; None if it was not finite
    why: str | None = None
    time: float = 0.0  # seconds since 1970


@dataclass(frozen=True)
class CurveRow:
    """What the status needs of a row of train.jsonl: a training step or a validation. What a row does not have is None."""

    step: int
    loss: float | None = None  # nats per token
    images_per_s: float | None = None
    mfu: float | None = None
    data_wait: float | None = None
    skipped_steps: int | None = None
    slowest_rank: int | None = None
    slowest_ratio: float | None = None
    val_loss: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.step < 1 << 40:
            raise InputError(f"step {self.step}")


@dataclass(frozen=True)
class Status:
    """A run at one time. A value is None while the run has not measured it."""

    run_dir: str
    recipe: str
    state: str  # see `state_of`
    why: str | None  # of a run that ended badly
    step: int  # completed
    steps: int
    images_seen: int
    loss: float | None  # nats per token
    val_loss: float | None
    val_step: int | None
    images_per_s: float | None
    mfu: float | None  # model FLOPs utilization, 0 to 1
    data_wait: float | None  # part of the time spent waiting for data, 0 to 1
    skipped_steps: int | None
    seconds_left: float | None
    checkpoint: SavedCheckpoint | None
    fast_step: int | None  # of a newer state in --fast_dir
    restarts: int
    rollbacks: int
    slowest: SlowRank | None  # the rank that slows the run most
    world_size: int
    ranks: tuple[RankStatus, ...]
    time: float  # seconds since 1970

    @property
    def hosts(self) -> list[str]:
        """The machines of the ranks with a heartbeat, each once, by rank."""
        return list(dict.fromkeys(rank.beat.host for rank in self.ranks if rank.beat))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
            "slowest": None if self.slowest is None else self.slowest.to_dict(),
            "ranks": [rank.to_dict() for rank in self.ranks],
        }


def read_status(run_dir: Path, now: float, watch: float = 0.0) -> Status:
    """Everything that the run directory says about a run at a time, in seconds since 1970.

    Args:
        watch: seconds to look whether heartbeats move whose times say that their ranks are silent, or lie ahead of `now`.

    Raises:
        ValueError: `run_dir` is not a run directory.
    """
    if not (run_dir / "run.json").exists():
        what = "is not a run directory: it has no run.json" if run_dir.is_dir() else "does not exist"
        raise InputError(f"{run_dir} {what}; name the --run_dir of a train.py that has started training")
    run = read_run(run_dir)
    recipe, rows = run["recipe"], tail_rows(run_dir / "train.jsonl", CurveRow)
    training = [row for row in rows if row.loss is not None]
    validation = next((row for row in reversed(rows) if row.val_loss is not None), None)
    last = training[-1] if training else CurveRow(0)
    ranks = read_ranks(run_dir, run["world_size"], now, watch)
    speeds = [row.images_per_s for row in training[-SPEED_ROWS:] if row.images_per_s is not None]
    speed = statistics.median(speeds) if speeds else None
    step = max((row.step for row in rows), default=0)
    left = (recipe["steps"] - step) * recipe["batch_images"] / speed if speed else None
    state, saved = state_of(run_dir, ranks), _newest_checkpoint(run_dir / "checkpoints", now)
    fast = 0 if state in ("finished", "stopped") else fast_images(run_dir) // recipe["batch_images"]
    failed = state in ("lost", "failed")
    return Status(
        run_dir=str(run_dir),
        recipe=recipe["name"],
        state=state,
        why=_reason(state, read_lost(run_dir), ranks) if failed else None,
        step=step,
        steps=recipe["steps"],
        images_seen=step * recipe["batch_images"],
        loss=last.loss,
        val_loss=None if validation is None else validation.val_loss,
        val_step=None if validation is None else validation.step,
        images_per_s=speed,
        mfu=last.mfu,
        data_wait=last.data_wait,
        skipped_steps=last.skipped_steps,
        seconds_left=None if failed else left,
        checkpoint=saved,
        fast_step=fast if (saved.step if saved else 0) < fast <= step else None,
        restarts=_count_restarts(run_dir),
        rollbacks=_count_rollbacks(run_dir / "rollbacks.json"),
        slowest=_slowest(last, ranks),
        world_size=run["world_size"],
        ranks=ranks,
        time=now,
    )


def state_of(run_dir: Path, ranks: tuple[RankStatus, ...]) -> str:
    """The state of a run in one word.

    - finished: all steps are done.
    - stopped: saved; `--resume auto` continues it.
    - lost: the loss guards ended it.
    - failed: every rank ended, at least one with an error.
    - dead: no rank lives, and none said why.
    - hanging: some ranks are silent and others are not, or all of them take too long for a step (HANG_SECONDS, HANG_STEPS), as
      when one rank waits for a message that another never sends.
    - stopping, running.
    - unknown: no rank ever wrote a heartbeat.

    A rank without progress since LOST.json was written is about to end. Progress after it means that the run was started again.
    """
    if (run_dir / "FINISHED").exists():
        return "finished"
    known = [(rank, rank.beat) for rank in ranks if rank.beat]
    lost = read_lost(run_dir)
    since = 0.0 if lost is None else lost.time
    going = [(rank, beat) for rank, beat in known if not beat.ended and beat.time > since]
    live = [(rank.age or 0.0, beat) for rank, beat in going if not rank.silent]
    if live:
        patience = max(HANG_SECONDS, HANG_STEPS * max(beat.step_seconds for _, beat in live))
        stuck = min(age for age, _ in live) > patience and live[0][1].phase not in BEGINNING
        if stuck or (len(live) < len(known) and any(rank.silent for rank, _ in known)):
            return "hanging"
        return "stopping" if (run_dir / "STOP").exists() else "running"
    if lost is not None and not going:
        return "lost"
    if known and all(beat.ended for _, beat in known):
        return "failed" if any(beat.error for _, beat in known) else "stopped"
    return "dead" if known else "unknown"


def read_lost(run_dir: Path) -> DivergedRun | None:
    """RUN_DIR/LOST.json; None if the loss guards did not end the run. The next start of the run removes the file."""
    path = run_dir / "LOST.json"
    if not path.exists():
        return None
    try:
        return record_from(DivergedRun, read_sealed(path, "report", "remove it"), f"report {path}", "remove it")
    except ValueError:  # removed at this moment, or torn
        return DivergedRun()


def lost_words(lost: DivergedRun) -> str:
    """A LOST.json in words."""
    loss = "not finite" if lost.loss is None else f"{lost.loss:.4f}"
    step = "an unknown step" if lost.step is None else f"step {lost.step}"
    return f"the loss diverged at {step}: it is {loss}, and {lost.why or 'the reason is unknown'}"


def _reason(state: str, lost: DivergedRun | None, ranks: tuple[RankStatus, ...]) -> str:
    if state == "lost":
        return lost_words(lost or DivergedRun())
    return next(f"rank {rank.rank}: {rank.error}" for rank in ranks if rank.error)


def _newest_checkpoint(directory: Path, now: float) -> SavedCheckpoint | None:
    if not (complete := complete_checkpoints(directory)):
        return None
    age = max(0.0, now - (complete[-1] / "COMPLETE").stat().st_mtime)
    return SavedCheckpoint(step_of(complete[-1]), age, str(complete[-1]))


def _count_restarts(run_dir: Path) -> int:
    """Starts after the first: counted in the batch script's restarts.jsonl, or as files of curves, since each start opens one."""
    try:
        begun = [row for row in read_json_lines(run_dir / "restarts.jsonl") if row.get("event") == "start"]
    except ValueError:
        begun = []
    return max(0, max(len(begun), len(list((run_dir / "tensorboard").glob("events.*")))) - 1)


def _count_rollbacks(path: Path) -> int:
    try:
        found = read_json(path, "rollbacks")
    except ValueError:
        return 0
    rollbacks = found.get("rollbacks") if isinstance(found, dict) else None
    return len(rollbacks) if isinstance(rollbacks, list) else 0


def paces(ranks: tuple[RankStatus, ...]) -> dict[int, Pace]:
    """The pace of each rank that wrote one."""
    return {rank.rank: rank.beat.pace for rank in ranks if rank.beat and rank.beat.pace}


def _slowest(row: CurveRow, ranks: tuple[RankStatus, ...]) -> SlowRank | None:
    """The slowest rank by the paces in the heartbeats; without them by the last row, or else by the longest last step."""
    if slow := slow_ranks(paces(ranks)):
        return slow[0]
    if row.slowest_rank is not None and row.slowest_ratio is not None:
        return SlowRank(row.slowest_rank, row.slowest_ratio)
    timed = {rank.rank: rank.beat.step_seconds for rank in ranks if rank.beat and rank.beat.step_seconds}
    if len(timed) < 2:
        return None
    slowest = max(timed, key=lambda rank: timed[rank])
    return SlowRank(slowest, timed[slowest] / statistics.median(timed.values()))
