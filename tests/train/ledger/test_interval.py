"""The interval of --save_every auto: from measured costs and failures."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from igpt_ds.plan.goodput import GPU_MTBF, HOUR, MOST_INTERVAL, best_interval
from igpt_ds.train.cadence import steps_or_auto
from igpt_ds.train.ledger.goodput import CATEGORIES, Goodput, SaveCost, StartGoodput
from igpt_ds.train.ledger.interval import FIRST, SaveInterval, choose
from igpt_ds.train.ledger.rows import BEGIN, SAVE, TRAIN, append_row, timestamp

START = StartGoodput(0.0, 4 * HOUR, 0, 100, "killed", True, dict.fromkeys(CATEGORIES, 0.0))
SAVES = (SaveCost(10, 20.0, 5.0), SaveCost(10, 21.0, 5.0), SaveCost(10, 90.0, 50.0))


def test_failures_and_costs_choose_the_interval() -> None:
    once = choose(Goodput("run", (START,), SAVES), 1024)
    assert once.steps == round(best_interval(5.0, (4 * HOUR + GPU_MTBF / 1024) / 2) * 10 / 21)
    assert "1 failure in 4 h" in once.why
    often = choose(Goodput("run", (START,) * 8, SAVES), 1024)
    never = choose(Goodput("run", (dataclasses.replace(START, failed=False),), SAVES), 1024)
    dear = choose(Goodput("run", (START,), (SaveCost(10, 20.0, 50.0),)), 1024)
    assert often.steps < once.steps < min(never.steps, dear.steps)
    assert choose(Goodput("run", (START,)), 1024).steps == FIRST
    assert choose(Goodput("run", (), SAVES), 1).steps == round(MOST_INTERVAL * 10 / 21)


def test_a_run_saves_early_and_then_by_its_ledger(tmp_path: Path) -> None:
    said: list[str] = []
    interval = SaveInterval(tmp_path, 1, 0, said.append)
    assert next(step for step in range(1, 25) if interval.due(step)) == FIRST
    for event, at, step, seconds in ((BEGIN, 0, 0, 0), (TRAIN, 0, 0, 0), (SAVE, 8, 10, 6), (SAVE, 16, 20, 6), (SAVE, 24, 30, 6)):
        row = {"event": event, "time": timestamp(1e9 + at), "step": step, "seconds": {"step": seconds, "save": at and 2}}
        append_row(tmp_path / "restarts.jsonl", row | ({"began": timestamp(1e9)} if event == BEGIN else {}))
    interval.saved(30)
    steps = round(MOST_INTERVAL / 0.6)
    assert [line.partition(":")[0] for line in said] == ["saves"] * 2
    assert f"every {steps:,} steps: training stands still for 2 s; 0 failures in 24 s" in said[1]
    assert [interval.due(30 + steps + more) for more in (-1, 0, 1)] == [False, True, True]
    assert not interval.due(20)  # after a rollback
    assert interval.due(19 + steps)


def test_a_start_at_a_fast_state_counts_from_the_newest_checkpoint_of_the_run_directory(tmp_path: Path) -> None:
    interval = SaveInterval(tmp_path, 1, 3, [].append)  # the run continues at a fast state of step 8
    assert next(step for step in range(9, 40) if interval.due(step)) == 3 + FIRST


def test_the_values_of_the_flag() -> None:
    assert [steps_or_auto(text) for text in ("auto", "0", "-1")] == ["auto", 0, -1]
    with pytest.raises(argparse.ArgumentTypeError, match="'often' is neither a number of steps nor auto"):
        steps_or_auto("often")
