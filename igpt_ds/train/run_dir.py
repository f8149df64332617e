"""The run directory: the config, curves and checkpoints of one run; another run is refused. train/session.py calls, on rank 0.

run.json holds the recipe, the data's hashes, the complete DeepSpeed configuration, the matrix product on CPUs and the git
commit; palette.npy the colours of the tokens; train.jsonl and tensorboard/ the curves; checkpoints/ the checkpoints; lock shows
that a run uses the directory (train/run_lock.py); FINISHED appears after the last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds.config import Recipe, recipe_from_dict, recipe_to_dict
from igpt_ds.data.facts import DataFacts
from igpt_ds.ds_config import Run, run_to_dict
from igpt_ds.errors import InputError
from igpt_ds.files import atomic_file
from igpt_ds.json_files import read_json
from igpt_ds.launcher import MOST_RANKS
from igpt_ds.plain_files import is_missing
from igpt_ds.plan.costs import VAL_IMAGES
from igpt_ds.provenance import git_commit
from igpt_ds.schema import record_from, to_json
from igpt_ds.sealed import Format
from igpt_ds.train.run_lock import take

RUN = Format("igpt_ds.run", "run config", "restore the file, or choose another --run_dir", version=2, sealed=2, oldest=1)
_NO_FLAGS = ("name", "objective", "finetune", "n_classes", "start", "dataset_hash", "palette_hash", "order")


@dataclass(frozen=True)
class _RecipeFacts:
    name: str
    steps: int
    batch_images: int


@dataclass(frozen=True)
class _RunFile:
    """What every run.json has, as its reader checks it."""

    recipe: _RecipeFacts
    world_size: int
    val_images: int | None = None  # of a validation; None: all, as in earlier versions

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= MOST_RANKS:  # a reader looks for a heartbeat of each
            raise InputError(f"world_size {self.world_size}, which is not between 1 and {MOST_RANKS}")
        if self.val_images is not None and self.val_images < 1:
            raise InputError(f"val_images {self.val_images}, which is below 1")
        for name, value in vars(self.recipe).items():
            if isinstance(value, int) and not 1 <= value < 1 << 40:
                raise InputError(f"{name} {value}, which is not between 1 and 2^40")


def check(run_dir: Path, run: Run, data: DataFacts, palette: Path, resume: bool) -> None:
    """Reserves the run directory, which must be new or hold this run. Writes nothing but the directory and its lock.

    Args:
        data: what identifies the training data.
        resume: whether the user asked to continue.

    A run that stopped before its first checkpoint has nothing to lose: any other run may take its place.

    Raises:
        ValueError: the directory holds another run (the first difference is named), this run without `resume`, another palette,
            or checkpoints without run.json; or another run uses it; or it cannot be made.
    """
    refuse_file(run_dir)
    path, saved = run_dir / "run.json", has_checkpoints(run_dir)
    if path.exists() and saved:
        check_same(run_dir, run, data)
        if not resume:
            raise InputError(f"{run_dir} already holds a run; continue it with --resume auto or choose another --run_dir")
    elif path.exists():
        read_run(run_dir)  # refuses a damaged or foreign file
    elif (run_dir / "checkpoints").exists():
        raise InputError(f"{run_dir} holds checkpoints but no run.json, so their run is unknown; choose another --run_dir")
    copy = run_dir / "palette.npy"
    if (saved or not path.exists()) and copy.exists() and copy.read_bytes() != palette.read_bytes():
        raise InputError(f"{copy} differs from the palette {palette}; choose another --run_dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run_dir {run_dir} cannot be made: {error.strerror}; choose another directory") from None
    take(run_dir, owned=bool(this_start()) and _owner(run_dir) == this_start())


def has_checkpoints(run_dir: Path) -> bool:
    """Whether a run directory holds a checkpoint, complete or damaged; an interrupted save is none."""
    return any(not path.name.endswith(".partial") for path in (run_dir / "checkpoints").glob("step-*"))


def fast_id_file(run_dir: Path) -> Path:
    """The file that names the run's directory in --fast_dir (checkpoint/tiers.py)."""
    return run_dir / "fast_id"


def has_begun(run_dir: Path) -> bool:
    """Whether a run directory holds a run with a state, in it or in --fast_dir."""
    return (run_dir / "run.json").exists() and (has_checkpoints(run_dir) or fast_id_file(run_dir).exists())


def refuse_file(run_dir: Path) -> None:
    """Checks that --run_dir is no file.

    Raises:
        ValueError: it is a file.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run_dir {run_dir} is a file; choose a directory or a new name")


def record(
    run_dir: Path, run: Run, data: DataFacts, palette: Path, cpu_product: str, note: str = "", val_images: int | None = None
) -> None:
    """Writes run.json and the palette, and removes what a killed save left. Called when nothing can refuse the run any more.

    Args:
        note: what the program changed by itself.
        val_images: images of a validation; None for all.
    """
    if not has_checkpoints(run_dir) or not (run_dir / "palette.npy").exists():
        with atomic_file(run_dir / "palette.npy") as file:
            file.write(palette.read_bytes())
    about: dict[str, object] = {"git_commit": git_commit(), "data": to_json(data), "cpu_product": cpu_product}
    about |= {"val_images": val_images} | ({"note": note} if note else {})
    RUN.write(run_dir / "run.json", about | run_to_dict(run))
    for torn in (run_dir / "checkpoints").glob("*.partial"):
        shutil.rmtree(torn)


def write_finished(run_dir: Path) -> None:
    """Marks a finished run."""
    with atomic_file(run_dir / "FINISHED", "w") as file:
        file.write("all steps done\n")


def this_start() -> str:
    """The name that slurm/launch.sh gave this start of the job; "" without it."""
    return os.environ.get("IGPT_DS_OWNER", "")


def check_owner(run_dir: Path) -> None:
    """Refuses to save if a later start of the job has taken over the run. This start then runs on a node that SLURM lost.

    Raises:
        ValueError: RUN_DIR/owner names another start.
    """
    owner = _owner(run_dir)
    if this_start() and owner and owner != this_start():
        path = run_dir / "owner"
        raise InputError(f"{path} names {owner} and this start is {this_start()}: the other start continues; nothing was saved")


def _owner(run_dir: Path) -> str:
    path = run_dir / "owner"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def check_same(run_dir: Path, run: Run, data: DataFacts) -> None:
    """Refuses a run directory of another run, by its run.json.

    Raises:
        ValueError: a value differs (the first difference is named), or run.json is missing or damaged.
    """
    old, path = read_run(run_dir), run_dir / "run.json"
    differences = recipe_differences(old["recipe"], recipe_to_dict(run.recipe))
    before = record_from(DataFacts, old.get("data"), f"{path} field 'data'", "choose another --run_dir")
    pairs = [(name, getattr(before, name), getattr(data, name)) for name in ("dataset_hash", "palette_hash", "order")]
    splits = [("train_split", before.split, data.split)] if before.split else []  # earlier versions did not record it
    for name, there, here in [*differences, *splits, *pairs]:
        if there != here:
            what = _first_difference(name, there, here)
            raise InputError(f"{path} belongs to another run: {what}; choose another --run_dir")


def _first_difference(name: str, there: object, here: object) -> str:
    """The flag with both values: of a record, that of its first field that differs."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        field = next(field for field in {**here, **there} if there.get(field) != here.get(field))
        without = False if field == "tied_embeddings" else None  # which is left out where it is false
        return _first_difference(field, there.get(field, without), here.get(field, without))
    if name == "order" and "stream" not in (there, here):
        return (
            f"it takes the images in order {there} and this version in order {here}, so only the version that began it can go on"
        )
    return f"{'' if name in _NO_FLAGS else '--'}{name} is {there} there and {here} here"


def recipe_differences(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """(name, there, here) of every difference between two recipes as JSON; those that change the meaning of the weights first.

    A knob that older code did not know has its default there.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    names = sorted(ours, key=lambda name: name not in ("objective", "model"))
    pairs = [(name, theirs.get(name, defaults[name]), ours[name]) for name in names]
    return [(name, there, here) for name, there, here in pairs if there != here]


def read_run(run_dir: Path) -> dict[str, Any]:
    """The JSON of a run's run.json.

    Raises:
        ValueError: there is none, it has another format or version, or a field is missing or has another type.
    """
    path = run_dir / "run.json"
    values = RUN.read(path)
    record_from(_RunFile, values, str(path), RUN.fix)
    return values


def number_validated(args: argparse.Namespace, default: int | None = VAL_IMAGES) -> int | None:
    """The images of a validation: --val_images, else those of the run that --resume auto continues, else the default.

    None means all. Earlier versions read all and recorded nothing.
    """
    begun = args.resume == "auto" and has_begun(args.run_dir)
    chosen = read_run(args.run_dir).get("val_images") if begun and args.val_images is None else args.val_images
    return default if chosen is None and not begun else chosen


def recorded_product(run_dir: Path, known: Sequence[str]) -> str | None:
    """The float32 product of `cpu_kernels` that a run uses on CPUs; None for a new run. Older code always used "onednn".

    Raises:
        ValueError: run.json names an unknown matrix product.
    """
    path = run_dir / "run.json"
    if is_missing(path):
        return None
    product = read_run(run_dir).get("cpu_product", "onednn")
    if product not in known:
        raise InputError(f"{path} has cpu_product {product!r}; known: {', '.join(known)}; it was written by another version")
    return str(product)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a --config file: a run.json, or a recipe alone."""
    values = read_json(path, "config")
    if isinstance(values, dict) and "recipe" in values and not values.keys().isdisjoint(("format", "version", "sha256")):
        fields = dataclasses.replace(RUN, fix='save its "recipe" as a file of its own, which may be edited')
        values = fields.opened(values, f"run config {path}")
    inner = values.get("recipe", values) if isinstance(values, dict) else {}
    return recipe_from_dict(inner, str(path))
