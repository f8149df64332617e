"""One process writes at a time; who ends, however it ends, keeps nobody waiting and leaves nothing that stays."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from igpt_ds import files, locks
from igpt_ds.cli import FinishedError
from igpt_ds.files import atomic_dir, atomic_file, reserved, scratch_dir
from igpt_ds.locks import InUseError, lock_path, locked

HOLD = """
import pathlib, sys, time
from igpt_ds.files import reserved, scratch_dir
path = pathlib.Path(sys.argv[1])
with reserved(path, path.with_name("other")), scratch_dir(path) as partial:
    (partial / "a").write_text("half")
    if "end" in sys.argv:
        path.with_name("other").write_text("first")
    if "last" in sys.argv:
        path.mkdir()
        (path / "a").write_text("whole")
    print("held", flush=True)
    time.sleep(100)
"""


def hold(path: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which writes tmp_path/out."""
    process = hold(tmp_path / "out")
    yield process
    kill(process)


def test_a_second_writer_is_told_who_writes_and_the_first_is_left_alone(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    who = rf"{tmp_path}/out is being written by {re.escape(socket.gethostname())} \(pid {other.pid}\); wait until"
    with pytest.raises(InUseError, match=who), atomic_dir(tmp_path / "out"):
        pass
    assert [path.read_text() for path in tmp_path.glob(".out.*.partial/a")] == ["half"]
    (tmp_path / ".out.json.0123456789ab.partial").touch()  # of another file, which somebody writes now
    kill(other)
    with atomic_dir(tmp_path / "out") as partial:
        (partial / "a").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.json.0123456789ab.partial", "out"]


def test_a_waiting_writer_gets_the_lock_when_the_first_is_killed(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    os.kill(other.pid, signal.SIGKILL)
    with locked(tmp_path / "out", wait=60) as lock:
        assert lock.held


def test_the_same_command_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["-c", str(path), "end"])
    kill(hold(path, "end"))  # the first of two names is there
    with reserved(path, tmp_path / "other"):
        assert not (tmp_path / "other").exists()
        assert not list(tmp_path.glob("*.partial"))
    kill(hold(path, "end"))
    monkeypatch.setattr(sys, "argv", ["-c", str(path), "another"])
    with pytest.raises(ValueError, match="other exists already; choose"), reserved(path, tmp_path / "other"):
        pass
    (tmp_path / "other").unlink()
    monkeypatch.setattr(sys, "argv", ["-c", str(path), "end", "last"])
    kill(hold(path, "end", "last"))  # both are
    with pytest.raises(FinishedError, match="out: finished by an earlier run of this command"), reserved(path):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out"]
    with pytest.raises(ValueError, match="out exists already"), reserved(path):  # made by nobody who was killed
        pass


def test_what_is_no_lock_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    for make in (lambda at: at.symlink_to(tmp_path / "target"), os.mkfifo, lambda at: at.hardlink_to(tmp_path / "target")):
        at = lock_path(tmp_path / "out")
        make(at)
        with pytest.raises(ValueError, match=r"\.out\.lock is not a plain file"), locked(tmp_path / "out"):
            pass
        at.unlink()
    lock_path(tmp_path / "out").write_text("somebody's notes")
    with locked(tmp_path / "out"):
        assert lock_path(tmp_path / "out").read_text() == "somebody's notes"
    assert (tmp_path / "target").read_text() == "mine"


def test_holders_that_share_and_the_last_removes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "out", shared=True):
        monkeypatch.setattr(locks, "_mine", {})  # as another process would see it
        with locked(tmp_path / "out", shared=True):
            pass
        with pytest.raises(InUseError), locked(tmp_path / "out"):
            pass
        assert lock_path(tmp_path / "out").exists()
        monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_refuses_nobody_and_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".out.0123456789ab.partial").mkdir()
    with locked(tmp_path / "out") as lock:
        assert not lock.held
    with atomic_dir(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.0123456789ab.partial").exists()


def test_files_of_killed_writers_go_and_those_of_live_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".a.json.0123456789ab.partial").write_text("killed")
    with atomic_file(tmp_path / "a.json") as file:
        file.write(b"first")
        monkeypatch.setattr(files, "_swept", set())  # as another process
        with atomic_file(tmp_path / "a.json") as second:
            second.write(b"second")
            assert len(list(tmp_path.glob(".a.json.*.partial"))) == 2
    assert (tmp_path / "a.json").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_scratch_directory_goes_with_its_block(tmp_path: Path) -> None:
    with scratch_dir(tmp_path / "new" / "out") as scratch:
        assert scratch.parent == tmp_path / "new"
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"a")
        with atomic_dir(tmp_path / "d") as partial:
            (partial / "a").write_text("a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == (tmp_path / "d" / "a").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_full_disk_names_the_lock_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"\.rows\.lock"), locked(tmp_path / "rows"):
        pass
    assert list(tmp_path.iterdir()) == []
