"""The fallback if shards cannot be mapped into memory: webdataset reads them in sequence.

In: a dataset directory's index.json, and a URL for each shard: a path, https://..., or pipe:COMMAND. Out: batches like those of a
Loader. train.py calls if `--stream` is given. LIMITS lists what a Loader guarantees and a stream does not.
"""

from __future__ import annotations

import hashlib
import signal
import tarfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.counter_random import random_words
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.loader import NO_AUGMENT, Augment, Batch, BatchLayout, augment, made_ahead, to_batches
from igpt_ds.data.order import shuffled
from igpt_ds.data.shards.index import ShardEntry, joined_hash, read_index
from igpt_ds.errors import InputError
from igpt_ds.npy import parse_npy

LIMITS = (
    "--stream reads shards in sequence. Limits: images are drawn from a buffer, not from the whole set; if ranks have unequal "
    "numbers of images, their epochs drift apart; --resume continues at the beginning of a shard, not at the exact image; order "
    "depends on the number of ranks; a damaged image is noticed at the end of its shard, whose sha256 then differs."
)
BUFFER_IMAGES = 8192  # the next image is drawn from a buffer of this size
_BUFFER = 6  # purpose of random words
_HANDFUL = 1024  # images drawn at once

Image = tuple[np.ndarray, int]  # uint16 [n_px, n_px], label


class _Hashed:
    """A stream that hashes what is read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.close, self.digest = stream, stream.close, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(size)
        self.digest.update(block)
        return block


class ShardStream:
    """A split of a dataset directory whose training shards are stored elsewhere; "train+val" has the shards of both.

    Args:
        path: directory of index.json and palette.npy.
        url: where webdataset reads a shard; {shard} is replaced by the shard's name.

    Attributes: path, url, split, shards, n_images, n_originals (the stored views of an image counted once), n_px, n_vocab,
    palette_file, palette_hash, dataset_hash.

    Raises:
        ValueError: the URL has no {shard}, the index or the split is missing, or the palette has another hash.
    """

    def __init__(self, path: Path, url: str, split: str = "train") -> None:
        if "{shard}" not in url:
            raise InputError(f"--stream {url} has no place for the name of a shard; write {{shard}} there")
        index = read_index(path)
        parts = index.of(path, split)
        self.path, self.url, self.split, self.palette_file = path, url, "+".join(parts), path / index.palette
        self.shards: list[ShardEntry] = [shard for about in parts.values() for shard in about.shards]
        self.n_images = sum(shard.n_images for shard in self.shards)
        views = index.views or 1 if index.derived is None else 1
        self.n_originals = sum(about.n_images // (views if part == "train" else 1) for part, about in parts.items())
        self.n_px, self.n_vocab = index.n_px, index.n_vocab
        self.palette_hash = index.load_palette(path, "copy theirs").hash
        self.dataset_hash = joined_hash([about.dataset_hash for about in parts.values()])

    def facts(self) -> DataFacts:
        """What identifies the training data."""
        return DataFacts(str(self.path), self.dataset_hash, self.palette_hash, "stream", stream=self.url, split=self.split)

    def read(self, number: int) -> Generator[Image, None, None]:
        """The images of one shard, in its order.

        Raises:
            ValueError: the stream breaks, or its images do not match the index.
        """
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        about = self.shards[number]
        url, expected = self.url.replace("{shard}", about.name), about.n_images
        found, name, stream = 0, -1, None
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            try:
                stream = _Hashed(
                    gopen(url)
                )  # its command inherits the mask: a stop of the run, which also saves, must not end it
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                name = self._name(sample["__key__"], {"npy", "cls"} <= set(sample), name)
                found += 1
                if found <= expected:
                    yield self._decode(name, sample["npy"], sample["cls"])
            while stream.read(1 << 20):  # a command that still writes would fail on a closed pipe
                pass
            stream.close()
            if found == expected and stream.digest.hexdigest() != about.sha256:
                raise InputError("its sha256 is not that of the index")
        except (OSError, EOFError, tarfile.TarError, ValueError) as error:
            fix = "check the URL, and the shard with tools/verify_shards.py"
            reason = next((part for part in error.args if isinstance(part, str)), type(error).__name__)
            raise InputError(f"stream {url} broke after {found} of {expected} images ({reason}); {fix}") from None
        finally:
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if found != expected:
            fix = "the transfer was cut or the shard is damaged: check it with tools/verify_shards.py"
            raise InputError(f"stream {url} gave {found} images where the index says {expected}; {fix}")

    def _name(self, key: str, whole: bool, before: int) -> int:
        """The number that names an image. webdataset skips members that it does not understand, so names must increase."""
        if not key.isdecimal() or int(key) <= before or not whole:
            raise InputError(f"image {key} should not come after {before}, or is not whole")
        return int(key)

    def _decode(self, name: int, npy: bytes, label: bytes) -> Image:
        grid = parse_npy(npy, f"image {name:09d}", "make the shard again")
        if grid.dtype != np.uint16 or grid.shape != (self.n_px, self.n_px) or grid.max() >= self.n_vocab:
            raise InputError(f"image {name:09d} is not {self.n_px}x{self.n_px} tokens below {self.n_vocab}")
        return grid, int(label)


class StreamLoader:
    """Training batches of one rank from a stream of shards.

    In each epoch (seed, epoch) permutes the shards, and ranks take them in turn. A seeded buffer shuffles their images. Batches
    are a function of (seed, images_seen, rank, world_size).

    Raises:
        ValueError: fewer shards than ranks.
    """

    def __init__(
        self,
        shards: ShardStream,
        layout: BatchLayout,
        seed: int = 0,
        augment: Augment = NO_AUGMENT,
        with_labels: bool = True,
        buffer_images: int = BUFFER_IMAGES,
    ) -> None:
        self.shards, self.layout, self.seed, self.augment, self.with_labels = shards, layout, seed, augment, with_labels
        self.buffer_images = max(1, min(buffer_images, shards.n_images // layout.world_size))
        if len(shards.shards) < layout.world_size:
            has = f"{shards.path} has {len(shards.shards)} training shards to stream and this run has {layout.world_size} ranks"
            raise InputError(f"{has}; start fewer ranks, or make the shards again with a smaller --images_per_shard")

    def stream(self, images_seen: int) -> Iterator[Batch]:
        """All further micro batches, without end, from the beginning of a shard. One thread prepares them in advance.

        Raises:
            ValueError: a shard does not match the index; the URL and both counts are named.
        """
        return made_ahead(self._chunks(images_seen))

    def _chunks(self, images_seen: int) -> Generator[list[Batch], None, None]:
        few = max(1, _HANDFUL // self.layout.micro_batch)
        images = self._shuffled(images_seen)
        number = 0
        try:
            while True:
                drawn = [next(images) for _ in range(few * self.layout.micro_batch)]
                positions = self.layout.positions(images_seen, number, few)
                grids = augment(np.stack([grid for grid, _ in drawn]), positions, self.seed, self.augment.pad, self.augment.flip)
                labels = np.array([label for _, label in drawn] if self.with_labels else [], dtype=np.int64)
                yield to_batches(grids, labels, positions, self.layout.micro_batch)
                number += few
        finally:
            images.close()

    def _shuffled(self, images_seen: int) -> Generator[Image, None, None]:
        """Images in random order: each is drawn from a buffer of buffer_images, and the next image of the shards replaces it."""
        images = self._images(images_seen)
        try:
            buffer = [next(images) for _ in range(self.buffer_images)]
            drawn = 0
            while True:
                counter = self.layout.rank + self.layout.world_size * np.arange(drawn, drawn + _HANDFUL)
                words = random_words(self.seed, _BUFFER, np.array([images_seen]), counter)
                for place in (words % np.uint64(self.buffer_images)).tolist():
                    yield buffer[place]
                    buffer[place] = next(images)
                drawn += _HANDFUL
        finally:
            images.close()

    def _images(self, images_seen: int) -> Generator[Image, None, None]:
        """The images of this rank's shards, epoch after epoch, from the shard reached after images_seen images of all ranks."""
        left, epoch = images_seen // self.layout.world_size, 0
        while True:
            for number in self.shards_of(epoch):
                n_images = self.shards.shards[number].n_images
                if left >= n_images:
                    left -= n_images
                    continue
                left = 0
                yield from self.shards.read(number)
            epoch += 1

    def shards_of(self, epoch: int) -> list[int]:
        """The numbers of the shards that this rank reads in an epoch, in order."""
        n = len(self.shards.shards)
        return shuffled(epoch * n + np.arange(n), n, self.seed)[self.layout.rank :: self.layout.world_size].tolist()
