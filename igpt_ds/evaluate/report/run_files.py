"""Files that figures and the page read: run.json and train.jsonl of a run, and the table of a plan, as records.

In: the JSON that training and `python -m igpt_ds.plan --table --json` write. Out: `ReportedRun`, `CurveRow`, `PlanRow`.
Called by `tools/report.py` and `tools/figures.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.config import Recipe, recipe_from_dict
from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json, read_json_lines
from igpt_ds.schema import record_from


@dataclass(frozen=True)
class _RunFile:
    recipe: dict[str, object]
    world_size: int
    precision: str
    git_commit: str | None = None


@dataclass(frozen=True)
class ReportedRun:
    """What a page says of a run."""

    recipe: Recipe
    world_size: int
    precision: str
    git_commit: str | None
    text: str  # of run.json

    @staticmethod
    def of(values: object, path: Path) -> ReportedRun:
        """The run of a run.json's values.

        Raises:
            ValueError: a field is missing or has another type.
        """
        known = record_from(_RunFile, values, f"run config {path}", "name the --run_dir of a run of this code")
        recipe = recipe_from_dict(known.recipe, str(path))
        return ReportedRun(recipe, known.world_size, known.precision, known.git_commit, json.dumps(values, indent=1))


@dataclass(frozen=True)
class CurveRow:
    """A row of train.jsonl: a training step has `loss`, a validation `val_loss`, both in nats per token."""

    step: int
    images_seen: int
    loss: float | None = None
    val_loss: float | None = None
    images_per_s: float | None = None
    mfu: float | None = None  # share of the peak, 0..1


def read_curve(run_dir: Path) -> list[CurveRow]:
    """The rows of RUN_DIR/train.jsonl; none if the file does not exist.

    Raises:
        ValueError: a line is not JSON, or a field is missing or has another type.
    """
    path = run_dir / "train.jsonl"
    lines = enumerate(read_json_lines(path), start=1)
    return [record_from(CurveRow, values, f"{path} line {number}", "remove the line") for number, values in lines]


@dataclass(frozen=True)
class PlanRow:
    """A row of a plan's table: what training takes on a number of GPUs. It has no `days` if no layout was found."""

    gpus: int
    fits: bool = False
    days: float | None = None
    mfu: float | None = None  # share of the peak, 0..1
    recipe: str | None = None
    gpu: str | None = None


def read_plan(path: Path) -> list[PlanRow]:
    """The rows that `python -m igpt_ds.plan --table --json` printed into a file.

    Raises:
        ValueError: not JSON, fewer than two rows, or a field is missing or has another type.
    """
    values, fix = read_json(path, "planned table"), "write it with `python -m igpt_ds.plan --table --json`"
    if not isinstance(values, list) or len(values) < 2:
        raise InputError(f"{path} is no table of a plan; {fix}")
    rows = [record_from(PlanRow, row, f"{path} row {number}", fix) for number, row in enumerate(values, start=1)]
    for number, row in enumerate(rows, start=1):
        if row.fits and (row.days is None or row.mfu is None):
            raise InputError(f"{path} row {number} fits and has no {'days' if row.days is None else 'mfu'}; {fix}")
    return rows
