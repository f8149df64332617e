"""Makes a model dir from a sharded checkpoint. In: RUN_DIR/checkpoints and palette.npy. Out: the files of `model/store.py`.

It needs no GPU, no DeepSpeed and no process group. Its memory does not depend on the size of the model. Called by
tools/consolidate.py and, for the best step of a fine-tuning, by finetune.py.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.palette import load_palette
from igpt_ds.data.shards.index import read_index
from igpt_ds.errors import InputError
from igpt_ds.files import reserved
from igpt_ds.json_files import read_json, read_json_lines
from igpt_ds.model.card import CardFacts
from igpt_ds.model.classifier import Classifier
from igpt_ds.model.store import WeightStream, read_info, save_model
from igpt_ds.model.transformer import Transformer
from igpt_ds.schema import to_json
from igpt_ds.train.checkpoint.directory import choose_checkpoint, newest_checkpoint
from igpt_ds.train.checkpoint.manifest import Checkpoint, Manifest
from igpt_ds.train.checkpoint.zero_layout import ZeroCheckpoint

_OF_DATA = ("crop", "resize_filter")  # read where the training data lies, if it is still there
_LATER = ("warmup_steps", "clip")  # of a class head's training; older code did not record them
_KNOBS = ("head_std", "dropout", "weight_decay")  # older code had none of them


def consolidate(run_dir: Path, out: Path, step: int | None = None) -> tuple[int, int]:
    """Gathers a checkpoint into a model dir.

    Args:
        step: the step of the checkpoint; None: the best so far of a fine-tuning, otherwise the newest complete one.

    Returns:
        Its step and number of parameters.

    Raises:
        ValueError: the checkpoint is missing or damaged, the palette differs, or the tensors do not match the recipe.
    """
    with reserved(out):  # refuses a taken name before the files are read
        return _gather(run_dir, out, choose_checkpoint(run_dir, step, best=True))


def _gather(run_dir: Path, out: Path, checkpoint: Checkpoint) -> tuple[int, int]:
    manifest, palette = checkpoint.manifest, run_dir / "palette.npy"
    if load_palette(palette).hash != manifest.data.palette_hash:
        raise InputError(f"{palette} is not the palette of the training shards; copy theirs to {run_dir}")
    source = ZeroCheckpoint(checkpoint.path, manifest.world_size, manifest.stage)
    if source.shapes != _shapes(manifest.recipe):
        raise InputError(f"{checkpoint.path} does not hold the tensors of its own recipe; it was written by other code")
    save_model(out, WeightStream(source.shapes, source.blocks), _info(manifest), palette, card_facts(run_dir, manifest))
    return manifest.step, sum(shape.numel() for shape in source.shapes.values())


def card_facts(run_dir: Path, manifest: Manifest) -> CardFacts:
    """What the model card says of the images and the last validation of a checkpoint. What cannot be read is not said."""
    if manifest.finetune is not None:
        return CardFacts(manifest.finetune.dataset, manifest.finetune.n_train)
    datasets = manifest.data.datasets or ()
    names = " + ".join(_name_of(Path(one.path)) for one in datasets) or None
    rows: list[dict[str, Any]] = []
    with suppress(InputError):
        rows = [row for row in read_json_lines(run_dir / "train.jsonl") if "val_loss" in row and row["step"] <= manifest.step]
    last = rows[-1] if rows else {}
    return CardFacts(names, sum(one.n_images for one in datasets) or None, last.get("val_loss"), last.get("step"))


def _name_of(shards: Path) -> str:
    with suppress(InputError, OSError):
        return read_index(shards).name
    return shards.name


def _best_step(manifest: Manifest) -> int | None:
    early = manifest.guards.early
    return None if early is None else early.best_step


def check_own(out: Path, run_dir: Path, ended: bool) -> None:
    """Refuses a model dir of another run.

    Args:
        ended: whether the run has ended. Then the model must be that of the best step; before, another step may become the best.

    Raises:
        ValueError: it is no model dir, the run has no checkpoint yet, the shape, start, learning rate or another value differs
            (the first difference is named), or the model is of an earlier step.
    """
    read_info(out)
    other, fix = f"--out {out} holds the model of another run", "choose another, or remove it"
    newest = newest_checkpoint(run_dir / "checkpoints")
    if newest is None:
        raise InputError(f"{other}: {run_dir} has no checkpoint yet; {fix}")
    manifest = newest.manifest
    ours = json.loads(json.dumps(_info(manifest), default=ModelConfig.to_dict))
    theirs = read_json(out / "config.json", "model config")
    for name, here in (ours | (ours.get("class_head") or {})).items():
        older = here if name in _LATER else 0.0 if name in _KNOBS else None
        there = (theirs | (theirs.get("class_head") or {})).get(name, older)
        if name not in ("class_head", "step", "images_seen", *_OF_DATA) and there != here:
            raise InputError(f"{other}: {name} is {there} there and {here} here; {fix}")
    best = _best_step(manifest) or manifest.step
    if ended and theirs["step"] != best:
        raise InputError(
            f"--out {out} is of step {theirs['step']}, and step {best} is the best by now; remove it and start again"
        )


def _info(manifest: Manifest) -> dict[str, object]:
    """The config.json of the model dir, without its hashes."""
    recipe = manifest.recipe
    info: dict[str, object] = {
        "config": recipe.model,
        "recipe": recipe.name,
        "objective": recipe.objective,
        "mask_prob": recipe.mask_prob if recipe.objective == "bert" else None,
        "init": recipe.init,
        **{name: getattr(recipe, name) for name in _KNOBS},
        "palette_hash": manifest.data.palette_hash,
        "dataset_hash": manifest.data.dataset_hash,
        "step": manifest.step,
        "images_seen": manifest.images_seen,
        **_preparation(manifest.data),
    }
    return info if recipe.finetune is None else info | {"class_head": _class_head(manifest)}


def _preparation(data: DataFacts) -> dict[str, str]:
    """The crop and the filter of other images for the model: those of its training images, "center" where those were random."""
    directory = Path(data.datasets[0].path if data.datasets else data.path)
    try:
        index = read_index(directory)
    except (InputError, OSError):  # moved, or a stream's
        return {}
    if index.palette_hash != data.palette_hash:
        return {}
    crop = "center" if index.crop == "random" else index.crop
    return {name: value for name, value in zip(_OF_DATA, (crop, index.filter), strict=True) if value is not None}


def _shapes(recipe: Recipe) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = (
            Transformer(recipe.model, objective=recipe.objective)
            if recipe.finetune is None
            else Classifier(recipe.model, recipe.finetune.n_classes, recipe.finetune.layer, objective=recipe.objective)
        )
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _class_head(manifest: Manifest) -> dict[str, object]:
    """What a reader of the head must know, and how it was trained: what a results row says about a fine-tuning."""
    recipe, finetune = manifest.recipe, manifest.recipe.finetune
    assert finetune is not None
    names = ("lr", "batch_images", "seed", "augment_pad", "augment_flip", *_LATER)
    trained = {name: getattr(recipe, name) for name in names}
    kept = {"loss": finetune.loss, "gen_scale": finetune.gen_scale, "start": finetune.start, "precision": manifest.precision}
    return {"classes": [], "layer": finetune.layer} | (to_json(manifest.finetune) if manifest.finetune else {}) | trained | kept
