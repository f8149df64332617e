"""Validation. In: an engine and open shards. Out: means over a split's images, the same on every rank.

A validation reads a part of a large split, always the same images, and more at once than a training step, for it keeps nothing
for a backward pass.

Called by train.py and train/finetuning.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from igpt_ds import dist
from igpt_ds.config import Recipe
from igpt_ds.data.loader import one_pass
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import folded
from igpt_ds.ds_config import Run
from igpt_ds.model.objectives import image_loss
from igpt_ds.plan import costs
from igpt_ds.plan.estimate import rank_layout
from igpt_ds.train.engine_protocol import Engine

VALIDATION_SEED = 0  # for the masks of every run, so that the validation losses of two runs compare


def validation_images(path: Path, val_split: str, train_split: str) -> ShardSet | None:
    """The split that validation reads; None if they are among the training images, so that nothing is left to validate on."""
    return None if folded(val_split, train_split) else ShardSet(path, val_split)


def n_validated(shards: ShardSet, val_images: int | None) -> int:
    """The number of images that validation reads: val_images (None: all), or the whole split if it is smaller."""
    return min(shards.n_images, val_images or shards.n_images)


def validation_batch(run: Run, shards: ShardSet, val_images: int | None) -> int:
    """The images that a rank, or a sequence group, validates at once, as the plan counts them."""
    return costs.validation_batch(run.recipe.model, rank_layout(run), n_validated(shards, val_images))


def validation_loss(
    engine: Engine,
    recipe: Recipe,
    shards: ShardSet,
    micro_batch: int,
    val_images: int | None,
    go_on: Callable[[torch.device], bool] = lambda device: True,
) -> float | None:
    """The mean loss in nats per token over val_images of the split, evenly spread (None: all), without augmentation.

    Every rank makes the same number of forward passes, as ZeRO-3 requires. The result is the same for any number of ranks, up to
    rounding. An image's number in the split seeds its mask, so the masks are the same at every step, on any ranks, for any seed.

    Args:
        go_on: called before every batch, with the same answer on all ranks; if it is False, the result is None.
    """
    image_nats = image_loss(recipe.objective, VALIDATION_SEED, recipe.mask_prob, dist.sequence_group())

    def nats(tokens: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return image_nats(engine, tokens, ids)[None]

    means = split_means(engine, shards, micro_batch, val_images, nats, go_on)
    return None if means is None else means[0]


def split_means(
    engine: Engine,
    shards: ShardSet,
    micro_batch: int,
    n_images: int | None,
    values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    go_on: Callable[[torch.device], bool],
) -> list[float] | None:
    """The means of some values over n_images of a split, evenly spread (None: all), the same on every rank.

    Every rank makes the same number of forward passes, as ZeRO-3 requires.

    Args:
        values: a function of tokens [B, T], labels [B] and the images' numbers in the split [B]; returns [values, B].
        go_on: called before every batch, with the same answer on all ranks; if it is False, the result is None.
    """
    engine.eval()
    sums: torch.Tensor | float = 0.0
    with torch.no_grad():
        for ids, weight in one_pass(shards.n_images, micro_batch, dist.data_rank(), dist.data_world_size(), n_images):
            if not go_on(engine.device):
                engine.train()
                return None
            grids, classes = shards.read(ids)
            tokens = torch.from_numpy(grids.reshape(micro_batch, -1)).to(engine.device).long()
            found = values(tokens, torch.from_numpy(classes).to(engine.device), torch.from_numpy(ids)).double()
            sums += (torch.cat([found, torch.ones_like(found[:1])]) * weight.to(engine.device)).sum(1)
    engine.train()
    assert isinstance(sums, torch.Tensor), "one_pass gives every rank a batch"
    *totals, count = dist.sum_over_ranks(sums).tolist()
    return [total / count for total in totals]
