"""What a batch job writes of itself: lines of its log, and a row of RUN_DIR/restarts.jsonl for each start and each end.

In: a `Start` and what happened. Out: rows. The standard library is enough. Called by ops/restarts.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from igpt_ds.errors import error_text
from igpt_ds.ops.requeue import Start
from igpt_ds.train.checkpoint.directory import list_checkpoints
from igpt_ds.train.ledger.rows import SAVE, TRAIN, append_row, read_rows, read_time

LOST = "SLURM ended it before it could write its end: a preemption, a lost node or a cancelled job"


def write_line(line: str, log: TextIO) -> None:
    """Writes a line to the job's log. A log on a full disk must not keep the job from queueing again."""
    try:
        print(line, file=log, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # otherwise Python writes the line again when it ends


def read_text(path: Path) -> str:
    """A file's text; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def newest_images(run_dir: Path) -> int:
    """`images_seen` of the newest complete checkpoint, or of a newer fast save; 0 without one, or if nothing can be read.

    That of a fine-tuning with few labels is the sum over its subsets (finetune.py --labels).
    """
    subsets, fast = sum(map(newest_images, run_dir.glob("subset-*"))), fast_images(run_dir)
    try:
        complete = [path for path in list_checkpoints(run_dir / "checkpoints") if (path / "COMPLETE").exists()]
        images = int(json.loads((complete[-1] / "manifest.json").read_text(encoding="utf-8"))["images_seen"])
    except (IndexError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        images = 0
    return subsets + max(images, fast)


def fast_images(run_dir: Path) -> int:
    """`images_seen` of the newest save into the fast directory (--fast_dir), as far as later starts found it; 0 without one.

    A save is complete once another one follows, which waits for it, or once a start continues from it.
    """
    images = begun = 0
    for row in read_rows(run_dir):
        if row.get("event") == TRAIN:
            images = begun = min(begun, _as_found(row, begun))
        elif row.get("event") == SAVE and isinstance(row.get("images_seen"), int):
            images, begun = begun, row["images_seen"] if row.get("fast") is True else begun
    return images


def _as_found(row: dict[str, Any], images: int) -> int:
    """The images that the start which wrote the row continued from; `images` if the row does not say."""
    found = 0 if row.get("step") == 0 else row.get("images_seen")
    return found if isinstance(found, int) else images


def record(start: Start, event: str, **more: object) -> None:
    """Adds a row to restarts.jsonl.

    Raises:
        OSError: it cannot be written.
    """
    now, path = datetime.now().astimezone().isoformat(timespec="seconds"), start.run_dir / "restarts.jsonl"
    row = {"event": event, "job": start.job, "restart": start.restart, "time": now, "nodes": start.nodes}
    append_row(path, row | {"images_seen": newest_images(start.run_dir)} | more)


def time_of_last_start(run_dir: Path) -> float | None:
    """When a batch job last began a start, in seconds since 1970; None if none did."""
    times = [read_time(row.get("time")) for row in read_rows(run_dir) if row.get("event") == "start"]
    return times[-1] if times else None


def record_end(start: Start, status: int, reason: str, bad: Sequence[str] = ()) -> None:
    """Adds the last row of a start. If the disk is full, the job goes on without it."""
    try:
        record(start, "end", status=status, reason=reason, bad_nodes=",".join(bad))
    except OSError as error:
        write_line(f"error: {error_text(error)}", sys.stderr)


def images_at_starts(start: Start) -> list[int]:
    """The images that each start of the job began with, this one included; of starts without a row, those that are there now.

    A state may have gone with its node, or be damaged: no start before counts for more than a later one really continued from.
    """
    images, last = list[int](), -1
    for row in read_rows(start.run_dir):
        try:
            if row["event"] == "start" and row["job"] == start.job:
                last, images = int(row["restart"]), [*images, int(row["images_seen"])]
            elif row["event"] == TRAIN and images:
                found = _as_found(row, images[-1])
                images = [*(min(found, before) for before in images[:-1]), found]
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return [*images, *[newest_images(start.run_dir)] * (start.restart - last)]


def next_restart(run_dir: Path, job: str, least: int) -> int:
    """The number of a job's next start: higher than that of each of its starts in restarts.jsonl, and at least `least`."""
    number = least
    for row in read_rows(run_dir):
        if str(row.get("job")) == job and isinstance(row.get("restart"), int):
            number = max(number, row["restart"] + 1)
    return number


def record_lost_ends(start: Start) -> None:
    """Adds the end of each earlier start that SLURM ended before the job could: its status is None, its time is now.

    Raises:
        OSError: they cannot be written.
    """
    begun: dict[tuple[str, int], Start] = {}
    for row in read_rows(start.run_dir):
        try:
            which = str(row["job"]), int(row["restart"])
            if row["event"] == "start":
                begun[which] = replace(start, job=which[0], restart=which[1], nodes=str(row["nodes"]))
            else:
                begun.pop(which, None)
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    begun.pop((start.job, start.restart), None)
    for lost in begun.values():
        record(lost, "end", status=None, reason=LOST, bad_nodes="")
