"""Two runs' curves side by side: what counts as equal, and where they part."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import write_json_lines
from igpt_ds.ops.compare import Difference, compare_runs


def row(step: int, **changes: Any) -> dict[str, Any]:
    learned = {"step": step, "images_seen": 8 * step, "loss": 3 - step / 3, "lr": 0.1 / 3, "grad_norm": 1.5, "skipped_steps": 0}
    return learned | {"images_per_s": 40.0, "memory_gib": 1.0} | changes


def validation(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "images_seen": 8 * step, "val_loss": 2.5} | changes


def curve(path: Path, *rows: dict[str, Any]) -> Path:
    write_json_lines(path / "train.jsonl", list(rows))
    return path


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A run of four steps with a validation after the second."""
    return curve(tmp_path / "before", row(1), row(2), validation(2), row(3), row(4))


def test_speed_and_memory_do_not_count(tool: Any, before: Path, tmp_path: Path) -> None:
    faster = {"images_per_s": 80.0, "memory_gib": 2.0, "save_seconds": 0.1}
    after = curve(tmp_path / "after", row(1), row(2, **faster), validation(2), row(3), row(4, slowest_rank=1))
    assert tool("compare_runs", before, after) == (0, "rows in both runs: 5\nall values are bit-equal\n", "")
    assert compare_runs(before, after).equal


@pytest.mark.parametrize(
    ("place", "changed", "step", "column"),
    [
        (1, row(2, loss=3 - 2 / 3 + 1e-15), 2, "loss"),
        (2, validation(2, val_loss=2.25), 2, "val_loss"),
        (2, validation(2, val_accuracy=0.5), 2, "val_accuracy"),
        (3, row(3, lr=0.1), 3, "lr"),
        (3, row(3, grad_norm=None), 3, "grad_norm"),
        (4, row(4, skipped_steps=1), 4, "skipped_steps"),
    ],
)
def test_the_first_difference_is_named(
    tool: Any, before: Path, tmp_path: Path, place: int, changed: dict[str, Any], step: int, column: str
) -> None:
    rows = [row(1), row(2), validation(2), row(3), row(4)]
    old = rows[place].get(column)
    rows[place] = changed
    after = curve(tmp_path / "after", *rows)
    assert compare_runs(before, after).first == Difference(step, column, (old, changed[column]))
    status, said, _ = tool("compare_runs", before, after)
    one, other = ("none" if value is None else repr(value) for value in (old, changed[column]))
    assert f"first difference: step {step}, {column}: {one} in {before}, {other} in {after}\n" in said
    assert f"largest difference: {column} " in said
    assert status == 1


def test_a_tolerance_is_absolute(tool: Any, before: Path, tmp_path: Path) -> None:
    after = curve(tmp_path / "after", row(1, grad_norm=1.75), row(2), validation(2, val_loss=2.0), row(3), row(4))
    assert tool("compare_runs", before, after, "--tolerance", "0.5")[:2] == (
        0,
        "rows in both runs: 5\nno value differs by more than 0.5\nlargest difference: grad_norm 0.25, val_loss 0.5\n",
    )
    status, said, _ = tool("compare_runs", before, after, "--tolerance", "0.25")
    assert status == 1
    assert "first difference: step 2, val_loss: 2.5 in " in said
    status, _, error = tool("compare_runs", before, after, "--tolerance", "nan")
    assert (status, error) == (2, "compare_runs.py: error: --tolerance nan must be a number of at least 0\n")


def test_missing_and_extra_steps_are_named(tool: Any, before: Path, tmp_path: Path) -> None:
    after = curve(tmp_path / "after", row(1), row(2), *(row(step) for step in range(4, 12)))
    status, said, _ = tool("compare_runs", before, after)
    assert status == 1
    assert f"only in {before}: step 2 (validation), step 3 (training)\n" in said
    assert f"only in {after}: " in said
    assert "step 9 (training) and 2 more\n" in said
    apart = curve(tmp_path / "apart", row(7))
    assert tool("compare_runs", before, apart)[0] == 1


def test_a_run_without_rows_is_refused(tool: Any, before: Path, tmp_path: Path) -> None:
    status, _, error = tool("compare_runs", before, tmp_path)
    assert status == 2
    assert f"{tmp_path / 'train.jsonl'} has no rows" in error


def test_only_some_columns(before: Path, tmp_path: Path) -> None:
    after = curve(tmp_path / "after", row(1, grad_norm=2.0), row(2), validation(2), row(3), row(4))
    assert compare_runs(before, after, columns=("loss", "lr")).equal
    assert not compare_runs(before, after).equal


def test_a_value_that_is_not_a_number_equals_only_itself(tool: Any, tmp_path: Path) -> None:
    nan, same, other = (
        curve(tmp_path / name, row(1, loss=loss)) for name, loss in zip("abc", (math.nan, math.nan, 2.0), strict=True)
    )
    assert compare_runs(nan, same).equal
    assert tool("compare_runs", nan, other)[0] == 1
    infinite = curve(tmp_path / "d", row(1, loss=math.inf))
    assert compare_runs(infinite, infinite).equal
    assert not compare_runs(infinite, other).equal


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"loss": 1.0}', "has step None"),
        ('{"step": [1], "loss": 1.0}', "has step [1]"),
        ('{"step": 1, "loss": "1"}', "has values.loss '1'"),
        ('{"step": 1, "loss": 1' + 400 * "0" + "}", "has values.loss 1000"),
    ],
)
def test_a_row_of_another_type_is_refused(tool: Any, before: Path, tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "train.jsonl").write_text(line + "\n")
    status, _, error = tool("compare_runs", before, tmp_path)
    assert status == 2
    assert f"{tmp_path / 'train.jsonl'} line 1 {complaint}" in error
