"""The status of runs: of a real one, of one that is being written, and of what is no run."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.console import duration
from igpt_ds.json_files import write_json, write_json_lines
from igpt_ds.ops import status
from igpt_ds.ops.rank_status import RankStatus
from igpt_ds.ops.status_text import heartbeats_line, status_text
from igpt_ds.train.heartbeat import Heartbeat
from igpt_ds.train.ledger.tail import tail_rows

ROOT = Path(__file__).parents[2]
NOW = 1_000_000.0
FIX = "name the --run_dir of a train.py that has started training\n"
RECIPE = {"name": "tiny", "steps": 100, "batch_images": 8}


def row(step: int) -> dict[str, Any]:
    speeds = {"images_per_s": 40.0 + step % 3, "mfu": 0.25, "data_wait": 0.02, "skipped_steps": 1}
    return {"step": step, "images_seen": 8 * step, "loss": 3 - 0.01 * step} | speeds | {"slowest_rank": 1, "slowest_ratio": 1.5}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two ranks that wrote step 20 of 100 three seconds before NOW."""
    where = tmp_path / "run"
    write_json(where / "run.json", {"format": "igpt_ds.run", "version": 1, "recipe": RECIPE, "world_size": 2})
    validation = {"step": 10, "images_seen": 80, "val_loss": 2.95}
    write_json_lines(where / "train.jsonl", [*(row(step) for step in range(1, 11)), validation, *(row(s) for s in range(11, 21))])
    for name in ("step-00000010", "step-00000016", "step-00000020.partial"):
        (where / "checkpoints" / name).mkdir(parents=True)
        (where / "checkpoints" / name / "COMPLETE").touch()
    os.utime(where / "checkpoints" / "step-00000016" / "COMPLETE", (NOW - 200, NOW - 200))
    (where / "tensorboard").mkdir()
    for start in range(3):
        (where / "tensorboard" / f"events.out.tfevents.{start}").touch()
    for rank in range(2):
        beat(where, rank)
    return where


def beat(where: Path, rank: int, **changes: Any) -> None:
    """Writes a heartbeat: of a second ago, by a process that does not exist."""
    usual = {"step": 20, "phase": "step", "time": NOW - 3, "host": "node1", "pid": 2**22 + 1, "step_seconds": 0.2}
    (where / "heartbeat").mkdir(exist_ok=True)
    new = where / f"rank-{rank:05d}.new"
    new.write_text(json.dumps(usual | {"written": NOW - 1} | changes))
    new.rename(where / "heartbeat" / f"rank-{rank:05d}.json")


def test_a_newer_state_in_the_fast_directory_is_told(run_dir: Path):
    saves = [{"event": "save", "step": step, "fast": fast, "images_seen": 8 * step} for step, fast in ((16, False), (18, True))]
    write_json_lines(run_dir / "restarts.jsonl", saves)
    assert status.read_status(run_dir, NOW).fast_step is None  # it may not be complete
    write_json_lines(run_dir / "restarts.jsonl", [*saves, {"event": "save", "step": 20, "fast": True, "images_seen": 160}])
    found = status.read_status(run_dir, NOW)
    assert found.fast_step == 18
    assert "  checkpoint  step 16, 3 min 20 s old, and step 18 in --fast_dir; " in status_text(found)
    (run_dir / "FINISHED").touch()
    assert status.read_status(run_dir, NOW).fast_step is None  # it was removed


def test_everything_that_is_known(run_dir: Path):
    found = status.read_status(run_dir, NOW)
    speed = 41.0
    expected = {"state": "running", "step": 20, "steps": 100, "images_seen": 160, "val_loss": 2.95, "val_step": 10}
    expected |= {"images_per_s": speed, "mfu": 0.25, "seconds_left": 80 * 8 / speed, "restarts": 2, "rollbacks": 0}
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.checkpoint.age) == (16, 200)
    assert found.slowest == status.SlowRank(1, 1.5)
    assert [(rank.age, rank.silent) for rank in found.ranks] == [(3, False), (3, False)]
    text = status_text(found)
    assert "run: running, tiny on 2 ranks on node1\n" in text
    assert "  step        20 of 100 (20.0 %), 160 images\n" in text
    assert "  loss        2.8000 nats/token; validation 2.9500 at step 10\n" in text
    assert "  speed       41.0 images/s, MFU 25.0%, waiting for data 2.0%\n" in text
    assert "  checkpoint  step 16, 3 min 20 s old; 2 restarts, 0 rollbacks, 1 skipped step\n" in text
    assert "  end         in 16 s, 1970-01-" in text
    assert text.endswith("  heartbeats  0: 3 s (step 20), 1: 3 s (step 20)")


def test_slow_ranks_with_their_reasons(run_dir: Path):
    paces = [{"data": 0.0, "device": 0.2, "wait": 0.4}, {"data": 0.3, "device": 0.2, "wait": 0.1}, {"data": "?"}]
    for rank, pace in enumerate(paces):
        beat(run_dir, rank, pace=pace, host=f"node{rank}")
    found = status.read_status(run_dir, NOW)
    text = status_text(found)
    assert (
        "  a step      0.2 s computing, 0 s waiting for data, 0.25 s for other ranks (the network takes 0.1 s of them)\n" in text
    )
    assert "  slowest     rank 1 on node1, 2.00 times the median (data: waits for data 0.3 s a step, median 0)\n" in text
    told = json.loads(json.dumps(found.to_dict()))
    assert told["slowest"] == {
        "rank": 1,
        "ratio": pytest.approx(2),
        "reason": "data",
        "seconds": 0.3,
        "median": 0,
        "host": "node1",
    }
    assert [rank["pace"] for rank in told["ranks"]] == paces[:2]


def test_the_json_of_a_status(run_dir: Path):
    (run_dir / "heartbeat" / "rank-00001.json").unlink()
    found = status.read_status(run_dir, NOW).to_dict()
    beat = {"rank": 0, "step": 20, "phase": "step", "time": NOW - 3, "host": "node1", "pid": 2**22 + 1, "step_seconds": 0.2}
    beat |= {"written": NOW - 1, "age": 3.0, "silent": False}
    none = {"rank": 1, "phase": None, "step": 0, "age": None, "silent": True, "host": None, "pid": None}
    assert found["ranks"] == [beat, none]
    saved = {"step": 16, "age": 200.0, "path": str(run_dir / "checkpoints" / "step-00000016")}
    expected = {"run_dir": str(run_dir), "recipe": "tiny", "state": "running", "why": None, "step": 20, "steps": 100}
    expected |= {"images_seen": 160, "loss": 2.8, "val_loss": 2.95, "val_step": 10, "images_per_s": 41.0, "mfu": 0.25}
    expected |= {"data_wait": 0.02, "skipped_steps": 1, "seconds_left": 640 / 41, "checkpoint": saved}
    expected |= {
        "fast_step": None,
        "restarts": 2,
        "rollbacks": 0,
        "slowest": {"rank": 1, "ratio": 1.5},
        "world_size": 2,
        "ranks": [beat, none],
        "time": NOW,
    }
    assert json.dumps(found) == json.dumps(expected)


def test_a_line_that_is_being_written_and_a_long_file(run_dir: Path):
    with open(run_dir / "train.jsonl", "a") as file:
        file.write('{"step": 21, "loss": 2.7, "images_per_s": 4')
    assert status.read_status(run_dir, NOW).step == 20
    rows = tail_rows(run_dir / "train.jsonl", status.CurveRow, size=500)
    assert [found.step for found in rows] == [19, 20]
    assert tail_rows(run_dir / "none.jsonl", status.CurveRow) == []


@pytest.mark.parametrize(
    ("prepare", "state"),
    [
        (lambda where: (where / "FINISHED").touch(), "finished"),
        (lambda where: (where / "STOP").touch(), "stopping"),
        (lambda where: [beat(where, rank, phase="stopped") for rank in (0, 1)], "stopped"),
        (lambda where: [beat(where, rank, phase="end", written=NOW - 9999) for rank in (0, 1)], "stopped"),
        (lambda where: [beat(where, rank, written=NOW - 61) for rank in (0, 1)], "dead"),
        (lambda where: beat(where, 1, written=NOW - 61), "hanging"),
        (lambda where: [beat(where, rank, time=NOW - 121) for rank in (0, 1)], "hanging"),
        (lambda where: [beat(where, rank, time=NOW - 121, step_seconds=10.0) for rank in (0, 1)], "running"),
        (lambda where: [beat(where, rank, time=NOW - 121, phase="start") for rank in (0, 1)], "running"),
        (lambda where: shutil.rmtree(where / "heartbeat"), "unknown"),
        (lambda where: [(where / "LOST.json").touch(), shutil.rmtree(where / "heartbeat")], "lost"),
        (lambda where: write_json(where / "LOST.json", {"time": NOW - 2}), "lost"),  # its ranks are about to end
        (lambda where: write_json(where / "LOST.json", {"time": NOW - 4}), "running"),  # the start after it
        (lambda where: [beat(where, rank, time=NOW - 121, phase="loading") for rank in (0, 1)], "running"),
        (lambda where: [beat(where, 0, phase="end"), beat(where, 1, phase="end", error="no room")], "failed"),
    ],
)
def test_states(run_dir: Path, prepare: Callable[[Path], Any], state: str):
    prepare(run_dir)
    assert status.read_status(run_dir, NOW).state == state


def test_a_run_that_ended_badly_says_why_and_has_no_end_to_wait_for(run_dir: Path):
    lost = {"step": 23, "since": 21, "loss": 4.5, "lr": 3.0, "why": "it was above 3.3 for 3 steps in a row", "time": NOW}
    write_json(run_dir / "LOST.json", lost)
    found = status.read_status(run_dir, NOW)
    assert (found.state, found.seconds_left) == ("lost", None)
    words = "the loss diverged at step 23: it is 4.5000, and it was above 3.3 for 3 steps in a row"
    assert f"  end         {words}\n" in status_text(found)
    assert "it is not finite, and it was" in status.lost_words(status.DivergedRun(23, None, "it was above 3.3"))
    (run_dir / "LOST.json").unlink()
    for rank in (0, 1):
        beat(run_dir, rank, phase="end", error="no room")
    assert "  end         rank 0: no room\n" in status_text(status.read_status(run_dir, NOW))


def test_restarts_are_those_of_the_batch_script_where_it_counts_more(run_dir: Path):
    rows = [{"event": event} for event in ("start", "end", "start", "start", "end", "start", "start")]
    write_json_lines(run_dir / "restarts.jsonl", rows)
    assert status.read_status(run_dir, NOW).restarts == 4
    (run_dir / "restarts.jsonl").write_text("no JSON\n{}\n")
    write_json(run_dir / "rollbacks.json", {"rollbacks": [{}, {}]})
    found = status.read_status(run_dir, NOW)
    assert (found.restarts, found.rollbacks) == (2, 2)


def test_a_rank_without_a_heartbeat_or_with_a_torn_one(run_dir: Path):
    (run_dir / "heartbeat" / "rank-00000.json").write_text('{"step": 3')
    (run_dir / "heartbeat" / "rank-00007.json").write_text("{}")  # of a start with more ranks
    found = status.read_status(run_dir, NOW)
    assert [rank.beat and rank.beat.phase for rank in found.ranks] == [None, "step"]
    assert status_text(found).endswith("  heartbeats  0: none, 1: 3 s (step 20)")


def test_a_killed_rank_of_this_machine_is_silent_soon():
    with subprocess.Popen(["true"]) as process:
        process.wait(60)

    def silent(host: str, age: float) -> bool:
        beat = Heartbeat(0, 5, "step", NOW - age, host, process.pid, 0.2, NOW - age)
        return RankStatus(0, beat, NOW).silent

    assert silent(socket.gethostname(), 16)
    assert not silent(socket.gethostname(), 14)  # another machine of the same name may have written it
    assert not silent("another-machine", 16)


def test_of_many_ranks_the_oldest_are_shown():
    written = [NOW - 61 if rank == 0 else NOW for rank in range(20)]
    beats = [Heartbeat(rank, 5, "step", NOW - 100 + rank, "node1", 7, 0.2, written[rank]) for rank in range(20)]
    line = heartbeats_line([RankStatus(beat.rank, beat, NOW) for beat in beats])
    assert line.startswith("0: 1 min 40 s (step 5, silent), 1: 1 min 39 s (step 5), 2: ")
    assert line.endswith("7: 1 min 33 s (step 5) and 12 more recent ones")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min"), (3600 + 300, "1 h 5 min"), (8 * 86400 + 3600 * 14 + 59, "8 d 14 h")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def ask(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / "status.py", *words], capture_output=True, text=True, timeout=600)


def test_an_empty_and_a_foreign_directory_get_one_clear_line(tmp_path: Path, run_dir: Path):
    done = ask(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"status.py: error: {tmp_path} is not a run directory: it has no run.json; {FIX}"
    for number in (1, 0):
        shutil.copytree(run_dir, tmp_path / "few" / f"subset-{number}")
    table = ask(tmp_path / "few").stdout.splitlines()
    assert [Path(line.split()[0]).name for line in table] == ["run", "subset-0", "subset-1"]
    assert ask(tmp_path / "none").stderr == f"status.py: error: {tmp_path / 'none'} does not exist; {FIX}"
    assert ask(run_dir, "--watch", "0").stderr == "status.py: error: --watch 0 must be more than 0 seconds\n"
    for rank in (0, 1):
        beat(run_dir, rank, host=socket.gethostname())
    several = ask(tmp_path, run_dir)
    assert several.returncode == 0
    lines = [line.split() for line in several.stdout.splitlines()]
    assert lines[1] == [str(tmp_path), "no", "run"]
    assert lines[2][:4] == [str(run_dir), "dead", "20", "100"]


def test_it_loads_neither_torch_nor_numpy(run_dir: Path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from igpt_ds.ops import status; import pathlib, time\n"
    code += (
        f"print(status.read_status(pathlib.Path({str(run_dir)!r}), time.time()).step, {{'torch', 'numpy'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "20 set()\n", done.stderr


def test_watching_goes_on_until_interrupted(run_dir: Path):
    for rank in (0, 1):
        beat(run_dir, rank, host=socket.gethostname())  # whose process is gone, so nobody waits for it
    command = [sys.executable, ROOT / "tools" / "status.py", run_dir, "--json", "--watch", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["step"] == 20
        with open(run_dir / "train.jsonl", "a") as file:
            file.write(json.dumps(row(21)) + "\n")
        end = time.monotonic() + 600
        while time.monotonic() < end and json.loads(process.stdout.readline())["step"] != 21:
            pass
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    assert time.monotonic() < end
    assert (process.returncode, stderr) == (130, "status.py: interrupted\n")


@pytest.mark.parametrize("skew", [-7200.0, 7200.0])
def test_a_rank_with_a_wrong_clock_lives_if_its_heartbeat_moves(run_dir: Path, skew: float):
    for rank in (0, 1):
        beat(run_dir, rank, written=NOW + skew, time=NOW + skew - 2)
    assert status.read_status(run_dir, NOW, watch=0.3).state == "dead"
    found_out = threading.Event()

    def move() -> None:
        for tick in itertools.count(1):  # until the reader, however late it starts, has seen two of them
            for rank in (0, 1):
                beat(run_dir, rank, written=NOW + skew + 10 * tick, time=NOW + skew + 10 * tick - 1)
            if found_out.wait(0.2):
                return

    moving = threading.Thread(target=move)
    moving.start()
    found = status.read_status(run_dir, NOW, watch=60)
    found_out.set()
    moving.join()
    assert (found.state, [(rank.age, rank.silent) for rank in found.ranks]) == ("running", [(1, False), (1, False)])


@pytest.mark.slow
def test_a_real_run_that_stopped_half_way(launch: Any, command: Callable[..., list[str]], tmp_path: Path):
    done = launch(command("run", "--stop_at_step", "8"), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    asked = ask("--json", tmp_path / "run")
    found = json.loads(asked.stdout)
    expected = {"state": "stopped", "step": 8, "steps": 12, "images_seen": 96, "val_step": 8, "restarts": 0, "world_size": 2}
    assert {name: found[name] for name in expected} == expected
    assert found["checkpoint"]["step"] == 8
    assert found["images_per_s"] > 0 < found["mfu"]
    assert [(rank["step"], rank["phase"], rank["silent"]) for rank in found["ranks"]] == [(8, "end", False)] * 2
    assert found["slowest"]["rank"] in (0, 1)
    assert asked.stderr == ""


def test_goodput_as_text_and_json(run_dir: Path, tool: Any, tmp_path: Path):
    status, _, error = tool("status", "--goodput", run_dir)
    assert (status, "restarts.jsonl has no times of a start" in error) == (2, True)
    times = {"began": "2026-11-30T00:00:00", "time": "2026-11-30T00:00:10"}
    exit_ = {"event": "exit", "time": "2026-11-30T00:00:20", "step": 7, "seconds": {"step": 8.0}, "phase": "end"}
    rows = [{"event": "begin", "step": 0, "seconds": {"imports": 10.0}} | times, exit_]
    write_json_lines(run_dir / "restarts.jsonl", rows)
    said = tool("status", "--goodput", run_dir)[1]
    assert "goodput 40.0 %, 8 s of training kept in 20 s of wall clock, 1 start" in said
    assert [line.split() for line in said.splitlines()][2] == ["training", "8.0", "40.00"]
    both = tool("status", "--goodput", run_dir, tmp_path)[1]
    assert "goodput 40.0 %" in both
    assert f"{tmp_path}: {tmp_path} is not a run directory" in both
    whole, other = map(json.loads, tool("status", "--goodput", "--json", run_dir, tmp_path)[1].splitlines())
    assert (whole["goodput"]["goodput"], whole["goodput"]["wall"], other["state"]) == (0.4, 20.0, "no run")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": math.inf},
        {"pid": 10**30},
        {"pid": -1},
        {"time": 10**400},
        {"time": -math.inf},
        {"step_seconds": math.nan},
        {"step": [1]},
        {"written": None},
    ],
)
def test_a_heartbeat_with_values_that_no_rank_writes_is_none(run_dir: Path, changes: dict[str, Any]):
    beat(run_dir, 1, **changes)
    found = status.read_status(run_dir, NOW)
    assert [rank.beat is None for rank in found.ranks] == [False, True]


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"step": ' + "[" * 100_000, '{"step": 1' + 400 * "0" + "}", '{"step": -1}', "1e400", "null"]
)
def test_rows_that_are_none_do_not_count(run_dir: Path, line: str):
    with open(run_dir / "train.jsonl", "a") as file:
        file.write(line + "\n")
    assert status.read_status(run_dir, NOW).step == 20


@pytest.mark.parametrize(
    "text", ["[]", '{"time": 1e400, "step": [1]}', '{"loss": "x"}', '{"loss": [1]}', '{"time": 1' + 400 * "0" + "}"]
)
def test_a_damaged_lost_file_says_that_the_reason_is_unknown(run_dir: Path, text: str):
    (run_dir / "LOST.json").write_text(text)
    shutil.rmtree(run_dir / "heartbeat")
    assert "the reason is unknown" in status_text(status.read_status(run_dir, NOW))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"recipe": None}, "has recipe None"),
        ({"recipe": RECIPE | {"steps": "9"}}, "has recipe.steps '9'"),
        ({"recipe": {"name": "x"}}, "has no 'recipe.steps'"),
        ({"recipe": RECIPE | {"steps": 10**400}}, "has recipe.steps 1000"),
        ({"world_size": True}, "has world_size True"),
        ({"world_size": -1}, "has world_size -1"),
        ({"world_size": 1 << 39}, "has world_size 549755813888, which is not between 1 and 65536"),
    ],
)
def test_a_run_file_with_other_fields_is_one_clear_error(run_dir: Path, changes: dict[str, Any], complaint: str):
    path = run_dir / "run.json"
    write_json(path, json.loads(path.read_text()) | changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{path} {complaint}')}"):
        status.read_status(run_dir, NOW)
