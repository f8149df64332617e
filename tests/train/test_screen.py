"""The console of a run: rows with aligned columns, and the time that is left."""

import time

from igpt_ds.config import Recipe
from igpt_ds.train.screen import Table


def test_columns_stand_under_their_names(recipe: Recipe) -> None:
    table = Table(600, 0)
    meaning, empty, head = table.heading(recipe)
    assert meaning.startswith("loss ")
    assert empty == ""
    train, val = table.training(10, 2.5, 1e-3, 64.0, 64), table.validation(10, 2.25)
    for name, text in (("step", "10/600"), ("loss", "2.5000"), ("lr", "1.00e-03"), ("images/s", "64.0"), ("left", "9:50")):
        assert train[: head.index(name) + len(name)].endswith(text)
    assert val[: head.index("val") + 3].endswith("2.2500")
    assert "2.2500" not in train


def test_the_time_left_counts_what_happens_between_the_steps() -> None:
    table = Table(100, 40)
    assert table.training(50, 2.0, 1e-3, 64.0, 64).endswith("0:50")  # one step a second
    table._first = (50, time.monotonic() - 20)  # ten steps and a validation in 20 s
    assert table.training(60, 2.0, 1e-3, 64.0, 64).endswith("1:20")
    table.rewind(20)
    assert table.training(30, 2.0, 1e-3, 64.0, 64).endswith("1:10")
