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

from igpt_ds.config import OBJECTIVES, ModelConfig
from igpt_ds.files import atomic_dir, read_json, sha256_file, write_json
from igpt_ds.model.transformer import Transformer

FORMAT, VERSION = "igpt_ds.model", 1


@dataclass(frozen=True)
class ModelInfo:
    """What a model dir says of itself. model_hash is the sha256 of its model.safetensors."""

    config: ModelConfig
    objective: str  # "ar" or "bert"
    palette_hash: str
    step: int
    images_seen: int
    model_hash: str
    mask_prob: float | None = None  # that a "bert" model was trained with, where it is known
    init: str = "released"  # how its weights were drawn before the first step


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


def read_info(model_dir: Path, objective: str | None = None) -> ModelInfo:
    """Reads config.json of a model dir.

    Args:
        objective: the one that the reader is made for; None for a reader of both.

    Raises:
        ValueError: something is missing or of another version, or the model was trained with the other objective.
    """
    path = model_dir / "config.json"
    values = read_json(path, "model config")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not the config of a model dir; make one with tools/consolidate.py")
    if values.get("version") != VERSION:
        raise ValueError(f"{path} has version {values.get('version')}; this code reads version {VERSION}")
    fields = dataclasses.fields(ModelInfo)
    names = [field.name for field in fields if field.name in values or field.default is dataclasses.MISSING]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}; consolidate the checkpoint again")
    try:
        config = ModelConfig(**values["config"])
    except TypeError as error:
        raise ValueError(f"{path} holds no model shape: {error}; consolidate the checkpoint again") from None
    info = ModelInfo(**{name: values[name] for name in names} | {"config": config})
    if info.objective not in OBJECTIVES:
        raise ValueError(
            f"{path} has objective {info.objective!r}; known: {', '.join(OBJECTIVES)}; read it with the code that wrote it"
        )
    if objective not in (None, info.objective):
        raise ValueError(
            f"{model_dir} was trained with objective {info.objective!r}, and this needs {objective!r}; name another model"
        )
    return info


def load_model(model_dir: Path, objective: str | None = None) -> tuple[Transformer, ModelInfo]:
    """The model in float32 on the CPU, in eval mode, with its info.

    Args:
        objective: the one that the reader is made for; None for a reader of both.

    Raises:
        ValueError: it has the other objective; its weights are torn, were changed after they were written, or do not fit it.
    """
    info = read_info(model_dir, objective)
    path = model_dir / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{path} does not exist; consolidate the checkpoint again")
    if sha256_file(path) != info.model_hash:
        raise ValueError(f"{path} is not the file that config.json describes (sha256 differs); consolidate again")
    with torch.device("meta"):
        model = Transformer(info.config, objective=info.objective)
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {model_dir / 'config.json'}: {reason}") from None
    return model.eval(), info


def fresh_model(config: ModelConfig, seed: int, objective: str = "ar", init: str = "released") -> Transformer:
    """An untrained model, as training would start it from this seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config, objective=objective, init=init).eval()
