"""Which micro batches a step gets. In: the run's images, and the ranges that rollbacks left out. Out: this rank's batches.

The images form an endless stream, whose order data/order.py decides. Called by train.py, finetune.py and train/loop.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.data.loader import Augment, Batch, Batches, BatchLayout, Loader
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.streaming import LIMITS, ShardStream, StreamLoader
from igpt_ds.ds_config import Run
from igpt_ds.errors import InputError

Range = tuple[int, int]  # positions [first, end) in the endless stream of images, in whole batches


def verify(images: Mixture | ShardStream, val_shards: ShardSet | None) -> None:
    """Reads all shards. With --on_bad skip the ranks divide the images among them, and damaged ones are left out."""
    if isinstance(images, Mixture) and images.on_bad == "skip":
        parts = dist.gather_objects(images.damaged(dist.rank(), dist.world_size()))
        try:
            images.skip([np.sort(np.concatenate(ids)) for ids in zip(*parts, strict=True)], aloud=dist.rank() == 0)
        except InputError as error:
            raise SharedError(str(error)) from None  # every rank counts the same
        dist.say(f"{images.n_skipped} of {images.n_images:,} training images are damaged and skipped")
    elif isinstance(images, Mixture):
        for shards in images.shard_sets:
            dist.from_rank_0(shards.verify)
    if val_shards is not None:
        dist.from_rank_0(val_shards.verify)


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
