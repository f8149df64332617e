"""The model card: front matter that the Hub's own library reads, numbers of the run's files, names that hold any character."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from igpt_ds.model.card import CARD_FILE, CardFacts, CardResult, write_card
from igpt_ds.model.store import MODEL, fresh_model, load_model, read_info, save_model

NAMES = [
    "photos",
    'a: "b" |c\n- d',
    "größe 写真",
    os.fsdecode(b"\xff"),
    "# [x](y) <b>",
    "yes",
    "1",
    "--- ",
    "\U0001f600 \x7f\x85\u2028\ufffe",
]


@pytest.fixture
def model_dir(tmp_path, tiny_config, tiny_dataset):
    config = dataclasses.replace(tiny_config, n_px=4)
    info = {"config": config, "objective": "ar", "palette_hash": "p" * 64, "step": 7, "images_seen": 56, "recipe": "tiny"}
    save_model(tmp_path / "m|odel", fresh_model(config, 0).state_dict(), info, tiny_dataset / "palette.npy")
    return tmp_path / "m|odel"


def test_every_model_dir_has_a_card(model_dir):
    card = ModelCard.load(model_dir / CARD_FILE)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "igpt_ds")
    assert "image-gpt" in card.data.tags
    for word in (
        "# m\\|odel",
        "| steps | 7 |",
        "| recipe | tiny |",
        read_info(model_dir).model_hash,
        "igpt_ds.load",
        "Apache 2.0",
    ):
        assert word in card.content, word


def test_no_reader_needs_the_card(model_dir):
    before = read_info(model_dir)
    (model_dir / CARD_FILE).unlink()
    assert load_model(model_dir)[1] == before


@pytest.mark.parametrize("name", NAMES)
def test_names_and_numbers_come_back(name, model_dir, tmp_path):
    before = read_info(model_dir)
    results = (
        CardResult("linear probe", name, name, "accuracy", 61.25, "layer 3, normed"),
        CardResult("likelihood", name, "val", "nats per token", 2.125, "step 7"),
    )
    facts = CardFacts(name, 1234, 2.5, 7, results)
    write_card(model_dir, name, MODEL.read(model_dir / "config.json"), facts)
    text = (model_dir / CARD_FILE).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert front["datasets"] == [shown]
    assert front["metrics"] == ["accuracy", "nats_per_token"]
    found = ModelCard.load(model_dir / CARD_FILE).data.eval_results
    assert [(one.dataset_name, one.dataset_split, one.metric_type, one.metric_value) for one in found] == [
        (shown, shown, "accuracy", 61.25),
        (shown, "val", "nats_per_token", 2.125),
    ]
    body = text.split("\n---\n", 1)[1].splitlines()
    assert "| validation loss | 2.5000 nats per token at step 7 |" in body
    assert sum(line.startswith("# ") for line in body) == 1
    assert sum("61.2 %" in line and line.startswith("| linear probe |") for line in body) == 1
    assert read_info(model_dir) == before
    shutil.rmtree(model_dir)
