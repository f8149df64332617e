"""The batched minimiser on functions whose minima are known, each problem as if it were alone."""

from __future__ import annotations

import pytest
import torch

from igpt_ds.evaluate.probes.lbfgs import minimise


class Quadratics:
    """G quadratics x A x / 2 - b x with condition numbers from 1 to 10^4."""

    resolution, promise = 1e-12, 1e-12

    def __init__(self, G: int = 5, P: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(G, P, P, generator=generator, dtype=torch.float64)).Q
        spectrum = torch.stack([torch.logspace(0, g, P, dtype=torch.float64) for g in range(G)])
        self.A = q @ torch.diag_embed(spectrum) @ q.mT
        self.b = torch.randn(G, P, generator=generator, dtype=torch.float64)
        self.asked: list[int] = []

    def evaluate(self, theta, which):
        self.asked.append(len(which))
        image = (self.A[which] @ theta[..., None])[..., 0]
        return (theta * (image / 2 - self.b[which])).sum(1), image - self.b[which], torch.ones(len(which)).double()

    def precondition(self, vector, which, curvature):
        return vector

    def grad_norm(self, gradient):
        return gradient.abs().amax(1)


class Rosenbrock(Quadratics):
    """The curved valley, where line searches have to work: minimum 0 at (1, 1)."""

    def evaluate(self, theta, which):
        x, y = theta[:, 0], theta[:, 1]
        value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        gradient = torch.stack([2 * (x - 1) - 400 * x * (y - x**2), 200 * (y - x**2)], 1)
        return value, gradient, torch.ones_like(value)


def test_quadratics_are_solved_and_the_finished_leave():
    problem = Quadratics()
    found = minimise(problem, torch.zeros(5, 12, dtype=torch.float64), tol=1e-9, max_iterations=500)
    torch.testing.assert_close(found.theta, torch.linalg.solve(problem.A, problem.b), rtol=1e-6, atol=1e-8)
    assert found.converged.all()
    assert (found.grad_norm <= 1e-9).all()
    assert len(problem.asked) == found.evaluations
    assert problem.asked[0] == 5
    assert problem.asked[-1] < 5
    assert problem.asked == sorted(problem.asked, reverse=True)
    assert found.iterations[0] < found.iterations[-1]


def test_each_problem_as_if_alone():
    together = minimise(Quadratics(), torch.zeros(5, 12, dtype=torch.float64), tol=1e-9, max_iterations=500)
    for g in range(5):
        problem = Quadratics()
        problem.A, problem.b = problem.A[g : g + 1], problem.b[g : g + 1]
        alone = minimise(problem, torch.zeros(1, 12, dtype=torch.float64), tol=1e-9, max_iterations=500)
        assert abs(int(alone.iterations) - int(together.iterations[g])) <= 2
        torch.testing.assert_close(alone.theta[0], together.theta[g], rtol=1e-6, atol=1e-7)


def test_a_curved_valley():
    start = torch.tensor([[-1.2, 1.0], [3.0, -3.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = minimise(Rosenbrock(), start, tol=1e-8, max_iterations=500)
    torch.testing.assert_close(found.theta, torch.ones(4, 2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert int(found.iterations[3]) == 0, "it began at the minimum"


def test_what_runs_out_has_not_converged():
    found = minimise(Quadratics(), torch.zeros(5, 12, dtype=torch.float64), tol=1e-9, max_iterations=8)
    assert found.converged.tolist() == [True, False, False, False, False]
    assert found.iterations.tolist()[1:] == [8, 8, 8, 8]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_function_that_breaks_off_ends(wrong):
    class Broken(Quadratics):
        def evaluate(self, theta, which):
            value, gradient, curvature = super().evaluate(theta, which)
            return torch.where(theta.abs().sum(1) > 0, wrong, value), gradient, curvature

    found = minimise(Broken(), torch.zeros(5, 12, dtype=torch.float64), tol=1e-9, max_iterations=100)
    assert not found.converged.any()
    assert found.evaluations == 31
    assert (found.theta == 0).all()
