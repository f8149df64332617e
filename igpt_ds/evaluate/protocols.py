"""The linear probe (paper 2.4, 3.4): how good a linear classifier is on one layer's features, and how that is measured.

Standardise by the training images; choose the penalty on a tenth of them held out (paper 3.1); fit again on all of them;
only then look at the split that is reported. The layer, too, is chosen by the held-out tenth (`results.best_row`), never by
the reported split. In: feature sets. Out: a `Probe` for each layer and kind. Called by `tools/linear_probe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from igpt_ds.evaluate.features import FeatureSet
from igpt_ds.evaluate.logistic import Fit, Spectrum, fit

# scikit-learn's C, for standardised features. For 10,000 images raw pixels do best at 1e-2, narrow features at 1 to 100, and
# the best C falls as images grow in number.
C_GRID = tuple(10.0**power for power in range(-5, 4))
HELD_OUT = 0.1  # of the training images: paper 3.1
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32}


@dataclass(frozen=True)
class Probe:
    """What one probe found. Accuracies lie in 0..1; objective, grad_norm and iterations are those of the last fit."""

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
    grid_edge: str | None  # "low" or "high" when the best C may lie outside the grid
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


def linear_probe(
    train: FeatureSet,
    evaluated: FeatureSet,
    layer: int,
    kind: str,
    *,
    C_grid: Sequence[float] = C_GRID,
    tol: float = 1e-6,
    seed: int = 0,
    max_train: int | None = None,
    device: str = "cpu",
    precision: str = "fp64",
) -> Probe:
    """Probes one layer.

    Args:
        seed: draws the held-out tenth, and the images of max_train.
        max_train: use that many training images only, the classes in proportion.

    Raises:
        ValueError: labels missing or all the same, a max_train, grid or tol without sense, a layer that is not there.
    """
    grid = sorted({float(value) for value in C_grid})
    check_labels(evaluated)
    ids = _training_images(train, max_train, seed)
    labels = train.labels[ids]
    features, *moments = _standardised(train.layer(layer, kind)[ids], device, PRECISIONS[precision])
    order = stratified_order(labels, seed)
    n_held_out = max(1, round(HELD_OUT * len(ids)))
    held_out, rest = order[:n_held_out], np.sort(order[n_held_out:])
    spectrum = Spectrum.of(features)
    searched = fit(features[torch.from_numpy(rest)], labels[rest], grid, tol=tol, spectrum=spectrum)
    accuracies = (searched.predict(features[torch.from_numpy(held_out)]) == labels[held_out]).mean(1)
    best = int(accuracies.argmax())  # the first: of equals, the stronger penalty
    start = searched.only(best) if np.array_equal(searched.classes, np.unique(labels)) else None
    final = fit(features, labels, [grid[best]], tol=tol, spectrum=spectrum, start=start)
    return Probe(
        layer=layer,
        kind=kind,
        train_split=train.split,
        eval_split=evaluated.split,
        n_train=len(ids),
        n_eval=len(evaluated.labels),
        n_features=features.shape[1],
        n_classes=len(final.classes),
        C=grid[best],
        C_grid=grid,
        grid_edge=_edge(best, len(grid)),
        held_out_accuracies=[float(accuracy) for accuracy in accuracies],
        held_out_accuracy=float(accuracies[best]),
        train_accuracy=float((final.predict(features)[0] == labels).mean()),
        accuracy=_accuracy(final, evaluated.layer(layer, kind), evaluated.labels, *moments),
        objective=float(final.objective[0]),
        grad_norm=float(final.grad_norm[0]),
        iterations=int(final.iterations[0]),
        converged=bool(searched.converged[best] and final.converged[0]),
        seed=seed,
        tol=tol,
        precision=precision,
    )


def _edge(best: int, values: int) -> str | None:
    if values == 1:
        return None
    return {0: "low", values - 1: "high"}.get(best)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All images, int64 [N], in a random order whose every beginning holds the classes in proportion."""
    random = np.random.default_rng(seed)
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        key[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((random.random(len(labels)), key))


def check_labels(features: FeatureSet) -> None:
    """Raises a ValueError that names the first image without a label of the set's classes."""
    bad = np.flatnonzero((features.labels < 0) | (features.labels >= len(features.classes)))
    if len(bad):
        what = f"image {bad[0]} of split {features.split!r} in {features.path} has label {features.labels[bad[0]]}"
        raise ValueError(f"{what}, not one of 0..{len(features.classes) - 1}; a probe needs labelled images")


def _training_images(train: FeatureSet, max_train: int | None, seed: int) -> np.ndarray:
    check_labels(train)
    N = len(train.labels)
    if max_train is not None and not 2 <= max_train <= N:
        raise ValueError(
            f"--max_train {max_train} must lie between 2 and the {N} images of split {train.split!r} in {train.path}"
        )
    ids = np.arange(N) if max_train is None else np.sort(stratified_order(train.labels, seed)[:max_train])
    present = np.unique(train.labels[ids])
    if len(present) < 2:
        names = ", ".join(train.classes[label] for label in present)
        raise ValueError(f"the training labels hold one class only ({names}), in {train.path}; a probe needs at least 2")
    return ids


def _standardised(values: np.ndarray, device: str, dtype: torch.dtype) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Features of mean 0 and deviation 1, with what made them so; a feature that never changes becomes 0."""
    mean = values.mean(0, dtype=np.float64)
    deviation = values.std(0, dtype=np.float64)
    constant = deviation <= np.finfo(np.float32).eps * np.abs(mean)  # they are stored as float32
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=~constant)
    return _scaled(values, mean, scale, device, dtype), mean, scale


def _scaled(values: np.ndarray, mean: np.ndarray, scale: np.ndarray, device: str, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.array(values)).to(device, dtype)
    return tensor.sub_(torch.from_numpy(mean).to(tensor)).mul_(torch.from_numpy(scale).to(tensor))


def _accuracy(final: Fit, values: np.ndarray, labels: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> float:
    right = 0
    for start in range(0, len(values), 1 << 14):
        part = slice(start, start + (1 << 14))
        right += int((final.predict(_scaled(values[part], mean, scale, "cpu", torch.float64))[0] == labels[part]).sum())
    return right / len(values)
