"""Real launches with a fast directory: a killed run continues from the newest state that is whole, wherever it is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.train.checkpoint.directory import list_checkpoints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "a_disk_for_each_rank"])
def test_a_killed_run_continues_from_the_newest_whole_state(
    launch: Any, with_fault: Any, command: Any, curves: Callable[[str], Any], whole: Any, tmp_path: Path, apart: bool
) -> None:
    fast = tmp_path / "fast"
    words = command("run", "--fast_save_every", "1", "--resume", "auto")
    start = two_ranks(f"{fast}/{'$RANK' if apart else 'all'}")
    killed = launch([*start, *with_fault([*words, "--save", "sync"], "signal=SIGKILL,1,step,7")])
    assert killed.returncode != 0
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
    (states,) = (fast / ("1" if apart else "all")).iterdir()
    *_, before, newest = list_checkpoints(states)
    assert (before.name, newest.name) == ("step-00000005", "step-00000006")
    torn = next(newest.glob("*pp_rank_1_*optim_states.pt"))
    flip(torn)

    place = before if not apart else next((fast / "0").iterdir()) / before.name  # of rank 0
    done = launch([*start, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"checkpoint skipped: {torn} is damaged" in done.stderr
    assert f"resumed from {place}" in done.stdout
    assert curves("run") == whole
    assert not list(fast.rglob("*.pt"))


def test_the_state_of_a_lost_node_comes_from_its_neighbour(
    launch: Any, with_fault: Any, command: Any, curves: Callable[[str], Any], whole: Any, tmp_path: Path
) -> None:
    """Each rank has a disk of its own. A damaged part is named and its copy used; then a disk is lost, and one of the copies."""
    fast = tmp_path / "fast"
    words = command("run", "--fast_save_every", "1", "--fast_copies", "--resume", "auto")
    start = two_ranks(f"{fast}/$RANK")
    killed = launch([*start, *with_fault([*words, "--save", "sync"], "signal=SIGKILL,1,step,7")])
    assert killed.returncode != 0
    (states,) = (fast / "0").iterdir()
    newest = list_checkpoints(states)[-1]
    ours, theirs = (next(newest.glob(f"*pp_rank_{rank}_*optim_states.pt")) for rank in (0, 1))
    (of_rank_1,) = (fast / "1").iterdir()
    assert theirs.read_bytes() == (of_rank_1 / newest.name / theirs.name).read_bytes()
    flip(ours)  # its copy is on the other node

    again = launch([*start, *with_fault([*words, "--save", "sync"], "signal=SIGKILL,1,step,8")])
    assert again.returncode != 0
    assert f"checkpoint skipped: {ours} is damaged" in again.stderr
    assert "step 6 was put together" in again.stdout
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / newest.name}" in again.stdout

    shutil.rmtree(fast / "1")
    *_, before, newest = list_checkpoints(states)
    flip(next(newest.glob("*pp_rank_1_*optim_states.pt")))  # the only copy
    done = launch([*start, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / before.name}" in done.stdout
    assert curves("run") == whole


def test_a_stop_before_the_first_step_keeps_the_fast_state(
    launch: Any, with_fault: Any, command: Any, curves: Callable[[str], Any], whole: Any, tmp_path: Path
) -> None:
    words = command("run", "--fast_dir", str(tmp_path / "fast"), "--fast_save_every", "1", "--resume", "auto")
    killed = launch(with_fault([*words, "--save", "sync"], "signal=SIGKILL,1,step,7"), ranks=2)
    assert killed.returncode != 0
    stopped = launch([*words, "--max_minutes", "0.0001"], ranks=2)
    assert "everything is saved" in stopped.stdout, stopped.stderr[-3000:]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step-00000006"
    assert not list((tmp_path / "fast").rglob("*.pt"))
    done = launch(words, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curves("run") == whole


def two_ranks(fast_dir: str) -> list[str]:
    """The words that start a program on two ranks, each with its --fast_dir."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    return [*launcher, "bash", "-c", f'exec "{sys.executable}" "$@" --fast_dir {fast_dir}', "rank"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
