"""Real launches of the BERT objective, and of both initialisations, under ZeRO-3 on two ranks."""

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
import torch.nn.functional as F
from safetensors.torch import load_file

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.data.loader import Augment, BatchLayout, Loader
from igpt_ds.data.palette import fit_colors
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.json_files import read_json_lines
from igpt_ds.model.objectives import draw_masks
from igpt_ds.model.store import fresh_model, load_model
from igpt_ds.model.transformer import Transformer, init_std
from igpt_ds.train.schedule import learning_rate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
Curves = Callable[[str], list[dict[str, Any]]]
Command = Callable[..., list[str]]


@pytest.fixture
def masked(recipe: Recipe, tmp_path: Path) -> tuple[Recipe, list[str]]:
    """The tiny recipe with the other objective and initialisation, and the words that choose it."""
    changed = dataclasses.replace(recipe, name="tiny_bert", objective="bert", mask_prob=0.3, init="sparse_transformer")
    path = tmp_path / "masked.json"
    path.write_text(json.dumps(recipe_to_dict(changed)))
    return changed, ["--config", str(path)]


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def image_losses(model: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss of each image, one after the other: the mean over its hidden pixels."""
    logits = model(tokens, mask)
    return torch.stack([F.cross_entropy(logits[b][mask[b]], tokens[b][mask[b]]) for b in range(len(tokens))])


def plain_torch_losses(recipe: Recipe, data: Path) -> list[float]:
    """The same training in a plain loop on one process, without DeepSpeed."""
    torch.manual_seed(recipe.seed)
    model = Transformer(recipe.model, objective="bert", init=recipe.init)
    optimizer = torch.optim.Adam(model.parameters(), betas=recipe.betas, eps=recipe.eps)
    batch = recipe.batch_images
    loader = Loader(
        ShardSet(data, "train"),
        BatchLayout(batch, batch, 0, 1),
        recipe.seed,
        augment=Augment(recipe.augment_pad, recipe.augment_flip),
    )
    losses = []
    for step in range(recipe.steps):
        tokens = loader.batch(step * batch, 0).tokens.long()
        mask = draw_masks(recipe.seed, step * batch + np.arange(batch), recipe.model.n_ctx, recipe.mask_prob)
        loss = image_losses(model, tokens, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_bert_on_two_ranks_from_the_first_step_to_features(
    launch: Any, tool: Any, command: Command, curves: Curves, masked: tuple[Recipe, list[str]], tiny_dataset: Path, tmp_path: Path
) -> None:
    recipe, chosen = masked
    succeed(launch(command("whole", "--micro_batch", "3", *chosen), ranks=2))
    rows = curves("whole")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(plain_torch_losses(recipe, tiny_dataset), abs=1e-5)
    assert rows[0]["val_loss"] == pytest.approx(np.log(8), abs=1e-6)

    # Stopped in the middle of an epoch and resumed, it hides the same pixels: all is equal, bit for bit.
    staged = command("staged", "--micro_batch", "3", *chosen)
    succeed(launch([*staged, "--stop_at_step", "5"], ranks=2))
    refused = launch(command("staged", "--resume", "auto"))
    assert refused.returncode == 2
    assert "run.json belongs to another run: objective is bert there and ar here; choose another --run_dir" in refused.stderr
    succeed(launch([*staged, "--resume", "auto"], ranks=2))
    also = [row for row in curves("staged") if row["step"] == 5 and "val_loss" in row]  # measured where it stopped
    assert [row for row in curves("staged") if row not in also] == rows
    assert len(also) == 1

    # Consolidated, the model has the validation loss that the engine measured: masks by the image's number in the split.
    model_dir = tmp_path / "model"
    assert tool("consolidate", "--run_dir", tmp_path / "whole", "--out", model_dir)[0] == 0
    model, info = load_model(model_dir, "bert")
    assert (info.objective, info.mask_prob, info.init, info.step) == ("bert", 0.3, "sparse_transformer", 12)
    val = ShardSet(tiny_dataset, "val")
    ids = np.arange(val.n_images)
    tokens = torch.from_numpy(val.tokens(ids).reshape(len(ids), -1).astype(np.int64))
    with torch.no_grad():
        val_loss = image_losses(model, tokens, draw_masks(0, ids, 16, 0.3)).mean()
    assert val_loss.item() == pytest.approx(rows[-1]["val_loss"], abs=1e-6)

    out = tmp_path / "features"
    assert tool("extract_features", "--model", model_dir, "--data", tiny_dataset, "--mask_draws", 0, "--out", out)[0] == 0
    features = open_features(out, "val")
    assert (features.manifest.origin.objective, features.layers) == ("bert", [0, 1, 2])
    last = list(model.residuals(tokens))[-1][1].mean(1)
    np.testing.assert_allclose(features.layer(2, "normed"), last.detach().numpy(), atol=1e-5)


def test_bert_learns_digits(launch: Any, tmp_path: Path) -> None:
    """The recipe of that name, in bf16 on images of handwriting: a quarter of the loss goes in a tenth of its steps."""
    levels = np.repeat(np.rint(np.arange(17) * 255 / 16).astype(np.uint8)[:, None], 3, axis=1)
    palette, _ = fit_colors(levels, np.ones(17, dtype=np.int64), 17)
    write_dataset(tmp_path / "digits", open_source("digits:"), palette, ShardOptions(8))
    words = ["--recipe", "digits_nano_bert_8", "--data", tmp_path / "digits", "--run_dir", tmp_path / "run"]
    words += ["--ds_config", "ds_configs/zero3_bf16.json", "--stop_at_step", "60", "--val_every", "0"]
    succeed(launch(["train.py", *words], ranks=2))
    rows = [row for row in read_json_lines(tmp_path / "run" / "train.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 60]
    assert rows[0]["val_loss"] == pytest.approx(np.log(17), abs=1e-3)
    assert rows[1]["val_loss"] < 0.75 * rows[0]["val_loss"]


@pytest.mark.parametrize(("init", "objective"), [("released", "ar"), ("sparse_transformer", "bert")])
def test_weights_are_drawn_while_they_are_sharded(
    launch: Any, sharded_config: Path, recipe: Recipe, tmp_path: Path, init: str, objective: str
) -> None:
    """On two ranks, each of which holds half of every tensor, the whole ones are those that one process would draw."""
    model = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_px=8, n_vocab=64)
    wide = dataclasses.replace(recipe, model=model, init=init, objective=objective, seed=3)
    (tmp_path / "wide.json").write_text(json.dumps(recipe_to_dict(wide)))
    out = tmp_path / "weights.safetensors"
    succeed(launch([Path(__file__).with_name("fresh_weights.py"), sharded_config, tmp_path / "wide.json", out], ranks=2))
    weights, expected = load_file(out), fresh_model(model, 3, objective, init).state_dict()
    assert weights.keys() == expected.keys()
    table = init_std(model, init)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
        kind = name.removesuffix(".weight").removeprefix("blocks.0.").removeprefix("blocks.1.")
        if "ln_" in kind:
            assert torch.all(weight == 1)
        else:
            assert weight.std().item() == pytest.approx(table[kind], rel=0.3 if kind == "sos" else 0.04), name
