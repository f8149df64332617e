"""One file a node: who writes it, and what happens when that rank is silent or ends. The ranks take turns in this process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from igpt_ds.train.heartbeat import Heartbeat, all_heartbeats, heartbeat_files, moving, read_heartbeats, write_heartbeats
from igpt_ds.train.safety.node_beats import NodeBeats


def beat(rank: int, phase: str = "step", age: float = 0.0) -> Heartbeat:
    return Heartbeat(rank, 3, phase, time.time() - age, "node1", 7, 0.1, time.time() - age)


def test_the_first_living_rank_of_a_node_writes_for_all(tmp_path: Path) -> None:
    run_dir, shared = tmp_path / "run", tmp_path / "shared"
    shared.mkdir()
    eight, nine = (NodeBeats(run_dir, shared, 10.0) for _ in range(2))
    eight.write(beat(8))
    nine.write(beat(9))  # not its turn
    assert list(all_heartbeats(run_dir)) == [8]
    eight._next = 0.0
    eight.write(beat(8))
    assert [path.name for path in heartbeat_files(run_dir)] == ["node-00008.json"]
    assert list(all_heartbeats(run_dir)) == [8, 9]

    nine.write(beat(9, "validation"))
    assert all_heartbeats(run_dir)[9].phase == "step"  # rank 8 writes it next
    eight.write(beat(8, age=31))  # since then it hangs, or its process was stopped
    nine.write(beat(9, "save"))
    assert {rank: found.phase for rank, found in all_heartbeats(run_dir).items()} == {8: "step", 9: "save"}

    eight.write(replace(beat(8, "end"), error="no room"))  # who ends says so itself
    assert all_heartbeats(run_dir)[8].error == "no room"
    assert shared.exists()
    nine.write(beat(9, "end"))
    assert all(found.ended for found in all_heartbeats(run_dir).values())
    assert not shared.exists()
    assert [path.name for path in heartbeat_files(run_dir)] == ["node-00008.json"]


def test_a_rank_without_a_shared_directory_has_its_own_file(tmp_path: Path) -> None:
    for rank in (0, 1):
        NodeBeats(tmp_path, None, 10.0).write(beat(rank))
    assert [path.name for path in heartbeat_files(tmp_path)] == ["node-00000.json", "node-00001.json"]
    assert [one.rank for one in read_heartbeats(tmp_path, 2) if one] == [0, 1]
    NodeBeats.meet(tmp_path, 10.0)  # another start
    assert heartbeat_files(tmp_path) == []


def test_a_rank_that_writes_lives_however_long_it_took(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    NodeBeats(tmp_path, tmp_path / "shared", 0.01).write(beat(0, age=5.0))
    assert list(all_heartbeats(tmp_path)) == [0]


def test_files_of_a_rank_are_still_read_and_the_newest_counts(tmp_path: Path) -> None:
    old = tmp_path / "heartbeat" / "rank-00001.json"
    old.parent.mkdir()
    old.write_text('{"step": 1, "phase": "step", "time": 5, "host": "node1", "pid": 7}')
    assert read_heartbeats(tmp_path, 2)[1] == Heartbeat(1, 1, "step", 5.0, "node1", 7, 0.0, 5.0)
    write_heartbeats(tmp_path, [beat(0), beat(1)])
    assert all_heartbeats(tmp_path)[1].step == 3
    (tmp_path / "heartbeat" / "node-00000.json").write_text('{"ranks": 3}')
    assert list(all_heartbeats(tmp_path)) == [1]
    assert moving(tmp_path, {1}, 0.05) == set()
