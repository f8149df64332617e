"""docs/formats.md: its Python reads our files without igpt_ds, and the versions it names are those that we write."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from igpt_ds.data.shards.index import INDEX
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.features.manifest import FEATURES
from igpt_ds.evaluate.report.results import RESULT
from igpt_ds.model.store import MODEL
from igpt_ds.train.checkpoint.manifest import MANIFEST
from igpt_ds.train.run_dir import RUN

PAGE = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
SEALED, READING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_features_are_read_by_numpy_alone(features_dir):
    assert "igpt_ds" not in READING
    names = {"DIR": features_dir}
    exec(READING, names)
    features = open_features(features_dir, "train")
    np.testing.assert_array_equal(names["x"], features.layer(2, "normed"))
    np.testing.assert_array_equal(names["y"], features.labels)
    assert names["keys"] == list(features.keys)
    assert (names["x"].dtype.str, names["y"].dtype.str) == ("<f4", "<i8")
    files = {str(path.relative_to(features_dir)) for path in features_dir.rglob("*") if path.is_file()}
    known = {"manifest.json", *features.manifest.files}
    assert files == known
    assert all(
        re.fullmatch(r"(train|val)/(labels\.npy|keys\.jsonl|layer_\d\d_(normed|raw)\.npy)|manifest\.json", name) for name in known
    )


def test_any_sealed_file_is_checked_by_the_standard_library(features_dir, model_dir, tiny_dataset):
    for file in (features_dir / "manifest.json", model_dir / "config.json", tiny_dataset / "index.json"):
        exec(SEALED, {"FILE": file})


def test_versions():
    for form in (INDEX, FEATURES, RESULT, MODEL, MANIFEST, RUN):
        assert re.search(rf"`{re.escape(form.name)}`\s+version {form.version}\b", PAGE), form.name
