"""Starts and ends of batch jobs: the files by themselves, then the commands of slurm/launch.sh with a fake SLURM on PATH."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import STOPPED
from igpt_ds.json_files import read_json_lines, write_json
from igpt_ds.ops import requeue, restart_log, restarts
from igpt_ds.ops import slurm as slurm_commands
from igpt_ds.ops.requeue import BAD_INPUT, BAD_NODES, End, Start
from igpt_ds.train.ledger.rows import append_row

ROOT = Path(__file__).parents[2]
SHORT = {"TimeLimit": "00:10:00", "StartTime": "2026-01-01T00:00:00", "EndTime": "2026-01-01T00:10:00"}


# The run directory


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """The second start of job 7 in a directory that exists."""
    (tmp_path / "run").mkdir()
    return Start(tmp_path / "run", "7", 1, "node[1-2]")


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait, which takes none."""
    found: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", found.append)
    return found


def states(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    """What SLURM says of another job, one answer a time; then the last one for ever."""
    answers = list(found)
    monkeypatch.setattr(restarts, "state_of", lambda job: answers.pop(0) if len(answers) > 1 else answers[0])


def save(run_dir: Path, step: int, images: int, complete: bool = True) -> None:
    where = run_dir / "checkpoints" / f"step-{step:08d}"
    write_json(where / "manifest.json", {"images_seen": images})
    if complete:
        (where / "COMPLETE").touch()


def test_the_newest_complete_checkpoint_has_the_images(start: Start):
    assert restarts.newest_images(start.run_dir) == 0
    save(start.run_dir, 2, 24)
    save(start.run_dir, 10, 120)
    save(start.run_dir, 11, 132, complete=False)
    assert restarts.newest_images(start.run_dir) == 120
    (start.run_dir / "checkpoints" / "step-00000010" / "manifest.json").write_text("{")
    assert restarts.newest_images(start.run_dir) == 0
    save(start.run_dir / "subset-0", 8, 96)  # a fine-tuning with few labels
    save(start.run_dir / "subset-1", 2, 24)
    assert restarts.newest_images(start.run_dir) == 120


def test_a_fast_save_is_progress_once_another_follows_until_the_run_begins_anew(start: Start):
    rows = start.run_dir / "restarts.jsonl"
    for row, images in (
        ({"event": "train", "step": 0}, 0),
        ({"event": "save", "step": 2, "fast": True, "images_seen": 24}, 0),  # which is not complete yet
        ({"event": "save", "step": 4, "fast": False, "images_seen": 48}, 24),  # of which only a checkpoint is proof
        ({"event": "save", "step": 6, "fast": True, "images_seen": "many"}, 24),
        ({"event": "train", "step": 2}, 24),
        ({"event": "train", "step": 0}, 0),
    ):
        append_row(rows, row)
        assert restarts.newest_images(start.run_dir) == images
    append_row(rows, {"event": "save", "step": 3, "fast": True, "images_seen": 36})
    save(start.run_dir, 2, 24)
    assert restarts.newest_images(start.run_dir) == 24
    append_row(rows, {"event": "train", "step": 3, "images_seen": 36})
    assert restarts.newest_images(start.run_dir) == 36


def test_a_run_that_dies_beside_each_fast_save_makes_no_progress(start: Start):
    """Each start continues from 120 images and dies after the save at 240 has begun, before it is complete."""
    rows = start.run_dir / "restarts.jsonl"
    save(start.run_dir, 10, 120)
    for number in range(4):
        restarts.record(replace(start, restart=number), "start")
        append_row(rows, {"event": "train", "step": 10, "images_seen": 120})
        append_row(rows, {"event": "save", "step": 20, "fast": True, "images_seen": 240})
    assert requeue.count_fruitless(restarts.images_at_starts(replace(start, restart=3))) == 4


def test_a_fast_save_that_went_with_its_node_does_not_hide_the_progress_since(start: Start):
    """The first start saves 1,950 images on the nodes; 1,000 are in the run directory when a node is lost."""
    rows, found = start.run_dir / "restarts.jsonl", []
    save(start.run_dir, 100, 1000)
    for number, (begins, ends) in enumerate(((0, 1950), (1000, 1300), (1300, 1600), (1600, 1900))):
        now = replace(start, restart=number)
        restarts.record(now, "start")
        found = restarts.images_at_starts(now)
        append_row(rows, {"event": "train", "step": begins, "images_seen": begins})
        append_row(rows, {"event": "save", "step": ends, "fast": True, "images_seen": ends})
    assert found == [0, 1000, 1300, 1300]  # the last save is known to be complete once a start has continued from it
    assert requeue.count_fruitless(found) == 2
    append_row(rows, {"event": "train", "step": 1000, "images_seen": 1000})  # and again
    assert restarts.newest_images(start.run_dir) == 1000


def test_a_lock_of_a_killed_job_is_broken_after_thirty_tries(start: Start, naps: list[float]):
    guard = start.run_dir / "owner.lock"
    guard.mkdir()
    restarts.take(start)
    assert naps == 30 * [1.0]
    assert (start.run_dir / "owner").read_text() == "7.1\n"
    assert not guard.exists()


def test_a_lock_that_stays_is_given_up_after_sixty_tries(start: Start, naps: list[float]):
    guard = start.run_dir / "owner.lock"
    (guard / "inside").mkdir(parents=True)  # so that it cannot be removed
    with pytest.raises(FileExistsError):
        restarts.take(start)
    assert naps == 59 * [1.0]


def test_five_failures_without_a_lock_are_a_disk_that_cannot_be_written(start: Start, naps: list[float]):
    (start.run_dir / "owner.lock").write_text("no directory")
    with pytest.raises(FileExistsError):
        restarts.take(start)
    assert naps == 4 * [1.0]


@pytest.mark.parametrize("owner", ["", "7.0\n", "5.3\n"])
def test_a_run_of_nobody_of_this_job_or_of_one_that_ended_is_taken(
    start: Start, owner: str, naps: list[float], monkeypatch: pytest.MonkeyPatch
):
    states(monkeypatch, "")
    (start.run_dir / "owner").write_text(owner)
    restarts.take(start)
    assert (start.run_dir / "owner").read_text() == "7.1\n"
    assert sorted(path.name for path in start.run_dir.iterdir()) == ["owner"]
    assert naps == []


def test_the_end_of_another_job_is_waited_for_without_the_lock(start: Start, monkeypatch: pytest.MonkeyPatch):
    states(monkeypatch, "COMPLETING", "UNKNOWN", "")
    (start.run_dir / "owner").write_text("5.0\n")
    locked: list[bool] = []
    monkeypatch.setattr(restarts.time, "sleep", lambda seconds: locked.append((start.run_dir / "owner.lock").exists()))
    restarts.take(start)
    assert locked == [False, False]
    assert (start.run_dir / "owner").read_text() == "7.1\n"


@pytest.mark.parametrize(("state", "waits"), [("RUNNING", 0), ("PENDING", 0), ("COMPLETING", 59), ("UNKNOWN", 59)])
def test_a_run_of_a_live_job_is_refused(start: Start, state: str, waits: int, naps: list[float], monkeypatch: pytest.MonkeyPatch):
    states(monkeypatch, state)
    (start.run_dir / "owner").write_text("5.0\n")
    with pytest.raises(ValueError, match=rf"job 5 \({state}\) still uses {start.run_dir}"):
        restarts.take(start)
    assert naps == waits * [5.0]
    assert (start.run_dir / "owner").read_text() == "5.0\n"


def test_rows_of_other_jobs_and_torn_rows_do_not_count(start: Start):
    rows = start.run_dir / "restarts.jsonl"
    assert restarts.images_at_starts(start) == [0, 0]
    restarts.record(replace(start, job="6"), "start")
    restarts.record(replace(start, restart=0), "start")
    assert restarts.images_at_starts(start) == [0, 0]  # this start has no row yet
    with open(rows, "a") as file:
        file.write('[]\n{"event": "start", "job": "7", "resta')
    save(start.run_dir, 1, 12)
    restarts.record(start, "start")
    restarts.record_end(start, 1, 'a "reason"', ("node1", "node2"))
    assert restarts.images_at_starts(start) == [0, 12]
    row = json.loads(rows.read_text().splitlines()[-1])
    assert datetime.fromisoformat(row.pop("time")).tzinfo
    assert list(row) == ["event", "job", "restart", "nodes", "images_seen", "status", "reason", "bad_nodes"]
    assert tuple(row.values()) == ("end", "7", 1, "node[1-2]", 12, 1, 'a "reason"', "node1,node2")


# The commands, as launch.sh runs them

SLURM = r"""#!/usr/bin/env bash
echo "${0##*/} $*" >>"$FAKE/calls"
[[ ! -e $FAKE/silent ]] || { rm "$FAKE/silent"; echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1; }
[[ "${0##*/} $*" != "squeue -h -o %E" ]] || { cat "$FAKE/queue" 2>/dev/null; exit 0; }
case "${0##*/} $1 $2" in
  "scontrol show job") cat "$FAKE/job" ;;
  "scontrol show hostnames") case $3 in
    'node[1-2]') printf 'node1\nnode2\n' ;;
    'node[1-4]') printf 'node1\nnode2\nnode3\nnode4\n' ;;
    *) tr , '\n' <<<"$3" ;;
  esac ;;
  "scontrol requeue"*) [[ ! -e $FAKE/no_requeue ]] ;;
  "sinfo"*) cat "$FAKE/states" 2>/dev/null || printf 'node1\nnode2\nnode3\n' ;;
  "srun"*) cat "$FAKE/answers" ;;
  "squeue"*) cat "$FAKE/queue" 2>/dev/null || { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; } ;;
esac
"""


class FakeSlurm:
    """SLURM's commands as a script that answers from files, and notes how it was called."""

    def __init__(self, where: Path) -> None:
        self.where, self.run_dir, self.hostfile = where, where / "run", where / "hostfile"
        for name in ("scontrol", "squeue", "sinfo", "srun"):
            (where / name).write_text(SLURM)
            (where / name).chmod(0o755)
        self.job("RUNNING")

    def job(self, state: str, excluded: str = "(null)", submitted: str = "2026-01-01T00:00:00") -> None:
        facts = " ".join(f"{name}={value}" for name, value in SHORT.items())
        text = f"JobId=7 JobName=x JobState={state} {facts} SubmitTime={submitted} ExcNodeList={excluded}\n"
        (self.where / "job").write_text(text)

    def calls(self) -> list[str]:
        path = self.where / "calls"
        return [line for line in path.read_text().splitlines() if " show " not in line] if path.exists() else []

    def run(self, action: str, *flags: str, restart: int = 0, text: str = "", **environment: str) -> tuple[int, str]:
        """The status of a command and what it printed, after its first "restart N: "."""
        command = [sys.executable, "-S", "-m", "igpt_ds.ops.restarts", action, f"--run_dir={self.run_dir}", "--nodes=node[1-2]"]
        values = {"PATH": f"{self.where}:/usr/bin:/bin", "FAKE": str(self.where), "HOSTFILE": str(self.hostfile)}
        values |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_PARTITION": "gpu"} | environment
        done = subprocess.run([*command, *flags], cwd=ROOT, env=values, input=text, capture_output=True, text=True, timeout=60)
        return done.returncode, (done.stdout + done.stderr).partition(f"job 7, restart {restart}: ")[
            2
        ] or done.stdout + done.stderr

    def begin(self, restart: int = 0, **environment: str) -> tuple[int, str]:
        return self.run("begin", "--ranks=8", restart=restart, **environment)

    def finish(self, status: int, *flags: str, restart: int = 0, **environment: str) -> tuple[int, str]:
        return self.run("finish", f"--status={status}", *flags, restart=restart, **environment)

    def rows(self) -> list[dict[str, Any]]:
        return read_json_lines(self.run_dir / "restarts.jsonl")


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    """A fake SLURM in which job 7 runs; its run directory does not exist yet."""
    return FakeSlurm(tmp_path)


def test_a_start_owns_its_run_and_is_written_down(slurm: FakeSlurm):
    assert slurm.begin() == (0, "start on node[1-2], 8 ranks a node, after 0 images\n")
    assert slurm.hostfile.read_text() == "node1 slots=8\nnode2 slots=8\n"
    assert (slurm.run_dir / "owner").read_text() == "7.0\n"
    (row,) = slurm.rows()
    assert (row["event"], row["job"], row["restart"], row["images_seen"]) == ("start", "7", 0, 0)


def test_a_run_of_another_job_is_refused_in_one_line(slurm: FakeSlurm):
    slurm.run_dir.mkdir()
    (slurm.run_dir / "owner").write_text("5.0\n")
    (slurm.where / "queue").write_text("5 RUNNING\n6 PENDING\n")
    status, said = slurm.begin()
    assert (status, len(said.splitlines())) == (2, 1)
    assert said.startswith("restarts.py: error: job 5 (RUNNING) still uses")
    (slurm.where / "queue").unlink()
    assert slurm.begin()[0] == 0


def test_a_stop_is_for_a_job_that_was_submitted_before_it(slurm: FakeSlurm):
    slurm.run_dir.mkdir()
    stop = slurm.run_dir / "STOP"
    stop.touch()
    status, said = slurm.begin()
    assert status == STOPPED
    assert said.startswith(f"it was asked to stop before it started; not queued again: {stop} exists")
    assert [(row["event"], row["status"]) for row in slurm.rows()] == [("end", STOPPED)]
    slurm.job("RUNNING", submitted="2099-01-01T00:00:00")
    status, said = slurm.begin()
    assert (status, stop.exists()) == (0, False)
    assert said.startswith(f"removed {stop}")
    stop.touch()  # after the first start: for this job, whenever it was submitted
    assert slurm.begin(restart=1)[0] == STOPPED


def test_a_requested_stop_is_no_failure_unless_jobs_wait_for_the_result(slurm: FakeSlurm):
    slurm.begin()
    save(slurm.run_dir, 1, 12)
    stop = slurm.run_dir / "STOP"
    stop.touch()
    status, said = slurm.finish(STOPPED)
    assert (status, slurm.calls()) == (0, ["squeue -h -o %E"])
    (slurm.where / "queue").write_text("(null)\nafterok:71(unfulfilled)\n")
    status, said = slurm.finish(STOPPED)
    assert status == 0
    assert said == f"it was stopped and saved its state; not queued again: {stop} exists; submit again to continue\n"
    assert slurm.finish(1)[0] == 1
    (slurm.where / "queue").write_text("afterany:5,afterok:7(unfulfilled)\n")
    status, said = slurm.finish(STOPPED)
    assert status == STOPPED
    assert "SLURM cancels the jobs that need its result" in said
    stop.touch()  # after the last end
    append_row(slurm.run_dir / "restarts.jsonl", {"event": "exit", "time": "2099-01-01T00:00:00", "step": 1, "seconds": {}})
    assert slurm.begin(restart=1)[0] == 1
    slurm.job("CANCELLED")
    assert slurm.finish(STOPPED)[0] == STOPPED


def test_the_next_start_writes_the_end_of_one_that_slurm_ended(slurm: FakeSlurm):
    slurm.begin()
    slurm.begin(restart=1)
    slurm.finish(1, restart=1)
    slurm.begin(restart=2)
    rows = [(row["event"], row["restart"], row.get("status")) for row in slurm.rows()]
    assert rows == [("start", 0, None), ("end", 0, None), ("start", 1, None), ("end", 1, 1), ("start", 2, None)]
    assert slurm.rows()[1]["reason"] == restart_log.LOST
    assert slurm.rows()[1]["nodes"] == "node[1-2]"


def test_a_disk_that_cannot_be_written_is_said_and_tried_again_a_few_times(slurm: FakeSlurm):
    slurm.run_dir.write_text("no directory")
    status, said = slurm.begin(restart=1)
    assert (status, slurm.calls()) == (1, ["scontrol requeue 7"])
    assert said.startswith(f"{slurm.run_dir} cannot be written; queued again\n")
    status, said = slurm.begin(restart=2)
    assert (status, slurm.calls()) == (1, ["scontrol requeue 7"])
    assert said.startswith(f"{slurm.run_dir} cannot be written; not queued again: 3 starts in a row brought no new checkpoint")


def test_a_disk_that_fails_once_ends_no_job_that_makes_progress(slurm: FakeSlurm):
    for number in range(3):
        assert slurm.begin(restart=number)[0] == 0
        save(slurm.run_dir, number + 1, 12 * (number + 1))
        assert slurm.finish(1, restart=number)[1].endswith("; queued again\n")
    slurm.hostfile.unlink()
    slurm.hostfile.mkdir()  # so that it cannot be replaced
    for number, said in ((3, "queued again"), (4, "queued again"), (5, "not queued again: 3 starts in a row")):
        assert said in slurm.begin(restart=number)[1]


def test_a_fall_back_is_no_lack_of_progress_since(start: Start):
    """A start continues from 1,950 images on the nodes, which are then lost: 1,000 are in the run directory."""
    rows = start.run_dir / "restarts.jsonl"
    save(start.run_dir, 100, 1000)
    for number, images in enumerate((0, 1950, 1000, 1300, 1500)):
        append_row(rows, {"event": "start", "job": "7", "restart": number, "images_seen": images})
        append_row(rows, {"event": "train", "step": images, "images_seen": images})
    found = restarts.images_at_starts(replace(start, restart=4))
    assert found == [0, 1000, 1000, 1300, 1500]
    assert requeue.count_fruitless(found) == 1


def test_a_task_of_an_array_queues_alone(slurm: FakeSlurm):
    """`scontrol requeue 7` would queue every task of array 7."""
    slurm.begin()
    (slurm.where / "queue").write_text("")
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    slurm.finish(1, "--bad=node2", "--least_nodes=1", **array)
    assert [call for call in slurm.calls() if call.startswith("scontrol")] == [
        "scontrol requeue 7_3",
        "scontrol update JobId=7_3 ExcNodeList=node2",
    ]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_the_time_of_submission_has_its_zone(slurm: FakeSlurm, zone: str):
    slurm.begin(TZ=zone)
    moment = datetime.fromisoformat(slurm.rows()[0]["submitted"])
    assert moment.utcoffset() is not None
    assert moment.replace(tzinfo=None) == datetime(2026, 1, 1)


def test_a_stop_is_not_lost_between_the_end_of_a_start_and_the_next(slurm: FakeSlurm):
    """SLURM answers slowly, so that the row of the end is younger."""
    slurm.begin()
    stop = slurm.run_dir / "STOP"
    stop.touch()
    append_row(slurm.run_dir / "restarts.jsonl", {"event": "end", "job": "7", "restart": 0, "time": "2099-01-01T00:00:00"})
    assert slurm.begin(restart=1)[0] == STOPPED
    assert stop.exists()


def test_a_controller_that_is_started_anew_is_waited_for(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, naps: list[float]):
    monkeypatch.setenv("PATH", f"{slurm.where}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(slurm.where))
    monkeypatch.setattr(slurm_commands, "_began", time.monotonic())
    (slurm.where / "silent").touch()
    assert restarts.facts_of("7")["JobState"] == "RUNNING"
    assert naps == [5.0]
    monkeypatch.setattr(slurm_commands, "_began", time.monotonic() - 301)
    (slurm.where / "silent").touch()
    assert restarts.facts_of("7") == {}
    (slurm.where / "silent").touch()
    assert restarts.has_dependents("7")
    assert naps == [5.0]


def test_starts_that_slurm_ends_without_a_checkpoint_are_not_endless(slurm: FakeSlurm):
    assert [slurm.run("begin", "--ranks=1", "--max_fruitless=2", restart=number)[0] for number in range(3)] == [0, 0, 1]
    assert slurm.rows()[-1]["reason"] == "2 starts in a row brought no new checkpoint; SLURM ended the last one"
    save(slurm.run_dir, 1, 12)
    assert slurm.run("begin", "--ranks=1", "--max_fruitless=2", restart=3)[0] == 0


def test_a_finished_run_ends_its_job(slurm: FakeSlurm):
    slurm.begin()
    assert slurm.finish(0) == (1, f"it ended without {slurm.run_dir}/FINISHED; queued again\n")
    assert slurm.finish(0, "--early=1") == (0, "finished\n")
    (slurm.run_dir / "FINISHED").touch()
    assert slurm.finish(0) == (0, "finished\n")
    assert [row["status"] for row in slurm.rows()[1:]] == [1, 0, 0]
    assert slurm.calls() == ["scontrol requeue 7"]


def test_a_stopped_job_queues_again_unless_slurm_ended_it(slurm: FakeSlurm):
    slurm.begin()
    save(slurm.run_dir, 1, 12)
    assert slurm.finish(STOPPED) == (STOPPED, "it was stopped and saved its state; queued again\n")
    (slurm.where / "no_requeue").touch()
    assert slurm.finish(STOPPED)[0] == 1
    slurm.job("CANCELLED")
    assert slurm.finish(STOPPED)[0] == STOPPED
    assert slurm.calls() == 2 * ["scontrol requeue 7"]


def test_usr1_before_the_first_step_ends_a_job_with_a_short_limit(slurm: FakeSlurm):
    script = slurm.where / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --time=10\n#SBATCH --signal=B:USR1@600\n")
    slurm.begin()
    assert slurm.finish(STOPPED)[1].endswith("; queued again\n")
    assert slurm.finish(STOPPED, f"--usr1={script}", SBATCH_SIGNAL="B:USR1@60")[1].endswith("; queued again\n")
    status, said = slurm.finish(STOPPED, f"--usr1={script}")
    assert (status, len(slurm.calls())) == (STOPPED, 2)
    assert "; not queued again: the time limit (00:10:00) leaves no time before USR1" in said


def test_the_reason_has_the_first_error_and_a_first_start_that_cannot_begin_is_the_last(slurm: FakeSlurm):
    (slurm.where / "errors").write_text("node1: train.py: error: no data\n")
    slurm.begin()
    status, said = slurm.finish(BAD_INPUT, f"--errors={slurm.where}/errors")
    assert (status, slurm.calls()) == (BAD_INPUT, [])
    assert said.startswith("it ended with status 2 (train.py: error: no data); not queued again: the first start could not begin")


@pytest.mark.parametrize(("excluded", "nodes"), [("(null)", "node1"), ("node9", "node1,node9")])
def test_bad_nodes_are_excluded_once_the_job_waits(slurm: FakeSlurm, excluded: str, nodes: str):
    slurm.job("RUNNING", excluded)
    slurm.begin()
    said = f"bad nodes: node1; queued again without {nodes}\n"
    assert slurm.finish(BAD_NODES, "--bad=node1", "--least_nodes=2") == (BAD_NODES, said)
    sinfo = "sinfo -h -N -p gpu -t idle,alloc,mix,comp -o %N"
    assert slurm.calls() == ["scontrol requeue 7", sinfo, f"scontrol update JobId=7 ExcNodeList={nodes}"]
    assert slurm.rows()[-1]["bad_nodes"] == "node1"


def test_bad_nodes_stay_where_too_few_others_are_left(slurm: FakeSlurm):
    slurm.begin()
    status, said = slurm.finish(137, "--bad=node1,node2", "--least_nodes=2")
    assert (status, len(slurm.calls())) == (137, 2)
    assert said.endswith("; queued again; node1,node2 stays: without it there are 1 nodes for 2\n")


def test_a_program_s_log_is_read(slurm: FakeSlurm):
    (slurm.where / "errors").write_text(
        "srun: error: node1: task 0: Killed\nsrun: error: node2: task 1: Exited with exit code 1\n"
    )
    assert slurm.run("outcome", "--status=143", f"--errors={slurm.where}/errors") == (0, "1 node1\n")
    assert slurm.run("cause", text="x\nValueError: y\n") == (0, "ValueError: y\n")


def test_lost_and_broken_nodes_are_bad_too(slurm: FakeSlurm):
    (slurm.where / "errors").write_text("srun: error: node1: task 0: Killed\n")
    (slurm.where / "queue").write_text("node[1-4]\n")
    (slurm.where / "states").write_text("node1 allocated\nnode2 down*\nnode3 allocated\nnode4 draining\n")
    (slurm.where / "answers").write_text("node: node1\nnode: node4: NVRM: Xid (PCI:0): 79, lost\n")
    asked = ("outcome", "--status=143", f"--errors={slurm.where}/errors")
    status, said = slurm.run(*asked, SLURM_JOB_NODELIST="node[1-4]")
    assert (status, said) == (0, "143 node1,node2,node3,node4\nfault: node4: NVRM: Xid (PCI:0): 79, lost\nlost: node2 node3\n")
    (slurm.where / "answers").write_text("")  # srun failed: no node is lost because of that
    assert slurm.run(*asked, SLURM_JOB_NODELIST="node[1-4]") == (0, "143 node1,node2\nlost: node2\n")
    (slurm.where / "queue").write_text("node1,node2,node4\n")  # the job has lost a node
    assert slurm.run(*asked, SLURM_JOB_NODELIST="node[1-4]") == (0, "143 node1,node2,node3\nlost: node2 node3\n")
    assert slurm.run("outcome", "--status=85", SLURM_JOB_NODELIST="node[1-4]") == (0, "85 \n")
    ended = (*asked, "--bad=node3", "--lost=node2")  # node1 was killed for node3
    assert slurm.run(*ended, SLURM_JOB_NODELIST="node[1-4]") == (0, "143 node3\n")


def again(slurm: FakeSlurm, status: int, *flags: str, restart: int = 0) -> str:
    found, said = slurm.run("again", f"--status={status}", *flags, restart=restart, SLURM_JOB_NODELIST="node[1-4]")
    assert found == 0
    return said


def test_a_run_starts_again_on_the_nodes_that_are_left(slurm: FakeSlurm):
    slurm.begin()
    said = again(slurm, 1, "--bad=node2", "--lost=node1", "--least_nodes=2")
    assert said == "it ended with status 1; starts again inside the job without node1,node2\n"
    row = slurm.rows()[-1]
    assert (row["event"], row["status"], row["bad_nodes"]) == ("end", 1, "node2")
    assert slurm.run("number")[1] == "1\n"
    assert slurm.run("number", restart=5)[1] == "5\n"  # SLURM counts further


@pytest.mark.parametrize("status", [0, STOPPED])
def test_what_has_ended_does_not_start_again(slurm: FakeSlurm, status: int):
    slurm.begin()
    assert again(slurm, status) == "\n"
    assert len(slurm.rows()) == 1


def test_the_queue_or_the_end_follows_where_a_start_inside_the_job_cannot_help(slurm: FakeSlurm):
    slurm.begin()
    assert again(slurm, 1, "--bad=node2", "--least_nodes=4") == "3 nodes of the job are left for 4\n"
    assert again(slurm, BAD_INPUT) == "\n"  # the first start could not begin
    assert again(slurm, 1, "--max_fruitless=1") == "\n"
    (slurm.run_dir / "STOP").touch()
    assert again(slurm, 1) == "\n"
    (slurm.run_dir / "STOP").unlink()
    slurm.job("CANCELLED")
    assert again(slurm, 1) == "\n"
    assert len(slurm.rows()) == 1, "the end is written by `finish`"
    slurm.job("RUNNING")
    said = slurm.finish(1, "--bad=node2", "--lost=node1", "--least_nodes=1")[1]
    assert said == "it ended with status 1; queued again without node2,node1\n"


def test_before_a_second_start_without_progress_it_waits(start: Start, naps: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(restarts, "facts_of", lambda job: {"JobState": "RUNNING"})
    monkeypatch.setenv("SLURM_JOB_NODELIST", "")
    for end in (End(1, fruitless=1), End(1, fruitless=2, gained=True), End(1, fruitless=2)):
        restarts.again(start, end, (), 0)
    assert naps == [60.0]


@pytest.mark.parametrize(("program", "state"), [("cat", "RUNNING"), ("false", "UNKNOWN"), (None, "UNKNOWN")])
def test_a_controller_that_does_not_answer_is_no_ended_job(
    tmp_path: Path, program: str | None, state: str, monkeypatch: pytest.MonkeyPatch
):
    if program:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '5 RUNNING' | {program}\n")
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if program else str(tmp_path))
    assert restarts.state_of("5") == state
    assert restarts.state_of("15") == ("UNKNOWN" if program != "cat" else "")


def test_a_log_on_a_full_disk_does_not_keep_a_job_from_queueing_again(slurm: FakeSlurm):
    slurm.begin()
    command = [sys.executable, "-S", "-m", "igpt_ds.ops.restarts", "finish", f"--run_dir={slurm.run_dir}", "--nodes=n"]
    values = {"PATH": f"{slurm.where}:/usr/bin:/bin", "FAKE": str(slurm.where), "SLURM_JOB_ID": "7"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--status=85"], cwd=ROOT, env=values, stdout=full, stderr=full, timeout=600)
        assert (done.returncode, slurm.calls()) == (STOPPED, ["scontrol requeue 7"])
        (slurm.run_dir / "restarts.jsonl").unlink()
        (slurm.run_dir / "restarts.jsonl").mkdir()  # so that the row cannot be written either
        done = subprocess.run([*command, "--status=85"], cwd=ROOT, env=values, stdout=full, stderr=full, timeout=600)
    assert (done.returncode, slurm.calls()) == (STOPPED, 2 * ["scontrol requeue 7"])


def test_a_log_that_is_not_text_has_a_cause(slurm: FakeSlurm):
    values = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-S", "-m", "igpt_ds.ops.restarts", "cause"]
    log = b"\xff\xfe\ntrain.py: error: caf\xe9 does not divide\n"
    done = subprocess.run(command, cwd=ROOT, env=values, input=log, capture_output=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, b"train.py: error: caf does not divide\n")


@pytest.mark.parametrize("number", ["1e400", "NaN", "[" * 100_000, '"x"'])
def test_numbers_that_are_none_do_not_end_a_job(start: Start, number: str):
    save(start.run_dir, 1, 12)
    (start.run_dir / "checkpoints" / "step-00000001" / "manifest.json").write_text(f'{{"images_seen": {number}}}')
    assert restarts.newest_images(start.run_dir) == 0
    (start.run_dir / "restarts.jsonl").write_text(f'{{"event": "start", "job": "7", "restart": 1, "images_seen": {number}}}\n')
    assert restarts.images_at_starts(start) == [0, 0]
