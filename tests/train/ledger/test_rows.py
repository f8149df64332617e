"""The rows of a start add up to its wall clock, and rows of batch jobs, torn lines and other files do not hurt."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from igpt_ds.train.ledger import rows as ledger
from igpt_ds.train.ledger.rows import BEGIN, EXIT, SAVE, TRAIN, Ledger, read_rows
from igpt_ds.train.safety.watchdog import Watchdog


def test_the_seconds_of_all_phases_are_the_wall_clock(tmp_path: Path) -> None:
    (tmp_path / "restarts.jsonl").write_text('{"event": "start", "job": "7"}\nno JSON\n[]\n{"event": "sta')
    watchdog = Watchdog(tmp_path, hang_minutes=0)
    watchdog.start()
    watchdog.settle()
    for phase in ("verifying", "loading", "start"):
        time.sleep(0.02)
        watchdog.alive(phase, 0)
    watchdog.ledger.record(TRAIN, 0, resume=True)
    for step in (1, 2):
        watchdog.alive("step", step - 1)
        time.sleep(0.02)
        watchdog.alive("step", step, 0.02 * step)
    watchdog.alive("save", 2)
    watchdog.ledger.record(SAVE, 2)
    watchdog.close("end", "it failed")
    batch, *rows = read_rows(tmp_path)
    assert batch == {"event": "start", "job": "7"}
    assert [(row["event"], row["step"]) for row in rows] == [(BEGIN, 0), (TRAIN, 0), (SAVE, 2), (EXIT, 2)]
    began, *times = (datetime.fromisoformat(text).timestamp() for text in (rows[0]["began"], *(row["time"] for row in rows)))
    sums = [sum(row["seconds"].values()) for row in rows]
    assert [end - start for start, end in zip([began, *times], times, strict=False)] == pytest.approx(sums, abs=0.01)
    assert rows[1]["seconds"].keys() == {"joining", "verifying", "loading", "start"}
    assert rows[2]["seconds"]["step"] >= 0.04
    assert (rows[2]["first_step_seconds"], "first_step_seconds" in rows[3]) == (0.02, False)
    assert (rows[3]["phase"], rows[3]["error"], "error" in rows[2]) == ("end", "it failed", False)


def test_a_start_tells_the_last_sign_of_life_of_the_one_before(tmp_path: Path) -> None:
    first = Watchdog(tmp_path, hang_minutes=0)
    first.start()
    first.settle()
    first.write()
    wrote = time.time()
    first.close("end")
    second = Ledger(tmp_path, writes=True)
    second.begin(tmp_path)
    row = list(read_rows(tmp_path))[-1]
    assert datetime.fromisoformat(row["last_alive"]).timestamp() == pytest.approx(wrote, abs=1)
    assert row["seconds"].keys() == {"imports"}
    assert second.began >= wrote  # the second start in a process begins where the first ended


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Ledger(tmp_path, writes=False)
    one.begin(tmp_path)
    one.record(SAVE, 1)
    assert not list(tmp_path.iterdir())
    assert not list(read_rows(tmp_path))
    monkeypatch.setattr(ledger, "_OLDEST", 0.0)
    assert ledger.process_age() == 0.0
