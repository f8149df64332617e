"""Multinomial logistic regression by L-BFGS: features [N, C] and labels [N] enter, weights for a whole grid leave.

The objective is scikit-learn's `LogisticRegression(C=...)`: the summed cross entropy times C plus half the squared weights,
intercepts free. (Their C is the inverse strength of the penalty; here it is always written `C_grid` or `Fit.C`, and the
width of the features is the C of the shapes.) All values of the grid are solved at once: one evaluation is two matrix
products for all of them, while each has its own history, its own line search and its own end. Called by protocols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

_HISTORY = 10  # pairs of the two-loop recursion
_DECREASE, _CURVATURE = 1e-4, 0.9  # the weak Wolfe conditions, with the constants that quasi-Newton methods use
# The part of the value that one more step may still promise: where classes separate, gradients vanish long before the minimum.
_PROMISE = {torch.float64: 1e-8, torch.float32: 1e-6}
_MAX_TRIALS = 30  # evaluations of one line search; halving 30 times is past float32's resolution
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}  # logits held at once: on the CPU they stay in the cache


@dataclass(frozen=True)
class Fit:
    """G solutions, one for each value of the grid.

    `objective` is scikit-learn's. `grad_norm` is the largest absolute entry of the gradient of objective / (C * N), which
    is what `tol` bounds. `classes` are the labels that occurred; the K rows of the weights stand for them.
    """

    C: np.ndarray  # float64 [G]
    weights: np.ndarray  # float64 [G, K, C]
    intercepts: np.ndarray  # float64 [G, K]
    classes: np.ndarray  # int64 [K]
    objective: np.ndarray  # float64 [G]
    grad_norm: np.ndarray  # float64 [G]
    iterations: np.ndarray  # int64 [G]
    converged: np.ndarray  # bool [G]
    evaluations: int  # of the objective, each for all the values that were still running

    def predict(self, features: Tensor) -> np.ndarray:
        """features [N, C] -> the likeliest label for each value of the grid, int64 [G, N]."""
        G, K, width = self.weights.shape
        weights = torch.as_tensor(self.weights).to(features).view(G * K, width)
        intercepts = torch.as_tensor(self.intercepts).to(features).view(G * K, 1)
        rows = _chunk_rows(features.device, G * K)
        best = [(weights @ x.T + intercepts).view(G, K, -1).argmax(1) for x in features.split(rows)]
        return self.classes[torch.cat(best, 1).cpu().numpy()]


@dataclass(frozen=True)
class Spectrum:
    """Mean and principal axes of features: what the solver needs to take steps of the right length along each axis."""

    mean: Tensor  # float64 [C]
    axes: Tensor  # float64 [C, C], one axis a column
    variances: Tensor  # float64 [C]

    @staticmethod
    def of(features: Tensor) -> Spectrum:
        """features [N, C] -> their spectrum; one pass, then an eigendecomposition of [C, C]."""
        N, width = features.shape
        mean = features.mean(0, dtype=torch.float64)
        covariance = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for x in features.split(1 << 14):
            centred = x - mean.to(x)
            covariance += centred.T @ centred
        variances, axes = torch.linalg.eigh(covariance / N)
        return Spectrum(mean, axes, variances.clamp_min(0.0))


def fit(
    features: Tensor,
    labels: np.ndarray,
    C_grid: Sequence[float],
    *,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    spectrum: Spectrum | None = None,
    start: Fit | None = None,
) -> Fit:
    """Minimises the objective for every value of the grid, in the precision and on the device of the features.

    Vectors (weights, gradients, history) are float64 whatever the features are. Labels that do not occur get no weights, as
    in scikit-learn; two labels share one weight vector there, so their penalty is counted twice here, which is the same.

    Args:
        features: float64 or float32 [N, C]. Standardise them first: the penalty treats all features alike.
        labels: int64 [N].
        C_grid: positive values, the G problems.
        tol: the bound on `Fit.grad_norm`.
        max_iterations: of each problem; one that needs more is returned with converged False.
        spectrum: of these features or of similar ones, to save computing it.
        start: a fit of one grid value with the same labels, to begin from.

    Raises:
        ValueError: shapes that do not match, features that are not finite, fewer than two labels, a bad grid or tol.
    """
    classes, targets = _check(features, labels, C_grid, tol)
    if start is not None:
        assert start.weights.shape == (1, len(classes), features.shape[1]), "start holds one fit of the same shape"
    spectrum = spectrum or Spectrum.of(features)
    problem = _Problem(features, torch.as_tensor(targets, device=features.device), len(classes), spectrum)
    strengths = torch.tensor(list(C_grid), dtype=torch.float64, device=features.device)
    state = _first_state(problem, problem.penalty / (strengths * len(features)), start)
    promise = _PROMISE[features.dtype]
    finished = []
    evaluations = 1
    while True:
        over = state.converged(tol, promise) | (state.iterations >= max_iterations) | (state.trials >= _MAX_TRIALS)
        if over.any():
            finished.append(state.keep(over))
            state = state.keep(~over)
        if not len(state.which):
            break
        _advance(problem, state)
        evaluations += 1
    return _as_fit(problem, finished, strengths, classes, tol, evaluations)


def _check(features: Tensor, labels: np.ndarray, C_grid: Sequence[float], tol: float) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, and each image's index into them."""
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"features of shape {list(features.shape)} do not go with {len(labels)} labels; give [N, C] and [N]")
    if not torch.isfinite(features).all():
        raise ValueError("the features hold values that are not finite; extract them again in fp32")
    if not len(C_grid) or not all(value > 0 and math.isfinite(value) for value in C_grid):
        raise ValueError(f"C_grid={list(C_grid)} must hold positive numbers")
    if not tol > 0:
        raise ValueError(f"tol={tol} must be greater than 0")
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"the labels hold {len(classes)} class only; a classifier needs at least 2")
    return classes.astype(np.int64), targets


def _chunk_rows(device: torch.device, columns: int) -> int:
    return max(64, _CHUNK[device.type] // columns)


class _Problem:
    """The data and the objective divided by C * N: mean cross entropy + strength / 2 * squared weights.

    Parameters are [G, K, C + 1]; the last column is the intercept as seen from the features' mean, which separates it from
    the weights. The solution is the same.
    """

    def __init__(self, features: Tensor, targets: Tensor, K: int, spectrum: Spectrum) -> None:
        self.features, self.targets, self.K, self.spectrum = features, targets, K, spectrum
        self.penalty = 2.0 if K == 2 else 1.0
        self.variances = torch.cat([spectrum.variances, spectrum.mean.new_ones(1)])  # the intercept's feature is a one

    def evaluate(self, theta: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta [G, K, C + 1], strength [G] -> value [G], gradient [G, K, C + 1] and the softmax's mean curvature [G].

        The last is the mean of p (1 - p), over images and over the K - 1 directions in which a softmax can move at all: 1 / K
        at zero, and little where most images are classified with certainty.
        """
        G, K, mean = len(theta), self.K, self.spectrum.mean
        weights = theta[..., :-1]
        shifted = theta[..., -1] - weights @ mean
        W, b = weights.reshape(G * K, -1).to(self.features), shifted.reshape(G * K, 1).to(self.features)
        value = theta.new_zeros(G)
        gradient, squares = torch.zeros_like(theta), theta.new_zeros(G)
        rows = _chunk_rows(theta.device, G * K)
        for x, y in zip(self.features.split(rows), self.targets.split(rows), strict=True):
            log_p = torch.log_softmax((W @ x.T).add_(b).view(G, K, -1), dim=1)
            target = y.expand(G, 1, -1)
            value -= log_p.gather(1, target).sum((1, 2), dtype=torch.float64)
            p = log_p.exp_()
            squares += torch.linalg.vector_norm(p, dim=(1, 2)).double().square()
            error = p.scatter_add_(1, target, p.new_full((1, 1, 1), -1.0).expand(target.shape))
            gradient[..., :-1] += (error.view(G * K, -1) @ x).view(G, K, -1)
            gradient[..., -1] += error.sum(2, dtype=torch.float64)
        gradient[..., :-1] -= gradient[..., -1:] * mean
        value /= len(self.features)
        gradient /= len(self.features)
        value += strength / 2 * weights.square().sum((1, 2))
        gradient[..., :-1] += strength[:, None, None] * weights
        return value, gradient, (1 - squares / len(self.features)).clamp_min(1e-12) / (K - 1)

    def grad_norm(self, gradient: Tensor) -> Tensor:
        """The largest absolute entry of the gradient for weights and the real intercept: [G, K, C + 1] -> [G]."""
        back = gradient[..., :-1] + gradient[..., -1:] * self.spectrum.mean
        return torch.maximum(back.abs().amax((1, 2)), gradient[..., -1].abs().amax(1))

    def precondition(self, vector: Tensor, strength: Tensor, curvature: Tensor) -> Tensor:
        """[G, K, C + 1] times an inverse Hessian: as if the softmax curved alike for all images and classes.

        Then it is diagonal along the features' axes: curvature * variance + strength.
        """
        axes = self.spectrum.axes
        hessian = curvature[:, None] * self.variances
        hessian[:, :-1] += strength[:, None]
        rotated = torch.cat([vector[..., :-1] @ axes, vector[..., -1:]], -1) / hessian[:, None]
        return torch.cat([rotated[..., :-1] @ axes.T, rotated[..., -1:]], -1)


@dataclass
class _State:
    """The problems that still run, in step with each other; every tensor's first dimension is the problem."""

    which: Tensor  # int64 [G], place in the grid
    strength: Tensor  # float64 [G]
    theta: Tensor  # [G, K, C + 1], the last accepted point, with its value, gradient and norm
    value: Tensor  # [G]
    gradient: Tensor  # as theta
    curvature: Tensor  # [G]
    grad_norm: Tensor  # [G]
    direction: Tensor  # as theta
    slope: Tensor  # [G], gradient . direction
    t: Tensor  # [G], the step length to try next, and the interval known to hold a good one
    low: Tensor  # [G]
    high: Tensor  # [G]
    trials: Tensor  # int64 [G]
    iterations: Tensor  # int64 [G]
    steps: Tensor  # [G, history, K * (C + 1)], rings of differences of points and of gradients
    changes: Tensor
    rho: Tensor  # [G, history], 1 / (step . change); 0 where the ring is empty

    def converged(self, tol: float, promise: float) -> Tensor:
        """bool [G]: the gradient is small, and so is the decrease that the next step promises."""
        return (self.grad_norm <= tol) & (-self.slope / 2 <= promise * self.value)

    def keep(self, mask: Tensor) -> _State:
        """The problems where the mask holds."""
        return _State(*(getattr(self, field.name)[mask] for field in fields(self)))


def _first_state(problem: _Problem, strength: Tensor, start: Fit | None) -> _State:
    G, width = len(strength), problem.features.shape[1]
    theta = torch.zeros(G, problem.K, width + 1, dtype=torch.float64, device=strength.device)
    if start is not None:
        theta[..., :-1] = torch.as_tensor(start.weights, device=strength.device)
        theta[..., -1] = torch.as_tensor(start.intercepts, device=strength.device) + theta[..., :-1] @ problem.spectrum.mean
    value, gradient, curvature = problem.evaluate(theta, strength)
    direction = -problem.precondition(gradient, strength, curvature)
    zeros, counts = strength.new_zeros(G), torch.zeros(G, dtype=torch.int64, device=strength.device)
    ring = theta.new_zeros(G, _HISTORY, theta[0].numel())
    return _State(
        which=torch.arange(G, device=strength.device),
        strength=strength,
        theta=theta,
        value=value,
        gradient=gradient,
        curvature=curvature,
        grad_norm=problem.grad_norm(gradient),
        direction=direction,
        slope=(gradient * direction).sum((1, 2)),
        t=torch.ones_like(zeros),
        low=zeros,
        high=torch.full_like(zeros, math.inf),
        trials=counts,
        iterations=counts.clone(),
        steps=ring,
        changes=ring.clone(),
        rho=theta.new_zeros(G, _HISTORY),
    )


def _advance(problem: _Problem, state: _State) -> None:
    """One evaluation: each problem either accepts its step and turns, or narrows its line search."""
    trial = state.theta + state.t[:, None, None] * state.direction
    value, gradient, curvature = problem.evaluate(trial, state.strength)
    slope = (gradient * state.direction).sum((1, 2))
    # Close to the minimum the decrease drowns in rounding; then only the slope can tell.
    rounding = 10 * torch.finfo(problem.features.dtype).eps * state.value.abs()
    too_long = ~(value <= state.value + _DECREASE * state.t * state.slope + rounding)  # also when the value is not a number
    too_short = ~too_long & (slope < _CURVATURE * state.slope)
    state.high = torch.where(too_long, state.t, state.high)
    state.low = torch.where(too_short, state.t, state.low)
    state.t = torch.where(state.high.isinf(), 2 * state.t, (state.low + state.high) / 2)
    state.trials = state.trials + 1
    i = (~too_long & ~too_short).nonzero()[:, 0]
    if len(i):
        state.curvature[i] = curvature[i]
        _accept(problem, state, i, trial[i], value[i], gradient[i])


def _accept(problem: _Problem, state: _State, i: Tensor, theta: Tensor, value: Tensor, gradient: Tensor) -> None:
    """Moves problems i to their new points, remembers how the gradient changed, and sets out in new directions."""
    step, change = (theta - state.theta[i]).flatten(1), (gradient - state.gradient[i]).flatten(1)
    slot = state.iterations[i] % _HISTORY
    state.steps[i, slot], state.changes[i, slot] = step, change
    state.rho[i, slot] = 1 / (step * change).sum(1)
    state.theta[i], state.value[i], state.gradient[i] = theta, value, gradient
    state.grad_norm[i] = problem.grad_norm(gradient)
    state.iterations[i] += 1
    direction = _direction(problem, state, i)
    state.direction[i], state.slope[i] = direction, (gradient * direction).sum((1, 2))
    state.t[i], state.low[i], state.high[i], state.trials[i] = 1.0, 0.0, math.inf, 0


def _direction(problem: _Problem, state: _State, i: Tensor) -> Tensor:
    """The two-loop recursion: minus the gradient times the inverse curvature that the last steps have shown."""
    q = state.gradient[i].flatten(1)
    newest = state.iterations[i] - 1
    order = [(newest - age) % _HISTORY for age in range(_HISTORY)]
    alphas = []
    for slot in order:
        alpha = state.rho[i, slot] * (state.steps[i, slot] * q).sum(1)
        q = q - alpha[:, None] * state.changes[i, slot]
        alphas.append(alpha)
    shape, model = state.theta[i].shape, (state.strength[i], state.curvature[i])
    last = state.changes[i, order[0]]
    scale = (last * problem.precondition(last.view(shape), *model).flatten(1)).sum(1) * state.rho[i, order[0]]
    r = problem.precondition(q.view(shape), *model).flatten(1) / scale[:, None]
    for slot, alpha in zip(reversed(order), reversed(alphas), strict=True):
        beta = state.rho[i, slot] * (state.changes[i, slot] * r).sum(1)
        r = r + (alpha - beta)[:, None] * state.steps[i, slot]
    return -r.view(shape)


def _as_fit(
    problem: _Problem, finished: list[_State], strengths: Tensor, classes: np.ndarray, tol: float, evaluations: int
) -> Fit:
    """The finished problems, back in the order of the grid and in scikit-learn's units."""
    order = torch.cat([state.which for state in finished]).argsort()

    def gather(name: str) -> Tensor:
        return torch.cat([getattr(state, name) for state in finished])[order]

    theta = gather("theta")
    weights = theta[..., :-1]
    intercepts = theta[..., -1] - weights @ problem.spectrum.mean
    return Fit(
        C=strengths.cpu().numpy(),
        weights=weights.cpu().numpy(),
        intercepts=intercepts.cpu().numpy(),
        classes=classes,
        objective=(gather("value") * strengths * len(problem.features)).cpu().numpy(),
        grad_norm=gather("grad_norm").cpu().numpy(),
        iterations=gather("iterations").cpu().numpy(),
        converged=torch.cat([state.converged(tol, _PROMISE[problem.features.dtype]) for state in finished])[order].cpu().numpy(),
        evaluations=evaluations,
    )
