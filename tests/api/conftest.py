"""The tiny world of the API: a model dir over the tiny dataset, its directory's tools, and a model with a class head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.model.store import fresh_model, save_model


@pytest.fixture(scope="session")
def make_model_dir(tiny_config: ModelConfig, tiny_dataset: Path) -> Callable[..., Path]:
    """make_model_dir(path, objective="ar", ...) -> path; gains and a head that differ from those of a fresh model."""

    def make(path: Path, **changes: object) -> Path:
        model = fresh_model(tiny_config, seed=1, objective=str(changes.get("objective", "ar")))
        weights, generator = model.state_dict(), torch.Generator().manual_seed(2)
        for name, weight in weights.items():
            if "ln_" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            elif name == "head.weight":
                weight.normal_(generator=generator)
        if "class_head" in changes:
            weights["class_head.weight"] = torch.randn(3, tiny_config.n_embd, generator=generator)
        info = {"config": tiny_config, "objective": "ar", "palette_hash": ShardSet(tiny_dataset, "train").palette_hash}
        info |= {"step": 7, "images_seen": 56, "recipe": "tiny"} | changes
        save_model(path, weights, info, tiny_dataset / "palette.npy")
        return path

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path]) -> Path:
    """An auto-regressive model dir; read only."""
    return make_model_dir(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path]) -> Path:
    """A BERT model dir; read only."""
    return make_model_dir(tmp_path_factory.mktemp("api") / "bert", objective="bert", mask_prob=0.4)


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path]) -> Path:
    """A fine-tuned model dir; read only."""
    head = {"classes": ["blue", "green", "red"], "layer": 1, "loss": "joint"}
    return make_model_dir(tmp_path_factory.mktemp("api") / "fine", class_head=head)
