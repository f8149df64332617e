"""The feature directory: an array for each layer, kind and split, read as memory maps. It is written and read only here.

    manifest.json                             what the features are of, and what a reader must check (`manifest.py`)
    {split}/labels.npy                        int64 [N]
    {split}/layer_{l:02d}_{kind}.npy          [N, C], float32 or float16
    {split}/layer_{l:02d}_{kind}_mask{m}.npy  the same for images seen through their m-th mask (bert models, paper 4.6)

Kinds: "normed", "raw" and "pixels", see `network.py`. A directory gets its name when it is complete. Before that it is
NAME.partial, with the number of finished images in progress.json, and a writer of the same features continues there. Part i of n
is the directory NAME.part-I-of-N with its share of the rows; `merge_parts` makes one directory of all parts.

In: values by rows, from `extract.py`. Out: a `FeatureSet` for the probes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from igpt_ds.cli import FinishedError
from igpt_ds.data.shards.layout import WHOLE, Part
from igpt_ds.evaluate.features.manifest import EXTRACT_AGAIN, FeatureManifest, FeaturePlace, PartOf, read_feature_manifest, span
from igpt_ds.files import atomic_dir, move_dir, read_json, remove, reserved, write_json
from igpt_ds.schema import record_from

_COPY_BYTES = 1 << 26


def _file(split: str, place: FeaturePlace) -> str:
    layer, kind, mask = place
    return f"{split}/layer_{layer:02d}_{kind}{'' if mask is None else f'_mask{mask}'}.npy"


def part_dir(out: Path, part: Part) -> Path:
    """Where a part of the features `out` is written; `out` itself for the whole."""
    return out if part == WHOLE else out.with_name(f"{out.name}.part-{part.i}-of-{part.n}")


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
        self.path = target.with_name(f"{target.name}.partial")
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
        self._split, self._files = (
            "",
            dict[FeaturePlace, np.ndarray](),
        )  # of one split at a time, because each map holds a file open

    def _create(self) -> None:
        for split, about in self.manifest.splits.items():
            (self.path / split).mkdir(parents=True)
            for place in self.manifest.places(split):
                shape = (about.n_images, self.manifest.n_features)
                np.lib.format.open_memmap(self.path / _file(split, place), "w+", self.manifest.array_dtype, shape)
        self._save_progress()

    def _save_progress(self) -> None:
        write_json(self._progress, {"manifest": self.manifest.to_dict(), "done": self.done})

    def _resume(self) -> None:
        what, fix = f"progress of features {self._progress}", f"remove {self.path}"
        if self._progress.exists():
            values = read_json(self._progress, "progress of features")
        else:  # a writer was killed in `finish`, when all rows were there
            complete = {split: about.n_images for split, about in self.manifest.splits.items()}
            values = {"manifest": read_json(self.path / "manifest.json", "manifest of features"), "done": complete}
        known = record_from(_Progress, values, what, fix)
        for name, value in self.manifest.to_dict().items():
            if (was := known.manifest.get(name)) != value:
                raise ValueError(
                    f"{self.path} holds the beginning of other features: {name} is {was} there and {value} here; {fix}"
                )
        for split, about in self.manifest.splits.items():
            if not 0 <= (done := known.done.get(split, -1)) <= about.n_images:
                raise ValueError(f"{what} has done.{split} {done}, not 0..{about.n_images}; {fix}")
            self.done[split] = done

    def write(self, split: str, start: int, place: FeaturePlace, values: np.ndarray) -> None:
        """Writes rows start .. start + len(values) of one array. The caller refuses values that the dtype cannot hold."""
        if split != self._split:
            names = self.manifest.places(split)
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

    def finish(self, labels: dict[str, np.ndarray]) -> None:
        """Gives the directory its name; labels int64 [N] for each split."""
        assert self.done == {split: about.n_images for split, about in self.manifest.splits.items()}
        for split, values in labels.items():
            np.save(self.path / split / "labels.npy", values.astype("<i8"))
        write_json(self.path / "manifest.json", self.manifest.to_dict())
        self._progress.unlink(missing_ok=True)
        move_dir(self.path, self.target)
        self._reserved.close()

    def give_up(self) -> None:
        """Removes a directory without finished rows. Finished rows stay for the next writer."""
        if not any(self.done.values()):
            shutil.rmtree(self.path, ignore_errors=True)
        self._reserved.close()


def merge_parts(out: Path, n: int) -> FeatureManifest:
    """Makes `out` of its n parts, byte for byte what one writer makes, removes the parts, and returns the manifest.

    Raises:
        ValueError: `out` exists; a part is missing, unfinished or has other features.
    """
    directories = [part_dir(out, Part(i, n)) for i in range(n)]
    try:
        with reserved(out):
            whole = _merge(out, directories)
            for directory in directories:
                shutil.rmtree(directory)
    except FinishedError:
        for directory in directories:
            remove(directory)
        raise
    return whole


def _merge(out: Path, directories: list[Path]) -> FeatureManifest:
    parts = [_part_manifest(directory) for directory in directories]
    assert parts[0].part is not None
    whole = replace(parts[0], splits=parts[0].part.of, part=None)
    rows = dict.fromkeys(whole.splits, 0)
    for directory, part in zip(directories, parts, strict=True):
        same = replace(part, splits=whole.splits, part=None).to_dict()
        different = [name for name, value in whole.to_dict().items() if same[name] != value]
        if different or part.part != PartOf(whole.splits, rows):
            what = different[0] if different else "the share of images"
            raise ValueError(
                f"{directory} and {directories[0]} are not parts of the same features: {what} differs; {EXTRACT_AGAIN}"
            )
        rows = {split: rows[split] + about.n_images for split, about in part.splits.items()}
    with atomic_dir(out) as partial:
        for split in whole.splits:
            (partial / split).mkdir()
            for name in ("labels.npy", *(Path(_file(split, place)).name for place in whole.places(split))):
                _concatenate([directory / split / name for directory in directories], partial / split / name)
        write_json(partial / "manifest.json", whole.to_dict())
    return whole


def _part_manifest(directory: Path) -> FeatureManifest:
    if not (directory / "manifest.json").is_file():
        state = "is not finished" if directory.with_name(f"{directory.name}.partial").exists() else "does not exist"
        raise ValueError(f"part {directory} {state}; extract it with --part before you merge")
    return read_feature_manifest(directory, part=True)


def _concatenate(sources: Sequence[Path], target: Path) -> None:
    arrays = [np.load(source, mmap_mode="r") for source in sources]
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    merged = np.lib.format.open_memmap(target, "w+", arrays[0].dtype, shape)
    start = 0
    for array in arrays:
        rows = max(1, _COPY_BYTES // max(1, array[:1].nbytes))
        for first in range(0, len(array), rows):
            piece = array[first : first + rows]
            merged[start : start + len(piece)] = piece
            start += len(piece)
    merged.flush()


@dataclass(frozen=True)
class FeatureSet:
    """One split of a feature directory. `manifest` is the manifest of the whole directory."""

    path: Path
    split: str
    manifest: FeatureManifest
    labels: np.ndarray  # int64 [N]

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
        return self.manifest.splits[self.split].dataset_hash

    @property
    def mask_draws(self) -> int:
        """The number of masks that each image is seen through; 0: whole images."""
        return self.manifest.splits[self.split].mask_draws

    def layer(self, layer: int, kind: str, mask: int = 0) -> np.ndarray:
        """The features of one layer: a read-only memory map [N, C], float32 or float16 as on disk.

        Args:
            mask: the number of the mask, if images are masked.

        Raises:
            ValueError: the layer, the kind or the mask does not exist, or the file is torn.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind {kind!r} does not exist; the features hold {', '.join(self.kinds)}, in {self.path}")
        if layer not in self.layers:
            raise ValueError(f"layer {layer} does not exist; the features hold layers {span(self.layers)}, in {self.path}")
        if not 0 <= mask < max(1, self.mask_draws):
            raise ValueError(f"mask {mask} does not exist; split {self.split!r} of {self.path} has {self.mask_draws} mask draws")
        file = self.path / _file(self.split, (layer, kind, mask if self.mask_draws else None))
        return _open_array(file, self.manifest.array_dtype, (len(self.labels), self.manifest.n_features))


def open_features(path: Path, split: str) -> FeatureSet:
    """Opens one split of a feature directory.

    Raises:
        ValueError: no feature directory, another version, a damaged manifest, no such split, torn labels.
    """
    manifest = read_feature_manifest(path)
    if split not in manifest.splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(manifest.splits)}")
    labels = _open_array(path / split / "labels.npy", np.dtype("<i8"), (manifest.splits[split].n_images,))
    return FeatureSet(path, split, manifest, np.asarray(labels))


def _open_array(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is missing or torn ({str(error).splitlines()[0]}); {EXTRACT_AGAIN}") from None
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{file} holds {array.dtype} {list(array.shape)}, the manifest says {dtype} {list(shape)}; {EXTRACT_AGAIN}"
        )
    return array
