"""The tiny world of the evaluate wing: a model dir over the tiny dataset, and its features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.features.extract import extract, extract_pixels
from igpt_ds.evaluate.features.manifest import FEATURES
from igpt_ds.evaluate.features.network import Network, open_model
from igpt_ds.model.store import fresh_model, save_model


@pytest.fixture(scope="session")
def make_model_dir(tiny_config, tiny_dataset):
    """Makes a model dir for the tiny dataset: make_model_dir(path, n_px=4, objective="ar", ...) -> path."""

    def make(path: Path, n_px: int = 4, n_layer: int = 2, n_embd: int = 16, **changes) -> Path:
        config = dataclasses.replace(tiny_config, n_px=n_px, n_layer=n_layer, n_embd=n_embd)
        model = fresh_model(config, seed=1, objective=changes.get("objective", "ar"))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "ln_" in name:  # gains that differ from 1, so that each norm can be told from the next
                    weight.uniform_(0.5, 1.5, generator=generator)
        info = {"config": model.config, "objective": "ar", "palette_hash": ShardSet(tiny_dataset, "train").palette_hash}
        save_model(path, model.state_dict(), info | {"step": 7, "images_seen": 56} | changes, tiny_dataset / "palette.npy")
        return path

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, make_model_dir) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="session")
def both_splits(tiny_dataset) -> list[ShardSet]:
    return [ShardSet(tiny_dataset, split) for split in ("train", "val")]


@pytest.fixture(scope="session")
def features_dir(tmp_path_factory, model_dir, both_splits) -> Path:
    """Features of the tiny model, every layer and kind; read only."""
    path = tmp_path_factory.mktemp("evaluate") / "features"
    model, origin = open_model(model_dir, both_splits[0])
    extract(path, both_splits, Network(model, batch=7), origin)
    return path


@pytest.fixture(scope="session")
def pixels_dir(tmp_path_factory, both_splits) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "pixels"
    extract_pixels(path, both_splits, batch=5)
    return path


@pytest.fixture
def made_features(tmp_path):
    """Makes a feature directory of given arrays: made_features({"train": (x, y), "val": (x, y)}) -> DIR, layer 0, normed."""

    def make(splits, classes=3, name="made") -> Path:
        path = tmp_path / name
        for split, (features, labels) in splits.items():
            (path / split).mkdir(parents=True)
            np.save(path / split / "layer_00_normed.npy", features.astype(np.float32))
            np.save(path / split / "labels.npy", labels.astype(np.int64))
        width = next(iter(splits.values()))[0].shape[1]
        manifest = {
            "format": FEATURES.name,
            "version": 2,  # which has no sha256
            "dataset": name,
            "weights": "trained",
            "palette_hash": "p",
            "pooling": "mean",
            "model_hash": "m",
            "objective": "ar",
            "step": 1,
            "seed": None,
            "precision": "fp32",
            "dtype": "fp32",
            "model": None,
            "mask_prob": None,
            "mask_seed": None,
            "layers": [0],
            "kinds": ["normed"],
            "n_features": width,
            "splits": {
                split: {"n_images": len(labels), "dataset_hash": split, "mask_draws": 0} for split, (_, labels) in splits.items()
            },
            "classes": [f"class{k}" for k in range(classes)],
        }
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return make
