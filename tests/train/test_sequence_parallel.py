"""Real launches of sequence parallelism together with ZeRO over all ranks, beside plain torch on one process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_ds.config import Recipe, override, recipe_to_dict
from igpt_ds.data.loader import Augment, BatchLayout, Loader
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.json_files import read_json
from igpt_ds.model.objectives import image_loss
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.schedule import learning_rate
from igpt_ds.train.validation import VALIDATION_SEED

pytestmark = pytest.mark.slow
Curves = Callable[[str], list[dict[str, Any]]]
Command = Callable[..., list[str]]


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., list[str]]:
    """The words that choose a ds_config: config_of(sp, stage, mode)."""

    def words(sp: int, stage: int, mode: str, **more: Any) -> list[str]:
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}
        ours = {"activation_checkpointing": mode, "sequence_parallel": sp}
        path = tmp_path / f"sp{sp}.json"
        path.write_text(json.dumps({"zero_optimization": zero, "igpt_ds": ours} | more))
        return ["--ds_config", str(path)]

    return words


def plain_torch(recipe: Recipe, data: Path) -> tuple[list[float], float]:
    """The same training in a plain loop on one process: its losses, and the validation loss at the end."""
    torch.manual_seed(recipe.seed)
    model = Transformer(recipe.model, objective=recipe.objective)
    optimizer = torch.optim.Adam(model.parameters(), betas=recipe.betas, eps=recipe.eps)
    batch, losses = recipe.batch_images, []
    loader = Loader(
        ShardSet(data, "train"),
        BatchLayout(batch, batch, 0, 1),
        recipe.seed,
        augment=Augment(recipe.augment_pad, recipe.augment_flip),
    )
    nats = image_loss(recipe.objective, recipe.seed, recipe.mask_prob)
    for step in range(recipe.steps):
        images = loader.batch(step * batch, 0).to("cpu")
        loss = nats(model, images.tokens, images.positions).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(loss.item())
    val = ShardSet(data, "val")
    ids = np.arange(val.n_images)
    tokens = torch.from_numpy(val.tokens(ids).reshape(len(ids), -1)).long()
    with torch.no_grad():
        found = image_loss(recipe.objective, VALIDATION_SEED, recipe.mask_prob)(model, tokens, torch.from_numpy(ids))
    return losses, found.mean().item()


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def check_same(rows: list[dict[str, Any]], recipe: Recipe, data: Path) -> None:
    """The run's curves are those of one process."""
    losses, val_loss = plain_torch(recipe, data)
    training = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in training] == pytest.approx(losses, abs=1e-5)
    assert [row["images_seen"] for row in training] == [recipe.batch_images * (step + 1) for step in range(recipe.steps)]
    assert rows[0]["val_loss"] == pytest.approx(np.log(recipe.model.n_vocab), abs=1e-6)
    assert rows[-1]["val_loss"] == pytest.approx(val_loss, abs=1e-5)


def test_two_ranks_an_image_two_images_at_once_interrupted(
    launch: Any, command: Command, curves: Curves, config_of: Any, recipe: Recipe, tiny_dataset: Path, tmp_path: Path
) -> None:
    """sp=2 x dp=2 with accumulation under ZeRO-3, stopped in the middle of an epoch; then sp=2 x dp=1 on the same state."""
    words = [*command("run", "--micro_batch", "3"), *config_of(2, 3, "selective")]
    succeed(launch([*words, "--stop_at_step", "5"], ranks=4))
    run = read_json(tmp_path / "run" / "run.json", "run config")
    assert (run["world_size"], run["sequence_parallel"], run["micro_batch"], run["accumulation"]) == (4, 2, 3, 2)
    succeed(launch([*words, "--resume", "auto"], ranks=2))
    check_same(curves("run"), recipe, tiny_dataset)


def test_bert_with_four_ranks_an_image_under_zero_1(
    launch: Any, command: Command, curves: Curves, config_of: Any, recipe: Recipe, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Some ranks hold no masked token of an image at all."""
    masked = dataclasses.replace(override(recipe, n_head=4), name="tiny_bert", objective="bert", mask_prob=0.1)
    (tmp_path / "masked.json").write_text(json.dumps(recipe_to_dict(masked)))
    chosen = ["--config", str(tmp_path / "masked.json"), *config_of(4, 1, "none")]
    succeed(launch([*command("run"), *chosen], ranks=4))
    check_same(curves("run"), masked, tiny_dataset)


def test_bf16_with_shares_of_different_lengths(
    launch: Any, command: Command, curves: Curves, config_of: Any, recipe: Recipe, tiny_dataset: Path
) -> None:
    """16 tokens on three ranks are 6, 6 and 4."""
    wide = override(recipe, n_head=3, n_embd=24)
    chosen = ["--n_head", "3", "--n_embd", "24", *config_of(3, 3, "full", bf16={"enabled": True})]
    succeed(launch([*command("run"), *chosen], ranks=3))
    losses = [row["loss"] for row in curves("run") if "loss" in row]
    expected, _ = plain_torch(wide, tiny_dataset)
    assert losses == pytest.approx(expected, abs=0.06)  # bf16 has three digits, and weights that keep no more
    assert losses[-1] < losses[0] - 0.5
