"""Writes a dataset directory from a source: lists the images, writes shards on all cores, merges.

In: a source, a palette, n_px. Out: what `data/shards/dataset.py` reads. Called by `tools/make_shards.py`
and `tools/filter_shards.py`.

    list    reads the source's names once and assigns images to shards
    write   writes the shards; each gets its final name when it is complete; each of several jobs writes a part
    merge   writes index.json over all shards

All files are in OUT.making, which is renamed to OUT at the end. The bytes do not depend on the number of processes or jobs, nor
on interruptions: the same command continues with the missing shards. One process at a time lists, merges or writes a part.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from igpt_ds.data.palette import Palette, load_palette, prepare_table, report_path, save_palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.encode import CHUNK, Bad, Prepared, Task, Unreadable, prepared
from igpt_ds.data.shards.index import ShardIndex, keys_file, read_index, split_entry, write_index
from igpt_ds.data.shards.layout import (
    IMAGES_PER_SHARD,
    WHOLE,
    Part,
    Planned,
    ShardOptions,
    ShardPlan,
    ShardSettings,
    make_plan,
)
from igpt_ds.data.shards.merge import (
    DEFAULT_MAX_BAD,
    MADE,
    Made,
    begun_otherwise,
    check_tars,
    entry_file,
    finish_begun,
    making,
    merge_shards,
    read_made,
    wrong_tar,
)
from igpt_ds.data.shards.record import pack
from igpt_ds.data.shards.tar_writer import shard_file
from igpt_ds.data.sources import Source
from igpt_ds.data.sources.copies import chunks
from igpt_ds.errors import InputError
from igpt_ds.files import atomic_dir, reserved, sha256_file
from igpt_ds.keys import write_keys
from igpt_ds.locks import locked
from igpt_ds.plain_files import beside

IMAGES_PER_PROCESS = 2048  # for fewer images another process costs more than it saves


def write_dataset(
    path: Path,
    source: Source,
    palette: Palette,
    options: ShardOptions,
    *,
    name: str | None = None,
    workers: int = 1,
    max_bad: float = DEFAULT_MAX_BAD,
) -> ShardIndex:
    """Writes every image of the source into a dataset directory, which appears when it is complete. Returns its index.

    `name` is the name of the images in tables and figures (default: the directory's name). At most the fraction max_bad of the
    images may be unreadable. Memory does not grow with the source.

    Raises:
        ValueError: `path` exists, a number is out of range, a split would be empty, or too many images are unreadable.
    """
    settings = options.settings(source, palette)
    if index := finish_begun(path, settings):
        return index
    list_images(path, source, palette, settings, max_bad)
    write_shards(path, source, workers=workers, max_bad=max_bad)
    return merge_shards(path, name, max_bad)


def list_images(
    path: Path, source: Source, palette: Palette, settings: ShardSettings, max_bad: float = DEFAULT_MAX_BAD
) -> ShardPlan:
    """Assigns images to the shards of the dataset directory `path`, or reads the plan if it exists.

    Raises:
        ValueError: `path` exists, or was begun with other settings; the reasons of `make_plan`.
    """
    work = making(path)
    if path.exists() or not (work / "plan").exists():
        with reserved(path):
            if not (work / "plan").exists():
                _list(work, source, palette, settings, max_bad)
    plan = ShardPlan(work / "plan")
    if load_palette(work / "palette.npy").hash != plan.settings.palette_hash:
        raise InputError(f"{work / 'palette.npy'} is not the palette of {work / 'plan'}; remove {work} and begin again")
    if different := plan.differences(settings):
        raise InputError(begun_otherwise(work, different))
    return plan


def _list(work: Path, source: Source, palette: Palette, settings: ShardSettings, max_bad: float) -> None:
    work.mkdir(parents=True, exist_ok=True)
    save_palette(work / "palette.npy", palette)
    try:
        make_plan(work / "plan", source, settings, max_bad)
    except (ValueError, OSError):
        for file in (work / "palette.npy", report_path(work / "palette.npy")):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            work.rmdir()
        raise


def check_work(part: Part, workers: int, max_bad: float) -> None:
    """Checks numbers before any work.

    Raises:
        ValueError: one of them is out of range.
    """
    if workers < 1:
        raise InputError(f"workers={workers} must be at least 1")
    if not 0 <= max_bad <= 1:
        raise InputError(f"max_bad={max_bad} must lie between 0 and 1")
    part.check()


def write_shards(path: Path, source: Source, *, part: Part = WHOLE, workers: int = 1, max_bad: float = DEFAULT_MAX_BAD) -> int:
    """Writes the planned shards that do not exist yet. Part(i, n) writes every n-th shard, starting at the i-th.

    Returns the number of source images in them.

    Raises:
        ValueError: there is no plan, `part` or a number is out of range, or too many images are unreadable.
    """
    check_work(part, workers, max_bad)
    # Other parts may be written at the same time, but the shards are not merged meanwhile.
    with locked(path, shared=True), locked(beside(path, f".part-{part.i}-of-{part.n}")):
        return _write_part(path, source, part, workers, max_bad)


def _write_part(path: Path, source: Source, part: Part, workers: int, max_bad: float) -> int:
    work = making(path)
    plan = ShardPlan(work / "plan")
    mine = plan.shards()[part.i :: part.n]
    made = {shard: read_made(work, shard) for shard in mine if entry_file(work, shard).is_file()}
    missing = [shard for shard in mine if shard not in made or wrong_tar(work, made[shard].shard)]
    if not missing:
        return 0
    unreadable = Unreadable(source.name, plan.n_entries, max_bad, plan.left_out)
    for shard in mine:
        if shard not in missing:
            unreadable.add(made[shard].unreadable)
    before, palette_file = unreadable.count, work / "palette.npy"
    total = sum(shard.n_entries for shard in missing)
    processes = min(workers, -(-total // IMAGES_PER_PROCESS))
    if processes > 1:
        prepare_table(palette_file)  # the processes share it
    try:
        with tqdm(total=total, desc="shards", unit=" images", leave=False, disable=None) as bar:
            results = prepared(_tasks(missing, plan), source, palette_file, processes)
            for name, of_shard in groupby(results, attrgetter("shard")):
                _write_shard(work, name, of_shard, unreadable, bar)
    except (FileNotFoundError, ValueError):
        if (work / "plan").exists():
            raise
        shutil.rmtree(work, ignore_errors=True)  # the current shard may have created it again
        raise InputError(f"{work} disappeared: another process has finished or removed it; look at {path}") from None
    return total - (unreadable.count - before)


def _tasks(shards: list[Planned], plan: ShardPlan) -> Iterator[Task]:
    for shard in shards:
        first = shard.first
        for chunk in chunks(shard.entries(), CHUNK):
            yield Task(shard.name, first, chunk, plan.settings.crop_spec(shard.split))
            first += len(chunk)


def _write_shard(work: Path, name: str, results: Iterator[Prepared], unreadable: Unreadable, bar: Any) -> None:
    """Writes one shard, then its entry for the index, which marks the shard as finished."""
    mine: list[Bad] = []
    with shard_file(work / name) as shard:
        for result in results:
            shard.add(pack(result.names, result.tokens, result.labels))
            unreadable.add(result.unreadable, say=True)
            mine += result.unreadable
            bar.update(result.n_entries)
        entry = shard.close()
    if not shard.n_images:
        (work / name).unlink()
    MADE.write(work / f"{name}.json", asdict(Made(entry, mine)))


def copy_images(out: Path, shards: ShardSet, ids: np.ndarray, *, name: str | None = None, note: dict[str, object]) -> ShardIndex:
    """Writes a dataset directory whose split "train" holds some images of `shards`, int64 ids, in this order.

    `note` says how they were chosen; the index has it as "derived". Returns the index.

    Raises:
        ValueError: `out` exists, there are no images, or an image is damaged.
    """
    if not len(ids):
        raise InputError(f"no images of {shards.path} are left to write to {out}")
    with atomic_dir(out) as partial:
        entries = []
        for number, first in enumerate(range(0, len(ids), IMAGES_PER_SHARD)):
            mine = ids[first : first + IMAGES_PER_SHARD]
            with shard_file(partial / f"train-{number:06d}.tar") as shard:
                for start in range(0, len(mine), CHUNK):
                    some = mine[start : start + CHUNK]
                    shard.add(pack(first + start + np.arange(len(some)), *shards.read(some)))
                entries.append(shard.close())
        save_palette(partial / "palette.npy", shards.palette)
        split = split_entry(entries, shards.palette_hash, shards.n_px)
        if (keys := shards.keys_of(ids)) is not None:
            write_keys(partial / keys_file("train"), keys)
            split = replace(split, keys=sha256_file(partial / keys_file("train")))
        splits = {"train": split}
        index = replace(read_index(shards.path), name=name or out.resolve().name, derived=note, splits=splits)
        write_index(partial, index)
        check_tars(partial, entries)
    return index
