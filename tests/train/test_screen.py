"""The console of a run: rows with aligned columns, and the time that is left."""

import argparse
import time
from pathlib import Path

import pytest

from igpt_ds.config import Recipe
from igpt_ds.data.mixture import open_mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.ds_config import join
from igpt_ds.train.screen import Table, introduction
from igpt_ds.train.validation import n_validated, validation_batch


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


@pytest.mark.parametrize(
    ("val_images", "said"), [(5, "5 of 11 for validation (val, evenly spread, "), (None, "11 for validation (val, ")]
)
def test_a_run_says_what_it_validates(recipe: Recipe, tiny_dataset: Path, val_images: int | None, said: str) -> None:
    val, run = ShardSet(tiny_dataset, "val"), join(recipe, {"zero_optimization": {"stage": 3}}, 2, micro_batch=1)
    args = argparse.Namespace(val_images=val_images, ds_config="zero3")
    at_once = validation_batch(run, val, val_images)
    assert 1 < at_once <= min(8, (n_validated(val, val_images) + 1) // 2)
    assert f"{said}{at_once} at once)" in introduction(args, run, open_mixture([tiny_dataset]), val)[1]
