"""Keys of images: any name comes back, nothing is read before the first key, damage is refused by name."""

from __future__ import annotations

import json
import os

import pytest

from igpt_ds.files import sha256_file
from igpt_ds.keys import Keys, write_keys

NAMES = ["a/1.jpg", "two\nlines.png", 'a "quote", a | and a \\', "größe 写真.webp", os.fsdecode(b"\xff\xfe.gif"), ""]


def test_any_name_comes_back(tmp_path):
    path = tmp_path / "keys.jsonl"
    write_keys(path, iter(NAMES))
    keys = Keys(path, len(NAMES), sha256_file(path), "fix")
    assert list(keys) == NAMES
    assert (keys[-1], keys[1:3], len(keys)) == (NAMES[-1], NAMES[1:3], len(NAMES))
    assert "1.jpg" not in repr(keys)
    assert [json.loads(line) for line in path.read_text("ascii").splitlines()] == NAMES
    with pytest.raises(IndexError):
        keys[len(NAMES)]


def test_no_rows(tmp_path):
    write_keys(tmp_path / "keys.jsonl", [])
    assert list(Keys(tmp_path / "keys.jsonl", 0, sha256_file(tmp_path / "keys.jsonl"), "fix")) == []


def test_damage_is_refused_at_the_first_key(tmp_path):
    path = tmp_path / "keys.jsonl"
    write_keys(path, NAMES)
    good = sha256_file(path)
    with pytest.raises(ValueError, match=r"keys.jsonl has 6 keys, not 7; fix"):
        Keys(path, 7, good, "fix")[0]
    path.write_bytes(path.read_bytes()[:-9])
    keys = Keys(path, len(NAMES), good, "fix")
    with pytest.raises(ValueError, match=r"keys.jsonl is missing or damaged.*fix"):
        keys[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"keys.jsonl is missing"):
        keys[0]
