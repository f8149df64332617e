"""tools/sweep_lr.py over real runs: every rate by the paper's rule, a lost one cut short, nothing trained twice."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import STOPPED
from igpt_ds.json_files import read_json, write_json
from igpt_ds.train.sweep import run_name

TOOL = "tools/sweep_lr.py"
Command = Callable[..., list[str]]


def left_behind(run_dir: Path, val_loss: float | None) -> None:
    """A run that has ended, at its last step or by a spike."""
    run_dir.mkdir(parents=True)
    (run_dir / "train.jsonl").write_text(json.dumps({"step": 12, "val_loss": val_loss}) + "\n")
    if val_loss is None:
        write_json(run_dir / "LOST.json", {"step": 5})
    else:
        (run_dir / "FINISHED").touch()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no training command; after the flags write: -- deepspeed train.py --recipe NAME --data DIR"),
        (["--", "train.py", "--lr", "1"], "--lr is set by the search; leave it out of the training command"),
        (["--", "finetune.py", "--results", "x"], "--results would read the test split at every rate; leave it out"),
        (["--", "finetune.py", "--labels=40"], "--labels trains a run for each subset"),
        (["--", "finetune.py", "--out", "x"], "--out is set by the search; leave it out of the training command"),
        (["--", "train.py", "--run_dir=x"], "--run_dir=x is set by the search; leave it out"),
        (
            ["--", "train.py", "--train_split=train+val"],
            "--train_split train+val leaves no validation images to compare rates by",
        ),
        (["--array_index", "12", "--", "train.py"], "--array_index 12 must lie between 0 and 11"),
        (["--collect", "--", "train.py"], "--collect does not train; omit --array_index and the command"),
        (["--collect"], "is not finished, so there is nothing to collect"),
        (["--", "true", "train.py"], r"lr-0\.01 ended with status 0 before its last step; the cause is above"),
    ],
)
def test_what_does_not_go(launch: Any, tmp_path: Path, words: list[str], message: str) -> None:
    done = launch([TOOL, "--out", str(tmp_path / "sweep"), *words])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message.replace("\\", "") in line


@pytest.mark.parametrize(("code", "status"), [("sys.exit(86)", 86), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(247)", 247)])
def test_a_rate_that_fails_ends_with_the_status_of_its_run(launch: Any, tmp_path: Path, code: str, status: int) -> None:
    """Status 2 would say that the command is wrong, and a batch job with that is not tried again."""
    done = launch([TOOL, "--out", str(tmp_path / "sweep"), "--", sys.executable, "-c", f"import os, sys; {code}", "train.py"])
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("sweep_lr.py: error: the run of ")


SAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    os.write(1, b"saved\\n")  # a print inside a signal handler may meet a print that is under way
    sys.exit(85)
signal.signal(signal.SIGINT, save)
print("trains", flush=True)
time.sleep(60)
"""


def test_ctrl_c_gives_the_run_time_to_save(launch: Any, tmp_path: Path) -> None:
    words = [sys.executable, TOOL, "--out", str(tmp_path / "sweep"), "--", sys.executable, "-c", SAVES, "train.py"]
    process = launch.start(words)
    assert process.stdout.readline() == "trains\n"
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (STOPPED, "saved\n"), stderr


def test_collecting_what_there_is(launch: Any, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    for lr, loss in ((0.01, None), (0.003, 2.0), (0.001, 2.5), (0.0003, 1.0)):
        left_behind(out / run_name(lr), loss)
    done = launch([TOOL, "--out", str(out), "--collect"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == [
        "lr 0.01: lost at step 5",
        "lr 0.003: final validation loss 2.0000",
        "lr 0.001: final validation loss 2.5000",
    ]
    assert done.stdout.endswith("best: 0.003\n")
    found = read_json(out / "sweep.json", "sweep")
    assert (found["finished"], found["best_lr"], len(found["results"])) == (
        True,
        0.003,
        3,
    )  # what comes after the rise is not read
    assert "| **0.003** | **2.0000** |" in (out / "sweep.md").read_text()
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_stops_the_search_with_its_status(launch: Any, tmp_path: Path) -> None:
    done = launch([TOOL, "--out", str(tmp_path / "sweep"), "--", "bash", "-c", "exit 85", "train.py"])
    assert done.returncode == 85, done.stderr


@pytest.mark.slow
def test_the_search_over_real_runs(launch: Any, command: Command, tmp_path: Path) -> None:
    out, words = tmp_path / "sweep", command("unused", "--clip", "0", "--spike_patience", "2", "--warmup_steps", "0")
    del words[words.index("--run_dir") : words.index("--run_dir") + 2]
    left_behind(out / run_name(0.003), 9.0)  # so that two launches do: the loss falls to it, rises from it, or was lost before
    left_behind(out / run_name(0.001), 9.5)
    done = launch([TOOL, "--out", str(out), "--", "python", *words])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = read_json(out / "sweep.json", "sweep")
    assert found["best_lr"] == 0.01
    assert found["results"][0]["val_loss"] < 2.0
    assert len(found["results"]) == 2
    (out / "sweep.json").unlink()
    again = launch([TOOL, "--out", str(out), "--", "false", *words])  # every rate has ended: nothing is started
    assert again.returncode == 0, again.stderr
    assert read_json(out / "sweep.json", "sweep") == found
