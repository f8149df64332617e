"""The times in the last rows of a train.jsonl, however long it is. Called by rows.py and starts.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.json_files import parse_row
from igpt_ds.schema import record_from

TAIL_BYTES = 1 << 18  # a thousand rows


@dataclass(frozen=True)
class TimedRow:
    """What the ledger needs of a row of train.jsonl. Earlier versions wrote neither."""

    time: float = 0.0  # seconds since 1970
    val_seconds: float = 0.0


def timed_rows(run_dir: Path) -> list[TimedRow]:
    """The last rows; lines that are no rows are left out."""
    path = run_dir / "train.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(record_from(TimedRow, parse_row(line.decode(), str(path)), str(path), "remove the line"))
    return rows
