"""The web filter: finds the candidates that are most similar to a reference set, by the features of our own model.

The paper's web images were "filtered to be similar to ImageNet" (section 3), without details. We take the mean-pooled features of
one layer (by default the middle one, where the paper finds the best features), fit a logistic classifier that separates reference
images from candidates, and keep the candidates with the highest score.

The classifier is cross-fitted. A hash of the id puts each image into one of two folds. A classifier is fitted on each fold and
scores the images of the other fold, so no image is scored by a classifier that was fitted on it. Both have the same penalty, so
that their scores compare; the cross entropy on a held-out tenth of each fold chooses it.

In: a model, two splits of shards. Out: a `Domain` (two classifiers and their quality), one score per candidate, ids to keep.
Called by `tools/filter_shards.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.network import Network
from igpt_ds.evaluate.probes.linear import stratified_order
from igpt_ds.evaluate.probes.logistic import Fit, fit_logistic
from igpt_ds.model.transformer import Transformer

DOMAIN_C_GRID = tuple(10.0**power for power in range(-5, 3))  # scikit-learn's C, for standardised features
FEWEST = 40  # images of each set: 20 per fold, of which 2 are held out
_HELD_OUT = 0.1


@dataclass(frozen=True)
class FeatureReader:
    """Features of one layer: mean over positions of n^l (paper 2.4), streamed in batches."""

    model: Transformer
    layer: int
    batch: int = 32
    device: str = "cpu"
    precision: str = "fp32"

    def __call__(self, shards: ShardSet, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (ids, features): int64 [B] and float32 [B, C], in the order of `ids`.

        Raises:
            ValueError: features that are not finite.
        """
        network = Network(self.model, self.device, self.precision, batch=self.batch)
        for start in range(0, len(ids), self.batch):
            some = ids[start : start + self.batch]
            values = network.pooled(shards.tokens(some), [self.layer], ["normed"])[self.layer, "normed"]
            if not np.isfinite(values).all():
                raise InputError(f"layer {self.layer} is not finite for images of {shards.path}; check the model, or use fp32")
            yield some, values

    def all(self, shards: ShardSet, ids: np.ndarray) -> np.ndarray:
        """The features of some images at once: float32 [len(ids), C]."""
        return np.concatenate([values for _, values in self(shards, ids)])


@dataclass(frozen=True)
class Domain:
    """Two classifiers, and their quality on images that they were not fitted on.

    A score is the log odds of "reference" against "candidate", at equal numbers of both.
    """

    weights: np.ndarray  # float64 [2, C]: row f scores the images of fold f and was fitted on the other fold
    intercepts: np.ndarray  # float64 [2]
    C: float  # scikit-learn's, the chosen inverse penalty
    converged: bool
    seed: int
    n_fit: int  # images of each set
    auc: float  # over all images of the fit, each scored by the classifier of the other fold
    accuracy: float  # the same, at score 0
    reference_scores: np.ndarray  # float32 [n_fit]
    candidate_scores: np.ndarray  # float32 [n_fit]

    def score(self, ids: np.ndarray, features: np.ndarray) -> np.ndarray:
        """int64 [B], float32 [B, C] -> float32 [B]."""
        return _score(self.weights, self.intercepts, fold_of(ids, self.seed), features)


def fold_of(ids: np.ndarray, seed: int) -> np.ndarray:
    """0 or 1 for each image by a hash of its id (splitmix64): int64 [N] -> int64 [N]."""
    with np.errstate(over="ignore"):
        mixed = (ids.astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(63)).astype(np.int64)


def fit_domain(
    read: FeatureReader,
    reference: ShardSet,
    candidates: ShardSet,
    *,
    fit_images: int = 10_000,
    seed: int = 0,
    C_grid: Sequence[float] = DOMAIN_C_GRID,
) -> Domain:
    """Fits the two classifiers on equal numbers of images of both sets.

    Args:
        fit_images: images of each set; at most the size of the smaller set.
        seed: draws the images, the folds and the held-out tenths.

    Raises:
        ValueError: too few images.
    """
    n = min(fit_images, reference.n_images, candidates.n_images)
    if n < FEWEST:
        have = f"--fit_images {fit_images}, {reference.n_images} reference images and {candidates.n_images} candidates"
        raise InputError(f"{have} give {n} images to fit on; at least {FEWEST} of each set are needed")
    random = np.random.default_rng(seed)
    sides = [np.sort(random.choice(shards.n_images, n, replace=False)) for shards in (candidates, reference)]
    features = np.concatenate([read.all(shards, ids) for shards, ids in zip((candidates, reference), sides, strict=True)])
    labels = np.repeat(np.array([0, 1]), n)
    folds = np.concatenate([fold_of(ids, seed) for ids in sides])
    fits = [_FoldFit.of(features[folds == 1 - fold], labels[folds == 1 - fold], seed, C_grid) for fold in (0, 1)]
    best = int(np.argmin(fits[0].losses + fits[1].losses))  # the first: of equals, the stronger penalty
    lines = [one.again(C_grid[best], best) for one in fits]
    weights, intercepts = np.stack([line[0] for line in lines]), np.array([line[1] for line in lines])
    scores = _score(weights, intercepts, folds, features)
    return Domain(
        weights=weights,
        intercepts=intercepts,
        C=float(C_grid[best]),
        converged=all(line[2] for line in lines),
        seed=seed,
        n_fit=n,
        auc=auc(scores[labels == 1], scores[labels == 0]),
        accuracy=float(((scores > 0) == (labels == 1)).mean()),
        reference_scores=scores[labels == 1],
        candidate_scores=scores[labels == 0],
    )


@dataclass(frozen=True)
class _FoldFit:
    """The images of one fold, standardised, and the fits on nine tenths of them."""

    features: torch.Tensor  # float64 [N, C]
    labels: np.ndarray
    mean: np.ndarray  # float64 [C]
    scale: np.ndarray  # float64 [C]
    searched: Fit
    losses: np.ndarray  # float64, the cross entropy on the held-out tenth for each value of the grid

    @staticmethod
    def of(features: np.ndarray, labels: np.ndarray, seed: int, C_grid: Sequence[float]) -> _FoldFit:
        assert np.bincount(labels, minlength=2).min() > 3, "that a hash puts 37 of FEWEST images into one fold: below 1e-7"
        mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        constant = deviation <= np.finfo(np.float32).eps * np.abs(mean)  # a constant feature becomes 0
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=~constant)
        x = torch.from_numpy((features - mean) * scale)
        order = stratified_order(labels, seed)
        n_held_out = max(2, round(_HELD_OUT * len(labels)))
        held_out, rest = order[:n_held_out], np.sort(order[n_held_out:])
        searched = fit_logistic(x[torch.from_numpy(rest)], labels[rest], list(C_grid))
        unseen = x[torch.from_numpy(held_out)].numpy()
        losses = [_cross_entropy(*_line(searched, g), unseen, labels[held_out]) for g in range(len(C_grid))]
        return _FoldFit(x, labels, mean, scale, searched, np.array(losses))

    def again(self, C: float, g: int) -> tuple[np.ndarray, float, bool]:
        """The fit on the whole fold: weights and intercept for raw features, and whether it converged."""
        final = fit_logistic(self.features, self.labels, [C], start=self.searched.only(g))
        weights, intercept = _line(final, 0)
        return weights * self.scale, intercept - float(weights * self.scale @ self.mean), bool(final.converged[0])


def _line(found: Fit, g: int) -> tuple[np.ndarray, float]:
    return found.weights[g, 1] - found.weights[g, 0], float(found.intercepts[g, 1] - found.intercepts[g, 0])


def _cross_entropy(weights: np.ndarray, intercept: float, features: np.ndarray, labels: np.ndarray) -> float:
    scores = features @ weights + intercept
    return float(np.logaddexp(0, np.where(labels == 1, -scores, scores)).mean())


def _score(weights: np.ndarray, intercepts: np.ndarray, folds: np.ndarray, features: np.ndarray) -> np.ndarray:
    both = features.astype(np.float64) @ weights.T + intercepts
    return both[np.arange(len(folds)), folds].astype(np.float32)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The area under the ROC curve: the probability that a positive score exceeds a negative one; ties count half."""
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + upto).sum() / 2 / (len(positive) * len(negative)))


def n_to_keep(n_images: int, keep: float) -> int:
    """round(keep * n_images); a half is rounded to the even number.

    Raises:
        ValueError: a share outside 0..1, or a share of less than one image.
    """
    if not 0 < keep <= 1:
        raise InputError(f"--keep {keep} must be above 0 and at most 1")
    if (n := round(keep * n_images)) < 1:
        raise InputError(f"--keep {keep} of {n_images} candidates is less than one image; use a larger share")
    return n


def keep_best(scores: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """The n images with the highest scores, of equal ones the smaller ids: int64 [n] rising, and the lowest score kept."""
    assert 1 <= n <= len(scores)
    threshold = np.partition(scores, len(scores) - n)[len(scores) - n]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: n - len(above)]
    return np.sort(np.concatenate([above, level])), float(threshold)
