"""Merges the parts of a feature directory. In: directories NAME.part-I-of-N. Out: the directory that one writer makes.

Called by `tools/extract_features.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from igpt_ds.arrays import new_array
from igpt_ds.cli import FinishedError
from igpt_ds.data.shards.layout import Part
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.addition import add_splits, addition_dir, new_splits
from igpt_ds.evaluate.features.files import array_names, keys_name, part_dir
from igpt_ds.evaluate.features.manifest import (
    EXTRACT_AGAIN,
    FeatureManifest,
    PartOf,
    check_files,
    describe_files,
    read_feature_manifest,
)
from igpt_ds.files import atomic_dir, atomic_file, remove, reserved
from igpt_ds.npy import read_npy
from igpt_ds.plain_files import beside

_COPY_BYTES = 1 << 26


def merge_parts(out: Path, n: int) -> FeatureManifest:
    """Makes `out` of its n parts, byte for byte what one writer makes, removes the parts, and returns their manifest.

    Parts of further splits move into `out`.

    Raises:
        ValueError: `out` exists and holds other features or these splits; a part is missing, unfinished or has other features.
    """
    directories = [part_dir(out, Part(i, n)) for i in range(n)]
    try:
        target = _target(out, directories[0])
        with reserved(target):
            whole = _merge(target, directories)
            if target != out:
                add_splits(out, target)
            for directory in directories:
                shutil.rmtree(directory)
    except FinishedError:
        for directory in directories:
            remove(directory)
        raise
    return whole


def _target(out: Path, part: Path) -> Path:
    """Where the parts are merged: `out`, or beside it if it exists and lacks their splits."""
    if not ((out / "manifest.json").is_file() and (part / "manifest.json").is_file()):
        return out
    manifest = _part_manifest(part)
    assert manifest.part is not None
    whole = replace(manifest, splits=manifest.part.of)
    left = new_splits(out, whole)
    if left != list(whole.splits):
        there = next(split for split in whole.splits if split not in left)
        raise InputError(f"{out} has split {there} already, which its parts hold too; remove the parts, such as {part}")
    return addition_dir(out, whole.splits)


def _merge(out: Path, directories: list[Path]) -> FeatureManifest:
    parts = [_part_manifest(directory) for directory in directories]
    assert parts[0].part is not None
    whole = replace(parts[0], splits=parts[0].part.of, part=None, files={})
    rows = dict.fromkeys(whole.splits, 0)
    for directory, part in zip(directories, parts, strict=True):
        same = replace(part, splits=whole.splits, part=None, files={}).to_dict()
        different = [name for name, value in whole.to_dict().items() if same[name] != value]
        if different or part.part != PartOf(whole.splits, rows):
            what = different[0] if different else "the share of images"
            raise InputError(
                f"{directory} and {directories[0]} are not parts of the same features: {what} differs; {EXTRACT_AGAIN}"
            )
        rows = {split: rows[split] + about.n_images for split, about in part.splits.items()}
        check_files(directory, part.files)
    with atomic_dir(out) as partial:
        names = [name for split in whole.splits for name in array_names(whole, split)]
        for name in names:
            (partial / name).parent.mkdir(exist_ok=True)
            _concatenate([directory / name for directory in directories], partial / name)
        for name in map(keys_name, whole.splits):
            if all(name in part.files for part in parts):
                _join([directory / name for directory in directories], partial / name)
                names.append(name)
        whole = replace(whole, files=describe_files(partial, names))
        whole.write(partial)
    return whole


def _join(sources: Sequence[Path], target: Path) -> None:
    with atomic_file(target) as file:
        for source in sources:
            with open(source, "rb") as part:
                shutil.copyfileobj(part, file)


def _part_manifest(directory: Path) -> FeatureManifest:
    if not (directory / "manifest.json").is_file():
        state = "is not finished" if beside(directory, ".partial").exists() else "does not exist"
        raise InputError(f"part {directory} {state}; extract it with --part before you merge")
    return read_feature_manifest(directory, part=True)


def _concatenate(sources: Sequence[Path], target: Path) -> None:
    arrays = [read_npy(source, "features", EXTRACT_AGAIN, mapped=True) for source in sources]
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    merged = new_array(target, arrays[0].dtype, shape)
    start = 0
    for array in arrays:
        rows = max(1, _COPY_BYTES // max(1, array[:1].nbytes))
        for first in range(0, len(array), rows):
            piece = array[first : first + rows]
            merged[start : start + len(piece)] = piece
            start += len(piece)
    merged.flush()
