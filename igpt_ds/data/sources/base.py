"""The interface of all sources: an iterator over entries, and a function that reads the images of entries.

In: nothing. Out: `Entry`, the protocol `Source`, and functions for folders of images. The other files of this package build on
it. `data/shards/build.py` lists entries once and passes chunks of them to worker processes, which read the images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from igpt_ds.data.left_out import ABOVE, DANGLING, HIDDEN, SPECIAL, Tally, ending_of, why_not

VAL_FRACTION = 0.1  # paper 3.1: "10 % for all other datasets"; ImageNet has its own
UNLABELLED = ["unlabelled"]  # the classes of a source without labels
LABELS = ("use", "ignore")
_FOLDER, _FILE = "folder", "file"
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev", "eval"},
    "test": {"test", "testing"},
}


class Entry(NamedTuple):
    """One image as a source lists it. Plain JSON: `Entry(*json.loads(json.dumps(entry))) == entry`."""

    split: str  # "train", "val" or "test", the split of the published dataset
    key: str  # unique in its source; the same in all formats of a dataset
    label: int  # index into the classes
    place: list[Any]  # the place of its bytes, in the terms of its source
    ending: str = ""  # the ending of its name; "": that of the key

    @property
    def kind(self) -> str:
        """The ending by which it is counted."""
        return self.ending or ending_of(self.key)


# An encoded image file; pixels, uint8 [h, w, 3]; tokens, uint16 [n_px, n_px]; or the error of this one image.
Result = bytes | np.ndarray | ValueError


class Source(Protocol):
    """Images with labels; listing and reading are separate. `open_source(source.name, source.labels)` opens it again."""

    name: str
    val_fraction: float  # the fraction of "train" that paper 3.1 uses for validation

    @property
    def labels(self) -> str:
        """Whether labels are used: one of LABELS."""

    @property
    def left_out(self) -> Tally:
        """What the last complete listing left out."""

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


def listing(source: Source) -> Iterator[Entry]:
    """Every image by name, as `entries` has them, and copies of test images too, which only the files' contents show."""
    listed: Iterator[Entry] = getattr(source, "listed", source.entries)()
    return listed


class Unlabelled:
    """Any source with its labels ignored: every image has the label 0, the class "unlabelled"."""

    classes = UNLABELLED
    labels = "ignore"

    def __init__(self, source: Source) -> None:
        self.name, self.val_fraction, self.read = source.name, source.val_fraction, source.read
        self._source = source

    @property
    def left_out(self) -> Tally:
        """That of the source."""
        return self._source.left_out

    def entries(self) -> Iterator[Entry]:
        """Those of the source."""
        return (entry._replace(label=0) for entry in self._source.entries())

    def listed(self) -> Iterator[Entry]:
        """As `listing` of the source."""
        return (entry._replace(label=0) for entry in listing(self._source))


def split_word(name: str) -> str | None:
    """ "train", "val" or "test" if a name has a word of that meaning, otherwise None."""
    words = re.split("[^a-z]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if not known.isdisjoint(words)), None)


def visible_folders(directory: Path) -> list[str]:
    """The names of the folders in a directory that are not hidden, sorted."""
    with os.scandir(directory) as found:
        return sorted(item.name for item in found if not item.name.startswith(".") and _kind(item) == _FOLDER)


def has_images(directory: Path) -> bool:
    """Whether a directory itself holds a file that may be an image. Stops at the first one."""
    with os.scandir(directory) as found:
        return any(why_not(item.name) is None and _kind(item) == _FILE for item in found)


def scan(root: Path, below: str, tally: Tally) -> tuple[list[str], list[str]]:
    """The files to try as images and the folders in `root/below`, as sorted paths below `root`. All else is counted."""
    images, folders = [], []
    with os.scandir(root / below) as found:
        for item in found:
            path, kind = f"{below}/{item.name}" if below else item.name, _kind(item)
            if reason := why_not(item.name) if kind != _FOLDER else HIDDEN if item.name.startswith(".") else None:
                tally.add(path, reason, lost=False)
            elif kind == _FOLDER:
                folders.append(path)
            elif kind == _FILE:
                images.append(path)
            else:
                tally.add(path, kind)
    return sorted(images), sorted(folders)


def _kind(item: os.DirEntry[str]) -> str:
    """_FOLDER, _FILE, or the reason to leave it out. Only links need a call of the system."""
    try:
        if item.is_dir():
            return _FOLDER
        if item.is_file():
            return _FILE
        return DANGLING if item.is_symlink() and not Path(item.path).exists() else SPECIAL
    except OSError:  # a link to itself
        return DANGLING


def walk_images(root: Path, below: str, tally: Tally) -> Iterator[str]:
    """The files to try as images in `root/below` at any depth, as paths below `root`. Links to folders above are counted."""
    parents = [root, *(root / path for path in Path(below).parents if below)]
    waiting = [(below, frozenset(_mark(path) for path in parents if path != root / below))]
    while waiting:
        folder, above = waiting.pop()
        if (mark := _mark(root / folder)) in above:
            tally.add(folder, ABOVE, lost=False)
            continue
        images, folders = scan(root, folder, tally)
        yield from images
        waiting += [(name, above | {mark}) for name in reversed(folders)]


def _mark(folder: Path) -> tuple[int, int]:
    """What is the same for all paths of one folder."""
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
