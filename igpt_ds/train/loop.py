"""The step loop. In: engine and batches. Out: a trained engine, curves and checkpoints. Called by train.py and finetune.py.

The loop is the same for every objective; only the loss function differs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.config import Recipe
from igpt_ds.console import count
from igpt_ds.data.loader import Batches
from igpt_ds.json_files import seal, write_json
from igpt_ds.model.objectives import image_loss
from igpt_ds.train.checkpoint.directory import newest_step
from igpt_ds.train.checkpoint.load import load_checkpoint
from igpt_ds.train.checkpoint.manifest import GuardStates, Progress
from igpt_ds.train.checkpoint.save import Kept
from igpt_ds.train.ds_faster import forget_recomputed
from igpt_ds.train.early import EarlyState
from igpt_ds.train.engine import LossFunction, take_step, with_dropout
from igpt_ds.train.ledger.rows import ROLLBACK, SAVE
from igpt_ds.train.safety.rollback import Rollback, good_checkpoint, range_to_skip, write_rollbacks
from igpt_ds.train.safety.spikes import Verdict, advice
from igpt_ds.train.schedule import learning_rate
from igpt_ds.train.session import Session
from igpt_ds.train.stream import Stream, leave_out

# Measures the validation images: the mean loss in nats per token, or the loss as "val_loss" and other values for the curves.
# Its argument says, for a device, whether to go on; if not, the result is None.
Validate = Callable[[Callable[[torch.device], bool]], float | dict[str, float] | None]


COLLECT_EVERY = 100  # steps


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step: the mean loss over all ranks in nats per token, and whether the update was skipped."""

    step: int
    loss: float
    lr: float
    skipped: bool


def fit(session: Session, loader: Batches, loss_function: LossFunction, validate: Validate | None) -> None:
    """Trains to the cadence's last step, or until something stops the run; `Watch.stopped` says what. Everything is saved then.

    Args:
        validate: measures the validation images; returns None when a stop interrupted it. None: there are none.

    Raises:
        SharedError: the loss diverged, and there is no rollback.
    """
    engine, cadence, watch, metrics = session.engine, session.cadence, session.watch, session.metrics
    stop, guard = watch.stop, watch.guard
    stream = Stream(loader, session.run.recipe.batch_images, session.run.accumulation)
    step, save_due, fast_due = session.start_step, False, False
    saved = dist.from_rank_0(lambda: newest_step(session.checkpoints))  # less than `step` after a fast save
    watch.unvalidated = watch.unvalidated and validate is not None
    if not stop.now(engine.device) and watch.unvalidated and validate:
        watch.unvalidated = not validated(session, validate, step)
    while step < cadence.last_step and not stop.reason and not watch.over:
        step += 1
        outcome = one_step(session, stream, loss_function, step)
        if stop.idle:
            finish_save(session, step)
        verdict = guard.see(step, outcome.loss, outcome.skipped)
        if verdict is Verdict.LOST:
            step = saved = go_back(session, outcome)
            metrics.rewind(step)
            save_due = watch.unvalidated = False
            continue
        if cadence.due(cadence.log_every, step):
            metrics.training(step, outcome.loss, outcome.lr, float(engine.get_global_grad_norm()), guard.skipped)
        if validate and cadence.due(cadence.val_every, step):
            watch.unvalidated = bool(stop.reason) or not validated(session, validate, step, verdict)
        save_due = save_due or cadence.due(cadence.save_every, step) or step in (watch.best_step, *cadence.keep_steps)
        save_due = save_due or (session.interval is not None and session.interval.due(step))
        fast_due = session.saver.has_fast and (fast_due or cadence.due(cadence.fast_save_every, step))
        ends = bool(stop.reason) or watch.over or step == cadence.last_step
        if ends or (save_due and verdict is Verdict.CALM):  # during a doubt nothing is saved until the loss is calm again
            save(session, step, wait=ends)
            saved, save_due, fast_due = step, False, False
            stop.now(engine.device)
        elif fast_due and verdict is Verdict.CALM and not session.saver.under_way:
            save(session, step, fast=True)
            fast_due = False
    if saved < step:  # stopped before its first step, at a state of the fast directory, which is removed
        save(session, step, wait=True)
    finish_save(session, step)
    session.saver.close()
    stream.close()
    metrics.close()
    watch.stopped = "" if (step == cadence.last_step or watch.over) and not watch.unvalidated else stop.reason


def one_step(session: Session, stream: Stream, loss_function: LossFunction, step: int) -> StepOutcome:
    """Takes step number `step` on all ranks."""
    engine, watch = session.engine, session.watch
    watch.watchdog.alive("step", step - 1)
    start, skipped_before = time.perf_counter(), engine.skipped_steps
    micro_batches = [batch.to(engine.device) for batch in stream.step(step - 1, watch.skipped)]
    waited, lr = time.perf_counter() - start, learning_rate(session.run.recipe, step - 1)
    session.replay.check(step, micro_batches[0], loss_function)
    with session.metrics.timed(waited), session.layers.watching(step):
        loss = take_step(engine, micro_batches, loss_function, lr, partial(before_update, session, step))
        total = watch.stop.agree(loss)
    session.metrics.layers(step, session.layers.values())
    if step % COLLECT_EVERY == 0:
        collect_garbage(whole=False)
    watch.watchdog.pace = session.metrics.steps.pace
    watch.watchdog.alive("step", step, time.perf_counter() - start)
    return StepOutcome(step, total / session.run.world_size, lr, engine.skipped_steps > skipped_before)


def before_update(session: Session, step: int) -> None:
    """Once the gradients are complete: what still needs the weights and moments of the step before."""
    if session.saver.copying:
        with waiting_for_save(session, step - 1):
            session.saver.wait_for_copy()
        session.watch.watchdog.alive("step", step - 1)
    session.layers.before_update()


@contextmanager
def waiting_for_save(session: Session, step: int) -> Iterator[None]:
    """Training waits for a save between two rows of the log. The speed leaves out the time that this takes."""
    session.watch.watchdog.alive("save", step)
    start = time.perf_counter()
    yield
    session.metrics.saved_beside(time.perf_counter() - start)


def collect_garbage(whole: bool = True) -> None:
    """Collects Python's garbage on all ranks after the same step.

    The shipped ds_configs turn automatic collection off, because every rank waits for a rank that collects. Without any
    collection the cycles of DeepSpeed and torch add up: with selective checkpointing to some 200 kB a step of 60 blocks.

    Args:
        whole: False leaves out what survived earlier collections, and takes milliseconds.
    """
    gc.collect(2 if whole else 1)
    forget_recomputed()


def validated(session: Session, validate: Validate, step: int, verdict: Verdict = Verdict.CALM) -> bool:
    """Validates and logs; whether no stop interrupted it. A doubtful step is never the best, because it is not saved."""
    watch = session.watch

    def go_on(device: torch.device) -> bool:
        watch.watchdog.alive("validation", step)
        return not watch.stop.now(device)

    start = time.perf_counter()
    found = validate(go_on)
    if found is None:
        return False
    measured = {"val_loss": found} if isinstance(found, float) else found
    others = {name: value for name, value in measured.items() if name != "val_loss"}
    session.metrics.validation(step, measured["val_loss"], others, time.perf_counter() - start)
    collect_garbage()
    if watch.early is not None and verdict is Verdict.CALM:
        watch.early.see(step, measured)
    return True


def save(session: Session, step: int, wait: bool = False, fast: bool = False) -> None:
    """Saves a checkpoint with the state of the guards. images_seen counts trained images, without those of skipped_ranges.

    Args:
        wait: return when it is complete; otherwise `finish_save` completes it.
        fast: into the fast directory.
    """
    cadence, metrics, watch = session.cadence, session.metrics, session.watch
    watch.watchdog.alive("save", step)
    start = time.perf_counter()
    early = None if watch.early is None else watch.early.state()
    progress = Progress(
        step=step,
        images_seen=step * session.run.recipe.batch_images,
        skipped_ranges=tuple(watch.skipped),
        guards=GuardStates(**vars(watch.guard.state()), unvalidated=watch.unvalidated, early=early),
    )
    if fast:
        session.saver.save_fast(progress)
    else:
        protected = dist.from_rank_0(lambda: {*watch.protected(session.checkpoints), *cadence.keep_steps})
        session.saver.save(progress, Kept(cadence.keep_last, cadence.keep_every, protected), wait)
    collect_garbage(whole=not fast)
    metrics.saved(time.perf_counter() - start)
    watch.watchdog.ledger.record(SAVE, step, fast=fast, images_seen=progress.images_seen)
    if not fast:
        found = metrics.goodput(step)
        if session.interval is not None:
            session.interval.saved(step, found)
    metrics.restart_clock(step)


def finish_save(session: Session, step: int) -> None:
    """Completes the checkpoint that is under way, if there is one."""
    if session.saver.under_way:
        with waiting_for_save(session, step):
            session.saver.finish()


def go_back(session: Session, outcome: StepOutcome) -> int:
    """Rolls back after the loss diverged: loads the last good checkpoint, skips a range of images and returns its step.

    DeepSpeed does not promise that an engine that has trained can load a checkpoint. A test checks that the next steps are
    bit-identical to those of a new engine.

    Raises:
        SharedError: rollbacks are off or used up, or there is no good checkpoint.
    """
    finish_save(session, outcome.step)
    watch, guard = session.watch, session.watch.guard
    since = outcome.step if guard.since is None else guard.since
    found = dist.from_rank_0(lambda: good_checkpoint(session.checkpoints, since, watch.rollbacks))
    lost = f"the loss diverged at step {outcome.step}: it is {outcome.loss:.4f} at lr {outcome.lr:.2e}, and {guard.why}"
    if found is None or len(watch.rollbacks) >= watch.max_rollbacks:
        give_up(session, outcome, since, lost, None if found is None else found.path)
    back_to, batch_images = found.manifest.step, session.run.recipe.batch_images
    skip = range_to_skip(outcome.step, back_to, watch.skip_images, batch_images, watch.skipped)
    watch.skipped = leave_out(watch.skipped, skip)
    watch.rollbacks = [*watch.rollbacks, Rollback(outcome.step, since, back_to, skip, guard.why)]
    session.saver.forget_newer(back_to)  # first: a start after an interruption must not continue from one of them
    dist.from_rank_0(lambda: write_rollbacks(session.run_dir, watch.rollbacks))
    dist.say(f"{lost}; rolled back to {found.path}; images {skip[0]:,} to {skip[1] - 1:,} of the stream are skipped")
    watch.watchdog.alive("loading", back_to)
    load_checkpoint(session.engine, found, session.facts)
    guard.restore(found.manifest.guards)
    if watch.early is not None:
        watch.early.restore(found.manifest.guards.early or EarlyState())
    watch.watchdog.ledger.record(ROLLBACK, back_to, lost_at=outcome.step)
    return back_to


def give_up(session: Session, outcome: StepOutcome, since: int, lost: str, good: Path | None) -> NoReturn:
    """Ends a run whose loss diverged on all ranks, with RUN_DIR/LOST.json and suggestions.

    Raises:
        SharedError: always.
    """
    watch, why = session.watch, session.watch.guard.why
    loss = outcome.loss if math.isfinite(outcome.loss) else None
    report = {"step": outcome.step, "since": since, "loss": loss, "lr": outcome.lr, "why": why, "time": time.time()}
    dist.from_rank_0(lambda: write_json(session.run_dir / "LOST.json", seal(report)))
    so_far = len(watch.rollbacks)
    done = f" after {count(so_far, 'rollback')}" if so_far else ""
    kept = f"the last good checkpoint is {good}" if good else f"no checkpoint is older than step {max(0, since - 1)}"
    raise SharedError(f"{lost}{done}; {kept}; {advice(so_far, watch.max_rollbacks, good is not None)}")


def pretraining_loss(recipe: Recipe) -> LossFunction:
    """The mean gen_loss or bert_loss (paper 2.1) over images, in nats per token. An image's stream position seeds its masks."""
    nats = image_loss(recipe.objective, recipe.seed, recipe.mask_prob, dist.sequence_group())
    return lambda engine, batch: nats(with_dropout(engine, recipe, batch), batch.tokens, batch.positions).mean()
