"""The manifest of a feature directory: what the features are of, and what a reader must check. It is read and written only here.

In: manifest.json. Out: a `FeatureManifest`. `files.py` keeps it beside the arrays; probes and result rows use its fields. It has
the size and the sha256 of each array (not in version 2). A reader compares both when it opens an array for the first time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt_ds.errors import InputError
from igpt_ds.files import sha256_file
from igpt_ds.json_files import read_json
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

KINDS = ("normed", "raw")  # of features: after the layer norm of the next block, and before it
PRECISIONS = ("fp32", "bf16")  # of the network
DTYPES = {"fp32": "<f4", "fp16": "<f2"}
EXTRACT_AGAIN = "make the features again with tools/extract_features.py"
FEATURES = Format("igpt_ds.features", "feature manifest", EXTRACT_AGAIN, version=3, sealed=3, oldest=2)
PART = replace(FEATURES, name="igpt_ds.features.part")

FeaturePlace = tuple[int, str, int | None]  # layer, kind, and the number of the mask if images are masked


@dataclass(frozen=True)
class Origin:
    """What the features are of: the model, its weights and the numerics."""

    weights: str  # "trained", "untrained" or "pixels"
    palette_hash: str
    pooling: str = "mean"  # over positions; "none" for pixels
    model_hash: str | None = None  # sha256 of model.safetensors, or of the drawn tensors if the weights are untrained
    objective: str | None = None
    step: int | None = None  # steps of pre-training
    seed: int | None = None  # of untrained weights
    precision: str = "fp32"  # of the matrix products
    dtype: str = "fp32"  # of the files
    model: dict[str, int | bool] | None = None  # the shape of the model
    mask_prob: float | None = None  # None: no image is masked
    mask_seed: int | None = None


@dataclass(frozen=True)
class FeatureSplit:
    """What the manifest says of one split."""

    n_images: int
    dataset_hash: str
    mask_draws: int  # masks that each image is seen through; 0: whole images


@dataclass(frozen=True)
class FeatureFile:
    """What the manifest says of one array."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartOf:
    """What the manifest of a part says of the whole."""

    of: dict[str, FeatureSplit]  # the splits of the whole
    rows_before: dict[str, int]  # rows of earlier parts, by split


@dataclass(frozen=True, kw_only=True)
class _Contents:
    dataset: str
    layers: list[int]  # rising
    kinds: list[str]
    n_features: int
    splits: dict[str, FeatureSplit]
    classes: list[str]
    part: PartOf | None = None  # None: the directory is the whole
    files: dict[str, FeatureFile] = field(default_factory=dict)  # by the path in the directory; empty in version 2


@dataclass(frozen=True, kw_only=True)
class FeatureManifest(_Contents):
    """What a feature directory holds: origin, dataset, layers, kinds, n_features, splits, classes, part, files."""

    origin: Origin

    def to_dict(self) -> dict[str, object]:
        """The fields of manifest.json."""
        values = asdict(self)
        origin, part, dataset = values.pop("origin"), values.pop("part"), values.pop("dataset")
        return {"dataset": dataset, **origin, **values, **({"part": part} if part else {})}

    def write(self, directory: Path) -> None:
        """Writes manifest.json, atomically."""
        (PART if self.part else FEATURES).write(directory / "manifest.json", self.to_dict())

    def places(self, split: str) -> list[FeaturePlace]:
        """The arrays of a split."""
        draws = self.splits[split].mask_draws
        masks: list[int | None] = list(range(draws)) if draws else [None]
        return [(layer, kind, mask) for layer in self.layers for kind in self.kinds for mask in masks]

    @property
    def array_dtype(self) -> np.dtype:
        """The dtype of the arrays."""
        return np.dtype(DTYPES[self.origin.dtype])

    @property
    def array_bytes(self) -> int:
        """The size of all arrays in bytes, without their headers."""
        rows = sum(about.n_images * len(self.places(split)) for split, about in self.splits.items())
        return rows * self.n_features * self.array_dtype.itemsize


def read_feature_manifest(directory: Path, part: bool = False) -> FeatureManifest:
    """The manifest of a feature directory, or of a part of one.

    Raises:
        ValueError: no manifest.json, another format or version, a field that is missing or has another type.
    """
    file, what = directory / "manifest.json", f"feature manifest {directory / 'manifest.json'}"
    if not file.is_file():
        raise InputError(f"{directory} is no feature directory: it has no manifest.json; make one with tools/extract_features.py")
    values = read_json(file, "feature manifest", EXTRACT_AGAIN)
    if isinstance(values, dict) and values.get("format") == PART.name and not part:
        raise InputError(f"{directory} is a part of features; merge the parts with tools/extract_features.py --merge first")
    values = (PART if part else FEATURES).opened(values, what)
    if missing := [one.name for one in fields(Origin) if one.name not in values]:
        raise InputError(f"{what} has no {missing[0]!r}; {EXTRACT_AGAIN}")
    origin, contents = record_from(Origin, values, what, EXTRACT_AGAIN), record_from(_Contents, values, what, EXTRACT_AGAIN)
    manifest = FeatureManifest(origin=origin, **vars(contents))
    if manifest.origin.dtype not in DTYPES:
        raise InputError(f"{what} has dtype {manifest.origin.dtype!r}, not one of {', '.join(DTYPES)}; {EXTRACT_AGAIN}")
    if not manifest.layers or (part and manifest.part is None):
        raise InputError(f"{what} has {'no part' if manifest.layers else 'layers [], not at least one layer'}; {EXTRACT_AGAIN}")
    return manifest


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, FeatureFile]:
    """The size and the sha256 of arrays, several at a time: sha256 releases the interpreter lock."""
    paths = {name: directory / name for name in names}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sums = dict(zip(paths, threads.map(sha256_file, paths.values()), strict=True))
    return {name: FeatureFile(path.stat().st_size, sums[name]) for name, path in paths.items()}


def check_files(directory: Path, files: dict[str, FeatureFile]) -> None:
    """Reads arrays and compares them with their size and sha256. 76 GB, the features of 60 layers, take a minute on one core.

    Raises:
        ValueError: an array is missing, torn or damaged; the first is named.
    """
    for name, entry in files.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if found != entry.bytes:
            raise InputError(f"{directory / name} is missing or torn: {found} bytes, expected {entry.bytes}; {EXTRACT_AGAIN}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sums = threads.map(sha256_file, [directory / name for name in files])
        bar = tqdm(sums, "check features", len(files), unit=" files", leave=False, disable=None if len(files) > 1 else True)
        for (name, entry), found_sum in zip(files.items(), bar, strict=True):
            if found_sum != entry.sha256:
                raise InputError(f"{directory / name} is damaged: its sha256 differs; {EXTRACT_AGAIN}")


def span(layers: Sequence[int]) -> str:
    """Rising layers in words: "0..8" if none is missing, else "0, 4, 8" or "0..3, 8"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
