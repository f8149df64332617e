"""Merges written shards into a dataset directory: checks them, writes the index, removes what readers do not need, renames.

In: OUT.making with all shards of its plan and an entry of each. Out: OUT. A killed merge is continued by the same command.
Called by `data/shards/build.py` and `tools/make_shards.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from igpt_ds.data.left_out import EMPTY_CLASS
from igpt_ds.data.palette import load_palette, report_path
from igpt_ds.data.shards.encode import Bad, Unreadable
from igpt_ds.data.shards.index import ShardEntry, ShardIndex, SplitEntry, keys_file, read_index, split_entry, write_index
from igpt_ds.data.shards.layout import Planned, ShardPlan, ShardSettings
from igpt_ds.errors import InputError
from igpt_ds.files import fsync_path, remove, reserved, sha256_file
from igpt_ds.keys import write_keys
from igpt_ds.plain_files import beside
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

MADE = Format(
    "igpt_ds.shard", "entry of a shard", "remove it and run the same command again, which makes the shard again", 1, 1, 1
)

DEFAULT_MAX_BAD = 0.001  # more than one unreadable image in a thousand means a broken copy
AGAIN = "run the same command again, which makes it again"
_RECORDED = (
    "val_fraction",
    "test_fraction",
    "images_per_shard",
    "seed",
    "filter",
    "crop",
    "views",
    "max_pixels",
    "labels",
)  # in the index too
_PACKAGES = ("numpy", "pillow", "simplejpeg", "torch")  # packages that decode and resize


def making(path: Path) -> Path:
    """The directory that holds the dataset directory `path` until it is complete."""
    return beside(path, ".making")


def merge_shards(path: Path, name: str | None = None, max_bad: float = DEFAULT_MAX_BAD) -> ShardIndex:
    """Writes the index over all planned shards and renames the dataset directory. Returns the index.

    Raises:
        ValueError: there is no plan, shards are missing or have another size, too many images were unreadable, `path` exists, or
            another process writes it.
    """
    work = making(path)
    with reserved(path):
        index = _index_of(work, name or path.resolve().name, max_bad)
        write_index(work, index)
        _publish(work, path, index)
    return index


def finish_begun(path: Path, settings: ShardSettings) -> ShardIndex | None:
    """Ends a merge that was killed after its index was complete; returns the index. None if there is nothing to end.

    Raises:
        ValueError: the shards were made with other settings, or one of them is gone.
    """
    work = making(path)
    if (work / "plan").exists() or not (work / "index.json").exists():
        return None
    with reserved(path):
        index = read_index(work)
        known = {name: getattr(index, name) for name in asdict(settings)}
        if different := [f"{key} {known[key]!r}, now {new!r}" for key, new in asdict(settings).items() if known[key] != new]:
            raise InputError(begun_otherwise(work, different))
        _publish(work, path, index)
    return index


def begun_otherwise(work: Path, different: list[str]) -> str:
    """The refusal to go on with other settings."""
    return f"{work} was begun with other settings ({'; '.join(different)}); continue with those, or remove it"


def _publish(work: Path, path: Path, index: ShardIndex) -> None:
    """Removes all but the files of the dataset, then renames the directory. The index is there, so `finish_begun` can go on."""
    entries = [shard for split in index.splits.values() for shard in split.shards]
    check_tars(work, entries, AGAIN if (work / "plan").exists() else f"remove {work} and begin again")
    if (work / "plan").exists():
        os.replace(work / "plan", work / "plan.used")  # at once, because half a plan is damage
    kept = {"index.json", index.palette, report_path(Path(index.palette)).name, *(shard.name for shard in entries)}
    kept |= {keys_file(split) for split in index.splits}
    for file in work.iterdir():
        if file.name not in kept:
            remove(file)
    fsync_path(work)
    os.replace(work, path)
    fsync_path(path.parent)


def wrong_tar(work: Path, shard: ShardEntry) -> str:
    """What is wrong with a finished shard's file, by its size; "" if nothing is. A shard without images has no file."""
    file = work / shard.name
    found = file.stat().st_size if file.is_file() else 0
    if not shard.n_images or found == shard.bytes:
        return ""
    return f"{file} has {found} bytes instead of {shard.bytes}" if file.is_file() else f"{file} is gone"


def check_tars(work: Path, shards: list[ShardEntry], fix: str = AGAIN) -> None:
    """Refuses an index over a shard that is gone.

    Raises:
        ValueError: a file is missing or has another size.
    """
    if wrong := next(filter(None, (wrong_tar(work, shard) for shard in shards)), ""):
        raise InputError(f"{wrong}; {fix}")


def _index_of(work: Path, name: str, max_bad: float) -> ShardIndex:
    plan = ShardPlan(work / "plan")
    shards = plan.shards()
    if missing := [shard.name for shard in shards if not entry_file(work, shard).is_file()]:
        raise InputError(f"{work}: {len(missing)} of {len(shards)} shards are missing, the first {missing[0]}; make them first")
    unreadable = Unreadable(plan.settings.source, plan.n_entries, max_bad, plan.left_out)
    splits: dict[str, list[ShardEntry]] = {}
    for shard in shards:
        made = read_made(work, shard)
        unreadable.add(made.unreadable)
        if made.shard.n_images:
            splits.setdefault(shard.split, []).append(made.shard)
    for label, n in enumerate(plan.n_listed):
        if n == unreadable.by_label[label]:
            unreadable.tally.add(plan.classes[label], EMPTY_CLASS, lost=False, ending="")
    palette = load_palette(work / "palette.npy")
    return ShardIndex(
        name=name,
        n_px=plan.settings.n_px,
        n_vocab=len(palette),
        palette="palette.npy",
        palette_hash=palette.hash,
        classes=plan.classes,
        splits={split: _split(work, split, entries, plan, palette.hash) for split, entries in splits.items()},
        source=plan.settings.source,
        source_hash=plan.source_hash,
        made_with={package: version(package) for package in _PACKAGES},
        n_unreadable=unreadable.count,
        left_out=unreadable.tally.rows() or None,
        **{key: getattr(plan.settings, key) for key in _RECORDED},
    )


def _split(work: Path, split: str, entries: list[ShardEntry], plan: ShardPlan, palette_hash: str) -> SplitEntry:
    """The entry of a split. Writes the file of its keys."""
    write_keys(work / keys_file(split), _keys(work, split, plan))
    entry = split_entry(entries, palette_hash, plan.settings.n_px)
    return replace(entry, keys=sha256_file(work / keys_file(split)))


def _keys(work: Path, split: str, plan: ShardPlan) -> Iterator[str]:
    views = plan.settings.crop_spec(split).views
    for shard in plan.shards():
        if shard.split == split:
            unreadable = {bad.key for bad in read_made(work, shard).unreadable}
            yield from (entry.key for entry in shard.entries() if entry.key not in unreadable for _ in range(views))


@dataclass(frozen=True)
class Made:
    """A shard that is finished: its entry for the index, and the images that could not be read."""

    shard: ShardEntry
    unreadable: list[Bad]


def entry_file(work: Path, shard: Planned) -> Path:
    """The file that says that a shard is finished."""
    return work / f"{shard.name}.json"


def read_made(work: Path, shard: Planned) -> Made:
    """The entry of a finished shard.

    Raises:
        ValueError: it is damaged.
    """
    file = entry_file(work, shard)
    return record_from(Made, MADE.read(file), f"entry of a shard {file}", MADE.fix)
