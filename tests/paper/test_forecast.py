"""What stages are for and about how long they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import get_recipe
from igpt_ds.data.sources import folders
from igpt_ds.paper import forecast
from igpt_ds.paper.scales import SCALES, get_scale
from igpt_ds.paper.stage import Stage
from igpt_ds.paper.stages import stages
from igpt_ds.paper.system import Images, Scale, System, Training
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.step_time import Cluster

ROOT = Path(__file__).parents[2]
COUNTS = {"train": 1000, "val": 100, "test": 100}


def made(name: str) -> tuple[Scale, list[Stage]]:
    training = Training(get_recipe("cifar10_nano_ar_16"), ("--recipe", "cifar10_nano_ar_16")) if name == "own" else None
    scale = get_scale(name, None if name == "tiny" else "imagefolder:photos", training=training)
    return scale, stages(scale, Path("out"), lambda recipe: {})


@pytest.mark.parametrize("name", SCALES)
def test_every_stage_has_a_purpose_and_a_time(name: str) -> None:
    scale, found = made(name)
    machine = forecast.gpus(64, Cluster(GPUS["h100-80g"]), scale) if name == "full" else forecast.cpu(2, "fp32")
    counts = {images.id: images.counts or COUNTS for images in scale.images}
    for stage in found:
        assert forecast.purpose(stage), stage.name
        assert forecast.seconds(stage, scale, machine, counts), stage.name


def test_without_a_number_of_images_times_are_unknown_but_those_of_training(tmp_path: Path) -> None:
    scale, found = made("own")
    times = {stage.name: forecast.seconds(stage, scale, forecast.cpu(2, "fp32"), {}) for stage in found}
    assert all(time is None for name, time in times.items() if name.startswith(("shards", "features", "probe")))
    assert times["train-cifar10_nano_ar_16"] is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rate_of_a_cpu_is_the_measured_one(precision: str) -> None:
    recipe = get_recipe("cifar10_nano_ar_16")
    rows = json.loads((ROOT / "docs" / "bench_cpu.json").read_text())["rows"]
    speed = max(row["ours"] for row in rows if row["what"].startswith(f"{recipe.name}: zero3_{precision}, "))
    assert recipe.batch_images / forecast.cpu(2, precision).step_seconds(System(recipe, ())) == pytest.approx(speed, rel=0.1)


def test_images_are_counted_in_shards_or_in_the_source(tiny_dataset: Path, tmp_path: Path) -> None:
    digits = get_scale("tiny", None).images[0]
    found = forecast.count_images(digits, tmp_path / "none")
    assert sum(found.values()) == 1797
    assert found["val"] == round(0.3 * 1797)
    assert set(forecast.count_images(digits, tiny_dataset)) == {"train", "val"}
    full = get_scale("full", "data").images[0]
    assert forecast.count_images(full, tmp_path) == full.counts


@pytest.mark.parametrize("apart", [True, False])
def test_counting_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """Copies of test images are found by reading all files, which takes hours on a large folder."""
    names = ("a/cat", "a/dog", "b/cat") if apart else ("train/cat", "train/dog", "test/cat")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").touch()
    monkeypatch.setattr(folders, "read_places", None)  # nobody calls it
    source = f"imagefolder:{tmp_path / 'a'},test={tmp_path / 'b'}" if apart else f"imagefolder:{tmp_path}"
    assert forecast.count_images(Images("photos", source, 8, {}), tmp_path / "none") == {"train": 2, "val": 0, "test": 1}


def test_a_dry_run_prints_times_and_a_sum_and_writes_nothing(tool: Any, tmp_path: Path) -> None:
    flags = ["--scale", "own", "--data", "digits:", "--out", tmp_path / "out", "--gpus", 2, "--gpu", "cpu"]
    flags += ["--ds_config", ROOT / "ds_configs" / "zero3_fp32.json", "--commands"]
    status, said, _ = tool("paper_plan", *flags, "--", "--recipe", "digits_nano_ar_8", "--dry_run")
    assert status == 0
    assert "to do train-digits_nano_ar_8: pre-training" in said
    assert said.splitlines()[-1].startswith("to do: 18 stages, about ")
    assert "on 2 CPU processes" in said
    assert not (tmp_path / "out").exists()
    status, said, warned = tool(
        "paper_plan", "--dry_run", *flags[:3], "imagefolder:none", *flags[4:], "--", "--recipe=digits_nano_ar_8"
    )
    assert (status, "cannot be counted" in warned, "stages of unknown time" in said) == (0, True, True)
