"""What fine-tuning adds to the loop (paper 2.3): its loss and its validation.

gen_loss and clf_loss come from one pass through a `Classifier`; batches carry labels. Called by finetune.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from igpt_ds import dist
from igpt_ds.config import Recipe
from igpt_ds.data.loader import Batch
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.model.classifier import class_loss, total
from igpt_ds.train.engine import LossFunction
from igpt_ds.train.engine_protocol import Engine
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
