"""Heartbeats on disk. That a hung rank ends with its stacks is test_stops_launch.py's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from igpt_ds.files import read_json
from igpt_ds.train.watchdog import Watchdog


def test_heartbeats_tell_what_a_rank_did_last(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, hang_minutes=0, every_seconds=0.01)
    file = tmp_path / "heartbeat" / "rank-00000.json"
    file.parent.mkdir()
    (file.parent / "rank-00001.json").write_text("{}")  # of a time when there were more ranks
    watchdog.start()
    assert [path.name for path in file.parent.iterdir()] == ["rank-00000.json"]
    first = read_json(file, "heartbeat")
    assert (first["step"], first["phase"], first["pid"]) == (0, "start", os.getpid())
    watchdog.alive("step", 3, 0.25)
    watchdog.alive("save", 3)
    deadline = time.monotonic() + 20
    while read_json(file, "heartbeat")["phase"] != "save":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beat = read_json(file, "heartbeat")
    assert {name: beat[name] for name in ("step", "phase", "step_seconds")} == {"step": 3, "phase": "save", "step_seconds": 0.25}
    assert set(beat) == {"step", "phase", "time", "host", "pid", "step_seconds", "written"}
    assert beat["written"] >= beat["time"] >= first["time"]
    watchdog.close("end")
    assert read_json(file, "heartbeat")["phase"] == "end"


def test_signs_of_life_keep_a_run_alive(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, hang_minutes=0.01)  # 0.6 s
    watchdog.start()
    for _ in range(20):
        time.sleep(0.05)
        watchdog.alive("step", 1)
    watchdog.close("end")
    assert not (tmp_path / "stacks" / "rank-0.txt").exists()


def test_a_disk_that_takes_no_heartbeat_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heartbeat").touch()  # a file where the directory should be
    watchdog = Watchdog(tmp_path, hang_minutes=0)
    watchdog.start()
    watchdog.close("end")
    assert capsys.readouterr().err.count("heartbeat not written") == 2
