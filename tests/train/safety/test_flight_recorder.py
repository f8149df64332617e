"""The variables of torch's flight recorder. That a hung rank writes its file is test_stops_launch.py's."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from igpt_ds.train.safety import flight_recorder
from igpt_ds.train.safety.watchdog import Watchdog


def test_the_users_variables_stay_and_the_next_run_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_recorder, "_ours", {})
    environment = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}  # the older name
    for run_dir in (tmp_path / "one", tmp_path / "two"):
        flight_recorder.prepare(environment, run_dir, timedelta(minutes=40))
        assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{run_dir}/flight_recorder/rank_"
    assert "TORCH_FR_BUFFER_SIZE" not in environment
    assert environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "2400"
    flight_recorder.make_directory(environment)
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    environment["TORCH_FR_DUMP_TEMP_FILE"] = f"{tmp_path}/mine_"
    flight_recorder.prepare(environment, tmp_path / "three", timedelta(minutes=40))
    flight_recorder.dump(environment, 3)
    assert (tmp_path / "mine_3").read_bytes()
    flight_recorder.dump({}, 3)  # nobody asked for a recorder


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flight_recorder").touch()
    environment = {flight_recorder.FILE[1]: f"{tmp_path}/flight_recorder/rank_"}
    flight_recorder.make_directory(environment)
    flight_recorder.dump(environment, 0)
    said = capsys.readouterr().err
    assert "no flight recorder: " in said
    assert "flight recorder of rank 0 not written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["flight_recorder"]


@pytest.mark.parametrize(("hang_minutes", "minutes"), [(20.0, 40.0), (0.2, 5.2), (0.0, 7 * 24 * 60.0)])
def test_collectives_end_after_the_watchdog(tmp_path: Path, hang_minutes: float, minutes: float) -> None:
    assert Watchdog(tmp_path, hang_minutes).time_limit == timedelta(minutes=minutes)
