"""slurm/finetune.sbatch on two nodes, preempted: model and results are those of a run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.report.results import read_results
from igpt_ds.model.store import read_info, save_model
from igpt_ds.model.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture
def flags(tiny_config: ModelConfig, tiny_dataset: Path, sharded: Path, tmp_path: Path) -> list[str]:
    """finetune.py's flags: forty steps from random weights."""
    torch.manual_seed(3)
    palette_hash = ShardSet(tiny_dataset, "train").palette_hash
    info = {"config": tiny_config, "objective": "ar", "palette_hash": palette_hash, "step": 9, "images_seen": 90}
    save_model(tmp_path / "pretrained", Transformer(tiny_config).state_dict(), info, tiny_dataset / "palette.npy")
    words = [f"--model={tmp_path}/pretrained", f"--data={tiny_dataset}", f"--ds_config={sharded}", "--eval_split=val"]
    words += ["--batch_images=12", "--steps=40", "--lr=0.01", "--patience=0", "--augment_pad=1", "--augment_flip"]
    return [*words, "--log_every=1", "--val_every=10", "--save_every=10"]


def test_a_preempted_fine_tuning_ends_as_an_undisturbed_one(
    training: Callable[..., Any], flags: list[str], alone: Any, curves: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    job = training(name="finetune", flags=[*flags, f"--results={tmp_path}/job.jsonl"])
    job.submit_by_script(RANKS_PER_NODE="1")
    job.reaches(14)
    job.is_preempted()
    assert job.ended() == "COMPLETED"
    assert [(row["status"], row["nodes"]) for row in job.ends()] == [(85, "node[1-2]"), (0, "node[1-2]")]
    assert 14 <= job.ends()[0]["images_seen"] / 12 < 40
    assert (job.run_dir / "FINISHED").exists()
    assert "row added to" in job.text()

    alone(2, "finetune.py", *flags, f"--run_dir={tmp_path}/alone", f"--results={tmp_path}/alone.jsonl")
    assert job.curves() == curves(tmp_path / "alone")
    assert read_info(job.run_dir / "model") == read_info(tmp_path / "alone" / "model")
    (row,), (expected,) = read_results(tmp_path / "job.jsonl"), read_results(tmp_path / "alone.jsonl")
    assert row == expected
    assert row["n_train"] == ShardSet(tiny_dataset, "train").n_images

    (job.run_dir / "FINISHED").unlink()  # as if a node had been lost while it read the test split
    job.submit_by_script(RANKS_PER_NODE="1")
    assert job.ended() == "COMPLETED"
    assert (job.run_dir / "FINISHED").exists()
    assert read_results(tmp_path / "job.jsonl") == [expected]
