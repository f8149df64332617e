"""What a run shows on the console. In: a run, its images and what it measures. Out: about ten lines, then one row a log interval.

RUN_DIR has everything in full: run.json the recipe and the ds_config, ds_config.effective.json the values that DeepSpeed uses,
train.jsonl every measured value. Called by train/session.py and train/metrics.py, on rank 0.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from igpt_ds.config import Recipe
from igpt_ds.console import clock, count
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.streaming import ShardStream
from igpt_ds.ds_config import Run
from igpt_ds.model.fused import gelu_kernels
from igpt_ds.plan import costs
from igpt_ds.plan.costs import FAST_KEPT
from igpt_ds.train.validation import n_validated, validation_batch

_AUTO = "as often as their cost and the failures so far say, and at the end"
_NO_VALIDATION = "none, because the validation images are trained on; the last step counts"
_COLUMNS = (("loss", 9), ("val", 9), ("lr", 10), ("images/s", 10), ("elapsed", 9), ("left", 9))


def introduction(
    args: argparse.Namespace, run: Run, images: Mixture | ShardStream, val_shards: ShardSet | None, note: str = ""
) -> list[str]:
    """The model, the data, the batch, the precision and the schedule, a line each, and a note."""
    recipe, shape = run.recipe, run.recipe.model
    weights = costs.parameters(shape, recipe.objective)
    model = f"{count(shape.n_layer, 'layer')}, {count(shape.n_head, 'head')}, width {shape.n_embd}, {weights:,} parameters"
    groups, parts = run.world_size // run.sequence_parallel, run.sequence_parallel
    ranks = count(groups, "rank") if parts == 1 else f"{count(groups, 'group')} of {parts} ranks"
    facts, held_out = images.facts(), "none for validation"
    if val_shards is not None:
        n_val, n_split = n_validated(val_shards, args.val_images), val_shards.n_images
        part = f" of {n_split:,}" if n_val < n_split else ""
        at_once = f"{validation_batch(run, val_shards, args.val_images)} at once"
        held_out = f"{n_val:,}{part} for validation ({val_shards.split}{', evenly spread' if part else ''}, {at_once})"
    of_split = "" if facts.split in (None, "train") else f" of {facts.split}"
    views = f" in {images.n_images:,} stored views" if images.n_originals < images.n_images else ""
    shown = f"{count(images.n_originals, 'image')}{of_split}{views}"
    activations = "" if run.activation_checkpointing == "none" else f", {run.activation_checkpointing} activation checkpointing"
    return [
        _line("model", f"{recipe.name}: {model}"),
        _line("data", f"{facts.path}: {shown}, {held_out}; {shape.n_px}x{shape.n_px} pixels"),
        _line(
            "batch", f"{recipe.batch_images} images = micro batch {run.micro_batch} x {ranks} x accumulation {run.accumulation}"
        ),
        _line("precision", f"{run.precision}, ZeRO stage {run.stage}{activations} ({args.ds_config})"),
        _line("schedule", _schedule(recipe, images.n_originals)),
        *([_line("note", note)] if note else []),
    ]


def habits(
    run_dir: Path, save_every: int | None, val_every: int | None, keep_last: int, fast: tuple[Path, int] | None = None
) -> list[str]:
    """When the run validates (None: never) and saves (None: --save_every auto), and where its files are.

    Args:
        fast: the fast directory, and the steps between two saves there.
    """
    more = [_line("fast saves", f"every {count(fast[1], 'step')}; the newest {FAST_KEPT} stay in {fast[0]}")] if fast else []
    kept = f"the newest {keep_last} stay" if keep_last > 1 else "the newest stays"
    return [
        _line("validation", f"first, {_every(val_every)}" if val_every is not None else _NO_VALIDATION),
        _line("checkpoints", f"{_AUTO if save_every is None else _every(save_every)}; {kept} in {run_dir / 'checkpoints'}"),
        *more,
        _line("logs", f"{run_dir}: run.json and ds_config.effective.json (all settings), train.jsonl, tensorboard"),
    ]


def device_line(run: Run, device: torch.device, peak: float, source: str, attention: str) -> str:
    """The devices, their speed together, and the kernels that were chosen."""
    speed = f"{peak / 1e12:.2f} TFLOP/s over {count(run.world_size, 'rank')} ({source})"
    gelu = "" if device.type == "cpu" else f", quick-GELU by {'Triton' if gelu_kernels(device) else 'torch'}"
    return _line("device", f"{speed}; attention by torch's {attention} kernel on {device.type}{gelu}")


def precision_note(other: str, ratio: float) -> str:
    """The advice to train in another precision, in which a block was measured to be `ratio` times as fast."""
    return _line(
        "note", f"a block takes {ratio:.1f} times as long as in {other} on this processor: try --ds_config zero3_{other}"
    )


def _every(steps: int) -> str:
    often = "" if not steps else "every step and " if steps == 1 else f"every {steps:,} steps and "
    return f"{often}at the end"


def _line(name: str, text: str) -> str:
    return f"{name:<13}{text}"


def _schedule(recipe: Recipe, n_images: int) -> str:
    epochs = recipe.steps * recipe.batch_images / max(1, n_images)
    later = "then constant" if recipe.finetune is not None else "then a cosine to 0"
    rate = f"lr {recipe.lr:g}, {count(recipe.warmup_steps, 'warm-up step')}, {later}"
    return f"{count(recipe.steps, 'step')} = {epochs:.3g} epochs; {rate}"


class Table:
    """The rows of the loop's console table, with the time that has passed and the time that is left.

    Args:
        steps: all steps of the run.
        start_step: completed steps at the start.
    """

    def __init__(self, steps: int, start_step: int) -> None:
        self.steps, self.start = steps, time.monotonic()
        self.width = max(len("step"), 2 * len(str(steps)) + 1)
        self._first = (start_step, self.start)
        self._started = start_step

    def heading(self, recipe: Recipe) -> list[str]:
        """What the losses mean, and the names of the columns."""
        uniform = f"in nats per token; a uniform guess has {math.log(recipe.model.n_vocab):.4f}"
        meaning = uniform if recipe.finetune is None else f"in nats; {recipe.finetune.loss} loss"
        return [_line("loss", meaning), "", self._row("step", {name: name for name, _ in _COLUMNS})]

    def rewind(self, step: int) -> None:
        """The run went back to a step."""
        self._first = (step, time.monotonic())
        self._started = step

    def training(self, step: int, loss: float, lr: float, images_per_s: float, batch_images: int) -> str:
        """A training row. The time left counts validations and saves as well, from the second row on."""
        now = time.monotonic()
        seconds, (begun, since) = batch_images / images_per_s, self._first
        if begun == self._started:  # the first row: later ones leave out its slow first steps
            self._first = (step, now)
        else:
            seconds = (now - since) / max(1, step - begun)
        left = clock(seconds * (self.steps - step))
        speed = f"{images_per_s:,.1f}" if images_per_s < 1000 else f"{images_per_s:,.0f}"
        cells = {"loss": f"{loss:.4f}", "lr": f"{lr:.2e}", "images/s": speed, "elapsed": clock(now - self.start), "left": left}
        return self._row(f"{step}/{self.steps}", cells)

    def validation(self, step: int, val_loss: float) -> str:
        """A validation row."""
        cells = {"val": f"{val_loss:.4f}", "elapsed": clock(time.monotonic() - self.start)}
        return self._row(f"{step}/{self.steps}", cells)

    def _row(self, step: str, cells: dict[str, str]) -> str:
        return (step.rjust(self.width) + "".join(cells.get(name, "").rjust(width) for name, width in _COLUMNS)).rstrip()
