"""The run directory: one run's config, curves and checkpoints. It refuses to mix two runs. Called by train.py and
finetune.py on rank 0.

run.json holds the recipe, the data's hashes, the complete DeepSpeed configuration, the matrix product on CPUs and the git
commit; palette.npy the colours of the tokens; train.jsonl and tensorboard/ the curves; checkpoints/ the states; lock says that
a run is at work (train/run_lock.py); FINISHED appears at the last step.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt_ds.config import Recipe, recipe_from_dict, recipe_to_dict
from igpt_ds.ds_config import Run, run_to_dict
from igpt_ds.files import atomic_file, read_json, write_json
from igpt_ds.provenance import git_commit
from igpt_ds.train.run_lock import take

FORMAT, VERSION = "igpt_ds.run", 1


def check(run_dir: Path, run: Run, data: dict[str, Any], palette: Path, resume: bool) -> None:
    """Checks that the run directory is new or belongs to this run, and that no other run is at work there; it is ours then.

    Writes nothing but the directory itself and its lock.

    Args:
        data: what identifies the training data: dataset_hash, palette_hash, order, path.
        resume: whether the user asked to continue.

    Raises:
        ValueError: the directory holds another run's config (the first difference is named), or a run that was not to be
            continued, or another palette, or checkpoints of nobody knows which run; or another run is at work there; or it
            is no directory and cannot become one.
    """
    refuse_file(run_dir)
    path = run_dir / "run.json"
    if path.exists():
        _check_same(read_run(run_dir), run, data, path)
        if not resume:
            raise ValueError(f"{run_dir} holds a run already; continue it with --resume auto or choose another --run_dir")
    elif (run_dir / "checkpoints").exists():
        raise ValueError(f"{run_dir} holds checkpoints but no run.json to say of which run; choose another --run_dir")
    copy = run_dir / "palette.npy"
    if copy.exists() and copy.read_bytes() != palette.read_bytes():
        raise ValueError(f"{copy} is another palette than {palette}; choose another --run_dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run_dir {run_dir} cannot be made: {error.strerror}; choose another directory") from None
    take(run_dir, owned=bool(this_start()) and _owner(run_dir) == this_start())


def refuse_file(run_dir: Path) -> None:
    """Refuses a --run_dir that is a file.

    Raises:
        ValueError: it is.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"--run_dir {run_dir} is a file; choose a directory, or a name that is not taken")


def record(run_dir: Path, run: Run, data: dict[str, Any], palette: Path, cpu_product: str) -> None:
    """Writes down which run this is, once it is known to start: run.json and the palette. Clears what a killed save left."""
    if not (run_dir / "palette.npy").exists():
        with atomic_file(run_dir / "palette.npy") as file:
            file.write(palette.read_bytes())
    header = {"format": FORMAT, "version": VERSION, "git_commit": git_commit(), "data": data, "cpu_product": cpu_product}
    write_json(run_dir / "run.json", header | run_to_dict(run))
    for torn in (run_dir / "checkpoints").glob("*.partial"):
        shutil.rmtree(torn)


def this_start() -> str:
    """The name that the batch script gave this start of the job (slurm/launch.sh); empty elsewhere."""
    return os.environ.get("IGPT_DS_OWNER", "")


def check_owner(run_dir: Path) -> None:
    """Refuses to save where a later start of the job has taken the run over, while this one lives on, on a node that SLURM lost.

    Raises:
        ValueError: RUN_DIR/owner names another start.
    """
    owner = _owner(run_dir)
    if this_start() and owner and owner != this_start():
        path = run_dir / "owner"
        raise ValueError(f"{path} names {owner} and this start is {this_start()}: another start goes on; nothing was saved")


def _owner(run_dir: Path) -> str:
    path = run_dir / "owner"
    return path.read_text().strip() if path.exists() else ""


def _check_same(old: dict[str, Any], run: Run, data: dict[str, Any], path: Path) -> None:
    new = recipe_to_dict(run.recipe)
    differences = recipe_differences(old["recipe"], new)
    pairs = [(name, old["data"].get(name), data.get(name)) for name in ("dataset_hash", "palette_hash", "order")]
    for name, before, now in [*differences, *pairs]:
        if before != now:
            raise ValueError(f"{path} is of another run: {name} is {before} there and {now} here; choose another --run_dir")


def recipe_differences(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """(name, there, here) for what differs between two recipes as dicts, what changes the meaning of the weights first.

    A knob that older code did not know stands at its default there.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    names = sorted(ours, key=lambda name: name not in ("objective", "model"))
    pairs = [(name, theirs.get(name, defaults[name]), ours[name]) for name in names]
    return [(name, there, here) for name, there, here in pairs if there != here]


def read_run(run_dir: Path) -> dict[str, Any]:
    """run.json of a run directory."""
    path = run_dir / "run.json"
    values = read_json(path, "run config")
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise ValueError(f"{path} is not version {VERSION} of {FORMAT}; it was not written by this code")
    return values


def read_recipe(path: Path) -> Recipe:
    """The recipe in a run.json, or in a file that holds a recipe alone: what --config takes."""
    values = read_json(path, "config")
    inner = values.get("recipe", values) if isinstance(values, dict) else {}
    return recipe_from_dict(inner, str(path))
