"""When a run is lost, and when things are due."""

import math
from pathlib import Path

import pytest

from igpt_ds.cli import SharedError
from igpt_ds.train.loop import MAX_SKIPS, Cadence, refuse_lost_run


@pytest.mark.parametrize(("loss", "skips"), [(math.nan, 0), (math.inf, 0), (2.0, MAX_SKIPS)])
def test_a_run_that_learns_nothing_any_more_stops(loss: float, skips: int) -> None:
    with pytest.raises(SharedError, match=r"loss of step 7 is .* at lr 1.00e-01, after \d+ skipped steps .* lower --lr"):
        refuse_lost_run(loss, skips, 7, 0.1, Path("runs/a/checkpoints"))


def test_a_few_skipped_steps_are_no_reason() -> None:
    assert refuse_lost_run(2.0, MAX_SKIPS - 1, 7, 0.1, Path("runs/a/checkpoints")) is None


def test_the_last_step_is_always_due() -> None:
    cadence = Cadence(log_every=2, val_every=0, save_every=3, keep_last=1, keep_every=0, last_step=7)
    due = [[step for step in range(1, 8) if cadence.due(every, step)] for every in (2, 0, 3)]
    assert due == [[2, 4, 6, 7], [7], [3, 6, 7]]
