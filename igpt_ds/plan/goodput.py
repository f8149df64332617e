"""Goodput before a run: how often to save, and how much of the wall clock becomes training.

In: a `Scenario`: how often the run fails, what a save, a start and the queue cost. Out: an interval, and a prediction in closed
form (`expected`, one tier of saves) or by simulated failures (`simulate`). Called by goodput_command.py, text.py,
train/ledger/interval.py and tools/bench/goodput.py.

Failures are a Poisson process over the time that the run is up, start-up included. GPU_MTBF is Llama 3 405B's: 419 unexpected
interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, 3.3.4), one in 50,676 GPU-hours.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from igpt_ds.errors import InputError
from igpt_ds.schema import record_from

HOUR, DAY = 3600.0, 86400.0
GPU_MTBF = 54 * DAY * 16384 / 419  # seconds between the failures of one GPU
MOST_INTERVAL = 2 * HOUR
NODE_DISK = 1e9  # bytes a second that a node writes to a shared disk; an assumption, to be replaced by a measured save
LOST, QUEUE = "lost work", "queue"
_MOST = 1e11  # seconds that a measured run may have; 3,000 years
UP = ("start-up", "verification", "compilation", "training", "validation", "saves", LOST)  # categories of a run that is up


@dataclass(frozen=True)
class Scenario:
    """A run, its failures and what they cost. Times are seconds."""

    mtbf: float  # between two failures of the whole run
    interval: float  # of training between two saves
    save: float  # that training stands still for a save
    startup: float = 300.0  # from the start of a job to the first step, with loading and compilation
    flush: float = 0.0  # after the stall, until an asynchronous save is complete
    down: float = 0.0  # from a failure until the next start or submission
    queue: float = 0.0  # the mean wait of a job in the queue
    requeued: float = 1.0  # the share of failures after which the job waits in the queue
    validation: float = 0.0  # seconds a second of training
    fast_interval: float = 0.0  # of training between two saves to the fast tier; 0: there is none
    fast_save: float = 0.0  # that training stands still for one of them
    fast_share: float = 1.0  # the share of failures that leave the fast tier whole

    @property
    def wall(self) -> float:
        """Seconds of an undisturbed run for one second of training."""
        fast = self.fast_save / self.fast_interval if self.fast_interval else 0.0
        return 1 + self.validation + self.save / self.interval + fast


@dataclass(frozen=True)
class Prediction:
    """Where the wall clock goes."""

    seconds: dict[str, float] = field(default_factory=dict)
    failures: int = 0

    @property
    def goodput(self) -> float:
        """Training that the run keeps over the wall clock, 0..1."""
        return self.seconds["training"] / math.fsum(self.seconds.values())


def young(save: float, mtbf: float) -> float:
    """Young's interval of training between two saves (Commun. ACM 17(9), 1974), in seconds."""
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """Daly's higher-order interval (Future Gener. Comput. Syst. 22(3), 2006): Young's, corrected for frequent failures."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(save / (2 * mtbf))
    return young(save, mtbf) * (1 + ratio / 3 + ratio**2 / 9) - save


def best_interval(save: float, mtbf: float) -> float:
    """Daly's interval, but at most MOST_INTERVAL: a save every two hours costs nothing, and not only GPUs fail."""
    return min(MOST_INTERVAL, daly(save, mtbf))


def expected(one: Scenario) -> float:
    """The goodput of a long run with one tier of saves, in closed form.

    A stretch of s seconds between two saves needs (M + Q) exp(R / M) (exp(s / M) - 1) seconds if a failure waits Q seconds and
    then starts up for R seconds, in which it may fail again. A save under way is lost, so a failure costs `flush` more.
    """
    stretch, wait = one.interval * one.wall, one.down + one.requeued * one.queue
    most = 700.0  # exp of more is infinite
    again = (one.mtbf + wait) * math.exp(min(most, one.startup / one.mtbf)) + one.flush
    return one.interval / (again * math.expm1(min(most, stretch / one.mtbf)))


def simulate(one: Scenario, seconds: float, seed: int = 0) -> Prediction:
    """A run of some seconds of wall clock with random failures. The same seed gives the same run."""
    draw = random.Random(seed)
    spent = dict.fromkeys(("training", "start-up", "validation", "saves", LOST, QUEUE, "down"), 0.0)
    clock, failures, carried = 0.0, 0, 0.0  # carried: training since the last whole save, that the fast tier has
    while clock < seconds:
        up = min(draw.expovariate(1 / one.mtbf), seconds - clock)
        over = clock + up >= seconds
        spent["start-up"] += min(up, one.startup)
        work = max(0.0, up - one.startup)
        trained = work / one.wall
        kept, base = trained, 0.0
        if not over:
            failures += 1
            total = carried + trained
            slow = _saved(total, one.interval, one.flush / one.wall)
            fast = one.fast_interval and draw.random() < one.fast_share
            kept = max(slow, carried, _saved(total, one.fast_interval, 0.0)) if fast else slow
            carried, base = kept - slow, carried
        share = max(0.0, min(1.0, (kept - base) / trained)) if trained else 0.0
        spent["training"] += kept - base
        spent["validation"] += share * trained * one.validation
        spent["saves"] += share * trained * (one.wall - 1 - one.validation)
        spent[LOST] += work - (kept - base) - share * trained * (one.wall - 1)
        clock += up
        if not over:
            waits = one.down, draw.expovariate(1 / one.queue) if one.queue and draw.random() < one.requeued else 0.0
            for name, wait in zip(("down", QUEUE), waits, strict=True):
                spent[name] += min(wait, max(0.0, seconds - clock))
                clock += wait
    return Prediction(spent, failures)


def _saved(trained: float, interval: float, flush: float) -> float:
    """How much of some seconds of training the last complete save has."""
    return max(0.0, math.floor((trained - flush) / interval) * interval)


@dataclass(frozen=True)
class Measured:
    """The goodput of a run, as `tools/status.py --goodput --json` prints it."""

    seconds: dict[str, float]  # by category
    failures: int
    save_interval: float | None  # seconds of training between two saves; None: the run saved less than twice
    save_seconds: float | None
    startup_seconds: float | None = None  # of a start that came to its first step
    fast_saves: int = 0  # into --fast_dir
    after_failures: dict[str, float] | None = None  # seconds down and in the queue before starts that follow a failure; None: all

    def __post_init__(self) -> None:
        pairs = [*self.seconds.items(), *(self.after_failures or {}).items(), ("failures", self.failures)]
        pairs += [(name, getattr(self, name)) for name in ("save_seconds", "startup_seconds", "fast_saves")]
        for name, value in pairs:
            if value is not None and not (-_MOST if name == "unexplained" else 0) <= value < _MOST:
                raise InputError(f"{name} {value:g}, which is out of range")
        if self.save_interval is not None and not 0 < self.save_interval < _MOST:
            raise InputError(f"save_interval {self.save_interval:g}, which is out of range")

    @property
    def goodput(self) -> float:
        """Training that the run kept over the wall clock, 0..1."""
        return self.seconds["training"] / math.fsum(self.seconds.values())

    @staticmethod
    def of(values: object, where: str = "goodput") -> Measured:
        """The goodput of a run from its JSON.

        Raises:
            ValueError: it is none.
        """
        return record_from(Measured, values, where, "write it with `tools/status.py --goodput --json RUN_DIR...`")


def fit(runs: Sequence[Measured]) -> Scenario:
    """The scenario of measured runs. What a failure lost beyond half a stretch is taken as a save that was under way.

    Raises:
        ValueError: no run saved twice, or one saved into --fast_dir.
    """
    if any(run.fast_saves for run in runs):
        raise InputError(
            "a run with --fast_dir has two tiers, and the fit knows one: give its costs as flags, with --fast_interval"
        )
    intervals = [run.save_interval for run in runs if run.save_interval]
    saves = [run.save_seconds for run in runs if run.save_seconds is not None]
    if not intervals or not saves:
        raise InputError("no run has two saves, so the cost of a save is unknown; measure longer runs")
    if not any(run.seconds.get("training") for run in runs):
        raise InputError("no run kept a step of training; measure longer runs")
    failures, starts = sum(run.failures for run in runs), sum(run.failures + 1 for run in runs)
    total = {
        name: math.fsum(run.seconds.get(name, 0.0) for run in runs) for name in {name for run in runs for name in run.seconds}
    }
    waits = [run.seconds if run.after_failures is None else run.after_failures for run in runs]
    down, queue = (math.fsum(wait.get(name, 0.0) for wait in waits) for name in ("down", QUEUE))
    up = math.fsum(total.get(name, 0.0) for name in UP)
    trained = total.get("training", 0.0)
    begun = [run.startup_seconds for run in runs if run.startup_seconds is not None]
    startup = statistics.mean(begun) if begun else math.fsum(total.get(name, 0.0) for name in UP[:3]) / starts
    one = Scenario(
        mtbf=up / max(1, failures),
        interval=statistics.median(intervals),
        save=statistics.median(saves),
        startup=startup,
        down=down / max(1, failures),
        queue=queue / max(1, failures),
        validation=total.get("validation", 0.0) / trained if trained else 0.0,
    )
    late = failures * math.exp(-startup / one.mtbf)  # failures after the first step
    return replace(one, flush=max(0.0, total.get(LOST, 0.0) / late - one.interval * one.wall / 2) if late else 0.0)
