"""From images to tables with one model at toy size: everything that `make demo` leaves, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.evaluate.report.results import read_all

pytestmark = pytest.mark.slow


def test_the_story_from_images_to_pictures(launch: Any, tmp_path: Path) -> None:
    out, name = tmp_path / "demo", "digits_nano_ar_8"
    toy = ["--steps", "8", "--warmup_steps", "2", "--batch_images", "16", "--n_layer", "2", "--val_images", "32"]
    command = ["bash", "tools/paper.sh", "own", str(out), "digits:", "--", "--recipe", name, *toy]
    done = launch(command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for picture in ("layers", "samples", "training", "confusion", "neighbours"):
        assert (out / "figures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG"), picture
    assert json.loads((out / "models" / f"{name}-8" / "config.json").read_text())["step"] == 8
    rows = read_all(sorted((out / "results").glob("*.jsonl")))
    assert {(row.weights, row.features) for row in rows} == {
        ("trained", "normed"),
        ("trained", "raw"),
        ("untrained", "normed"),
        ("untrained", "raw"),
        ("pixels", "pixels"),
    }
    assert len(rows) == 4 * 3 + 1
    assert "ln 17 = 2.8332 before the first" in (out / "tables.md").read_text()
    assert "<html" in (out / "report.html").read_text()
    assert str(out / "tables.md") in done.stdout

    (out / "tables.md").unlink()
    again = launch(command)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert [line.split(" (")[0] for line in again.stdout.splitlines() if line.startswith("==")] == ["== 1 of 1: tables"]

    other = launch([*command, "--lr", "0.1"])  # and never shown as the result of something else
    assert other.returncode == 2
    assert f"{out} holds the paper of scale own" in other.stderr
