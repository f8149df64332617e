"""The page of a run: everything inside it, nothing of it dangerous, nothing fetched."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from pathlib import Path

import numpy as np
import pytest

from igpt_ds.config import get_recipe, recipe_to_dict
from igpt_ds.data.grids import save_grid
from igpt_ds.evaluate.report.page import Picture, html_table, page
from igpt_ds.evaluate.report.row_types import as_row
from igpt_ds.evaluate.report.run_files import CurveRow, ReportedRun

VALUES = {
    "recipe": recipe_to_dict(get_recipe("cifar10_nano_ar_16")),
    "world_size": 2,
    "precision": "bf16",
    "git_commit": "0123456789abcdef",
    "note": "<script>alert(1)</script>",
}
RUN = ReportedRun.of(VALUES, Path("run.json"))
TRAINING = [
    CurveRow(0, 0, val_loss=6.2),
    CurveRow(10, 640, loss=3.0, images_per_s=50.0, mfu=0.25),
    CurveRow(20, 1280, loss=2.0, images_per_s=70.0, mfu=0.35),
    CurveRow(20, 1280, val_loss=2.25),
]
PROBE = as_row(
    {
        "kind": "probe",
        "protocol": "every_layer",
        "features": "normed",
        "weights": "trained",
        "model_hash": "h",
        "model": {"n_layer": 8, "n_head": 4, "n_embd": 128, "n_px": 16, "n_vocab": 512},
        "model_objective": "ar",
        "step": 20,
        "dataset": "cifar10",
        "dataset_hash": {"train": "t", "val": "v"},
        "train_split": "train",
        "eval_split": "val",
        "n_train": 90,
        "n_eval": 10,
        "n_features": 128,
        "seed": 0,
        "C": 0.1,
        "layer": 3,
        "accuracy": 0.5,
        "held_out_accuracy": 0.5,
    }
)


class Reader(html.parser.HTMLParser):
    """Texts, and every tag with its attributes; void elements aside, all that is opened must be closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "samples.png"
    save_grid(path, np.zeros((2, 4, 4, 3), dtype=np.uint8), 2)
    return path


def test_a_page_says_where_pixels_win():
    pixels = PROBE | {"weights": "pixels", "features": "pixels", "layer": 0, "model": None, "accuracy": 0.6}
    reader = read(page("a", RUN, TRAINING, [PROBE, pixels], [], [1]))
    said = [text for text in reader.texts if text.startswith("Caution: raw pixels are better than ")]
    assert [text.rpartition(" on cifar10 ")[2] for text in said] == ["by 10.0 points (60.0 against 50.0 %)."] * 2
    assert "-10.0" in reader.texts


def test_a_page_stands_alone(picture):
    text = page("a & b", RUN, TRAINING, [PROBE], [Picture(picture, "the loss", curve=True), Picture.of(picture)], [1, 5])
    reader = read(text)
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert images[0]["alt"] == "the loss"
    assert images[1]["alt"].startswith("Images that the model draws")
    assert images[1]["alt"].endswith("(samples.png)")
    assert [tag for tag, _ in reader.tags if tag in ("figure", "h2", "table")][:3] == ["figure", "figure", "h2"], "pictures first"
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in images)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", text)), "nothing is fetched"
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object"}
    policy = next(attributes["content"] for tag, attributes in reader.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    words = " ".join(reader.texts)
    for expected in (
        "a & b",
        "8 x 128, 1,739,008 parameters",
        "20 of 2400 steps, 1,280 images",
        "2.2500 nats per token at step 20; best 2.2500; uniform 6.2383",
        "60.0 images/s in the median, 30.0 % of the peak (MFU)",
        "50.0 % on cifar10 val, layer 3",
        "Table 1: linear probes on CIFAR and STL-10",
        "2 ranks, bf16, commit 0123456789ab",
        "<script>alert(1)</script>",
    ):
        assert expected in words


def test_a_page_of_a_run_that_has_just_begun():
    reader = read(page("new", dataclasses.replace(RUN, world_size=1, git_commit=None), [], [], []))
    words = " ".join(reader.texts)
    assert "Configuration" in words
    assert "1 rank, bf16" in words
    assert not any(word in words for word in ("Linear probes", "Beside the paper", "speed"))


def test_pixels_have_no_table_of_layers():
    pixels = PROBE | {"weights": "pixels", "features": "pixels", "model_hash": None, "model": None, "step": None, "layer": 0}
    words = " ".join(read(page("new", RUN, [], [pixels], [])).texts)
    assert "raw pixels" in words
    assert "Every layer" not in words


def test_tables():
    reader = read(html_table("| a | `b` |\n|---|---|\n| **1** < 2 |  |\n| x | y |"))
    assert [text for text in reader.texts if text.strip()] == ["a", "b", "1 < 2", "x", "y"]
    assert [attributes for tag, attributes in reader.tags if tag == "tr"] == [{}, {"class": "ours"}, {}]
    assert "<thead>" not in html_table("| | |\n|---|---|\n| a | b |")
