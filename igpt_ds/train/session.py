"""What train.py and finetune.py do around the loop: batches, resume and guards before it, a mark of the end after it.

A run and its open shards enter; what `loop.fit` is given leaves. Every rank calls every function.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds import cli, dist
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.streaming import ShardStream
from igpt_ds.ds_config import Run, run_to_dict
from igpt_ds.files import atomic_file, write_json
from igpt_ds.model import cpu_kernels
from igpt_ds.model.store import verified_info
from igpt_ds.model.transformer import attention_backend
from igpt_ds.plan import costs
from igpt_ds.train import run_dir
from igpt_ds.train.checkpoint.save_load import check_space, load_checkpoint, verified_checkpoint
from igpt_ds.train.ds_effective import check_effective, effective_config
from igpt_ds.train.early import EarlyStop
from igpt_ds.train.engine import build_engine
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.loop import Watch
from igpt_ds.train.metrics import peak_of_all_ranks
from igpt_ds.train.safety.rollback import read_rollbacks, skipped_ranges
from igpt_ds.train.safety.spikes import Guard
from igpt_ds.train.safety.stops import Stop
from igpt_ds.train.safety.watchdog import Watchdog


def introduce(run: Run, device: torch.device) -> float:
    """Says how large the network is and on what it runs; returns FLOP/s of all ranks together."""
    peak, source = peak_of_all_ranks(device, run.precision)
    weights = costs.parameters(run.recipe.model, run.recipe.objective)
    attention = attention_backend(
        run.recipe.model,
        run.recipe.objective == "ar",
        device,
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.precision, torch.float32),
    )
    speed = f"{peak / 1e12:.2f} TFLOP/s over {run.world_size} ranks ({source})"
    say(f"{weights:,} parameters; {speed}; attention by torch's {attention} kernel on {device.type}")
    return peak


def verify(images: Mixture | ShardStream, val_shards: ShardSet) -> None:
    """Reads all shards before the first step. With --on_bad skip the ranks divide the images, and damaged ones are left out."""
    if isinstance(images, Mixture) and images.on_bad == "skip":
        parts = dist.gather_objects(images.damaged(dist.rank(), dist.world_size()))
        try:
            images.skip([np.sort(np.concatenate(ids)) for ids in zip(*parts, strict=True)], aloud=dist.rank() == 0)
        except ValueError as error:
            raise cli.SharedError(str(error)) from None  # every rank counts the same
        say(f"{images.n_skipped} of {images.n_images:,} training images are damaged and skipped")
    elif isinstance(images, Mixture):
        for shards in images.shard_sets:
            dist.from_rank_0(shards.verify)
    dist.from_rank_0(val_shards.verify)


def manifest_facts(run: Run, images: Mixture | ShardStream) -> dict[str, Any]:
    """What every checkpoint says of the run that made it."""
    recipe = run_to_dict(run)["recipe"]
    return {"recipe": recipe, "data": images.facts(), "precision": run.precision, "sequence_parallel": run.sequence_parallel}


def engine_of_run(
    args: argparse.Namespace,
    run: Run,
    images: Mixture | ShardStream,
    val_shards: ShardSet,
    facts: dict[str, Any],
    watchdog: Watchdog,
    n_kept: int,
    pretrained: Path | None = None,
) -> tuple[Engine, dict[str, Any]]:
    """The engine of a run directory that is free or this run's own, with --resume auto as its newest checkpoint left it.

    Args:
        facts: of `manifest_facts`.
        n_kept: checkpoints that stay, for which there must be room on the disk.
        pretrained: the model dir whose weights it begins with; None for fresh ones.

    Returns:
        The engine, and the manifest of the checkpoint that it goes on from: {} where there is none.
    """
    palette, checkpoints = val_shards.path / "palette.npy", args.run_dir / "checkpoints"
    dist.from_rank_0(lambda: run_dir.check(args.run_dir, run, facts["data"], palette, args.resume == "auto"))
    watchdog.settle()
    if args.verify_shards:
        watchdog.alive("verifying", 0)
        verify(images, val_shards)
    watchdog.alive("building", 0)
    say(json.dumps(run_to_dict(run), indent=1))
    if pretrained is not None:
        dist.from_rank_0(lambda: verified_info(pretrained))
    cpu_kernels.use(dist.from_rank_0(lambda: cpu_product(args.run_dir)))
    engine = build_engine(run, pretrained)
    effective = effective_config(engine)
    dist.from_rank_0(lambda: write_json(args.run_dir / "ds_config.effective.json", effective))
    check_effective(run, effective)
    watchdog.alive("loading", 0)
    found = resume(engine, checkpoints, facts) if args.resume == "auto" else {}
    check_space(engine, checkpoints, n_kept)
    dist.from_rank_0(lambda: run_dir.record(args.run_dir, run, facts["data"], palette, cpu_kernels.used()))
    return engine, found


def cpu_product(where: Path) -> str:
    """The float32 matrix product on CPUs that every rank of this run takes (see `cpu_kernels`).

    A new run takes the fastest of this machine. A resumed run takes the recorded one, so that its result stays bit-identical.
    Older code recorded none and always took "onednn".

    Raises:
        ValueError: run.json names an unknown product.
    """
    path = where / "run.json"
    if not path.exists():
        return cpu_kernels.fastest()
    product = run_dir.read_run(where).get("cpu_product", "onednn")
    if product not in cpu_kernels.PRODUCTS:
        known = ", ".join(cpu_kernels.PRODUCTS)
        raise ValueError(f"{path} has cpu_product {product!r}; known: {known}; it was written by another version")
    return str(product)


def resume(engine: Engine, checkpoints: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Loads the newest checkpoint that all ranks find undamaged; returns its manifest, or {} where none was ever saved.

    Raises:
        SharedError: there are checkpoints and none can be used; nothing is changed.
    """
    found = verified_checkpoint(checkpoints)
    if found is None:
        say("nothing to resume: step 0")
        return {}
    checkpoint, manifest = found
    load_checkpoint(engine, checkpoint, manifest, facts, verified=True)
    say(f"resumed from {checkpoint}: {manifest['step']} steps, {manifest['images_seen']:,} images")
    return manifest


def watched(args: argparse.Namespace) -> Watchdog:
    """A watchdog that watches already, and writes no file before its `settle`: the run directory may be another run's."""
    watchdog = Watchdog(args.run_dir, args.hang_minutes)
    watchdog.start()
    return watchdog


def watch_over(
    args: argparse.Namespace,
    run: Run,
    stop: Stop,
    watchdog: Watchdog,
    found: dict[str, Any],
    early: EarlyStop | None = None,
) -> Watch:
    """Who may interrupt the run, each knowing what it knew at the checkpoint.

    Args:
        watchdog: of `watched`.
        found: the checkpoint's manifest, or {} for a new run.
        early: what ends it by its validations, still knowing nothing.
    """
    rollbacks = dist.from_rank_0(lambda: read_rollbacks(args.run_dir) if args.resume == "auto" else [])
    guards = found.get("guards", {})
    if early is not None:
        early.restore(guards.get("early", {}))
    if dist.rank() == 0:
        (args.run_dir / "LOST.json").unlink(missing_ok=True)
    watchdog.alive("start", int(found.get("step", 0)))
    return Watch(
        stop,
        watchdog,
        Guard(run.recipe, run.precision, guards),
        rollbacks,
        skipped_ranges(rollbacks, found),
        args.max_rollbacks if args.on_spike == "rollback" else 0,
        args.spike_skip_images,
        validate_first=bool(guards.get("unvalidated", not found)),
        early=early,
    )


def finish(where: Path, finished: bool, why: str, watchdog: Watchdog) -> None:
    """Marks a run that reached its end, and lets all ranks leave together.

    Args:
        why: what stopped it before its last step, "" where nothing did.

    Raises:
        SystemExit: STOPPED, where something stopped it.
    """
    watchdog.close("stopped" if why else "end")
    dist.barrier()
    if dist.rank() == 0 and finished:
        with atomic_file(where / "FINISHED", "w") as file:
            file.write("all steps done\n")
    if why:
        say(f"stopped by {why}, with everything saved; --resume auto goes on")
        raise SystemExit(cli.STOPPED)


def say(line: str) -> None:
    """Prints once, not once a rank."""
    if dist.rank() == 0:
        print(line, flush=True)
