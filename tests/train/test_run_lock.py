"""A run directory is taken once; what a killed run left does not keep the next one waiting for long."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.locks import try_lock
from igpt_ds.train import run_lock
from igpt_ds.train.run_lock import take

HOLD = """
import sys, time, pathlib
from igpt_ds.train.run_lock import take
take(pathlib.Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(100)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in which the run directory is taken."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def free(tmp_path: Path) -> Iterator[None]:
    """Lets go of what the test took, which a program does by ending."""
    yield
    if lock := run_lock._locks.pop(tmp_path.resolve(), None):
        os.close(lock)


def beat(where: Path, pid: int, rank: int = 0, age: float = 0.0, **changes: Any) -> None:
    """A heartbeat, as train/heartbeat.py writes it."""
    now = time.time()
    usual = {"step": 7, "phase": "step", "time": now - age - 5, "written": now - age, "host": socket.gethostname(), "pid": pid}
    (where / "heartbeat").mkdir(exist_ok=True)
    path = where / "heartbeat" / f"rank-{rank:05d}.json"
    path.with_suffix(".new").write_text(json.dumps(usual | changes))
    path.with_suffix(".new").rename(path)


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    host = re.escape(socket.gethostname())
    with pytest.raises(ValueError, match=rf"rank 0 on {host} \(pid {other.pid}\) holds .*/lock; .*choose another --run_dir"):
        take(tmp_path, dying=0.1)
    beat(tmp_path, other.pid, age=3.2)
    with pytest.raises(ValueError, match=rf"rank 0 on {host} \(pid {other.pid}\) wrote 3 s ago; .*choose another --run_dir"):
        take(tmp_path, dying=0.1)
    threading.Timer(0.3, other.kill).start()
    take(tmp_path, dying=30)  # once it is dead, at once
    take(tmp_path)  # ours already
    assert (tmp_path / "lock").read_text() == f"{socket.gethostname()} (pid {os.getpid()})\n"


def test_the_start_that_owns_the_run_is_not_kept_waiting(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    beat(tmp_path, other.pid)
    take(tmp_path, owned=True, young=100, dying=100)


def test_a_lock_that_this_disk_does_not_know_is_left_to_the_heartbeats(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_PATH)  # what flock refuses as it refuses such a disk
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert try_lock(descriptor) is None
    os.close(descriptor)


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # killed
        {"host": "elsewhere", "age": 31},
        {"host": "elsewhere", "phase": "end"},
        {"phase": "stopped", "pid": os.getppid()},
        {"pid": os.getpid()},
        {"pid": "x"},
    ],
)
def test_what_is_no_run_at_work_does_not_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    beat(tmp_path, **({"pid": 1} | changes))
    (tmp_path / "heartbeat" / "rank-00001.json").write_text("{")
    take(tmp_path, young=0.3, dying=100)


def test_a_process_of_this_machine_that_lives_is_refused(tmp_path: Path) -> None:
    beat(tmp_path, os.getppid(), rank=3)
    with pytest.raises(ValueError, match=rf"rank 3 on .* \(pid {os.getppid()}\) wrote \d s ago"):
        take(tmp_path, dying=0.1)


def test_another_machine_is_refused_when_its_heartbeat_moves_and_not_when_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(tmp_path, 77, host="elsewhere")
    threading.Timer(0.3, beat, (tmp_path, 77), {"host": "elsewhere"}).start()
    with pytest.raises(ValueError, match=r"rank 0 on elsewhere \(pid 77\) wrote \d s ago"):
        take(tmp_path, young=30)
    assert "rank 0 on elsewhere (pid 77) wrote 0 s ago; waiting up to 30 s to see whether it changes" in capsys.readouterr().out
    start = time.monotonic()
    take(tmp_path, young=0.6)
    assert time.monotonic() - start < 100


def test_a_clock_that_is_ahead_is_not_waited_for(tmp_path: Path) -> None:
    beat(tmp_path, 77, host="elsewhere", age=-1000)
    start = time.monotonic()
    take(tmp_path, young=0.3)
    assert time.monotonic() - start < 100


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("chapter 1\n")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(ValueError, match=r"/lock is not a plain file, so it cannot be a lock; remove it"):
        take(tmp_path)
    assert (tmp_path / "thesis").read_text() == "chapter 1\n"


@pytest.mark.parametrize("age", [-7200.0, 7200.0])
def test_a_live_run_whose_clock_is_wrong_is_refused(tmp_path: Path, age: float) -> None:
    beat(tmp_path, 77, host="elsewhere", age=age)
    threading.Timer(0.3, beat, (tmp_path, 77), {"host": "elsewhere", "age": age}).start()
    with pytest.raises(ValueError, match=r"rank 0 on elsewhere \(pid 77\)"):
        take(tmp_path, young=30)


@pytest.mark.parametrize("kind", ["symbolic", "hard", "fifo"])
def test_a_lock_that_leads_to_another_file_does_not_touch_it(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    if kind == "fifo":
        os.mkfifo(tmp_path / "lock")
    elif kind == "hard":
        (tmp_path / "lock").hardlink_to(victim)
    else:
        (tmp_path / "lock").symlink_to(victim)
    with contextlib.suppress(OSError, ValueError):
        take(tmp_path)
    assert victim.read_text() == "mine"
