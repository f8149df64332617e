"""The rows of restarts.jsonl, start by start. In: rows. Out: a `StartRows` each. Called by goodput.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igpt_ds.errors import InputError
from igpt_ds.schema import record_from
from igpt_ds.train.heartbeat import all_heartbeats
from igpt_ds.train.ledger.rows import BEGIN, EXIT, TRAIN, read_time
from igpt_ds.train.ledger.tail import timed_rows

_MOST = 1e11  # seconds since 1970, of a row that is believed


@dataclass(frozen=True)
class LedgerRow:
    """A row of a start's training, as its reader checks it."""

    event: str
    step: int
    seconds: dict[str, float]
    time: float  # seconds since 1970
    first_step_seconds: float | None = None
    resume: bool = True
    fast: bool = False  # a save into the fast directory
    phase: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        for name, value in (("time", self.time), ("first_step_seconds", self.first_step_seconds or 0.0), *self.seconds.items()):
            if not abs(value) < _MOST:
                raise InputError(f"{name} {value:g}, which is no time")


@dataclass
class StartRows:
    """What the rows tell of one start: of a batch job, of a training, or of a training inside a batch job."""

    job: str = ""
    launched: float | None = None  # when the batch script began
    submitted: float | None = None  # the job, for this start
    began: float | None = None  # when the process of the training began
    last_alive: float | None = None  # of the start before it
    rows: list[LedgerRow] = field(default_factory=list)
    batch_end: float | None = None
    reason: str = ""  # of the batch job's end

    @property
    def at(self) -> float:
        """When it began."""
        return next(moment for moment in (self.launched, self.began) if moment is not None)

    @property
    def queued_at(self) -> float:
        """When it was submitted, or else when it began."""
        return self.at if self.submitted is None else min(self.submitted, self.at)

    @property
    def trained(self) -> bool:
        """Whether it reached its first step."""
        return any(row.event == TRAIN for row in self.rows)

    @property
    def ended(self) -> bool:
        """Whether it wrote its end."""
        return bool(self.rows) and self.rows[-1].event == EXIT

    @property
    def first_step(self) -> int:
        """Completed steps before its first step."""
        return next((row.step for row in self.rows if row.event == TRAIN), 0)

    @property
    def last_step(self) -> int:
        """The last step that a row tells of."""
        return self.rows[-1].step if self.rows else 0

    @property
    def failed(self) -> bool:
        """Whether a fault ended it."""
        return not self.ended or bool(self.rows[-1].error)

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if not self.ended:
            return self.reason or ("killed" if self.trained else "ended before the first step")
        last = self.rows[-1]
        return last.error or ("stopped" if last.phase == "stopped" else "ended")

    def last_sign(self, alive: float | None) -> float:
        """The last sign of life of a start whose heartbeats a later one read: they were `alive` then."""
        signs = [row.time for row in self.rows]
        if not self.ended:
            signs += [] if alive is None else [alive]
            signs += [] if self.began is not None or self.batch_end is None else [self.batch_end]
        return max(signs, default=self.at)


def group(rows: Iterable[dict[str, Any]]) -> list[StartRows]:
    """The starts of a run, oldest first. What an earlier run left in the directory is left out, and so are damaged rows."""
    starts = list[StartRows]()
    for values in rows:
        moment = read_time(values.get("time"))
        if moment is None:
            continue
        event, job = values.get("event"), str(values.get("job", ""))
        if event == "start" and job:
            submitted = read_time(values.get("submitted"))
            starts.append(StartRows(job, launched=moment, submitted=submitted))
        elif event == "end" and job:
            mine = next((one for one in reversed(starts) if one.job == job), None)
            if mine is not None and values.get("status") is not None:
                mine.batch_end, mine.reason = moment, str(values.get("reason", ""))
        elif event == BEGIN:
            began = read_time(values.get("began"))
            last = starts[-1] if starts else None
            if last is None or last.launched is None or last.began is not None or last.batch_end is not None:
                inside = last is not None and last.batch_end is None
                starts.append(last := StartRows(last.job if last and inside else ""))
            last.began, last.last_alive = moment if began is None else began, read_time(values.get("last_alive"))
            _add(last, values, moment)
        elif starts and starts[-1].began is not None:
            _add(starts[-1], values, moment)
            row = starts[-1].rows[-1] if starts[-1].rows else None
            if row is not None and row.event == TRAIN and not row.resume and not row.step:
                starts = starts[-1:]  # a new run
    return starts


def _add(start: StartRows, values: dict[str, Any], moment: float) -> None:
    try:
        start.rows.append(record_from(LedgerRow, values | {"time": moment}, "row", "remove it"))
    except InputError:
        return


@dataclass(frozen=True)
class Tail:
    """What is known of a start after its last row in restarts.jsonl."""

    until: float  # its last sign of life, in seconds since 1970
    validating: float = 0.0  # seconds of validations


def read_tail(run_dir: Path, start: StartRows) -> Tail:
    """How far the newest start came, by the end of train.jsonl and the heartbeats."""
    since = start.rows[-1].time if start.rows else start.at
    if start.ended:
        return Tail(since)
    curve = [row for row in timed_rows(run_dir) if row.time > since]
    signs = [row.time for row in curve] + [beat.written for beat in all_heartbeats(run_dir).values()]
    if start.began is None and start.batch_end is not None:
        signs.append(start.batch_end)
    return Tail(max([since, *signs]), sum(row.val_seconds for row in curve))
