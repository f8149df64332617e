"""Starts and ends of batch jobs: each decision by itself, then the commands of slurm/launch.sh with a fake SLURM on PATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import HUNG, STOPPED
from igpt_ds.files import read_json_lines, write_json
from igpt_ds.ops import restarts
from igpt_ds.ops.requeue import (
    BAD_INPUT,
    BAD_NODES,
    End,
    Start,
    always_too_late,
    count_fruitless,
    decide,
    explain,
    find_cause,
    find_facts,
    find_outcome,
)

ROOT = Path(__file__).parents[2]
START = Start(Path("runs/xl"), "7", 1, "node[1-2]", max_fruitless=3)
SHORT = {"TimeLimit": "00:10:00", "StartTime": "2026-01-01T00:00:00", "EndTime": "2026-01-01T00:10:00"}


# Decisions


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ""),
        ("all is well\n", ""),
        ("x\nRuntimeError: first\nValueError: second\n", "RuntimeError: first"),
        ("[rank3]: torch.OutOfMemoryError: CUDA\n", "[rank3]: torch.OutOfMemoryError: CUDA"),
        ("ValueError: first\nnode1: train.py: error: no disk\n", "train.py: error: no disk"),
        ("  ValueError: indented lines belong to a traceback\nNoError\n", "NoError"),
        ('OSError:\tthe "disk"\x1b is \\ full é\n', 'OSError: the "disk" is \\ full '),
        ("OSError: " + 400 * "x", "OSError: " + 291 * "x"),
    ],
)
def test_the_cause_is_the_first_error_of_a_program_or_the_first_exception(log: str, cause: str):
    assert find_cause(log) == cause


def exits(*codes: tuple[str, int]) -> str:
    return "".join(f"srun: error: {node}: task 0: Exited with exit code {code}\n" for node, code in codes)


@pytest.mark.parametrize(
    ("status", "errors", "outcome"),
    [
        (0, "", (0, ())),
        (143, "", (143, ())),
        (143, exits(("node2", 1), ("node1", 143)), (1, ("node1",))),
        (85, exits(("node1", 1), ("node2", STOPPED)), (STOPPED, ())),
        (143, exits(("node1", HUNG), ("node2", 1)), (HUNG, ())),
        (0, exits(("node1", HUNG), ("node2", STOPPED)), (STOPPED, ())),
        (137, exits(("node1", 128), ("node2", 129), ("node2", 137), ("node3", 255)), (128, ("node2", "node3"))),
        (
            9,
            "srun: error: gpu-7: tasks 0,2-3: Killed\nsrun: error: gpu-8: task 1: Bus error (core dumped)\n",
            (9, ("gpu-7", "gpu-8")),
        ),
        (1, "node1: srun: error: node1: task 0: Killed\nsrun: error: node2: task 0: Exited with exit code 1\n", (1, ())),
    ],
)
def test_the_outcome_is_that_of_the_first_node_and_names_where_a_rank_was_killed(status: int, errors: str, outcome: Any):
    assert find_outcome(status, errors) == outcome


@pytest.mark.parametrize(
    ("images", "count"), [([0], 1), ([0, 0], 2), ([0, 8, 8, 8], 3), ([0, 8, 8, 16], 1), ([8, 0, 8], 3), ([0, 8, 4, 16, 12], 2)]
)
def test_starts_in_a_row_without_progress_are_counted(images: list[int], count: int):
    assert count_fruitless(images) == count


def test_facts_are_those_of_the_task_and_not_of_its_array():
    rows = ["JobId=8 ArrayJobId=7 JobState=RUNNING ", "JobId=7 ArrayJobId=7 JobState=PENDING X= Command=x JobState=y TimeLimit=1"]
    assert find_facts("\n".join(rows), "7") == {
        "JobId": "7",
        "ArrayJobId": "7",
        "JobState": "PENDING",
        "X": "",
        "Command": "x",
        "TimeLimit": "1",
    }
    assert find_facts("\n".join(rows), "9") == {}


@pytest.mark.parametrize(
    ("facts", "option", "too_late"),
    [
        ({}, "B:USR1@480", True),
        ({}, "B:USR1@479", False),
        ({}, "", False),  # then SLURM sends it 60 seconds before the end
        ({"TimeLimit": "00:03:00", "EndTime": "2026-01-01T00:03:00"}, "B:USR1", True),
        ({"TimeLimit": "1-00:00:00", "EndTime": "2026-01-02T00:00:00"}, "B:USR1@86280", True),
        ({"EndTime": "2026-01-01T00:09:00"}, "B:USR1@600", False),  # a preemption
        ({"TimeLimit": "UNLIMITED"}, "B:USR1@600", False),
        ({"EndTime": "Unknown"}, "B:USR1@600", False),
    ],
)
def test_a_time_limit_that_leaves_nothing_before_usr1_is_found(facts: dict[str, str], option: str, too_late: bool):
    limit = (SHORT | facts)["TimeLimit"]
    assert always_too_late(SHORT | facts, option).startswith(f"the time limit ({limit})") is too_late
    assert always_too_late({}, option) == ""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (End(0, finished=True), "finished"),
        (End(0), "it ended without runs/xl/FINISHED"),
        (End(STOPPED, gained=True), "it was stopped and saved its state"),
        (End(STOPPED, cause="x"), "it was stopped before the first step: nothing was saved"),
        (End(HUNG, cause="x"), "it hung"),
        (End(BAD_NODES, bad=("node1", "node2")), "bad nodes: node1 node2"),
        (End(137, cause="OSError: x"), "it ended with status 137 (OSError: x)"),
        (End(1, reason="runs/xl cannot be written"), "runs/xl cannot be written"),
    ],
)
def test_an_end_is_explained(end: End, reason: str):
    assert explain(end, START.run_dir) == reason


@pytest.mark.parametrize(
    ("end", "around", "why"),
    [
        (End(STOPPED, gained=True), {}, ""),
        (End(0), {}, ""),
        (End(137, bad=("node1",)), {}, ""),
        (End(STOPPED), {"state": "COMPLETING"}, "SLURM has ended the job"),
        (End(STOPPED), {"state": "", "stop": True}, "SLURM has ended the job"),
        (End(STOPPED, gained=True), {"stop": True}, "runs/xl/STOP exists"),
        (End(STOPPED), {"too_late": "too short"}, "too short"),
        (End(STOPPED, gained=True), {"too_late": "too short"}, ""),
        (End(1), {"too_late": "too short"}, ""),
        (End(1, fruitless=2), {}, ""),
        (End(1, fruitless=3), {}, "3 starts in a row"),
        (End(1, fruitless=3, gained=True), {}, ""),
        (End(BAD_INPUT), {"restart": 0}, "the first start could not begin"),
        (End(BAD_INPUT, gained=True), {"restart": 0}, ""),
        (End(BAD_INPUT), {"restart": 1}, ""),
    ],
)
def test_a_job_queues_again_or_says_why_not(end: End, around: dict[str, Any], why: str):
    given = {"state": "RUNNING", "stop": False, "too_late": "", "restart": 1} | around
    decision = decide(replace(START, restart=given.pop("restart")), end, **given)
    assert decision.requeue is not bool(why)
    assert why in decision.words
    assert ("queued again" in decision.words) is (given["state"] == "RUNNING")


# The run directory


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """The second start of job 7 in a directory that exists."""
    (tmp_path / "run").mkdir()
    return replace(START, run_dir=tmp_path / "run")


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
    assert restarts.images_at_starts(start) == []
    restarts.record(replace(start, job="6"), "start")
    restarts.record(replace(start, restart=0), "start")
    assert restarts.images_at_starts(start) == []  # none of this start
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
case "${0##*/} $1 $2" in
  "scontrol show job") cat "$FAKE/job" ;;
  "scontrol show hostnames") [[ $3 == 'node[1-2]' ]] && printf 'node1\nnode2\n' || tr , '\n' <<<"$3" ;;
  "scontrol requeue"*) [[ ! -e $FAKE/no_requeue ]] ;;
  "sinfo"*) printf 'node1\nnode2\nnode3\n' ;;
  "squeue"*) cat "$FAKE/queue" 2>/dev/null || { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; } ;;
esac
"""


class FakeSlurm:
    """SLURM's commands as a script that answers from files, and notes how it was called."""

    def __init__(self, where: Path) -> None:
        self.where, self.run_dir, self.hostfile = where, where / "run", where / "hostfile"
        for name in ("scontrol", "squeue", "sinfo"):
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
    os.utime(slurm.run_dir / "restarts.jsonl", (0, 0))
    assert slurm.begin(restart=1)[0] == STOPPED


def test_a_disk_that_cannot_be_written_is_said_and_tried_again_a_few_times(slurm: FakeSlurm):
    slurm.run_dir.write_text("no directory")
    status, said = slurm.begin(restart=1)
    assert (status, slurm.calls()) == (1, ["scontrol requeue 7"])
    assert said.startswith(f"{slurm.run_dir} cannot be written; queued again\n")
    status, said = slurm.begin(restart=2)
    assert (status, slurm.calls()) == (1, ["scontrol requeue 7"])
    assert said.startswith(f"{slurm.run_dir} cannot be written; not queued again: 3 starts in a row brought no new checkpoint")


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
    (slurm.where / "errors").write_text(exits(("node2", 1), ("node1", 143)))
    assert slurm.run("outcome", "--status=143", f"--errors={slurm.where}/errors") == (0, "1 node1\n")
    assert slurm.run("cause", text="x\nValueError: y\n") == (0, "ValueError: y\n")


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
