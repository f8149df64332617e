"""Damage of every kind to every file of ours: one clear error or the same result, never another result, never a traceback."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import judge, mutations

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.data.exclusion import ExclusionReason, read_exclusion, write_exclusion
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.palette import fit_palette, load_palette, save_palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index, write_index
from igpt_ds.evaluate.classification import Confusion, read_confusion, write_confusion
from igpt_ds.evaluate.features.files import FeatureWriter, open_features
from igpt_ds.evaluate.features.manifest import FeatureManifest, FeatureSplit, Origin
from igpt_ds.evaluate.probes.saved import ProbeAbout, SavedProbe, load_probe, save_probe
from igpt_ds.evaluate.probes.sgd_state import RateResults, SgdState, UnfinishedGroup, read_state, write_state
from igpt_ds.evaluate.report.results import add_results, finetune_row, read_results
from igpt_ds.evaluate.report.run_files import read_curve
from igpt_ds.json_files import json_line, seal, write_json
from igpt_ds.model.store import fresh_model, load_model, read_info, save_model
from igpt_ds.train.checkpoint.manifest import MANIFEST, Manifest, read_checkpoint, write_manifest
from igpt_ds.train.run_dir import RUN, read_recipe, read_run
from igpt_ds.train.safety.rollback import Rollback, read_rollbacks, write_rollbacks
from igpt_ds.train.sweep import Result, read_result, read_sweep, write_sweep

COUNT = 24  # damaged copies of each file
RECIPE = Recipe("r", ModelConfig(1, 2, 8, 2, 4), 12, 100, 0.01, 3)
FACTS = DataFacts("shards", "d", "p", 2)
Case = tuple[Path, Callable[[], Any]]  # a file, and its reader, whose values can be compared


def index(where: Path, dataset: Path) -> Case:
    write_index(where, read_index(dataset))
    return where / "index.json", lambda: read_index(where)


def exclusion(where: Path, dataset: Path) -> Case:
    shards = ShardSet(dataset, "train")
    write_exclusion(where / "exclude.json", shards, np.array([1, 4, 5]), ExclusionReason("a test"))
    return where / "exclude.json", lambda: read_exclusion(where / "exclude.json", shards).tolist()


def manifest(where: Path, _: Path) -> Case:
    path = where / "step-00000008"
    path.mkdir()
    ranges = ((12, 24), (36, 48))
    known = {"recipe": RECIPE, "data": FACTS, "precision": "fp32", "world_size": 2, "stage": 3, "skipped_ranges": ranges}
    write_manifest(path, Manifest(step=8, images_seen=96, files=(), **known))
    return path / "manifest.json", lambda: read_checkpoint(path).manifest


def rollbacks(where: Path, _: Path) -> Case:
    write_rollbacks(where, [Rollback(9, 8, 4, (24, 36), "spike"), Rollback(19, 18, 8, (48, 60), "spike")])
    return where / "rollbacks.json", lambda: read_rollbacks(where)


def run_config(where: Path, _: Path) -> Case:
    RUN.write(where / "run.json", {"recipe": recipe_to_dict(RECIPE), "world_size": 2, "data": dataclasses.asdict(FACTS)})
    return where / "run.json", lambda: (read_run(where), read_recipe(where / "run.json"))


def sweep(where: Path, _: Path) -> Case:
    write_sweep(where / "sweep.json", [Result(0.01, None, 7), Result(0.003, 2.5, None), Result(0.001, 2.75, None)])
    return where / "sweep.json", lambda: read_sweep(where / "sweep.json")


def lost(where: Path, _: Path) -> Case:
    write_json(where / "LOST.json", seal({"step": 12, "loss": None, "lr": 0.1, "why": "spike", "time": 1.5}))
    return where / "LOST.json", lambda: read_result(where, 0.01)


def confusion(where: Path, _: Path) -> Case:
    write_confusion(where / "c.json", Confusion("h", "val", ["a", "b"], [[3, 1], [0, 4]]))
    return where / "c.json", lambda: read_confusion(where / "c.json")


def results(where: Path, _: Path) -> Case:
    facts = {"model": {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_px": 2, "n_vocab": 4}, "model_objective": "ar", "step": 7}
    facts |= {"weights": "trained", "model_hash": "h", "dataset": "d", "dataset_hash": {"val": "v"}, "eval_split": "val"}
    facts |= {"n_train": 9, "seed": 0, "loss": "clf", "accuracy": 0.5, "held_out_accuracy": 0.25}
    add_results(where / "results.jsonl", [finetune_row(**facts, lr=lr) for lr in (0.1, 0.01, 0.001)])
    return where / "results.jsonl", lambda: Rows(row.json for row in read_results(where / "results.jsonl"))


def curve(where: Path, _: Path) -> Case:
    rows = [{"step": step, "images_seen": 12 * step, "loss": 3.0 - step / 8} for step in range(1, 5)]
    (where / "train.jsonl").write_text("".join(map(json_line, rows)))
    return where / "train.jsonl", lambda: Rows(vars(row) for row in read_curve(where))


class Rows(list):
    """Rows of a file of lines. A row may be missing, as one that a killed writer tore; none may differ."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and all(row in other for row in self)


def model_files(where: Path, dataset: Path) -> Path:
    model = fresh_model(RECIPE.model, seed=1)
    info = {"config": RECIPE.model, "objective": "ar", "palette_hash": "p", "step": 7, "images_seen": 84}
    save_model(where / "model", model.state_dict(), info, dataset / "palette.npy")
    return where / "model"


def model_config(where: Path, dataset: Path) -> Case:
    path = model_files(where, dataset)
    return path / "config.json", lambda: read_info(path)


def model_weights(where: Path, dataset: Path) -> Case:
    path = model_files(where, dataset)
    return path / "model.safetensors", lambda: [weight.tolist() for weight in load_model(path)[0].state_dict().values()]


def palette_files(where: Path) -> tuple[Path, Callable[[], Any]]:
    palette, report = fit_palette(np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8), 8)
    save_palette(where / "palette.npy", palette, report)
    return where, lambda: load_palette(where / "palette.npy").colors.tolist()


def palette_colors(where: Path, _: Path) -> Case:
    return palette_files(where)[0] / "palette.npy", palette_files(where)[1]


def palette_report(where: Path, _: Path) -> Case:
    return palette_files(where)[0] / "palette.json", palette_files(where)[1]


def feature_files(where: Path) -> Callable[[], Any]:
    about = FeatureManifest(
        origin=Origin("trained", "p", model_hash="m", objective="ar", step=1, model=dataclasses.asdict(RECIPE.model)),
        dataset="d",
        layers=[0],
        kinds=["normed"],
        n_features=4,
        splits={"train": FeatureSplit(6, "t", 0)},
        classes=["a", "b"],
    )
    writer = FeatureWriter(where / "f", about)
    writer.write("train", 0, (0, "normed", None), np.arange(24, dtype=np.float32).reshape(6, 4))
    writer.save("train", 6)
    writer.finish({"train": np.array([0, 1] * 3)})

    def read() -> Any:
        found = open_features(where / "f", "train")
        return found.manifest, found.labels.tolist(), found.layer(0, "normed").tolist()

    return read


def feature_manifest(where: Path, _: Path) -> Case:
    read = feature_files(where)
    return where / "f" / "manifest.json", read


def feature_array(where: Path, _: Path) -> Case:
    read = feature_files(where)
    return where / "f" / "train" / "layer_00_normed.npy", read


def feature_labels(where: Path, _: Path) -> Case:
    read = feature_files(where)
    return where / "f" / "train" / "labels.npy", read


def sgd_state(where: Path, _: Path) -> Case:
    file, identity = where / "state.pt", {"layer": 1, "rates": [0.5, 0.05]}
    done = {"search": RateResults([True, False], {"held out": [0.5, 0.0]})}
    write_state(file, identity, SgdState(done, UnfinishedGroup("last", 30, {"w": torch.arange(6.0).reshape(2, 3)})))

    def read() -> Any:
        found = read_state(file, identity, "cpu")
        weights = {} if found.begun is None else {name: one.tolist() for name, one in found.begun.weights.items()}
        return found.done, found.begun and (found.begun.name, found.begun.step), weights

    return file, read


def probe(where: Path, _: Path) -> Case:
    about = ProbeAbout(
        model_hash="m",
        objective="ar",
        step=7,
        palette_hash="p",
        n_px=2,
        layers=[1],
        kind="raw",
        precision="fp32",
        dtype="fp32",
        classes=["a", "b", "c"],
        labels=[0, 2],
        protocol="every_layer",
        dataset="d",
        dataset_hash={"train": "t", "val": "v"},
        train_split="train",
        eval_split="val",
        n_train=6,
        C=0.1,
        seed=0,
        held_out_accuracy=0.5,
        accuracy=0.25,
    )
    weights = np.arange(8.0).reshape(2, 4), np.array([0.5, -0.5]), np.ones(4), np.full(4, 2.0)
    save_probe(where / "p.safetensors", SavedProbe(about, *weights))

    def read() -> Any:
        found = load_probe(where / "p.safetensors")
        return found.about, [getattr(found, name).tolist() for name in ("weights", "intercepts", "mean", "scale")]

    return where / "p.safetensors", read


CASES = (index, exclusion, manifest, rollbacks, run_config, sweep, lost, confusion, results, curve, model_config, model_weights)
CASES += (palette_colors, palette_report, feature_manifest, feature_array, feature_labels, sgd_state, probe)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_damage_is_one_clear_error_or_changes_nothing(make: Callable[..., Case], tmp_path: Path, tiny_dataset: Path) -> None:
    path, read = make(tmp_path, tiny_dataset)
    content, good = path.read_bytes(), read()
    wrong, found = [], Counter[str]()
    for kind, damaged in mutations(content, zlib.crc32(make.__name__.encode()), COUNT):
        path.write_bytes(damaged)
        verdict = judge(read, good, str(tmp_path))
        found[verdict] += 1
        if verdict not in ("error", "same"):
            wrong.append((kind, verdict))
    path.write_bytes(content)
    assert read() == good
    assert not wrong
    assert found["error"] >= COUNT // 4


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_file_of_an_older_version_has_no_sha256_and_no_traceback(
    make: Callable[..., Case], tmp_path: Path, tiny_dataset: Path
) -> None:
    path, read = make(tmp_path, tiny_dataset)
    if path.suffix not in (".json", ".jsonl") or make is index:  # which always had one
        return
    good, lines = read(), path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
    older = [json.loads(line) for line in lines]
    for values in older:
        del values["sha256"]
        if make is palette_report:
            del values["format"], values["version"]
        elif "version" in values:
            values["version"] = MANIFEST.sealed - 1 if make is manifest else values["version"] - 1
    if make is manifest:
        (path.parent / "COMPLETE").write_text("0 files\n")
    content = b"".join(json.dumps(values).encode() + b"\n" for values in older)
    path.write_bytes(content)
    if make not in (results, run_config):  # whose values have their version
        assert read() == good
    for kind, damaged in mutations(content, 1, COUNT):
        path.write_bytes(damaged)
        assert judge(read, good, str(tmp_path)) in ("error", "same", "silent"), kind
