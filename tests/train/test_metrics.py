"""Curves never double: rows that a resumed run writes again are dropped first."""

import json
from pathlib import Path

import pytest

from igpt_ds.config import Recipe
from igpt_ds.ds_config import join
from igpt_ds.files import read_json_lines
from igpt_ds.train.metrics import Metrics, memory_gib


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [{"step": 0, "val_loss": 2.0}, {"step": 1, "loss": 1.9}, {"step": 2, "loss": 1.8}, {"step": 3, "loss": 1.7}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    return tmp_path


def metrics(run_dir: Path, recipe: Recipe, start_step: int) -> Metrics:
    return Metrics(run_dir, join(recipe, {"zero_optimization": {"stage": 3}}, 1), start_step, peak=1e9)


def test_rows_after_the_checkpoint_go(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=2)
    curves.training(3, loss=1.5, lr=0.01, grad_norm=float("inf"), skipped_steps=1)
    curves.validation(3, 1.6)
    curves.close()
    rows = read_json_lines(run_dir / "train.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert rows[3]["loss"] == 1.5
    assert rows[3]["grad_norm"] is None  # JSON knows no infinity
    assert rows[3]["skipped_steps"] == 1
    assert rows[4] == {"step": 3, "images_seen": 3 * recipe.batch_images, "val_loss": 1.6}
    assert list((run_dir / "tensorboard").glob("events.*"))


def test_a_run_that_starts_over_keeps_nothing(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=0)
    curves.validation(0, 2.0)
    curves.close()
    assert [row["step"] for row in read_json_lines(run_dir / "train.jsonl")] == [0]


def test_memory_is_that_of_this_process() -> None:
    assert 0.01 < memory_gib() < 100
