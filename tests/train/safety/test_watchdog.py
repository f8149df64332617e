"""Heartbeats on disk. That a hung rank ends with its stacks is test_stops_launch.py's."""

from __future__ import annotations

import os
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from igpt_ds.cli import HUNG
from igpt_ds.json_files import read_json
from igpt_ds.train.heartbeat import signs
from igpt_ds.train.safety.watchdog import Watchdog, transferred_bytes

Tell = Callable[[Path, str], "subprocess.CompletedProcess[str]"]
LIMIT = 1.8  # seconds without a sign of life; a busy machine may hold up a process for one


def beat_of(run_dir: Path) -> dict[str, Any]:
    """Rank 0's heartbeat, of a node whose only rank it is."""
    (beat,) = read_json(run_dir / "heartbeat" / "node-00000.json", "heartbeat")["ranks"]
    return dict(beat)


def test_heartbeats_tell_what_a_rank_did_last(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, hang_minutes=0, every_seconds=0.1)
    file = tmp_path / "heartbeat" / "node-00000.json"
    file.parent.mkdir()
    (file.parent / "rank-00001.json").write_text("{}")  # of a time when there were more ranks
    watchdog.start()
    time.sleep(0.1)
    assert [path.name for path in file.parent.iterdir()] == ["rank-00001.json"]  # the directory may be another run's
    watchdog.settle()
    assert [path.name for path in file.parent.glob("*.json")] == ["node-00000.json"]
    first = beat_of(tmp_path)
    assert (first["step"], first["phase"], first["pid"]) == (0, "joining", os.getpid())
    watchdog.alive("step", 3, 0.25)
    watchdog.alive("save", 3)
    deadline = time.monotonic() + 600
    while beat_of(tmp_path)["phase"] != "save":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beat = beat_of(tmp_path)
    assert {name: beat[name] for name in ("step", "phase", "step_seconds")} == {"step": 3, "phase": "save", "step_seconds": 0.25}
    assert set(beat) == {"rank", "step", "phase", "time", "host", "pid", "step_seconds", "written"}
    assert beat["written"] >= beat["time"] >= first["time"]
    watchdog.close("stopped")
    watchdog.close("end", "too late")
    last = beat_of(tmp_path)
    assert (last["phase"], last["step"]) == ("stopped", 3)
    assert "error" not in last


def test_signs_of_life_keep_a_run_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's own: a machine that holds this process up for seconds would end it."""
    now = [0.0]
    monkeypatch.setattr("igpt_ds.train.safety.watchdog.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    watchdog = Watchdog(tmp_path, hang_minutes=LIMIT / 60, every_seconds=0.01)
    watchdog.start()
    for _ in range(10):
        now[0] += 0.6 * LIMIT
        time.sleep(0.02)
        watchdog.alive("step", 1)
    watchdog.close("end")
    assert not (tmp_path / "stacks" / "rank-0.txt").exists()


def test_a_short_limit_has_heartbeats_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank that waits for this one looks for a change. No time passes for the watchdog, so it ends nothing."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, time=time.time)
    monkeypatch.setattr("igpt_ds.train.safety.watchdog.time", clock)
    watchdog = Watchdog(tmp_path, hang_minutes=0.01)
    watchdog.start()
    watchdog.settle()
    start, first = time.monotonic(), beat_of(tmp_path)
    while beat_of(tmp_path) == first and time.monotonic() < start + 8:
        time.sleep(0.02)
    assert beat_of(tmp_path) != first
    watchdog.close("end")


STORY = f"""
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from igpt_ds import cli
from igpt_ds.train.safety.watchdog import Watchdog
run_dir = Path(sys.argv[1])

def main(argv):
    watchdog = Watchdog(run_dir, hang_minutes={LIMIT / 60}, every_seconds=0.05)
    watchdog.start()
"""


@pytest.fixture
def tell(launch: Any, tmp_path: Path) -> Tell:
    """tell(run_dir, story) runs a program whose watchdog gives up after LIMIT seconds."""

    def run(run_dir: Path, story: str) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "story.py"
        program.write_text(STORY + textwrap.indent(textwrap.dedent(story), "    ") + "\ncli.run(main, ranks=True)\n")
        return launch([program, run_dir])

    return run


def test_a_hang_before_the_run_directory_is_ours_leaves_its_stacks_on_stderr(tell: Tell, tmp_path: Path) -> None:
    done = tell(tmp_path / "run", "threading.Event().wait(30)")
    assert done.returncode == HUNG
    assert "no progress for 0.03 minutes in phase 'joining' after step 0" in done.stderr
    assert "in main" in done.stderr
    assert "rank 0 hangs in phase 'joining' after step 0: its stacks are above" in done.stderr
    assert not (tmp_path / "run").exists()


def test_reading_is_a_sign_of_life_while_loading_and_not_in_a_step(tell: Tell, tmp_path: Path) -> None:
    read = """
        watchdog.settle()
        watchdog.alive({phase!r}, 0)
        end = time.monotonic() + 4
        while time.monotonic() < end:
            (run_dir.parent / "large").read_bytes()
            time.sleep(0.02)
        watchdog.close("end")
    """
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    loading = tell(tmp_path / "run", read.format(phase="loading"))
    assert loading.returncode == 0, loading.stderr
    step = tell(tmp_path / "run", read.format(phase="step"))
    assert step.returncode == HUNG
    assert "in phase 'step'" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()


def test_a_rank_waits_for_one_that_lives_and_not_for_one_that_hangs(tell: Tell, tmp_path: Path) -> None:
    wait = """
        watchdog.settle()
        watchdog.alive("verifying", 0)
        until = time.time() + 4  # until then the other rank, with a clock of 2033
        while time.time() < until:
            write_heartbeats(run_dir, [Heartbeat(1, 0, "verifying", 2e9 + time.time() - until, "node2", 7, 0.0, 1.0)])
            time.sleep(0.05)
        print(until, flush=True)
        threading.Event().wait()
    """
    done = tell(tmp_path, "from igpt_ds.train.heartbeat import Heartbeat, write_heartbeats\n" + textwrap.dedent(wait))
    ended = time.time()
    assert done.returncode == HUNG, done.stderr
    assert ended > float(done.stdout) + LIMIT / 2


@pytest.mark.parametrize(
    ("story", "status", "error"),
    [
        ("raise cli.SharedError('no room')", 2, "no room"),
        (r"raise RuntimeError('a\n bug')", 1, "RuntimeError: a bug"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("", 0, None),
    ],
)
def test_the_last_heartbeat_tells_of_any_end(tell: Tell, tmp_path: Path, story: str, status: int, error: str | None) -> None:
    assert tell(tmp_path, f"watchdog.settle()\n{story}").returncode == status
    beat = beat_of(tmp_path)
    assert (beat["phase"], beat.get("error")) == ("end", error)


def test_a_system_that_does_not_count_bytes_gives_no_sign(tmp_path: Path) -> None:
    assert transferred_bytes(tmp_path) == 0
    assert signs(tmp_path) == {}
    assert transferred_bytes() > 0


def test_a_disk_that_takes_no_heartbeat_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heartbeat").touch()  # a file where the directory should be
    watchdog = Watchdog(tmp_path, hang_minutes=0)
    watchdog.start()
    watchdog.settle()
    watchdog.close("end")
    assert capsys.readouterr().err.count("heartbeat not written") == 2
