"""Finds the model that a path stands for: a model dir, a run dir, a checkpoint, an ImageGPT directory of Hugging Face.

In: a path. Out: a `FoundModel`. A checkpoint or a foreign directory becomes a model dir in a temporary directory first, so
one reader checks the weights of all. Called by `models.py` and the programs with --model.
"""

from __future__ import annotations

import atexit
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from igpt_ds.api.arguments import directory_path
from igpt_ds.data.palette import Palette, load_palette, save_palette
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import best_row, by_layer, read_results
from igpt_ds.json_files import read_json
from igpt_ds.model.classifier import CLASS_HEAD
from igpt_ds.model.interchange.hf import read_hf, save_imported
from igpt_ds.model.store import ModelInfo, load_classifier, load_model, read_info
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.checkpoint.consolidate import consolidate
from igpt_ds.train.checkpoint.directory import step_of

_KINDS = "a model dir, a run dir, or an ImageGPT directory of Hugging Face"
_OTHERS = {  # what people confuse with a model, by a file in it
    "index.json": "a shard directory; open it with igpt_ds.open_shards",
    "manifest.json": "a feature directory; open it with igpt_ds.open_features",
}


@dataclass(frozen=True)
class FoundModel:
    """A model in memory, in float32 on the CPU, and where it was found. class_head: [K, C], after fine-tuning."""

    path: Path
    network: Transformer
    info: ModelInfo
    palette: Palette
    class_head: Tensor | None


def find_model(path: str | os.PathLike[str]) -> FoundModel:
    """The model of a path.

    Raises:
        ValueError: there is none, there are several, or it is damaged.
    """
    directory = directory_path(path)
    if directory.is_file():
        raise InputError(f"{directory} is a file; name the directory that holds the model: {directory.parent}")
    if not directory.is_dir():
        hub = "; models are read from disk, download it first" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        raise InputError(f"{directory} does not exist; name {_KINDS}{hub}")
    if _is_foreign(directory):
        return _from_hugging_face(directory)
    if (directory / "config.json").is_file():
        return _read(directory, directory)
    place = _of_run(directory)
    if isinstance(place, Path):
        return _read(place, place)
    if place is None:
        return _only_model_below(directory)
    with tempfile.TemporaryDirectory(prefix="igpt_ds.") as scratch:
        return _read(place.gather(Path(scratch)), place.run_dir if directory.name == "checkpoints" else directory)


def model_dir(path: Path) -> Path:
    """The model dir that a program's --model stands for: a model dir, a run dir or a checkpoint, as in `find_model`.

    A checkpoint becomes a temporary model dir, which is removed when the process ends. Other paths are returned as they are, and
    the reader refuses them.

    Raises:
        ValueError: the path holds several models, such as those of a fine-tuning on subsets.
    """
    place = None if (path / "config.json").is_file() else _of_run(path)
    if place is None and not (path / "config.json").is_file() and (below := _one_below(path)):
        return model_dir(below)
    if not isinstance(place, _Checkpoint):
        return place or path
    scratch = tempfile.TemporaryDirectory(prefix="igpt_ds.")
    atexit.register(scratch.cleanup)
    return place.gather(Path(scratch.name))


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of a run. step: None is the newest, or the best of a fine-tuning."""

    run_dir: Path
    step: int | None

    def gather(self, scratch: Path) -> Path:
        """Makes a model dir below `scratch`."""
        consolidate(self.run_dir, scratch / "model", self.step)
        return scratch / "model"


def _of_run(directory: Path) -> Path | _Checkpoint | None:
    """The model dir or the checkpoint that a part of a run dir stands for; None if it is none."""
    if directory.name == "checkpoints":
        return _Checkpoint(directory.parent, None)
    if directory.parent.name == "checkpoints" and (directory / "manifest.json").is_file():
        return _Checkpoint(directory.parent.parent, step_of(directory))
    if (directory / "model" / "config.json").is_file():
        return directory / "model"
    is_run = (directory / "checkpoints").is_dir() or (directory / "run.json").is_file()
    return _Checkpoint(directory, None) if is_run else None


def _one_below(directory: Path) -> Path | None:
    """The only model dir or run dir below a directory; None if there is none."""
    below = sorted(file.parent for place in ("*", "models/*") for file in directory.glob(f"{place}/config.json"))
    below = below or sorted(file.parent for file in directory.glob("*/run.json"))
    if len(below) > 1:
        raise InputError(f"{directory} holds {len(below)} models; name one: {', '.join(map(str, below))}")
    return below[0] if below else None


def _only_model_below(directory: Path) -> FoundModel:
    if below := _one_below(directory):
        return find_model(below)
    for name, what in _OTHERS.items():
        if (directory / name).is_file():
            raise InputError(f"{directory} is {what}")
    if next(directory.glob("*.jsonl"), None):
        raise InputError(f"{directory} holds results and no model; name {_KINDS}")
    raise InputError(f"{directory} holds no model: it has no config.json and no checkpoints; name {_KINDS}")


def _read(directory: Path, path: Path) -> FoundModel:
    """The model of a model dir; `path` is what the user knows it by."""
    info, head = read_info(directory), None
    palette = load_palette(directory / "palette.npy")
    if palette.hash != info.palette_hash:
        raise InputError(f"{directory / 'palette.npy'} is not the palette that the model was trained with; consolidate again")
    if info.class_head is None:
        network = load_model(directory)[0]
    else:
        weights = load_classifier(directory)[0].state_dict()
        head = weights.pop(CLASS_HEAD)
        with torch.device("meta"):
            network = Transformer(info.config, objective=info.objective)
        network.load_state_dict(weights, assign=True)
    return FoundModel(path, network.eval().requires_grad_(False), info, palette, head)


def _is_foreign(directory: Path) -> bool:
    file = directory / "config.json"
    values = read_json(file, "config") if file.is_file() else None
    return isinstance(values, dict) and "model_type" in values


def _from_hugging_face(directory: Path) -> FoundModel:
    imported = read_hf(directory)
    if imported.colors is None:
        missing = f"{directory / 'preprocessor_config.json'} has no 'clusters', the palette"
        raise InputError(f"{missing}; import the directory with tools/import_hf.py --palette and load the model dir")
    with tempfile.TemporaryDirectory(prefix="igpt_ds.") as scratch:
        palette, file = Palette(imported.colors), Path(scratch) / "palette.npy"
        save_palette(file, palette)
        save_imported(Path(scratch) / "model", imported, file, palette.hash)
        return _read(Path(scratch) / "model", directory)


def best_layer(path: Path, info: ModelInfo, kind: str) -> int | None:
    """The layer of the model's best linear probe by the held-out images; None if no probe is known.

    Rows are read from results.jsonl and results/*.jsonl, in the directory of the model and in the two above it.
    """
    places = [path, *path.absolute().parents[:2]]
    files = [file for place in places for name in ("results.jsonl", "results/*.jsonl") for file in sorted(place.glob(name))]
    rows = [row for file in files for row in by_layer(read_results(file))]
    known = [row for row in rows if row.model_hash == info.model_hash and row.features == kind]
    masked = [row for row in known if row.mask_draws]  # as `Model.features` sees the images of a BERT model
    return best_row(masked or known).layer if known else None
