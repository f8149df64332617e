"""The step loop: engine and batches enter, a trained engine, curves and checkpoints leave. Called by train.py.

The loop is the same for every objective: what differs is the loss function it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.config import Recipe
from igpt_ds.data.loader import Batches, one_pass
from igpt_ds.data.shards import ShardSet
from igpt_ds.ds_config import Run
from igpt_ds.model.objectives import image_loss
from igpt_ds.train.checkpoint import save_checkpoint
from igpt_ds.train.engine import LossFunction, take_step
from igpt_ds.train.metrics import Metrics
from igpt_ds.train.schedule import learning_rate

MAX_SKIPS = 10
VALIDATION_SEED = 0  # of the masks, whatever the run's: the validation losses of two runs compare


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps; 0 for never (the last step always logs, validates and saves)."""

    log_every: int
    val_every: int
    save_every: int
    keep_last: int
    keep_every: int
    last_step: int

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens each `every` steps happens after this one."""
        return step == self.last_step or (every > 0 and step % every == 0)


def fit(
    engine: Any,
    run: Run,
    loader: Batches,
    loss_function: LossFunction,
    validate: Callable[[], float],
    metrics: Metrics,
    cadence: Cadence,
    checkpoints: Path,
    facts: dict[str, Any],
    start_step: int,
) -> None:
    """Trains from start_step (completed steps) to cadence.last_step.

    Args:
        facts: what every checkpoint's manifest says besides step and images_seen.
    """
    recipe = run.recipe
    stream = loader.stream(start_step * recipe.batch_images)
    skips_in_a_row, skipped_before = 0, engine.skipped_steps
    if start_step == 0:
        metrics.validation(0, validate())
    for step in range(start_step + 1, cadence.last_step + 1):
        micro_batches = [next(stream).to(engine.device) for _ in range(run.accumulation)]
        lr = learning_rate(recipe, step - 1)
        loss = take_step(engine, micro_batches, loss_function, lr)
        skips_in_a_row = skips_in_a_row + 1 if engine.skipped_steps > skipped_before else 0
        skipped_before = engine.skipped_steps
        log, save = cadence.due(cadence.log_every, step), cadence.due(cadence.save_every, step)
        if log or save:
            mean_loss = float(dist.sum_over_ranks(loss)) / run.world_size
            refuse_lost_run(mean_loss, skips_in_a_row, step, lr, checkpoints)
        if log:
            metrics.training(step, mean_loss, lr, float(engine.get_global_grad_norm()), engine.skipped_steps)
        if cadence.due(cadence.val_every, step):
            metrics.validation(step, validate())
        if save:
            where = facts | {"step": step, "images_seen": step * recipe.batch_images}
            save_checkpoint(engine, checkpoints, where, cadence.keep_last, cadence.keep_every)
            metrics.restart_clock(step)


def refuse_lost_run(loss: float, skips_in_a_row: int, step: int, lr: float, checkpoints: Path) -> None:
    """Stops a run that learns nothing any more, before a checkpoint of it replaces a good one.

    DeepSpeed skips the update of a step whose gradient is not finite; a few such steps are bad luck, MAX_SKIPS in a row are not.
    """
    if not math.isfinite(loss) or skips_in_a_row >= MAX_SKIPS:
        raise SharedError(
            f"the loss of step {step} is {loss} at lr {lr:.2e}, after {skips_in_a_row} skipped steps in a row; "
            f"the last good state is in {checkpoints}: "
            "start again with a lower --lr (paper A.1: too high a rate gives an irrecoverable spike)"
        )


def pretraining_loss(recipe: Recipe) -> LossFunction:
    """gen_loss or bert_loss (paper 2.1), in nats per token: the mean over images; masks by an image's position in the stream."""
    nats = image_loss(recipe.objective, recipe.seed, recipe.mask_prob)
    return lambda engine, batch: nats(engine, batch.tokens, batch.positions).mean()


def validation_loss(engine: Any, recipe: Recipe, shards: ShardSet, micro_batch: int, val_images: int | None) -> float:
    """The mean nats per token over val_images of the split, evenly spread (None: all), without augmentation.

    Every rank makes the same number of forward passes, as ZeRO-3 needs; the result is the same for any number of ranks up
    to rounding. Masks are drawn by an image's number in the split: the same at every step, on any ranks, for any seed.
    """
    image_nats = image_loss(recipe.objective, VALIDATION_SEED, recipe.mask_prob)
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for ids, weight in one_pass(shards.n_images, micro_batch, dist.rank(), dist.world_size(), val_images):
            tokens = torch.from_numpy(shards.tokens(ids).reshape(micro_batch, -1)).to(engine.device).long()
            weight = weight.to(engine.device)
            nats = image_nats(engine, tokens, torch.from_numpy(ids)).double()
            total += torch.stack([(nats * weight).sum(), weight.sum()])
    engine.train()
    dist.sum_over_ranks(total)
    return float(total[0] / total[1])
