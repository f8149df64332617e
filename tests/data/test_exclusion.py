"""Exclusion lists: what is written comes back, and a list about anything else is refused with what it is about."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igpt_ds.data.exclusion import ExclusionReason, read_exclusion, write_exclusion
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.json_files import seal

REASON = ExclusionReason("for a test", method="phash")


@pytest.fixture(scope="module")
def shards(tiny_dataset):
    return ShardSet(tiny_dataset, "train")


@pytest.fixture
def file(shards, tmp_path):
    path = tmp_path / "lists" / "exclude.json"
    write_exclusion(path, shards, np.array([1, 4, 5]), REASON)
    return path


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_comes_back(shards, tmp_path, data):
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, shards.n_images - 1), max_size=shards.n_images - 1))), dtype=np.int64)
    write_exclusion(tmp_path / "a.json", shards, ids, REASON)
    found = read_exclusion(tmp_path / "a.json", shards)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, ids)


def test_says_what_it_is_about(file, shards):
    content = json.loads(file.read_text())
    assert content.pop("sha256") == seal(content)["sha256"]
    assert content == {
        "format": "igpt_ds.exclusion",
        "version": 2,
        "dataset_hash": shards.dataset_hash,
        "split": "train",
        "n_images": shards.n_images,
        "about": {"reason": "for a test", "method": "phash"},
        "ids": [1, 4, 5],
    }
    assert [path.name for path in file.parent.iterdir()] == ["exclude.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"version": 3},
            "exclude.json is not igpt_ds.exclusion version 1 or 2: it is version 3 of 'igpt_ds.exclusion'; make the list",
        ),
        ({"format": "igpt_ds.shards"}, "is not igpt_ds.exclusion version 1 or 2: it is version 2 of 'igpt_ds.shards'"),
        ({"ids": None}, "has no 'ids'; make the list again"),
        ({"split": "val"}, "is about split 'val', not 'train'; make the list again"),
        ({"dataset_hash": "0" * 64}, "is about images 000000000000, "),
        ({"split": None}, "exclude.json has no 'split'; make the list again"),
        ({"dataset_hash": None}, "exclude.json has no 'dataset_hash'; make the list again"),
        ({"split": 1}, "exclude.json has split 1, which is not a string; make the list again"),
        ({"dataset_hash": []}, "exclude.json has dataset_hash [], which is not a string; make the list again"),
        ({"n_images": "12"}, "exclude.json has n_images '12', which is not a whole number"),
        ({"about": "a test"}, "exclude.json has about 'a test', which is not an object"),
        ({"ids": "1 2"}, "exclude.json has ids '1 2', which is not a list; make the list again"),
        ({"ids": [1, 2.5]}, "exclude.json has ids[1] 2.5, which is not a whole number"),
        ({"ids": [0, True]}, "exclude.json has ids[1] True, which is not a whole number"),
        ({"ids": [-3, 2]}, "names image -3; "),
        ({"ids": [2, 10**30]}, f"exclude.json has ids[1] {10**30}, which is not a whole number of 64 bits"),
        ({"ids": [4, 1]}, "its ids must increase, 4 comes before 1; make the list again"),
        ({"ids": [1, 1]}, "its ids must increase, 1 comes before 1"),
    ],
)
def test_what_does_not_fit_is_refused(file, shards, change, complaint):
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps(seal({name: value for name, value in content.items() if value is not None})))
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read_exclusion(file, shards)


def test_a_list_of_version_1_has_no_sha256(file, shards):
    content = json.loads(file.read_text())
    del content["sha256"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"exclude\.json has no 'sha256', as every file of version 2 has; make the list again"):
        read_exclusion(file, shards)
    file.write_text(json.dumps(content | {"version": 1}))
    assert read_exclusion(file, shards).tolist() == [1, 4, 5]


def test_a_list_of_everything_is_refused(tmp_path, shards):
    write_exclusion(tmp_path / "all.json", shards, np.arange(shards.n_images), REASON)
    with pytest.raises(ValueError, match=f"names all {shards.n_images} images of .*; nothing would be left"):
        read_exclusion(tmp_path / "all.json", shards)


def test_damaged_json_is_refused(file, shards):
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"exclusion list .*exclude.json is not valid JSON"):
        read_exclusion(file, shards)
    with pytest.raises(ValueError, match=r"exclusion list .*none.json does not exist"):
        read_exclusion(file.parent / "none.json", shards)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"exclude\.json has content \[1, 2\], which is not an object"):
        read_exclusion(file, shards)


def test_a_list_of_other_images_is_refused(file, tiny_dataset):
    val = ShardSet(tiny_dataset, "val")
    with pytest.raises(ValueError, match="is about split 'train', not 'val'"):
        read_exclusion(file, val)
