"""Warm-up, peak, cosine (paper 3.4)."""

import math

import pytest

from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.train.schedule import learning_rate


def recipe(steps: int, warmup_steps: int) -> Recipe:
    return Recipe("x", ModelConfig(1, 1, 1), batch_images=1, steps=steps, lr=0.01, warmup_steps=warmup_steps)


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    rates = [learning_rate(recipe(100, 4), step) for step in range(5)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_cosine_falls_to_0() -> None:
    plan = recipe(104, 4)
    assert learning_rate(plan, 54) == pytest.approx(0.005)
    assert learning_rate(plan, 79) == pytest.approx(0.01 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert learning_rate(plan, 104) == pytest.approx(0, abs=1e-12)
    rates = [learning_rate(plan, step) for step in range(4, 105)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up_and_nothing_but_warm_up() -> None:
    assert learning_rate(recipe(10, 0), 0) == 0.01
    assert learning_rate(recipe(10, 10), 9) == 0.01
