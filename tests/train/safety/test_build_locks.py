"""A build's lock: waited for while somebody builds, removed once nobody does."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from igpt_ds.train.safety.build_locks import wait_for_builds


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch would put the lock of a build."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "cpu_adam" / "lock"


def test_without_a_lock_nothing_is_said(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for_builds()
    assert capsys.readouterr().out == ""


def test_a_lock_that_a_killed_build_left_is_removed(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock.touch()
    wait_for_builds(0.2)
    assert not lock.exists()
    assert f"removed {lock}" in capsys.readouterr().out


def test_a_lock_that_a_process_holds_is_waited_for(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = lock.open("w")
    began = time.monotonic()

    def release() -> None:
        held.close()
        lock.unlink()

    timer = threading.Timer(1.0, release)
    timer.start()
    wait_for_builds(0.1)
    timer.join()
    assert time.monotonic() - began >= 1.0
    assert f"under {lock}" in (out := capsys.readouterr().out)
    assert "removed" not in out


def test_a_build_on_another_node_is_seen_by_its_files(lock: Path) -> None:
    lock.touch()
    began = time.monotonic()

    def build() -> None:
        for number in range(10):
            (lock.parent / f"{number}.o").touch()
            time.sleep(0.1)
        lock.unlink()

    builder = threading.Thread(target=build)
    builder.start()
    wait_for_builds(0.6)
    builder.join()
    assert time.monotonic() - began >= 1.0


def test_only_the_first_rank_of_a_node_waits(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    wait_for_builds(0.1)
    assert lock.exists()
