"""When things are due."""

from igpt_ds.train.cadence import Cadence


def test_the_last_step_is_always_due() -> None:
    cadence = Cadence(log_every=2, val_every=0, save_every=3, keep_last=1, keep_every=0, last_step=7)
    due = [[step for step in range(1, 8) if cadence.due(every, step)] for every in (2, 0, 3)]
    assert due == [[2, 4, 6, 7], [7], [3, 6, 7]]
