"""Checkpoints that are whole or do not count: saved under a temporary name, listed with checksums, renamed when complete.

RUN_DIR/checkpoints/step-00000100/ holds DeepSpeed's ZeRO-3 files of every rank, manifest.json (what the state belongs to,
and size and sha256 of each file) and, written last, COMPLETE. DeepSpeed's own `latest` file is never written or read: it
appears before the other ranks have finished. Called by train.py; the manifest is also what consolidation reads.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.files import atomic_file, fsync_path, read_json, sha256_file, write_json
from igpt_ds.train.engine import restore_rng, rng_states
from igpt_ds.train.run_dir import recipe_differences

FORMAT, VERSION = "igpt_ds.checkpoint", 1


def checkpoint_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def save_checkpoint(engine: Any, directory: Path, facts: dict[str, Any], keep_last: int, keep_every: int) -> Path:
    """Saves on all ranks; returns when the checkpoint is complete and old ones are pruned.

    Args:
        directory: RUN_DIR/checkpoints.
        facts: what a reader must know and check; "step" and "images_seen" among them.
        keep_last: how many of the newest to keep, at least 1.
        keep_every: checkpoints at multiples of this step stay for ever; 0 for none.
    """
    final = directory / checkpoint_name(facts["step"])
    partial = directory / f"{final.name}.partial"
    if dist.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    client_state = {"igpt_ds/rng": rng_states()}
    engine.save_checkpoint(str(directory), tag=partial.name, client_state=client_state, save_latest=False)
    mine = [_entry(path) for path in sorted(partial.glob(f"*zero_pp_rank_{dist.rank()}_*.pt"))]
    files = [entry for entries in dist.gather_objects(mine) for entry in entries]
    if dist.rank() == 0:
        header = {"format": FORMAT, "version": VERSION, "world_size": dist.world_size()}
        write_json(partial / "manifest.json", header | facts | {"files": files})
        with atomic_file(partial / "COMPLETE", "w") as file:
            file.write(f"{len(files)} files\n")
        os.replace(partial, final)
        fsync_path(directory)
        prune(directory, keep_last, keep_every)
    dist.barrier()
    return final


def _entry(path: Path) -> dict[str, Any]:
    fsync_path(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def prune(directory: Path, keep_last: int, keep_every: int) -> None:
    """Removes complete checkpoints but the keep_last newest and those at multiples of keep_every (0: none)."""
    complete = [path for path in list_checkpoints(directory) if (path / "COMPLETE").exists()]
    for path in complete[: -max(1, keep_last)]:
        step = int(path.name.removeprefix("step-"))
        if not (keep_every and step % keep_every == 0):
            doomed = path.with_name(f"{path.name}.partial")  # if this is killed half way, the next start removes the rest
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def list_checkpoints(directory: Path) -> list[Path]:
    """All checkpoints, complete or not, from the oldest step to the newest."""
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint whose files all have their size.

    Raises:
        ValueError: it is not complete, of another version, or a file is missing or torn; the file is named.
    """
    if not (checkpoint / "COMPLETE").exists():
        raise ValueError(f"{checkpoint} is not complete: it has no COMPLETE file; choose another step")
    path = checkpoint / "manifest.json"
    manifest = read_json(path, "checkpoint manifest")
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is not version {VERSION} of {FORMAT}; read it with the code that wrote it")
    for entry in manifest["files"]:
        file = checkpoint / entry["name"]
        found = file.stat().st_size if file.exists() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes instead of {entry['bytes']}"
            raise ValueError(f"{file} {state}; choose another step")
    return manifest


def damaged_files(checkpoint: Path, entries: list[dict[str, Any]]) -> list[str]:
    """The names of those of a manifest's files that do not hold what was written, by their sha256."""
    return [entry["name"] for entry in entries if sha256_file(checkpoint / entry["name"]) != entry["sha256"]]


def newest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its manifest; each newer one that is damaged is named on stderr."""
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            return checkpoint, read_manifest(checkpoint)
        except ValueError as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr, flush=True)
    return None


def set_aside_newer(directory: Path, step: int) -> None:
    """Renames checkpoints of later steps to `.broken`: they were passed over, and must not count when old ones are pruned."""
    for path in list_checkpoints(directory):
        if int(path.name.removeprefix("step-")) > step:
            broken = path.with_name(f"{path.name}.broken")
            shutil.rmtree(broken, ignore_errors=True)
            os.replace(path, broken)


def load_checkpoint(engine: Any, checkpoint: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Restores weights, optimizer and generators of every rank.

    Args:
        facts: what this run would write into a manifest.

    Raises:
        SharedError: written by another run, in another precision, or by another number of ranks; or a file of some rank is not
            what was written.
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
    if manifest["world_size"] != dist.world_size():
        ranks = manifest["world_size"]
        raise SharedError(f"{checkpoint} was written by {ranks} ranks and this run has {dist.world_size()}; start {ranks} ranks")
    mine = [entry for entry in manifest["files"] if f"zero_pp_rank_{dist.rank()}_" in entry["name"]]
    damaged = [name for names in dist.gather_objects(damaged_files(checkpoint, mine)) for name in names]  # all stop, or none
    if damaged:
        raise SharedError(f"{checkpoint / damaged[0]} is damaged (sha256 differs); remove {checkpoint} and resume again")
    _, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    restore_rng(client_state["igpt_ds/rng"])
