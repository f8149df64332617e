"""The benchmark of the ledger: its rows and bars, and the whole program at toy size."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import goodput
import numpy as np
import pytest
from harness import read_bench

from igpt_ds.plan.goodput import Measured, expected, fit
from igpt_ds.plan.goodput_command import read_measured
from igpt_ds.train.ledger.goodput import CATEGORIES, Goodput, SaveCost, StartGoodput


def measured(wall: float, training: float, unexplained: float = 0.0, down: float = 10.0) -> goodput.Disturbed:
    """A run of two starts of 50 s by its ledger, 10 of them down, which this program saw take `wall` seconds, with one fault."""
    seconds = dict.fromkeys(CATEGORIES, 0.0) | {
        "training": training / 2,
        "start-up": 10.0,
        "unexplained": unexplained,
        "down": 5.0,
    }
    seconds["lost work"] = 35 - training / 2 - unexplained
    starts = tuple(StartGoodput(0.0, 45.0, 0, 1, how, how == "killed", seconds) for how in ("killed", "stopped"))
    return goodput.Disturbed(wall, down, 1, Goodput("run", starts, (SaveCost(10, 2.0, 0.1),)))


def test_rows_and_bars() -> None:
    found = [measured(100.0, 60), measured(101.5, 60), measured(100.0, 60, unexplained=0.3), measured(100.0, 60)]
    whole, worst, down, prediction = goodput.rows(found, bars=True)
    assert (whole.ours, whole.holds, whole.note) == (pytest.approx(100 * 1.5 / 401.5), True, "4 faults in 4 runs, 0.1 h")
    assert (worst.ours, worst.holds) == (pytest.approx(100 * 1.5 / 101.5), False)
    assert (down.ours, down.bar) == (0.0, None)
    half = [Measured.of(one.ledger.to_dict()) for one in found[::2]]
    stopped = fit([replace(one, failures=2, after_failures=None) for one in half])  # the stop at the end counts as a failure
    assert found[0].measured == replace(half[0], failures=2, after_failures=None)
    seen = measured(100.0, 60, down=6.0).measured  # a start of 4 s without a row
    assert (seen.seconds["down"], seen.seconds["start-up"]) == (6.0, 24.0)
    assert stopped.mtbf == pytest.approx(44.85)
    assert prediction.ours == pytest.approx(100 * abs(expected(stopped) - 0.6))
    assert all(row.bar is None for row in goodput.rows(found, bars=False))


def test_the_times_of_a_run_are_spread_over_the_exponential_distribution() -> None:
    trial = goodput.Trial(runs=1, faults=9, up=25.0, down=1.0)
    times = goodput.up_times(trial, random.Random(3))
    bounds = [-25 * math.log(1 - part / 10) for part in range(10)] + [math.inf]
    assert all(low <= time < high for low, time, high in zip(bounds, sorted(times), bounds[1:], strict=False))
    assert times != sorted(times)
    assert np.mean([goodput.up_times(trial, random.Random(seed)) for seed in range(2000)]) == pytest.approx(25, rel=0.02)


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size(launch: Any, tool: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = launch(["tools/bench/goodput.py", "--toy", "--out", out, "--runs", tmp_path / "runs.jsonl"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row.bar for row in read_bench(out).rows] == [None] * 4
    assert "prediction by half of the runs" in tool("bench/goodput", "--show", out)[1]
    assert len(read_measured([tmp_path / "runs.jsonl"])) == 2
