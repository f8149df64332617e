"""Adds splits to a feature directory: train today, val and test later, of the same model, layers, kinds, palette and data set.

A split is extracted into NAME.SPLIT beside the directory NAME and moves into it when it is complete. Until then NAME does not
change.
In: the manifest of the wanted features. Out: the splits that are left to extract, and the directory with all splits.
Called by `extract.py` and `merge.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from igpt_ds.cli import FinishedError
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import FeatureManifest, Origin, read_feature_manifest
from igpt_ds.files import fsync_path, remove
from igpt_ds.locks import locked
from igpt_ds.plain_files import beside

_WAIT = 600.0  # seconds for another process that adds a split at this moment
_ADDED = ("splits", "files", "part")  # what two additions to one directory may differ in


def new_splits(out: Path, whole: FeatureManifest) -> list[str]:
    """The splits of `whole` that the directory `out` does not have yet; all of them if there is no directory.

    Raises:
        ValueError: `out` holds other features, whose first difference is named.
        FinishedError: a killed process had completed the missing splits; they are in `out` now.
    """
    if not (out / "manifest.json").is_file():
        return list(whole.splits)
    _joined(out, read_feature_manifest(out), whole)
    left = [split for split in whole.splits if split not in read_feature_manifest(out).splits]
    if left and (addition_dir(out, left) / "manifest.json").is_file():
        add_splits(out, addition_dir(out, left))
        raise FinishedError(f"{out}: an earlier run extracted {' and '.join(left)}")
    return left


def addition_dir(out: Path, splits: Iterable[str]) -> Path:
    """Where splits, in any order, are written that move into `out` later; `out` itself if it does not exist."""
    return beside(out, "." + "-".join(sorted(splits))) if (out / "manifest.json").is_file() else out


def add_splits(out: Path, addition: Path) -> None:
    """Moves the splits of a complete feature directory into `out`. A call that follows a killed call completes it.

    Raises:
        ValueError: the directories hold different features, or the same split.
    """
    with locked(out, wait=_WAIT):
        added = read_feature_manifest(addition)
        whole = _joined(out, read_feature_manifest(out), added)
        for split in added.splits:
            if (addition / split).exists():
                remove(out / split)  # which no manifest knows
                os.replace(addition / split, out / split)
        fsync_path(out)
        whole.write(out)
        shutil.rmtree(addition)


def _joined(out: Path, there: FeatureManifest, here: FeatureManifest) -> FeatureManifest:
    """The manifest of both. Whole images have no mask_prob and no mask_seed, so those of masked splits hold for both."""
    for split, about in here.splits.items():
        if (known := there.splits.get(split, about)) != about:
            name = next(name for name, value in vars(about).items() if getattr(known, name) != value)
            _refuse(out, f"{name} of split {split}", getattr(known, name), getattr(about, name))
    masked = here.origin if there.origin.mask_prob is None else there.origin
    one, other = (replace(manifest, origin=_with_masks(manifest.origin, masked)) for manifest in (there, here))
    theirs = one.to_dict()
    for name, value in other.to_dict().items():
        if name not in _ADDED and theirs[name] != value:
            _refuse(out, name, theirs[name], value)
    return replace(one, splits=one.splits | other.splits, files=one.files | other.files)


def _with_masks(origin: Origin, masked: Origin) -> Origin:
    if origin.mask_prob is not None:
        return origin
    return replace(origin, mask_prob=masked.mask_prob, mask_seed=masked.mask_seed)


def _refuse(out: Path, name: str, there: object, here: object) -> None:
    raise InputError(
        f"{out} exists already and holds other features: {name} is {there} there and {here} here; choose another --out"
    )
