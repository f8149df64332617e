"""The step loop: engine and batches enter, a trained engine, curves and checkpoints leave. Called by train.py and finetune.py.

The loop is the same for every objective: what differs is the loss function it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.config import Recipe
from igpt_ds.data.loader import Batches
from igpt_ds.ds_config import Run
from igpt_ds.files import write_json
from igpt_ds.model.objectives import image_loss
from igpt_ds.train.checkpoint.manifest import set_aside_newer
from igpt_ds.train.checkpoint.save_load import load_checkpoint, save_checkpoint
from igpt_ds.train.early import EarlyStop
from igpt_ds.train.engine import LossFunction, take_step
from igpt_ds.train.metrics import Metrics
from igpt_ds.train.safety.rollback import Range, Stream, good_checkpoint, leave_out, range_to_skip, record
from igpt_ds.train.safety.spikes import Guard, Verdict, advice
from igpt_ds.train.safety.stops import Stop
from igpt_ds.train.safety.watchdog import Watchdog
from igpt_ds.train.schedule import learning_rate

# What was measured over the validation images, or None as soon as the function it is given (of a device) says no: the mean loss
# in nats per token, or a dict with the loss as "val_loss" and whatever else shall stand in the curves.
Validate = Callable[[Callable[[Any], bool]], float | dict[str, float] | None]


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


@dataclass
class Watch:
    """Who may interrupt the loop, and what it knows of interruptions before."""

    stop: Stop
    watchdog: Watchdog
    guard: Guard
    rollbacks: list[dict[str, Any]]  # of this run so far: RUN_DIR/rollbacks.json
    skipped: list[Range]  # of the stream of images, left out by those
    max_rollbacks: int  # 0: a lost run stops
    skip_images: int | None  # that a rollback leaves out; None: all since the checkpoint
    validate_first: bool  # the step that the run goes on from has not been validated
    early: EarlyStop | None = None  # ends the run by its validations, and keeps the best step's checkpoint

    @property
    def over(self) -> bool:
        """Whether the validations have ended the run."""
        return self.early is not None and self.early.over

    @property
    def best_step(self) -> int | None:
        """The step with the best validation so far, where somebody keeps it."""
        return None if self.early is None else self.early.best_step

    def protected(self, checkpoints: Path) -> list[int]:
        """The steps whose checkpoints must stay: the best one, and while a doubt lasts the newest from before it. Rank 0 asks."""
        best, since = self.best_step, self.guard.since
        good = None if since is None else good_checkpoint(checkpoints, since, self.rollbacks)
        return [*([] if best is None else [best]), *([] if good is None else [int(good[1]["step"])])]


def fit(
    engine: Any,
    run: Run,
    loader: Batches,
    loss_function: LossFunction,
    validate: Validate,
    metrics: Metrics,
    cadence: Cadence,
    watch: Watch,
    checkpoints: Path,
    facts: dict[str, Any],
    start_step: int,
) -> str:
    """Trains from start_step (completed steps) to cadence.last_step, or until somebody wants it to stop.

    Args:
        validate: what the validation found, or None when the stop that it is given to ask broke it off.
        facts: what every checkpoint's manifest says besides step, images_seen, guards and skipped_ranges.

    Returns:
        Why it stopped early (`Stop.reason`), everything being saved; "" at the last step, or where `Watch.early` is over.

    Raises:
        SharedError: the run is lost.
    """
    stop, guard = watch.stop, watch.guard
    stream = Stream(loader, run.recipe.batch_images, run.accumulation)
    step, saved, save_due, unvalidated = start_step, start_step, False, watch.validate_first
    if not stop.now(engine.device) and unvalidated:
        unvalidated = not validated(validate, metrics, watch, step)
    while step < cadence.last_step and not stop.reason and not watch.over:
        step += 1
        loss, lr, skipped = one_step(engine, run, stream, loss_function, watch, metrics, step)
        verdict = guard.see(step, loss, skipped)
        if verdict is Verdict.LOST:
            step = saved = go_back(engine, run, watch, checkpoints, facts, step, loss, lr)
            metrics.rewind(step)
            save_due = unvalidated = False
            continue
        if cadence.due(cadence.log_every, step):
            metrics.training(step, loss, lr, float(engine.get_global_grad_norm()), guard.skipped)
        if cadence.due(cadence.val_every, step):
            unvalidated = bool(stop.reason) or not validated(validate, metrics, watch, step, verdict)
        save_due = save_due or cadence.due(cadence.save_every, step) or watch.best_step == step
        ends = bool(stop.reason) or watch.over or step == cadence.last_step
        if ends or (save_due and verdict is Verdict.CALM):  # else when all is calm again
            save(engine, run, watch, metrics, cadence, checkpoints, facts, step, unvalidated)
            saved, save_due = step, False
            stop.now(engine.device)
    stream.close()
    assert saved == step
    return "" if (step == cadence.last_step or watch.over) and not unvalidated else stop.reason


def one_step(
    engine: Any, run: Run, stream: Stream, loss_function: LossFunction, watch: Watch, metrics: Metrics, step: int
) -> tuple[float, float, bool]:
    """Takes step number `step`: (its loss, the mean over all ranks; its learning rate; whether the update was left out)."""
    watch.watchdog.alive("step", step - 1)
    start, skipped_before = time.perf_counter(), engine.skipped_steps
    micro_batches = [batch.to(engine.device) for batch in stream.step(step - 1, watch.skipped)]
    metrics.waited(time.perf_counter() - start)
    lr = learning_rate(run.recipe, step - 1)
    loss = take_step(engine, micro_batches, loss_function, lr)
    total = watch.stop.agree(loss)
    watch.watchdog.alive("step", step, time.perf_counter() - start)
    return total / run.world_size, lr, engine.skipped_steps > skipped_before


def validated(validate: Validate, metrics: Metrics, watch: Watch, step: int, verdict: Verdict = Verdict.CALM) -> bool:
    """Whether the validation came to its end, and is logged. A step in doubt is never the best: it is not saved."""

    def go_on(device: Any) -> bool:
        watch.watchdog.alive("validation", step)
        return not watch.stop.now(device)

    found = validate(go_on)
    if found is None:
        return False
    measured = {"val_loss": found} if isinstance(found, float) else found
    metrics.validation(step, measured["val_loss"], {name: value for name, value in measured.items() if name != "val_loss"})
    if watch.early is not None and verdict is Verdict.CALM:
        watch.early.see(step, measured)
    return True


def save(
    engine: Any,
    run: Run,
    watch: Watch,
    metrics: Metrics,
    cadence: Cadence,
    checkpoints: Path,
    facts: dict[str, Any],
    step: int,
    unvalidated: bool,
) -> None:
    """Saves a checkpoint with what the guards know. images_seen: those trained on; skipped_ranges lie between them."""
    watch.watchdog.alive("save", step)
    start = time.perf_counter()
    early = {} if watch.early is None else {"early": watch.early.state()}
    guards = watch.guard.state() | {"unvalidated": unvalidated} | early
    where = {"step": step, "images_seen": step * run.recipe.batch_images, "skipped_ranges": watch.skipped, "guards": guards}
    protected = dist.from_rank_0(lambda: watch.protected(checkpoints))
    save_checkpoint(engine, checkpoints, facts | where, cadence.keep_last, cadence.keep_every, protected)
    metrics.saved(time.perf_counter() - start)
    metrics.restart_clock(step)


def go_back(
    engine: Any, run: Run, watch: Watch, checkpoints: Path, facts: dict[str, Any], step: int, loss: float, lr: float
) -> int:
    """Back from a lost step to the last good checkpoint, with a range of images left out from now on; returns its step.

    DeepSpeed does not promise that a state may be loaded into an engine that has been used; that what follows is the same as in
    a new one, to the last bit, is tested.

    Raises:
        SharedError: rollbacks were not asked for, or there were enough of them, or there is nothing to go back to.
    """
    guard, run_dir = watch.guard, checkpoints.parent
    since = step if guard.since is None else guard.since
    lost = f"the run is lost at step {step}: its loss is {loss:.4f} at lr {lr:.2e}, and {guard.why}"
    found = dist.from_rank_0(lambda: good_checkpoint(checkpoints, since, watch.rollbacks))
    kept = (
        f"the last good state is {found[0]}"
        if found
        else f"no checkpoint is from before step {max(0, since - 1)}, where it began"
    )
    if found is None or len(watch.rollbacks) >= watch.max_rollbacks:
        report: dict[str, Any] = {"step": step, "since": since, "loss": loss if math.isfinite(loss) else None, "lr": lr}
        report |= {"why": guard.why, "time": time.time()}
        dist.from_rank_0(lambda: write_json(run_dir / "LOST.json", report))
        so_far = len(watch.rollbacks)
        done = f" after {so_far} rollback{'s' * (so_far > 1)}" if so_far else ""
        raise SharedError(f"{lost}{done}; {kept}; {advice(so_far, watch.max_rollbacks, found is not None)}")
    back_to = int(found[1]["step"])
    skip = range_to_skip(step, back_to, watch.skip_images, run.recipe.batch_images, watch.skipped)
    watch.skipped = leave_out(watch.skipped, skip)
    watch.rollbacks = [*watch.rollbacks, {"step": step, "since": since, "back_to": back_to, "skipped": skip, "why": guard.why}]
    dist.from_rank_0(lambda: record(run_dir, watch.rollbacks))
    if dist.rank() == 0:
        print(f"{lost}; back to {found[0]}, without images {skip[0]:,} to {skip[1] - 1:,} of the stream", flush=True)
    watch.watchdog.alive("loading", back_to)
    load_checkpoint(engine, *found, facts)
    guard.restore(found[1].get("guards", {}))
    if watch.early is not None:
        watch.early.restore(found[1].get("guards", {}).get("early", {}))
    dist.from_rank_0(lambda: set_aside_newer(checkpoints, back_to))
    return back_to


def pretraining_loss(recipe: Recipe) -> LossFunction:
    """gen_loss or bert_loss (paper 2.1), in nats per token: the mean over images; masks by an image's position in the stream."""
    nats = image_loss(recipe.objective, recipe.seed, recipe.mask_prob, dist.sequence_group())
    return lambda engine, batch: nats(engine, batch.tokens, batch.positions).mean()
