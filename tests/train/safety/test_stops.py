"""Who may stop a run, on one rank."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds.cli import STOPPED
from igpt_ds.train.safety.stops import REASONS, Stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """USR1 ignored, as a launcher under SLURM has it; afterwards as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_library_meets_no_interrupted_call(tmp_path: Path) -> None:
    """A read in C, as of a library's socket, continues after a signal that came in its middle."""
    stop, (reader, writer) = Stop(tmp_path), os.pipe()
    stop.listen()
    sender = (
        "import os, sys, time; time.sleep(0.2); os.kill(int(sys.argv[1]), 10); time.sleep(0.2); os.write(int(sys.argv[2]), b'x')"
    )
    words = [sys.executable, "-S", "-c", sender, str(os.getpid()), str(writer)]
    process, place = subprocess.Popen(words, pass_fds=[writer]), ctypes.create_string_buffer(1)
    assert ctypes.CDLL(None).read(reader, place, 1) == 1
    assert process.wait(timeout=60) == 0
    assert stop.now()
    assert stop.reason == REASONS[0]


def test_a_handler_that_a_library_installs_lasts_one_step(tmp_path: Path) -> None:
    stop = Stop(tmp_path)
    stop.listen()
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(signal.SIGUSR1, ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p))  # past Python, as a library in C would
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not stop.now()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.now()
    assert stop.reason == REASONS[0]


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGUSR1, REASONS[0]), (signal.SIGTERM, REASONS[1]), (signal.SIGINT, REASONS[4])]
)
def test_a_signal_is_heard_once_and_for_all(tmp_path: Path, number: signal.Signals, reason: str) -> None:
    stop = Stop(tmp_path)
    stop.listen()
    assert not stop.now()
    for _ in range(2):
        os.kill(os.getpid(), number)
    assert stop.reason == ""  # not before the ranks agree
    assert stop.now()
    assert stop.reason == reason


def test_a_launchers_term_after_ctrl_c_is_still_ctrl_c(tmp_path: Path) -> None:
    stop = Stop(tmp_path)
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.now()
    assert stop.reason == "Ctrl-C"


WAITS = """
import ctypes, sys
from pathlib import Path
from igpt_ds.cli import STOPPED
from igpt_ds.train.safety.stops import Stop
stop = Stop(Path(sys.argv[1]))
stop.listen()
stop.meeting = sys.argv[2] == "meeting"
print("listens", flush=True)
while True:
    ctypes.CDLL(None).sleep(60)  # as in a collective, where Python runs no handler
"""


@pytest.mark.parametrize(
    ("state", "numbers", "status"),
    [
        ("trains", [signal.SIGINT, signal.SIGINT], 130),
        ("meeting", [signal.SIGINT], STOPPED),
        ("meeting", [signal.SIGTERM], STOPPED),
    ],
)
def test_who_waits_in_a_library_ends_at_once(launch: Any, state: str, numbers: list[int], status: int, tmp_path: Path) -> None:
    process = launch.start([sys.executable, "-c", WAITS, tmp_path, state])
    assert process.stdout.readline() == "listens\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(1.2 * (len(numbers) > 1))
    assert process.wait(timeout=60) == status


def test_the_loss_comes_back_with_the_answer(tmp_path: Path) -> None:
    stop = Stop(tmp_path)
    assert stop.agree(torch.tensor(2.5, requires_grad=True)) == 2.5
    assert stop.reason == ""
    (tmp_path / "STOP").touch()
    stop._next_look = 0.0
    assert stop.agree(torch.tensor(2.25)) == 2.25
    assert stop.reason == REASONS[2]
    assert (tmp_path / "STOP").exists()  # it stays until the next start, and that removes it
    assert not Stop(tmp_path).now()
    assert not (tmp_path / "STOP").exists()


def test_a_stop_of_before_goes_once_the_run_is_ours(tmp_path: Path) -> None:
    file = tmp_path / "STOP"
    file.touch()
    Stop(tmp_path)  # a start that is refused never asks
    assert file.exists()
    stop = Stop(tmp_path)
    os.utime(file, (1, 1))  # touched again since: for us
    assert stop.now()
    assert file.exists()


def test_a_time_limit(tmp_path: Path) -> None:
    assert not Stop(tmp_path, max_minutes=1).now()
    stop = Stop(tmp_path, max_minutes=0)
    assert stop.now()
    assert stop.reason == "--max_minutes"


def test_a_run_directory_that_is_a_file_is_refused_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match=r"--run_dir .*/file is a file; choose a directory or a new name"):
            Stop(tmp_path / "file")
