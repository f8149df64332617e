"""Token shards: the only format in which images reach the model, read by number from memory maps.

A dataset directory holds palette.npy, index.json and the shards of its splits, train-000000.tar, ..., val-000000.tar, ...
A shard is a plain USTAR file that webdataset can read. All images have the same number of bytes (`record.py`), so image i of a
shard begins at i times that number, and no index of members is needed. `build.py` writes; the loader, feature extraction and
sampling read.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.index import AGAIN, ShardEntry, ShardIndex, joined_hash, keys_file, read_index
from igpt_ds.data.shards.mapped import MappedRecords
from igpt_ds.data.shards.record import END, checksum, numbers, record_dtype
from igpt_ds.data.shards.verify import all_damage
from igpt_ds.errors import InputError
from igpt_ds.keys import Keys
from igpt_ds.launcher import several_ranks
from igpt_ds.plain_files import check_file

_CHUNK = 1024  # images checked at once


class ImageSet(Protocol):
    """What evaluation reads: a split of shards (`ShardSet`), or images in memory (`data/given_images.GivenImages`)."""

    path: Path
    split: str
    name: str
    n_images: int
    n_px: int
    n_vocab: int
    classes: list[str]
    palette: Palette
    palette_hash: str
    dataset_hash: str

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """The token grids of some images: int64 [B] -> uint16 [B, n_px, n_px]."""

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The class indices of some images: int64 [B] -> int64 [B]; -1 for an image without a class."""

    def keys_of(self, ids: np.ndarray) -> list[str] | None:
        """The keys of some images: int64 [B] -> B strings; None if they have none."""


class DamagedImagesError(InputError):
    """Images whose bytes differ from those that were written. `ids`, int64, are the damaged ones among the requested ids."""

    def __init__(self, message: str, ids: np.ndarray) -> None:
        super().__init__(message)
        self.ids = ids

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedImagesError, (str(self), self.ids)  # pickling needs it: an exception is rebuilt from its arguments


def _check_size(file: Path, entry: ShardEntry, stride: int, found: int) -> None:
    n_images, expected = entry.n_images, entry.bytes
    if found != expected:
        check_file(file)
        raise InputError(f"shard {file} is missing or torn: {found} bytes, expected {expected}; {AGAIN}")
    if found != (need := n_images * stride + len(END)):
        raise InputError(f"shard {file} holds {found} bytes, but {n_images} images take {need}; {AGAIN}")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


class ShardSet:
    """One split of a dataset directory ("train", "val", "test", or "train+val"), read by image id 0 .. n_images - 1.

    `exclude`, sorted ids, leaves images out; later images get smaller ids. Each image is checked when it is read for the first
    time, and the size of a shard when it is opened; on a single rank also here, because train/stream.py shares that among ranks.
    Attributes: name, path, split, n_images, n_px, n_vocab, classes, palette, palette_file, palette_hash, dataset_hash; entries:
    the index's of each shard; parts: the images and the dataset_hash, before exclusions, of each split that is joined and of
    the whole.

    Raises:
        ValueError: the reasons of `read_index`; the split does not exist, a shard is truncated, or the palette has another hash.
    """

    def __init__(self, path: Path, split: str, exclude: np.ndarray | None = None) -> None:
        self._open(path, split, read_index(path))
        self._excluded = np.zeros(0, dtype=np.int64)
        if exclude is not None and len(exclude):
            self._exclude(exclude)

    def _open(self, path: Path, split: str, index: ShardIndex) -> None:
        parts = index.of(path, split)
        self.path, self.split = path, "+".join(parts)
        self.name, self.n_px, self.n_vocab, self.classes = index.name, index.n_px, index.n_vocab, index.classes
        self.palette_file = path / index.palette
        self.palette, self.palette_hash = index.load_palette(path), index.palette_hash
        self.dataset_hash = joined_hash([about.dataset_hash for about in parts.values()])
        self.entries = [shard for about in parts.values() for shard in about.shards]
        files, dtype = [path / shard.name for shard in self.entries], record_dtype(self.n_px)
        entries = dict(zip(files, self.entries, strict=True))

        def check(file: Path, size: int) -> None:
            _check_size(file, entries[file], dtype.itemsize, size)

        for file in () if several_ranks(os.environ) else files:
            check(file, _size(file))
        self._records = MappedRecords(files, [shard.n_images for shard in self.entries], dtype, check)
        self.n_images = self._records.n_records
        self._keys = [
            Keys(path / keys_file(part), about.n_images, about.keys, AGAIN) if about.keys else None
            for part, about in parts.items()
        ]
        self.parts, first = dict[str, tuple[range, str]](), 0
        for part, about in parts.items():
            self.parts[part] = range(first, first := first + about.n_images), about.dataset_hash
        self.parts[self.split] = range(self.n_images), self.dataset_hash
        self._checked: np.ndarray = np.zeros(self.n_images, dtype=bool)

    def _exclude(self, ids: np.ndarray) -> None:
        assert (np.diff(ids) > 0).all()
        assert 0 <= ids[0] <= ids[-1] < self.n_images
        if len(ids) == self.n_images:
            raise InputError(f"all {self.n_images} images of {self.split} in {self.path} are excluded")
        self._excluded = ids - np.arange(len(ids))  # the number of kept images before each excluded one
        self.n_images -= len(ids)
        digest = hashlib.sha256(self.dataset_hash.encode() + ids.astype("<i8").tobytes())
        self.dataset_hash = digest.hexdigest()

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """The token grids of some images: int64 [B] -> uint16 [B, n_px, n_px].

        Raises:
            DamagedImagesError: bytes of an image differ from those that were written.
        """
        stored = self._stored(ids)
        tokens = self._records.field("tokens", stored)
        if not self._checked[stored].all():
            self._check(ids, stored, tokens, self._labels(stored))
        return tokens

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token grids and class indices: int64 [B] -> uint16 [B, n_px, n_px], int64 [B]; raises as `tokens` does."""
        return self.tokens(ids), self._labels(self._stored(ids))

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The class indices of some images: int64 [B] -> int64 [B]; raises as `tokens` does."""
        return self.read(ids)[1]

    def all_labels(self) -> np.ndarray:
        """The class index of every image, int64 [n_images]; reads no tokens, so a damaged image is not noticed."""
        return self._labels(self._stored(np.arange(self.n_images)))

    def keys_of(self, ids: np.ndarray) -> list[str] | None:
        """The keys of some images in their source, int64 [B] -> B strings; None for shards of older versions, which have none.

        All random crops of one image have its key.

        Raises:
            ValueError: the file of the keys is missing or damaged.
        """
        parts = [part for part in self._keys if part is not None]
        if len(parts) < len(self._keys):
            return None
        first = np.cumsum([0, *map(len, parts)])
        stored = self._stored(ids)
        places = zip(first.searchsorted(stored, side="right") - 1, stored, strict=True)
        return [parts[part][int(row - first[part])] for part, row in places]

    def first_views(self) -> np.ndarray | None:
        """The id of the first view of each image: int64 [images], rising. None if each image is stored once.

        Views are the stored random crops of one training image (make_shards.py --views). They are neighbours.

        Raises:
            ValueError: images were chosen from shards with views, and the file of their keys is missing or damaged.
        """
        index = read_index(self.path)
        views = {part: index.views or 1 if part == "train" else 1 for part in self.split.split("+")}
        if max(views.values()) == 1:
            return None
        begins = []  # whether another image begins at a stored view
        for (part, every), keys in zip(views.items(), self._keys, strict=True):
            n = index.splits[part].n_images
            if index.derived is None:
                begins.append(np.arange(n) % every == 0)
            else:  # some views of some images: those of one image have its key
                texts = None if keys is None else ["", *keys]
                begins.append(np.array([texts is None or texts[i] != texts[i + 1] for i in range(n)]))
        image = np.cumsum(np.concatenate(begins))[self._stored(np.arange(self.n_images))]
        return np.flatnonzero(np.diff(image, prepend=-1))

    def one_view(self) -> ShardSet:
        """The same split with the first view of each image; itself if each image is stored once."""
        first = self.first_views()
        return self if first is None else self.take(first)

    def take(self, ids: np.ndarray) -> ShardSet:
        """The same split with these images alone: sorted ids, int64 [B], of this set. The dataset_hash names them."""
        left_out = np.ones(len(self._checked), dtype=bool)
        left_out[self._stored(ids)] = False
        return ShardSet(self.path, self.split, exclude=np.flatnonzero(left_out))

    def _stored(self, ids: np.ndarray) -> np.ndarray:
        """Ids among all images of the split, including excluded ones."""
        return ids + self._excluded.searchsorted(ids, side="right") if len(self._excluded) else ids

    def _labels(self, stored: np.ndarray) -> np.ndarray:
        return numbers(self._records.field("label", stored))

    def _check(self, ids: np.ndarray, stored: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> None:
        good = checksum(tokens, labels) == self._records.field("checksum", stored)
        self._checked[stored[good]] = True
        if not good.all():
            file, image, byte = self._records.place(int(stored[~good][0]))
            fix = f"{AGAIN}, or train without such images by train.py --on_bad skip"
            raise DamagedImagesError(f"shard {file}: image {image} at byte {byte} is damaged; {fix}", ids[~good])

    def ids_of(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """The ids of the images in some rows of a shard, int64 [B] -> int64 [at most B], without those that are excluded."""
        stored = self._records.first(shard) + rows
        left_out = self._excluded + np.arange(len(self._excluded))
        stored = np.setdiff1d(stored, left_out)
        return stored - left_out.searchsorted(stored)

    def trust(self, shard: int) -> None:
        """Notes that all images of a shard are those that were written, so that reading them checks nothing more."""
        first = self._records.first(shard)
        self._checked[first : first + self.entries[shard].n_images] = True

    def verify(self) -> None:
        """Reads every shard of the split once and compares it with the index.

        Raises:
            ValueError: a shard is damaged; the first damaged bytes are named.
        """
        checks = all_damage(self.path, self.entries, self.n_px)
        with closing(checks):
            for _, found in tqdm(checks, f"verify {self.split}", len(self.entries), unit=" shards", leave=False, disable=None):
                if found:
                    raise InputError(str(found[0]))
        self._checked[:] = True

    def damaged_ids(self) -> np.ndarray:
        """Reads all images. Returns the sorted ids, int64, of those whose tokens or label are damaged."""
        bad = []
        for start in range(0, self.n_images, _CHUNK):
            try:
                self.tokens(np.arange(start, min(start + _CHUNK, self.n_images)))
            except DamagedImagesError as error:
                bad.append(error.ids)
        return np.concatenate([np.zeros(0, dtype=np.int64), *bad])
