"""The feature directory: an array for each layer, kind and split, memory-mapped on both sides; written and read here alone.

    manifest.json                             what the features are of, and what a reader must check
    {split}/labels.npy                        int64 [N]
    {split}/layer_{l:02d}_{kind}.npy          [N, C], float32 or float16
    {split}/layer_{l:02d}_{kind}_mask{m}.npy  the same of images seen through their m-th mask (bert models, paper 4.6)

Kinds: "normed", "raw" and "pixels", see features. A directory appears whole under its name. Until then it is NAME.partial, with
the number of images done in progress.json, and a writer of the same features goes on there. A part of n is a directory
NAME.part-I-of-N with its share of the rows; `merge` makes one of them all.

In: what features extracts, values by rows. Out: a `FeatureSet` for the probes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.files import atomic_dir, fsync_path, read_json, write_json

FORMAT, VERSION = "igpt_ds.features", 2
PART_FORMAT = "igpt_ds.features.part"
DTYPES = {"fp32": "<f4", "fp16": "<f2"}
_AGAIN = "make them again with tools/extract_features.py"
_COPY_BYTES = 1 << 26


@dataclass(frozen=True)
class Origin:
    """What the features are of; goes into the manifest as it is."""

    weights: str  # "trained", "untrained" or "pixels"
    palette_hash: str
    pooling: str = "mean"  # over positions; "none" for pixels
    model_hash: str | None = None  # sha256 of model.safetensors; of the drawn tensors, where they are untrained
    objective: str | None = None
    step: int | None = None  # that the model was trained to
    seed: int | None = None  # that untrained weights were drawn with
    precision: str = "fp32"  # of the matrix products
    dtype: str = "fp32"  # of the files
    model: dict[str, Any] | None = None  # its shape
    mask_prob: float | None = None  # where images are masked
    mask_seed: int | None = None


Place = tuple[int, str, int | None]  # layer, kind, and the number of the mask where images are masked


def places(manifest: dict[str, Any], split: str) -> list[Place]:
    """The arrays of a split."""
    draws = manifest["splits"][split]["mask_draws"]
    masks: list[int | None] = list(range(draws)) if draws else [None]
    return [(layer, kind, mask) for layer in manifest["layers"] for kind in manifest["kinds"] for mask in masks]


def array_bytes(manifest: dict[str, Any]) -> int:
    """The size of the arrays that a manifest promises, in bytes, without their headers."""
    rows = sum(about["n_images"] * len(places(manifest, split)) for split, about in manifest["splits"].items())
    return rows * int(manifest["n_features"]) * np.dtype(DTYPES[manifest["dtype"]]).itemsize


def _file(split: str, place: Place) -> str:
    layer, kind, mask = place
    return f"{split}/layer_{layer:02d}_{kind}{'' if mask is None else f'_mask{mask}'}.npy"


def part_dir(out: Path, part: tuple[int, int]) -> Path:
    """Where part (i, n) of the features `out` is written; `out` itself for the whole."""
    return out if part == (0, 1) else out.with_name(f"{out.name}.part-{part[0]}-of-{part[1]}")


class Writer:
    """The features of `manifest` on their way into the directory `target`; `done` says how many rows of each split are there.

    Raises:
        ValueError: `target` exists, or TARGET.partial holds the beginning of other features.
    """

    def __init__(self, target: Path, manifest: dict[str, Any]) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target} exists already; choose another name or remove it")
        self.target, self.manifest = target, manifest
        self.path = target.with_name(f"{target.name}.partial")
        self._progress = self.path / "progress.json"
        self.done: dict[str, int] = dict.fromkeys(manifest["splits"], 0)
        if self._progress.exists():
            self._resume()
        else:
            shutil.rmtree(self.path, ignore_errors=True)  # a writer was killed before its first row
            self._create()
        self._split, self._files = "", dict[Place, np.ndarray]()  # of one split at a time: each map holds a file open

    def _create(self) -> None:
        dtype, width = np.dtype(DTYPES[self.manifest["dtype"]]), self.manifest["n_features"]
        for split, about in self.manifest["splits"].items():
            (self.path / split).mkdir(parents=True)
            for place in places(self.manifest, split):
                np.lib.format.open_memmap(self.path / _file(split, place), "w+", dtype, (about["n_images"], width))
        write_json(self._progress, {"manifest": self.manifest, "done": self.done})

    def _resume(self) -> None:
        known = read_json(self._progress, "progress of features")
        other = [name for name, value in self.manifest.items() if known["manifest"].get(name) != value]
        if other:
            was, now = known["manifest"].get(other[0]), self.manifest[other[0]]
            raise ValueError(
                f"{self.path} holds the beginning of other features: {other[0]} is {was} there and {now} here; remove it"
            )
        self.done = known["done"]

    def write(self, split: str, start: int, place: Place, values: np.ndarray) -> None:
        """Rows start .. start + len(values) of one array; values that its dtype cannot hold are the caller's to refuse."""
        if split != self._split:
            names = places(self.manifest, split)
            self._files = {name: np.load(self.path / _file(split, name), mmap_mode="r+") for name in names}
            self._split = split
        self._files[place][start : start + len(values)] = values

    def save(self, split: str, done: int) -> None:
        """Forces to disk what was written of the split; from here a killed writer goes on."""
        for file in self._files.values():
            if isinstance(file, np.memmap):
                file.flush()
        self.done[split] = done
        write_json(self._progress, {"manifest": self.manifest, "done": self.done})

    def finish(self, labels: dict[str, np.ndarray]) -> None:
        """Gives the directory its name; labels int64 [N] for each split."""
        assert self.done == {split: about["n_images"] for split, about in self.manifest["splits"].items()}
        for split, values in labels.items():
            np.save(self.path / split / "labels.npy", values.astype("<i8"))
        write_json(self.path / "manifest.json", self.manifest)
        self._progress.unlink()
        for file in (self.path, *self.path.rglob("*")):
            fsync_path(file)
        if self.target.exists():
            self.target.rmdir()
        self.path.replace(self.target)
        fsync_path(self.target.parent)

    def give_up(self) -> None:
        """Removes what holds no row; rows that are there stay for the next writer."""
        if not any(self.done.values()):
            shutil.rmtree(self.path, ignore_errors=True)


def merge(out: Path, parts: int) -> dict[str, Any]:
    """Makes `out` of its parts, byte for byte what one writer would have made, removes them, and returns the manifest.

    Raises:
        ValueError: `out` exists; a part is missing, unfinished or of other features.
    """
    directories = [part_dir(out, (i, parts)) for i in range(parts)]
    manifests = [_part_manifest(directory) for directory in directories]
    manifest, rows = (
        manifests[0] | {"format": FORMAT, "splits": manifests[0]["part"]["of"]},
        dict.fromkeys(manifests[0]["splits"], 0),
    )
    del manifest["part"]
    for directory, part in zip(directories, manifests, strict=True):
        different = [name for name in manifest if name not in ("format", "splits") and part.get(name) != manifest[name]]
        if different or part["part"] != {"of": manifest["splits"], "rows_before": rows}:
            what = different[0] if different else "the share of images"
            raise ValueError(f"{directory} does not go with {directories[0]}: {what} differs; {_AGAIN}")
        rows = {split: rows[split] + about["n_images"] for split, about in part["splits"].items()}
    with atomic_dir(out) as partial:
        for split in manifest["splits"]:
            (partial / split).mkdir()
            for name in ("labels.npy", *(Path(_file(split, place)).name for place in places(manifest, split))):
                _concatenate([directory / split / name for directory in directories], partial / split / name)
        write_json(partial / "manifest.json", manifest)
    for directory in directories:
        shutil.rmtree(directory)
    return manifest


def _part_manifest(directory: Path) -> dict[str, Any]:
    if not (directory / "manifest.json").is_file():
        state = "is not finished" if directory.with_name(f"{directory.name}.partial").exists() else "does not exist"
        raise ValueError(f"part {directory} {state}; extract it with --part, and merge then")
    manifest = read_json(directory / "manifest.json", "feature manifest")
    if (manifest.get("format"), manifest.get("version")) != (PART_FORMAT, VERSION):
        raise ValueError(f"{directory / 'manifest.json'} is not {PART_FORMAT} version {VERSION}; {_AGAIN}")
    return dict(manifest)


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
    """One split of a feature directory. `manifest` is the whole manifest."""

    path: Path
    split: str
    manifest: dict[str, Any]
    labels: np.ndarray  # int64 [N]

    @property
    def layers(self) -> list[int]:
        """The layers that are there, rising."""
        return list(self.manifest["layers"])

    @property
    def kinds(self) -> list[str]:
        """The kinds that are there."""
        return list(self.manifest["kinds"])

    @property
    def classes(self) -> list[str]:
        """The names that labels stand for."""
        return list(self.manifest["classes"])

    @property
    def dataset_hash(self) -> str:
        """Of the split that the features are of."""
        return str(self.manifest["splits"][self.split]["dataset_hash"])

    @property
    def mask_draws(self) -> int:
        """Through how many masks each image was seen; 0: whole."""
        return int(self.manifest["splits"][self.split]["mask_draws"])

    def layer(self, layer: int, kind: str, mask: int = 0) -> np.ndarray:
        """The features of one layer: a read-only memory map [N, C], float32 or float16 as they were written.

        Args:
            mask: the number of the mask, where images are masked.

        Raises:
            ValueError: the layer, the kind or the mask is not there, or the file is torn.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind {kind!r} is not there; the features hold {', '.join(self.kinds)}, from {self.path}")
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not there; the features hold layers {span(self.layers)}, from {self.path}")
        if not 0 <= mask < max(1, self.mask_draws):
            raise ValueError(f"mask {mask} is not there; split {self.split!r} of {self.path} has {self.mask_draws} mask draws")
        file = self.path / _file(self.split, (layer, kind, mask if self.mask_draws else None))
        return _open_array(file, DTYPES[self.manifest["dtype"]], (len(self.labels), self.manifest["n_features"]))


def open_features(path: Path, split: str) -> FeatureSet:
    """Opens one split of a feature directory.

    Raises:
        ValueError: no feature directory, another version, a damaged manifest, no such split, torn labels.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path} is no feature directory: it has no manifest.json; make one with tools/extract_features.py")
    manifest = read_json(file, "feature manifest")
    if isinstance(manifest, dict) and manifest.get("format") == PART_FORMAT:
        raise ValueError(f"{path} is a part of features; merge the parts with tools/extract_features.py --merge first")
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"feature manifest {file} is not {FORMAT} version {VERSION}; {_AGAIN}")
    names = ("layers", "kinds", "n_features", "splits", "classes", *Origin.__annotations__)
    if missing := [name for name in names if name not in manifest]:
        raise ValueError(f"feature manifest {file} has no {missing[0]!r}; {_AGAIN}")
    if split not in manifest["splits"]:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    labels = _open_array(path / split / "labels.npy", "<i8", (manifest["splits"][split]["n_images"],))
    return FeatureSet(path, split, manifest, np.asarray(labels))


def _open_array(file: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is missing or torn ({str(error).splitlines()[0]}); {_AGAIN}") from None
    if array.shape != shape or array.dtype != np.dtype(dtype):
        found = f"{array.dtype} {list(array.shape)}, the manifest says {np.dtype(dtype)} {list(shape)}"
        raise ValueError(f"{file} holds {found}; {_AGAIN}")
    return array


def span(layers: Sequence[int]) -> str:
    """Layers in words: "0..8" where none is left out, else "0, 4, 8"."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole else ", ".join(map(str, layers))
