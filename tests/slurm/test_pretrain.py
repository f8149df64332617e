"""slurm/pretrain.sbatch on two nodes of one rank: whatever happens to the job, its losses are those of an undisturbed run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from igpt_ds.json_files import read_json_lines
from igpt_ds.train.ledger.goodput import read_goodput

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
Trainings = Callable[..., Any]
Curves = list[dict[str, Any]]


def said(job: Any) -> list[str]:
    """What the batch script itself said."""
    return [line for line in job.text().splitlines() if line.startswith("== ")]


def assert_close(found: Curves, expected: Curves) -> None:
    """Equal up to what another number of ranks changes: the order of sums."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-3), row["step"]


def test_two_nodes_train_as_one_does(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(options=("--gpus-per-node=2",), PREFLIGHT="1")
    assert job.ended() == "COMPLETED"
    assert (job.run_dir / "FINISHED").exists()
    assert json.loads((job.run_dir / "run.json").read_text())["world_size"] == 4
    assert (job.run_dir / "hostfile").read_text() == "node1 slots=2\nnode2 slots=2\n"
    assert_close(job.curves(), undisturbed)
    assert job.slurm.facts(job.job)["Restarts"] == "0"
    assert job.text().startswith("== ")
    assert "preflight of 4 ranks on 2 nodes: all checks passed" in job.text()

    job.submit()
    assert job.ended() == "COMPLETED"
    assert f"{job.run_dir} is finished" in job.text()
    assert len(job.starts()) == 1


def test_before_its_time_limit_it_saves_queues_again_and_goes_on(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(options=("--time=60", "--signal=B:USR1@90"))
    job.reaches(4)
    rank = job.rank(1)
    rank.suspend()  # a machine too slow to end before the limit, which shall be in two minutes
    job.slurm.run("scontrol", "update", f"JobId={job.job}", "EndTime=now+2minutes")
    job.said("USR1: every rank is told")
    rank.resume()
    assert job.ended() == "COMPLETED"
    first = job.ends()[0]
    assert (first["status"], first["reason"]) == (85, "it was stopped and saved its state")
    assert 4 <= first["images_seen"] / 12 < 40
    assert job.starts()[1]["images_seen"] == first["images_seen"]
    assert job.curves() == undisturbed
    ledger = read_goodput(job.run_dir)
    assert [start.failed for start in ledger.starts] == [False, False]
    assert ledger.starts[1].seconds["queue"] > 0 < ledger.starts[1].seconds["down"]
    assert abs(ledger.seconds["unexplained"]) < 0.01 * ledger.wall


def test_nodes_that_the_batch_does_not_need_are_idle_and_a_killed_rank_costs_its_node_alone(
    training: Trainings, undisturbed: Curves
) -> None:
    """A batch of 12 divides into 4 ranks, and not into 8."""
    job = training()
    job.submit_by_script("--nodes=1-2", RANKS_PER_NODE="4")
    job.said("node2 stays idle: train.py: error: batch_images=12 does not divide into 8 ranks")
    job.reaches(12)
    others = [job.rank(number) for number in (0, 2, 3)]
    for other in others:
        other.suspend()  # or one of them may fail, its peer being gone, before the launcher looks: it looks once a second
    killed = job.rank(1)
    killed.kill()
    killed.wait(60)  # until the launcher has seen it
    for other in others:
        other.resume()
    job.said("starts again inside the job without node1")
    assert job.ended() == "COMPLETED"
    assert (job.ends()[0]["bad_nodes"], job.ends()[0]["nodes"]) == ("node1", "node1")
    assert [row["nodes"] for row in job.starts()] == ["node[1-2]", "node2"]
    assert_close(job.curves(), undisturbed)


@pytest.mark.usefixtures("short_kill_wait")
def test_a_node_loses_power_one_goes_on_is_preempted_and_two_end_it(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit(options=("--nodes=1-2",))
    job.reaches(12)
    job.slurm.tell("power", "node2")
    job.said("restart 1: start on node1,")
    job.slurm.tell("heal", "node2")
    job.reaches(22)
    job.is_preempted()
    assert job.ended() == "COMPLETED"
    assert [row["status"] for row in job.ends()][-2:] == [85, 0]
    assert [row["restart"] for row in job.ends()] == [0, 1, 2], "also of the start that SLURM ended"
    assert [row["nodes"] for row in job.starts()] == ["node[1-2]", "node1", "node[1-2]"]
    assert_close(job.curves(), undisturbed)


@pytest.mark.usefixtures("short_kill_wait")
def test_a_dead_slurmd_leaves_ghosts_that_do_no_harm(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit()
    job.reaches(12)
    ghost = job.rank(1)
    ghost.suspend()  # or the job would end before SLURM misses the daemon
    job.slurm.tell("slurmd", "node2")
    job.slurm.until(lambda: job.slurm.facts(job.job)["JobState"] == "PENDING", 240)
    assert ghost.status() == psutil.STATUS_STOPPED
    ghost.resume()
    job.slurm.tell("heal", "node2")
    assert job.ended() == "COMPLETED"
    assert job.curves() == undisturbed


def test_a_cancelled_job_stays_cancelled_and_a_new_one_goes_on(training: Trainings, undisturbed: Curves) -> None:
    job = training()
    job.submit("--save_every=0")
    job.reaches(5)
    first = job.rank(0)
    first.suspend()  # or the run might end before SLURM acts
    job.slurm.run("scancel", job.job)
    job.slurm.until(lambda: job.slurm.facts(job.job)["JobState"] in ("COMPLETING", "CANCELLED"))
    first.resume()
    assert job.ended() == "CANCELLED"
    job.said("SLURM has ended the job")
    assert job.slurm.facts(job.job)["Restarts"] == "0"
    assert (job.ends()[0]["status"], job.ends()[0]["images_seen"]) == (85, 12 * job.steps())
    job.submit()
    assert job.ended() == "COMPLETED"
    assert job.starts()[1]["images_seen"] == job.ends()[0]["images_seen"] >= 60
    assert job.curves() == undisturbed


def test_what_ends_a_job_before_its_first_step(training: Trainings) -> None:
    job = training()
    waits = job.submit_by_script("--hold")
    with pytest.raises(AssertionError, match=rf"submit\.sh: error: job {waits} \(PENDING\) uses {job.run_dir}"):
        job.submit_by_script()
    (job.run_dir / "owner").write_text(f"{waits}.0\n")
    job.submit()
    assert job.ended() == "FAILED"
    assert f"job {waits} (PENDING) still uses {job.run_dir}" in job.text()

    stop = job.run_dir / "STOP"
    stop.touch()
    job.slurm.run("scontrol", "release", waits)
    assert job.slurm.ended(waits, job.log) == "COMPLETED"
    assert f"it was asked to stop before it started; not queued again: {stop} exists" in job.text()
    (row,) = read_json_lines(job.run_dir / "restarts.jsonl")
    assert (row["event"], row["job"], row["status"], row["bad_nodes"]) == ("end", waits, 85, "")
    assert row["reason"] == "it was asked to stop before it started"

    os.utime(stop, (0, 0))
    job.submit_by_script("--time=11")
    job.usr1_before_its_ranks()  # SLURM itself would send it in a minute
    assert job.ended() == "FAILED"
    assert f"removed {stop}" in job.text()
    assert "the time limit (00:11:00) leaves no time before USR1" in job.text()
    assert job.ends()[1]["reason"] == "it was stopped before the first step: nothing was saved"


def test_usr1_of_a_user_before_the_first_step_is_no_short_limit(training: Trainings) -> None:
    job = training()
    job.submit()
    job.usr1_before_its_ranks()
    job.said("it was stopped before the first step: nothing was saved; queued again")
    assert "the time limit" not in job.text()


def test_of_two_jobs_that_start_at_one_moment_one_trains(training: Trainings, undisturbed: Curves) -> None:
    jobs = [training(log="one"), training(log="other")]
    numbers = [job.submit(options=("--nodes=1", "--hold")) for job in jobs]
    jobs[0].slurm.run("scontrol", "release", *numbers)
    ends = [job.ended() for job in jobs]
    assert sorted(ends) == ["COMPLETED", "FAILED"]
    winner, other = (jobs[ends.index(state)] for state in ("COMPLETED", "FAILED"))
    (line,) = other.text().splitlines()
    assert f"error: job {winner.job} (RUNNING) still uses {other.run_dir}" in line
    assert (winner.run_dir / "owner").read_text() == f"{winner.job}.0\n"
    assert [row["job"] for row in (*winner.starts(), *winner.ends())] == [winner.job, winner.job]
    assert_close(winner.curves(), undisturbed)


def test_a_full_disk_stops_the_job_with_its_reason(training: Trainings, undisturbed: Curves, slurm: Any) -> None:
    """The disk is seen from the nodes alone, so that everything about it is asked there."""
    job = training(run_dir=slurm.small_disk / "run")
    job.submit()
    slurm.until(lambda: slurm.run("find", slurm.small_disk, "-name", "COMPLETE"), 240, job.text)
    slurm.run("sh", "-c", f"cat /dev/zero > {slurm.small_disk}/rubbish || true")
    assert job.ended() == "FAILED"
    assert any("error: " in line and ("No space left" in line or "free" in line) for line in said(job)), job.text()
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
    slurm.run(*words, f"--run_dir={tmp_path}/run", timeout=300)
    assert_close(curves(tmp_path / "run"), undisturbed)


def test_one_process_of_a_job_of_many_is_refused(slurm: Any, common: list[str], tmp_path: Path) -> None:
    command = " ".join(["python", "train.py", *common, f"--run_dir={tmp_path}/run"])
    log = tmp_path / "log"
    job = slurm.sbatch("-n4", f"--output={log}", f"--wrap={command}")
    assert slurm.ended(job, log) == "FAILED"
    assert "SLURM gave this job 4 tasks but only one process runs" in log.read_text()
