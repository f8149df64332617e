"""Extraction: the features of every image of some shards go into a feature directory, by one process or by parts, restartably.

Batches are the same whoever computes them, so parts merged, or a run killed and continued, give the bytes of one run.

In: a network and shards. Out: a feature directory, see files.py. Called by `tools/extract_features.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.features.files import FORMAT, PART_FORMAT, VERSION, Origin, Writer, array_bytes, part_dir, places, span
from igpt_ds.evaluate.features.network import KINDS, Network, Values, check_layers
from igpt_ds.model.objectives import draw_masks

_SAVE_SECONDS = 30.0
_FP16_MAX = float(np.finfo(np.float16).max)

Read = Callable[[ShardSet, np.ndarray, "int | None"], Values]  # shards, ids, number of the mask -> values


def extract(
    out: Path,
    shard_sets: Sequence[ShardSet],
    network: Network,
    origin: Origin,
    *,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] = KINDS,
    dtype: str = "fp32",
    mask_draws: Sequence[int] = (0,),
    mask_seed: int = 0,
    at_once: int | None = None,
    part: tuple[int, int] = (0, 1),
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes the features of every image of the shard sets, at every layer asked for (all for None).

    What a killed call left behind is continued by a call with the same arguments. Activations are averaged in float32; the batch
    size changes nothing but the rounding.

    Args:
        mask_draws: for each shard set, or for all, through how many masks each image is seen; 0: whole. Bert models alone.
        at_once: images for which a block is read once; the network's batch when None.
        part: (i, n) writes the i-th of n shares of the images, for `files.merge`.
        report: is told what will be written and how fast, before anything is.

    Raises:
        ValueError: an argument without sense, activations that are not finite or too large for fp16, `out` exists.
    """
    draws = list(mask_draws) * (len(shard_sets) if len(mask_draws) == 1 else 1)
    if len(draws) != len(shard_sets) or min(draws) < 0:
        raise ValueError(f"--mask_draws {' '.join(map(str, mask_draws))} must be one number, or one for each split, from 0 on")
    if any(draws) and origin.objective != "bert":
        raise ValueError(f"--mask_draws {max(draws)}: this model is {origin.objective!r}; only bert models see masked images")
    wanted, step = check_layers(layers, network.model.config.n_layer), at_once or network.batch
    masked = {"mask_prob": origin.mask_prob, "mask_seed": mask_seed} if any(draws) else {"mask_prob": None, "mask_seed": None}
    about = replace(origin, precision=network.precision, dtype=dtype, **masked)

    def values(shards: ShardSet, ids: np.ndarray, draw: int | None) -> Values:
        mask = None
        if draw is not None:
            numbers = ids + (draw << 40)  # each draw is of its own images, as it were
            mask = draw_masks(mask_seed, numbers, shards.n_px**2, cast(float, origin.mask_prob))
        return network.pooled(shards.tokens(ids), wanted, kinds, mask)

    shape = {"layers": wanted, "kinds": list(kinds), "n_features": network.model.config.n_embd}
    _write(out, asdict(about) | shape, dict(zip(shard_sets, draws, strict=True)), values, step, part, report)


def extract_pixels(
    out: Path,
    shard_sets: Sequence[ShardSet],
    batch: int = 256,
    dtype: str = "fp32",
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes the palette colours of every image, [N, 3 T] in [-1, 1]: what a probe sees without any model."""
    colors = shard_sets[0].palette.colors

    def values(shards: ShardSet, ids: np.ndarray, draw: int | None) -> Values:
        return {(0, "pixels"): colors[shards.tokens(ids)].reshape(len(ids), -1)}

    about = asdict(Origin("pixels", shard_sets[0].palette_hash, "none", dtype=dtype))
    shape = {"layers": [0], "kinds": ["pixels"], "n_features": 3 * shard_sets[0].n_px ** 2}
    _write(out, about | shape, dict.fromkeys(shard_sets, 0), values, batch, report=report)


@dataclass
class _Job:
    """The share of one process: which images of which shards, where they go, and how their features are computed."""

    writer: Writer
    shares: dict[ShardSet, range]
    read: Read
    step: int

    def announce(self, report: Callable[[str], None]) -> None:
        """Says how much will be written, and how fast by a trial of one step."""
        manifest, images = self.writer.manifest, sum(len(share) for share in self.shares.values())
        kinds, layers, width = " and ".join(manifest["kinds"]), span(manifest["layers"]), manifest["n_features"]
        draws = max(about["mask_draws"] for about in manifest["splits"].values())
        masks = f", {draws} mask draws" if draws else ""
        what = f"{images} images, layers {layers}, {kinds}, {width} features{masks}"
        report(f"{self.writer.target}: {what}, {array_bytes(manifest) / 2**20:.1f} MiB in {manifest['dtype']}")
        done = sum(self.writer.done.values())
        if done:
            report(f"{self.writer.target}: {done} images are there already")
        shards, share = next(iter(self.shares.items()))
        ids, seconds = np.asarray(share)[: self.step], 0.0
        for _ in range(2):  # the first call warms up
            start = time.perf_counter()
            self.read(shards, ids, self._masks(shards)[0])
            seconds = time.perf_counter() - start
        passes = sum(len(share) * len(self._masks(shards)) for shards, share in self.shares.items()) * (1 - done / images)
        rate = len(ids) / seconds
        report(f"{self.writer.target}: about {rate:.1f} images/s, {passes / rate / 60:.1f} minutes")

    def _masks(self, shards: ShardSet) -> list[int | None]:
        return list(dict.fromkeys(mask for _, _, mask in places(self.writer.manifest, shards.split)))

    def run(self) -> None:
        """Writes what is not there yet."""
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
        self.writer.finish({shards.split: shards.labels(np.asarray(share)) for shards, share in self.shares.items()})

    def _write(self, shards: ShardSet, first: int, mask: int | None, values: Values) -> None:
        half = self.writer.manifest["dtype"] == "fp16"
        for (layer, kind), array in values.items():
            if not np.isfinite(array).all():
                raise ValueError(f"layer {layer} is not finite for images of {shards.path}; check the model, or use fp32")
            if half and (most := float(np.abs(array).max())) > _FP16_MAX:
                raise ValueError(f"layer {layer} {kind} reaches {most:.3g}, more than float16 holds; use --dtype fp32")
            self.writer.write(shards.split, first, (layer, kind, mask), array)


def _write(
    out: Path,
    about: dict[str, Any],
    draws: dict[ShardSet, int],
    read: Read,
    step: int,
    part: tuple[int, int] = (0, 1),
    report: Callable[[str], None] | None = None,
) -> None:
    if step < 1:
        raise ValueError(f"--batch {step} must be at least 1")
    shares = {shards: _share(shards, step, part) for shards in draws}
    job = _Job(Writer(part_dir(out, part), _manifest(about, draws, shares, part)), shares, read, step)
    try:
        if report:
            job.announce(report)
        job.run()
    except BaseException:
        job.writer.give_up()
        raise


def _share(shards: ShardSet, step: int, part: tuple[int, int]) -> range:
    """The i-th of n runs of whole steps of images, as equal as they can be."""
    i, n = part
    if not 0 <= i < n:
        raise ValueError(f"part {i}/{n} does not exist; the first of n is 0/n, the last n-1/n")
    steps = -(-shards.n_images // step)
    if n > steps:
        raise ValueError(f"{shards.n_images} images of {shards.split} are {steps} steps of {step}, not {n}; use fewer parts")
    return range(i * steps // n * step, min((i + 1) * steps // n * step, shards.n_images))


def _manifest(
    about: dict[str, Any], draws: dict[ShardSet, int], shares: dict[ShardSet, range], part: tuple[int, int]
) -> dict[str, Any]:
    first = next(iter(draws))
    splits = {
        shards.split: {"n_images": shards.n_images, "dataset_hash": shards.dataset_hash, "mask_draws": count}
        for shards, count in draws.items()
    }
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": first.name,
        **about,
        "splits": splits,
        "classes": list(first.classes),
    }
    if part == (0, 1):
        return whole
    own = {shards.split: splits[shards.split] | {"n_images": len(share)} for shards, share in shares.items()}
    before = {shards.split: share.start for shards, share in shares.items()}
    return whole | {"format": PART_FORMAT, "splits": own, "part": {"of": splits, "rows_before": before}}
