"""The benchmark of restarts: a row for each fault, and what it says without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import restart

from igpt_ds.json_files import write_json_lines


def start(launched: int, trained: int | None) -> list[dict[str, object]]:
    """The rows of a start, with seconds of one minute."""
    at = "2026-11-30T10:00:{:02d}+00:00".format
    found: list[dict[str, object]] = [
        {"event": "start", "job": "7", "time": at(launched)},
        {"event": "begin", "time": at(launched + 1), "began": at(launched + 1), "step": 0, "seconds": {}},
    ]
    return found if trained is None else [*found, {"event": "train", "time": at(trained), "step": 5, "seconds": {}}]


def test_a_row_for_each_fault(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "restarts.jsonl", [*start(0, 4), *start(20, None), *start(30, 45), *start(50, 59)])
    faults = [("a rank is killed", 10.0), ("a node loses power", 48.5)]
    write_json_lines(tmp_path / "faults.jsonl", ({"what": what, "time": 1796032800 + time} for what, time in faults))
    first, second = restart.rows(tmp_path)
    assert (first.what, first.ours, first.peer, first.holds) == ("a rank is killed", 35, 34, False)
    assert (second.what, second.ours, second.peer, second.holds) == ("a node loses power", 10.5, 34, True)
    assert (first.note, second.note) == ("20.0 s until the start", "1.5 s until the start")


def test_runs_without_faults_and_faults_without_an_end_are_refused(tool: Any, tmp_path: Path) -> None:
    write_json_lines(tmp_path / "restarts.jsonl", start(0, 4))
    for words, refusal in (((), "--runs is missing"), (("--runs", tmp_path), "has no faults.jsonl")):
        status, _, said = tool("bench/restart", *words)
        assert (status, refusal in said) == (2, True), said
    write_json_lines(tmp_path / "faults.jsonl", [{"what": "a rank is killed", "time": 1796032810.0}])
    with pytest.raises(ValueError, match="no step followed a rank is killed"):
        list(restart.rows(tmp_path))
