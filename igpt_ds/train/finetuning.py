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
from igpt_ds.config import Finetune, Recipe, get_recipe, recipe_from_dict
from igpt_ds.data.loader import Batch
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index
from igpt_ds.errors import InputError
from igpt_ds.model.classifier import class_loss, total
from igpt_ds.model.store import ModelInfo, read_info
from igpt_ds.train.engine import LossFunction, with_dropout
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.finetune_flags import EPOCHS, LABEL_STEPS
from igpt_ds.train.run_dir import has_begun, read_recipe, read_run
from igpt_ds.train.schedule import shorter_warmup
from igpt_ds.train.validation import VALIDATION_SEED, split_means


def finetuning_loss(recipe: Recipe) -> LossFunction:
    """The mean over images of gen_loss + clf_loss, or of one of them. An image's position in the stream seeds its masks."""
    finetune = recipe.finetune
    assert finetune is not None
    losses = class_loss(finetune, recipe.model, recipe.objective, recipe.seed, recipe.mask_prob, dist.sequence_group())

    def loss(engine: Engine, batch: Batch) -> torch.Tensor:
        gen, clf, _ = losses(with_dropout(engine, recipe, batch), batch.tokens, batch.labels, batch.positions)
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


def last_step(args: argparse.Namespace, n_images: int) -> int:
    """The steps of --steps or --epochs; --labels without either trains for LABEL_STEPS steps at least."""
    if args.steps is not None:
        return int(args.steps)
    steps = math.ceil((EPOCHS if args.epochs is None else args.epochs) * n_images / args.batch_images)
    return max(steps, LABEL_STEPS) if args.labels is not None and args.epochs is None else steps


def usual_epoch(args: argparse.Namespace, steps: int, n_images: int) -> int:
    """The steps of an epoch, or with --labels of a twentieth of the run if that is longer."""
    epoch = math.ceil(n_images / args.batch_images)
    return epoch if args.labels is None else max(epoch, steps // EPOCHS)


def warmup_steps(args: argparse.Namespace, steps: int, n_images: int) -> int:
    """The steps of --warmup_epochs. Without that flag the `usual_epoch`, or in a run that is shorter a twentieth of the run.

    Raises:
        ValueError: --warmup_epochs is longer than the run.
    """
    if args.warmup_epochs is None:
        found = usual_epoch(args, steps, n_images)
        return found if found <= steps else shorter_warmup(found, steps, EPOCHS * found)
    found = math.ceil(args.warmup_epochs * n_images / args.batch_images)
    if found <= steps:
        return found
    raise InputError(
        f"--warmup_epochs {args.warmup_epochs:g} of {n_images} images is {found} steps, more than the run's {steps}; shorten it"
    )


def of_subset(args: argparse.Namespace, number: int, images: Mixture) -> argparse.Namespace:
    """The flags of the run of one subset."""
    run_dir = args.run_dir / f"subset-{number}"
    one = argparse.Namespace(**(vars(args) | {"run_dir": run_dir, "results": args.results and run_dir / "results.jsonl"}))
    if one.val_every is None:
        one.val_every = usual_epoch(args, last_step(args, images.n_originals), images.n_originals)
    return one


def validations(args: argparse.Namespace, n_images: int) -> tuple[int, int]:
    """The images of a validation and the steps between two, for a plan; n_images are those of the training split."""
    split = read_index(args.data).splits.get(args.val_split)
    n_split = 1 if split is None else split.n_images
    epoch = usual_epoch(args, last_step(args, n_images), n_images)
    return min(n_split, args.val_images or n_split), epoch if args.val_every is None else args.val_every


def as_begun(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe of a run that `--resume auto` continues keeps its warm-up and its loss where no flag gives them.

    Earlier versions chose them otherwise: a warm-up as long as the run where an epoch is longer, and the joint loss from scratch.
    """
    if args.resume != "auto" or not has_begun(args.run_dir):
        return recipe
    begun = recipe_from_dict(read_run(args.run_dir)["recipe"], str(args.run_dir / "run.json"))
    if args.warmup_epochs is None and begun.steps == recipe.steps:
        recipe = dataclasses.replace(recipe, warmup_steps=begun.warmup_steps)
    if args.loss is None and begun.finetune is not None and begun.finetune.loss == "joint":
        assert recipe.finetune is not None
        recipe = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, loss="joint"))
    return recipe


def finetune_recipe(args: argparse.Namespace, info: ModelInfo, n_images: int, n_classes: int) -> Recipe:
    """The recipe of the fine-tuning.

    Args:
        info: the result of `starting_point`.
        n_images: images of the training split. The stored views of an image count once.

    Raises:
        ValueError: a value is out of range, or the shards have no classes.
    """
    steps = last_step(args, n_images)
    layer = info.config.n_layer if args.layer is None else args.layer
    start = info.model_hash if args.untrained is None else ""
    loss = args.loss or ("joint" if args.untrained is None else "clf")  # paper 2.3, 4.5
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
        dropout=args.dropout,
        weight_decay=args.weight_decay,
        head_std=args.head_std,
        augment_pad=args.augment_pad,
        augment_flip=args.augment_flip,
        seed=args.seed if args.untrained is None else args.untrained,
        finetune=Finetune(n_classes, layer, start, loss, args.gen_scale),
    )
    return as_begun(args, recipe if info.mask_prob is None else dataclasses.replace(recipe, mask_prob=info.mask_prob))
