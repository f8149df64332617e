"""Ranks that start again inside the job: on a spare node, on the nodes that are left, and in the queue when too few are left.

With --fast_dir on the disks of the nodes: what a lost node and a failed disk take along.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.usefixtures("short_kill_wait")]
Trainings = Callable[..., Any]


@pytest.fixture(scope="module")
def running_cluster(clusters: Callable[[int], Any]) -> Any:
    """Three nodes."""
    return clusters(3)


def kill_rank(job: Any, number: int, others: tuple[int, ...]) -> None:
    """Kills a rank as the first of its start to die."""
    ranks = [job.rank(other) for other in others]
    for rank in ranks:
        rank.suspend()  # or one of them may fail first, its peer being gone
    killed = job.rank(number)
    job.suffers("a rank is killed")
    killed.kill()
    killed.wait(60)
    for rank in ranks:
        rank.resume()


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether curves are equal up to what another number of ranks changes."""
    pairs = zip(found, expected, strict=True)
    return all(row == pytest.approx(other, rel=2e-3) for row, other in pairs)


def power_off(job: Any, node: str, words: str = "") -> None:
    """Takes the current from a node."""
    job.suffers(f"a node loses power{words}")
    job.slurm.tell("power", node)


def test_a_spare_node_takes_the_place_of_one_and_the_rest_that_of_another(
    training: Trainings, undisturbed: list[dict[str, Any]]
) -> None:
    job = training()
    job.submit(options=("--nodes=3",), SPARE_NODES="1", LEAST_NODES="2")
    job.reaches(12)
    kill_rank(job, 1, (0,))
    job.said("starts again inside the job without node2")
    job.said("restart 1: start on node[1,3]")
    job.reaches(22)
    power_off(job, "node3")
    job.said("restart 2: start on node1,")
    assert job.ended() == "COMPLETED"
    assert job.slurm.facts(job.job)["Restarts"] == "0"
    assert [row["nodes"] for row in job.starts()] == ["node[1-2]", "node[1,3]", "node1"]
    assert [row["bad_nodes"] for row in job.ends()] == ["node2", "node3", ""]
    assert close(job.curves(), undisturbed)


def test_a_job_with_too_few_nodes_left_queues_again(training: Trainings, undisturbed: list[dict[str, Any]]) -> None:
    job = training()
    job.submit(options=("--nodes=3",), SPARE_NODES="1")
    job.reaches(12)
    power_off(job, "node2")
    job.said("restart 1: start on node[1,3]")
    job.reaches(22)
    kill_rank(job, 1, (0,))
    job.said("1 nodes of the job are left for 2")
    job.said("queued again")
    job.slurm.tell("heal", "node2")
    assert job.ended() == "COMPLETED"
    assert job.slurm.facts(job.job)["Restarts"] == "1"
    assert [row["restart"] for row in job.starts()] == [0, 1, 2]
    assert job.curves() == undisturbed


def begin_with_copies(job: Any) -> None:
    """Starts a training on two nodes and a spare one. Its early states are on the nodes' own disks alone."""
    flags = ("--save_every=30", "--fast_dir=/mnt/fast", "--fast_save_every=1", "--fast_copies")
    job.submit(*flags, options=("--nodes=3",), SPARE_NODES="1")
    job.reaches(12)


@pytest.mark.usefixtures("slow_to_notice")
def test_the_copies_of_a_neighbour_serve_a_node_that_is_found_lost_before_slurm_notices(
    training: Trainings, undisturbed: list[dict[str, Any]]
) -> None:
    job = training()
    begin_with_copies(job)
    power_off(job, "node2", ", with --fast_copies, SlurmdTimeout=300")
    job.said("restart 1: start on node[1,3]")
    assert "error: node2 does not answer any more" in job.text()
    job.said("was put together")
    job.slurm.set_timer("SlurmdTimeout", 10)  # the job ends when SLURM knows of its lost node
    assert job.ended() == "COMPLETED"
    assert job.slurm.facts(job.job)["Restarts"] == "0"
    assert [row["nodes"] for row in job.starts()] == ["node[1-2]", "node[1,3]"]
    (step,) = re.findall(r"step (\d+) was put together", job.text())
    assert 0 < int(step) < 30  # no checkpoint of the run directory
    assert job.curves() == undisturbed


def test_a_run_goes_on_without_the_disk_that_fails(training: Trainings, undisturbed: list[dict[str, Any]]) -> None:
    """The next start too, and it still reads the states there: a node is lost, and its part is on the failed disk alone."""
    job = training()
    begin_with_copies(job)
    job.slurm.tell("disk", "node1")
    job.said("the run goes on without --fast_dir")
    assert "Read-only file system" in job.text()
    power_off(job, "node2")
    job.said("restart 1: start on node[1,3]")
    job.said("the run goes on without --fast_dir", times=2)
    job.said("was put together")
    assert job.ended() == "COMPLETED"
    assert job.curves() == undisturbed
