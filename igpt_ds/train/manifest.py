"""A run's checkpoints as directories: which are whole, which is the newest, which may go. Nothing here knows an engine.

RUN_DIR/checkpoints/step-00000100/ holds files of every rank, manifest.json (what the state belongs to, and size and sha256 of
each file) and, written last, COMPLETE; then it gets its name. `.partial` is what a save or a removal left half done, `.broken`
what was damaged. Called by train/checkpoint.py, train/rollback.py, tools/consolidate.py and tools/reshard.py.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from igpt_ds.files import atomic_file, fsync_path, read_json, sha256_file, write_json

FORMAT, VERSION = "igpt_ds.checkpoint", 2


def checkpoint_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def commit(partial: Path, final: Path, facts: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Lists the files, marks a checkpoint as complete, and gives it its name."""
    write_json(partial / "manifest.json", {"format": FORMAT, "version": VERSION} | facts | {"files": files})
    with atomic_file(partial / "COMPLETE", "w") as file:
        file.write(f"{len(files)} files\n")
    old = final.with_name(f"{final.name}.old")
    if final.exists():  # divided anew, or saved a second time; `remove_leftovers` brings it back if this is the last we do
        os.replace(final, old)
    os.replace(partial, final)
    fsync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file, once it is on the disk itself."""
    fsync_path(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def prune(directory: Path, keep_last: int, keep_every: int, best: int | None = None) -> None:
    """Removes complete checkpoints but the keep_last newest, those at multiples of keep_every (0: none) and step `best`."""
    complete = [path for path in list_checkpoints(directory) if (path / "COMPLETE").exists()]
    for path in complete[: -max(1, keep_last)]:
        step = int(path.name.removeprefix("step-"))
        if step != best and not (keep_every and step % keep_every == 0):
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
    damaged = []
    for entry in entries:
        try:
            whole = sha256_file(checkpoint / entry["name"]) == entry["sha256"]
        except OSError:
            whole = False  # unreadable, which one rank alone may find
        if not whole:
            damaged.append(entry["name"])
    return damaged


def newest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its manifest; each newer one that is damaged is named on stderr."""
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            return checkpoint, read_manifest(checkpoint)
        except ValueError as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr, flush=True)
    return None


def choose_checkpoint(run_dir: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """A run's checkpoint of that step (None: the newest whole one) and its manifest, every file compared with its sha256.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    directory = run_dir / "checkpoints"
    if step is None:
        newest = newest_checkpoint(directory)
        if newest is None:
            raise ValueError(f"{directory} holds no complete checkpoint; train first, or name another --run_dir")
        checkpoint, manifest = newest
    else:
        checkpoint = directory / checkpoint_name(step)
        manifest = read_manifest(checkpoint)
    refuse_damaged(checkpoint, manifest)
    return checkpoint, manifest


def refuse_damaged(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Compares every file of a checkpoint with its sha256.

    Raises:
        ValueError: one does not hold what was written.
    """
    if damaged := damaged_files(checkpoint, manifest["files"]):
        raise ValueError(f"{checkpoint / damaged[0]} is damaged (sha256 differs); choose another --step")


def remove_leftovers(directory: Path) -> None:
    """Removes what interrupted saves and removals left half done, before any rank reads or writes."""
    for path in directory.glob("step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for old in directory.glob("step-*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, old.with_suffix(""))


def set_aside_newer(directory: Path, step: int) -> None:
    """Renames checkpoints of later steps to `.broken`: they were passed over, and must not count when old ones are pruned."""
    for path in list_checkpoints(directory):
        if int(path.name.removeprefix("step-")) > step:
            broken = path.with_name(f"{path.name}.broken")
            shutil.rmtree(broken, ignore_errors=True)
            os.replace(path, broken)
