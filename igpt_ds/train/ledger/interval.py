"""`--save_every auto`: how many steps lie between two saves, by what saves cost and how often the run fails. Every rank calls it.

The interval is Daly's optimum (plan/goodput.py). The cost of a save and the time of a step are the medians of this run's saves.
The time between failures comes from the starts in restarts.jsonl and, as if it were one failure more, from the GPUs' record:
a run without a failure so far is not one that never fails. The first save comes early, to measure its cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from igpt_ds import dist
from igpt_ds.console import count, duration
from igpt_ds.errors import InputError
from igpt_ds.plan.goodput import GPU_MTBF, best_interval
from igpt_ds.train.ledger.goodput import Goodput, read_goodput

FIRST = 10  # steps before the first save, whose cost is unknown
CHANGE = 0.2  # relative change of the interval that is worth a line


@dataclass(frozen=True)
class Choice:
    """The steps between two saves, and the reason."""

    steps: int
    why: str


def choose(found: Goodput, gpus: int) -> Choice:
    """The best interval for a run with this ledger on so many GPUs."""
    save, training, steps = (found.median(name) for name in ("seconds", "training", "steps"))
    if save is None or not training or not steps:
        return Choice(FIRST, "the cost of a save is not known yet")
    up = math.fsum(one.ended - one.began for one in found.starts)
    mtbf = (up + GPU_MTBF / gpus) / (found.failures + 1)
    seconds = best_interval(save, mtbf)
    often = f"{count(found.failures, 'failure')} in {duration(up)}, so one in {duration(mtbf)} is expected"
    return Choice(max(1, round(seconds * steps / training)), f"training stands still for {save:.2g} s; {often}")


class SaveInterval:
    """When a run with `--save_every auto` saves. Every rank calls every method at the same step.

    Args:
        saved: the step of the newest checkpoint in the run directory. Saves into a fast directory do not count.
        say: prints a line.
    """

    def __init__(self, run_dir: Path, gpus: int, saved: int, say: Callable[[str], None] = dist.say) -> None:
        self._run_dir, self._gpus, self._say, self._saved = run_dir, gpus, say, saved
        self._told = 0
        self.saved(saved)

    def due(self, step: int) -> bool:
        """Whether a save comes after this step."""
        self._saved = min(self._saved, step - 1)  # after a rollback
        return step - self._saved >= self.steps

    def saved(self, step: int, found: Goodput | None = None) -> None:
        """A save is made: chooses the steps to the next one.

        Args:
            found: the ledger, if rank 0 has just read it.
        """
        choice = dist.from_rank_0(lambda: self._choose(found))
        self._saved, self.steps = step, choice.steps
        if abs(self.steps - self._told) > CHANGE * self._told:
            self._told = self.steps
            self._say(f"saves: every {count(self.steps, 'step')}: {choice.why}")

    def _choose(self, found: Goodput | None) -> Choice:
        try:
            return choose(found or read_goodput(self._run_dir, live=True), self._gpus)
        except InputError:
            return Choice(FIRST, "nothing is known of saves yet")
