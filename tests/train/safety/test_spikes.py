"""Guards: calm training passes, a spike that stays is noticed, and an interruption changes no verdict."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.config import ModelConfig, Recipe, override
from igpt_ds.schema import record_from, to_json
from igpt_ds.train.safety.spikes import MAX_SKIPS, MAX_SKIPS_FP16, WORSE_THAN_CHANCE, Guard, SpikeState, Verdict, advice

RECIPE = Recipe("r", ModelConfig(2, 2, 16, 4, 512), 12, 10_000, 0.01, 3)


def verdicts(guard: Guard, losses: list[float], first: int = 1) -> list[Verdict]:
    return [guard.see(step, loss, False) for step, loss in enumerate(losses, first)]


def falling(n: int, noise: float = 0.03) -> list[float]:
    """A calm run: from ln V down, with a batch's noise."""
    steps = np.arange(n)
    return list(2.5 + (math.log(512) - 2.5) * np.exp(-steps / 150) + noise * np.random.default_rng(0).standard_normal(n))


def test_calm_training_is_calm() -> None:
    guard = Guard(RECIPE, "fp32")
    assert set(verdicts(guard, falling(3000))) == {Verdict.CALM}
    assert len(guard.window) == RECIPE.spike_window


def test_a_bad_batch_passes_and_is_not_counted_in() -> None:
    guard = Guard(RECIPE, "fp32")
    verdicts(guard, falling(500))
    window = list(guard.window)
    assert verdicts(guard, [4.0] * (RECIPE.spike_patience - 1), 501) == [Verdict.DOUBTFUL] * (RECIPE.spike_patience - 1)
    assert (guard.since, guard.window) == (501, window)
    assert guard.see(510, 2.6, False) is Verdict.CALM
    assert (guard.since, guard.spiked) == (None, 0)


def test_a_spike_that_stays_is_lost() -> None:
    guard = Guard(RECIPE, "fp32")
    verdicts(guard, falling(500))
    found = verdicts(guard, list(np.linspace(2.5, 6.0, 40)), 501)
    assert Verdict.LOST in found
    assert found.index(Verdict.LOST) < 25  # it need not reach the top: what rises slowly does not pull the mean along
    assert guard.why.startswith("it was above ")


def test_a_rate_too_high_from_the_beginning_is_noticed_before_any_window_is_full() -> None:
    guard = Guard(RECIPE, "fp32")
    limit = math.log(512) + WORSE_THAN_CHANCE
    assert guard.limit() == limit
    assert verdicts(guard, [limit + 0.01] * RECIPE.spike_patience)[-1] is Verdict.LOST
    assert guard.since == 1


def test_sigmas_of_nothing_watch_for_nothing() -> None:
    guard = Guard(dataclasses.replace(RECIPE, spike_sigmas=0.0), "fp32")
    assert set(verdicts(guard, [1.0] * 200 + [1e9] * 200)) == {Verdict.CALM}


@pytest.mark.parametrize(("precision", "most"), [("fp32", MAX_SKIPS), ("fp16", MAX_SKIPS_FP16)])
def test_skipped_steps_in_a_row(precision: str, most: int) -> None:
    guard = Guard(RECIPE, precision)
    assert [guard.see(step, math.nan, True) for step in range(1, most)] == [Verdict.DOUBTFUL] * (most - 1)
    assert guard.see(most, 6.0, False) is Verdict.CALM
    assert [guard.see(step, 6.0, True) for step in range(most)][-1] is Verdict.LOST
    assert guard.skipped == 2 * most - 1
    assert guard.why == f"{most} steps in a row were skipped"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 20), st.just(math.nan), st.just(math.inf)), max_size=120),
    st.integers(0, 120),
    st.integers(1, 40),
)
def test_an_interruption_changes_no_verdict(losses: list[float], where: int, window: int) -> None:
    """Through JSON, as a manifest carries it."""
    recipe = dataclasses.replace(RECIPE, spike_window=window, spike_patience=3)
    whole, before = Guard(recipe, "fp32"), Guard(recipe, "fp32")
    expected = [whole.see(step, loss, not math.isfinite(loss)) for step, loss in enumerate(losses)]
    found = [before.see(step, loss, not math.isfinite(loss)) for step, loss in enumerate(losses[:where])]
    after = Guard(
        recipe, "fp32", record_from(SpikeState, json.loads(json.dumps(to_json(before.state()))), "a manifest", "restore it")
    )
    found += [after.see(step, loss, not math.isfinite(loss)) for step, loss in enumerate(losses[where:], len(losses[:where]))]
    assert found == expected
    assert after.state() == whole.state()


def test_advice_names_nothing_that_was_done_already_or_cannot_help() -> None:
    anew = "start again with a lower --lr in another --run_dir"
    assert all(advice(*case).startswith(anew) for case in ((0, 0, True), (3, 3, True), (0, 3, False), (0, 0, False)))
    assert advice(0, 0, True).endswith(", or continue with --resume auto --on_spike rollback")
    assert advice(3, 3, True).endswith(", or continue with --resume auto and more --max_rollbacks than 3")
    for rollbacks, most in ((0, 0), (0, 3), (3, 3)):  # resumed or rolled back, it would come to the same place again
        assert advice(rollbacks, most, False).endswith(", with a --save_every that leaves a checkpoint before that step")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spike_window": 0}, "spike_window=0 must be a whole number of at least 1"),
        ({"spike_patience": 0}, "spike_patience=0 must be a whole number of at least 1"),
        ({"spike_sigmas": -1.0}, r"spike_sigmas=-1\.0 must not be negative \(0 watches for no spikes\)"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(RECIPE, **changes)
