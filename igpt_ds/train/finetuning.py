"""What fine-tuning adds to the loop (paper 2.3): its start, its recipe, its loss and its validation.

gen_loss and clf_loss come from one pass through a `Classifier`; batches carry labels. Called by finetune.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable

import torch

from igpt_ds import dist
from igpt_ds.config import Finetune, Recipe, get_recipe
from igpt_ds.data.loader import Batch
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.model.classifier import class_loss, total
from igpt_ds.model.store import ModelInfo, read_info
from igpt_ds.train.engine import LossFunction
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.finetune_flags import EPOCHS
from igpt_ds.train.run_dir import read_recipe
from igpt_ds.train.schedule import shorter_warmup
from igpt_ds.train.validation import VALIDATION_SEED, split_means


def finetuning_loss(recipe: Recipe) -> LossFunction:
    """The mean over images of gen_loss + clf_loss, or of one of them. An image's position in the stream seeds its mask."""
    finetune = recipe.finetune
    assert finetune is not None
    losses = class_loss(finetune, recipe.model, recipe.objective, recipe.seed, recipe.mask_prob, dist.sequence_group())

    def loss(engine: Engine, batch: Batch) -> torch.Tensor:
        gen, clf, _ = losses(engine, batch.tokens, batch.labels, batch.positions)
        return total(finetune, gen, clf).mean()

    return loss


def measure(
    engine: Engine,
    recipe: Recipe,
    shards: ShardSet,
    micro_batch: int,
    val_images: int | None,
    go_on: Callable[[torch.device], bool] = lambda device: True,
) -> dict[str, float] | None:
    """Loss and accuracy over val_images of the split, evenly spread (None: all), without augmentation.

    "bert" masks each image once. The image's number seeds the mask, which is the same at every step, on any ranks, for any seed.

    Args:
        go_on: called before every batch, with the same answer on all ranks; if it is False, the result is None.

    Returns:
        "val_loss" as it is minimised, "val_accuracy" in 0..1, "val_clf_loss" in nats per image, and "val_gen_loss" on the scale
        of gen_scale, except for loss "clf".
    """
    finetune = recipe.finetune
    assert finetune is not None
    losses = class_loss(finetune, recipe.model, recipe.objective, VALIDATION_SEED, recipe.mask_prob, dist.sequence_group())

    def values(tokens: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        gen, clf, logits = losses(engine, tokens, labels, ids)
        return torch.stack(
            [total(finetune, gen, clf), logits.argmax(1) == labels, clf, torch.zeros_like(clf) if gen is None else gen]
        )

    means = split_means(engine, shards, micro_batch, val_images, values, go_on)
    if means is None:
        return None
    measured = dict(zip(("val_loss", "val_accuracy", "val_clf_loss", "val_gen_loss"), means, strict=True))
    if finetune.loss == "clf":
        del measured["val_gen_loss"]
    return measured


def starting_point(args: argparse.Namespace) -> ModelInfo:
    """The shape and objective of --model, or of --recipe or --config, whose model_hash is "".

    Raises:
        ValueError: there is no such model dir or recipe, or the file holds none.
    """
    if args.model is not None:
        return read_info(args.model)
    recipe = get_recipe(args.recipe) if args.recipe is not None else read_recipe(args.config)
    return ModelInfo(recipe.model, recipe.objective, "", 0, 0, "", recipe.mask_prob, recipe.init)


def warmup_steps(args: argparse.Namespace, steps: int, n_images: int) -> int:
    """The steps of --warmup_epochs. Without that flag an epoch, or in a run that is shorter a twentieth of the run.

    Raises:
        ValueError: --warmup_epochs is longer than the run.
    """
    found = math.ceil((1.0 if args.warmup_epochs is None else args.warmup_epochs) * n_images / args.batch_images)
    if args.warmup_epochs is None:
        return found if found <= steps else shorter_warmup(found, steps, EPOCHS * found)
    if found <= steps:
        return found
    raise InputError(
        f"--warmup_epochs {args.warmup_epochs:g} of {n_images} images is {found} steps, more than the run's {steps}; shorten it"
    )


def finetune_recipe(args: argparse.Namespace, info: ModelInfo, n_images: int, n_classes: int) -> Recipe:
    """The recipe of the fine-tuning.

    Args:
        info: the result of `starting_point`.
        n_images: images of the training split. If each image is stored as several crops, each crop counts.

    Raises:
        ValueError: a value is out of range, or the shards have no classes.
    """
    steps = math.ceil(args.epochs * n_images / args.batch_images) if args.steps is None else args.steps
    layer = info.config.n_layer if args.layer is None else args.layer
    start = info.model_hash if args.untrained is None else ""
    recipe = Recipe(
        "finetune",
        info.config,
        args.batch_images,
        steps,
        args.lr,
        warmup_steps(args, steps, n_images),
        info.objective,
        init=info.init,
        spike_sigmas=args.spike_sigmas,
        clip=args.clip,
        augment_pad=args.augment_pad,
        augment_flip=args.augment_flip,
        seed=args.seed if args.untrained is None else args.untrained,
        finetune=Finetune(n_classes, layer, start, args.loss, args.gen_scale),
    )
    return recipe if info.mask_prob is None else dataclasses.replace(recipe, mask_prob=info.mask_prob)
