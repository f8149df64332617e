"""A run's checkpoints as directories: which are whole, which is the newest, which may go. Nothing here knows an engine.

RUN_DIR/checkpoints/step-00000100/ holds files of every rank, manifest.json (what the state belongs to, and size and sha256 of
each file) and, written last, COMPLETE; then it gets its name. `.partial` is what a save or a removal left half done, `.broken`
what was damaged. Called by train/checkpoint/save_load.py, train/safety/rollback.py, tools/consolidate.py and tools/reshard.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from igpt_ds.files import atomic_file, fsync_path, sha256_file, write_json

FORMAT, VERSION = "igpt_ds.checkpoint", 2
_KEYS = {"step": int, "images_seen": int, "stage": int, "world_size": int, "files": list}  # what every reader counts on


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


def prune(directory: Path, keep_last: int, keep_every: int, protected: Collection[int] = ()) -> None:
    """Removes complete checkpoints but the keep_last newest, those at multiples of keep_every (0: none) and protected steps."""
    complete = [path for path in list_checkpoints(directory) if (path / "COMPLETE").exists()]
    for path in complete[: -max(1, keep_last)]:
        step = step_of(path)
        if step not in protected and not (keep_every and step % keep_every == 0):
            doomed = path.with_name(f"{path.name}.partial")  # if this is killed half way, the next start removes the rest
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def list_checkpoints(directory: Path) -> list[Path]:
    """All checkpoints, complete or not, from the oldest step to the newest."""
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


class DamagedError(ValueError):
    """A checkpoint that is not what was written: incomplete, torn, or without a file. The one before it may be used."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint whose files all have their size.

    Raises:
        DamagedError: it does not exist or is not complete, or a file is missing or torn; the file is named.
        ValueError: it is of another version: whole, perhaps, and not ours to judge.
        OSError: the disk does not give it; it may be whole.
    """
    if not checkpoint.exists():
        raise DamagedError(f"{checkpoint} does not exist; choose another step")
    if not (checkpoint / "COMPLETE").exists():
        raise DamagedError(f"{checkpoint} is not complete: it has no COMPLETE file; choose another step")
    path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; choose another step") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not valid JSON: {error}; choose another step") from None
    if isinstance(manifest, dict) and "format" in manifest and (manifest["format"], manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is not version {VERSION} of {FORMAT}; read it with the code that wrote it")
    if not isinstance(manifest, dict) or (missing := [key for key, kind in _KEYS.items() if type(manifest.get(key)) is not kind]):
        raise DamagedError(f"{path} has no {missing[0] if isinstance(manifest, dict) else 'keys'}; choose another step")
    for entry in manifest["files"]:
        if not isinstance(entry, dict) or not {"name", "bytes", "sha256"} <= entry.keys():
            raise DamagedError(f"{path} names a file without its size and sha256; choose another step")
        file = checkpoint / entry["name"]
        found = file.stat().st_size if file.exists() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes instead of {entry['bytes']}"
            raise DamagedError(f"{file} {state}; choose another step")
    return manifest


def damaged_files(checkpoint: Path, entries: list[dict[str, Any]]) -> list[str]:
    """The names of those of a manifest's files that do not hold what was written, by their sha256.

    Raises:
        OSError: one cannot be read, which says nothing of what it holds.
    """
    damaged = []
    for entry in entries:
        try:
            whole = sha256_file(checkpoint / entry["name"]) == entry["sha256"]
        except FileNotFoundError:
            whole = False
        if not whole:
            damaged.append(entry["name"])
    return damaged


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def refuse_copy(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """A directory that was copied or renamed by hand is not what its name says.

    Raises:
        DamagedError: the manifest is of another step.
    """
    if manifest["step"] != step_of(checkpoint):
        raise DamagedError(f"{checkpoint} holds step {manifest['step']}: copied or renamed; give it its name or move it away")


def search(directory: Path, before: int | None = None) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """The newest whole checkpoint of a step before `before` with its manifest, and why each newer one was passed over.

    Raises:
        ValueError, OSError: what is newest is not damaged, and yet cannot be read (see `read_manifest`).
    """
    reasons = []
    for checkpoint in reversed(list_checkpoints(directory)):
        if before is not None and step_of(checkpoint) >= before:
            continue
        try:
            manifest = read_manifest(checkpoint)
            refuse_copy(checkpoint, manifest)
        except DamagedError as damage:
            reasons.append(str(damage))
            continue
        return (checkpoint, manifest), reasons
    return None, reasons


def say_passed_over(reasons: list[str]) -> None:
    """Names on stderr what was not taken."""
    for reason in reasons:
        print(f"checkpoint passed over: {reason}", file=sys.stderr, flush=True)


def newest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its manifest; each newer one that is damaged is named on stderr."""
    found, reasons = search(directory)
    say_passed_over(reasons)
    return found


def refuse_to_begin_anew(directory: Path, reasons: list[str]) -> None:
    """Where there are checkpoints and none can be used, a start at step 0 would throw the run away.

    What an interrupted save left (`.partial`) is no checkpoint.

    Raises:
        DamagedError: with every reason, and what to do.
    """
    aside = sorted(path.name for path in directory.glob("step-*.broken"))
    if reasons or aside:
        why = "; ".join([*(reason.removesuffix("; choose another step") for reason in reasons), *_set_aside(aside)])
        raise DamagedError(
            f"{directory} holds no checkpoint that can be used, and nothing was changed: {why}; "
            "bring one back, or choose another --run_dir to begin at step 0"
        )


def _set_aside(names: list[str]) -> list[str]:
    return [f"{', '.join(names)} set aside before"] if names else []


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
        if not checkpoint.exists():
            steps = ", ".join(str(step_of(path)) for path in list_checkpoints(directory)) or "none"
            raise ValueError(f"{checkpoint} does not exist; steps there: {steps}")
        manifest = read_manifest(checkpoint)
        refuse_copy(checkpoint, manifest)
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
    """Renames checkpoints of later steps to `.broken`: they were passed over, and must not count when old ones are pruned.

    One that was set aside before stays what it is; the next has a number, as in step-00000100.2.broken.
    """
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            number, broken = 1, path.with_name(f"{path.name}.broken")
            while broken.exists():
                number += 1
                broken = path.with_name(f"{path.name}.{number}.broken")
            os.replace(path, broken)
