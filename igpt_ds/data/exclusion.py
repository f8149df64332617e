"""Exclusion lists: the images of one split that training leaves out, in a JSON file that identifies the split.

In: image ids and the reason. Out: a file, and the ids read from it. `tools/dedup_shards.py` writes; training reads and passes the
ids to `ShardSet(path, split, exclude=ids)`. `dataset_hash` in a list is the hash of the split without exclusions, because
excluding images changes the hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.schema import record_from, to_json
from igpt_ds.sealed import Format

_AGAIN = "make the list again with tools/dedup_shards.py"
EXCLUSION = Format("igpt_ds.exclusion", "exclusion list", _AGAIN, version=2, sealed=2, oldest=1, limit=1 << 30)


@dataclass(frozen=True)
class ExclusionReason:
    """Why the images of a list are left out. Fields are None if they do not apply.

    train, eval: names of the two datasets; flat_train, flat_eval: their images that were too flat to be compared.
    """

    reason: str
    method: str | None = None
    max_distance: int | None = None
    train: str | None = None
    eval: str | None = None
    eval_split: str | None = None
    eval_dataset_hash: str | None = None
    eval_images_found: int | None = None
    flat_train: int | None = None
    flat_eval: int | None = None


@dataclass(frozen=True)
class _ExclusionFile:
    """The content of a list, as readers check it; n_images counts the images of the split, about is for people."""

    dataset_hash: str
    split: str
    ids: list[int]
    n_images: int | None = None
    about: dict[str, object] | None = None


def write_exclusion(path: Path, shards: ShardSet, ids: np.ndarray, about: ExclusionReason) -> None:
    """Writes the list, atomically.

    Args:
        shards: the split that the ids belong to, opened without exclusions.
        ids: int64 [N], strictly increasing; may be empty.
        about: how the images were found, for people who read the list.
    """
    assert ids.ndim == 1
    assert (np.diff(ids) > 0).all()
    assert not len(ids) or 0 <= ids[0] <= ids[-1] < shards.n_images
    content = _ExclusionFile(shards.dataset_hash, shards.split, ids.tolist(), shards.n_images, to_json(about))
    EXCLUSION.write(path, to_json(content))


def read_exclusion(path: Path, shards: ShardSet) -> np.ndarray:
    """The images of a list, as ids in `shards`: int64 [N], strictly increasing.

    Args:
        shards: the split that training reads, opened without exclusions. It may join the split of the list with others.

    Raises:
        ValueError: the file is missing or is not JSON; it has another format, version, split or dataset; a field is missing or
            has another type; ids do not increase or do not exist in the split; or no image would be left.
    """
    found = record_from(_ExclusionFile, EXCLUSION.read(path), f"exclusion list {path}", _AGAIN)
    if found.split not in shards.parts:
        raise InputError(f"exclusion list {path} is about split {found.split!r}, not {shards.split!r}; {_AGAIN}")
    images, dataset_hash = shards.parts[found.split]
    if found.dataset_hash != dataset_hash:
        hashes = f"images {found.dataset_hash[:12]}, {shards.path} holds {dataset_hash[:12]}"
        raise InputError(f"exclusion list {path} is about {hashes}; {_AGAIN}")
    listed = found.ids
    if listed and not 0 <= min(listed) <= max(listed) < len(images):
        wrong = min(listed) if min(listed) < 0 else max(listed)
        raise InputError(f"exclusion list {path} names image {wrong}; {shards.path} has 0..{len(images) - 1}; {_AGAIN}")
    ids = np.array(listed, dtype=np.int64)
    unsorted = np.flatnonzero(np.diff(ids) <= 0)
    if len(unsorted):
        pair = f"{ids[unsorted[0]]} comes before {ids[unsorted[0] + 1]}"
        raise InputError(f"exclusion list {path} is damaged: its ids must increase, {pair}; {_AGAIN}")
    if len(ids) == shards.n_images:
        raise InputError(f"exclusion list {path} names all {len(ids)} images of {shards.path}; nothing would be left")
    return ids + images.start
