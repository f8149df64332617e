"""Exclusion lists: which images of one split are to be left out, in one JSON file that names the dataset it is about.

In: image ids and why. Out: a file, and the ids back from it. `tools/dedup_shards.py` writes; training reads and gives the ids to
`ShardSet(path, split, exclude=ids)`. A list is about the split as it lies on disk: `dataset_hash` is that of the split opened
without any exclusion, since leaving images out gives another hash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.files import read_json, write_json

FORMAT, VERSION = "igpt_ds.exclusion", 1
_AGAIN = "make the list again with tools/dedup_shards.py"


def write_exclusion(path: Path, shards: ShardSet, ids: np.ndarray, about: dict[str, Any]) -> None:
    """Writes the list, atomically.

    Args:
        shards: the split that the ids count in, opened without exclusions.
        ids: int64 [N], rising and different; none is a list too.
        about: how the images were found, plain JSON; it is kept for the reader's eyes.
    """
    assert ids.ndim == 1
    assert (np.diff(ids) > 0).all()
    assert not len(ids) or 0 <= ids[0] <= ids[-1] < shards.n_images
    head = {"format": FORMAT, "version": VERSION, "dataset_hash": shards.dataset_hash, "split": shards.split}
    write_json(path, head | {"n_images": shards.n_images, "about": about, "ids": [int(number) for number in ids]})


def read_exclusion(path: Path, shards: ShardSet) -> np.ndarray:
    """The ids of a list: int64 [N], rising.

    Args:
        shards: the split to leave them out of, opened without exclusions.

    Raises:
        ValueError: no such file, damaged JSON, another format or version, a list about another split or other images, ids that
            do not rise or that the split does not have, or a list that leaves no image.
    """
    content = read_json(path, "exclusion list")
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"exclusion list {path} is not {FORMAT} version {VERSION}; {_AGAIN}")
    missing = [name for name in ("dataset_hash", "split", "ids") if name not in content]
    if missing:
        raise ValueError(f"exclusion list {path} has no {missing[0]!r}; {_AGAIN}")
    if content["split"] != shards.split:
        raise ValueError(f"exclusion list {path} is about split {content['split']!r}, not {shards.split!r}; {_AGAIN}")
    if content["dataset_hash"] != shards.dataset_hash:
        hashes = f"images {str(content['dataset_hash'])[:12]}, {shards.path} holds {shards.dataset_hash[:12]}"
        raise ValueError(f"exclusion list {path} is about {hashes}; {_AGAIN}")
    listed = content["ids"]
    # bool is an int to Python; and a float id would be cut without a word
    if not isinstance(listed, list) or not all(type(number) is int for number in listed):
        raise ValueError(f"exclusion list {path} is damaged: its ids are not a list of whole numbers; {_AGAIN}")
    if listed and not 0 <= min(listed) <= max(listed) < shards.n_images:
        wrong = min(listed) if min(listed) < 0 else max(listed)
        raise ValueError(f"exclusion list {path} names image {wrong}; {shards.path} has 0..{shards.n_images - 1}; {_AGAIN}")
    ids = np.array(listed, dtype=np.int64)
    unsorted = np.flatnonzero(np.diff(ids) <= 0)
    if len(unsorted):
        pair = f"{ids[unsorted[0]]} stands before {ids[unsorted[0] + 1]}"
        raise ValueError(f"exclusion list {path} is damaged: its ids must rise, {pair}; {_AGAIN}")
    if len(ids) == shards.n_images:
        raise ValueError(f"exclusion list {path} names all {len(ids)} images of {shards.path}; nothing would be left")
    return ids
