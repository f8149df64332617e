"""Real launches whose disks and processes fail while a checkpoint is saved: what was whole stays whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from igpt_ds.files import sha256_file
from igpt_ds.json_files import read_json_lines, seal
from igpt_ds.train.checkpoint.directory import list_checkpoints
from igpt_ds.train.checkpoint.manifest import read_checkpoint
from igpt_ds.train.heartbeat import all_heartbeats

pytestmark = pytest.mark.slow
Command = Callable[..., list[str]]
Curves = Callable[[str], list[dict[str, Any]]]


def process_of_rank(rank: int, launched: Any) -> int:
    """Its number. DeepSpeed's launcher gives each rank a flag, ranks.py a name and its own session."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                named = process.name() == f"rank{rank}" or f"--local_rank={rank}" in process.cmdline()
                if named and os.getsid(process.pid) == launched.pid:
                    return process.pid
        time.sleep(0.05)
    pytest.fail(f"rank {rank} never started")


def stop_during_save(process: subprocess.Popen[str], pid: int, run_dir: Path, after: str = "") -> None:
    """Returns with the process halted in the middle of saving a checkpoint, once one later than `after` is whole."""
    checkpoints, deadline = run_dir / "checkpoints", time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        complete = [path.parent.name for path in checkpoints.glob("step-*/COMPLETE") if path.parent.suffix != ".partial"]
        if max(complete, default="") <= after or not list(checkpoints.glob("*.partial/*.pt")):
            time.sleep(0.0005)
            continue
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        if [path for path in checkpoints.glob("*.partial/*.pt") if not (path.parent / "COMPLETE").exists()]:
            return
        os.kill(pid, signal.SIGCONT)
    pytest.fail("no save was met half way")


def test_kill_9_of_one_rank_and_of_all_during_save_then_resume_equals_never_stopping(
    launch: Any, command: Command, curves: Curves, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = command("run", "--save_every", "1", "--keep_last", "2")
    checkpoints = tmp_path / "run" / "checkpoints"
    process = launch.start(words, ranks=2, by="deepspeed")
    victim = process_of_rank(1, process)
    stop_during_save(process, victim, tmp_path / "run")
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode != 0
    refuse_nothing_but_leftovers(checkpoints)

    process = launch.start([*words, "--resume", "auto"], ranks=2)
    victim = process_of_rank(1, process)
    stop_during_save(process, victim, tmp_path / "run", after=list_checkpoints(checkpoints)[-1].name)
    launch.end()  # SIGKILL for the launcher and both ranks
    refuse_nothing_but_leftovers(checkpoints)

    done = launch([*words, "--resume", "auto"], ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row for row in curves("run") if "loss" in row] == [row for row in whole if "loss" in row]
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000011", "step-00000012"]


def refuse_nothing_but_leftovers(checkpoints: Path) -> None:
    """A half-written checkpoint is there, and is not among those that count, which are whole."""
    assert list(checkpoints.glob("*.partial"))
    assert not (checkpoints.parent / "FINISHED").exists()
    assert list_checkpoints(checkpoints)
    for path in list_checkpoints(checkpoints):
        read_checkpoint(path)


def test_a_full_disk_of_one_rank_stops_all_and_leaves_the_checkpoint_before(
    launch: Any,
    command: Command,
    with_fault: Callable[[list[str], str], list[str]],
    curves: Curves,
    whole: list[dict[str, Any]],
    whole_dir: Path,
    tmp_path: Path,
) -> None:
    """Rank 1 may write no file above 4 KiB, which is less than its part of a checkpoint. It writes beside the next steps.

    Then rank 1 copies its state so slowly that its updates have to wait, and the files are those of the moment of the save.
    """
    done = launch(command("run", "--stop_at_step", "4"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    words = command("run", "--resume", "auto")
    script = f'[ "$RANK" = 1 ] && ulimit -f 4; exec "{sys.executable}" "$@"'
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    failed = launch([*launcher, "bash", "-c", script, "rank", *words])
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("train.py: error")]
    assert len(said) == 1, failed.stderr[-3000:]
    assert "step-00000008 could not be saved: on rank 1" in said[0]
    assert "File too large; raise the limit" in said[0]
    assert "the previous checkpoint is unchanged; --resume auto continues" in said[0]
    assert "exitcode  : 2" in failed.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]

    done = launch(with_fault(words, "garbage=100"), ranks=2, env={"IGPT_DS_TEST_SLOW": "copy,1,0.3"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert curves("run") == whole
    written, beside = (sorted((path / "checkpoints" / "step-00000008").iterdir()) for path in (whole_dir, tmp_path / "run"))
    assert [path.name for path in beside] == [path.name for path in written]
    assert [path.read_bytes() for path in beside] == [path.read_bytes() for path in written]  # --save async is the default


def test_missing_and_changed_files_then_another_number_of_ranks(
    launch: Any,
    command: Command,
    with_fault: Callable[[list[str], str], list[str]],
    curves: Curves,
    whole: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The newest checkpoint lacks a file, the one before has a flipped bit; from the one before that, 3 ranks end where 2 do.

    Messages between neighbours are slow at rank 1, which the ranks find out together.
    """
    done = launch(command("run", "--save_every", "2", "--stop_at_step", "6", "--keep_last", "5"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoints = tmp_path / "run" / "checkpoints"
    missing = next((checkpoints / "step-00000006").glob("*pp_rank_1_*optim_states.pt"))
    missing.unlink()
    changed = next((checkpoints / "step-00000004").glob("*pp_rank_1_*optim_states.pt"))
    content = bytearray(changed.read_bytes())
    content[-1000] ^= 4
    changed.write_bytes(content)

    words = with_fault(command("run", "--resume", "auto", "--keep_last", "5"), "garbage=100")
    done = launch(words, ranks=3, env={"IGPT_DS_TEST_SLOW": "network,1,0.2"})
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = [beat.pace.link for beat in all_heartbeats(tmp_path / "run").values() if beat.pace and beat.pace.link]
    assert [second >= 0.2 for second in seconds] == [False, True, False], "0 and 2 are fast with each other"
    assert f"checkpoint skipped: {missing} is missing" in done.stderr
    assert f"checkpoint skipped: {changed} is damaged (sha256 differs)" in done.stderr
    assert "step-00000002 of 2 ranks was resharded for 3" in done.stdout
    assert "2 steps, 24 images" in done.stdout
    losses = [row["loss"] for row in read_json_lines(tmp_path / "run" / "train.jsonl") if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in whole if "loss" in row], abs=1e-6)
    names = sorted(path.name for path in checkpoints.iterdir())
    expected = [
        "step-00000002",
        "step-00000004",
        "step-00000004.broken",
        "step-00000006.broken",
        "step-00000008",
        "step-00000012",
    ]
    assert names == expected

    shutil.rmtree(checkpoints / "step-00000012")
    (tmp_path / "run" / "FINISHED").unlink()
    forge(checkpoints / "step-00000008", tmp_path / "ran")
    done = launch(command("run", "--resume", "auto", "--keep_last", "5"), ranks=3)
    assert done.returncode == 2, done.stderr[-3000:]
    assert len([line for line in done.stderr.splitlines() if "error: " in line and "posix.system" in line]) == 1
    assert not (tmp_path / "ran").exists()


def forge(checkpoint: Path, made: Path) -> None:
    """Puts a command that makes a file into a checkpoint's newest file, and its sha256 into the manifest, as a stranger could."""

    class Bomb:
        def __reduce__(self) -> object:
            return (os.system, (f"touch {made}",))

    victim = sorted(checkpoint.glob("*model_states.pt"))[-1]
    torch.save(torch.load(victim, weights_only=False) | {"bomb": Bomb()}, victim)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["name"] == victim.name:
            entry.update(bytes=victim.stat().st_size, sha256=sha256_file(victim))
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    (checkpoint / "COMPLETE").write_text("4 files\n")  # as older code left it


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(launch: Any, command: Command, tmp_path: Path) -> None:
    """A file system of 256 KiB, where this machine lets us make one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        done = launch(command("small/run"))
        assert done.returncode == 2
        assert done.stderr.count("train.py: error: ") == 1
        assert "room for 3 checkpoints needs" in done.stderr
        assert "lower --keep_last, or put --run_dir on another disk" in done.stderr
        assert not list((small / "run").glob("checkpoints/*"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_two_runs_in_one_place_and_a_run_without_a_usable_checkpoint(
    launch: Any, command: Command, curves: Curves, tmp_path: Path
) -> None:
    """Neither the run at work nor what is left of one is touched: one line, status 2."""
    run = tmp_path / "run"
    words = command("run", "--stop_at_step", "8", "--resume", "auto")
    first = launch.start(words)
    deadline = time.monotonic() + 600
    while not (run / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGSTOP)
    refused = launch.start(words)
    refusal = refused.communicate(timeout=600)[1]
    error = [line for line in refusal.splitlines() if line.startswith("train.py: error")]
    os.kill(first.pid, signal.SIGCONT)
    assert refused.returncode == 2, refusal[-3000:]
    assert len(error) == 1
    assert "is in use: rank 0 on" in error[0]
    assert f"(pid {first.pid})" in error[0]
    assert error[0].endswith("or choose another --run_dir")
    said = first.communicate(timeout=600)[1]
    assert first.returncode == 0, said[-3000:]

    rows = curves("run")
    for path in list_checkpoints(run / "checkpoints"):
        os.truncate(next(path.glob("*optim_states.pt")), 1000)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008"]
    done = launch(words)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]
    assert len(error) == 1
    assert error[0].count("has 1000 bytes instead of") == 2
    assert "nothing was changed" in error[0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert curves("run") == rows
