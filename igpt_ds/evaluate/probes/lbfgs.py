"""L-BFGS for many problems at once. In: G starting points. Out: G minima. One evaluation serves all unfinished problems.

Each problem has its own history, line search and end. In every evaluation it either accepts its step or narrows its line search,
so no problem waits for another. The problem provides the first guess of the inverse Hessian (`precondition`), which keeps the
number of iterations small. Called by `logistic.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

_HISTORY = 10  # pairs of the two-loop recursion
_DECREASE, _CURVATURE = 1e-4, 0.9  # the weak Wolfe conditions, with the constants that quasi-Newton methods use
_MAX_TRIALS = 30  # evaluations of one line search; halving 30 times is past float32's resolution


class Problem(Protocol):
    """G smooth functions of P variables each; `which` [g] has the numbers of the functions in the first dimension.

    Attributes:
        resolution: relative rounding error of the values.
        promise: largest relative decrease that the next step predicts at a minimum.
    """

    resolution: float
    promise: float

    def evaluate(self, theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta [g, P] -> values [g], gradients [g, P], and the curvature [g] for `precondition`."""

    def precondition(self, vector: Tensor, which: Tensor, curvature: Tensor) -> Tensor:
        """[g, P] -> [g, P], multiplied by an approximate inverse Hessian."""

    def grad_norm(self, gradient: Tensor) -> Tensor:
        """[g, P] -> [g], the norm that `tol` bounds."""


@dataclass(frozen=True)
class Minimum:
    """The ends of the G problems. A problem without iterations or decreasing steps left has not converged."""

    theta: Tensor  # [G, P]
    value: Tensor  # [G]
    grad_norm: Tensor  # [G]
    iterations: Tensor  # int64 [G]
    converged: Tensor  # bool [G]
    evaluations: int  # of all unfinished problems at once


@dataclass
class _State:
    """The unfinished problems."""

    which: Tensor  # int64 [g]
    theta: Tensor  # [g, P], the last accepted point; the next four are its values:
    value: Tensor  # [g]
    gradient: Tensor  # [g, P]
    curvature: Tensor  # [g]
    grad_norm: Tensor  # [g]
    direction: Tensor  # [g, P], of the next step
    slope: Tensor  # [g], gradient . direction
    t: Tensor  # [g], the next step length, between:
    low: Tensor  # [g]
    high: Tensor  # [g]
    trials: Tensor  # int64 [g], of this line search
    iterations: Tensor  # int64 [g]
    steps: Tensor  # [g, _HISTORY, P], rings of differences of points, and of gradients:
    changes: Tensor
    rho: Tensor  # [g, _HISTORY], 1 / (step . change); 0 for an empty slot, which the recursion ignores

    def converged(self, problem: Problem, tol: float) -> Tensor:
        """bool [g]: the gradient and the predicted decrease of the next step are small."""
        return (self.grad_norm <= tol) & (-self.slope / 2 <= problem.promise * self.value.abs())

    def keep(self, mask: Tensor) -> _State:
        """The problems for which the mask is true."""
        return _State(*(getattr(self, field.name)[mask] for field in fields(self)))


def minimise(problem: Problem, theta: Tensor, tol: float, max_iterations: int) -> Minimum:
    """Minimises each problem from its row of theta [G, P]."""
    state = _begin(problem, theta)
    ended: list[_State] = []
    evaluations = 1
    while True:
        exhausted = (state.iterations >= max_iterations) | (state.trials >= _MAX_TRIALS)
        over = state.converged(problem, tol) | exhausted
        if over.any():
            ended.append(state.keep(over))
            state = state.keep(~over)
        if not len(state.which):
            break
        _advance(problem, state)
        evaluations += 1
    order = torch.cat([part.which for part in ended]).argsort()
    theta, value, grad_norm, iterations = (
        torch.cat([getattr(part, name) for part in ended])[order] for name in ("theta", "value", "grad_norm", "iterations")
    )
    converged = torch.cat([part.converged(problem, tol) for part in ended])[order]
    return Minimum(theta, value, grad_norm, iterations, converged, evaluations)


def _begin(problem: Problem, theta: Tensor) -> _State:
    G = len(theta)
    which = torch.arange(G, device=theta.device)
    value, gradient, curvature = problem.evaluate(theta, which)
    direction = -problem.precondition(gradient, which, curvature)
    ring = theta[:, None].expand(-1, _HISTORY, -1)
    return _State(
        which=which,
        theta=theta,
        value=value,
        gradient=gradient,
        curvature=curvature,
        grad_norm=problem.grad_norm(gradient),
        direction=direction,
        slope=(gradient * direction).sum(1),
        t=torch.ones_like(value),
        low=torch.zeros_like(value),
        high=torch.full_like(value, math.inf),
        trials=torch.zeros_like(which),
        iterations=torch.zeros_like(which),
        steps=torch.zeros_like(ring),
        changes=torch.zeros_like(ring),
        rho=theta.new_zeros(G, _HISTORY),
    )


def _advance(problem: Problem, state: _State) -> None:
    """One evaluation: each problem accepts its step and gets a new direction, or bisects its line search."""
    trial = state.theta + state.t[:, None] * state.direction
    value, gradient, curvature = problem.evaluate(trial, state.which)
    slope = (gradient * state.direction).sum(1)
    # Near the minimum the decrease is below the rounding error, and only the slope decides.
    enough = state.value + _DECREASE * state.t * state.slope + problem.resolution * state.value.abs()
    too_long = ~(value <= enough)  # true for NaN
    too_short = ~too_long & (slope < _CURVATURE * state.slope)
    state.high = torch.where(too_long, state.t, state.high)
    state.low = torch.where(too_short, state.t, state.low)
    state.t = torch.where(state.high.isinf(), 2 * state.t, (state.low + state.high) / 2)
    state.trials += 1
    accepted = (~too_long & ~too_short).nonzero()[:, 0]
    if len(accepted):
        state.curvature[accepted] = curvature[accepted]
        _turn(problem, state, accepted, trial[accepted], value[accepted], gradient[accepted])


def _turn(problem: Problem, state: _State, i: Tensor, theta: Tensor, value: Tensor, gradient: Tensor) -> None:
    """Moves problems i to their new points, stores the change of the gradient, and sets new directions."""
    step, change = theta - state.theta[i], gradient - state.gradient[i]
    slot = state.iterations[i] % _HISTORY
    state.steps[i, slot], state.changes[i, slot] = step, change
    state.rho[i, slot] = 1 / (step * change).sum(1)
    state.theta[i], state.value[i], state.gradient[i] = theta, value, gradient
    state.grad_norm[i] = problem.grad_norm(gradient)
    state.iterations[i] += 1
    direction = _direction(problem, state, i)
    state.direction[i], state.slope[i] = direction, (gradient * direction).sum(1)
    state.t[i], state.low[i], state.high[i], state.trials[i] = 1.0, 0.0, math.inf, 0


def _direction(problem: Problem, state: _State, i: Tensor) -> Tensor:
    """The two-loop recursion: minus the gradient times the inverse Hessian of the last steps, [len(i), P]."""
    which, curvature = state.which[i], state.curvature[i]
    q = state.gradient[i]
    newest = state.iterations[i] - 1
    slots = [(newest - age) % _HISTORY for age in range(_HISTORY)]
    alphas = []
    for slot in slots:
        alpha = state.rho[i, slot] * (state.steps[i, slot] * q).sum(1)
        q = q - alpha[:, None] * state.changes[i, slot]
        alphas.append(alpha)
    last = state.changes[i, slots[0]]
    scale = (last * problem.precondition(last, which, curvature)).sum(1) * state.rho[i, slots[0]]
    r = problem.precondition(q, which, curvature) / scale[:, None]
    for slot, alpha in zip(reversed(slots), reversed(alphas), strict=True):
        beta = state.rho[i, slot] * (state.changes[i, slot] * r).sum(1)
        r = r + (alpha - beta)[:, None] * state.steps[i, slot]
    return -r
