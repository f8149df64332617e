"""A training command on the tiny dataset, and what a run leaves behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.files import read_json_lines


@pytest.fixture
def recipe(tiny_config: ModelConfig) -> Recipe:
    """Twelve steps of 12 images: two epochs and a half of the tiny dataset's training split, augmented."""
    return Recipe("tiny", tiny_config, batch_images=12, steps=12, lr=0.01, warmup_steps=3, augment_pad=1, augment_flip=True)


@pytest.fixture
def sharded_config(tmp_path: Path) -> Path:
    """A ds_config that shards even the smallest tensor, where the shipped ones would keep a tiny model whole on each rank."""
    path = tmp_path / "sharded.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 500}
    path.write_text(json.dumps({"zero_optimization": zero, "igpt_ds": {"activation_checkpointing": "full"}}))
    return path


@pytest.fixture
def command(recipe: Recipe, sharded_config: Path, tiny_dataset: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """command("run", "--resume", "auto") -> the words of a training command that writes to tmp_path/run."""
    config = tmp_path / "recipe.json"
    config.write_text(json.dumps(recipe_to_dict(recipe)))

    def words(run_dir: str, *more: str) -> list[str]:
        fixed = {"config": config, "data": tiny_dataset, "run_dir": tmp_path / run_dir, "ds_config": sharded_config}
        often = {"log_every": 1, "val_every": 4, "save_every": 4}
        return ["train.py", *(word for name, value in (fixed | often).items() for word in (f"--{name}", str(value))), *more]

    return words


@pytest.fixture
def curves(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    """curves("run") -> its rows without what a clock or a memory counter measured."""
    measured = ("images_per_s", "tokens_per_s", "mfu", "memory_gib", "data_wait", "save_seconds", "slowest_rank", "slowest_ratio")

    def rows(run_dir: str) -> list[dict[str, Any]]:
        found = read_json_lines(tmp_path / run_dir / "train.jsonl")
        return [{name: value for name, value in row.items() if name not in measured} for row in found]

    return rows


@pytest.fixture
def with_fault() -> Callable[[list[str], str], list[str]]:
    """with_fault(words, fault) -> the words of a `train.py ...` command, with a fault of faults.py."""
    return lambda words, fault: [str(Path(__file__).with_name("faults.py")), fault, *words[1:]]


@pytest.fixture
def ended() -> Callable[[subprocess.CompletedProcess[str], int], str]:
    """ended(done, status) -> what it printed, the status being as it should."""

    def said(done: subprocess.CompletedProcess[str], status: int) -> str:
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return said
