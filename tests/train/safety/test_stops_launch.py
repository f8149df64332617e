"""Stops in every phase of a real run: status 85 with everything saved, then the curve of a run that never stopped."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import HUNG, STOPPED
from igpt_ds.json_files import read_json, read_json_lines
from igpt_ds.train.heartbeat import all_heartbeats

pytestmark = pytest.mark.slow
Curves = Callable[[str], list[dict[str, Any]]]
Command = Callable[..., list[str]]


def newest(run_dir: Path) -> str:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))[-1]


def test_usr1_to_one_rank_in_each_phase_then_the_curve_of_a_whole_run(
    launch: Any, with_fault: Any, ended: Any, command: Command, curves: Curves, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run, resume = tmp_path / "run", command("run", "--resume", "auto")

    said = ended(launch(with_fault(resume, "signal=SIGUSR1,1,validation,4"), ranks=2, by="deepspeed"), STOPPED)
    assert "stopped by signal USR1; everything is saved" in said
    assert newest(run) == "step-00000004"
    manifest = read_json(run / "checkpoints" / "step-00000004" / "manifest.json", "manifest")
    assert manifest["guards"]["unvalidated"]
    assert [row["step"] for row in curves("run") if "val_loss" in row] == [0]

    said = ended(launch(with_fault(resume, "signal=SIGTERM,0,save,8"), ranks=2), STOPPED)
    assert "stopped by signal TERM" in said
    assert newest(run) == "step-00000008"
    assert [row["step"] for row in curves("run") if "val_loss" in row] == [0, 4, 8]

    said = ended(launch(with_fault(resume, "signal=SIGINT,1,step,9"), ranks=2), STOPPED)
    assert "stopped by Ctrl-C; everything is saved; continue with: " in said
    assert newest(run) == "step-00000010"  # the step after the signal is the last
    assert not (run / "FINISHED").exists()
    assert [path.name for path in (run / "heartbeat").iterdir()] == ["node-00000.json"]  # of both ranks
    assert {rank: beat.phase for rank, beat in all_heartbeats(run).items()} == {0: "stopped", 1: "stopped"}

    ended(launch(resume, ranks=2), 0)
    assert (run / "FINISHED").exists()
    assert curves("run") == whole


def test_a_time_limit_before_the_first_step_and_a_stop_file(
    launch: Any, ended: Any, command: Command, curves: Curves, tmp_path: Path
) -> None:
    """The launcher that ignores USR1 hands that on to its ranks, which hear it all the same."""
    run, longer = tmp_path / "run", ["--steps", "600", "--save_every", "0", "--val_every", "0"]
    said = ended(launch(command("run", *longer, "--max_minutes", "0")), STOPPED)
    assert "stopped by --max_minutes" in said
    assert not (run / "checkpoints").exists()
    assert curves("run") == []

    (run / "STOP").touch()  # of a run that is over: the next one is not meant
    process = launch.start(
        ["bash", "-c", "trap '' USR1; exec python \"$@\"", "bash", *command("run", *longer, "--resume", "auto")]
    )
    while process.poll() is None and len(read_json_lines(run / "train.jsonl")) < 3:
        time.sleep(0.01)
    assert not (run / "STOP").exists()
    (run / "STOP").touch()
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == STOPPED, stdout[-2000:] + stderr[-2000:]
    assert "stopped by a file STOP in the run directory" in stdout
    step = read_json_lines(run / "train.jsonl")[-1]["step"]
    assert newest(run) == f"step-{step:08d}"
    assert step < 600

    again = launch.start(["bash", "-c", "trap '' USR1; exec python \"$@\"", "bash", *command("run", *longer, "--resume", "auto")])
    while again.poll() is None and read_json_lines(run / "train.jsonl")[-1]["step"] < step + 2:
        time.sleep(0.01)
    for _ in range(3):
        os.kill(again.pid, signal.SIGUSR1)
    stdout, stderr = again.communicate(timeout=600)
    assert again.returncode == STOPPED, stdout[-2000:] + stderr[-2000:]
    assert newest(run) > f"step-{step:08d}"


def test_of_two_starts_at_one_moment_one_trains_and_a_third_leaves_its_stop_file_alone(
    launch: Any, command: Command, tmp_path: Path
) -> None:
    run, words = (
        tmp_path / "run",
        command("run", "--steps", "100000", "--save_every", "0", "--val_every", "0", "--resume", "auto"),
    )
    starts = [launch.start(words) for _ in range(2)]
    deadline = time.monotonic() + 600
    while not (gone := [start for start in starts if start.poll() is not None]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (refused,) = gone
    (winner,) = (start for start in starts if start is not refused)
    while len(read_json_lines(run / "train.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    winner.send_signal(signal.SIGSTOP)
    (run / "STOP").touch()
    third = launch.start(words)
    for start in (refused, third):
        _, stderr = start.communicate(timeout=600)
        assert start.returncode == 2, stderr[-2000:]
        (line,) = (line for line in stderr.splitlines() if "rror" in line)
        assert line.startswith(f"train.py: error: {run} is in use: rank 0 on ")
        assert f" (pid {winner.pid}) " in line
    assert (run / "STOP").exists()
    winner.send_signal(signal.SIGCONT)
    stdout, stderr = winner.communicate(timeout=600)
    assert winner.returncode == STOPPED, stdout[-2000:] + stderr[-2000:]
    steps = [row["step"] for row in read_json_lines(run / "train.jsonl") if "loss" in row]
    assert steps == list(range(1, steps[-1] + 1))
    assert newest(run) == f"step-{steps[-1]:08d}"


def test_ctrl_c_under_mpirun(launch: Any, command: Command, free_port: int, tmp_path: Path) -> None:
    """Its variables by hand; then mpirun itself where there is one, which prints nothing after Ctrl-C."""
    run, words = (
        tmp_path / "run",
        command("run", "--steps", "100000", "--save_every", "0", "--val_every", "0", "--resume", "auto"),
    )
    place = {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_PORT": str(free_port)}
    ranks = [launch.start(words, env=place | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}) for rank in "01"]
    stdout = interrupted(ranks, run / "train.jsonl", 3)
    assert [process.returncode for process in ranks] == [STOPPED, STOPPED]
    assert "stopped by Ctrl-C; everything is saved; continue with: python train.py --config" in stdout
    step = read_json_lines(run / "train.jsonl")[-1]["step"]
    assert newest(run) == f"step-{step:08d}"
    if mpirun := shutil.which("mpirun"):
        grace = ["--oversubscribe", "--mca", "odls_base_sigkill_timeout", "20"]
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        process = launch.start(
            [mpirun, *grace, "-np", "2", sys.executable, *words], env=allowed | {"MASTER_PORT": str(free_port)}
        )
        interrupted([process], run / "train.jsonl", step + 2)
        assert newest(run) > f"step-{step:08d}"


def interrupted(processes: list[Any], curve: Path, step: int) -> str:
    """Ctrl-C to all processes once the curve has a step; what the first one printed."""
    while processes[0].poll() is None and not any(row["step"] >= step for row in read_json_lines(curve)):
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGINT)
    said = [process.communicate(timeout=600) for process in processes]
    return str(said[0][0])


def test_a_hung_rank_ends_with_stacks(launch: Any, with_fault: Any, command: Command, free_port: int, tmp_path: Path) -> None:
    """Two ranks without a launcher, one of them frozen by SIGSTOP: the other says where it waits."""
    words = with_fault(command("run", "--hang_minutes", "0.2", "--save_every", "0"), "signal=SIGSTOP,1,step,5")
    alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    ranks = [launch.start(words, env=alone | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    _, stderr = ranks[0].communicate(timeout=600)
    assert ranks[0].returncode == HUNG, stderr[-2000:]
    assert ranks[1].poll() is None  # frozen
    assert "rank 0 hangs in phase 'step' after step 5" in stderr
    stacks = (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
    assert stacks.startswith("no progress for 0.2 minutes in phase 'step' after step 5")
    assert 'loop.py", line ' in stacks  # where the main thread stood
    recorded = pickle.loads((tmp_path / "run" / "flight_recorder" / "rank_0").read_bytes())
    assert recorded["entries"][-1]["state"] != "completed"  # the collective that rank 1 does not join
    assert not (tmp_path / "run" / "FINISHED").exists()
