"""Which micro batches a step gets. In: the run's images, and the ranges that rollbacks left out. Out: this rank's batches.

The images form an endless stream, whose order data/order.py decides. Called by train.py, finetune.py and train/loop.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.data.loader import Augment, Batch, Batches, BatchLayout, Loader
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.verified import (
    ShardCheck,
    Verified,
    VerifiedShard,
    checks_of,
    damaged_images,
    read_verified,
    run_checks,
    write_verified,
)
from igpt_ds.data.streaming import LIMITS, ShardStream, StreamLoader
from igpt_ds.ds_config import Run
from igpt_ds.errors import InputError, error_text

Range = tuple[int, int]  # positions [first, end) in the endless stream of images, in whole batches


def verify(images: Mixture | ShardStream, val_shards: ShardSet | None, mode: str, record: Path) -> None:
    """Verifies all shards, each on one rank. Damage found by any rank stops all ranks; --on_bad skip leaves its images out.

    Args:
        mode: of --verify_shards. "once" reads what is not in the record or has changed since; "never" compares the sizes alone.
        record: where the verified shards are noted, see data/shards/verified.py.

    Raises:
        SharedError: a shard is damaged or cannot be read, or more images are damaged than --max_bad allows.
    """
    start, training = time.monotonic(), images.shard_sets if isinstance(images, Mixture) else []
    sets = [*training, *([] if val_shards is None else [val_shards])]
    skip = isinstance(images, Mixture) and images.on_bad == "skip"
    before = Verified() if mode == "never" else dist.from_rank_0(lambda: read_verified(record, [shards.path for shards in sets]))
    checks = checks_of(sets, mode, [skip and shards is not val_shards for shards in sets], before)
    found, read = _on_all_ranks(checks)
    if mode == "never":
        dist.say(f"shards not verified: the sizes of {len(checks)} are those of the index (--verify_shards never)")
        return
    if isinstance(images, Mixture) and skip:
        try:
            images.skip([damaged_images(checks, found, shards) for shards in training], aloud=dist.rank() == 0)
        except InputError as error:
            raise SharedError(str(error)) from None  # every rank counts the same
        dist.say(f"{images.n_skipped} of {images.n_images:,} training images are damaged and skipped")
    if read:
        dist.from_rank_0(lambda: write_verified(record, before.having(checks, found)))
    seconds = time.monotonic() - start
    dist.say(f"shards verified: {read} read in {seconds:.1f} s, {len(checks) - read} unchanged since they were verified")


def _on_all_ranks(checks: list[ShardCheck]) -> tuple[list[VerifiedShard], int]:
    """Every rank runs its share of the checks. What each check found, on every rank, and how many shards were read."""
    rank, ranks, error, results = dist.rank(), dist.world_size(), "", list[tuple[VerifiedShard, bool]]()
    mine = checks[rank::ranks]
    try:
        for result in tqdm(run_checks(mine), "verify", len(mine), unit=" shards", leave=False, disable=True if rank else None):
            results.append(result)
    except (InputError, OSError) as caught:
        error = error_text(caught)
    dist.meet()
    answers = dist.gather_objects((results, error))
    if errors := [error for _, error in answers if error]:
        raise SharedError(errors[0])
    for check, (_, was_read) in zip(mine, results, strict=True):
        if was_read:
            check.shards.trust(check.number)
    found: list[VerifiedShard] = [answers[i % ranks][0][i // ranks][0] for i in range(len(checks))]
    return found, sum(was_read for each, _ in answers for _, was_read in each)


def batches(images: Mixture | ShardStream, run: Run, with_labels: bool = False) -> Batches:
    """This rank's training batches. The engine must exist: it divides the ranks into groups."""
    recipe = run.recipe
    assert dist.data_world_size() * run.sequence_parallel == run.world_size, "build the engine first"
    layout = BatchLayout(recipe.batch_images, run.micro_batch, dist.data_rank(), dist.data_world_size())
    augment = Augment(recipe.augment_pad, recipe.augment_flip)
    if isinstance(images, Mixture):
        return Loader(images, layout, recipe.seed, augment, with_labels)
    if dist.rank() == 0:
        print(LIMITS, file=sys.stderr, flush=True)
    return StreamLoader(images, layout, recipe.seed, augment, with_labels)


def position(step: int, batch_images: int, skipped: Sequence[Range]) -> int:
    """The position in the stream of the first image of the step that follows `step` completed ones.

    Args:
        skipped: ranges left out, sorted and disjoint (see `leave_out`).
    """
    place = step * batch_images
    for first, end in skipped:
        if place >= first:
            place += end - first
    return place


def leave_out(skipped: Sequence[Range], new: Range) -> list[Range]:
    """The ranges and a new one, sorted; ranges that touch are joined."""
    joined: list[Range] = []
    for first, end in sorted([*skipped, new]):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((first, end))
    return joined


class Stream:
    """This rank's training batches step by step, without the ranges that are left out."""

    def __init__(self, loader: Batches, batch_images: int, accumulation: int) -> None:
        self.loader, self.batch_images, self.accumulation = loader, batch_images, accumulation
        self._batches: Iterator[Batch] | None = None
        self._place = -1

    def step(self, step: int, skipped: Sequence[Range]) -> list[Batch]:
        """The micro batches of the step that follows `step` completed ones."""
        place = position(step, self.batch_images, skipped)
        if self._batches is None or place != self._place:
            self.close()
            self._batches = self.loader.stream(place)
        self._place = place + self.batch_images
        return [next(self._batches) for _ in range(self.accumulation)]

    def close(self) -> None:
        """Ends the thread that prepares batches."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]  # both kinds of Batches give generators
