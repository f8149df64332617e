"""A run's checkpoints as directories: which are complete, which is the newest, which are removed.

RUN_DIR/checkpoints/step-00000100/ holds the files of every rank, manifest.json (see manifest.py) and COMPLETE, which is written
last. Then the directory gets its name. `.partial` is a save or a removal that was interrupted; `.broken` was damaged; `.old` is
replaced at this moment, and gets its name back if the replacement was killed. Called by train/checkpoint/, train/loop.py,
train/safety/rollback.py, ops/, finetune.py and tools/reshard.py. No engine is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from igpt_ds.errors import InputError, error_text
from igpt_ds.files import fsync_path
from igpt_ds.locks import InUseError, locked
from igpt_ds.train.checkpoint.manifest import (
    Checkpoint,
    DamagedError,
    Manifest,
    read_checkpoint,
    refuse_damaged,
    write_manifest,
)

_SWAP_SECONDS = 10.0  # to wait for a process that replaces a checkpoint: two renames


def checkpoint_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's directory name."""
    return int(checkpoint.name.removeprefix("step-"))


def recover(final: Path) -> None:
    """Gives a checkpoint its name back if the process that replaced it was killed between its two renames.

    Every reader calls this: a missing name would make an older step the newest.

    Raises:
        ValueError: the disk refuses, or another process keeps replacing the checkpoint.
    """
    old = _old(final)
    if final.exists() or not old.exists():
        return
    try:
        with locked(final, wait=_SWAP_SECONDS):
            if old.exists() and not final.exists():
                os.replace(old, final)
    except InUseError:
        raise
    except OSError as error:
        raise InputError(f"{old} must be renamed to {final.name}, which fails: {error.strerror}; rename it yourself") from None


def _old(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def list_checkpoints(directory: Path) -> list[Path]:
    """All checkpoints, complete or not, from the oldest step to the newest.

    Raises:
        ValueError: as `recover`.
    """
    for old in directory.glob("step-*.old"):
        recover(old.with_suffix(""))
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints with a COMPLETE file, from the oldest step to the newest."""
    return [path for path in list_checkpoints(directory) if (path / "COMPLETE").exists()]


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint with a COMPLETE file; 0 without one."""
    return max(map(step_of, complete_checkpoints(directory)), default=0)


def commit(partial: Path, final: Path, manifest: Manifest) -> None:
    """Completes a checkpoint with its manifest, and gives it its name."""
    write_manifest(partial, manifest)
    old = _old(final)
    if final.exists() or old.exists():  # saved a second time, or for other ranks
        with locked(final, wait=_SWAP_SECONDS):
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(final, old)
            os.replace(partial, final)  # after a kill before this, `recover` restores the old one
            fsync_path(final.parent)
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, final)
        fsync_path(final.parent)


def prune(directory: Path, keep_last: int, keep_every: int, protected: Collection[int] = ()) -> list[Path]:
    """Takes complete checkpoints away except the keep_last newest, multiples of keep_every (0: none) and protected steps.

    Returns their new names, `.partial`, for the caller to remove. The next start removes what a crash leaves.
    """
    doomed = []
    for path in complete_checkpoints(directory)[: -max(1, keep_last)]:
        step = step_of(path)
        if step not in protected and not (keep_every and step % keep_every == 0):
            doomed.append(path.with_name(f"{path.name}.partial"))
            os.replace(path, doomed[-1])
    return doomed


def refuse_copy(checkpoint: Checkpoint) -> None:
    """Refuses a directory that was copied or renamed by hand.

    Raises:
        DamagedError: the manifest has another step than the directory's name.
    """
    path, step = checkpoint.path, checkpoint.manifest.step
    if step != step_of(path):
        raise DamagedError(f"{path} holds step {step}: copied or renamed; rename it to {checkpoint_name(step)} or move it away")


def search(
    directory: Path, before: int | None = None, skips: tuple[type[Exception], ...] = (DamagedError,)
) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint of a step before `before`, and why each newer one was skipped.

    Args:
        skips: errors of a checkpoint that lead to the one before it.

    Raises:
        ValueError, OSError: a newer checkpoint is not damaged but cannot be read (see `read_checkpoint`).
    """
    reasons = []
    for path in reversed(list_checkpoints(directory)):
        if before is not None and step_of(path) >= before:
            continue
        try:
            checkpoint = read_checkpoint(path)
            refuse_copy(checkpoint)
        except skips as damage:
            reasons.append(error_text(damage))
            continue
        return checkpoint, reasons
    return None, reasons


def say_skipped(reasons: list[str]) -> None:
    """Names the skipped checkpoints on stderr."""
    for reason in reasons:
        print(f"checkpoint skipped: {reason}", file=sys.stderr, flush=True)


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint. Each newer one that is damaged is named on stderr."""
    found, reasons = search(directory)
    say_skipped(reasons)
    return found


def refuse_to_start_over(directory: Path, reasons: list[str]) -> None:
    """Refuses to start at step 0 if there are checkpoints but none is usable. `.partial` directories do not count.

    Raises:
        DamagedError: with every reason and the fix.
    """
    aside = sorted(path.name for path in directory.glob("step-*.broken"))
    if reasons or aside:
        why = "; ".join(reason.removesuffix("; choose another step") for reason in reasons)
        broken = f"{', '.join(aside)} set aside before" if aside else ""
        raise DamagedError(
            f"{directory} holds no usable checkpoint, and nothing was changed: {'; '.join(filter(None, (why, broken)))}; "
            "restore one, or choose another --run_dir to start at step 0"
        )


def choose_checkpoint(run_dir: Path, step: int | None, best: bool = False, verify: bool = True) -> Checkpoint:
    """A run's checkpoint of a step (None: the newest undamaged one).

    Args:
        best: without a step, take the best one so far of a fine-tuning.
        verify: compare every file with its sha256; ranks that load it share this instead.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    directory = run_dir / "checkpoints"
    if step is None:
        newest = newest_checkpoint(directory)
        if newest is None:
            raise InputError(f"{directory} holds no complete checkpoint; train first, or name another --run_dir")
        checkpoint, early = newest, newest.manifest.guards.early
        step = early.best_step if best and early is not None else None
    if step is not None:
        path = directory / checkpoint_name(step)
        recover(path)
        if not path.exists():
            steps = ", ".join(str(step_of(path)) for path in list_checkpoints(directory)) or "none"
            raise InputError(f"{path} does not exist; steps there: {steps}")
        checkpoint = read_checkpoint(path)
        refuse_copy(checkpoint)
    if verify:
        refuse_damaged(checkpoint)
    return checkpoint


def remove_leftovers(directory: Path) -> None:
    """Cleans up after interrupted saves and removals, before any rank reads or writes."""
    for path in directory.glob("step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    list_checkpoints(directory)  # first it recovers what has no other copy
    for old in directory.glob("step-*.old"):
        shutil.rmtree(old, ignore_errors=True)
    for lock in directory.glob(".step-*.lock"):
        with suppress(ValueError), locked(directory / lock.name.removeprefix(".").removesuffix(".lock")):
            pass  # the holder was killed, and this one removes the file


def set_aside_newer(directory: Path, step: int) -> None:
    """Renames checkpoints of later steps to `.broken`: they were skipped and must not count when old ones are removed.

    An existing `.broken` directory is kept; the next one gets a number, as in step-00000100.2.broken.
    """
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            number, broken = 1, path.with_name(f"{path.name}.broken")
            while broken.exists():
                number += 1
                broken = path.with_name(f"{path.name}.{number}.broken")
            os.replace(path, broken)
