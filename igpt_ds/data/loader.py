"""Batches: tokens and labels for any number of images seen, on any rank. The loader keeps no state.

In: ShardSets or a Mixture of them. Out: uint16 tokens [B, T], int64 labels [B] and int64 positions [B] in the endless stream.
Called by `train/` and `evaluate/`. A batch is a pure function of (seed, images seen, rank, micro_step), so a resumed run,
or a run on another number of ranks, sees the same images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from igpt_ds.config import ModelConfig
from igpt_ds.counter_random import random_words
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.ds_config import batch_layout
from igpt_ds.errors import InputError

_ROW, _COLUMN, _FLIP = 1, 2, 3  # purposes of random words; order.py has the others
_ORDER_CHUNK = 16384  # positions whose images are computed at once, because each numpy call has a fixed cost
_READ_BYTES, _READ_IMAGES = 1 << 22, 1024  # limits of one read, which one thread hands to the other
_AHEAD = 1  # reads made in advance, besides the current one; more do not fit the cache of a core
_AUGMENT_CHUNK = 128  # images augmented at once, to fit the cache


class Batch(NamedTuple):
    """One micro batch."""

    tokens: torch.Tensor  # uint16 [B, T]; int64 after `to`
    labels: torch.Tensor  # int64 [B]; [0] without with_labels
    first: int  # stream position of its first image; the other images follow it

    @property
    def positions(self) -> torch.Tensor:
        """int64 [B], on the CPU: the stream position of each image, which seeds all random draws for the image."""
        return torch.arange(self.first, self.first + len(self.tokens))

    def to(self, device: torch.device | str) -> Batch:
        """The batch as a network takes it. Tokens move to the device as uint16, a quarter of the bytes of int64."""
        tokens = self.tokens.to(device, non_blocking=True).long()
        return Batch(tokens, self.labels.to(device, non_blocking=True), self.first)


class Images(Protocol):
    """The members that ShardSet, Mixture and ShardStream share."""

    n_px: int
    n_vocab: int

    @property
    def path(self) -> object:
        """The location of the images."""


class Batches(Protocol):
    """A source of training batches: a Loader, or a StreamLoader if shards allow no random access."""

    def stream(self, images_seen: int) -> Iterator[Batch]:
        """All micro batches of this rank after images_seen images, without end."""


def check_shards(shards: Images, model: ModelConfig) -> None:
    """Refuses shards that do not fit the model.

    Raises:
        ValueError: n_px or n_vocab differs.
    """
    if shards.n_px != model.n_px:
        fix = f"make shards with --n_px {model.n_px} or set n_px={shards.n_px} in the recipe"
        raise InputError(f"shards {shards.path} have n_px={shards.n_px} but the model has n_px={model.n_px}; {fix}")
    if shards.n_vocab != model.n_vocab:
        fix = f"make shards with a palette of {model.n_vocab} colours or set n_vocab={shards.n_vocab} in the recipe"
        raise InputError(f"shards {shards.path} have n_vocab={shards.n_vocab} but the model has n_vocab={model.n_vocab}; {fix}")


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is divided: [accumulation, world_size, micro_batch] images; this rank reads column `rank`.

    Ranks that share images under sequence parallelism form one group and count as one rank here.

    Raises:
        ValueError: batch_images does not divide into micro_batch x world_size.
    """

    batch_images: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        batch_layout(self.batch_images, self.micro_batch, self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro batches per rank and step."""
        return self.batch_images // (self.micro_batch * self.world_size)

    def positions(self, images_seen: int, first: int, count: int) -> np.ndarray:
        """Stream positions of this rank's micro batches first .. first + count - 1 after images_seen: [count * micro_batch].

        `first` counts the micro batches of this rank across micro_steps and steps.
        """
        starts = images_seen + (np.arange(first, first + count) * self.world_size + self.rank) * self.micro_batch
        return (starts[:, None] + np.arange(self.micro_batch)).ravel()


@dataclass(frozen=True)
class Augment:
    """The random variants of each image: pixels of reflect padding before a random crop, and mirroring (paper 3.1)."""

    pad: int = 0
    flip: bool = False


NO_AUGMENT = Augment()


class Loader:
    """Training batches of one rank.

    The stream of images is endless and the same for every layout: see `Mixture`. A step uses the next batch_images positions,
    divided as [accumulation, world_size, micro_batch].

    Args:
        with_labels: read labels too; otherwise batches have no labels.

    Raises:
        ValueError: labels of datasets with different classes.
    """

    def __init__(
        self,
        shards: ShardSet | Mixture,
        layout: BatchLayout,
        seed: int = 0,
        augment: Augment = NO_AUGMENT,
        with_labels: bool = True,
    ) -> None:
        assert 0 <= augment.pad < shards.n_px
        self.mixture = shards if isinstance(shards, Mixture) else Mixture([shards])
        self.layout, self.seed, self.augment, self.with_labels = layout, seed, augment, with_labels
        if with_labels and any(shards.classes != self.mixture.classes for shards in self.mixture.shard_sets):
            raise InputError(f"{self.mixture.path} have different classes, so their labels cannot be mixed; name one dataset")

    def batch(self, images_seen: int, micro_step: int) -> Batch:
        """This rank's images of one micro_step of the step after images_seen images: B = micro_batch."""
        assert 0 <= micro_step < self.layout.accumulation
        positions = self.layout.positions(images_seen, micro_step, 1)
        return self._read(positions, *self.mixture.images_at(positions, self.seed))[0]

    def stream(self, images_seen: int) -> Iterator[Batch]:
        """All micro batches after images_seen images, without end. One thread prepares them in advance.

        An error in the thread is raised here, at the batch that caused it. Closing the iterator ends the thread.
        """
        return made_ahead(self._chunks(images_seen))

    def _chunks(self, images_seen: int) -> Generator[list[Batch], None, None]:
        """The micro batches in lists, because each numpy call has a fixed cost."""
        many = max(1, _ORDER_CHUNK // self.layout.micro_batch)
        images = min(_READ_IMAGES, _READ_BYTES // (2 * self.mixture.n_px**2))
        few = max(1, images // self.layout.micro_batch) * self.layout.micro_batch
        number = 0
        while True:
            positions = self.layout.positions(images_seen, number, many)
            which, ids = self.mixture.images_at(positions, self.seed)
            for start in range(0, len(ids), few):
                part = slice(start, start + few)
                try:
                    batches = self._read(positions[part], which[part], ids[part])
                except ValueError:  # read one by one, so that batches before the damaged one still arrive
                    for first in range(start, min(start + few, len(ids)), self.layout.micro_batch):
                        part = slice(first, first + self.layout.micro_batch)
                        yield self._read(positions[part], which[part], ids[part])
                else:
                    yield batches
            number += many

    def _read(self, positions: np.ndarray, which: np.ndarray, ids: np.ndarray) -> list[Batch]:
        tokens, labels = self.mixture.read(which, ids, self.with_labels)
        variants = augment(tokens, positions, self.seed, self.augment.pad, self.augment.flip)
        return to_batches(variants, labels, positions, self.layout.micro_batch)


def made_ahead(chunks: Generator[list[Batch], None, None]) -> Iterator[Batch]:
    """The batches of an endless generator of lists. The generator runs in one thread, a few lists ahead.

    An error in the thread is raised here, at its place in the order. Closing this iterator ends the thread and closes the
    generator.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as executor:
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            while True:
                while len(ahead) <= _AHEAD:
                    ahead.append(executor.submit(next, chunks))
                yield from ahead.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)
            chunks.close()


def to_batches(grids: np.ndarray, labels: np.ndarray, positions: np.ndarray, micro_batch: int) -> list[Batch]:
    """Cuts uint16 [N, n_px, n_px], labels [N], or [0] for none, and positions [N] into micro batches that share their memory."""
    tokens = torch.from_numpy(grids.reshape(len(grids), -1)).split(micro_batch)
    firsts = positions[::micro_batch].tolist()
    if not len(labels):
        none = torch.from_numpy(labels)
        return [Batch(part, none, first) for part, first in zip(tokens, firsts, strict=True)]
    return [Batch(*parts) for parts in zip(tokens, torch.from_numpy(labels).split(micro_batch), firsts, strict=True)]


def one_pass(
    n_images: int, batch: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """One pass over a split: image ids, int64 [B], and their weights, float32 [B], B = batch.

    Every rank gets the same number of batches. Weights are 1. When images run out, the last image is repeated with weight 0, so
    sum(weight * loss) / sum(weight) over all ranks is the exact mean. `limit` selects that many images, evenly spread over the
    split, because sources list one class after another.
    """
    n = n_images if limit is None else min(limit, n_images)
    assert n > 0
    for start in range(0, n, batch * world_size):
        places = start + rank * batch + np.arange(batch)
        yield np.minimum(places, n - 1) * n_images // n, torch.from_numpy((places < n).astype(np.float32))


def sequential(
    shards: ShardSet, batch: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`one_pass` over a split, without augmentation: (tokens uint16 [B, T], labels int64 [B], weight)."""
    for ids, weight in one_pass(shards.n_images, batch, rank, world_size, limit):
        tokens, labels = shards.read(ids)
        yield torch.from_numpy(tokens.reshape(batch, -1)), torch.from_numpy(labels), weight


def augment(grids: np.ndarray, positions: np.ndarray, seed: int, pad: int, flip: bool) -> np.ndarray:
    """A fresh variant of each image, uint16 [B, n_px, n_px] -> the same shape, drawn by stream position alone (paper 3.1).

    Each image is reflect-padded by `pad` on each side, cropped at a random place, and mirrored with probability one half. The
    palette maps each pixel separately, so augmenting tokens equals augmenting pixels.
    """
    if not (pad or flip):
        return grids
    n_px, size = grids.shape[-1], np.uint64(2 * pad + 1)
    top, left = ((random_words(seed, purpose, positions) % size).astype(np.int64) for purpose in (_ROW, _COLUMN))
    mirrored = (random_words(seed, _FLIP, positions) >> np.uint64(63)).astype(bool) if flip else np.zeros(len(grids), dtype=bool)
    result = np.empty_like(grids)
    for start in range(0, len(grids), _AUGMENT_CHUNK):
        part = slice(start, start + _AUGMENT_CHUNK)
        variants = result[part]
        if pad:
            windows: np.ndarray = sliding_window_view(_reflect_padded(grids[part], pad), (n_px, n_px), (1, 2))  # type: ignore[call-overload]
            variants[:] = windows[np.arange(len(windows)), top[part], left[part]]
        else:
            variants[:] = grids[part]
        if flip:  # torch mirrors rows several times faster than numpy
            turned = torch.from_numpy(variants.view(np.int16)[mirrored[part]]).flip(2)
            variants[mirrored[part]] = turned.numpy().view(np.uint16)
    return result


def _reflect_padded(grids: np.ndarray, pad: int) -> np.ndarray:
    """Reflection that does not repeat the border pixel: [B, n, n] -> [B, n + 2 pad, n + 2 pad], 0 < pad < n."""
    B, n_px, _ = grids.shape
    padded = np.empty((B, n_px + 2 * pad, n_px + 2 * pad), dtype=grids.dtype)
    inner = padded[:, pad:-pad]
    inner[:, :, pad:-pad] = grids
    inner[:, :, :pad] = grids[:, :, pad:0:-1]
    inner[:, :, -pad:] = grids[:, :, -2 : -2 - pad : -1] if pad < n_px - 1 else grids[:, :, -2::-1]
    padded[:, :pad] = padded[:, 2 * pad : pad : -1]
    padded[:, -pad:] = padded[:, -pad - 2 : -2 * pad - 2 : -1]
    return padded
