"""Batches: from a number of images seen to tokens and labels, on any rank, without any state of its own.

In: a ShardSet. Out: int64 tokens [B, T] and labels [B]. `train/loop.py` and the evaluation call. What a batch holds is a pure
function of (seed, images seen, rank, micro_step), so that a resumed run, or one on other ranks, sees the same images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from igpt_ds.config import ModelConfig, batch_layout
from igpt_ds.data.order import random_words, shuffled
from igpt_ds.data.shards import ShardSet

_ROW, _COLUMN, _FLIP = 1, 2, 3  # purposes of random words; 0 is the order's own
_AHEAD = 2  # micro batches made in advance

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens int64 [B, T], labels int64 [B]


def check_shards(shards: ShardSet, model: ModelConfig) -> None:
    """Refuses shards that do not fit the model.

    Raises:
        ValueError: n_px or n_vocab differs.
    """
    if shards.n_px != model.n_px:
        fix = f"make shards with --n_px {model.n_px} or set n_px={shards.n_px} in the recipe"
        raise ValueError(f"shards {shards.path} have n_px={shards.n_px} but the model has n_px={model.n_px}; {fix}")
    if shards.n_vocab != model.n_vocab:
        fix = f"make shards with a palette of {model.n_vocab} colours or set n_vocab={shards.n_vocab} in the recipe"
        raise ValueError(f"shards {shards.path} have n_vocab={shards.n_vocab} but the model has n_vocab={model.n_vocab}; {fix}")


class Loader:
    """Training batches of one rank.

    The stream of images is endless and the same for every layout: position p is place p % n_images of epoch p // n_images.
    A step takes the next batch_images positions, laid out as [accumulation, world_size, micro_batch].

    Raises:
        ValueError: batch_images does not divide into micro_batch x world_size.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_images: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        augment_pad: int = 0,
        augment_flip: bool = False,
    ) -> None:
        assert 0 <= rank < world_size
        assert 0 <= augment_pad < shards.n_px
        self.shards, self.batch_images, self.micro_batch = shards, batch_images, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.augment_pad, self.augment_flip = augment_pad, augment_flip
        _, self.accumulation = batch_layout(batch_images, micro_batch, world_size)

    def batch(self, images_seen: int, micro_step: int) -> Batch:
        """This rank's share of one micro_step of the step that begins after images_seen images: B = micro_batch."""
        assert 0 <= micro_step < self.accumulation
        first = images_seen + (micro_step * self.world_size + self.rank) * self.micro_batch
        positions = np.arange(first, first + self.micro_batch)
        ids = shuffled(positions, self.shards.n_images, self.seed)
        tokens = augment(self.shards.tokens(ids), positions, self.seed, self.augment_pad, self.augment_flip)
        return _to_torch(tokens, self.shards.labels(ids))

    def stream(self, images_seen: int) -> Iterator[Batch]:
        """Every further micro batch, without end, made ahead of time by one thread.

        An error in the thread is raised here, at the batch that it belongs to. Closing the iterator ends the thread.
        """
        steps = ((seen, micro_step) for seen in count(images_seen, self.batch_images) for micro_step in range(self.accumulation))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as executor:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in steps:
                    ahead.append(executor.submit(self.batch, *step))
                    if len(ahead) > _AHEAD:
                        yield ahead.popleft().result()
            finally:
                executor.shutdown(cancel_futures=True)


def sequential(
    shards: ShardSet, batch: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """One pass over a split in its order, without augmentation, for validation: (tokens, labels, weight), B = batch.

    Every rank makes the same number of batches. Where images run out the last one is repeated with weight 0 (float32 [B], else
    1), so that sum(weight * loss) / sum(weight) over all ranks is the exact mean. `limit` takes that many images, evenly spread
    over the split, since sources come class by class.
    """
    n = shards.n_images if limit is None else min(limit, shards.n_images)
    assert n > 0
    for start in range(0, n, batch * world_size):
        places = start + rank * batch + np.arange(batch)
        ids = np.minimum(places, n - 1) * shards.n_images // n
        yield *_to_torch(shards.tokens(ids), shards.labels(ids)), torch.from_numpy((places < n).astype(np.float32))


def augment(grids: np.ndarray, positions: np.ndarray, seed: int, pad: int, flip: bool) -> np.ndarray:
    """A fresh variant of each image, uint16 [B, n_px, n_px] -> the same shape, drawn by stream position alone (paper 3.1).

    Reflect-padded by `pad` on each side, then a random window, then mirrored for half of the images. The palette maps each pixel
    by itself, so that doing this to tokens equals doing it to pixels.
    """
    n_px = grids.shape[-1]
    rows = columns = np.broadcast_to(np.arange(n_px), (len(grids), n_px))
    if pad:
        choices = np.uint64(2 * pad + 1)
        top, left = ((random_words(seed, purpose, positions) % choices).astype(np.int64) for purpose in (_ROW, _COLUMN))
        rows, columns = _reflect(rows + top[:, None] - pad, n_px), _reflect(columns + left[:, None] - pad, n_px)
    if flip:
        mirrored = (random_words(seed, _FLIP, positions) >> np.uint64(63)).astype(bool)
        columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    return grids[np.arange(len(grids))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(index: np.ndarray, n: int) -> np.ndarray:
    """Mirrors indices outside 0 .. n - 1 at the border pixel, which is not repeated."""
    index = np.abs(index)
    return n - 1 - np.abs(n - 1 - index)


def _to_torch(grids: np.ndarray, labels: np.ndarray) -> Batch:
    return torch.from_numpy(grids.reshape(len(grids), -1).astype(np.int64)), torch.from_numpy(labels)
