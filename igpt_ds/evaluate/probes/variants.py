"""The paper's variants of the linear probe: layers side by side (4.4), few labels (4.7), a vote over masks (4.6).

Each uses one layer: the given one, or the best by the held-out tenth. The search of the layer needs only the fits on nine tenths.
The last fit and the accuracy on the reported split are computed only for the chosen layer, because the split must not choose.

In: feature sets. Out: probes. Called by `tools/linear_probe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from igpt_ds.data import subsets as random_subsets
from igpt_ds.data.subsets import SUBSETS
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.features.manifest import span
from igpt_ds.evaluate.probes.linear import (
    PROBE_DTYPES,
    Probe,
    ProbeSettings,
    Search,
    Standard,
    View,
    check_labels,
    edge,
    probe_view,
    stratified_order,
    training_images,
)
from igpt_ds.evaluate.probes.logistic import fit_logistic
from igpt_ds.evaluate.probes.settings import N_MASKS
from igpt_ds.evaluate.probes.votes import check_masks, vote

CONCATENATED = 5  # layers: paper 4.4
FOLDS = 5  # of a subset, or fewer if a class has fewer labels


def best_layer(
    train: FeatureSet, layers: Sequence[int], kind: str, settings: ProbeSettings, report: Callable[[str], None]
) -> int:
    """The layer with the highest held-out accuracy; of equal ones, the lowest. A single layer needs no search."""
    if len(layers) == 1:
        return layers[0]
    ids = training_images(train, None, settings.seed)
    found = {}
    for layer in sorted(layers):
        found[layer] = float(Search.of(View(train, (layer,), kind), ids, settings).accuracies.max())
        report(f"{train.path} layer {layer} {kind}: held out {100 * found[layer]:.2f} %")
    return max(found, key=lambda layer: (found[layer], -layer))


def window(layers: Sequence[int], centre: int, count: int = CONCATENATED) -> tuple[int, ...]:
    """`count` neighbouring layers with `centre` in the middle, or as near to the middle as the ends allow.

    Raises:
        ValueError: there are fewer layers.
    """
    if len(layers) < count:
        raise InputError(f"concat needs {count} layers and the features hold {span(layers)}; extract more layers")
    first = min(max(sorted(layers).index(centre) - count // 2, 0), len(layers) - count)
    return tuple(sorted(layers)[first : first + count])


@dataclass(frozen=True)
class ConcatProbe(Probe):
    """A probe of several layers; `layer` is the centre."""

    layers: list[int]


def concat(train: FeatureSet, evaluated: FeatureSet, layer: int, kind: str, settings: ProbeSettings) -> ConcatProbe:
    """Probes the features of five layers around one layer, side by side (paper 4.4).

    Raises:
        ValueError: fewer than five layers; and as `linear.linear_probe`.
    """
    return replace(side_by_side(train, evaluated, window(train.layers, layer), kind, settings), layer=layer)


def side_by_side(
    train: FeatureSet,
    evaluated: FeatureSet,
    layers: Sequence[int],
    kind: str,
    settings: ProbeSettings,
    max_train: int | None = None,
) -> ConcatProbe:
    """Probes the features of several layers side by side; raises like `linear.linear_probe`."""
    check_labels(evaluated)
    ids = training_images(train, max_train, settings.seed)
    views = [View(features, tuple(layers), kind) for features in (train, evaluated)]
    probe, _ = probe_view(views[0], views[1:], ids, settings)
    return ConcatProbe(**vars(probe), layers=list(layers))


@dataclass(frozen=True)
class LowDataProbe:
    """The result of probes with few labels, on random balanced subsets of the training images."""

    layer: int
    kind: str
    train_split: str
    eval_split: str
    n_train: int  # images from which a subset is drawn
    n_labels: int  # of a subset
    n_subsets: int
    n_eval: int
    n_features: int
    n_classes: int
    C_grid: list[float]
    folds: int  # within the subset, that choose the penalty
    C_of_subsets: list[float]
    subset_accuracies: list[float]
    accuracy: float  # their mean
    deviation: float | None  # of the sample of subsets, with n - 1; None for one subset
    held_out_accuracy: float  # the mean of the subsets' accuracies across their folds
    grid_edge: str | None  # the end of the grid that the median subset chose
    converged: bool
    seed: int
    tol: float
    precision: str
    layer_chosen_by: str = "name"  # or "held-out tenth of all labels"


def low_data(
    train: FeatureSet,
    evaluated: FeatureSet,
    layer: int,
    kind: str,
    n_labels: int,
    settings: ProbeSettings,
    subsets: int = SUBSETS,
) -> LowDataProbe:
    """Fits on random balanced subsets of n_labels images (paper 4.7).

    The paper does not say how it chose the penalty. Here cross validation within each subset chooses it, so that no other label
    is used. The caller chooses the layer. The deviation is that of a sample, with n - 1, because the subsets are a sample of all
    possible subsets.

    Raises:
        ValueError: n_labels is no multiple of the classes, has fewer than two per class, or exceeds the images of a class.
    """
    check_labels(train)
    check_labels(evaluated)
    view, seen = View(train, (layer,), kind), View(evaluated, (layer,), kind)
    found = []
    for number in range(subsets):
        ids = balanced_subset(train, n_labels, settings.seed, number)
        best, accuracy, converged = _cross_validate(view, ids, settings)
        standard = Standard.of(view, ids)
        x = torch.empty(len(ids), view.width, dtype=PROBE_DTYPES[settings.precision], device=settings.device)
        standard.fill(x, view, ids)
        final = fit_logistic(x, train.labels[ids], [settings.C_grid[best]], tol=settings.tol)
        right = float((standard.predict(final, seen) == evaluated.labels).mean())
        found.append((best, accuracy, converged and bool(final.converged[0]), right))
    chosen, inner, ended, accuracies = (list(column) for column in zip(*found, strict=True))
    usual = int(np.median(chosen))
    return LowDataProbe(
        layer=layer,
        kind=kind,
        train_split=train.split,
        eval_split=evaluated.split,
        n_train=len(train.labels),
        n_labels=n_labels,
        n_subsets=subsets,
        n_eval=len(evaluated.labels),
        n_features=view.width,
        n_classes=len(train.classes),
        C_grid=list(settings.C_grid),
        folds=_folds(n_labels // len(train.classes)),
        C_of_subsets=[settings.C_grid[best] for best in chosen],
        subset_accuracies=accuracies,
        accuracy=float(np.mean(accuracies)),
        deviation=float(np.std(accuracies, ddof=1)) if subsets > 1 else None,
        held_out_accuracy=float(np.mean(inner)),
        grid_edge=edge(usual, len(settings.C_grid)),
        converged=all(ended),
        seed=settings.seed,
        tol=settings.tol,
        precision=settings.precision,
    )


def balanced_subset(train: FeatureSet, n_labels: int, seed: int, number: int) -> np.ndarray:
    """The images of a random balanced subset: int64 [n_labels], rising. Two labels of a class make two folds."""
    return random_subsets.balanced_subset(
        train.labels, len(train.classes), n_labels, seed, number, f"--n_labels {n_labels}", least=2
    )


def _folds(each: int) -> int:
    return min(FOLDS, each)


def _cross_validate(view: View, ids: np.ndarray, settings: ProbeSettings) -> tuple[int, float, bool]:
    """The index of the best penalty in the grid, its accuracy over the folds, and whether its fits converged."""
    labels = view.features.labels[ids]
    folds = _folds(int(np.bincount(labels).max()))
    fold = np.empty(len(ids), dtype=np.int64)
    for label in np.unique(labels):  # equal numbers of each class in each fold, or one more
        members = ids[labels == label]
        mixed = np.flatnonzero(labels == label)[stratified_order(np.zeros(len(members)), settings.seed)]
        fold[mixed] = np.arange(len(members)) % folds
    right, converged = np.zeros(len(settings.C_grid)), np.ones(len(settings.C_grid), dtype=bool)
    for number in range(folds):
        rest, held_out = ids[fold != number], ids[fold == number]
        standard = Standard.of(view, rest)
        x = torch.empty(len(ids), view.width, dtype=PROBE_DTYPES[settings.precision], device=settings.device)
        standard.fill(x[: len(rest)], view, rest)
        standard.fill(x[len(rest) :], view, held_out)
        found = fit_logistic(x[: len(rest)], view.features.labels[rest], settings.C_grid, tol=settings.tol)
        right += (found.predict(x[len(rest) :]) == view.features.labels[held_out]).sum(1)
        converged &= found.converged
    best = int(right.argmax())
    return best, float(right[best] / len(ids)), bool(converged[best])


@dataclass(frozen=True)
class MaskVoteProbe(Probe):
    """A probe of masked images whose predictions vote; `accuracy` is that of the vote."""

    n_masks: int
    mask_seed: int | None
    single_accuracy: float  # the mean of single_accuracies
    single_accuracies: list[float]  # one for each mask


def mask_vote(
    train: FeatureSet, evaluated: FeatureSet, layer: int, kind: str, settings: ProbeSettings, n_masks: int = N_MASKS
) -> MaskVoteProbe:
    """Predicts the most frequent class over the masks of each image, ties broken at random (paper 4.6).

    The probe is fitted on the first mask of each training image.

    Raises:
        ValueError: features of whole images, or with fewer masks; and as `linear.linear_probe`.
    """
    check_masks(train, evaluated, n_masks)
    check_labels(evaluated)
    ids = training_images(train, None, settings.seed)
    masks = [View(evaluated, (layer,), kind, mask) for mask in range(n_masks)]
    probe, predictions = probe_view(View(train, (layer,), kind), masks, ids, settings)
    voted = vote(np.stack(predictions), len(evaluated.classes), settings.seed)
    single = [float((predicted == evaluated.labels).mean()) for predicted in predictions]
    probe = replace(probe, accuracy=float((voted == evaluated.labels).mean()))
    return MaskVoteProbe(
        **vars(probe),
        n_masks=n_masks,
        mask_seed=evaluated.manifest.origin.mask_seed,
        single_accuracy=float(np.mean(single)),
        single_accuracies=single,
    )
