"""Curves never double: rows that a resumed run writes again are dropped first."""

import contextlib
import dataclasses
import errno
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from igpt_ds.config import Recipe
from igpt_ds.ds_config import join
from igpt_ds.json_files import read_json_lines
from igpt_ds.train.flags import require_wandb
from igpt_ds.train.metrics import Metrics, TrainingRow, memory_gib


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [{"step": 0, "val_loss": 2.0}, {"step": 1, "loss": 1.9}, {"step": 2, "loss": 1.8}, {"step": 3, "loss": 1.7}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    return tmp_path


def metrics(run_dir: Path, recipe: Recipe, start_step: int, wandb: str | None = None) -> Metrics:
    return Metrics(run_dir, join(recipe, {"zero_optimization": {"stage": 3}}, 1), start_step, 1e9, wandb)


def test_rows_after_the_checkpoint_go(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=2)
    curves.training(3, loss=1.5, lr=0.01, grad_norm=float("inf"), skipped_steps=1)
    curves.validation(3, 1.6, seconds=0.5)
    curves.close()
    rows = read_json_lines(run_dir / "train.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert rows[3]["loss"] == 1.5
    assert rows[3]["grad_norm"] is None  # JSON knows no infinity
    assert rows[3]["skipped_steps"] == 1
    assert rows[3]["time"] <= rows[4].pop("time") <= time.time() + 1
    assert rows[4] == {"step": 3, "images_seen": 3 * recipe.batch_images, "val_loss": 1.6, "val_seconds": 0.5}
    assert list((run_dir / "tensorboard").glob("events.*"))


def test_a_run_that_starts_over_keeps_nothing(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=0)
    curves.validation(0, 2.0)
    curves.close()
    assert [row["step"] for row in read_json_lines(run_dir / "train.jsonl")] == [0]


def test_a_rollback_takes_rows_back(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=3)
    with curves.timed(0.0):
        pass
    curves.saved(2.5)
    curves.training(4, loss=float("nan"), lr=0.01, grad_norm=1.0, skipped_steps=1)
    curves.rewind(2)
    curves.training(3, loss=1.6, lr=0.01, grad_norm=1.0, skipped_steps=0)
    curves.close()
    rows = read_json_lines(run_dir / "train.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert (rows[-1]["loss"], rows[-1]["data_wait"]) == (1.6, 0.0)
    assert "save_seconds" not in rows[-1]


def test_tensorboard_shows_no_dead_branch(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=3)
    for step in (4, 5, 6):
        curves.training(step, loss=float(step), lr=0.01, grad_norm=1.0, skipped_steps=0)
    curves.rewind(4)  # a rollback
    curves.training(5, loss=50.0, lr=0.01, grad_norm=1.0, skipped_steps=0)
    curves.close()
    time.sleep(1.1)  # the names of event files begin with the second
    resumed = metrics(run_dir, recipe, start_step=4)
    resumed.training(5, loss=500.0, lr=0.01, grad_norm=1.0, skipped_steps=0)
    resumed.close()
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(4, 4.0), (5, 500.0)]


class FakeWandb:
    """The service as its users see it: of repeated steps it keeps the first."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.groups: set[str] = set()

    def init(self, project: str, id: str, resume: str, group: str, **_: object) -> Any:
        shown = self.runs.setdefault(id, {})
        self.groups.add(group)
        log = lambda values, step: step < max(shown, default=0) or shown.setdefault(step, {}).update(values)  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: None)

    def losses(self) -> list[list[tuple[int, float]]]:
        """The training loss of each run."""
        return [[(step, row["train/loss"]) for step, row in run.items() if "train/loss" in row] for run in self.runs.values()]


def test_wandb_shows_no_dead_branch(run_dir: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", service := FakeWandb())
    (run_dir / "train.jsonl").unlink()
    curves = metrics(run_dir, recipe, start_step=0, wandb="project")
    for step in (1, 2, 3):
        curves.training(step, loss=float(step), lr=0.01, grad_norm=1.0, skipped_steps=0)
    curves.close()
    again = metrics(run_dir, recipe, start_step=3, wandb="project")  # nothing is dropped: the same run
    again.training(4, loss=4.0, lr=0.01, grad_norm=1.0, skipped_steps=0)
    again.rewind(2)  # a rollback
    again.training(3, loss=30.0, lr=0.01, grad_norm=1.0, skipped_steps=0)
    again.close()
    resumed = metrics(run_dir, recipe, start_step=2, wandb="project")  # a resume that drops a row
    resumed.validation(3, 1.5)
    resumed.close()
    after = metrics(run_dir, recipe, start_step=3, wandb="project")
    after.training(4, loss=400.0, lr=0.01, grad_norm=1.0, skipped_steps=0)
    after.close()
    kept = [(1, 1.0), (2, 2.0)]
    assert service.losses() == [[*kept, (3, 3.0), (4, 4.0)], [*kept, (3, 30.0)], [*kept, (4, 400.0)]]
    assert len(service.groups) == 1


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": null}', '{"step": "3"}'])
def test_a_row_without_a_step_is_one_clear_error_and_stays(run_dir: Path, recipe: Recipe, line: str) -> None:
    path = run_dir / "train.jsonl"
    path.write_text(text := f'{{"step": 1, "loss": 1.9}}\n{line}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl line 2 has .*; remove the line$"):
        metrics(run_dir, recipe, start_step=2)
    assert path.read_text() == text


def test_saving_and_waiting_stand_in_the_next_row(run_dir: Path, recipe: Recipe) -> None:
    curves = metrics(run_dir, recipe, start_step=3)
    curves.clock -= 100.0
    with curves.timed(25.0):
        pass
    curves.saved(2.5)
    curves.training(4, loss=float("nan"), lr=0.01, grad_norm=1.0, skipped_steps=1)
    curves.training(5, loss=1.0, lr=0.01, grad_norm=1.0, skipped_steps=1)
    curves.close()
    *_, skipped, after = read_json_lines(run_dir / "train.jsonl")
    assert skipped["loss"] is None
    assert skipped["save_seconds"] == 2.5
    assert skipped["data_wait"] == pytest.approx(0.25, rel=0.05)
    assert skipped["images_per_s"] == pytest.approx(recipe.batch_images / 100, rel=0.05)
    assert "save_seconds" not in after
    assert after["data_wait"] == 0


def test_what_a_row_notes() -> None:
    row = TrainingRow(7, 448, 2.5, 0.001, 0.5, 10.0, 2560.0, mfu=0.4, memory_gib=1.0, skipped_steps=0, data_wait=0.01)
    assert row.notes() == ""
    noted = dataclasses.replace(row, slowest_rank=3, slowest_ratio=1.5, skipped_steps=2, data_wait=0.25).notes()
    assert noted == "  2 steps skipped  25 % of the time waiting for data"


def test_mfu_above_the_peak_is_unknown(run_dir: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    curves = metrics(run_dir, recipe, start_step=3)
    curves.peak = 1.0
    curves.training(4, loss=1.0, lr=0.01, grad_norm=1.0, skipped_steps=0)
    curves.close()
    assert "mfu" not in read_json_lines(run_dir / "train.jsonl")[-1]
    assert "exceed the peak of 1.00e+00, which must be wrong" in capsys.readouterr().out


def test_wandb_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="--wandb needs the package wandb, which is not installed: pip install wandb, or leave"):
        require_wandb()


def test_memory_is_that_of_this_process() -> None:
    assert 0.01 < memory_gib() < 100


@pytest.mark.parametrize("name", ["train.jsonl", "tensorboard"])
def test_a_full_disk_names_the_file_of_the_curves(run_dir: Path, recipe: Recipe, name: str) -> None:
    curves = metrics(run_dir, recipe, start_step=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        if name == "train.jsonl":
            curves.rows.close()
            curves.rows = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        else:
            patch.setattr(curves.board, "add_scalar", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space left on device") as caught:
            curves.validation(3, 1.6)
    assert caught.value.filename == str(run_dir / name)
    with contextlib.suppress(OSError):
        curves.close()


def test_a_run_directory_whose_name_is_not_utf8(tmp_path: Path, recipe: Recipe) -> None:
    run_dir = tmp_path / os.fsdecode(b"gr\xf6n")
    run_dir.mkdir()
    curves = metrics(run_dir, recipe, start_step=0)
    curves.validation(3, 1.6)
    curves.close()
    assert list((run_dir / "tensorboard").glob("events.*"))
