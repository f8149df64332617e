"""Real launches with a fast directory: a killed run continues from the newest state that is whole, wherever it is."""

from __future__ import annotations

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
    script = f'exec "{sys.executable}" "$@" --fast_dir {fast}/{"$RANK" if apart else "all"}'
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    start = [*launcher, "bash", "-c", script, "rank"]
    killed = launch([*start, *with_fault([*words, "--save", "sync"], "signal=SIGKILL,1,step,7")])
    assert killed.returncode != 0
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
    (states,) = (fast / ("1" if apart else "all")).iterdir()
    *_, before, newest = list_checkpoints(states)
    assert (before.name, newest.name) == ("step-00000005", "step-00000006")
    torn = next(newest.glob("*pp_rank_1_*optim_states.pt"))
    content = bytearray(torn.read_bytes())
    content[-1000] ^= 4
    torn.write_bytes(content)

    place = before if not apart else next((fast / "0").iterdir()) / before.name  # of rank 0
    done = launch([*start, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"checkpoint skipped: {torn} is damaged" in done.stderr
    assert f"resumed from {place}" in done.stdout
    assert curves("run") == whole
    assert not list(fast.rglob("*.pt"))
