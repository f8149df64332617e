"""The interface of all sources: an iterator over entries, and a function that reads the images of entries.

In: nothing. Out: `Entry`, the protocol `Source`, and functions for folders of images. The other files of this package build on
it. `data/shards/build.py` lists entries once and passes chunks of them to worker processes, which read the images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VAL_FRACTION = 0.1  # paper 3.1: "10 % for all other datasets"; ImageNet has its own


class Entry(NamedTuple):
    """One image as a source lists it. Plain JSON: `Entry(*json.loads(json.dumps(entry))) == entry`."""

    split: str  # "train" or "test", the split of the published dataset
    key: str  # unique in its source; the same in all formats of a dataset
    label: int  # index into the classes
    place: list[Any]  # the place of its bytes, in the terms of its source


Result = bytes | np.ndarray | ValueError  # an encoded image file, uint8 [h, w, 3], or the error of this one image


class Source(Protocol):
    """Images with labels; listing and reading are separate. `open_source(source.name)` opens the source in another process."""

    name: str
    val_fraction: float  # the fraction of "train" that paper 3.1 uses for validation

    @property
    def classes(self) -> list[str]:
        """The names of the classes. The first call may have to list the source."""

    def entries(self) -> Iterator[Entry]:
        """Every image, first "train", then "test", in the same order each time. No image is decoded, and memory stays constant.

        Raises:
            ValueError: the files contradict each other or are damaged; no image is dropped silently.
        """

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """One result per entry, in order. Most efficient with about a thousand consecutive entries.

        Raises:
            ValueError: a file of many images is missing, was changed since it was listed, or cannot be read.
        """


def visible_folders(directory: Path) -> list[str]:
    """The names of the folders in a directory that are not hidden, sorted."""
    with os.scandir(directory) as found:
        return sorted(item.name for item in found if not item.name.startswith(".") and item.is_dir())


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: it is not hidden and has an image extension."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def has_images(directory: Path) -> bool:
    """Whether a directory itself holds an image. Stops at the first one."""
    with os.scandir(directory) as found:
        return any(is_image_name(item.name) and item.is_file() for item in found)


def image_names(directory: Path) -> list[str]:
    """The names of the images in a directory itself, sorted. Only names are checked."""
    with os.scandir(directory) as found:
        return sorted(item.name for item in found if is_image_name(item.name) and not item.is_dir())
