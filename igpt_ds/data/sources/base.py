"""What every source is: a list of entries that streams, and a way from entries to their images.

In: nothing. Out: `Entry`, the protocol `Source`, and what all readers of folders ask. The other files of this package build on
it; `data/shards/build.py` lists entries once, hands runs of them to worker processes, and each worker reads its own.
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

    split: str  # "train" or "test", the dataset's own division
    key: str  # unique in its source, the same in every format of one dataset
    label: int  # index into the classes
    place: list[Any]  # where its bytes lie; only the source that made it understands it


Result = bytes | np.ndarray | ValueError  # an encoded image file, or uint8 [h, w, 3], or why this one image cannot be read


class Source(Protocol):
    """Images with labels, listed apart from being read. `open_source(source.name)` opens the same one in another process."""

    name: str
    val_fraction: float  # the share of "train" that paper 3.1 keeps for validation

    @property
    def classes(self) -> list[str]:
        """The classes' names. The first call may list what the classes follow from."""

    def entries(self) -> Iterator[Entry]:
        """Every image, "train" first and then "test", in the same order each time. No image is decoded, memory stays flat.

        Raises:
            ValueError: the files contradict each other or are damaged; nothing is left out in silence.
        """

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """One result for each entry, in order. Best called with about a thousand entries that follow each other.

        Raises:
            ValueError: a file that holds many images is gone, was changed since it was listed, or cannot be read.
        """


def visible_folders(directory: Path) -> list[str]:
    """The names of the folders in a directory that are not hidden, sorted."""
    with os.scandir(directory) as found:
        return sorted(item.name for item in found if not item.name.startswith(".") and item.is_dir())


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: not hidden, and with an image's extension."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def has_images(directory: Path) -> bool:
    """Whether a directory itself holds an image; looks no further than the first."""
    with os.scandir(directory) as found:
        return any(is_image_name(item.name) and item.is_file() for item in found)


def image_names(directory: Path) -> list[str]:
    """The names of the images in a directory itself, sorted; also of what only looks like one, which reading will tell."""
    with os.scandir(directory) as found:
        return sorted(item.name for item in found if is_image_name(item.name) and not item.is_dir())
