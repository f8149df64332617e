"""The ledger of a run from rows that a story wrote: every second has one place, and the sum is the wall clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.train.ledger.goodput import CATEGORIES, SaveCost, read_goodput
from igpt_ds.train.ledger.rows import timestamp

ZERO = 1_800_000_000.0
READY = {"imports": 5.0, "joining": 1.0, "verifying": 4.0, "building": 6.0, "loading": 2.0, "start": 2.0}  # 20 s


class Story:
    """Writes restarts.jsonl and train.jsonl with times in seconds after ZERO."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def row(self, event: str, at: float, **more: Any) -> None:
        """A row of restarts.jsonl; `began`, `last_alive` and `submitted` are times too."""
        times = {name: timestamp(ZERO + more.pop(name)) for name in ("began", "last_alive", "submitted") if name in more}
        with open(self.run_dir / "restarts.jsonl", "a") as file:
            file.write(json.dumps({"event": event, "time": timestamp(ZERO + at)} | times | more) + "\n")

    def train(self, at: float, step: int, last_alive: float | None = None, resume: bool = True) -> None:
        """A start whose process begins at a time and takes 20 s to its first step."""
        last = {} if last_alive is None else {"last_alive": last_alive}
        self.row("begin", at + 6, step=0, seconds={}, began=at, **last)
        self.row("train", at + 20, step=step, seconds=READY, resume=resume)

    def save(self, at: float, step: int, seconds: float, **more: Any) -> None:
        """A save of 2 s after so many seconds of steps."""
        self.row("save", at, step=step, seconds={"step": seconds, "save": 2.0}, **more)

    def curve(self, at: float, **more: Any) -> None:
        with open(self.run_dir / "train.jsonl", "a") as file:
            file.write(json.dumps({"step": 1, "time": ZERO + at} | more) + "\n")

    def found(self, wall: float, live: bool = False, **expected: float) -> Any:
        """The ledger, which has these seconds and no others."""
        found = read_goodput(self.run_dir, live)
        named = {name.replace("_", " ").replace("start up", "start-up"): value for name, value in expected.items()}
        assert {name: value for name, value in found.seconds.items() if abs(value) > 0.01} == pytest.approx(named, abs=0.01)
        assert found.wall == pytest.approx(wall, abs=0.01)
        assert sum(found.seconds.values()) == pytest.approx(found.wall)
        return found


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_a_killed_start_loses_what_it_did_after_its_save(story: Story) -> None:
    story.train(0, 0, resume=False)
    story.save(42, 10, 20, first_step_seconds=11.0)  # the other nine take one second each
    story.curve(52, loss=2.0)  # killed soon after
    story.found(52, training=10, compilation=10, saves=2, start_up=16, verification=4, lost_work=10)
    running = story.found(52, live=True, training=20, compilation=10, saves=2, start_up=16, verification=4)
    assert running.starts[0].how == "running"
    story.train(100, 10, last_alive=52)
    story.save(132, 20, 10)
    story.row("exit", 133, step=20, seconds={"save": 1.0}, phase="end")
    whole = {"training": 20, "compilation": 10, "saves": 5, "start_up": 32, "verification": 8}
    found = story.found(133, **whole, lost_work=10, down=48)
    assert found.goodput == pytest.approx(20 / 133)
    assert [(one.how, one.first_step, one.last_step) for one in found.starts] == [("killed", 0, 10), ("ended", 10, 20)]
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_clock_that_is_set_back_takes_no_time_away(story: Story) -> None:
    story.train(0, 0, resume=False)
    story.save(42, 10, 20)
    story.save(54 - 3600, 20, 10)
    story.save(66 - 3600, 30, 10)
    story.row("exit", 67 - 3600, step=30, seconds={"save": 1.0}, phase="end")
    story.found(67, training=40, saves=7, start_up=16, verification=4)


def test_rows_whose_seconds_are_none_are_left_out(story: Story) -> None:
    story.train(0, 0, resume=False)
    for seconds in (float("nan"), 1e308):
        story.row("save", 30, step=5, seconds={"step": seconds})
    story.save(42, 10, 20)
    story.row("exit", 43, step=10, seconds={"save": 1.0}, phase="end")
    story.found(43, training=20, saves=3, start_up=16, verification=4)


def test_a_damaged_save_and_a_rollback_lose_more(story: Story) -> None:
    story.train(0, 0, resume=False)
    story.save(32, 10, 10)
    story.save(44, 20, 10)
    story.save(56, 30, 10)
    story.row("rollback", 66, step=20, seconds={"step": 8.0, "loading": 2.0})
    story.save(88, 40, 20)
    story.train(88, 30, last_alive=88)  # the save of step 40 is damaged, and the one of step 30 was made without a row
    story.row("exit", 109, step=30, seconds={"step": 1.0}, phase="end", error="it failed")
    start_up = {"start_up": 32, "verification": 8}
    found = story.found(109, training=10 + 10 + 10 + 1, saves=2 + 2 + 1, lost_work=12 + 10 + 11, **start_up)
    assert found.starts[1].how == "it failed"


@pytest.mark.parametrize("trains", [True, False])
def test_work_is_lost_until_the_ranks_were_gone_also_if_the_next_start_has_none(story: Story, trains: bool) -> None:
    job = {"job": "7", "images_seen": 0}
    story.row("start", 0, **job, restart=0, submitted=0)
    story.train(0, 0, resume=False)
    story.save(32, 10, 10)
    story.row("start", 3002, **job, restart=1, submitted=0)
    story.row("end", 3004, **job, restart=1, status=3, reason="bad nodes: n1")
    known = {"training": 10, "saves": 2, "verification": 4, "lost_work": 2968}
    if trains:
        story.row("start", 3004, **job, restart=2, submitted=0)
        story.train(3006, 10, last_alive=3000)
        story.row("exit", 3026, step=10, seconds={}, phase="end")
        story.found(3026, **(known | {"verification": 8}), start_up=16 + 2 + 2 + 16, down=2)
    else:
        story.curve(3000, loss=2.0)
        story.found(3004, **known, start_up=16 + 2, down=2)


def test_a_batch_job_waits_in_the_queue_and_is_down(story: Story) -> None:
    job = {"job": "7", "images_seen": 0}
    story.row("start", 30, **job, restart=0, submitted=0)
    story.train(40, 0, resume=False)
    story.save(72, 10, 10)
    story.row("exit", 73, step=10, seconds={"save": 1.0}, phase="stopped")
    story.row("end", 75, **job, restart=0, status=85)
    story.row("start", 175, **job, restart=1, submitted=75)
    story.row("end", 180, **job, restart=1, status=3, reason="bad nodes: n1")
    story.row("start", 200, **job, restart=2)
    story.row("end", 300, **job, restart=2, status=None)  # SLURM ended it; the next start writes that
    story.row("start", 300, **(job | {"job": "8"}), restart=0, submitted=290)  # until then nobody had it
    story.train(305, 10, last_alive=220)
    story.row("exit", 326, step=11, seconds={"step": 1.0}, phase="end")
    start_up = 10 + 16 + 5 + 20 + 5 + 16
    found = story.found(326, queue=30 + 100 + 20 + 10, down=2 + 70, start_up=start_up, verification=8, training=11, saves=3)
    assert [one.how for one in found.starts] == ["stopped", "bad nodes: n1", "ended before the first step", "ended"]
    assert found.after_failures == pytest.approx({"queue": 20 + 10, "down": 70})  # not the first wait, nor that after a stop


def test_a_start_inside_the_allocation_did_not_queue(story: Story) -> None:
    story.row("start", 0, job="7", restart=0, submitted=-5)
    story.train(0, 0, resume=False)
    story.save(32, 10, 10)
    story.row("end", 45, job="7", restart=0, status=1)
    story.row("start", 48, job="7", restart=1, submitted=-5)
    story.train(50, 10, last_alive=40)
    story.row("exit", 70, step=10, seconds={}, phase="end")
    story.found(75, queue=5, start_up=34, verification=8, training=10, saves=2, lost_work=8, down=8)


def test_a_start_continues_from_the_fast_directory(story: Story) -> None:
    story.train(0, 0, resume=False)
    for at, step, fast in ((32, 10, False), (44, 20, True), (56, 30, False), (68, 40, True)):
        story.save(at, step, 10, fast=fast)
    story.train(80, 40, last_alive=70)
    story.row("exit", 100, step=40, seconds={}, phase="end")
    found = story.found(100, start_up=32, verification=8, training=40, saves=8, lost_work=2, down=10)
    assert (found.saves, found.fast_saves) == ((SaveCost(20, 20.0, 2.0),), 2)


def test_what_no_row_explains_has_its_own_line(story: Story) -> None:
    story.train(0, 0, resume=False)
    story.save(40, 10, 10)
    story.row("exit", 50, step=10, seconds={"save": 4.0, "dancing": 3.0}, phase="end")
    story.found(50, start_up=16, verification=4, training=10, saves=6, unexplained=14)


def test_a_new_run_in_the_directory_begins_anew(story: Story) -> None:
    story.train(-500, 0, resume=False)
    story.train(0, 0, resume=False)
    story.row("exit", 20, step=0, seconds={}, phase="end")
    assert len(story.found(20, start_up=16, verification=4).starts) == 1


def test_damaged_rows_are_left_out_and_a_run_without_times_is_refused(story: Story) -> None:
    with pytest.raises(ValueError, match=r"restarts\.jsonl has no times of a start; .*--goodput"):
        read_goodput(story.run_dir)
    with open(story.run_dir / "restarts.jsonl", "w") as file:
        file.write('{"event": "save", "time": "yesterday"}\n{"event": "train"}\nno JSON\n{"event": "beg')
    story.train(0, 0, resume=False)
    story.row("save", 21, step="ten", seconds={})
    story.row("save", 22, step=10, seconds=[])
    story.row("exit", 20, step=0, seconds={}, phase="end")
    assert tuple(story.found(20, start_up=16, verification=4).seconds) == CATEGORIES
