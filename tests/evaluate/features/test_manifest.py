"""The manifest of features: what it says, and each way in which a field can be missing or have another type."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from igpt_ds.data.shards.layout import Part
from igpt_ds.evaluate.features.extract import Extraction, extract
from igpt_ds.evaluate.features.files import PROGRESS, open_features, part_dir
from igpt_ds.evaluate.features.manifest import read_feature_manifest
from igpt_ds.evaluate.features.merge import merge_parts
from igpt_ds.evaluate.features.network import Network, open_model
from igpt_ds.json_files import seal


def places(values, before=()):
    """The path of every field, nested ones too."""
    for name, value in values.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from places(value, (*before, name))


def damaged(values, place, change):
    """A copy with one field changed, or removed if `change` is None."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    if change is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = change
    return copy


def check_every_field(file, read):
    """Each field is deleted, then has a value of another type: a ValueError that names the file, or the same values."""
    values = json.loads(file.read_text())
    for place in places(values):
        for change in (None, [["x"]], {"x": []}):
            if change is None and place[-2:-1] in [("model",), ("splits",), ("of",), ("rows_before",), ("files",)]:
                continue  # these names are free
            if place == ("sha256",) or (change is None and place == ("files",)):  # sealed anew, and missing in version 2
                continue
            file.write_text(json.dumps(seal(damaged(values, place, change))))
            with pytest.raises(ValueError, match=str(file.parent)) as error:
                read()
            assert place[-1] in str(error.value) or place[-1] in ("format", "version", "part"), (place, change, str(error.value))
    file.write_text(json.dumps(seal(values)))
    read()


def test_every_field_of_a_manifest(features_dir, tmp_path):
    path = shutil.copytree(features_dir, tmp_path / "features")
    check_every_field(path / "manifest.json", lambda: open_features(path, "train"))


@pytest.mark.parametrize("wrong", [[], None, 3, "text"])
def test_a_manifest_that_is_no_object(features_dir, tmp_path, wrong):
    path = shutil.copytree(features_dir, tmp_path / "features")
    (path / "manifest.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"features/manifest\.json has content .*; make the features again"):
        read_feature_manifest(path)


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"dtype": "fp8"}, "has dtype 'fp8', not one of fp32, fp16"), ({"layers": []}, r"has layers \[\]")]
)
def test_values_out_of_range(features_dir, tmp_path, changes, complaint):
    path = shutil.copytree(features_dir, tmp_path / "features")
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(seal(values | changes)))
    with pytest.raises(ValueError, match=complaint):
        open_features(path, "train")


@pytest.fixture
def parts(model_dir, both_splits, tmp_path):
    """Two parts of features."""
    model, origin = open_model(model_dir, both_splits[0])
    for i in range(2):
        extract(tmp_path / "f", both_splits, Network(model, batch=4), origin, Extraction(part=Part(i, 2)))
    return tmp_path / "f"


def test_every_field_of_a_part(parts):
    for i in range(2):
        directory = part_dir(parts, Part(i, 2))
        check_every_field(directory / "manifest.json", lambda directory=directory: read_feature_manifest(directory, part=True))
    merge_parts(parts, 2)
    assert open_features(parts, "train").manifest.part is None


def test_progress_that_is_damaged(model_dir, both_splits, tmp_path):
    model, origin = open_model(model_dir, both_splits[0])
    extract(tmp_path / "f", both_splits, Network(model), origin)
    (tmp_path / "f").rename(tmp_path / "f.partial")
    manifest = replace(read_feature_manifest(tmp_path / "f.partial"), files={}).to_dict()
    good = {"manifest": manifest, "done": {"train": 37, "val": 11}}
    file = tmp_path / "f.partial" / "progress.json"
    for wrong, complaint in (
        ([], r"has content \[\]"),
        ({"done": {}}, "has no 'manifest'"),
        ({"manifest": manifest}, "has no 'done'"),
        (good | {"done": 3}, "has done 3"),
        (good | {"done": {"train": 37}}, r"has done\.val -1, not 0\.\.11"),
        (good | {"done": {"train": 38, "val": 0}}, r"has done\.train 38, not 0\.\.37"),
        (good | {"done": {"train": "37", "val": 0}}, r"has done\.train '37'"),
    ):
        file.write_text(json.dumps(PROGRESS.seal(wrong) if isinstance(wrong, dict) else wrong))
        with pytest.raises(ValueError, match=rf"progress of features {file} {complaint}.*; remove {file.parent}"):
            extract(tmp_path / "f", both_splits, Network(model), origin)
    file.write_text(json.dumps(PROGRESS.seal(good)))
    extract(tmp_path / "f", both_splits, Network(model), origin)
    assert open_features(tmp_path / "f", "val").layers == [0, 1, 2]
