"""Tools over a real checkpoint, killed at file-system calls and run again: the same result, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed
import numpy as np
import pytest
from killed import Case
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools() -> Iterator[killed.Tools]:
    """One process that imports every tool that a test here runs."""
    with killed.Tools() as running:
        yield running


@pytest.fixture(scope="module")
def run_dir(launch_once: Any, command_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("kills")
    done = launch_once(command_in(directory)("run", "--stop_at_step", "8"), ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "run"


def test_reshard_in_place_and_elsewhere(tools: killed.Tools, run_dir: Path, tmp_path: Path) -> None:
    Case(tools, "tools/reshard.py", lambda out: ["--run_dir", out, "--ranks", 2], tmp_path).kills(6, before=run_dir)
    elsewhere = Case(tools, "tools/reshard.py", lambda out: ["--run_dir", run_dir, "--ranks", 2, "--out", out / "c"], tmp_path)
    elsewhere.kills(3)
    elsewhere.two_at_once()


def test_a_consolidation_after_a_killed_reshard_takes_the_newest_step(tools: killed.Tools, run_dir: Path, tmp_path: Path) -> None:
    reshard = Case(tools, "tools/reshard.py", lambda out: ["--run_dir", out, "--ranks", 2], tmp_path)
    for at in range(1, reshard.run(killed.begin(tmp_path, run_dir)).calls + 1):
        out = killed.begin(tmp_path, run_dir)
        reshard.run(out, at)
        done = tools.run("tools/consolidate.py", "--run_dir", out, "--out", out / "model", under=tmp_path)
        assert "step 8, " in done.output, f"killed at call {at}: {done.output}"


def test_model_dirs_and_exports(tools: killed.Tools, run_dir: Path, tmp_path: Path) -> None:
    model, hf = tmp_path / "model", tmp_path / "hf"
    Case(tools, "tools/consolidate.py", lambda out: ["--run_dir", run_dir, "--out", out / "m"], tmp_path).kills(3)
    assert tools.run("tools/consolidate.py", "--run_dir", run_dir, "--out", model, under=tmp_path).code == 0
    Case(tools, "tools/export_hf.py", lambda out: ["--model", model, "--out", out / "hf"], tmp_path).kills(3)
    assert tools.run("tools/export_hf.py", "--model", model, "--out", hf, under=tmp_path).code == 0
    Case(tools, "tools/import_hf.py", lambda out: ["--hf", hf, "--out", out / "m"], tmp_path).kills(3)


def test_features_and_filtered_shards(tools: killed.Tools, run_dir: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert tools.run("tools/consolidate.py", "--run_dir", run_dir, "--out", model, under=tmp_path).code == 0
    data = ["--data", tiny_dataset, "--splits", "train", "val"]
    extract = Case(tools, "tools/extract_features.py", lambda out: ["--model", model, *data, "--out", out / "f"], tmp_path)
    extract.kills(5)
    extract.two_at_once()
    (tmp_path / "images").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (120, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    shards = [
        "--source",
        f"imagefolder:{tmp_path}",
        "--palette",
        tiny_dataset / "palette.npy",
        "--n_px",
        4,
        "--val_fraction",
        0.45,
    ]
    assert tools.run("tools/make_shards.py", *shards, "--out", tmp_path / "all", under=tmp_path).code == 0
    sets = ["--reference", tmp_path / "all", "--reference_split", "val", "--candidates", tmp_path / "all", "--keep", 0.5]
    Case(tools, "tools/filter_shards.py", lambda out: ["--model", model, *sets, "--out", out / "s"], tmp_path).kills(5)
