"""slurm/pretrain.sbatch on two nodes of two ranks: whatever happens to the job, its losses are those of an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
Trainings = Callable[..., Any]
Curves = list[dict[str, Any]]


def assert_close(found: Curves, expected: Curves) -> None:
    """Equal up to what another number of ranks changes: the order of sums."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-3), row["step"]


def test_two_nodes_train_as_one_does(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(PREFLIGHT="1")
    assert job.ended() == "COMPLETED"
    assert (job.run_dir / "FINISHED").exists()
    assert json.loads((job.run_dir / "run.json").read_text())["world_size"] == 4
    assert (job.run_dir / "hostfile").read_text() == "node1 slots=2\nnode2 slots=2\n"
    assert job.curves() == undisturbed
    assert job.slurm.facts(job.job)["Restarts"] == "0"
    assert job.text().startswith("== ")
    assert "preflight of 4 ranks on 2 nodes: all is well" in job.text()

    job.submit()
    assert job.ended() == "COMPLETED"
    assert f"{job.run_dir} is finished" in job.text()
    assert len(job.starts()) == 1


def test_before_its_time_limit_it_saves_queues_again_and_goes_on(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(options=("--time=60", "--signal=B:USR1@90"))
    job.reaches(4)
    rank = job.rank(3)
    rank.suspend()  # a machine too slow to end before the limit, which shall be in two minutes
    job.slurm.run("scontrol", "update", f"JobId={job.job}", "EndTime=now+2minutes")
    job.said("USR1: every rank is told", timeout=60)
    rank.resume()
    assert job.ended(240) == "COMPLETED"
    first = job.ends()[0]
    assert (first["status"], first["reason"]) == (85, "it was asked to stop, and saved what it had")
    assert 4 <= first["images_seen"] / 12 < 40
    assert job.starts()[1]["images_seen"] == first["images_seen"]
    assert job.curves() == undisturbed


def test_a_killed_rank_costs_its_node_and_nothing_else(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(options=("--nodes=1",))
    job.reaches(12)
    again = training(run_dir=job.run_dir)
    again.log = job.log.with_name("second")
    again.submit(options=("--nodes=1",))
    assert again.ended() == "FAILED"
    assert f"job {job.job} is still at work in {job.run_dir}" in again.text()

    job.rank(1).kill()
    assert job.ended() == "COMPLETED"
    assert job.ends()[0]["bad_nodes"] == "node1"
    assert [row["nodes"] for row in job.starts()] == ["node1", "node2"]
    assert_close(job.curves(), undisturbed)


def test_a_node_loses_power_one_goes_on_is_preempted_and_two_end_it(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(options=("--nodes=1-2",))
    job.reaches(12)
    job.slurm.tell("power", "node2")
    job.said("restart 1: start on node1,", timeout=120)
    job.slurm.tell("heal", "node2")
    job.reaches(22)
    urgent = job.slurm.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.slurm.ended(urgent) == "COMPLETED"  # it takes our nodes: we are preempted
    assert job.ended() == "COMPLETED"
    assert [row["status"] for row in job.ends()][-2:] == [85, 0]
    assert [row["nodes"] for row in job.starts()] == ["node[1-2]", "node1", "node[1-2]"]
    assert_close(job.curves(), undisturbed)


def test_a_dead_slurmd_leaves_ghosts_that_do_no_harm(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit()
    job.reaches(12)
    ghost = job.rank(3)
    ghost.suspend()  # or the job would end before SLURM misses the daemon
    job.slurm.tell("slurmd", "node2")
    job.slurm.until(lambda: job.slurm.facts(job.job)["JobState"] == "PENDING", 120)
    assert ghost.status() == psutil.STATUS_STOPPED
    ghost.resume()
    job.slurm.tell("heal", "node2")
    assert job.ended(240) == "COMPLETED"
    assert job.curves() == undisturbed


def test_a_cancelled_job_stays_cancelled_and_a_new_one_goes_on(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit()
    job.reaches(12)
    job.slurm.run("scancel", job.job)
    assert job.ended() == "CANCELLED"
    job.said("SLURM has ended the job")
    assert job.slurm.facts(job.job)["Restarts"] == "0"
    job.submit()
    assert job.ended() == "COMPLETED"
    assert job.starts()[1]["images_seen"] >= 120
    assert job.curves() == undisturbed


def test_a_full_disk_stops_the_job_with_its_reason(training: Trainings, undisturbed: Curves, slurm: Any) -> None:
    """The disk is seen from the nodes alone, so that everything about it is asked there."""
    job = training(run_dir=slurm.small_disk / "run")
    job.submit()
    slurm.until(lambda: slurm.run("find", slurm.small_disk, "-name", "COMPLETE"), 120, job.text)
    slurm.run("sh", "-c", f"cat /dev/zero > {slurm.small_disk}/rubbish || true")
    assert job.ended(240) == "FAILED"
    assert "No space left on device" in job.text() or "free" in job.text()
    assert "2 starts in a row brought no new checkpoint" in job.text()
    slurm.run("rm", slurm.small_disk / "rubbish")
    job.submit()
    assert job.ended() == "COMPLETED"
    copy = job.log.with_name("copy")
    copy.mkdir()
    (copy / "train.jsonl").write_text(slurm.run("cat", slurm.small_disk / "run" / "train.jsonl"))
    job.run_dir = copy
    assert job.curves() == undisturbed


def test_a_node_that_does_not_see_the_data_is_found_before_the_start(
    training: Trainings, undisturbed: Curves, slurm: Any, tiny_dataset: Path
) -> None:
    slurm.run("srun", "--nodelist=node2", "mount", "-t", "tmpfs", "tmpfs", tiny_dataset)
    job = training()
    job.submit(PREFLIGHT="1")
    job.said("bad nodes: node2; queued again")
    assert "node2 stays: without it there are 1 nodes for 2" in job.text()
    slurm.run("srun", "--nodelist=node2", "umount", tiny_dataset)
    assert job.ended() == "COMPLETED"
    assert job.ends()[0]["bad_nodes"] == "node2"
    assert job.curves() == undisturbed


def test_bare_srun_needs_no_launcher(slurm: Any, common: list[str], undisturbed: Curves, tmp_path: Path, curves: Any) -> None:
    words = ["srun", "-N2", "-n4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "python", "train.py", *common]
    slurm.run(*words, f"--run_dir={tmp_path}/run", timeout=120)
    assert curves(tmp_path / "run") == undisturbed


def test_one_process_of_a_job_of_many_is_refused(slurm: Any, common: list[str], tmp_path: Path) -> None:
    command = " ".join(["python", "train.py", *common, f"--run_dir={tmp_path}/run"])
    log = tmp_path / "log"
    job = slurm.sbatch("-n4", f"--output={log}", f"--wrap={command}")
    assert slurm.ended(job, log) == "FAILED"
    assert "SLURM gave this job 4 tasks but only one process runs" in log.read_text()
