"""Opens what the tools wrote: `open_features` a feature directory, `open_shards` a shard directory. Out: numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from igpt_ds.api.arguments import directory_path
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features import files
from igpt_ds.evaluate.features.manifest import read_feature_manifest, span

PathLike = str | os.PathLike[str]


def _choose(split: str | None, splits: Sequence[str]) -> str:
    """ "train", or the first split of a directory without it."""
    if not isinstance(split, str | None):
        raise InputError(f"split={split!r} must be the name of a split: {', '.join(splits)}")
    return split or ("train" if "train" in splits else splits[0])


class Features:
    """One split of a feature directory.

    Attributes:
        labels: class indices, int64 [N].
        classes: the names of the classes.
        keys: the names of the images, N strings, read when they are wanted; None in a directory of an earlier version.
        layers, kinds: what there is; kinds are "normed" and "raw", or "pixels".
        split, splits: this split, and all of the directory.
    """

    def __init__(self, path: Path, split: str, splits: Sequence[str]) -> None:
        self._set = files.open_features(path, split)
        self.path, self.split, self.splits = path, self._set.split, list(splits)
        self.labels, self.classes = self._set.labels, list(self._set.classes)
        self.layers, self.kinds = list(self._set.layers), list(self._set.kinds)
        self.keys: Sequence[str] | None = self._set.keys

    def layer(self, layer: int, kind: str | None = None, mask: int = 0) -> np.ndarray:
        """The features of one layer: a read-only memory map [N, C], float32 or float16 as on disk.

        If no file holds the split "train+val" itself, it is an array in memory.

        Args:
            kind: None takes "normed", or the only kind of the directory.
            mask: the number of the mask, if images were seen through masks.

        Raises:
            InputError: no such layer, kind or mask, or its file is damaged.
        """
        found = self._set.layer(layer, kind or ("normed" if "normed" in self.kinds else self.kinds[0]), mask)
        return found if isinstance(found, np.ndarray) else np.asarray(found)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        manifest = self._set.manifest
        what = f"{len(self)} images x {manifest.n_features} features, layers {span(self.layers)}, {' and '.join(self.kinds)}"
        return f"<igpt_ds.Features {self.path}: split {self.split!r} of {', '.join(self.splits)}; {what}>"


def open_features(path: PathLike, split: str | None = None) -> Features:
    """Opens a feature directory of tools/extract_features.py.

    Args:
        split: such as "val", or "train+val" for both together; None takes "train", or the first split of a directory without it.

    Raises:
        InputError: it is no feature directory, it has no such split, or it is damaged.
    """
    directory = directory_path(path)
    splits = list(read_feature_manifest(directory).splits)
    return Features(directory, _choose(split, splits), splits)


class ShardImages(NamedTuple):
    """One image of shards: tokens int64 [T], label, key; or several: [n, T], int64 [n], n keys."""

    tokens: np.ndarray
    label: int | np.ndarray
    key: str | list[str]


class Shards:
    """One split of a shard directory: `len`, `shards[3]`, `shards[:8]`. It serves as a torch Dataset.

    Attributes:
        labels: class indices, int64 [N].
        classes: the names of the classes.
        palette: float32 [V, 3] in [-1, 1].
        name, n_px, split, splits: the data set's name, the side of its images, this split, and all of the directory.
    """

    def __init__(self, path: Path, split: str, splits: Sequence[str]) -> None:
        self._set = ShardSet(path, split)
        self.path, self.split, self.splits = path, self._set.split, list(splits)
        self.name, self.n_px, self.classes = self._set.name, self._set.n_px, list(self._set.classes)

    @property
    def palette(self) -> np.ndarray:
        """The colours, float32 [V, 3] in [-1, 1]."""
        return self._palette.colors

    @property
    def _palette(self) -> Palette:
        return self._set.palette

    @property
    def labels(self) -> np.ndarray:
        """The class indices of all images, int64 [N]."""
        return self._set.labels(np.arange(len(self)))

    def tokens(self) -> np.ndarray:
        """The tokens of all images, int64 [N, T]."""
        return self[:].tokens

    def pixels(self) -> np.ndarray:
        """All images in the colours of the palette, uint8 [N, n_px, n_px, 3]."""
        return self._palette.decode(self._set.tokens(np.arange(len(self))))

    def check_fits(self, palette_hash: str, n_px: int) -> None:
        """Refuses shards that a model with this palette and size cannot read."""
        if (self._set.palette_hash, self.n_px) != (palette_hash, n_px):
            here = f"{self.n_px}x{self.n_px}, palette {self._set.palette_hash[:8]}"
            raise InputError(
                f"{self.path} ({here}) does not fit the model ({n_px}x{n_px}, palette {palette_hash[:8]}); "
                "make the shards with the model's palette.npy"
            )

    def __len__(self) -> int:
        return self._set.n_images

    def __reduce__(self) -> tuple[type[Shards], tuple[Path, str, Sequence[str]]]:
        return Shards, (self.path, self.split, self.splits)  # another process maps the files itself

    def __getitem__(self, index: int | slice | np.ndarray) -> ShardImages:
        ids = np.arange(len(self))[index]  # an IndexError ends loops over the images
        tokens, labels = self._set.read(np.atleast_1d(ids))
        flat = tokens.reshape(len(tokens), self.n_px**2).astype(np.int64)
        keys = self._set.keys_of(np.atleast_1d(ids)) or [f"{number:09d}" for number in np.atleast_1d(ids)]
        return ShardImages(flat, labels, keys) if ids.ndim else ShardImages(flat[0], int(labels[0]), keys[0])

    def __repr__(self) -> str:
        what = f"{len(self)} images of {self.n_px}x{self.n_px}, {len(self.palette)} colours, {len(self.classes)} classes"
        return f"<igpt_ds.Shards {self.path}: {self.name!r} split {self.split!r} of {', '.join(self.splits)}; {what}>"


def open_shards(path: PathLike, split: str | None = None) -> Shards:
    """Opens a shard directory of tools/make_shards.py.

    Args:
        split: "train", "val", "test" or "train+val"; None takes "train", or the first split of a directory without it.

    Raises:
        InputError: it is no shard directory, it has no such split, or a shard is torn.
    """
    directory = directory_path(path)
    splits = list(read_index(directory).splits)
    return Shards(directory, _choose(split, splits), splits)
