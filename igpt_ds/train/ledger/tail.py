"""The last rows of a train.jsonl, however long it is. Called by rows.py, starts.py and ops/status.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from igpt_ds.json_files import parse_row
from igpt_ds.plain_files import check_file
from igpt_ds.schema import record_from

TAIL_BYTES = 1 << 18  # a thousand rows
R = TypeVar("R")


@dataclass(frozen=True)
class TimedRow:
    """What the ledger needs of a row of train.jsonl. Earlier versions wrote neither."""

    time: float = 0.0  # seconds since 1970
    val_seconds: float = 0.0


def tail_rows(path: Path, kind: type[R], size: int = TAIL_BYTES) -> list[R]:
    """The last rows of a train.jsonl, without a partial line at either end and without lines that are no rows; [] without a file.

    Raises:
        ValueError: the path is no plain file.
    """
    check_file(path)
    if not path.exists():
        return []
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - size))
        lines = file.read().split(b"\n")
    rows = []
    for line in lines[1:-1] if length > size else lines[:-1]:
        with contextlib.suppress(ValueError):
            rows.append(record_from(kind, parse_row(line.decode(), str(path)), str(path), "remove the line"))
    return rows


def timed_rows(run_dir: Path) -> list[TimedRow]:
    """The last rows; none if they cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return tail_rows(run_dir / "train.jsonl", TimedRow)
    return []
