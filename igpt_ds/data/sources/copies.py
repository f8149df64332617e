"""Copies of one file in two splits that a user made: the test or validation image stays, and the other is left out.

In: the images of a source. Out: the same without copies. Called by `folders.py` and `held_out.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from igpt_ds.data.sources.base import Entry, Result

_READ_AT_ONCE = 1000  # images


def chunks(entries: Iterator[Entry], size: int) -> Iterator[list[Entry]]:
    """Entries in lists of `size`, the last one shorter."""
    while chunk := list(islice(entries, size)):
        yield chunk


def file_hash(content: Result) -> str | None:
    """The sha256 of an image's file or pixels; None for an image that cannot be read."""
    raw = content.tobytes() if isinstance(content, np.ndarray) else content
    return hashlib.sha256(raw).hexdigest() if isinstance(raw, bytes) else None


def hashed(entries: Iterable[Entry], read: Callable[[Sequence[Entry]], Iterator[Result]]) -> Iterator[tuple[Entry, str | None]]:
    """Each image and its `file_hash`. Reads all files."""
    for some in chunks(iter(entries), _READ_AT_ONCE):
        yield from ((entry, file_hash(content)) for entry, content in zip(some, read(some), strict=True))


def without_copies(
    entries: Callable[[], Iterator[Entry]],
    read: Callable[[Sequence[Entry]], Iterator[Result]],
    leave_out: Callable[[Entry], None],
) -> Iterator[Entry]:
    """The images, each in one split: "test" before "val" before "train". Lists twice and reads all files.

    Args:
        leave_out: takes each copy.
    """
    split_of: dict[str | None, str] = {}
    for entry, digest in hashed((entry for entry in entries() if entry.split != "train"), read):
        if digest and split_of.get(digest) != "test":
            split_of[digest] = entry.split
    for entry, digest in hashed(entries(), read):
        if split_of.get(digest, entry.split) == entry.split:
            yield entry
        else:
            leave_out(entry)
