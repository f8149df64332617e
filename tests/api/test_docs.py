"""docs/api.md and docs/quickstart.ipynb run, on a tiny world with the directories of `make demo`."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.features.extract import extract, extract_pixels
from igpt_ds.evaluate.features.network import Network, open_model

ROOT = Path(__file__).parents[2]
PAGE, NOTEBOOK = ROOT / "docs" / "api.md", ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture
def tiny_runs(tmp_path, model_dir, classifier_dir, tiny_dataset) -> Path:
    """runs/demo as `make demo` leaves it, and runs/fine with a fine-tuned model."""
    runs, shards = tmp_path / "runs", [ShardSet(tiny_dataset, split) for split in ("train", "val")]
    for source, target in (
        (model_dir, "demo/models/tiny-7"),
        (classifier_dir, "fine/model"),
        (tiny_dataset, "demo/shards/digits_8"),
    ):
        shutil.copytree(source, runs / target)
    extract_pixels(runs / "demo/features/pixels-digits_8", shards)
    network, origin = open_model(model_dir, shards[0], untrained=0)
    extract(runs / "demo/features/untrained-digits_8", shards, Network(network), origin)
    return runs


def test_the_code_of_the_page_runs(tiny_runs, monkeypatch, capsys):
    monkeypatch.chdir(tiny_runs.parent)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
        assert capsys.readouterr().out, block
    assert (tiny_runs.parent / "samples.png").is_file()


def test_the_notebook_runs_in_a_kernel(tiny_runs, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IGPT_DS_DEMO", str(tiny_runs / "demo"))
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    wrong = nbformat.v4.new_code_cell("model.features(val, kind='norm')", metadata={"tags": ["raises-exception"]})
    notebook.cells.append(wrong)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tiny_runs)}}).execute()
    texts = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert wrong.outputs[-1].traceback == ["InputError: kind='norm' is unknown; known: normed, raw"]
    assert "layer=99 does not exist; layers of this model are 0..2" in texts


def test_the_notebook_shows_the_outputs_of_a_run():
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 4
    assert NOTEBOOK.stat().st_size < 100_000
