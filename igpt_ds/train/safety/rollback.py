"""Rollbacks. In: a lost run. Out: the last good checkpoint, and a range of images that the run skips from then on.

The order of the images does not change; a rollback only cuts a range out of it. RUN_DIR/rollbacks.json lists all rollbacks. It is
written before the checkpoint is loaded, and every later start applies it, so an interruption at any moment changes nothing. Each
checkpoint's manifest has the ranges too. Called by train/loop.py and train/session.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.plain_files import is_missing
from igpt_ds.schema import record_from, to_json
from igpt_ds.sealed import Format
from igpt_ds.train.checkpoint.directory import list_checkpoints
from igpt_ds.train.checkpoint.manifest import Checkpoint, Manifest, read_checkpoint
from igpt_ds.train.stream import Range, leave_out, position

_FIX = "restore the file; without it the run would train on the skipped images"
ROLLBACKS = Format("igpt_ds.rollbacks", "rollbacks", _FIX, version=2, sealed=2, oldest=1)


@dataclass(frozen=True)
class Rollback:
    """One rollback."""

    step: int  # at which the run was lost
    since: int  # the first step in doubt
    back_to: int  # the step of the checkpoint that was loaded
    skipped: tuple[int, int]  # positions [first, end) in the stream of images
    why: str

    def __post_init__(self) -> None:
        first, end = self.skipped
        if not 0 <= first < end:
            raise InputError(f"skipped {[first, end]}, which is not a range of positions")


@dataclass(frozen=True)
class _Rollbacks:
    """The contents of rollbacks.json."""

    rollbacks: tuple[Rollback, ...]


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first; [] if there was none.

    Raises:
        ValueError: the file is damaged, or another version wrote it.
    """
    path = run_dir / "rollbacks.json"
    if is_missing(path):
        return []
    return list(record_from(_Rollbacks, ROLLBACKS.read(path), str(path), _FIX, strict=True).rollbacks)


def write_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """Writes all rollbacks of a run."""
    ROLLBACKS.write(run_dir / "rollbacks.json", to_json(_Rollbacks(tuple(rollbacks))))


def skipped_ranges(rollbacks: Sequence[Rollback], manifest: Manifest | None) -> list[Range]:
    """The ranges that a run skips: those of its rollbacks.json and those of the checkpoint that it continues."""
    found: list[Range] = []
    for skipped in [*(() if manifest is None else manifest.skipped_ranges), *(rollback.skipped for rollback in rollbacks)]:
        found = leave_out(found, skipped)
    return found


def good_checkpoint(checkpoints: Path, since: int, rollbacks: Sequence[Rollback] = ()) -> Checkpoint | None:
    """The newest undamaged checkpoint from before a doubt.

    The loss of step `since`, the first outlier, is that of the weights after since - 1 updates. A checkpoint of step since - 1
    holds the bad weights, so an older one is needed.

    Args:
        since: the first step in doubt.
        rollbacks: those of this run so far. If one of them met the same spike (the doubt starts before the step of that
            rollback), its checkpoint did not help, and an older one is taken if there is one.
    """
    bound = min((rollback.back_to for rollback in rollbacks if since <= rollback.step), default=since)
    found = None
    for path in reversed(list_checkpoints(checkpoints)):
        try:
            checkpoint = read_checkpoint(path)
        except ValueError:
            continue  # the next start names it
        step = checkpoint.manifest.step
        if step < since - 1 and checkpoint.manifest.guards.since is None:
            found = checkpoint
            if step < bound:
                break
    return found


def range_to_skip(step: int, back_to: int, images: int | None, batch_images: int, skipped: Sequence[Range]) -> Range:
    """The range that a rollback from `step` to `back_to` completed steps skips.

    Args:
        images: number of the last images to skip, rounded up to whole batches; None: all since the checkpoint. PaLM
            (section 5.1) went back about 100 steps and skipped 200 to 500 batches, "before and during the spike".
    """
    first = back_to if images is None else max(back_to, step - -(-images // batch_images))
    return position(first, batch_images, skipped), position(step - 1, batch_images, skipped) + batch_images
