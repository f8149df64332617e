"""Rollbacks: a lost run enters, the last good state leaves, and a range of images that this run will never see.

The order of images stays what it is; a rollback cuts a range out of it. RUN_DIR/rollbacks.json tells of every one, is written
before the state is loaded, and is obeyed by every later start: an interruption at any moment changes nothing. The ranges stand
in each checkpoint's manifest too. Called by train/loop.py and train.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds.files import read_json, write_json
from igpt_ds.train.checkpoint.manifest import list_checkpoints, read_manifest
from igpt_ds.train.stream import Range, leave_out, position

FORMAT, VERSION = "igpt_ds.rollbacks", 1


def read_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """What `record` has written of a run, oldest first; [] when there was none.

    Raises:
        ValueError: the file is not ours.
    """
    path = run_dir / "rollbacks.json"
    if not path.exists():
        return []
    values = read_json(path, "rollbacks")
    if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is not version {VERSION} of {FORMAT}; read it with the code that wrote it")
    return list(values["rollbacks"])


def skipped_ranges(rollbacks: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> list[Range]:
    """What a run leaves out: by its rollbacks.json, and by the checkpoint that it goes on from."""
    found: list[Range] = []
    for first, end in [*manifest.get("skipped_ranges", ()), *(rollback["skipped"] for rollback in rollbacks)]:
        found = leave_out(found, (int(first), int(end)))
    return found


def record(run_dir: Path, rollbacks: list[dict[str, Any]]) -> None:
    """Writes down all rollbacks of a run."""
    write_json(run_dir / "rollbacks.json", {"format": FORMAT, "version": VERSION, "rollbacks": rollbacks})


def good_checkpoint(
    checkpoints: Path, since: int, rollbacks: Sequence[dict[str, Any]] = ()
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint from before a doubt, and its manifest.

    The loss of step `since`, the first outlier, is that of the weights after since - 1 updates: a checkpoint of step since - 1 is
    the bad state itself, so it must be older.

    Args:
        since: the first step of the doubt.
        rollbacks: of this run so far. Where one of them met the same spike (the doubt begins before the run has got past it),
            what it went back to did not help: an older one is taken, if there is one.
    """
    bound = min((rollback["back_to"] for rollback in rollbacks if since <= rollback["step"]), default=since)
    found = None
    for checkpoint in reversed(list_checkpoints(checkpoints)):
        try:
            manifest = read_manifest(checkpoint)
        except ValueError:
            continue  # the next start names it
        if manifest["step"] < since - 1 and manifest.get("guards", {}).get("since") is None:
            found = checkpoint, manifest
            if manifest["step"] < bound:
                break
    return found


def range_to_skip(step: int, back_to: int, images: int | None, batch_images: int, skipped: Sequence[Range]) -> Range:
    """The range that a rollback from `step` to `back_to` completed steps leaves out.

    images: how many of the last ones seen, in whole batches, rounded up; None: all since the checkpoint. (PaLM, section 5.1, went
        back about 100 steps and left out 200 to 500 batches, "before and during the spike".)
    """
    first = back_to if images is None else max(back_to, step - -(-images // batch_images))
    return position(first, batch_images, skipped), position(step - 1, batch_images, skipped) + batch_images
