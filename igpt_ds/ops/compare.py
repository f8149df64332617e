"""Compares the curves of two runs. In: two run directories. Out: a `Comparison`.

Called by tools/compare_runs.py and tools/rehearse.py. Rows are matched by step and kind (training or validation). Neither torch
nor numpy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json_lines
from igpt_ds.schema import record_from

# Columns of train.jsonl that measure the machine and not the model.
MEASURED = {"images_per_s", "tokens_per_s", "mfu", "memory_gib", "data_wait", "slowest_rank", "slowest_ratio"}
MEASURED |= {"time", "save_seconds", "val_seconds"}
Value = float | int | None  # None: not finite, or the row has no such column
Rows = dict[tuple[int, str], dict[str, Value]]


@dataclass(frozen=True)
class Difference:
    """One value that differs by more than the tolerance."""

    step: int
    column: str
    values: tuple[Value, Value]


@dataclass(frozen=True)
class _Row:
    """A row of train.jsonl, as its reader checks it."""

    step: int
    values: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """What two curves have in common, and where they part."""

    rows: int  # in both runs
    missing: tuple[tuple[str, ...], tuple[str, ...]]  # rows that the other run lacks, as "step 4 (validation)"
    first: Difference | None  # the first difference by step; None if there is none
    largest: dict[str, float]  # the largest absolute difference of each column; infinite where one run has no finite value

    @property
    def equal(self) -> bool:
        """Whether both runs have the same rows with the same values."""
        return self.first is None and not any(self.missing)


def compare_runs(run_a: Path, run_b: Path, tolerance: float = 0.0, columns: Collection[str] | None = None) -> Comparison:
    """Compares two train.jsonl files row by row.

    Args:
        tolerance: the absolute difference up to which two values count as equal; 0: equal to the last bit.
        columns: the columns to compare; None: all except `MEASURED`.

    Raises:
        ValueError: a run has no rows, or a row has another type than numbers.
    """
    a, b = (_rows(run_dir, columns) for run_dir in (run_a, run_b))
    common = sorted(a.keys() & b.keys())
    missing = tuple(
        tuple(f"step {step} ({kind})" for step, kind in sorted(one.keys() - other)) for one, other in ((a, b), (b, a))
    )
    first, largest = None, dict[str, float]()
    for key in common:
        for column in a[key] | b[key]:
            values = a[key].get(column), b[key].get(column)
            gap = _gap(*values)
            largest[column] = max(gap, largest.get(column, 0.0))
            if first is None and gap > tolerance:
                first = Difference(key[0], column, values)
    return Comparison(len(common), (missing[0], missing[1]), first, largest)


def _rows(run_dir: Path, columns: Collection[str] | None) -> Rows:
    path = run_dir / "train.jsonl"
    rows: Rows = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        line = record_from(_Row, {"step": row.get("step"), "values": row}, f"{path} line {number}", "remove the line")
        compared = {name: value for name, value in row.items() if (name in columns if columns else name not in MEASURED)}
        rows[line.step, "validation" if "val_loss" in row else "training"] = compared
    if not rows:
        raise InputError(f"{path} has no rows; name the --run_dir of a run that has trained")
    return rows


def _gap(one: Value, other: Value) -> float:
    if one is None or other is None or math.isnan(one) or math.isnan(other):
        return 0.0 if one is other or repr(one) == repr(other) else math.inf
    return 0.0 if one == other else float(abs(one - other))
