"""The training images as one endless stream: one dataset, or several mixed by weight. Damaged images stop it or are skipped.

In: ShardSets, weights, exclusion lists. Out: tokens and labels of stream positions. Called by `data/loader.py`,
`train/stream.py`, train.py and finetune.py. The stream depends on (seed, position) alone; memory does not grow with the
number of images, except for 8 bytes an image that is stored in several views.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt_ds.data.exclusion import read_exclusion
from igpt_ds.data.facts import DataFacts, DatasetFacts
from igpt_ds.data.order import MAX_IMAGES, ONE_VIEW_ORDER, ORDER_VERSION, mixed, one_view, shares_of
from igpt_ds.data.shards.dataset import DamagedImagesError, ShardSet
from igpt_ds.data.shards.index import parts_of, read_index
from igpt_ds.errors import InputError

ON_BAD = ("stop", "skip")
MAX_BAD = 0.001


class Mixture:
    """Datasets for one training, each in its own shuffled order, in constant proportions.

    Attributes: shard_sets; shares, the positions of each dataset in a block of order.BLOCK; n_images, the sum over datasets;
    n_originals, the same with the stored views of an image counted once: an epoch is as many images;
    path, all paths joined; palette_file; n_px, n_vocab, classes, palette_hash; dataset_hash: that of the only dataset, or a hash
    of all dataset hashes and shares in order.

    Args:
        weights: one number above 0 per dataset. The paper trains XL on "a mixture of ImageNet and web images" and gives no
            weights. The default is in proportion to the numbers of stored images: each is seen equally often. An image with 8
            stored views is therefore seen 8 times as often as one that is stored once.
        on_bad: "stop" raises DamagedImagesError; "skip" uses the next intact image instead (after the last image, the first). The
            replacement depends on the image id alone, so it is the same on every rank. Each damaged image is named once on
            stderr.
        max_bad: the fraction of a dataset's images that may be skipped.
        one_view: an epoch of the only dataset has one view of each image, as `order.one_view` says; False: all stored views.

    Raises:
        ValueError: the datasets differ in n_px or palette, the weights do not match the datasets, or a dataset has more than
            order.MAX_IMAGES images.
    """

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        weights: Sequence[float] | None = None,
        on_bad: str = "stop",
        max_bad: float = MAX_BAD,
        one_view: bool = False,
    ) -> None:
        assert shard_sets
        assert not one_view or len(shard_sets) == 1
        assert on_bad in ON_BAD
        self.shard_sets, self.on_bad, self.max_bad = list(shard_sets), on_bad, max_bad
        first = self.shard_sets[0]
        for other in self.shard_sets:
            for name in ("n_px", "palette_hash"):
                one, two = getattr(first, name), getattr(other, name)
                if one != two:
                    fix = "make the shards again with the same --n_px and --palette"
                    raise InputError(f"{first.path} has {name} {one} and {other.path} {two}; to train on both, {fix}")
            if other.n_images > MAX_IMAGES:
                raise InputError(f"{other.path} has {other.n_images} images; more than {MAX_IMAGES} need several datasets")
        if weights is not None and len(weights) != len(self.shard_sets):
            raise InputError(f"--data_weights has {len(weights)} numbers for {len(self.shard_sets)} datasets; give one for each")
        self._sizes = [shards.n_images for shards in self.shard_sets]
        self.shares = shares_of(list(weights) if weights is not None else [float(size) for size in self._sizes])
        self.n_images = sum(self._sizes)
        first_views = [shards.first_views() for shards in self.shard_sets]
        self.n_originals = sum(
            size if views is None else len(views) for size, views in zip(self._sizes, first_views, strict=True)
        )
        self._first_views = first_views[0] if one_view else None
        self.n_px, self.n_vocab, self.palette_hash = first.n_px, first.n_vocab, first.palette_hash
        self.classes, self.palette_file = first.classes, first.palette_file
        self.path = " + ".join(str(shards.path) for shards in self.shard_sets)
        self.dataset_hash = first.dataset_hash
        if len(self.shard_sets) > 1:
            lines = [f"{shards.dataset_hash} {share}" for shards, share in zip(self.shard_sets, self.shares, strict=True)]
            self.dataset_hash = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        none: np.ndarray = np.empty(0, dtype=np.int64)
        self._bad = [none for _ in self.shard_sets]  # sorted ids of damaged images
        self._good = [none for _ in self.shard_sets]  # ids of their replacements

    def facts(self) -> DataFacts:
        """What identifies the training data."""
        parts = tuple(
            DatasetFacts(str(shards.path), shards.dataset_hash, shards.n_images, share)
            for shards, share in zip(self.shard_sets, self.shares, strict=True)
        )
        order = ORDER_VERSION if self._first_views is None else ONE_VIEW_ORDER
        split = self.shard_sets[0].split
        return DataFacts(self.path, self.dataset_hash, self.palette_hash, order, datasets=parts, split=split)

    def images_at(self, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The images at some positions of the stream: int64 [B] -> number of the dataset [B], image ids in it [B]."""
        if self._first_views is not None:
            return np.zeros_like(positions), one_view(positions, self._first_views, self.n_images, seed)
        return mixed(positions, self.shares, self._sizes, seed)

    def read(self, which: np.ndarray, ids: np.ndarray, with_labels: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens uint16 [B, n_px, n_px] and labels int64 [B] of images as `images_at` gives them. Labels are [0] without
        with_labels.

        Raises:
            DamagedImagesError: with on_bad "stop".
            ValueError: with on_bad "skip", more than max_bad of a dataset's images are damaged.
        """
        if len(self.shard_sets) == 1:
            return self._read(0, ids, with_labels)
        tokens = np.empty((len(ids), self.n_px, self.n_px), dtype=np.uint16)
        labels = np.empty(len(ids) if with_labels else 0, dtype=np.int64)
        for k in range(len(self.shard_sets)):
            places = np.flatnonzero(which == k)
            tokens[places], found = self._read(k, ids[places], with_labels)
            if with_labels:
                labels[places] = found
        return tokens, labels

    def _read(self, k: int, ids: np.ndarray, with_labels: bool) -> tuple[np.ndarray, np.ndarray]:
        shards = self.shard_sets[k]
        while True:
            if len(self._bad[k]):
                place = np.minimum(self._bad[k].searchsorted(ids), len(self._bad[k]) - 1)
                ids = np.where(self._bad[k][place] == ids, self._good[k][place], ids)
            try:
                return shards.read(ids) if with_labels else (shards.tokens(ids), np.empty(0, dtype=np.int64))
            except DamagedImagesError as error:
                if self.on_bad == "stop":
                    raise
                self._note(k, error.ids)

    def _note(self, k: int, damaged: np.ndarray, aloud: bool = True) -> None:
        """Records damaged images, names the new ones, and refuses too many."""
        shards = self.shard_sets[k]
        new = np.setdiff1d(damaged, self._bad[k])
        bad = np.union1d(damaged, self._bad[k])
        allowed = min(int(self.max_bad * shards.n_images), shards.n_images - 1)
        if len(bad) > allowed:
            raise InputError(
                f"{len(bad)} of {shards.n_images} images of {shards.path} ({shards.split}) are damaged, image {bad[0]} among "
                f"them; --max_bad {self.max_bad:g} allows {allowed}: see tools/verify_shards.py, make the shards again"
            )
        ends = np.flatnonzero(np.diff(bad, append=-1) != 1)  # of runs of damaged images
        good = bad[ends[ends.searchsorted(np.arange(len(bad)))]] + 1
        good[good == shards.n_images] = good[0] if bad[0] == 0 else 0
        self._bad[k], self._good[k] = bad, good
        for place in bad.searchsorted(new) if aloud else ():
            line = f"image {bad[place]} of {shards.path} ({shards.split}) is damaged; image {good[place]} is used instead"
            print(line, file=sys.stderr, flush=True)

    @property
    def n_skipped(self) -> int:
        """The number of damaged images found so far."""
        return sum(len(bad) for bad in self._bad)

    def skip(self, damaged: Sequence[np.ndarray], aloud: bool = True) -> None:
        """Records damaged images before training reads them: sorted ids for each dataset.

        `aloud` names them on stderr.

        Raises:
            ValueError: more than max_bad of a dataset's images are damaged.
        """
        for k, ids in enumerate(damaged):
            if len(ids):
                self._note(k, ids, aloud)


def open_mixture(
    paths: Sequence[Path],
    weights: Sequence[float] | None = None,
    exclusions: Sequence[Path] = (),
    on_bad: str = "stop",
    max_bad: float = MAX_BAD,
    split: str = "train",
    one_view: bool = False,
) -> Mixture:
    """Opens a split of dataset directories, without the images that exclusion lists name; the rest as `Mixture`.

    Args:
        split: may be "train+val". Only the first dataset must have both.

    Raises:
        ValueError: the reasons of ShardSet and Mixture; an exclusion list matches none of the datasets, or a dataset is named
            twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"--data {' '.join(map(str, paths))} names a dataset twice; give it a larger weight instead")
    shard_sets = [ShardSet(path, split if path == paths[0] else _present(path, split)) for path in paths]
    excluded: dict[int, np.ndarray] = {}
    for file in exclusions:
        k, ids = _matching(file, shard_sets)
        excluded[k] = np.union1d(excluded[k], ids) if k in excluded else ids
    for k, ids in excluded.items():
        shard_sets[k] = ShardSet(paths[k], shard_sets[k].split, exclude=ids)
    return Mixture(shard_sets, weights, on_bad, max_bad, one_view)


def _present(path: Path, split: str) -> str:
    """The parts of "train+val" that a further dataset has: one without validation images has nothing to fold back."""
    present = [part for part in parts_of(split) if part in read_index(path).splits]
    return "+".join(present) or split


def _matching(file: Path, shard_sets: list[ShardSet]) -> tuple[int, np.ndarray]:
    """The number of the dataset that an exclusion list belongs to, and the ids."""
    refusals = []
    for k, shards in enumerate(shard_sets):
        try:
            return k, read_exclusion(file, shards)
        except InputError as error:
            refusals.append(str(error))
    raise InputError("; ".join(dict.fromkeys(refusals)))
