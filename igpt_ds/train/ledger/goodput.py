"""Where the wall clock of a run went. In: a run directory. Out: a `Goodput`, whose categories add up to the wall clock.

Goodput is the seconds of training whose steps the run kept, over the seconds of wall clock from the first start (or submission)
to the last sign of life. It is the field's definition: "effective training time" of Llama 3 (arXiv 2407.21783, 3.3.4) and
MegaScale, "goodput" of Google's ml-goodput-measurement. The other categories:

- start-up: from the start of the job or process to the first step, without verification: preflight, imports, engine, loading.
- verification: reading the shards to compare them with their sha256.
- compilation: what the first step of a start takes longer than the others.
- validation, saves: while training waits for them.
- lost work: everything after the last save that the run continued from: killed steps, steps that a rollback dropped.
- queue: SLURM had the job and did not run it.
- down: nobody had it. From the last sign of life of a start to the submission or start of the next.
- unexplained: what the rows do not explain.

restarts.jsonl has the seconds (rows.py); train.jsonl and the heartbeats say how far a start came after its last
row. Neither torch nor numpy is imported. Called by tools/status.py and tools/report.py.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.train.heartbeat import BEGINNING
from igpt_ds.train.ledger.rows import IMPORTS, ROLLBACK, SAVE, TRAIN, read_rows
from igpt_ds.train.ledger.starts import StartRows, Tail, group, read_tail

TRAINING, STARTUP, VERIFICATION, COMPILATION = "training", "start-up", "verification", "compilation"
VALIDATION, SAVES, LOST, QUEUE, DOWN, UNEXPLAINED = "validation", "saves", "lost work", "queue", "down", "unexplained"
CATEGORIES = (TRAINING, STARTUP, VERIFICATION, COMPILATION, VALIDATION, SAVES, LOST, QUEUE, DOWN, UNEXPLAINED)
CLOCK_SECONDS = 1.0  # by which two clocks may differ
_PHASES = dict.fromkeys((IMPORTS, *BEGINNING), STARTUP)
_PHASES |= {"verifying": VERIFICATION, "step": TRAINING, "validation": VALIDATION, "save": SAVES}


@dataclass(frozen=True)
class StartGoodput:
    """One start: its part of the wall clock, with the waiting before it."""

    began: float  # seconds since 1970
    ended: float  # its last sign of life
    first_step: int  # completed before its first step
    last_step: int  # the last one that a row tells of
    how: str  # how it ended
    failed: bool  # by a fault, not by a stop or its last step
    seconds: dict[str, float]  # of each of CATEGORIES

    @property
    def trained(self) -> bool:
        """Whether it reached its first step."""
        return self.seconds[TRAINING] + self.seconds[LOST] > 0

    @property
    def startup(self) -> float:
        """Seconds until its normal steps."""
        return math.fsum(self.seconds[name] for name in (STARTUP, VERIFICATION, COMPILATION))


@dataclass(frozen=True)
class SaveCost:
    """One save, and the training before it."""

    steps: int
    training: float  # seconds of these steps
    seconds: float  # that training stood still


@dataclass(frozen=True)
class Goodput:
    """The wall clock of a run by category."""

    run_dir: str
    starts: tuple[StartGoodput, ...]
    saves: tuple[SaveCost, ...] = ()
    fast_saves: int = 0  # into --fast_dir

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each of CATEGORIES. They add up to `wall`."""
        return {name: math.fsum(one.seconds[name] for one in self.starts) for name in CATEGORIES}

    @property
    def wall(self) -> float:
        """Seconds of wall clock."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Training that the run kept over the wall clock, 0..1."""
        return self.seconds[TRAINING] / self.wall if self.wall > 0 else 0.0

    @property
    def failures(self) -> int:
        """Starts that a fault ended."""
        return sum(one.failed for one in self.starts)

    @property
    def startup_seconds(self) -> float | None:
        """The median time from a start to its normal steps, of the starts that came that far; None if none did."""
        begun = [start.startup for start in self.starts if start.trained]
        return statistics.median(begun) if begun else None

    def median(self, name: str) -> float | None:
        """The median of a field of `saves`; None without any."""
        return statistics.median(getattr(save, name) for save in self.saves) if self.saves else None

    @property
    def after_failures(self) -> dict[str, float]:
        """The seconds of waiting before the starts that follow a fault."""
        later = [one for before, one in itertools.pairwise(self.starts) if before.failed]
        return {name: math.fsum(one.seconds[name] for one in later) for name in (QUEUE, DOWN)}

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        starts = [vars(one) | {"seconds": _rounded(one.seconds)} for one in self.starts]
        return {
            "goodput": round(self.goodput, 5),
            "wall": round(self.wall, 3),
            "seconds": _rounded(self.seconds),
            "failures": self.failures,
            "startup_seconds": self.startup_seconds,
            "save_interval": self.median("training"),
            "save_seconds": self.median("seconds"),
            "fast_saves": self.fast_saves,
            "after_failures": _rounded(self.after_failures),
            "starts": starts,
        }


@dataclass
class _Part:
    """A stretch of a start between two rows."""

    start: int
    before: int  # completed steps at its two ends
    after: float  # infinite: no save has these steps
    wall: float
    seconds: dict[str, float] = field(default_factory=dict)  # by category
    first_step: float | None = None  # seconds

    def lose(self, kept: int) -> None:
        """Counts what lies after step `kept` as lost."""
        if self.after <= kept:
            return
        share = max(0.0, (kept - self.before) / (self.after - self.before)) if kept > self.before else 0.0
        lost = self.seconds.get(LOST, 0.0)
        gone = (1 - share) * (math.fsum(self.seconds.values()) - lost)
        self.seconds = {name: share * value for name, value in self.seconds.items()} | {LOST: lost + gone}
        self.after = min(self.after, kept) if share else self.before


def read_goodput(run_dir: Path, live: bool = False) -> Goodput:
    """The ledger of a run directory.

    Args:
        live: whether the run trains now, so that what follows the last row is not lost yet.

    Raises:
        ValueError: nothing tells where the time went, as in a run of an earlier version.
    """
    starts = group(read_rows(run_dir))
    if not starts:
        path = run_dir / "restarts.jsonl"
        raise InputError(f"{path} has no times of a start; continue the run with this version, or leave out --goodput")
    parts, begins, ends = list[_Part](), list[float](), list[float]()
    cursor = starts[0].queued_at
    for number, start in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else None
        tail = Tail(_last_sign(run_dir, start, starts[number + 1 :])) if following else read_tail(run_dir, start)
        parts += _waiting(number, start, starts[number - 1] if number else None, cursor)
        cursor = max(cursor, start.at)
        for part, moment in _rows(number, start, parts, cursor):
            parts.append(part)
            cursor = moment
        end = max(cursor, tail.until)
        parts.append(_tail(number, start, end - cursor, tail.validating if live and not following else None))
        begins.append(start.at)
        ends.append(end)
        cursor = end
    _split_first_steps(parts)
    found = []
    for number, (start, began, ended) in enumerate(zip(starts, begins, ends, strict=True)):
        mine = [part for part in parts if part.start == number]
        seconds = {name: math.fsum(part.seconds.get(name, 0.0) for part in mine) for name in CATEGORIES}
        running = live and number == len(starts) - 1
        how, failed = ("running", False) if running else (start.how, start.failed)
        found.append(StartGoodput(began, ended, start.first_step, start.last_step, how, failed, seconds))
    fast = sum(row.event == SAVE and row.fast for start in starts for row in start.rows)
    return Goodput(str(run_dir), tuple(found), tuple(save for start in starts for save in _saves(start)), fast)


def _last_sign(run_dir: Path, start: StartRows, later: Sequence[StartRows]) -> float:
    """The last sign of life of a start. The first later one with ranks read its heartbeats; without one they are still there."""
    following, reader = later[0], next((one for one in later if one.began is not None), None)
    alive = read_tail(run_dir, start).until if reader is None else reader.last_alive
    if alive is not None and alive >= following.at and following is not reader:
        alive = None  # the heartbeats are those of another start
    return min(start.last_sign(alive), following.at)


def _saves(start: StartRows) -> Iterator[SaveCost]:
    """The saves of a start into the run directory, each with the training since the one before it."""
    steps, training, known = 0, 0.0, False  # known: the stretch begins at a save, not at a slow first step or a rollback
    for before, row in itertools.pairwise(start.rows):
        if row.event != SAVE:
            known = False
            continue
        steps, training = steps + row.step - before.step, training + row.seconds.get("step", 0.0)
        if not row.fast:
            if known and steps > 0:
                yield SaveCost(steps, training, row.seconds.get("save", 0.0))
            steps, training, known = 0, 0.0, True


def _waiting(number: int, start: StartRows, before: StartRows | None, cursor: float) -> list[_Part]:
    """The time before a start, and from its launch to its process."""
    gap = max(0.0, start.at - cursor)
    queued = 0.0
    if start.launched is not None:
        since = cursor if start.submitted is None else start.submitted
        if before is not None and before.job == start.job:  # SLURM submits a job anew when it queues it again
            since = math.inf if since <= before.at else max(since, before.batch_end or since)
        queued = max(0.0, start.at - max(cursor, since))
    return [_Part(number, 0, 0, gap, {QUEUE: queued, DOWN: gap - queued})]


def _rows(number: int, start: StartRows, parts: Sequence[_Part], cursor: float) -> Iterator[tuple[_Part, float]]:
    """A part for each row of a start, and the row's time. Marks as lost what the start does not continue from."""
    step = 0
    if start.began is not None and start.began > cursor:
        wall = start.began - cursor
        yield _Part(number, 0, 0, wall, {STARTUP: wall}), (cursor := start.began)
    least, behind = cursor, 0.0  # the time by the seconds of the rows alone, which are of another clock; and how far this one is
    for row in start.rows:
        least += math.fsum(row.seconds.values())
        if row.time + behind < least - CLOCK_SECONDS:  # it was set back
            behind = least - row.time
        moment = max(cursor, row.time + behind)
        part = _Part(number, step, row.step, moment - cursor, _by_category(row.seconds), row.first_step_seconds)
        part.seconds[UNEXPLAINED] = part.seconds.get(UNEXPLAINED, 0.0) + part.wall - math.fsum(part.seconds.values())
        if row.event == TRAIN:
            part.before = row.step
        elif row.event == ROLLBACK:
            part.after = math.inf
        if row.event in (TRAIN, ROLLBACK):
            for earlier in (*parts, part):
                earlier.lose(row.step)
        step, cursor = row.step, moment
        yield part, moment


def _by_category(phases: dict[str, float]) -> dict[str, float]:
    found = dict[str, float]()
    for phase, seconds in phases.items():
        name = _PHASES.get(phase, UNEXPLAINED)
        found[name] = found.get(name, 0.0) + seconds
    return found


def _tail(number: int, start: StartRows, wall: float, validating: float | None) -> _Part:
    """What follows the last row of a start.

    Args:
        validating: seconds of validations if the start runs now; None: it does not, so that its steps are lost.
    """
    if start.ended:
        return _Part(number, 0, 0, wall, {DOWN: wall})
    if not start.trained:
        return _Part(number, 0, 0, wall, {STARTUP: wall})
    if validating is None:
        return _Part(number, start.last_step, math.inf, wall, {LOST: wall})
    validating = min(wall, validating)
    return _Part(number, start.last_step, math.inf, wall, {VALIDATION: validating, TRAINING: wall - validating})


def _split_first_steps(parts: Sequence[_Part]) -> None:
    """Takes from the training of each first step what it took longer than the others."""
    rates = [
        (part.seconds[TRAINING] - (part.first_step or 0.0)) / n
        for part in parts
        if (n := part.after - part.before - (part.first_step is not None)) > 0 and n < math.inf and TRAINING in part.seconds
    ]
    for part in parts:
        if part.first_step is not None and rates and part.seconds.get(TRAINING):
            extra = min(part.seconds[TRAINING], max(0.0, part.first_step - statistics.median(rates)))
            part.seconds[TRAINING] -= extra
            part.seconds[COMPILATION] = extra


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) + 0.0 for name, value in seconds.items()}
