"""Real launches on mixed, damaged and streamed data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.train.run_dir import read_run

pytestmark = pytest.mark.slow
Curves = Callable[[str], list[dict[str, Any]]]
Command = Callable[..., list[str]]
STEPS = ["--stop_at_step", "4", "--micro_batch", "3"]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture
def spoiled(tiny_dataset: Path, tmp_path: Path) -> Path:
    """The tiny dataset with tokens of training image 5 changed."""
    path = tmp_path / "spoiled"
    shutil.copytree(tiny_dataset, path)
    shard = path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[5 * 2048 + 1536 + 128] ^= 1
    shard.write_bytes(content)
    return path


def test_two_datasets_on_one_rank_and_on_two(
    launch: Any, tool: Any, command: Command, curves: Curves, tiny_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "web")
    data = ["--data", str(tiny_dataset), str(tmp_path / "web"), "--data_weights", "3", "1"]
    for name, ranks in (("one", None), ("two", 2)):
        done = launch(command(name, *STEPS, *data), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(curves("one")) == pytest.approx(losses(curves("two")), abs=1e-5)
    about = read_run(tmp_path / "one")["data"]
    assert [part["share"] for part in about["datasets"]] == [3072, 1024]
    manifest = json.loads((tmp_path / "one" / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["data"] == about
    assert f"--data {tiny_dataset} --out" in tool("consolidate", "--run_dir", tmp_path / "one", "--out", tmp_path / "m")[1]

    refused = launch(command("one", "--data", str(tiny_dataset), str(tmp_path / "web"), "--resume", "auto"))
    assert refused.returncode == 2
    assert "run.json belongs to another run: dataset_hash is" in refused.stderr


@pytest.mark.parametrize("verify", ["always", "never"])
def test_damaged_images_are_skipped_on_all_ranks(
    launch: Any, command: Command, curves: Curves, spoiled: Path, verify: str
) -> None:
    skip = ["--data", str(spoiled), "--on_bad", "skip", "--max_bad", "0.1", "--verify_shards", verify]
    for name, ranks in (("one", None), ("two", 2)):
        done = launch(command(name, *STEPS, *skip), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        named = done.stderr.count("is damaged; image 6 is used instead")
        assert named == 1 if verify == "always" else 1 <= named <= 2  # without, by each rank that meets it
    assert losses(curves("one")) == pytest.approx(losses(curves("two")), abs=1e-5)


def test_damage_stops_all_ranks_with_one_line(launch: Any, command: Command, spoiled: Path) -> None:
    for more, message, by in (
        (["--on_bad", "skip"], "1 of 37 images of", "ranks"),
        ([], "are damaged: image 5 of this shard", "ranks"),
        (["--verify_shards", "never"], "image 5 at byte 10240 is damaged", "deepspeed"),
    ):
        done = launch(command("run", *STEPS, "--data", str(spoiled), *more), ranks=2, by=by)
        assert done.returncode != 0
        assert done.stderr.count("train.py: error: ") == done.stderr.count(message) == 1, done.stderr[-3000:]


def test_a_streamed_run_and_a_cut_one(launch: Any, command: Command, curves: Curves, tiny_dataset: Path, tmp_path: Path) -> None:
    for name in ("index", "bucket"):
        shutil.copytree(tiny_dataset, tmp_path / name)
    shards = sorted((tmp_path / "index").glob("train-*.tar"))
    for shard in shards:
        shard.unlink()
    words = ["--data", str(tmp_path / "index"), "--stream", f"pipe:cat {tmp_path}/bucket/{{shard}}"]
    done = launch(command("run", *STEPS, *words), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Limits: images are drawn") == 1
    assert len(losses(curves("run"))) == 4
    assert read_run(tmp_path / "run")["data"]["stream"] == words[-1]

    shard = tmp_path / "bucket" / shards[0].name
    shard.write_bytes(shard.read_bytes()[: 7 * 2048])
    done = launch(command("cut", *STEPS, *words))
    assert done.returncode == 2
    assert "train-000000.tar gave 7 images where the index says 16; the transfer was cut" in done.stderr
