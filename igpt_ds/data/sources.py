"""Where raw images come from: a source named by one word yields (key, image, label) in a fixed order.

In: `digits:` or `imagefolder:DIR`. Out: records with uint8 [h, w, 3] images. `tools/fit_palette.py` and
`data/shards.py` read them. A further kind of source is a class here and a line in `open_source`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from igpt_ds.data.images import read_image

Record = tuple[str, np.ndarray, int]  # key, unique in its source; image, uint8 [h, w, 3]; index into the classes

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
DEFAULT_MAX_BAD = 0.001  # one unreadable image in a thousand is a blemish, more is a broken copy
_NAMED = 5  # unreadable images that are named one by one


class Source(Protocol):
    """Images with labels. Iterating twice gives the same records; an unreadable image is named in `skipped` and left out."""

    name: str
    classes: list[str]
    skipped: list[str]  # files left out by the latest iteration

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Record]: ...


def open_source(spec: str, max_bad_fraction: float = DEFAULT_MAX_BAD) -> Source:
    """Opens `digits:` or `imagefolder:DIR`.

    Raises:
        ValueError: an unknown kind, or a directory without images; later, from the iteration, when more than
            max_bad_fraction of all images are unreadable.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad={max_bad_fraction} must lie between 0 and 1")
    kind, colon, rest = spec.partition(":")
    if colon and kind == "digits" and not rest:
        return Digits()
    if colon and kind == "imagefolder" and rest:
        return ImageFolder(Path(rest), max_bad_fraction)
    raise ValueError(f"source {spec!r} is unknown; known: 'digits:' and 'imagefolder:DIR'")


class Digits:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8, 17 grey levels, ten classes."""

    def __init__(self) -> None:
        self.name = "digits:"
        self.classes = [str(digit) for digit in range(10)]
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return 1797

    def __iter__(self) -> Iterator[Record]:
        from sklearn.datasets import load_digits  # lazily: only this source needs it

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        for index, (image, label) in enumerate(zip(grey, digits.target, strict=True)):
            yield f"{label}/{index:04d}", np.repeat(image[..., None], 3, axis=-1), int(label)


class ImageFolder:
    """DIR/<class>/<image file>: one folder a class. Classes and files are ordered by name; hidden ones are left out."""

    def __init__(self, directory: Path, max_bad_fraction: float = DEFAULT_MAX_BAD) -> None:
        self.name = f"imagefolder:{directory}"
        self.skipped: list[str] = []
        self._directory = directory
        self._max_bad_fraction = max_bad_fraction
        if not directory.is_dir():
            raise ValueError(f"source directory {directory} does not exist; expected {directory}/<class>/<image>.jpg")
        found = {entry: _image_files(directory / entry) for entry in _visible(directory) if (directory / entry).is_dir()}
        self._files = {name: files for name, files in found.items() if files}
        if not self._files:
            raise ValueError(f"source directory {directory} holds no images; expected {directory}/<class>/<image>.jpg")
        self.classes = list(self._files)

    def __len__(self) -> int:
        return sum(map(len, self._files.values()))

    def __iter__(self) -> Iterator[Record]:
        self.skipped = []
        for label, (name, files) in enumerate(self._files.items()):
            for file in files:
                try:
                    image = read_image(self._directory / name / file)
                except ValueError as error:
                    self._skip(f"{name}/{file}", error)
                else:
                    yield f"{name}/{file}", image, label

    def _skip(self, key: str, error: ValueError) -> None:
        self.skipped.append(key)
        if len(self.skipped) <= _NAMED:
            print(f"skipped: {error}", file=sys.stderr)
        if len(self.skipped) > self._max_bad_fraction * len(self):
            allowed = f"more than the {self._max_bad_fraction:g} of {len(self)} images that may be unreadable"
            fix = "repair the files or raise --max_bad"
            raise ValueError(f"{self._directory}: {len(self.skipped)} unreadable, {allowed} (latest: {error}); {fix}")


def _visible(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))


def _image_files(directory: Path) -> list[str]:
    return [name for name in _visible(directory) if name.lower().endswith(EXTENSIONS)]
