"""The diagnosis of hung and dead runs: who is behind, who failed first, why, and a report to send."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import write_json
from igpt_ds.ops import diagnose
from igpt_ds.ops.rank_status import RankStatus
from igpt_ds.ops.status import DivergedRun
from igpt_ds.train.heartbeat import Heartbeat, all_heartbeats
from igpt_ds.train.safety.build_locks import wait_for_builds

ROOT = Path(__file__).parents[2]
NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (137, "SIGKILL"),
        (-9, "SIGKILL"),
        (143, "SIGTERM"),
        (138, "SIGUSR1"),
        (85, "stopped with everything saved"),
        (86, "RUN_DIR/stacks"),
        (139, "segmentation fault"),
        (-8, "killed by SIGFPE"),
        (77, "not an exit status of train.py"),
    ],
)
def test_exit_statuses_in_words(code: int, words: str):
    assert words in diagnose.explain(code)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "[ERROR] [launch.py:341:sigkill_handler] ['python', 'train.py', '--local_rank=3', '--x'] exits with return code = -9",
            "rank 3: exit status -9: killed by SIGKILL",
        ),
        (
            "E1121 failed (exitcode: -11) local_rank: 1 (pid: 2710) of binary: python3",
            "rank 1: exit status -11: segmentation fault",
        ),
        ("srun: error: node2: task 5: Exited with exit code 86", "rank 5 on node2: exit status 86: "),
        ("srun: error: node2: tasks 5-7: Killed", "rank 5 on node2: Killed"),
        ("rank 4 hangs in phase 'step' after step 12: runs/s/stacks/rank-4.txt", "rank 4: hangs in phase 'step' after step 12"),
        ("[rank2]: Traceback (most recent call last):", "rank 2: Traceback"),
    ],
)
def test_ranks_that_failed_are_read_from_the_logs_of_each_launcher(line: str, words: str):
    found = diagnose.failures("job.out", ["step 1/12 | loss 2.07 nats/token", line, "more"])
    assert len(found) == 1
    assert found[0].startswith(words)
    assert found[0].endswith("(job.out, line 2)")


def test_a_forgotten_lock_of_a_build_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    wait_for_builds(0.1)
    (clue,) = diagnose.clues("job.out", capsys.readouterr().out.splitlines())
    assert "lock file" in clue.cause


def test_the_surest_clue_comes_first_and_calm_lines_give_none():
    lines = ["torch.OutOfMemoryError: CUDA out of memory.", "slurmstepd: error: Detected 1 oom_kill event", "CUDA out of memory"]
    found = diagnose.clues("job.out", lines)
    assert [clue.where for clue in found] == ["job.out, line 2", "job.out, line 1"]
    assert "the machine ran out of memory" in found[0].cause
    assert diagnose.clues("job.out", ["step 8/12 | loss 2.0794 nats/token | lr 1.00e-02", "validation 2.0794"]) == []


def test_who_is_behind():
    beats = [Heartbeat(rank, 12, "step", NOW - 90, "node1", 7, 0.2, NOW) for rank in range(6)]
    ranks = [RankStatus(beat.rank, beat, NOW) for beat in beats]
    assert diagnose.behind(ranks, dict.fromkeys(range(6), "S")) == []
    ranks[1] = RankStatus(1, replace(beats[1], phase="validation"), NOW)
    ranks[2] = RankStatus(2, replace(beats[2], written=NOW - 61), NOW)
    ranks[3] = RankStatus(3, None, NOW)
    found = diagnose.behind(ranks, {4: "T", 5: "S"})
    assert found[0] == "rank 4 (process 7 on node1, in step after step 12) is stopped by a signal: kill -CONT 7 continues it"
    assert found[1] == "rank 3 never wrote a heartbeat"
    assert found[2].endswith("is not where most ranks are: in step after step 12")
    assert found[3].endswith("is silent: its last progress is 1 min 30 s old")


def test_causes_in_their_order():
    clue = diagnose.Clue("job.out, line 3", "No space left on device", "the disk is full")
    causes = diagnose.likely_causes("dead", ["rank 1 is silent"], ["rank 1: Killed", "rank 0: Killed"], [clue], 137)
    assert causes[0] == "the disk is full (job.out, line 3: No space left on device)"
    assert causes[1:3] == ["rank 1: Killed", "rank 1 is silent"]
    assert causes[3].startswith("exit status 137: killed by SIGKILL")
    assert diagnose.likely_causes("finished", [], [], [], None) == []
    assert "compare their stacks" in diagnose.likely_causes("hanging", [], [], [], None)[0]


def test_a_lost_loss_is_the_likeliest_cause_and_errors_of_heartbeats_count():
    lost = DivergedRun(23, 4.5, "it was above 3.3 for 3 steps in a row")
    clue = diagnose.Clue("job.out, line 3", "No space left on device", "the disk is full")
    causes = diagnose.likely_causes("lost", [], ["rank 1: Killed"], [clue], 2, lost)
    assert causes[0] == "the loss diverged at step 23: it is 4.5000, and it was above 3.3 for 3 steps in a row (LOST.json)"
    assert causes[1].startswith("the disk is full")
    ended = Heartbeat(1, 12, "end", NOW, "node1", 7, 0.2, NOW, "no room")
    assert diagnose.errors([RankStatus(0, None, NOW), RankStatus(1, ended, NOW)]) == [
        "rank 1: ended with the error 'no room' (its heartbeat)"
    ]


def test_states_of_processes_and_who_would_survive_a_signal(tmp_path: Path):
    assert diagnose.process_state(os.getpid()) == "R"
    assert diagnose.process_state(2**22 + 1) == "gone"
    code = "import faulthandler, signal, sys, time; faulthandler.register(signal.SIGUSR2); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert diagnose.catches(process.pid, signal.SIGUSR2)
        assert not diagnose.catches(process.pid, signal.SIGUSR1)
        os.kill(process.pid, signal.SIGSTOP)
        end = time.monotonic() + 600
        while diagnose.process_state(process.pid) != "T" and time.monotonic() < end:
            time.sleep(0.01)
        assert diagnose.process_state(process.pid) == "T"
        process.kill()
    assert not diagnose.catches(process.pid, signal.SIGUSR2)


def ask(*words: str | Path) -> str:
    command = [sys.executable, ROOT / "tools" / "diagnose.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def members(text: str) -> dict[str, str]:
    """What the report holds, by its members' names."""
    report = Path(text.rpartition("report ")[2].strip())
    with tarfile.open(report) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        found = {name: file.read().decode() for name, file in files.items() if file is not None}
    report.unlink()
    return found


@pytest.mark.slow
def test_a_run_that_hangs_and_then_dies(launch: Any, command: Callable[..., list[str]], tmp_path: Path):
    run_dir, log = tmp_path / "run", tmp_path / "job.out"
    longer = ["--steps", "100000", "--val_every", "0", "--save_every", "0", "--log_every", "50"]
    process = launch.start(command("run", *longer), ranks=2, by="deepspeed")
    end = time.monotonic() + 600
    while not (run_dir / "train.jsonl").exists() or '"loss"' not in (run_dir / "train.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    pids = [all_heartbeats(run_dir)[rank].pid for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.5)
    dump = run_dir / "flight_recorder" / "rank_0"
    dump.touch()
    text = ask(run_dir)
    assert f"likely cause    rank 1 (process {pids[1]} on " in text
    assert f"is stopped by a signal: kill -CONT {pids[1]} continues it" in text
    report = members(text)
    assert "in fit" in report["diagnosis/run/stacks/rank-0.live.txt"]  # it waits for rank 1 somewhere in the step
    assert "most recent call first" in report["diagnosis/run/stacks/rank-0.live.txt"]
    assert report["diagnosis/summary.txt"] == text.rpartition("report ")[0]
    assert json.loads(report["diagnosis/status.json"])["step"] > 0
    assert {"diagnosis/run/run.json", "diagnosis/run/heartbeat/node-00000.json", "diagnosis/train.jsonl"} <= set(report)
    assert "diagnosis/run/flight_recorder/rank_0" in report

    os.kill(pids[1], signal.SIGKILL)
    log.write_text("".join(process.communicate(timeout=600)))
    text = ask(run_dir, "--logs", log, "--exit_code", "137")
    assert text.startswith(f"{run_dir}: dead, tiny on 2 ranks on ")
    assert "first failure   rank 1: exit status -9: killed by SIGKILL" in text
    assert f"read            {log}" in text
    assert "no longer exists" in text
    assert f"diagnosis/{str(log).strip('/')}" in members(text)


def test_a_foreign_directory_gets_one_clear_line(tmp_path: Path):
    command = [sys.executable, ROOT / "tools" / "diagnose.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"diagnose.py: error: {tmp_path} is not a run directory: it has no run.json; ")
    assert not list(tmp_path.iterdir())


def test_links_out_of_the_run_directory_are_not_packed(tmp_path: Path):
    run_dir, secret = tmp_path / "run", tmp_path / "secret"
    secret.write_text('{"password": 1}')
    recipe = {"name": "tiny", "steps": 100, "batch_images": 8}
    write_json(run_dir / "run.json", {"format": "igpt_ds.run", "version": 1, "recipe": recipe, "world_size": 1})
    for name in ("a.log", "a.json", "train.jsonl"):
        (run_dir / name).symlink_to(secret)
    os.mkfifo(run_dir / "b.log")
    (run_dir / "c.log").write_text("words \x1b[2J")
    text = ask(run_dir)
    assert f"read            {run_dir / 'c.log'}" in text
    report = members(text)
    assert not any("password" in content for content in report.values())
    assert f"diagnosis/{str(run_dir / 'c.log').strip('/')}" in report
