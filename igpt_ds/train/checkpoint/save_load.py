"""An engine's state to a checkpoint and back, on all ranks together.

Saved under a temporary name, listed with checksums, renamed when complete (manifest.py says what lies where). An error of
one rank's disk is every rank's. DeepSpeed's own `latest` file is never written or read: it appears before the other ranks have
finished. A checkpoint of another number of ranks is divided anew on the way in. Called by train.py and train/loop.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from igpt_ds import dist
from igpt_ds.cli import SharedError, error_text
from igpt_ds.train.checkpoint.disk import SLACK, Writer, require_space
from igpt_ds.train.checkpoint.manifest import (
    checkpoint_name,
    commit,
    damaged_files,
    list_checkpoints,
    prune,
    read_manifest,
    refuse_to_begin_anew,
    remove_leftovers,
    say_passed_over,
    search,
    set_aside_newer,
)
from igpt_ds.train.checkpoint.reshard import target_layout, write_rank
from igpt_ds.train.checkpoint.restricted import Reader, refuse_foreign_names
from igpt_ds.train.checkpoint.torch_files import read_torch_file
from igpt_ds.train.checkpoint.zero_layout import ZeroCheckpoint
from igpt_ds.train.engine import restore_rng, rng_states
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.run_dir import check_owner, recipe_differences, this_start


@dataclass(frozen=True)
class Saved:
    """A checkpoint just saved: where, how long all ranks needed, and the bytes of all of its files."""

    path: Path
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s, {self.bytes / 1e6 / self.seconds:.0f} MB/s"


def save_checkpoint(
    engine: Engine, directory: Path, facts: dict[str, Any], keep_last: int, keep_every: int, protected: Collection[int] = ()
) -> Saved:
    """Saves on all ranks; returns when the checkpoint is complete and old ones are pruned.

    Args:
        directory: RUN_DIR/checkpoints.
        facts: what a reader must know and check; "step" and "images_seen" among them.
        keep_last: how many of the newest to keep, at least 1.
        keep_every: checkpoints at multiples of this step stay for ever; 0 for none.
        protected: steps whose checkpoints stay as well.

    Raises:
        SharedError: the disk is too small or failed on some rank; nothing of the checkpoint is left and no other was touched.
    """
    import deepspeed

    start = time.monotonic()
    final = directory / checkpoint_name(facts["step"])
    # With the start's name, or a start that lost the run would clear away what its successor writes.
    unfinished = directory / ".".join(part for part in (final.name, this_start(), "partial") if part)
    dist.from_rank_0(lambda: check_owner(directory.parent))
    dist.from_rank_0(lambda: _begin(unfinished, expected_bytes(engine, directory)))
    states = [rng_states()] if engine.zero_optimization_stage() == 3 else dist.gather_objects(rng_states())
    writer = Writer(engine.checkpoint_engine)
    engine.checkpoint_engine, engine._copy_recovery_script = writer, lambda path: None  # tools/consolidate.py does its work
    try:
        engine.save_checkpoint(str(directory), tag=unfinished.name, client_state={"igpt_ds/rng": states}, save_latest=False)
    finally:
        engine.checkpoint_engine = writer.wrapped
    reports = dist.gather_objects((writer.entries, writer.error))
    agree([error for _, error in reports], unfinished, f"checkpoint {final} could not be saved")
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    header = {"world_size": dist.world_size(), "stage": int(engine.zero_optimization_stage()), "versions": versions}
    files = [entry for entries, _ in reports for entry in entries]
    try:
        dist.from_rank_0(lambda: check_owner(directory.parent))  # it may have changed while this start was writing
        dist.from_rank_0(lambda: commit(unfinished, final, header | facts, files))
    except SharedError as error:
        agree([str(error)], unfinished, f"checkpoint {final} could not be saved")
    dist.from_rank_0(lambda: prune(directory, keep_last, keep_every, protected))
    return Saved(final, time.monotonic() - start, sum(entry["bytes"] for entry in files))


def _begin(unfinished: Path, needed: int) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        require_space(unfinished, needed, f"checkpoint {unfinished.name.removesuffix('.partial')}")
    except ValueError:
        unfinished.rmdir()
        raise


def agree(errors: list[str], unfinished: Path, what: str) -> None:
    """Removes what was half written, and stops all ranks, where some rank met an error. `errors` has "" for those that did not.

    Raises:
        SharedError: with the first error, the rank that met it and what to do.
    """
    failed = [(rank, error) for rank, error in enumerate(errors) if error]
    if failed:
        dist.from_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        raise SharedError(
            f"{what}: on rank {failed[0][0]} {failed[0][1]}; nothing of it is left, and the checkpoint before is whole: "
            "free some space there (or repair the disk) and run the same command again with --resume auto"
        )


def expected_bytes(engine: Engine, directory: Path) -> int:
    """The size of the next checkpoint: that of the one before, else 12 bytes a parameter, and its weights at stages 1 and 2."""
    try:
        before = [entry["bytes"] for entry in read_manifest(list_checkpoints(directory)[-1])["files"]]
    except (IndexError, ValueError, OSError):
        sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in engine.module.parameters()]
        whole = 0 if engine.zero_optimization_stage() == 3 else next(engine.module.parameters()).element_size()
        return int(SLACK * (12 + whole) * sum(sizes)) + (1 << 17) * dist.world_size()
    return int(SLACK * sum(before))


def check_space(engine: Engine, directory: Path, keep_last: int) -> None:
    """Asks before the first step for room for all checkpoints that will lie there at once: keep_last and the one being saved.

    Raises:
        SharedError: the disk has less; on every rank.
    """

    def ask() -> None:
        missing = max(1, keep_last + 1 - len(list_checkpoints(directory)))
        require_space(directory, missing * expected_bytes(engine, directory), f"room for {missing} checkpoints")

    dist.from_rank_0(ask)


def verified_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files hold what was written, on all ranks, which divide the reading; None where none was saved.

    Leftovers of interrupted saves are removed. Newer ones that are damaged are named on stderr and renamed to `.broken`, once
    an older one is known to be whole.

    Raises:
        SharedError: there are checkpoints and none can be used, or one cannot be read or is of another version: all stay as
            they are.
    """
    dist.from_rank_0(partial(remove_leftovers, directory))
    before, passed_over = None, []
    while True:
        found, reasons = dist.from_rank_0(partial(search, directory, before))
        passed_over += reasons
        if found is None:
            dist.from_rank_0(partial(refuse_to_begin_anew, directory, passed_over))
            return None
        checkpoint, manifest = found
        damaged = _damaged_on_all_ranks(checkpoint, manifest)
        if not damaged:
            dist.from_rank_0(partial(say_passed_over, passed_over))
            dist.from_rank_0(partial(set_aside_newer, directory, manifest["step"]))
            return checkpoint, manifest
        passed_over.append(f"{checkpoint / damaged[0]} is damaged (sha256 differs)")
        before = manifest["step"]


def _damaged_on_all_ranks(checkpoint: Path, manifest: dict[str, Any]) -> list[str]:
    mine, error = [], ""
    try:
        mine = damaged_files(checkpoint, manifest["files"][dist.rank() :: dist.world_size()])
    except OSError as caught:
        error = error_text(caught)
    answers = dist.gather_objects((mine, error))
    for rank, (_, error) in enumerate(answers):
        if error:
            raise SharedError(
                f"{error}: rank {rank} cannot read it, and nothing was changed; repair the disk and run the same command again, "
                f"or move {checkpoint} away to go on from the one before"
            )
    return [name for names, _ in answers for name in names]


def load_checkpoint(
    engine: Engine, checkpoint: Path, manifest: dict[str, Any], facts: dict[str, Any], verified: bool = False
) -> None:
    """Restores weights, optimizer and generators of every rank; a checkpoint of other ranks or sub-groups is divided anew.

    Args:
        facts: what this run would write into a manifest.
        verified: its files were compared with their sha256 just now.

    Raises:
        SharedError: written by another run, in another precision or at another stage; or some file is not what was written.
    """
    for name in ("recipe", "precision", "data"):
        if name not in manifest:
            raise SharedError(f"{checkpoint / 'manifest.json'} has no {name}; move {checkpoint} away and resume again")
    refuse_another_run(checkpoint, manifest, facts)
    stage = int(engine.zero_optimization_stage())
    if manifest["stage"] != stage:
        raise SharedError(
            f"{checkpoint} was saved at ZeRO stage {manifest['stage']} and this run has {stage}; use a ds_config of that stage"
        )
    if not verified and (damaged := _damaged_on_all_ranks(checkpoint, manifest)):
        raise SharedError(f"{checkpoint / damaged[0]} is damaged (sha256 differs); remove {checkpoint} and resume again")
    if dist.from_rank_0(lambda: _fits(engine, checkpoint, manifest)):
        _load(engine, checkpoint)
        return
    unfinished = checkpoint.with_name(f"{checkpoint.name}.{dist.world_size()}-ranks.partial")
    divide_anew(engine, checkpoint, manifest, unfinished)
    _load(engine, unfinished)
    dist.barrier()
    dist.from_rank_0(lambda: shutil.rmtree(unfinished))


def refuse_another_run(checkpoint: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuses a checkpoint that does not belong to a run of these facts.

    Raises:
        SharedError: its recipe, precision, images or their order differ; the difference is named.
    """
    differences = recipe_differences(manifest["recipe"], facts["recipe"])
    for name, before, now in [("precision", manifest["precision"], facts["precision"]), *differences]:
        if before != now:
            raise SharedError(
                f"{checkpoint} is of another run: {name} is {before} there and {now} here; choose another --run_dir"
            )
    if manifest["data"]["dataset_hash"] != facts["data"]["dataset_hash"]:
        raise SharedError(
            f"{checkpoint} was trained on other images than {facts['data']['path']}; name the shards and weights of that run"
        )
    before, now = manifest["data"].get("order"), facts["data"].get("order")
    if before != now:
        raise SharedError(
            f"{checkpoint} saw its images in order {before} and this run would in {now}; "
            "use the code and the way of reading (--stream or not) of that run, or choose another --run_dir"
        )


def _fits(engine: Engine, checkpoint: Path, manifest: dict[str, Any]) -> bool:
    """Whether DeepSpeed can load the files as they are: its loader checks the number of ranks, but not the sub-groups."""
    model_files = sorted(checkpoint.glob("*mp_rank_00_model_states.pt"))
    if not model_files:
        raise ValueError(f"{checkpoint} has no file *mp_rank_00_model_states.pt; remove it and resume again")
    saved = [list(group.items()) for group in read_torch_file(model_files[0])["param_shapes"]]
    ours = [list(group.items()) for group in engine._get_zero_param_shapes()]
    return manifest["world_size"] == dist.world_size() and saved == ours


def divide_anew(engine: Engine, checkpoint: Path, manifest: dict[str, Any], unfinished: Path) -> None:
    """Writes the checkpoint's state into `unfinished` as the engine's ranks hold it; each rank writes its own files.

    Raises:
        SharedError: no room, or a rank could not write; `unfinished` is gone.
    """
    needed = int(SLACK * sum(entry["bytes"] for entry in manifest["files"]))
    dist.from_rank_0(lambda: _begin(unfinished, needed))
    error = ""
    try:
        source = ZeroCheckpoint(checkpoint, manifest["world_size"], manifest["stage"])
        write_rank(source, target_layout(source, dist.world_size(), engine.zero_sub_group_size()), dist.rank(), unfinished)
    except (OSError, ValueError) as caught:
        error = f"{getattr(caught, 'filename', None) or unfinished}: {getattr(caught, 'strerror', None) or caught}"
    what = f"{checkpoint} of {manifest['world_size']} ranks could not be divided for {dist.world_size()}"
    agree(dist.gather_objects(error), unfinished, what)
    if dist.rank() == 0:
        print(f"{checkpoint} of {manifest['world_size']} ranks was divided for {dist.world_size()}", flush=True)


def _load(engine: Engine, checkpoint: Path) -> None:
    """Restores the engine. All ranks check the files first: a rank that stops during the load leaves the others waiting."""
    error = ""
    try:
        refuse_foreign_names(sorted(checkpoint.glob("*.pt"))[dist.rank() :: dist.world_size()])
    except (OSError, ValueError) as caught:
        error = error_text(caught)
    if errors := [error for error in dist.gather_objects(error) if error]:
        raise SharedError(errors[0])
    reader = engine.checkpoint_engine = Reader(engine.checkpoint_engine)
    try:
        _, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    finally:
        engine.checkpoint_engine = reader.wrapped
    states = client_state["igpt_ds/rng"]
    restore_rng(states[dist.rank() % len(states)])
