"""Multinomial logistic regression by L-BFGS. In: features [N, C] and labels [N]. Out: weights for a whole grid of penalties.

The objective is that of scikit-learn's `LogisticRegression(C=...)`: the summed cross entropy times C plus half the squared
weights, without a penalty on intercepts. (scikit-learn's C is the inverse penalty, here `C_grid` and `Fit.C`. In shapes, C is the
width of the features.) The values of the grid are solved together: an evaluation is two matrix products for all that have not
converged. Every second value starts at zero. The others start between the solutions of their neighbours, which saves a fifth of
the work. Float32 features are iterated in float32 and finished in float64. Called by `linear.py` and `variants.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from igpt_ds.errors import InputError
from igpt_ds.evaluate.probes.lbfgs import Minimum, minimise
from igpt_ds.threads import threads_for

_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 26}  # logits in memory at once; on a CPU they stay in the cache
_COPIED = {"cpu": 1 << 19, "cuda": 1 << 26}  # features that are copied at once
# Largest relative decrease of the objective that one more step predicts at the end. If classes separate, the gradient is small
# long before the minimum. This bound keeps the objective within 1e-6 of the minimum.
_PROMISE = 1e-8


@dataclass(frozen=True)
class Fit:
    """G solutions, one for each value of the grid.

    `objective` is scikit-learn's. `grad_norm` is the largest absolute entry of the gradient of objective / (C * N), which
    `tol` bounds; both are computed in float64 from the features as given. `classes` are the labels of
    the K rows of the weights.
    """

    C: np.ndarray  # float64 [G]
    weights: np.ndarray  # float64 [G, K, C]
    intercepts: np.ndarray  # float64 [G, K]
    classes: np.ndarray  # int64 [K]
    objective: np.ndarray  # float64 [G]
    grad_norm: np.ndarray  # float64 [G]
    iterations: np.ndarray  # int64 [G]
    converged: np.ndarray  # bool [G]
    evaluations: int  # of the objective, each for all unfinished values

    def only(self, g: int) -> Fit:
        """Only the solution for the g-th value of the grid."""
        one = slice(g, g + 1)
        values = {f.name: getattr(self, f.name)[one] for f in fields(self) if f.name not in ("classes", "evaluations")}
        return replace(self, **values)

    def predict(self, features: Tensor) -> np.ndarray:
        """features [N, C] -> the likeliest label for each value of the grid, int64 [G, N]."""
        G, K, width = self.weights.shape
        weights = torch.as_tensor(self.weights).to(features).view(G * K, width)
        intercepts = torch.as_tensor(self.intercepts).to(features).view(G * K, 1)
        rows = _chunk_rows(features, G * K, copied=False)
        best = [(weights @ x.T + intercepts).view(G, K, -1).argmax(1) for x in features.split(rows)]
        return self.classes[torch.cat(best, 1).cpu().numpy()]


@dataclass(frozen=True)
class Spectrum:
    """Mean and principal axes of features. They scale the solver's step along each axis."""

    mean: Tensor  # float64 [C]
    axes: Tensor  # float64 [C, C], one axis a column
    variances: Tensor  # float64 [C]

    @staticmethod
    def of(features: Tensor) -> Spectrum:
        """The spectrum of features [N, C]: two passes, then an eigendecomposition of [C, C]."""
        N, width = features.shape
        with threads_for(2.0 * min(N, _chunk_rows(features, 1, copied=True)) * width**2):
            return Spectrum._of(features)

    @staticmethod
    def _of(features: Tensor) -> Spectrum:
        N, width = features.shape
        parts = features.split(_chunk_rows(features, 1, copied=True))  # in parts, because a copy of all would be too large
        mean = torch.stack([x.sum(0, dtype=torch.float64) for x in parts]).sum(0) / N
        covariance = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for x in parts:
            centred = x - mean.to(x)
            covariance += centred.T @ centred
        variances, axes = torch.linalg.eigh(covariance / N)
        return Spectrum(mean, axes, variances.clamp_min(0.0))


def fit_logistic(
    features: Tensor,
    labels: np.ndarray,
    C_grid: Sequence[float],
    *,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    spectrum: Spectrum | None = None,
    start: Fit | None = None,
) -> Fit:
    """Minimises the objective for every value of the grid, on the device of the features.

    Float32 features use float32 products until these converge, then a few evaluations with float64 products, so the result is as
    exact as with float64 features. Vectors (weights, gradients, history) are always float64. Labels that do not occur get no
    weights, as in scikit-learn. For two classes scikit-learn fits one weight vector; a doubled penalty gives the same result
    here.

    Args:
        features: float64 or float32 [N, C]. Standardise them first: the penalty treats all features alike.
        labels: int64 [N].
        C_grid: positive values, the G problems.
        tol: the bound on `Fit.grad_norm`.
        max_iterations: of each problem; if it is exceeded, `converged` is False.
        spectrum: of these or similar features, if it is known already.
        start: a fit of one grid value with the same labels, where the iterations start.

    Raises:
        ValueError: shapes that do not match, features that are not finite, fewer than two labels, a bad grid or tol.
    """
    classes, targets = _check(features, labels, C_grid, tol)
    with threads_for(_product_flops(features, len(classes) * len(C_grid))):
        return _fit(features, (classes, targets), C_grid, tol, max_iterations, spectrum, start)


def _product_flops(features: Tensor, columns: int) -> float:
    return 2.0 * min(len(features), _chunk_rows(features, columns, copied=False)) * features.shape[1] * columns


def _fit(
    features: Tensor,
    labels: tuple[np.ndarray, np.ndarray],
    C_grid: Sequence[float],
    tol: float,
    max_iterations: int,
    spectrum: Spectrum | None,
    start: Fit | None,
) -> Fit:
    spectrum, (classes, targets) = spectrum or Spectrum.of(features), labels
    grid, N = torch.tensor(list(C_grid), dtype=torch.float64, device=features.device), len(features)
    problem = _Softmax(features, torch.as_tensor(targets, device=features.device), len(classes), grid, spectrum)
    if start is not None or len(grid) < 3:
        found = _solve(problem, _start(start, problem, len(grid)), tol, max_iterations)
    else:
        found = _solve_neighbours(problem, grid, tol, max_iterations)
    theta = found.theta.view(len(grid), len(classes), -1)
    return Fit(
        C=grid.cpu().numpy(),
        weights=theta[..., :-1].cpu().numpy(),
        intercepts=(theta[..., -1] - theta[..., :-1] @ spectrum.mean).cpu().numpy(),
        classes=classes,
        objective=(found.value * grid * N).cpu().numpy(),
        grad_norm=found.grad_norm.cpu().numpy(),
        iterations=found.iterations.cpu().numpy(),
        converged=found.converged.cpu().numpy(),
        evaluations=found.evaluations,
    )


def _start(start: Fit | None, problem: _Softmax, G: int) -> Tensor:
    """The first point of G problems, [G, K * (C + 1)]: zero, or a fit with its intercept at the mean of the features."""
    mean = problem.spectrum.mean
    theta = mean.new_zeros(G, problem.K, len(mean) + 1)
    if start is not None:
        assert start.weights.shape == (1, problem.K, len(mean)), "start holds one fit of the same shape"
        theta[..., :-1] = torch.as_tensor(start.weights).to(theta)
        theta[..., -1] = torch.as_tensor(start.intercepts).to(theta) + theta[..., :-1] @ mean
    return theta.flatten(1)


def _solve(problem: _Softmax, theta: Tensor, tol: float, max_iterations: int) -> Minimum:
    """Minimises from theta, first in the precision of the features, then in float64, which decides on convergence."""
    if problem.dtype == torch.float64:
        return minimise(problem, theta, tol, max_iterations)
    rough = minimise(problem, theta, tol, max_iterations)
    left = max(1, max_iterations - int(rough.iterations.max()))
    found = minimise(problem.exact(), rough.theta, tol, left)
    iterations, evaluations = rough.iterations + found.iterations, rough.evaluations + found.evaluations
    return replace(found, iterations=iterations, evaluations=evaluations)


def _solve_neighbours(problem: _Softmax, grid: Tensor, tol: float, max_iterations: int) -> Minimum:
    """Every second value, beginning with the weakest penalty; then the others, interpolated between neighbours in log C."""
    order = grid.argsort()
    coarse, fine = order.flip(0)[::2].flip(0), order.flip(0)[1::2].flip(0)
    first = _solve(problem.only(coarse), _start(None, problem, len(coarse)), tol, max_iterations)
    at, known = grid[fine].log(), grid[coarse].log()
    above = torch.searchsorted(known, at).clamp(max=len(coarse) - 1)
    below = (above - 1).clamp_min(0)  # with an even number of values the strongest penalty has only one neighbour
    part = ((at - known[below]) / (known[above] - known[below]).clamp_min(1e-300)).clamp(0, 1)[:, None]
    second = _solve(problem.only(fine), first.theta[below].lerp(first.theta[above], part), tol, max_iterations)
    back = torch.cat([coarse, fine]).argsort()
    names = ("theta", "value", "grad_norm", "iterations", "converged")
    both = {name: torch.cat([getattr(first, name), getattr(second, name)])[back] for name in names}
    return replace(first, evaluations=first.evaluations + second.evaluations, **both)


def _check(features: Tensor, labels: np.ndarray, C_grid: Sequence[float], tol: float) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, and each image's index into them."""
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(f"features of shape {list(features.shape)} do not match {len(labels)} labels; give [N, C] and [N]")
    if not all(torch.isfinite(x).all() for x in features.split(_chunk_rows(features, 1, copied=True))):
        raise InputError("the features hold values that are not finite; extract them again in fp32")
    if not len(C_grid) or not all(value > 0 and math.isfinite(value) for value in C_grid):
        raise InputError(f"C_grid={list(C_grid)} must hold positive numbers")
    if not 0 < tol < float("inf"):
        raise InputError(f"tol={tol} must be greater than 0 and finite")
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"the labels hold {len(classes)} class; a classifier needs at least 2")
    return classes.astype(np.int64), targets


def _chunk_rows(features: Tensor, columns: int, copied: bool) -> int:
    where, width = features.device.type, max(1, features.shape[1])
    return max(64, min(_LOGITS[where] // columns, _COPIED[where] // width if copied else len(features)))


class _Softmax:
    """The objective divided by C * N: mean cross entropy + strength / 2 * squared weights, for every strength.

    Parameters are [g, K * (C + 1)]; the last column of [K, C + 1] is the intercept at the mean of the features, which makes it
    independent of the weights. The solution is the same.
    """

    promise = _PROMISE

    def __init__(self, features: Tensor, targets: Tensor, K: int, C_grid: Tensor, spectrum: Spectrum) -> None:
        self.features, self.targets, self.K, self.spectrum = features, targets, K, spectrum
        self.strengths = (2.0 if K == 2 else 1.0) / (C_grid * len(features))
        self.variances = torch.cat([spectrum.variances, spectrum.mean.new_ones(1)])  # the feature of the intercept is 1
        self.dtype = features.dtype  # of the products
        self.resolution = 10 * torch.finfo(self.dtype).eps

    def only(self, which: Tensor) -> _Softmax:
        """Only the problems of these strengths."""
        chosen = copy(self)
        chosen.strengths = self.strengths[which]
        return chosen

    def exact(self) -> _Softmax:
        """The same problem with float64 products; features are cast in parts."""
        chosen = copy(self)
        chosen.dtype, chosen.resolution = torch.float64, 10 * torch.finfo(torch.float64).eps
        return chosen

    def evaluate(self, theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values [g], gradients [g, K * (C + 1)] and the softmax's mean curvature [g].

        The curvature is the mean of p (1 - p) over images and over the K - 1 free directions of a softmax: 1 / K at zero, and
        small if most images are classified with certainty.
        """
        G, K, N, mean = len(theta), self.K, len(self.features), self.spectrum.mean
        theta = theta.view(G, K, -1)
        weights = theta[..., :-1]
        W = weights.reshape(G * K, -1).to(self.dtype)
        b = (theta[..., -1] - weights @ mean).view(G * K, 1).to(self.dtype)
        value, squares, gradient = theta.new_zeros(G), theta.new_zeros(G), torch.zeros_like(theta)
        rows = _chunk_rows(self.features, G * K, copied=self.dtype != self.features.dtype)
        for stored, y in zip(self.features.split(rows), self.targets.split(rows), strict=True):
            x = stored.to(self.dtype)
            # Classes before images: a softmax over an outer dimension is twice as fast as over an inner one of ten classes.
            log_p = torch.log_softmax((W @ x.T).add_(b).view(G, K, -1), dim=1)
            target = y.expand(G, 1, -1)
            value -= log_p.gather(1, target).sum((1, 2), dtype=torch.float64)
            p = log_p.exp_()
            squares += torch.linalg.vector_norm(p, dim=(1, 2)).double().square()
            error = p.scatter_add_(1, target, p.new_full((1, 1, 1), -1.0).expand(target.shape))
            gradient[..., :-1] += (error.view(G * K, -1) @ x).view(G, K, -1)
            gradient[..., -1] += error.sum(2, dtype=torch.float64)
        gradient[..., :-1] -= gradient[..., -1:] * mean
        strength = self.strengths[which]
        value = value / N + strength / 2 * weights.square().sum((1, 2))
        gradient /= N
        gradient[..., :-1] += strength[:, None, None] * weights
        return value, gradient.flatten(1), (1 - squares / N).clamp_min(1e-12) / (K - 1)

    def grad_norm(self, gradient: Tensor) -> Tensor:
        """[g]: the largest absolute entry, with the intercept at the origin."""
        gradient = gradient.view(len(gradient), self.K, -1)
        weights = gradient[..., :-1] + gradient[..., -1:] * self.spectrum.mean
        return torch.maximum(weights.abs().amax((1, 2)), gradient[..., -1].abs().amax(1))

    def precondition(self, vector: Tensor, which: Tensor, curvature: Tensor) -> Tensor:
        """[g, K * (C + 1)] times an approximate inverse Hessian.

        If the softmax has the same curvature for all images and classes, the Hessian is diagonal along the principal axes of the
        features: curvature * variance + strength.
        """
        axes = self.spectrum.axes
        hessian = curvature[:, None] * self.variances
        hessian[:, :-1] += self.strengths[which, None]
        vector = vector.view(len(vector), self.K, -1)
        rotated = torch.cat([vector[..., :-1] @ axes, vector[..., -1:]], -1) / hessian[:, None]
        return torch.cat([rotated[..., :-1] @ axes.T, rotated[..., -1:]], -1).flatten(1)
