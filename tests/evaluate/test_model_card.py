"""tools/model_card.py: the card of a model with the rows of its probes, and none of another model."""

from __future__ import annotations

import shutil

from huggingface_hub import ModelCard

from igpt_ds.evaluate.report.results import best_row, by_layer, read_results, series
from igpt_ds.model.store import read_info


def test_a_card_has_the_rows_of_its_model(tool, model_dir, features_dir, pixels_dir, tmp_path):
    model, rows = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "rows.jsonl"
    before = read_info(model)
    status, _, said = tool("linear_probe", "--features", features_dir, pixels_dir, "--C_grid", 1, "--out", rows)
    assert status == 0, said
    status, printed, said = tool("model_card", "--model", model, "--results", rows)
    assert status == 0, said
    assert printed == (model / "README.md").read_text(encoding="utf-8")
    found = ModelCard.load(model / "README.md").data.eval_results
    trained = [row for row in by_layer(read_results(rows)) if row.weights == "trained"]
    best = [best_row(one) for one in series(trained)]
    assert [(one.dataset_name, one.metric_value) for one in found] == [
        (row.dataset, round(100 * row.accuracy, 4)) for row in best
    ]
    assert read_info(model) == before
    other = tmp_path / "pixels.jsonl"
    assert tool("linear_probe", "--features", pixels_dir, "--C_grid", 1, "--out", other)[0] == 0
    status, _, said = tool("model_card", "--model", model, "--results", other)
    assert (status, "no row is of" in said, before.model_hash[:16] in said) == (2, True, True)
