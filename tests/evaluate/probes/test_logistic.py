"""Logistic regression against scikit-learn, on the real digits and on features that are hard for a solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from igpt_ds.evaluate.probes.logistic import Spectrum, fit_logistic

GRID = [1e-5, 1e-3, 1e-1, 1.0, 10.0]


def standardised(features):
    deviation = features.std(0)
    return (features - features.mean(0)) / np.where(deviation > 0, deviation, 1)


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    return standardised(features), labels.astype(np.int64)


def reference(features, labels, C):
    """scikit-learn's solution by Newton's method, and its objective by its own documentation.

    Newton's method converges in about ten steps at any scale of the features. L-BFGS takes thousands of steps on unscaled
    features, and whether it converges depends on the processor's rounding.
    """
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-9).fit(features, labels)
    cross_entropy = log_loss(labels, model.predict_proba(features), normalize=False, labels=model.classes_)
    return model, C * cross_entropy + 0.5 * (model.coef_**2).sum()


def check_against_reference(features, labels, grid, agree=0.999, dtype=torch.float64):
    found = fit_logistic(torch.from_numpy(features).to(dtype), labels, grid)
    assert found.converged.all()
    assert (found.grad_norm <= 1e-6).all()
    predicted = found.predict(torch.from_numpy(features).to(dtype))
    for g, C in enumerate(grid):
        model, objective = reference(features, labels, C)
        assert found.objective[g] == pytest.approx(objective, rel=1e-6), f"C={C}"
        assert (predicted[g] == model.predict(features)).mean() >= agree
    return found


def test_digits_equal_scikit_learn(digits):
    found = check_against_reference(*digits, GRID)
    assert (np.diff(found.iterations) > 0).all(), "a weaker penalty takes longer, and the finished leave"
    assert found.evaluations < 2 * found.iterations.max()


def test_raw_scale_equals_scikit_learn(digits):
    """Features far from standard: constant columns, a large mean, scales from 1 to 100."""
    features, labels = digits
    stretched = features * np.logspace(0, 2, 64) + 50
    check_against_reference(stretched, labels, [1e-4])


def test_more_features_than_images(digits):
    features, labels = digits
    rng = np.random.default_rng(0)
    wide = standardised(np.concatenate([features[:100], features[:100] ** 2, rng.normal(size=(100, 40))], 1))
    check_against_reference(wide, labels[:100], [1e-2, 1.0])


def test_features_that_repeat_each_other(digits):
    features, labels = digits
    rng = np.random.default_rng(0)
    twice = np.concatenate([features, features[:, 20:40] * 3 + 1e-4 * rng.normal(size=(len(features), 20))], 1)
    check_against_reference(standardised(twice), labels, [1e-3, 1e-1])


def test_two_classes_equal_scikit_learn(digits):
    features, labels = digits
    chosen = np.isin(labels, (3, 8))
    found = check_against_reference(features[chosen], labels[chosen], GRID)
    assert found.classes.tolist() == [3, 8]
    np.testing.assert_allclose(found.weights[:, 0], -found.weights[:, 1], atol=1e-8)


def test_labels_that_do_not_occur(digits):
    features, labels = digits
    chosen = ~np.isin(labels, (0, 4, 9))
    found = check_against_reference(features[chosen], labels[chosen], [1e-2, 1.0])
    assert found.classes.tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert set(np.unique(found.predict(torch.from_numpy(features)))) <= set(found.classes.tolist())


def test_float32_equals_scikit_learn_too(digits):
    """The end is in float64, so that objective, gradient and predictions are as exact as with float64 features."""
    found = check_against_reference(*digits, GRID, dtype=torch.float32)
    assert found.weights.dtype == np.float64


def test_the_order_of_the_grid_means_nothing(digits):
    features, labels = digits
    tensor = torch.from_numpy(features)
    for grid in (GRID, GRID[:4], GRID[:3]):
        mixed = list(np.random.default_rng(0).permutation(grid))
        one, other = fit_logistic(tensor, labels, grid), fit_logistic(tensor, labels, mixed)
        place = [grid.index(C) for C in mixed]
        assert other.C.tolist() == mixed
        np.testing.assert_allclose(other.objective, one.objective[place], rtol=1e-7)
        assert other.iterations.tolist() == one.iterations[place].tolist()


def test_neighbours_save_work(digits):
    """With each value from zero, the weakest penalties would take as long as their coarse neighbours."""
    features, labels = digits
    grid = list(np.logspace(-5, 1, 12))
    together = fit_logistic(torch.from_numpy(features), labels, grid)
    cold = sum(int(fit_logistic(torch.from_numpy(features), labels, [C]).iterations[0]) for C in grid)
    assert together.converged.all()
    assert together.iterations.sum() < 0.9 * cold


def test_a_grid_is_its_values_one_by_one(digits):
    features, labels = digits
    together = fit_logistic(torch.from_numpy(features), labels, GRID)
    for g, C in enumerate(GRID):
        alone = fit_logistic(torch.from_numpy(features), labels, [C])
        assert alone.objective[0] == pytest.approx(together.objective[g], rel=1e-6)
        np.testing.assert_allclose(together.only(g).weights, alone.weights, atol=2e-3)


def test_a_start_saves_iterations(digits):
    features, labels = digits
    tensor = torch.from_numpy(features)
    part = fit_logistic(tensor[:1600], labels[:1600], [1.0])
    cold = fit_logistic(tensor, labels, [1.0])
    warm = fit_logistic(tensor, labels, [1.0], start=part, spectrum=Spectrum.of(tensor))
    again = fit_logistic(tensor, labels, [1.0], start=cold)
    assert warm.objective[0] == pytest.approx(cold.objective[0], rel=1e-6)
    assert again.iterations[0] <= 5 < warm.iterations[0] < cold.iterations[0]


def test_chunks_change_nothing(digits, monkeypatch):
    features, labels = digits
    whole = fit_logistic(torch.from_numpy(features), labels, [0.1, 1.0])
    monkeypatch.setattr("igpt_ds.evaluate.probes.logistic._LOGITS", {"cpu": 1})  # 64 rows at a time
    pieces = fit_logistic(torch.from_numpy(features), labels, [0.1, 1.0])
    np.testing.assert_allclose(pieces.objective, whole.objective, rtol=1e-7)
    assert np.array_equal(pieces.predict(torch.from_numpy(features)), whole.predict(torch.from_numpy(features)))


def test_too_few_iterations_are_admitted(digits):
    features, labels = digits
    found = fit_logistic(torch.from_numpy(features), labels, [1e-5, 10.0], max_iterations=5)
    assert found.converged.tolist() == [True, False]
    assert found.iterations.tolist()[1] == 5
    assert found.grad_norm[1] > 1e-6


def test_features_that_say_nothing():
    """All constant: the best there is are the intercepts, the logarithms of the classes' frequencies."""
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    found = fit_logistic(torch.zeros(100, 4, dtype=torch.float64), labels, [1.0])
    assert found.converged.all()
    probabilities = np.exp(found.intercepts[0]) / np.exp(found.intercepts[0]).sum()
    np.testing.assert_allclose(probabilities, [0.6, 0.3, 0.1], atol=1e-5)
    assert (found.weights == 0).all()


X, Y = torch.zeros(4, 2, dtype=torch.float64), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((X, Y[:3], [1.0]), r"features of shape \[4, 2\] do not match 3 labels"),
        ((X[0], Y, [1.0]), r"features of shape \[2\] do not match 4 labels"),
        ((X + float("nan"), Y, [1.0]), "values that are not finite"),
        ((X, Y, []), r"C_grid=\[\] must hold positive numbers"),
        ((X, Y, [1.0, -1.0]), r"C_grid=\[1\.0, -1\.0\] must hold positive numbers"),
        ((X, Y, [float("inf")]), r"C_grid=\[inf\] must hold positive numbers"),
        ((X, Y * 0, [1.0]), "the labels hold 1 class; a classifier needs at least 2"),
    ],
)
def test_bad_input(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit_logistic(*arguments)


def test_bad_tol():
    with pytest.raises(ValueError, match="tol=inf must be greater than 0 and finite"):
        fit_logistic(X, Y, [1.0], tol=float("inf"))
    with pytest.raises(ValueError, match="tol=0 must be greater than 0"):
        fit_logistic(X, Y, [1.0], tol=0)
