"""The model dir: a trained transformer as three plain files, written by consolidation and read by every offline tool.

config.json holds the shape and what a reader must check; model.safetensors the float32 weights; palette.npy the colours
that the tokens stand for.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt_ds.config import ModelConfig
from igpt_ds.files import atomic_dir, read_json, sha256_file, write_json
from igpt_ds.model.transformer import Transformer

FORMAT, VERSION = "igpt_ds.model", 1


@dataclass(frozen=True)
class ModelInfo:
    """What a model dir says of itself. model_hash is the sha256 of its model.safetensors."""

    config: ModelConfig
    objective: str
    palette_hash: str
    step: int
    images_seen: int
    model_hash: str


def save_model(model_dir: Path, weights: dict[str, Tensor], info: dict[str, Any], palette: Path) -> None:
    """Writes a model dir, whole or not at all.

    Args:
        weights: the float32 state dict of a Transformer.
        info: the fields of ModelInfo except model_hash, which is taken from the written file.
        palette: the palette file to carry along.
    """
    with atomic_dir(model_dir) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / "model.safetensors")
        shutil.copyfile(palette, partial / "palette.npy")
        model_hash = sha256_file(partial / "model.safetensors")
        config = dataclasses.asdict(info["config"])
        header = {"format": FORMAT, "version": VERSION}
        write_json(partial / "config.json", header | info | {"config": config, "model_hash": model_hash})


def read_info(model_dir: Path) -> ModelInfo:
    """Reads config.json of a model dir; a ValueError names what is missing or of another version."""
    path = model_dir / "config.json"
    values = read_json(path, "model config")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not the config of a model dir; make one with tools/consolidate.py")
    if values.get("version") != VERSION:
        raise ValueError(f"{path} has version {values.get('version')}; this code reads version {VERSION}")
    names = [field.name for field in dataclasses.fields(ModelInfo)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}; consolidate the checkpoint again")
    try:
        config = ModelConfig(**values["config"])
    except TypeError as error:
        raise ValueError(f"{path} holds no model shape: {error}; consolidate the checkpoint again") from None
    return ModelInfo(**{name: values[name] for name in names} | {"config": config})


def load_model(model_dir: Path) -> tuple[Transformer, ModelInfo]:
    """The model in float32 on the CPU, in eval mode, with its info.

    Raises:
        ValueError: the weights are torn, were changed since they were written, or do not fit the config.
    """
    info = read_info(model_dir)
    path = model_dir / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{path} does not exist; consolidate the checkpoint again")
    if sha256_file(path) != info.model_hash:
        raise ValueError(f"{path} is not the file that config.json describes (sha256 differs); consolidate again")
    with torch.device("meta"):
        model = Transformer(info.config)
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {model_dir / 'config.json'}: {reason}") from None
    return model.eval(), info


def fresh_model(config: ModelConfig, seed: int) -> Transformer:
    """An untrained model, as training would start it from this seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config).eval()
