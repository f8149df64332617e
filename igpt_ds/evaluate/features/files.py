"""The feature directory: an array for each layer, kind and split, read as memory maps. It is written and read only here.

    manifest.json                             what the features are of, and the size and sha256 of each array (`manifest.py`)
    {split}/labels.npy                        int64 [N]
    {split}/keys.jsonl                        the images' keys in their source, N lines (`igpt_ds/keys.py`); older ones lack it
    {split}/layer_{l:02d}_{kind}.npy          [N, C], float32 or float16
    {split}/layer_{l:02d}_{kind}_mask{m}.npy  the same for images seen through their m-th mask (bert models, paper 4.6)

Kinds: "normed", "raw" and "pixels", see `network.py`. A directory gets its name when it is complete. Before that it is
NAME.partial, with the number of finished images in progress.json, and a writer of the same features continues there. Part i of n
is the directory NAME.part-I-of-N with its share of the rows; `merge.py` makes one directory of all parts.

In: values by rows, from `extract.py`. Out: a `FeatureSet` for the probes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from igpt_ds.arrays import new_array, save_array
from igpt_ds.data.shards.index import joined_hash, parts_of
from igpt_ds.data.shards.layout import WHOLE, Part
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.joined import JoinedRows
from igpt_ds.evaluate.features.manifest import (
    EXTRACT_AGAIN,
    FeatureManifest,
    FeaturePlace,
    check_files,
    describe_files,
    read_feature_manifest,
    span,
)
from igpt_ds.files import move_dir, reserved
from igpt_ds.keys import Keys, write_keys
from igpt_ds.npy import read_npy
from igpt_ds.plain_files import beside, reserve
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

PROGRESS = Format("igpt_ds.features.progress", "progress of features", "remove its directory", version=1, sealed=1, oldest=1)


def _file(split: str, place: FeaturePlace) -> str:
    layer, kind, mask = place
    return f"{split}/layer_{layer:02d}_{kind}{'' if mask is None else f'_mask{mask}'}.npy"


def array_names(manifest: FeatureManifest, split: str) -> list[str]:
    """The arrays of a split."""
    return [f"{split}/labels.npy", *(_file(split, place) for place in manifest.places(split))]


def keys_name(split: str) -> str:
    """The file of a split's keys."""
    return f"{split}/keys.jsonl"


def part_dir(out: Path, part: Part) -> Path:
    """Where a part of the features `out` is written; `out` itself for the whole."""
    return out if part == WHOLE else beside(out, f".part-{part.i}-of-{part.n}")


@dataclass(frozen=True)
class _Progress:
    """progress.json: the manifest of the features, and how many images of each split are finished."""

    manifest: dict[str, object]
    done: dict[str, int]


class FeatureWriter:
    """Writes the features of `manifest` into the directory `target`; `done` has the number of finished rows of each split.

    Raises:
        ValueError: `target` exists, TARGET.partial holds the beginning of other features, or another process writes there.
    """

    def __init__(self, target: Path, manifest: FeatureManifest) -> None:
        self._reserved = ExitStack()
        self._reserved.enter_context(reserved(target))
        self.target, self.manifest = target, manifest
        self.path = beside(target, ".partial")
        self._progress = self.path / "progress.json"
        self.done: dict[str, int] = dict.fromkeys(manifest.splits, 0)
        try:
            if self._progress.exists() or (self.path / "manifest.json").exists():
                self._resume()
            else:
                shutil.rmtree(self.path, ignore_errors=True)  # a writer was killed before its first row
                self._create()
        except BaseException:
            self._reserved.close()
            raise
        self._split = ""  # one split at a time, because each map holds a file open
        self._files = dict[FeaturePlace, np.ndarray]()

    def _create(self) -> None:
        for split, about in self.manifest.splits.items():
            (self.path / split).mkdir(parents=True)
            for place in self.manifest.places(split):
                shape = (about.n_images, self.manifest.n_features)
                new_array(self.path / _file(split, place), self.manifest.array_dtype, shape)
        self._save_progress()

    def _save_progress(self) -> None:
        PROGRESS.write(self._progress, {"manifest": self.manifest.to_dict(), "done": self.done})

    def _resume(self) -> None:
        what, fix = f"progress of features {self._progress}", f"remove {self.path}"
        if self._progress.exists():
            values = replace(PROGRESS, fix=fix).read(self._progress)
        else:  # a writer was killed in `finish`, when all rows were there
            complete = {split: about.n_images for split, about in self.manifest.splits.items()}
            begun = read_feature_manifest(self.path, part=self.manifest.part is not None)
            values = {"manifest": replace(begun, files={}).to_dict(), "done": complete}
        known = record_from(_Progress, values, what, fix)
        for name, value in self.manifest.to_dict().items():
            if (was := known.manifest.get(name)) != value:
                raise InputError(
                    f"{self.path} holds the beginning of other features: {name} is {was} there and {value} here; "
                    f"finish those, or {fix}"
                )
        for split, about in self.manifest.splits.items():
            if not 0 <= (done := known.done.get(split, -1)) <= about.n_images:
                raise InputError(f"{what} has done.{split} {done}, not 0..{about.n_images}; {fix}")
            self.done[split] = done

    def write(self, split: str, start: int, place: FeaturePlace, values: np.ndarray) -> None:
        """Writes rows start .. start + len(values) of one array. The caller refuses values that the dtype cannot hold."""
        if split != self._split:
            names = self.manifest.places(split)
            for name in names:
                reserve(self.path / _file(split, name))  # an earlier version did not when it began the file
            self._files = {name: np.load(self.path / _file(split, name), mmap_mode="r+") for name in names}
            self._split = split
        self._files[place][start : start + len(values)] = values

    def save(self, split: str, done: int) -> None:
        """Forces the written rows of the split to disk. After a kill, a new writer continues from here."""
        for file in self._files.values():
            if isinstance(file, np.memmap):
                file.flush()
        self.done[split] = done
        self._save_progress()

    def finish(self, labels: dict[str, np.ndarray], keys: Mapping[str, Iterable[str] | None] | None = None) -> None:
        """Gives the directory its name; labels int64 [N] and N keys for each split, or None where the images have no keys."""
        assert self.done == {split: about.n_images for split, about in self.manifest.splits.items()}
        for split, values in labels.items():
            save_array(self.path / split / "labels.npy", values.astype("<i8"))
        names = [name for split in self.manifest.splits for name in array_names(self.manifest, split)]
        for split, some in (keys or {}).items():
            if some is not None:
                write_keys(self.path / keys_name(split), some)
                names.append(keys_name(split))
        replace(self.manifest, files=describe_files(self.path, names)).write(self.path)
        self._progress.unlink(missing_ok=True)
        move_dir(self.path, self.target)
        self._reserved.close()

    def give_up(self) -> None:
        """Removes a directory without finished rows. Finished rows stay for the next writer."""
        if not any(self.done.values()):
            shutil.rmtree(self.path, ignore_errors=True)
        self._reserved.close()


@dataclass(frozen=True)
class FeatureSet:
    """One split of a feature directory, or several as one. `manifest` is the manifest of the whole directory."""

    path: Path
    split: str
    manifest: FeatureManifest
    labels: np.ndarray  # int64 [N]
    parts: tuple[FeatureSet, ...] = ()  # the splits that a name such as "train+val" joins
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)  # arrays that had their sha256

    @property
    def layers(self) -> list[int]:
        """The layers of the features, rising."""
        return self.manifest.layers

    @property
    def kinds(self) -> list[str]:
        """The kinds of the features."""
        return self.manifest.kinds

    @property
    def classes(self) -> list[str]:
        """The names of the labels."""
        return self.manifest.classes

    @property
    def dataset_hash(self) -> str:
        """The hash of the split whose features these are."""
        if self.parts:
            return joined_hash([part.dataset_hash for part in self.parts])
        return self.manifest.splits[self.split].dataset_hash

    @cached_property
    def keys(self) -> Sequence[str] | None:
        """The images' keys in their source, in the order of the rows; None if the directory has none. Read at the first use."""
        if self.parts:
            found = [part.keys for part in self.parts]
            return None if None in found else [key for keys in found for key in keys or ()]
        entry = self.manifest.files.get(keys_name(self.split))
        return Keys(self.path / keys_name(self.split), len(self.labels), entry.sha256, EXTRACT_AGAIN) if entry else None

    @property
    def mask_draws(self) -> int:
        """The number of masks that each image is seen through; 0: whole images."""
        parts = self.parts or (self,)
        return min(self.manifest.splits[part.split].mask_draws for part in parts)

    def layer(self, layer: int, kind: str, mask: int = 0) -> np.ndarray:
        """The features of one layer: a read-only memory map [N, C], float32 or float16 as stored; `JoinedRows` of several splits.

        The file is compared with its sha256 when it is opened for the first time, unless `check` has done that already.

        Args:
            mask: the number of the mask, if images are masked.

        Raises:
            ValueError: the layer, the kind or the mask does not exist, or the file is torn.
        """
        if self.parts:
            return cast(np.ndarray, JoinedRows([part.layer(layer, kind, mask) for part in self.parts]))
        name = self._name(layer, kind, mask)
        self._check([name])
        return _open_array(self.path / name, self.manifest.array_dtype, (len(self.labels), self.manifest.n_features))

    def check(self, layers: Iterable[int], kind: str) -> None:
        """Compares the files of layers with their sha256, several at a time; raises as `layer` does."""
        wanted = list(layers)
        for one in self.parts or (self,):
            names = [one._name(layer, kind, mask) for layer in wanted for mask in range(max(1, one.mask_draws))]
            one._check(names)
            for name in names:
                _open_array(one.path / name, one.manifest.array_dtype, (len(one.labels), one.manifest.n_features))

    def _name(self, layer: int, kind: str, mask: int) -> str:
        if kind not in self.kinds:
            raise InputError(f"kind {kind!r} does not exist; the features hold {', '.join(self.kinds)}, in {self.path}")
        if layer not in self.layers:
            raise InputError(f"layer {layer!r} does not exist; the features hold layers {span(self.layers)}, in {self.path}")
        if not 0 <= mask < max(1, self.mask_draws):
            raise InputError(f"mask {mask} does not exist; split {self.split!r} of {self.path} has {self.mask_draws} mask draws")
        return _file(self.split, (layer, kind, mask if self.mask_draws else None))

    def _check(self, names: Iterable[str]) -> None:
        files = self.manifest.files
        check_files(self.path, {name: files[name] for name in names if name in files and name not in self._checked})
        self._checked.update(names)


def open_features(path: Path, split: str) -> FeatureSet:
    """Opens one split of a feature directory, or several as one: "train+val" needs no files of its own.

    Raises:
        ValueError: no feature directory, another version, a damaged manifest, no such split, torn labels.
    """
    manifest = read_feature_manifest(path)
    if split not in manifest.splits:
        parts = parts_of(split)
        if missing := [part for part in parts if part not in manifest.splits]:
            raise InputError(f"{path} has no split {missing[0]!r}; it has {', '.join(manifest.splits)}")
        return _joined(path, manifest, [open_features(path, part) for part in parts])
    name = f"{split}/labels.npy"
    check_files(path, {name: manifest.files[name]} if name in manifest.files else {})
    labels = _open_array(path / name, np.dtype("<i8"), (manifest.splits[split].n_images,))
    return FeatureSet(path, split, manifest, np.asarray(labels))


def _joined(path: Path, manifest: FeatureManifest, parts: list[FeatureSet]) -> FeatureSet:
    masked = [part for part in parts if part.mask_draws]
    if 0 < len(masked) < len(parts):
        whole = next(part.split for part in parts if not part.mask_draws)
        raise InputError(f"{path} has whole images of {whole} and masked images of {masked[0].split}, which do not go together")
    labels = np.concatenate([part.labels for part in parts])
    return FeatureSet(path, "+".join(part.split for part in parts), manifest, labels, tuple(parts))


def _open_array(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = read_npy(file, "features", EXTRACT_AGAIN, mapped=True)
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{file} holds {array.dtype} {list(array.shape)}, the manifest says {dtype} {list(shape)}; {EXTRACT_AGAIN}"
        )
    return array
