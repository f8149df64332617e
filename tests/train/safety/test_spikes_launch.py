"""Guards in real runs: a rank's NaN is everybody's skipped step; a spike stops the run, or is gone back from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import STOPPED
from igpt_ds.config import Recipe
from igpt_ds.json_files import read_json
from igpt_ds.ops.status import read_status
from igpt_ds.ops.status_text import status_text
from igpt_ds.train.checkpoint.directory import checkpoint_name
from igpt_ds.train.heartbeat import all_heartbeats
from igpt_ds.train.schedule import learning_rate

pytestmark = pytest.mark.slow
Curves = Callable[[str], list[dict[str, Any]]]
Command = Callable[..., list[str]]


def test_a_nan_of_one_rank_skips_the_step_on_all(
    launch: Any, with_fault: Any, ended: Any, command: Command, curves: Curves, recipe: Recipe, tmp_path: Path
) -> None:
    """Steps 6 and 7 of two ranks; images 66 to 71 are rank 1's of step 6. The learning rate and the images go on."""
    ended(launch(with_fault(command("run"), "nan=1,66,84"), ranks=2), 0)
    rows = [row for row in curves("run") if "lr" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert [row["step"] for row in rows if row["loss"] is None] == [6, 7]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [6, 7]
    assert rows[-1]["images_seen"] == 144
    assert rows[-1]["loss"] < rows[4]["loss"]
    assert [row["lr"] for row in rows] == [learning_rate(recipe, step) for step in range(12)]
    manifest = read_json(tmp_path / "run" / "checkpoints" / "step-00000012" / "manifest.json", "manifest")
    assert (manifest["guards"]["skipped"], manifest["images_seen"]) == (2, 144)
    assert len(manifest["guards"]["losses"]) == 10


def test_too_high_a_rate_stops_with_advice_and_keeps_the_good_state(launch: Any, command: Command, tmp_path: Path) -> None:
    words = command("run", "--lr", "1", "--clip", "0", "--warmup_steps", "12", "--spike_patience", "3", "--save_every", "1")
    done = launch(words)
    assert done.returncode == 2, done.stdout[-2000:]
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "the loss diverged at step" in error
    assert "was above" in error
    assert "the last good checkpoint is" in error
    assert "start again with a lower --lr in another --run_dir (paper A.1" in error
    assert error.endswith("or continue with --resume auto --on_spike rollback")
    lost = read_json(tmp_path / "run" / "LOST.json", "report")
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert int(kept.name.removeprefix("step-")) == lost["since"] - 1  # none was saved while the loss was in doubt
    assert f"the last good checkpoint is {kept.with_name(checkpoint_name(lost['since'] - 2))}" in error
    found = read_status(tmp_path / "run", time.time())
    assert (found.state, found.seconds_left) == ("lost", None)
    assert f" at step {lost['step']}: " in status_text(found)
    beat = all_heartbeats(tmp_path / "run")[0]
    assert (beat.phase, beat.error) == ("end", error.removeprefix("train.py: error: "))


def test_rollback_leaves_the_bad_images_out_and_survives_interruptions(
    launch: Any, with_fault: Any, ended: Any, command: Command, curves: Curves, tmp_path: Path
) -> None:
    """Images 84 to 107, of steps 8 and 9, cost 30 nats more. Back to step 4, then without the last 24 images seen."""
    options = [
        "--spike_patience",
        "2",
        "--on_spike",
        "rollback",
        "--spike_skip_images",
        "24",
        "--save_every",
        "4",
        "--steps",
        "16",
    ]
    fault = "bad=84,108,30"
    said = ended(launch(with_fault(command("whole", *options), fault), ranks=2), 0)
    assert "the loss diverged at step 9" in said
    assert "step-00000004; images 84 to 107 of the stream are skipped" in said
    (rollback,) = read_json(tmp_path / "whole" / "rollbacks.json", "rollbacks")["rollbacks"]
    assert {name: rollback[name] for name in ("step", "since", "back_to", "skipped")} == {
        "step": 9,
        "since": 8,
        "back_to": 4,
        "skipped": [84, 108],
    }
    rows = [row for row in curves("whole") if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert max(row["loss"] for row in rows) <= math.log(8) + 1e-6
    manifest = read_json(tmp_path / "whole" / "checkpoints" / "step-00000016" / "manifest.json", "manifest")
    assert manifest["skipped_ranges"] == [[84, 108]]
    assert manifest["images_seen"] == 16 * 12

    # Interrupted after the rollback and before the next checkpoint would be due, then once more after it: a new process each.
    again = command("again", *options, "--resume", "auto")
    ended(launch(with_fault(again, fault), ranks=2, env={"IGPT_DS_TEST_STOP_AFTER_ROLLBACK": "1"}), STOPPED)
    ended(launch(with_fault(again, fault), ranks=2), 0)
    assert curves("again") == curves("whole")
