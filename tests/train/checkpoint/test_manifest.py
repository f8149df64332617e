"""The files that a resumed run reads: any missing, unknown or mistyped field is one clear error; old manifests stay readable."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.json_files import seal
from igpt_ds.schema import OtherVersionError, UnknownFieldError
from igpt_ds.train.checkpoint.manifest import DamagedError, Manifest, read_checkpoint, write_manifest
from igpt_ds.train.early import EarlyState
from igpt_ds.train.safety.rollback import read_rollbacks

RECIPE = Recipe("r", ModelConfig(2, 2, 16, 4, 512), 12, 100, 0.01, 3)
MANIFEST = {  # as it is written since version 2 exists, with every field
    "format": "igpt_ds.checkpoint",
    "version": 2,
    "world_size": 2,
    "stage": 3,
    "versions": {"torch": "2.9", "deepspeed": "0.18"},
    "recipe": recipe_to_dict(RECIPE),
    "data": {
        "path": "shards",
        "dataset_hash": "d",
        "palette_hash": "p",
        "order": 2,
        "datasets": [{"path": "shards", "dataset_hash": "d", "n_images": 36, "share": 4}],
    },
    "precision": "fp32",
    "sequence_parallel": 1,
    "finetune": {
        "classes": ["a", "b"],
        "dataset": "tiny",
        "dataset_hash": "d",
        "train_split": "train",
        "n_train": 36,
        "start_step": 7,
    },
    "step": 8,
    "images_seen": 96,
    "skipped_ranges": [[12, 24]],
    "guards": {
        "losses": [2.5, 2],
        "spiked": 1,
        "skips_in_a_row": 0,
        "skipped": 3,
        "since": None,
        "unvalidated": False,
        "early": {"best_step": 4, "best": {"val_loss": 2.0}, "worse": 1},
    },
    "files": [],
}
ROLLBACKS = {
    "format": "igpt_ds.rollbacks",
    "version": 1,
    "rollbacks": [{"step": 9, "since": 8, "back_to": 4, "skipped": [24, 36], "why": "spike"}],
}
OPTIONAL = {"order", "datasets", "finetune", "guards", "losses", "spiked", "skips_in_a_row", "skipped", "since", "unvalidated"}
OPTIONAL |= {"early", "best_step", "best", "worse", "versions", "sequence_parallel", "skipped_ranges"}
OPTIONAL |= set(MANIFEST["recipe"]) - {"name", "model", "batch_images", "steps", "lr", "warmup_steps"} | {"n_px", "n_vocab"}
OTHERS = (None, True, 7, -7, 0.5, "text", [], [[]], {}, {"x": 1})


def resealed(values: object) -> object:
    """The values as today's writer leaves them; those of an older version, or of no format, as they are."""
    return seal(values) if isinstance(values, dict) and {"format", "version"} <= values.keys() else values


def checkpoint(directory: Path, values: object) -> Path:
    path = directory / "step-00000008"
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(json.dumps(resealed(values)))
    (path / "COMPLETE").write_text("0 files\n")  # as older code left it
    return path


def read_manifest(directory: Path, values: object) -> Manifest:
    return read_checkpoint(checkpoint(directory, values)).manifest


def rollbacks(directory: Path, values: object) -> object:
    (directory / "rollbacks.json").write_text(json.dumps(resealed(values)))
    return read_rollbacks(directory)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(whole: dict[str, Any], place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    values = copy.deepcopy(whole)
    inside: Any = values
    for key in place[:-1]:
        inside = inside[key]
    change(inside, place[-1])
    return values


BOTH = pytest.mark.parametrize(
    ("read", "whole"), [(read_manifest, MANIFEST), (rollbacks, ROLLBACKS)], ids=["manifest", "rollbacks"]
)


def test_a_manifest_of_today_and_one_of_the_first_days(tmp_path: Path) -> None:
    found = read_manifest(tmp_path, MANIFEST)
    assert (found.recipe, found.step, found.skipped_ranges) == (RECIPE, 8, ((12, 24),))
    assert found.guards.early == EarlyState(4, {"val_loss": 2.0}, 1)
    write_manifest(tmp_path / "step-00000008", found)
    assert read_checkpoint(tmp_path / "step-00000008").manifest == found
    needed = {name: value for name, value in MANIFEST.items() if name not in OPTIONAL}
    assert read_manifest(tmp_path, needed).guards.early is None


@BOTH
def test_a_deleted_field_is_named_or_optional(tmp_path: Path, read: Callable[[Path, object], object], whole: Any) -> None:
    for place in places(whole):
        if isinstance(place[-1], int) or "versions" in place[:-1] or "best" in place[:-1]:
            continue
        values = changed(whole, place, lambda inside, key: inside.pop(key))
        if place[-1] in OPTIONAL and whole is MANIFEST:
            read(tmp_path, values)
        else:
            with pytest.raises(ValueError, match=rf"\.json .*has no '.*{place[-1]}'; "):
                read(tmp_path, values)


@BOTH
def test_a_field_of_another_type_is_one_clear_error(tmp_path: Path, read: Callable[[Path, object], object], whole: Any) -> None:
    errors = []
    for place in places(whole):
        for other in OTHERS:
            values = changed(whole, place, lambda inside, key, other=other: inside.__setitem__(key, other))
            try:
                read(tmp_path, values)
            except ValueError as error:  # anything else is a crash
                errors.append(str(error))
    assert len(errors) > 7 * len(list(places(whole)))
    assert not [error for error in errors if not re.fullmatch(r".*\.json .+; .+", error)]


@BOTH
def test_an_unknown_field_or_version_is_no_damage(tmp_path: Path, read: Callable[[Path, object], object], whole: Any) -> None:
    """Newer code may have written the file: nothing may be thrown away for that."""
    with pytest.raises(UnknownFieldError, match=r"\.json has an unknown field news 5; read it with the code that wrote it"):
        read(tmp_path, whole | {"news": 5})
    for changes in ({"version": 9}, {"format": "x"}):
        with pytest.raises(
            OtherVersionError, match=r"\.json is not igpt_ds\..* version .*; .*read it with the code that wrote it"
        ):
            read(tmp_path, whole | changes)


@pytest.mark.parametrize("text", ["", "[]", "7", "null", '{"a": 1, "a": 2}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "{}"])
def test_a_text_that_is_no_manifest_is_damage(tmp_path: Path, text: str) -> None:
    path = checkpoint(tmp_path, {})
    (path / "manifest.json").write_text(text)
    with pytest.raises(DamagedError, match=r"manifest\.json .*; choose another step"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/passwd", "a/b", "a\0b"])
def test_a_file_outside_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedError, match=r"files\[0\]\.name "):
        read_manifest(tmp_path, MANIFEST | {"files": [{"name": name, "bytes": 0, "sha256": "x"}]})
