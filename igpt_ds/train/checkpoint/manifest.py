"""A checkpoint's manifest.json: the run of the state, and the size and sha256 of each file; and COMPLETE, with that of
manifest.json itself. No other module knows the formats.

In: a complete checkpoint directory. Out: a `Checkpoint`, whose `Manifest` says all that a reader must check. Called by
train/, finetune.py and tools/reshard.py. No engine is needed, and neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igpt_ds.config import Recipe
from igpt_ds.data.facts import DataFacts
from igpt_ds.ds_config import STAGES
from igpt_ds.errors import InputError
from igpt_ds.files import atomic_file, fsync_path, sha256_file
from igpt_ds.json_files import parse_json, read_text
from igpt_ds.plain_files import check_file
from igpt_ds.schema import OtherVersionError, UnknownFieldError, check_file_name, record_from, to_json
from igpt_ds.sealed import Format
from igpt_ds.train.early import EarlyState
from igpt_ds.train.safety.spikes import SpikeState

_FIX = "choose another step"
_COMPLETE = re.compile(r"([0-9a-f]{64})  manifest\.json\n|\d+ files\n")  # for sha256sum -c; older: a count
_OF_RANK = re.compile(r"(?:.*_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
MANIFEST = Format("igpt_ds.checkpoint", "manifest", _FIX, version=4, sealed=3, oldest=2)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_file_name(self.name)

    @property
    def of_rank(self) -> tuple[str, int] | None:
        """("model" or "optim", rank) of a file that DeepSpeed writes for one rank; None for another file."""
        return of_rank(self.name)


def of_rank(name: str) -> tuple[str, int] | None:
    """("model" or "optim", rank) of the name of a file that DeepSpeed writes for one rank; None for another file."""
    found = _OF_RANK.fullmatch(name)
    return found and (found[2], int(found[1]))


@dataclass(frozen=True)
class FinetuneFacts:
    """What a fine-tuning trains on, and the step of the pre-trained weights that it starts from."""

    classes: tuple[str, ...]
    dataset: str
    dataset_hash: str
    train_split: str
    n_train: int
    start_step: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The run that a checkpoint belongs to. Every checkpoint of a run has the same."""

    recipe: Recipe
    data: DataFacts
    precision: str
    sequence_parallel: int = 1
    finetune: FinetuneFacts | None = None


@dataclass(frozen=True, kw_only=True)
class GuardStates(SpikeState):
    """What the spike guard and early stopping knew, and whether the step still needs its validation."""

    unvalidated: bool = False
    early: EarlyState | None = None  # of a fine-tuning


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the run is at a checkpoint."""

    step: int  # completed
    images_seen: int
    skipped_ranges: tuple[tuple[int, int], ...] = ()  # positions [first, end) in the stream of images, left out by rollbacks
    guards: GuardStates = field(default_factory=GuardStates)

    def __post_init__(self) -> None:
        for name in ("step", "images_seen"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}, which is negative")
        for first, end in self.skipped_ranges:
            if not 0 <= first < end:
                raise InputError(f"skipped_ranges with [{first}, {end}], which is not a range of positions")


@dataclass(frozen=True, kw_only=True)
class Manifest(RunFacts, Progress):
    """The contents of a manifest.json."""

    world_size: int
    stage: int  # of ZeRO
    start: str = ""  # of a state in parts on several nodes: those of one state were saved by one start of the run
    versions: dict[str, str] = field(default_factory=dict)  # of torch and DeepSpeed
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size < 1:
            raise InputError(f"world_size {self.world_size}, which is less than 1")
        if self.stage not in STAGES:
            raise InputError(f"stage {self.stage}, which is not {' or '.join(map(str, STAGES))}")

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(entry.bytes for entry in self.files)

    @property
    def is_whole(self) -> bool:
        """Whether it lists the files of every rank. That of a node's own disk may list a part."""
        found, ranks = {entry.of_rank for entry in self.files}, range(self.world_size)
        if self.stage == 3:
            return all((kind, rank) in found for kind in ("optim", "model") for rank in ranks)
        has_model = "mp_rank_00_model_states.pt" in {entry.name for entry in self.files}
        return has_model and all(("optim", rank) in found for rank in ranks)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory and its manifest."""

    path: Path
    manifest: Manifest


class DamagedError(InputError):
    """The checkpoint is not what was written: incomplete, torn, or without a file. An older one may be used instead."""


def read_checkpoint(path: Path) -> Checkpoint:
    """A complete checkpoint whose files all have their size.

    Raises:
        DamagedError: the checkpoint is missing or incomplete, a file is missing or torn, or the manifest lacks a field, has a
            wrong one, or is not byte for byte what was written. The file or the field is named.
        ValueError: another version wrote it, so it may be undamaged.
        OSError: the disk fails, so it may be undamaged.
    """
    if not path.exists():
        raise DamagedError(f"{path} does not exist; choose another step")
    if not (path / "COMPLETE").exists():
        raise DamagedError(f"{path} is not complete: it has no COMPLETE file; choose another step")
    manifest = _read_manifest(path / "manifest.json")
    for entry in manifest.files:
        file = path / entry.name
        found = file.stat().st_size if file.exists() else None
        if found != entry.bytes:
            check_file(file)
            state = "is missing" if found is None else f"has {found} bytes instead of {entry.bytes}"
            raise DamagedError(f"{file} {state}; choose another step")
    return Checkpoint(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        text = read_text(path, str(path), _FIX)
        values = parse_json(text, str(path), _FIX)
        manifest = record_from(Manifest, MANIFEST.opened(values, str(path)), str(path), _FIX, strict=True)
        _refuse_other_bytes(path, text)
        return manifest
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; {_FIX}") from None
    except (UnknownFieldError, OtherVersionError):
        raise
    except ValueError as error:
        raise DamagedError(str(error)) from None


def _refuse_other_bytes(path: Path, text: str) -> None:
    # The manifest's seal covers its values, not the blanks between them.
    mark = path.with_name("COMPLETE")
    found = _COMPLETE.fullmatch(read_text(mark, str(mark), _FIX))
    if found is None:
        raise InputError(f"{mark} is damaged: it has not the sha256 of manifest.json; {_FIX}")
    if found[1] and found[1] != hashlib.sha256(text.encode()).hexdigest():
        raise InputError(f"{path} has not the sha256 that {mark} holds, so one of them is damaged; {_FIX}")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes manifest.json, then COMPLETE: from here on the checkpoint counts."""
    path = directory / "manifest.json"
    MANIFEST.write(path, to_json(manifest))
    with atomic_file(directory / "COMPLETE", "w") as file:
        file.write(f"{sha256_file(path)}  {path.name}\n")


def file_entry(path: Path) -> FileEntry:
    """The manifest's entry of a file, which is forced to the disk first."""
    fsync_path(path)
    return FileEntry(path.name, path.stat().st_size, sha256_file(path))


def damaged_files(path: Path, entries: Sequence[FileEntry]) -> list[str]:
    """The names of the files in a checkpoint directory that do not hold what was written, by their sha256.

    Raises:
        OSError: a file cannot be read, which says nothing about its contents.
    """
    damaged = []
    for entry in entries:
        try:
            whole = sha256_file(path / entry.name) == entry.sha256
        except FileNotFoundError:
            whole = False
        if not whole:
            damaged.append(entry.name)
    return damaged


def refuse_damaged(checkpoint: Checkpoint) -> None:
    """Compares every file of a checkpoint with its sha256.

    Raises:
        ValueError: a file does not hold what was written.
    """
    if damaged := damaged_files(checkpoint.path, checkpoint.manifest.files):
        raise InputError(f"{checkpoint.path / damaged[0]} is damaged (sha256 differs); choose another --step")
