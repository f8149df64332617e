"""The linear probe (paper 2.4, 3.4): the accuracy of a linear classifier on the features of one layer.

A tenth of the training images is held out (paper 3.1). The features are standardised by the other images, and the accuracy on the
tenth chooses the penalty. Then all training images are standardised and fitted, and the reported split is read. The held-out
tenth also chooses the layer (`results.best_row`), never the reported split. One copy of the training features is in memory for
any grid.
In: feature sets. Out: a `Probe` for each layer and kind. Called by `variants.py` and `tools/linear_probe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.logistic import Fit, Spectrum, fit_logistic
from igpt_ds.evaluate.probes.rows import FiniteRows
from igpt_ds.evaluate.probes.settings import C_GRID, PROBE_PRECISIONS

HELD_OUT = 0.1  # of the training images: paper 3.1
PROBE_DTYPES = dict(zip(PROBE_PRECISIONS, (torch.float64, torch.float32), strict=True))
_CHUNK_BYTES = 1 << 21  # features that are read at once


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are fitted."""

    C_grid: tuple[float, ...] = C_GRID
    tol: float = 1e-6  # largest entry of the gradient of objective / (C N) at the end
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"  # of the features in memory and most products; results are exact to float64

    def __post_init__(self) -> None:
        for name, values in (("C_grid", self.C_grid), ("tol", (self.tol,))):
            if wrong := [value for value in values if not 0 < value < math.inf]:
                raise InputError(f"{name}={wrong[0]:g} must be greater than 0 and finite")
        if not self.C_grid:
            raise InputError("C_grid is empty; name at least one value")

    @staticmethod
    def of(C_grid: Sequence[float], **others: object) -> ProbeSettings:
        """Settings with a sorted grid without duplicates."""
        return replace(ProbeSettings(tuple(sorted({float(value) for value in C_grid}))), **others)  # type: ignore[arg-type]


@dataclass(frozen=True)
class View:
    """The features that a probe reads: one layer of a kind, or several layers side by side, [N, width]."""

    features: FeatureSet
    layers: tuple[int, ...]
    kind: str
    mask: int = 0  # the number of the mask, if images are masked

    @property
    def width(self) -> int:
        """Number of features of an image."""
        return len(self.layers) * self.features.manifest.n_features

    def chunks(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """The rows of some images, in pieces: float64 [n, width].

        The files are mapped again for each piece, so that the rows do not stay in the memory of the process.

        Raises:
            ValueError: a value is not finite.
        """
        rows = max(1, _CHUNK_BYTES // (8 * self.width))
        for start in range(0, len(ids), rows):
            some = ids[start : start + rows]
            maps = (FiniteRows(self.features, layer, self.kind, self.mask) for layer in self.layers)
            yield np.concatenate([one[some] for one in maps], axis=1, dtype=np.float64)


@dataclass(frozen=True)
class Standard:
    """Scales features to mean 0 and deviation 1 over the images of `of`; a constant feature becomes 0."""

    mean: np.ndarray  # float64 [width]
    scale: np.ndarray

    @staticmethod
    def of(view: View, ids: np.ndarray) -> Standard:
        """The moments of these images, in two passes."""
        mean = np.sum([chunk.sum(0) for chunk in view.chunks(ids)], axis=0) / len(ids)
        variance = np.sum([np.square(chunk - mean).sum(0) for chunk in view.chunks(ids)], axis=0) / len(ids)
        deviation = np.sqrt(variance)
        constant = deviation <= np.finfo(np.float32).eps * np.abs(mean)  # relative to float32, in which they are stored
        return Standard(mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=~constant))

    def fill(self, target: Tensor, view: View, ids: np.ndarray) -> None:
        """Writes the features of these images into target [len(ids), width], in its precision and on its device."""
        start = 0
        for chunk in view.chunks(ids):
            chunk -= self.mean
            chunk *= self.scale
            target[start : start + len(chunk)] = torch.from_numpy(chunk)
            start += len(chunk)

    def predict(self, found: Fit, view: View) -> np.ndarray:
        """The predictions of a fit with one grid value for every image of a view: int64 [N], computed in float64."""
        labels = []
        for chunk in view.chunks(np.arange(len(view.features.labels))):
            labels.append(found.predict(torch.from_numpy((chunk - self.mean) * self.scale))[0])
        return np.concatenate(labels)


@dataclass(frozen=True)
class Fitted:
    """The last fit of a probe, with one grid value, and the scaling of its features."""

    fit: Fit
    standard: Standard


@dataclass(frozen=True)
class Probe:
    """The result of one probe. Accuracies lie in 0..1; objective, grad_norm and iterations are those of the last fit."""

    layer: int
    kind: str
    train_split: str
    eval_split: str
    n_train: int  # images of the last fit, held-out ones included
    n_eval: int
    n_features: int
    n_classes: int
    C: float  # the chosen one
    C_grid: list[float]
    grid_edge: str | None  # "low" or "high" if the best C may lie outside the grid
    held_out_accuracies: list[float]  # for each value of the grid
    held_out_accuracy: float
    train_accuracy: float
    accuracy: float
    objective: float
    grad_norm: float
    iterations: int
    converged: bool  # the last fit, and the one with the same C before it
    seed: int
    tol: float
    precision: str
    fitted: Fitted | None = field(default=None, kw_only=True, repr=False, compare=False)  # no part of a row


@dataclass
class Search:
    """The fits on nine tenths of the training images, for the whole grid, and their accuracy on the tenth."""

    view: View
    settings: ProbeSettings
    order: np.ndarray  # the images: first those of the fit, then the held-out ones
    x: Tensor  # [N, width], standardised, in that order
    found: Fit
    accuracies: np.ndarray  # float64, one for each value of the grid
    spectrum: Spectrum

    @property
    def best(self) -> int:
        """The index of the best value in the grid; of equal ones, the strongest penalty."""
        return int(self.accuracies.argmax())

    @staticmethod
    def of(view: View, ids: np.ndarray, settings: ProbeSettings) -> Search:
        """Searches the grid on these images of a view."""
        labels = view.features.labels
        mixed = ids[stratified_order(labels[ids], settings.seed)]
        n_held_out = max(1, round(HELD_OUT * len(ids)))
        held_out, rest = np.sort(mixed[:n_held_out]), np.sort(mixed[n_held_out:])
        x = torch.empty(len(ids), view.width, dtype=PROBE_DTYPES[settings.precision], device=settings.device)
        standard = Standard.of(view, rest)
        standard.fill(x[: len(rest)], view, rest)
        standard.fill(x[len(rest) :], view, held_out)
        spectrum = Spectrum.of(x[: len(rest)])
        found = fit_logistic(x[: len(rest)], labels[rest], settings.C_grid, tol=settings.tol, spectrum=spectrum)
        accuracies = (found.predict(x[len(rest) :]) == labels[held_out]).mean(1)
        return Search(view, settings, np.concatenate([rest, held_out]), x, found, accuracies, spectrum)

    def refit(self) -> tuple[Fit, Standard]:
        """Fits all images with the chosen penalty. Their features replace those of the search."""
        labels = self.view.features.labels[self.order]
        standard = Standard.of(self.view, self.order)
        standard.fill(self.x, self.view, self.order)
        start = self.found.only(self.best) if np.array_equal(self.found.classes, np.unique(labels)) else None
        grid = [self.settings.C_grid[self.best]]
        return fit_logistic(self.x, labels, grid, tol=self.settings.tol, spectrum=self.spectrum, start=start), standard


def probe_view(view: View, evaluated: Sequence[View], ids: np.ndarray, settings: ProbeSettings) -> tuple[Probe, list[np.ndarray]]:
    """Probes a view with these training images. The accuracy is that on the first evaluated view.

    Returns:
        the probe, and the predictions for each evaluated view, int64 [N].
    """
    search = Search.of(view, ids, settings)
    final, standard = search.refit()
    predictions = [standard.predict(final, one) for one in evaluated]
    best, labels = search.best, view.features.labels[search.order]
    probe = Probe(
        layer=view.layers[len(view.layers) // 2],
        kind=view.kind,
        train_split=view.features.split,
        eval_split=evaluated[0].features.split,
        n_train=len(ids),
        n_eval=len(evaluated[0].features.labels),
        n_features=view.width,
        n_classes=len(final.classes),
        C=settings.C_grid[best],
        C_grid=list(settings.C_grid),
        grid_edge=edge(best, len(settings.C_grid)),
        held_out_accuracies=[float(accuracy) for accuracy in search.accuracies],
        held_out_accuracy=float(search.accuracies[best]),
        train_accuracy=float((final.predict(search.x)[0] == labels).mean()),
        accuracy=float((predictions[0] == evaluated[0].features.labels).mean()),
        objective=float(final.objective[0]),
        grad_norm=float(final.grad_norm[0]),
        iterations=int(final.iterations[0]),
        converged=bool(search.found.converged[best] and final.converged[0]),
        seed=settings.seed,
        tol=settings.tol,
        precision=settings.precision,
        fitted=Fitted(final, standard),
    )
    return probe, predictions


def linear_probe(
    train: FeatureSet,
    evaluated: FeatureSet,
    layer: int,
    kind: str,
    settings: ProbeSettings | None = None,
    max_train: int | None = None,
) -> Probe:
    """Probes one layer.

    Args:
        settings: the seed draws the held-out tenth and the images of max_train.
        max_train: number of training images to use, classes in proportion; None: all.

    Raises:
        ValueError: labels are missing or all equal; max_train, grid or tol is out of range; the layer does not exist; features
            of a split are not finite.
    """
    settings = settings or ProbeSettings()
    check_labels(evaluated)
    ids = training_images(train, max_train, settings.seed)
    return probe_view(View(train, (layer,), kind), [View(evaluated, (layer,), kind)], ids, settings)[0]


def edge(best: int, values: int) -> str | None:
    """The end of the grid at which the chosen value is; None if it is inside or the grid has one value."""
    return None if values == 1 else {0: "low", values - 1: "high"}.get(best)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All images in a random order, int64 [N]; every first part of it has the classes in proportion."""
    random = np.random.default_rng(seed)
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        key[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((random.random(len(labels)), key))


def check_labels(features: FeatureSet) -> None:
    """Raises a ValueError that names the first image whose label is not a class."""
    bad = np.flatnonzero((features.labels < 0) | (features.labels >= len(features.classes)))
    if len(bad):
        what = f"image {bad[0]} of split {features.split!r} in {features.path} has label {features.labels[bad[0]]}"
        known = f"not one of 0..{len(features.classes) - 1}" if features.classes else "and no image has a class"
        raise InputError(f"{what}, {known}; a probe needs labelled images")


def training_images(train: FeatureSet, max_train: int | None, seed: int) -> np.ndarray:
    """The images to fit on, int64, rising: all, or max_train with classes in proportion. Raises like `linear_probe`."""
    check_labels(train)
    N = len(train.labels)
    if max_train is not None and not 2 <= max_train <= N:
        raise InputError(
            f"--max_train {max_train} must lie between 2 and the {N} images of split {train.split!r} in {train.path}"
        )
    ids = np.arange(N) if max_train is None else np.sort(stratified_order(train.labels, seed)[:max_train])
    present = np.unique(train.labels[ids])
    if len(present) < 2:
        names = ", ".join(train.classes[label] for label in present)
        raise InputError(f"the training labels hold only one class ({names}), in {train.path}; a probe needs at least 2")
    return ids
