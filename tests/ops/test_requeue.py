"""Why a start of a batch job ended, and whether the job queues again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import HUNG, STOPPED
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
from igpt_ds.train.health.replay import report

START = Start(Path("runs/xl"), "7", 1, "node[1-2]", max_fruitless=3)
SHORT = {"TimeLimit": "00:10:00", "StartTime": "2026-01-01T00:00:00", "EndTime": "2026-01-01T00:10:00"}


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


ENDED = "srun: launch/slurm: _step_signal: Terminating StepId=1.0\n"


@pytest.mark.parametrize(
    ("status", "errors", "outcome"),
    [
        (0, "", (0, ())),
        (143, "", (143, ())),
        (143, exits(("node2", 1), ("node1", 143)), (1, ())),
        (134, exits(("node1", 134), ("node2", 250)), (134, ())),  # NCCL aborts all
        (139, exits(("node1", 139), ("node2", 245), ("node3", 249)), (139, ("node1", "node2", "node3"))),
        (143, "srun: error: node2: task 1: Aborted\n" + ENDED + "srun: error: node1: task 0: Killed\n", (143, ())),
        (137, "srun: error: Node failure on node2\nsrun: error: node1: task 0: Killed\n" + ENDED, (137, ())),
        (85, exits(("node1", 1), ("node2", STOPPED)), (STOPPED, ())),
        (143, exits(("node1", HUNG), ("node2", 1)), (HUNG, ())),
        (0, exits(("node1", HUNG), ("node2", STOPPED)), (STOPPED, ())),
        (137, exits(("node1", 128), ("node2", 129), ("node2", 137), ("node3", 255)), (128, ("node2",))),
        (
            9,
            "srun: error: gpu-7: tasks 0,2-3: Killed\nsrun: error: gpu-8: task 1: Bus error (core dumped)\n",
            (9, ("gpu-7", "gpu-8")),
        ),
        (137, "srun: error: node2: task 1: Out Of Memory\n" + ENDED + "srun: error: node1: task 0: Killed\n", (137, ("node2",))),
        (2, f"train.py: error: {report(9, 6, [('', 'a', 'node1'), ('the loss', 'b', 'node2')])}\n", (BAD_NODES, ("node2",))),
        (2, f"train.py: error: {report(9, 6, [('the loss', 'a', 'node1')] * 2)}\n", (2, ())),  # all ranks differ
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
        (End(STOPPED), {"state": "", "stop": True}, "SLURM does not answer"),
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
