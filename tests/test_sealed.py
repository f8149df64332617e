"""What `Format` writes it reads; what was changed, is older, newer or foreign is told apart in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import seal, write_json
from igpt_ds.schema import OtherVersionError
from igpt_ds.sealed import Format

THING = Format("igpt_ds.thing", "thing", "make it again", version=3, sealed=3, oldest=2, limit=1000)
FIELDS = {"a": [1, 2.5], "b": {"x": None}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    THING.write(path, FIELDS)
    assert THING.read(path) == FIELDS
    assert list(json.loads(path.read_text())) == ["format", "version", "a", "b", "sha256"]
    write_json(path, {"format": "igpt_ds.thing", "version": 2, **FIELDS})
    assert THING.read(path) == FIELDS, "version 2 had no sha256"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "has content [], which is not an object"),
        (THING.seal(FIELDS) | {"a": 1}, "was changed since it was written: its sha256 differs"),
        (THING.seal(FIELDS) | {"version": 2}, "was changed since it was written"),
        (THING.seal(FIELDS) | {"sha256": 3}, "was changed since it was written"),
        ({"format": "igpt_ds.thing", "version": 3, **FIELDS}, "has no 'sha256', as every file of version 3 has"),
        (FIELDS, "is not igpt_ds.thing version 2 or 3: it has no 'format'"),
        ({"format": "igpt_ds.thing"}, "is not igpt_ds.thing version 2 or 3: it has no 'version'"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path, values: Any, told: str) -> None:
    path = tmp_path / "t.json"
    write_json(path, values)
    with pytest.raises(ValueError, match=r"make it again$") as error:
        THING.read(path)
    assert str(error.value).startswith(f"thing {path} {told}")
    assert not isinstance(error.value, OtherVersionError)


@pytest.mark.parametrize("changes", [{"version": 4}, {"version": 1}, {"version": "3"}, {"version": True}, {"format": "other"}])
def test_another_version_may_be_undamaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_json(tmp_path / "t.json", seal({"format": "igpt_ds.thing", "version": 3} | changes))
    with pytest.raises(OtherVersionError, match=r"t\.json is not igpt_ds\.thing version 2 or 3: it is .*; make it again, or"):
        THING.read(tmp_path / "t.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    THING.write(tmp_path / "t.json", {"a": "x" * 1000})
    with pytest.raises(ValueError, match=r"t\.json is not valid JSON of its kind: it has more than 1,000 bytes; make it again"):
        THING.read(tmp_path / "t.json")


def test_a_format_that_had_no_header(tmp_path: Path) -> None:
    bare = Format("igpt_ds.bare", "bare", "make it again", version=1, sealed=1, oldest=0)
    write_json(tmp_path / "t.json", FIELDS)
    assert bare.read(tmp_path / "t.json") == FIELDS
    write_json(tmp_path / "t.json", FIELDS | {"version": 1})
    with pytest.raises(ValueError, match=r"t\.json is not igpt_ds\.bare version 1: it has no 'format'; make it again"):
        bare.read(tmp_path / "t.json")
