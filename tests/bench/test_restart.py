"""The benchmark of restarts: which starts are rows, and what it says without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import restart

from igpt_ds.train.ledger.goodput import CATEGORIES, Goodput, StartGoodput


def start(how: str = "killed", failed: bool = True, **seconds: float) -> StartGoodput:
    """A start of so many seconds; "startup" stands for start-up."""
    known = dict.fromkeys(CATEGORIES, 0.0) | {name.replace("startup", "start-up"): value for name, value in seconds.items()}
    return StartGoodput(0.0, 0.0, 0, 1, how, failed, known)


def test_a_row_for_each_restart_inside_the_job() -> None:
    starts = [
        start("rank 1 killed", startup=10, training=50),
        start("node2 is lost", down=4, startup=11, compilation=2, training=50),
        start("ended before the first step", down=20, startup=5),
        start("a loss that diverged", down=3, startup=15, training=50),
        start("stopped", failed=False, queue=100, down=1, startup=9, training=50),
        start("ended", failed=False, down=1, startup=9, training=50),
    ]
    first, second = restart.rows(Goodput("run", tuple(starts)))
    assert (first.what, first.ours, first.peer, first.holds) == ("rank 1 killed", 17, 40, True)
    assert (second.what, second.ours, second.holds) == ("node2 is lost", 43, False)
    assert (first.note, second.note) == ("4.0 s down, 13.0 s start-up", "23.0 s down, 20.0 s start-up")


def test_runs_without_a_restart_are_refused(tool: Any, tmp_path: Path) -> None:
    row = '{"event": "begin", "time": "2026-11-30T10:00:00+00:00", "step": 0, "seconds": {"imports": 1.0}}'
    (tmp_path / "restarts.jsonl").write_text(f"{row}\n")
    for words, refusal in (((), "--runs is missing"), (("--runs", tmp_path), "no start followed a failure inside a job")):
        status, _, said = tool("bench/restart", *words)
        assert (status, refusal in said) == (2, True), said
