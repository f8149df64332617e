"""Saves an engine's state as a checkpoint, on all ranks together.

A checkpoint is written under a temporary name with checksums, and renamed when complete (see directory.py). If one rank's disk
fails, all ranks stop. DeepSpeed's `latest` file is not written: it appears before the other ranks have finished. `begin_save`
takes the state at a step; every rank writes its files, at once or in the background (saver.py); `Begun.commit` completes the
checkpoint. Called by train/session.py, train/checkpoint/saver.py and train/checkpoint/load.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.memory import in_memory
from igpt_ds.plan.costs import checkpoint_bytes
from igpt_ds.train.checkpoint.directory import checkpoint_name, commit, list_checkpoints, prune
from igpt_ds.train.checkpoint.disk import ROOM, SLACK, CheckpointWriter, require_space
from igpt_ds.train.checkpoint.manifest import Manifest, Progress, RunFacts, read_checkpoint
from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.checkpoint.snapshot import Buffers
from igpt_ds.train.checkpoint.tiers import Tier
from igpt_ds.train.engine_protocol import Engine, model_size
from igpt_ds.train.rng import rng_states
from igpt_ds.train.run_dir import check_owner, this_start


@dataclass(frozen=True)
class Saved:
    """A checkpoint just saved: its path, seconds until all ranks were done, and bytes of all files."""

    path: Path
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s, {self.bytes / 1e6 / self.seconds:.0f} MB/s"


@dataclass(frozen=True)
class Kept:
    """The checkpoints that stay when old ones are removed: the newest (at least 1), multiples of a step (0: none), and steps."""

    last: int
    every: int = 0
    steps: Collection[int] = ()


@dataclass(frozen=True)
class Begun:
    """A checkpoint whose state is taken, and whose files `writer` has written or still holds."""

    tier: Tier
    unfinished: Path
    final: Path
    manifest: Manifest  # without files
    writer: CheckpointWriter
    kept: Kept
    start: float

    def commit(self) -> Saved:
        """Completes the checkpoint on all ranks, once each has written its files, and removes old ones.

        Raises:
            SharedError: a rank could not write. The new checkpoint is removed, the others are unchanged.
        """
        tier, what = self.tier, f"checkpoint {self.final} could not be saved"
        reports = dist.gather_objects(([*self.writer.entries, *self.writer.copies], self.writer.error))
        agree([error or ("" if files else "wrote no file") for files, error in reports], self.unfinished, what, tier)
        files = tuple(entry for rank in tier.members for entry in reports[rank][0])
        manifest = replace(self.manifest, files=files)
        try:
            dist.from_rank_0(lambda: check_owner(tier.run_dir))  # the owner may have changed during the save
            tier.once(lambda: commit(self.unfinished, self.final, manifest))
        except SharedError as error:
            give_up(str(error), self.unfinished, what, tier)
        remove_old(tier, self.kept)
        return Saved(self.final, time.monotonic() - self.start, manifest.bytes)


def remove_old(tier: Tier, kept: Kept) -> None:
    """Removes the checkpoints that need not stay."""
    take = partial(prune, tier.directory, kept.last, kept.every, kept.steps)
    if tier.ranks is None:
        remove_together(dist.from_rank_0(take))
    else:
        tier.once(lambda: _remove(take()))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path)


def save_checkpoint(engine: Engine, directory: Path, run: RunFacts, progress: Progress, kept: Kept) -> Saved:
    """Saves on all ranks; returns when the checkpoint is complete and old ones are removed.

    Args:
        directory: RUN_DIR/checkpoints.

    Raises:
        SharedError: the disk is too small or failed on some rank. The new checkpoint is removed, the others are unchanged.
    """
    return begin_save(engine, Tier(directory, directory.parent), run, progress, kept).commit()


def begin_save(
    engine: Engine, tier: Tier, run: RunFacts, progress: Progress, kept: Kept, buffers: Buffers | None = None
) -> Begun:
    """Takes the state of all ranks. Without buffers its files are written then; otherwise `Begun.writer` holds them.

    Raises:
        SharedError: the disk is too small.
    """
    import deepspeed

    start, directory = time.monotonic(), tier.directory
    final = directory / checkpoint_name(progress.step)
    unfinished = unfinished_of(final)
    dist.from_rank_0(lambda: check_owner(tier.run_dir))
    tier.once(lambda: make_unfinished(unfinished, expected_bytes(engine, tier), tier.room))
    states = [rng_states()] if engine.zero_optimization_stage() == 3 else dist.gather_objects(rng_states())
    writer = CheckpointWriter(engine.checkpoint_engine, buffers)
    engine.checkpoint_engine, engine._copy_recovery_script = writer, lambda path: None  # tools/consolidate.py replaces it
    try:
        engine.save_checkpoint(str(directory), tag=unfinished.name, client_state={"igpt_ds/rng": states}, save_latest=False)
    finally:
        engine.checkpoint_engine = writer.wrapped
    manifest = Manifest(
        **vars(run),
        **vars(progress),
        world_size=dist.world_size(),
        stage=int(engine.zero_optimization_stage()),
        start=tier.start,
        versions={"torch": str(torch.__version__), "deepspeed": str(deepspeed.__version__)},
        files=(),
    )
    return Begun(tier, unfinished, final, manifest, writer, kept, start)


def unfinished_of(final: Path) -> Path:
    """The directory in which a checkpoint is written before it is complete.

    The name of this start is in it, so that a start which lost the run does not remove the files of its successor.
    """
    return final.with_name(".".join(part for part in (final.name, this_start(), "partial") if part))


def make_unfinished(unfinished: Path, needed: int, fix: str = ROOM) -> None:
    """Makes the empty directory of a save on a disk that has space for it.

    Raises:
        ValueError: the disk has too little.
    """
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        require_space(unfinished, needed, f"checkpoint {unfinished.name.partition('.')[0]}", fix)
    except ValueError:
        unfinished.rmdir()
        raise


def agree(errors: list[str], unfinished: Path, what: str, tier: Tier) -> None:
    """If some rank failed, removes the unfinished files and stops all ranks. `errors` has "" for each rank that succeeded.

    Raises:
        SharedError: with the first error, its rank and the fix.
    """
    failed = [f"on rank {rank} {error}" for rank, error in enumerate(errors) if error]
    if failed:
        give_up(failed[0], unfinished, what, tier)


def give_up(error: str, unfinished: Path, what: str, tier: Tier) -> NoReturn:
    """Removes the unfinished files and stops all ranks.

    Raises:
        SharedError: always, with the error and the fix.
    """
    tier.once(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    raise SharedError(
        f"{what}: {error}; its files were removed, and the previous checkpoint is unchanged; --resume auto continues from it"
    )


def expected_bytes(engine: Engine, tier: Tier) -> int:
    """The size of the next checkpoint: that of the previous one, else as the plan estimates it (plan/costs.py).

    With a disk for each node it is the part of one node, and with copies that of two.
    """
    try:
        before = read_checkpoint(list_checkpoints(tier.directory)[-1]).manifest.bytes
    except (IndexError, ValueError, OSError):
        n_parameters, weight_bytes = model_size(engine)
        tensors = checkpoint_bytes(n_parameters, engine.zero_optimization_stage(), weight_bytes)
        ranks = len(tier.members) * (2 if tier.copies else 1)
        return int(SLACK * tensors * ranks / dist.world_size()) + (1 << 17) * ranks
    return int(SLACK * before)


def check_space(engine: Engine, tier: Tier, keep_last: int) -> None:
    """Checks before the first step that the disk has space for keep_last checkpoints and the one being saved.

    Raises:
        SharedError: the disk has less; on every rank.
    """

    def ask() -> None:
        missing = _missing(tier, keep_last)
        require_space(tier.directory, missing * expected_bytes(engine, tier), f"room for {missing} checkpoints", tier.room)

    tier.once(ask)


def states_in_memory(engine: Engine, tier: Tier, keep_last: int) -> int:
    """Bytes of host memory that keep_last checkpoints and the one being saved will take beyond those that are there.

    0 on a disk, and on ranks for which another one completes checkpoints.
    """
    if not (tier.works and tier.leads and in_memory(tier.directory)):
        return 0
    return _missing(tier, keep_last) * expected_bytes(engine, tier)


def _missing(tier: Tier, keep_last: int) -> int:
    return max(1, keep_last + 1 - len(list_checkpoints(tier.directory)))
