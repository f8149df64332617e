"""The whole thread at toy size: everything that `make demo` leaves, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.evaluate.report.results import read_results

pytestmark = pytest.mark.slow


def test_the_story_from_images_to_pictures(launch: Any, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    toy = ["--steps", "8", "--warmup_steps", "2", "--batch_images", "16", "--n_layer", "2", "--val_images", "32"]
    command = ["bash", "tools/story.sh", "digits_nano_ar_8", "digits:", str(out), *toy]
    done = launch(command, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("layers.png", "samples.png", "training.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    assert json.loads((out / "model" / "config.json").read_text())["step"] == 8
    rows = read_results(out / "results.jsonl")
    assert {(row["weights"], row["features"]) for row in rows} == {
        ("trained", "normed"),
        ("trained", "raw"),
        ("untrained", "normed"),
        ("untrained", "raw"),
        ("pixels", "pixels"),
    }
    assert len(rows) == 4 * 3 + 1
    assert "ln 17 = 2.8332 before the first" in done.stdout
    assert str(out / "samples.png") in done.stdout

    again = launch(command, timeout=400)  # every stage has its result: only probes, pictures and tables are made again
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "step 8/8" not in again.stdout
    assert len(read_results(out / "results.jsonl")) == 13

    other = launch([*command, "--lr", "0.1"])  # and never shown as the result of something else
    assert other.returncode == 2
    assert "holds another story" in other.stderr
