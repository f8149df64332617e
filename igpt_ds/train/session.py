"""One start of a run. In: flags, run and shards. Out: an open `Session`. Every rank calls every function.

train.py and finetune.py open the session, train/loop.py works with it.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from igpt_ds import cli, dist
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.streaming import ShardStream
from igpt_ds.devices import current_device
from igpt_ds.ds_config import Run
from igpt_ds.json_files import write_json
from igpt_ds.model import cpu_kernels
from igpt_ds.model.cpu_speed import faster_precision, product_of_new_run
from igpt_ds.model.store import verified_info
from igpt_ds.model.transformer import attention_backend
from igpt_ds.train import run_dir
from igpt_ds.train.cadence import Cadence, choose_cadence
from igpt_ds.train.checkpoint.directory import complete_checkpoints, newest_step
from igpt_ds.train.checkpoint.load import resume
from igpt_ds.train.checkpoint.manifest import FinetuneFacts, GuardStates, Manifest, RunFacts
from igpt_ds.train.checkpoint.saver import Saver, open_saver, tiers_of
from igpt_ds.train.ds_effective import check_effective, effective_config
from igpt_ds.train.early import EarlyState, EarlyStop
from igpt_ds.train.engine import build_engine, start_ranks
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.health.layers import LayerScales
from igpt_ds.train.health.replay import Replay
from igpt_ds.train.ledger.interval import SaveInterval
from igpt_ds.train.ledger.rows import TRAIN
from igpt_ds.train.metrics import Metrics
from igpt_ds.train.peak import peak_of_all_ranks
from igpt_ds.train.safety import flight_recorder
from igpt_ds.train.safety.rollback import Rollback, good_checkpoint, read_rollbacks, skipped_ranges
from igpt_ds.train.safety.spikes import Guard
from igpt_ds.train.safety.stops import Stop
from igpt_ds.train.safety.watchdog import Watchdog
from igpt_ds.train.screen import device_line, habits, introduction, precision_note
from igpt_ds.train.stream import Range, verify


@dataclass
class Watch:
    """What may interrupt the loop, and what the run knows of earlier interruptions."""

    stop: Stop
    watchdog: Watchdog
    guard: Guard
    rollbacks: list[Rollback]  # of this run so far: RUN_DIR/rollbacks.json
    skipped: list[Range]  # ranges of the stream of images that rollbacks left out
    max_rollbacks: int  # 0: the run stops when its loss diverges
    skip_images: int | None  # images that a rollback leaves out; None: all since the checkpoint
    unvalidated: bool  # the newest step still needs its validation
    early: EarlyStop | None = None  # ends the run by its validations, and keeps the best step's checkpoint
    stopped: str = ""  # why `fit` ended before the last step; everything is saved

    @property
    def over(self) -> bool:
        """Whether early stopping ended the run."""
        return self.early is not None and self.early.over

    @property
    def best_step(self) -> int | None:
        """The step with the best validation so far, if early stopping is on."""
        return None if self.early is None else self.early.best_step

    def protected(self, checkpoints: Path) -> list[int]:
        """Steps whose checkpoints must stay: the best one, and during a doubt the newest from before it. Rank 0 calls it."""
        best, since = self.best_step, self.guard.since
        good = None if since is None else good_checkpoint(checkpoints, since, self.rollbacks)
        return [*([] if best is None else [best]), *([] if good is None else [good.manifest.step])]


@dataclass(frozen=True)
class Session:
    """One start of a run, opened by `open_session`."""

    engine: Engine
    run: Run
    run_dir: Path
    facts: RunFacts  # in every manifest, beside the progress
    cadence: Cadence
    metrics: Metrics
    watch: Watch
    start_step: int  # completed steps at the start
    layers: LayerScales
    replay: Replay
    saver: Saver
    interval: SaveInterval | None = None  # of --save_every auto

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run reached its recipe's last step, or early stopping ended it."""
        return not self.watch.stopped and (self.cadence.last_step == self.run.recipe.steps or self.watch.over)

    @property
    def resume(self) -> str:
        """The command that continues after --stop_at_step."""
        return "next: " + re.sub(r" --stop_at_step[ =]\d+", "", self.watch.stop.resume)


@dataclass(frozen=True)
class FinetuneStart:
    """What fine-tuning adds to a session."""

    facts: FinetuneFacts  # in every manifest
    pretrained: Path | None  # the model dir whose weights training starts from; None for fresh weights
    early: EarlyStop | None  # None: no images are left to choose a step by, and the last one counts
    stop_in: Path  # where a file STOP is looked for


@contextmanager
def open_session(
    args: argparse.Namespace,
    run: Run,
    images: Mixture | ShardStream,
    val_shards: ShardSet | None,
    finetune: FinetuneStart | None = None,
    note: str = "",
) -> Iterator[Session]:
    """Joins the ranks and opens a run; `--resume auto` loads the newest checkpoint. On exit it marks the end of the run.

    The run directory must be free or hold this run.

    Args:
        val_shards: the images of validations; None: there are none, and `fit` gets no `validate`.
        note: what the program changed by itself, for the console and run.json.

    Raises:
        SharedError: another run's directory, damaged shards, too little disk space, or no checkpoint that can be used.
        SystemExit: STOPPED at the end, if something stopped the run before its last step.
    """
    stop = Stop(args.run_dir if finetune is None else finetune.stop_in, args.max_minutes)
    stop.listen()
    watchdog = Watchdog(args.run_dir, args.hang_minutes)
    watchdog.start()  # it writes no file before `settle`: the run directory may be another run's
    flight_recorder.prepare(os.environ, args.run_dir, watchdog.time_limit)
    stop.meeting = True
    device = start_ranks(watchdog.time_limit)
    stop.meeting = False
    early, pretrained = (None, None) if finetune is None else (finetune.early, finetune.pretrained)
    facts = manifest_facts(run, images, None if finetune is None else finetune.facts)
    palette, resumes = images.palette_file, args.resume == "auto"
    dist.from_rank_0(lambda: run_dir.check(args.run_dir, run, facts.data, palette, resumes))
    watchdog.settle()
    watchdog.alive("verifying", 0)
    verify(images, val_shards, args.verify_shards, (args.run_dir if finetune is None else finetune.stop_in) / "verified.json")
    watchdog.alive("building", 0)
    cadence = choose_cadence(args, run, images.n_originals)
    lines = introduction(args, run, images, val_shards, note)
    val_every = None if val_shards is None else cadence.val_every
    save_every, fast = None if cadence.auto_save else cadence.save_every, (args.fast_dir, cadence.fast_save_every)
    often = habits(args.run_dir, save_every, val_every, args.keep_last, fast if args.fast_dir else None)
    dist.say("\n".join([*lines, *often]))
    engine = engine_of_run(run, args.run_dir, pretrained)
    watchdog.alive("loading", 0)
    tiers = tiers_of(args, resumes)
    found = resume(engine, tiers, facts) if resumes else None
    start_step = 0 if found is None else found.step
    kept = args.keep_last + (early is not None)  # the best checkpoint stays too
    saver = open_saver(engine, facts, tiers, args.save, kept, start_step)
    stop.busy = saver.busy
    about = (palette, cpu_kernels.used(), note, args.val_images)
    dist.from_rank_0(lambda: run_dir.record(args.run_dir, run, facts.data, *about))
    metrics = Metrics(args.run_dir, run, start_step, introduce(run, device, found is None), args.wandb)
    watch = watch_over(args, Guard(run.recipe, run.precision), stop, watchdog, found, early)
    interval = save_interval(args.run_dir, run.world_size) if cadence.auto_save else None
    checks = (LayerScales(engine, cadence), Replay(engine, cadence))
    session = Session(engine, run, args.run_dir, facts, cadence, metrics, watch, start_step, *checks, saver, interval)
    yield session
    finish(session)


def save_interval(where: Path, ranks: int) -> SaveInterval:
    """The interval of `--save_every auto` in a run directory. It counts from the newest checkpoint there, not from a fast one."""
    return SaveInterval(where, ranks, dist.from_rank_0(lambda: newest_step(where / "checkpoints")))


def engine_of_run(run: Run, where: Path, pretrained: Path | None) -> Engine:
    """The engine of a run directory, with the weights of the model dir `pretrained`, or fresh ones (None)."""
    if pretrained is not None:
        dist.from_rank_0(lambda: verified_info(pretrained))
    cpu_kernels.use(dist.from_rank_0(lambda: cpu_product(where)))
    engine = build_engine(run, pretrained)
    effective = effective_config(engine)
    dist.from_rank_0(lambda: write_json(where / "ds_config.effective.json", effective))
    check_effective(run, effective)
    return engine


def introduce(run: Run, device: torch.device, new: bool) -> float:
    """Prints the devices and their speed, and for a new run on CPUs a faster precision; returns FLOP/s of all ranks together."""
    peak, source = peak_of_all_ranks(device, run.precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.precision, torch.float32)
    attention = attention_backend(run.recipe.model, run.recipe.objective == "ar", device, dtype)
    dist.say(device_line(run, device, peak, source, attention))
    if new and device.type == "cpu":
        causal = run.recipe.objective == "ar"
        faster = dist.from_rank_0(lambda: faster_precision(run.recipe.model, run.precision, causal, run.micro_batch))
        if faster:
            dist.say(precision_note(*faster))
    return peak


def manifest_facts(run: Run, images: Mixture | ShardStream, finetune: FinetuneFacts | None) -> RunFacts:
    """What every manifest says about its run."""
    return RunFacts(
        recipe=run.recipe,
        data=images.facts(),
        precision=run.precision,
        sequence_parallel=run.sequence_parallel,
        finetune=finetune,
    )


def cpu_product(where: Path) -> str:
    """The float32 matrix product on CPUs that every rank of this run uses (see `cpu_kernels`).

    A new run measures which is the fastest on this machine, unless IGPT_DS_CPU_PRODUCT names one. A resumed run uses the recorded
    one, so that its result stays bit-identical.
    """
    recorded = run_dir.recorded_product(where, cpu_kernels.PRODUCTS)
    return recorded or (product_of_new_run() if current_device().type == "cpu" else cpu_kernels.usual())


def watch_over(
    args: argparse.Namespace, guard: Guard, stop: Stop, watchdog: Watchdog, found: Manifest | None, early: EarlyStop | None
) -> Watch:
    """What may interrupt the run, in the state of the checkpoint.

    Args:
        guard, early: in their initial state.
        found: the checkpoint's manifest; None for a new run.
    """
    rollbacks = dist.from_rank_0(lambda: read_rollbacks(args.run_dir) if args.resume == "auto" else [])
    guards = GuardStates(unvalidated=True) if found is None else found.guards
    guard.restore(guards)
    if early is not None:
        early.restore(guards.early or EarlyState())
    if dist.rank() == 0:
        (args.run_dir / "LOST.json").unlink(missing_ok=True)
    watchdog.alive("start", 0 if found is None else found.step)
    seen = 0 if found is None else found.images_seen
    watchdog.ledger.record(TRAIN, watchdog.step, resume=args.resume == "auto", images_seen=seen)
    most = args.max_rollbacks if args.on_spike == "rollback" else 0
    skipped = skipped_ranges(rollbacks, found)
    return Watch(stop, watchdog, guard, rollbacks, skipped, most, args.spike_skip_images, guards.unvalidated, early)


def finish(session: Session) -> None:
    """Marks a finished run with a file FINISHED; all ranks leave together.

    Raises:
        SystemExit: STOPPED, if something stopped the run.
    """
    why = session.watch.stopped
    session.watch.watchdog.close("stopped" if why else "end")
    dist.barrier()
    if dist.rank() == 0 and session.finished:
        run_dir.write_finished(session.run_dir)
    if why:
        saved = dist.from_rank_0(lambda: bool(complete_checkpoints(session.checkpoints)))
        what = "everything is saved; continue with" if saved else "no step is trained yet, so nothing is saved; start again with"
        dist.say(f"stopped by {why}; {what}: {session.watch.stop.resume}")
        raise SystemExit(cli.STOPPED)
