"""The curves of a run: train.jsonl, TensorBoard, the rows on the console and, with --wandb, Weights and Biases. Rank 0 writes.

A training row holds the loss of one step, in nats per token, over the global batch; a validation row holds the mean over the
validation images. `step` counts completed steps and `images_seen` their images. `time` is in seconds since 1970. No step appears
twice.

`slowest_rank` slows the run most: a step takes `slowest_ratio` times as long as if this rank were like the median one
(train/health/pace.py).
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from igpt_ds import dist
from igpt_ds.cli import unread_output
from igpt_ds.console import count
from igpt_ds.devices import current_device
from igpt_ds.ds_config import Run
from igpt_ds.errors import InputError, naming
from igpt_ds.json_files import json_line, read_json_lines, seal, write_json_lines
from igpt_ds.plain_files import open_plain, utf8_path
from igpt_ds.plan.costs import GIB, train_flops_per_token
from igpt_ds.schema import record_from, to_json
from igpt_ds.train.health.pace import Naming, SlowRank, slow_ranks
from igpt_ds.train.health.step_clock import StepClock
from igpt_ds.train.ledger.goodput import Goodput, read_goodput
from igpt_ds.train.peak import utilisation
from igpt_ds.train.screen import Table
from igpt_ds.train.wandb_curves import Value, WandbCurves, curves_of

WAIT = 0.1  # share of the time that rank 0 waits for images: the console says so


@dataclass(frozen=True)
class TrainingRow:
    """A training row of train.jsonl. What is None is left out there."""

    step: int
    images_seen: int
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    tokens_per_s: float
    mfu: float | None  # share of the peak, 0..1; None if more than the peak was measured
    memory_gib: float
    skipped_steps: int  # since step 0
    data_wait: float  # share of the time since the last row that rank 0 waited for images
    save_seconds: float | None = None  # time of saving since the last row; the speed leaves it out
    slowest_rank: int | None = None
    slowest_ratio: float | None = None

    def notes(self) -> str:
        """What is worth a look, after the columns of the console's row; "" if nothing is."""
        parts = []
        if self.skipped_steps:
            parts.append(f"{count(self.skipped_steps, 'step')} skipped")
        if self.data_wait > WAIT:
            parts.append(f"{100 * self.data_wait:.0f} % of the time waiting for data")
        return "".join(f"  {part}" for part in parts)


@dataclass(frozen=True)
class _AnyRow:
    """What every row of train.jsonl has."""

    step: int


class Metrics:
    """Writes what the loop measures. Every rank calls every method; only rank 0 writes.

    Args:
        start_step: later rows, which a killed run left, are dropped.
        peak: FLOP/s of all ranks together.
        wandb_project: the project of Weights and Biases that also shows the curves; None for none.
    """

    def __init__(self, run_dir: Path, run: Run, start_step: int, peak: float, wandb_project: str | None = None) -> None:
        self.run, self.run_dir, self.peak, self.speaks = run, run_dir, peak, dist.rank() == 0
        self.steps, self.naming = StepClock(current_device()), Naming()
        self.restart_clock(start_step)
        self.data_seconds = self.save_seconds = 0.0
        self.board: SummaryWriter | None = None
        if not self.speaks:
            return
        self.table = Table(run.recipe.steps, start_step)
        self.bar = tqdm(total=run.recipe.steps, initial=start_step, unit="step", disable=None)
        dropped = self._open(start_step)
        for line in self.table.heading(run.recipe):
            self._say(line)
        self.wandb = WandbCurves(wandb_project, run_dir, run, dropped) if wandb_project else None

    def _open(self, start_step: int) -> bool:
        """Opens the files without the rows after `start_step`; whether there were any."""
        path = self.run_dir / "train.jsonl"
        rows = [
            (record_from(_AnyRow, row, f"{path} line {number}", "remove the line").step, row)
            for number, row in enumerate(read_json_lines(path), start=1)
        ]
        write_json_lines(path, [seal(row) for step, row in rows if 0 < start_step >= step])
        self.rows = open(path, "a", encoding="utf-8", buffering=1, opener=open_plain)  # noqa: SIM115  (closed in `close`)
        with naming(self.run_dir / "tensorboard"):
            (self.run_dir / "tensorboard").mkdir(exist_ok=True)
            self._board_path = ExitStack()
            name = self._board_path.enter_context(utf8_path(self.run_dir / "tensorboard"))
            self.board = SummaryWriter(name, purge_step=start_step + 1)
        return any(not 0 < start_step >= step for step, _ in rows)

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`, because a rollback returned to it."""
        self.restart_clock(step)
        if self.speaks:
            self._close_files()
            if self._open(step) and self.wandb:
                self.wandb.branch()
            self.table.rewind(step)
            self.bar.n = step
            self.bar.refresh()

    def training(self, step: int, loss: float, lr: float, grad_norm: float, skipped_steps: int) -> None:
        """Logs a completed step and the speed since the last logged one. `loss` may be NaN if the step was skipped."""
        now, recipe = time.perf_counter(), self.run.recipe
        steps, seconds = step - self.clock_step, now - self.clock
        images_per_s = steps * recipe.batch_images / seconds
        tokens_per_s = images_per_s * recipe.model.n_ctx
        flops = tokens_per_s * train_flops_per_token(recipe.model)
        slow = self._slowest_rank()
        row = TrainingRow(
            step=step,
            images_seen=step * recipe.batch_images,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            images_per_s=images_per_s,
            tokens_per_s=tokens_per_s,
            mfu=utilisation(flops, self.peak),
            memory_gib=memory_gib(),
            skipped_steps=skipped_steps,
            data_wait=self.data_seconds / seconds,
            save_seconds=self.save_seconds or None,
            slowest_rank=None if slow is None else slow.rank,
            slowest_ratio=None if slow is None else slow.ratio,
        )
        self.restart_clock(step)
        self.data_seconds = self.save_seconds = 0.0
        if not self.speaks:
            return
        self._write(to_json(row))
        self.bar.update(step - self.bar.n)
        doubt = f"  MFU unknown: {flops:.2e} FLOP/s exceed the peak of {self.peak:.2e}, which must be wrong"
        notes = row.notes() + self.naming.text(slow, now) + (doubt if row.mfu is None else "")
        self._say(self.table.training(step, loss, lr, images_per_s, recipe.batch_images) + notes)

    def validation(self, step: int, val_loss: float, more: Mapping[str, float] | None = None, seconds: float = 0.0) -> None:
        """Logs a validation loss, other measured values and the validation's seconds, which the speed leaves out."""
        if self.speaks:
            row: dict[str, Value] = {"step": step, "images_seen": step * self.run.recipe.batch_images, "val_loss": val_loss}
            self._write(row | dict(more or {}) | {"val_seconds": seconds})
            others = "".join(f"  {name.removeprefix('val_')} {value:.4f}" for name, value in (more or {}).items())
            self._say(self.table.validation(step, val_loss) + others)
        self.restart_clock(step)

    def layers(self, step: int, values: Mapping[str, float]) -> None:
        """Shows what `LayerScales` measured, if anything, in TensorBoard and Weights and Biases."""
        if self.speaks and values:
            self._show({name: value for name, value in values.items() if math.isfinite(value)}, step)

    def _slowest_rank(self) -> SlowRank | None:
        """Of several ranks the slowest; the ranks tell each other their paces."""
        return next(iter(slow_ranks(self.steps.paces())), None) if self.run.world_size > 1 else None

    def timed(self, data: float) -> AbstractContextManager[None]:
        """Times a step from its images to its loss on the host. `data`: seconds that this rank waited for the images."""
        self.data_seconds += data
        return self.steps.step(data)

    def saved(self, seconds: float) -> None:
        """Counts time that saving a checkpoint took."""
        self.save_seconds += seconds

    def saved_beside(self, seconds: float) -> None:
        """Counts time that training waited for a save, in a step or between two. The speed and the pace leave it out."""
        self.saved(seconds)
        self.steps.aside(seconds)
        self.clock += seconds

    def goodput(self, step: int) -> Goodput | None:
        """Shows where the time of the run went so far, in TensorBoard and in Weights and Biases; None where nothing is shown."""
        if self.speaks:
            with suppress(InputError):
                found = read_goodput(self.run_dir, live=True)
                seconds = {f"goodput/{name.replace(' ', '_')}_seconds": value for name, value in found.seconds.items()}
                self._show({"goodput/goodput": found.goodput, **seconds}, step)
                return found
        return None

    def restart_clock(self, step: int) -> None:
        """Starts the time and the steps of the next row's speed, which leaves out validation and saving."""
        self.clock, self.clock_step, self.data_seconds = time.perf_counter(), step, 0.0

    def close(self) -> None:
        """Closes the files, the progress bar and Weights and Biases."""
        if self.speaks:
            self._close_files()
            self.bar.close()
            if self.wandb:
                self.wandb.close()

    def _close_files(self) -> None:
        with naming(self.run_dir / "train.jsonl"):
            self.rows.close()
        with naming(self.run_dir / "tensorboard"):
            if self.board:
                self.board.close()
                self._board_path.close()

    def _write(self, row: dict[str, Value]) -> None:
        known = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
        with naming(self.run_dir / "train.jsonl"):
            self.rows.write(json_line(known | {"time": round(time.time(), 3)}))  # JSON has neither infinity nor NaN
        self._show(curves_of(known), int(row["step"] or 0))

    def _show(self, curves: dict[str, Value], step: int) -> None:
        with naming(self.run_dir / "tensorboard"):  # a thread writes there, and its error is raised here
            for name, value in curves.items():
                if value is not None and self.board:
                    self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(curves, step, step * self.run.recipe.batch_images)

    def _say(self, line: str) -> None:
        with unread_output():
            self.bar.write(line)


def memory_gib() -> float:
    """The peak memory of this rank so far: of its GPU, or of the process if there is none."""
    if current_device().type != "cpu":
        return torch.accelerator.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
