"""Images that a user names: files and folders become tokens in memory, with keys and, where folders are classes, labels.

In: paths, a palette, n_px. Out: `GivenImages`, which evaluation reads like a split of shards (`shards/dataset.ImageSet`). The
tools with --images and the Python API call it. Training reads shards alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from igpt_ds.data.images import DEFAULT_FILTER, decode_image, square
from igpt_ds.data.left_out import UNREADABLE, LeftOut, Tally, print_left_out, reason_of
from igpt_ds.data.palette import Palette
from igpt_ds.data.sources.base import Entry, split_word, walk_images
from igpt_ds.data.sources.places import read_places
from igpt_ds.errors import InputError

NO_LABEL = -1
_CHUNK = 256  # images whose pixels are in memory at once


class GivenImages:
    """Images in memory, read by number 0 .. n_images - 1 like a ShardSet.

    Attributes:
        keys: a name for each image, such as its path.
        left_out: what folders hold besides images that can be read, by ending and reason.
        labelled: whether any image has a class.
        name, path, split, n_images, n_px, n_vocab, classes, palette, palette_hash, dataset_hash: as in ShardSet.
    """

    split = "images"

    def __init__(
        self,
        tokens: np.ndarray,
        palette: Palette,
        keys: Sequence[str],
        class_names: Sequence[str | None] | None = None,
        *,
        path: Path = Path("images"),
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        """tokens: uint16 [N, n_px, n_px]. class_names: the class of each image, None where it has none."""
        assert tokens.dtype == np.uint16
        assert len(tokens) == len(keys) > 0
        self._tokens, self._class_names = tokens, list(class_names or [None] * len(keys))
        self.keys, self.left_out, self.path, self.name = list(keys), list(left_out), path, path.name or "images"
        self.palette, self.palette_hash, self.n_vocab = palette, palette.hash, len(palette)
        self.n_images, self.n_px = tokens.shape[:2]
        self.classes = sorted({name for name in self._class_names if name is not None})
        self.labelled = bool(self.classes)
        lines = [palette.hash, str(self.n_px), *self.keys, *map(str, self._class_names)]
        start = "\n".join(lines).encode("utf-8", "surrogateescape")
        self.dataset_hash = hashlib.sha256(start + tokens.astype("<u2").tobytes()).hexdigest()

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """The token grids of some images: int64 [B] -> uint16 [B, n_px, n_px]."""
        return self._tokens[ids]

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The class indices of some images: int64 [B] -> int64 [B]; -1 for an image without a class."""
        return self.labels_among(self.classes)[ids]

    def keys_of(self, ids: np.ndarray) -> list[str]:
        """The keys of some images: int64 [B] -> B strings."""
        return [self.keys[number] for number in ids]

    def labels_among(self, classes: Sequence[str]) -> np.ndarray:
        """The indices of all images' classes among others, such as those of a model: int64 [N]; -1 where there is none."""
        numbers = {name: number for number, name in enumerate(classes)}
        found = [NO_LABEL if name is None else numbers.get(name, NO_LABEL) for name in self._class_names]
        return np.array(found, dtype=np.int64)

    def print_left_out(self) -> None:
        """Prints one line on stderr for each ending and reason, with the first names."""
        print_left_out(self.left_out, sys.stderr)


class _Named(NamedTuple):
    """An image file: its path, its class or None, and whether the user named the file itself."""

    path: str
    class_name: str | None
    by_user: bool


def read_images(
    paths: Sequence[Path], palette: Palette, n_px: int, *, crop: str = "none", resize_filter: str = DEFAULT_FILTER
) -> GivenImages:
    """Reads image files, and all images in folders at any depth, cropped and resized as by `images.square`.

    The order is that of the paths; in a folder first its images, then its subfolders, each sorted by name. A file that the user
    names must be an image. In a folder, other files are left out and counted.

    The first folder below a named one is an image's class. Folders named like splits (train, val, test) above it are passed over.
    If several paths are named, a folder without subfolders is a class itself. All other images have no class.

    Raises:
        ValueError: a path does not exist, a named file is not an image, a named folder holds no image that can be read.
    """
    tally = Tally()
    files = [file for path in paths for file in _files(path, tally, among_others=len(paths) > 1)]
    kept: list[_Named] = []
    parts = []
    bar = tqdm(_pixels(files, n_px, crop, resize_filter, tally), "read images", len(files), leave=False, disable=None)
    pixels = ((file, image) for file, image in bar if image is not None)
    while chunk := list(islice(pixels, _CHUNK)):
        kept += [file for file, _ in chunk]
        parts.append(palette.encode(np.stack([image for _, image in chunk])))
    _refuse_nothing(paths, [file.path for file in kept], tally)
    path = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.absolute() for path in paths]))
    keys, class_names = [file.path for file in kept], [file.class_name for file in kept]
    return GivenImages(np.concatenate(parts), palette, keys, class_names, path=path, left_out=tally.rows())


def _files(path: Path, tally: Tally, among_others: bool) -> Iterator[_Named]:
    """The files of one path that the user named."""
    if not path.is_dir():
        yield _Named(str(path), None, by_user=True)
        return
    below = list(walk_images(path, "", tally))
    folders = [name.split("/")[:-1] for name in below]
    if folders and all(len(parts) > 1 and split_word(parts[0]) for parts in folders):
        folders = [parts[1:] for parts in folders]
    own = path.resolve().name if among_others and not any(folders) else None
    for name, parts in zip(below, folders, strict=True):
        yield _Named(str(path / name), parts[0] if parts else own, by_user=False)


def _pixels(
    files: Iterable[_Named], n_px: int, crop: str, resize_filter: str, tally: Tally
) -> Iterator[tuple[_Named, np.ndarray | None]]:
    """Each file and its pixels, uint8 [n_px, n_px, 3], or None if it is left out."""
    for file in files:
        try:
            (data,) = read_places(Path(), [Entry("", file.path, 0, [file.path])])
            if isinstance(data, ValueError):
                raise data
            image = square(decode_image(data, file.path), n_px, crop=crop, resize_filter=resize_filter)
        except InputError as error:
            if file.by_user:
                fix = "leave it out, or name its folder, where other files are left out"
                raise InputError(f"{error}; {fix}" if reason_of(error) != UNREADABLE else str(error)) from None
            tally.add(file.path, reason_of(error))
            yield file, None
        else:
            yield file, image


def _refuse_nothing(paths: Sequence[Path], kept: Sequence[str], tally: Tally) -> None:
    """Refuses a folder without an image that can be read."""
    for path in paths:
        if path.is_dir() and not any(Path(name).is_relative_to(path) for name in kept):
            rows = tally.rows()
            what = f"; left out: {'; '.join(map(str, rows[:3]))}" if rows else ""
            raise InputError(f"{path} holds no image that can be read{what}; name a folder with images")
