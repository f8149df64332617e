"""Extraction: writes the features of every image of some shards into a feature directory, in one process or in parts.

Batches do not depend on the process that computes them. Merged parts, and a killed run that continues, have the bytes of one run.

In: a network and shards. Out: a feature directory, see `files.py`. Called by `tools/extract_features.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt_ds.console import duration
from igpt_ds.data.shards.dataset import ImageSet
from igpt_ds.data.shards.layout import WHOLE, Part
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.addition import add_splits, addition_dir, new_splits
from igpt_ds.evaluate.features.files import FeatureWriter, part_dir
from igpt_ds.evaluate.features.manifest import KINDS, FeatureManifest, FeatureSplit, Origin, PartOf, span
from igpt_ds.evaluate.features.network import LayerMeans, Network, check_layers
from igpt_ds.evaluate.probes.settings import N_MASKS
from igpt_ds.model.objectives import draw_of_masks

_SAVE_SECONDS = 30.0
_FP16_MAX = float(np.finfo(np.float16).max)

ReadMeans = Callable[[ImageSet, np.ndarray, "int | None"], LayerMeans]  # shards, ids, number of the mask -> features


@dataclass(frozen=True)
class Extraction:
    """What is extracted of each image, and by which part of the work."""

    layers: Sequence[int] | None = None  # None: all
    kinds: Sequence[str] = KINDS
    dtype: str = "fp32"  # of the files
    mask_draws: Sequence[int] | None = None  # masks of each image, one number or one for each shard set; see `masks_of`
    mask_seed: int = 0
    at_once: int | None = None  # images for which a block is read once; None: the network's batch
    part: Part = WHOLE  # the share of the images that this call writes, for `merge_parts`


def extract(
    out: Path,
    shard_sets: Sequence[ImageSet],
    network: Network,
    origin: Origin,
    wanted: Extraction | None = None,
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes the features of every image of the shard sets.

    A directory of the same features gets the splits that it lacks. A call with the same arguments continues a killed call.
    Activations are averaged in float32. The batch size changes nothing but the rounding.

    Args:
        wanted: None extracts every layer and kind of whole images.
        report: is called with the size and the expected duration before the first image is written.

    Raises:
        ValueError: an argument is out of range, activations are not finite or too large for fp16, or `out` exists and holds
            other features or these splits.
    """
    wanted = wanted or Extraction()
    draws = masks_of([shards.split for shards in shard_sets], wanted.mask_draws, origin.objective)
    layers, step = check_layers(wanted.layers, network.model.config.n_layer), wanted.at_once or network.batch
    origin = replace(origin, precision=network.precision, dtype=wanted.dtype)
    origin = replace(origin, mask_seed=wanted.mask_seed) if any(draws) else replace(origin, mask_prob=None, mask_seed=None)

    def read(shards: ImageSet, ids: np.ndarray, draw: int | None) -> LayerMeans:
        mask = None if draw is None else draw_of_masks(wanted.mask_seed, ids, draw, shards.n_px**2, origin.mask_prob)
        return network.pooled(shards.tokens(ids), layers, wanted.kinds, mask)

    manifest = _manifest(shard_sets, draws, origin, layers, wanted.kinds, network.model.config.n_embd)
    _write(out, manifest, shard_sets, read, step, wanted.part, report)


def masks_of(splits: Sequence[str], given: Sequence[int] | None, objective: str | None) -> list[int]:
    """The number of masks that each image of each split is seen through; 0: whole images.

    Args:
        given: one number, or one for each split; None: for a bert model one mask of images to fit on and N_MASKS of images to
            evaluate on (paper 4.6), for others none.

    Raises:
        ValueError: the numbers do not go with the splits, or with the objective.
    """
    if given is None:
        fitted = ("train", "images")  # beginnings of names
        return [0 if objective != "bert" else 1 if split.startswith(fitted) else N_MASKS for split in splits]
    draws = list(given) * (len(splits) if len(given) == 1 else 1)
    if len(draws) != len(splits) or min(draws) < 0:
        raise InputError(f"--mask_draws {' '.join(map(str, given))} must be one number, or one for each split, and at least 0")
    if any(draws) and objective != "bert":
        raise InputError(f"--mask_draws {max(draws)}: this model is {objective!r}; only bert models see masked images")
    return draws


def extract_pixels(
    out: Path,
    shard_sets: Sequence[ImageSet],
    batch: int = 256,
    dtype: str = "fp32",
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes the palette colours of every image, [N, 3 T] in [-1, 1]: the input of a probe without a model."""
    colors = shard_sets[0].palette.colors

    def read(shards: ImageSet, ids: np.ndarray, draw: int | None) -> LayerMeans:
        return {(0, "pixels"): colors[shards.tokens(ids)].reshape(len(ids), -1)}

    origin = Origin("pixels", shard_sets[0].palette_hash, "none", dtype=dtype)
    manifest = _manifest(shard_sets, [0] * len(shard_sets), origin, [0], ["pixels"], 3 * shard_sets[0].n_px ** 2)
    _write(out, manifest, shard_sets, read, batch, WHOLE, report)


def _manifest(
    shard_sets: Sequence[ImageSet], draws: Sequence[int], origin: Origin, layers: list[int], kinds: Sequence[str], n_features: int
) -> FeatureManifest:
    """The manifest of the whole."""
    splits = {
        shards.split: FeatureSplit(shards.n_images, shards.dataset_hash, count)
        for shards, count in zip(shard_sets, draws, strict=True)
    }
    first = shard_sets[0]
    return FeatureManifest(
        origin=origin,
        dataset=first.name,
        layers=layers,
        kinds=list(kinds),
        n_features=n_features,
        splits=splits,
        classes=list(first.classes),
    )


@dataclass
class _Job:
    """The share of one process: the images of each shard set, the writer, and the function that computes their features."""

    writer: FeatureWriter
    shares: dict[ImageSet, range]
    read: ReadMeans
    step: int
    name: Path  # of the directory, in reports

    def announce(self, report: Callable[[str], None]) -> None:
        """Reports the size, and the speed of a trial of one step."""
        manifest, images = self.writer.manifest, sum(len(share) for share in self.shares.values())
        draws = ", ".join(f"{split} {about.mask_draws}" for split, about in manifest.splits.items())
        masks = f", masks of each image: {draws}" if manifest.origin.objective == "bert" else ""
        features = f"layers {span(manifest.layers)}, {' and '.join(manifest.kinds)}, {manifest.n_features} features{masks}"
        size = f"{manifest.array_bytes / 2**20:.1f} MiB in {manifest.origin.dtype}"
        report(f"{self.name}: {images} images, {features}, {size}")
        done = sum(self.writer.done.values())
        if done:
            report(f"{self.name}: {done} images are finished already")
        shards, share = next(iter(self.shares.items()))
        ids, seconds = np.asarray(share)[: self.step], 0.0
        for _ in range(2):  # the first call warms up
            start = time.perf_counter()
            self.read(shards, ids, self._masks(shards)[0])
            seconds = time.perf_counter() - start
        passes = sum(len(share) * len(self._masks(shards)) for shards, share in self.shares.items()) * (1 - done / images)
        rate = len(ids) / seconds
        report(f"{self.name}: about {rate:.1f} images/s, {duration(passes / rate)}")

    def _masks(self, shards: ImageSet) -> list[int | None]:
        return list(dict.fromkeys(mask for _, _, mask in self.writer.manifest.places(shards.split)))

    def run(self) -> None:
        """Writes the features of the unfinished images."""
        done = self.writer.done
        total = sum(len(share) for share in self.shares.values())
        with tqdm(total=total, initial=sum(done.values()), unit=" images", desc="features", leave=False, disable=None) as bar:
            for shards, share in self.shares.items():
                saved = time.monotonic()
                for first in range(done[shards.split], len(share), self.step):
                    ids = np.asarray(share[first : first + self.step])
                    for mask in self._masks(shards):
                        self._write(shards, first, mask, self.read(shards, ids, mask))
                    bar.update(len(ids))
                    if time.monotonic() - saved > _SAVE_SECONDS or first + len(ids) == len(share):
                        self.writer.save(shards.split, first + len(ids))
                        saved = time.monotonic()
        mine = {shards: np.asarray(share) for shards, share in self.shares.items()}
        labels = {shards.split: shards.labels(some) for shards, some in mine.items()}
        self.writer.finish(labels, {shards.split: shards.keys_of(some) for shards, some in mine.items()})

    def _write(self, shards: ImageSet, first: int, mask: int | None, means: LayerMeans) -> None:
        half = self.writer.manifest.origin.dtype == "fp16"
        for (layer, kind), array in means.items():
            if not np.isfinite(array).all():
                raise InputError(f"layer {layer} is not finite for images of {shards.path}; check the model, or use fp32")
            if half and (most := float(np.abs(array).max())) > _FP16_MAX:
                raise InputError(f"layer {layer} {kind} reaches {most:.3g}, more than float16 holds; use --dtype fp32")
            self.writer.write(shards.split, first, (layer, kind, mask), array)


def _write(
    out: Path,
    whole: FeatureManifest,
    shard_sets: Sequence[ImageSet],
    read: ReadMeans,
    step: int,
    part: Part,
    report: Callable[[str], None] | None,
) -> None:
    if step < 1:
        raise InputError(f"--batch {step} must be at least 1")
    if left := new_splits(out, whole):
        if report and len(left) < len(shard_sets):
            report(f"{out}: {' and '.join(split for split in whole.splits if split not in left)} there already")
        whole = replace(whole, splits={split: whole.splits[split] for split in left})
        shard_sets = [shards for shards in shard_sets if shards.split in left]
    target = addition_dir(out, left) if left and part == WHOLE else part_dir(out, part)
    shares = {shards: _share(shards, step, part) for shards in shard_sets}
    for shards in shard_sets:
        shards.keys_of(np.zeros(1, dtype=np.int64))  # a damaged file of keys is refused before the work
    manifest = whole if part == WHOLE else _of_part(whole, {shards.split: share for shards, share in shares.items()})
    job = _Job(FeatureWriter(target, manifest), shares, read, step, out if part == WHOLE else target)
    try:
        if report:
            job.announce(report)
        job.run()
    except BaseException:
        job.writer.give_up()
        raise
    if target not in (out, part_dir(out, part)):
        add_splits(out, target)


def _share(shards: ImageSet, step: int, part: Part) -> range:
    """The images of part i of n: whole steps, as equal as possible."""
    part.check()
    steps = -(-shards.n_images // step)
    if part.n > steps:
        raise InputError(f"{shards.n_images} images of {shards.split} are {steps} steps of {step}, not {part.n}; use fewer parts")
    return range(part.i * steps // part.n * step, min((part.i + 1) * steps // part.n * step, shards.n_images))


def _of_part(whole: FeatureManifest, shares: dict[str, range]) -> FeatureManifest:
    """The manifest of a part that holds these images of each split."""
    own = {split: replace(whole.splits[split], n_images=len(share)) for split, share in shares.items()}
    return replace(whole, splits=own, part=PartOf(whole.splits, {split: share.start for split, share in shares.items()}))
