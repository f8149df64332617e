"""The linear probe by SGD (paper 3.4, for ImageNet): momentum 0.9, a cosine, several learning rates at once.

In: a feature set, however much larger than memory. Out: an `SgdProbe`. Called by `tools/sgd_probe.py` and `tools/bench/probe.py`.

All rates see the same images in the same order, so one product serves the logits of all of them and one their gradients. Rates
are tried from large to small, as the paper does, a group at a time: the search ends with the group whose best rate is not its
smallest. A part of the training images, by default 4 % as the paper holds out of ImageNet (3.1), chooses the rate; then a fit on
all of them with that rate; only then the split that is reported. Whatever is drawn at random follows from its place alone
(`evaluate/probes/rows.py`), so that a probe that was interrupted goes on from its last checkpoint to the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.linear import check_labels, stratified_order, training_images
from igpt_ds.evaluate.probes.rows import BLOCK_BYTES, Blocks, FiniteRows, moments
from igpt_ds.evaluate.probes.sgd import MOMENTUM, Rows, Sgd, cosine, count
from igpt_ds.files import atomic_file

FORMAT, VERSION = "igpt_ds.sgd_probe", 2
RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # paper 3.4: 30, 10, 3, ...
HELD_OUT = 0.04  # of the training images: paper 3.1, for ImageNet
_MADE_WITH = ("model_hash", "precision", "dtype", "mask_prob", "mask_seed")  # what decides features of the same images


@dataclass(frozen=True)
class Settings:
    """How a probe is fitted. The paper gives no batch for probes; 1,000,000 steps of 128 are a hundred epochs of ImageNet."""

    steps: int = 1_000_000  # paper 3.4
    batch_images: int = 128
    seed: int = 0
    standardise: bool = False  # mean 0 and deviation 1 by the training images; the paper's rates suit features as they are
    views: int = 1  # neighbouring rows that show one image, as random crops do: they are held out together
    window_bytes: int = 1 << 30  # of features in memory; twice that while the next ones are read
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "window_bytes", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")


@dataclass(frozen=True)
class SgdProbe:
    """What one probe found. Accuracies lie in 0..1; those of `held_out_accuracies` belong to `rates`, and 0 means diverged."""

    layer: int
    kind: str
    train_split: str
    eval_split: str
    n_train: int  # rows of the last fit, held-out ones included
    n_eval: int
    n_features: int
    n_classes: int
    rate: float  # the chosen one
    rates: list[float]  # those that were tried
    grid_edge: str | None  # "low" or "high" when the best rate may lie outside of what was tried
    diverged: list[float]
    held_out_accuracies: list[float]
    held_out_accuracy: float
    train_accuracy: float
    accuracy: float
    steps: int
    batch_images: int
    momentum: float
    standardised: bool
    views: int
    seed: int
    precision: str = "fp32"


class _Fitting:
    """The fits of one probe, one after another, and the file that lets them go on.

    The file holds the accuracies of the groups that are done, and the weights of the one that is not.
    """

    def __init__(
        self,
        train: FeatureSet,
        evaluated: FeatureSet,
        layer: int,
        kind: str,
        settings: Settings,
        held_out: float,
        state: Path | None,
        save_every: int,
    ) -> None:
        self.values, self.settings, self.file, self.save_every = FiniteRows(train, layer, kind), settings, state, save_every
        self.n_classes = len(train.classes)
        self.labels = torch.from_numpy(np.array(train.labels)).to(settings.device)
        where = {"labels": train.dataset_hash, "n_classes": self.n_classes, "layer": layer, "kind": kind, "held_out": held_out}
        where |= {f"features' {name}": train.manifest[name] for name in _MADE_WITH} | {"eval_split": evaluated.split}
        where |= {"eval_split's hash": evaluated.dataset_hash, "mask_draws": [train.mask_draws, evaluated.mask_draws]}
        self.identity = {"format": FORMAT, "version": VERSION, **where, **asdict(settings)}
        self.saved: dict[str, Any] = self._open() if state is not None and state.exists() else {"done": {}}

    def _open(self) -> dict[str, Any]:
        assert self.file is not None
        try:
            saved = torch.load(self.file, map_location=self.settings.device, weights_only=True)
            theirs = saved["identity"]
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise ValueError(f"{self.file} is torn or not the state of a probe ({type(error).__name__}); remove it") from None
        changed = [name for name in self.identity if theirs.get(name) != self.identity[name]]
        if changed:
            name = changed[0]
            what = f"{name} {theirs.get(name)!r}, now it is {self.identity[name]!r}"
            raise ValueError(f"{self.file} was begun with {what}; remove it, or name another --out")
        return dict(saved)

    def accuracies(self, name: str, rates: Sequence[float], keep: np.ndarray | None, counted: dict[str, Any]) -> dict[str, Any]:
        """Fits some rates on the rows kept, then counts on each named set of rows; a group that is done is not fitted again.

        Args:
            counted: arrays to measure on by name: values [n, C] and labels [n], or a mask of the training rows.

        Returns:
            "finite" bool for each rate, and for each name the accuracies, 0 where a rate diverged.
        """
        name = f"{name} {list(rates)}"
        if name in self.saved["done"]:
            return dict(self.saved["done"][name])
        settings, rows = self.settings, max(1, BLOCK_BYTES // (4 * self.values.shape[1]))
        standard = moments(self.values, keep, rows) if settings.standardise else None
        blocks = Blocks(self.values, keep, settings.seed, settings.window_bytes, standard)
        sgd = Sgd(self.values.shape[1], self.n_classes, rates, settings.device)
        step, begun = 0, self.saved.get("begun")
        if begun is not None and begun["name"] == name:
            step = begun["step"]
            sgd.load(begun["weights"])
        saved_at = step
        for x, ids in blocks.batches(step, settings.steps, settings.batch_images, settings.device):
            sgd.step(x, self.labels[ids], cosine(step, settings.steps))
            step += 1
            if step - saved_at >= self.save_every and step < settings.steps:
                self._save({"done": self.saved["done"], "begun": {"name": name, "step": step, "weights": sgd.state()}})
                saved_at = step
        finite = sgd.finite().tolist()
        found: dict[str, Any] = {"finite": finite}
        for what, (values, labels) in counted.items():
            right = count(sgd, values, labels, standard, settings.device)
            found[what] = [float(share) if good else 0.0 for share, good in zip(right, finite, strict=True)]
        self._save({"done": self.saved["done"] | {name: found}})
        return found

    def forget(self) -> None:
        """Removes the file: a probe that ended has no use for it, and one that failed must not lead the next to the same end."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _save(self, saved: dict[str, Any]) -> None:
        self.saved = saved
        if self.file is not None:
            with atomic_file(self.file) as file:
                torch.save(saved | {"identity": self.identity}, file)


def held_out_rows(labels: np.ndarray, share: float, views: int, seed: int) -> np.ndarray:
    """The rows of the images that choose the rate, bool [N]: classes in proportion, all views of an image together.

    Raises:
        ValueError: a share without sense, or rows that are no whole number of images.
    """
    if not 0 < share < 1:
        raise ValueError(f"--held_out {share:g} must lie between 0 and 1")
    if len(labels) % views:
        raise ValueError(f"--views {views} does not divide the {len(labels)} rows of the training images")
    images = stratified_order(labels[::views], seed)
    n = max(1, round(share * len(images)))
    if n == len(images):
        raise ValueError(f"--held_out {share:g} of {len(images)} images leaves none to fit on")
    mask = np.zeros(len(images), dtype=bool)
    mask[images[:n]] = True
    return np.repeat(mask, views)


def sgd_probe(
    train: FeatureSet,
    evaluated: FeatureSet,
    layer: int,
    kind: str,
    settings: Settings,
    *,
    rates: Sequence[float] = RATES,
    together: int = 4,
    held_out: float = HELD_OUT,
    state: Path | None = None,
    save_every: int = 10_000,
) -> SgdProbe:
    """Probes one layer.

    Args:
        rates: tried from large to small, `together` at once, until the best is not the smallest that was tried.
        held_out: the part of the training images that chooses the rate.
        state: a file that an interrupted probe goes on from; removed at the end, and where every rate diverged.
        save_every: steps between two writings of it.

    Raises:
        ValueError: labels missing or all the same, features not finite, bad rates or shares, divergence, another probe's state.
    """
    if not rates or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise ValueError(f"--rates {' '.join(f'{rate:g}' for rate in rates)} must be positive numbers")
    if together < 1:
        raise ValueError(f"--together {together} must be at least 1")
    training_images(train, None, settings.seed)  # all of them, once their labels are seen to be of use
    check_labels(evaluated)
    fitting = _Fitting(train, evaluated, layer, kind, settings, held_out, state, save_every)
    mask = held_out_rows(train.labels, held_out, settings.views, settings.seed)
    chosen_by = {"held_out": (Rows(fitting.values, np.flatnonzero(mask)), train.labels[mask])}
    tried, shares, finite, best = _search(fitting, rates, together, ~mask, chosen_by)
    everything = {"train": (fitting.values, train.labels), "evaluated": (FiniteRows(evaluated, layer, kind), evaluated.labels)}
    last = fitting.accuracies("all", [tried[best]], None, everything)
    fitting.forget()
    if not last["finite"][0]:
        raise ValueError(f"rate {tried[best]:g} was the best and diverged on all images; leave it out of --rates")
    return SgdProbe(
        layer=layer,
        kind=kind,
        train_split=train.split,
        eval_split=evaluated.split,
        n_train=len(train.labels),
        n_eval=len(evaluated.labels),
        n_features=fitting.values.shape[1],
        n_classes=fitting.n_classes,
        rate=tried[best],
        rates=tried,
        grid_edge=_edge(best, len(tried)),
        diverged=[rate for rate, good in zip(tried, finite, strict=True) if not good],
        held_out_accuracies=shares,
        held_out_accuracy=shares[best],
        train_accuracy=last["train"][0],
        accuracy=last["evaluated"][0],
        momentum=MOMENTUM,
        standardised=settings.standardise,
        **{name: getattr(settings, name) for name in ("steps", "batch_images", "views", "seed")},
    )


def _search(
    fitting: _Fitting, rates: Sequence[float], together: int, keep: np.ndarray, counted: dict[str, Any]
) -> tuple[list[float], list[float], list[bool], int]:
    """The rates that were tried, their accuracies, whether they are numbers, and which is the best."""
    falling, best = sorted(set(rates), reverse=True), 0
    tried: list[float] = []
    shares: list[float] = []
    finite: list[bool] = []
    for first in range(0, len(falling), together):
        group = falling[first : first + together]
        found = fitting.accuracies("search", group, keep, counted)
        tried, shares, finite = tried + group, shares + found["held_out"], finite + found["finite"]
        best = int(np.argmax(shares))  # the first: of equals, the larger rate
        if best < len(tried) - 1 and finite[best]:
            break
    if not any(finite):
        fitting.forget()
        raise ValueError(f"every rate diverged, down to {tried[-1]:g}; give smaller --rates, or --standardise")
    return tried, shares, finite, best


def _edge(best: int, tried: int) -> str | None:
    if tried == 1:
        return None
    return {0: "high", tried - 1: "low"}.get(best)
