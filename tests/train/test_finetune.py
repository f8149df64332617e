"""Fine-tuning without a launch: its recipe, its early stopping, its search of rates, and what a user can get wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from igpt_ds.config import Finetune, ModelConfig, Recipe, recipe_from_dict, recipe_to_dict
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.mixture import open_mixture
from igpt_ds.data.palette import load_palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source
from igpt_ds.data.subsets import few
from igpt_ds.evaluate.report.single_layers import best_layer
from igpt_ds.json_files import seal, write_json, write_json_lines
from igpt_ds.model.classifier import Classifier
from igpt_ds.model.store import ModelInfo, fresh_model, read_info, save_model
from igpt_ds.train.cadence import choose_cadence
from igpt_ds.train.checkpoint.consolidate import _info, check_own
from igpt_ds.train.checkpoint.directory import prune
from igpt_ds.train.checkpoint.manifest import FinetuneFacts, GuardStates, Manifest, write_manifest
from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.early import EarlyState, EarlyStop
from igpt_ds.train.finetune_flags import parse
from igpt_ds.train.finetuning import finetune_recipe, of_subset, starting_point, warmup_steps
from igpt_ds.train.run_dir import RUN, recipe_differences
from igpt_ds.train.safety.spikes import Guard, chance_loss
from igpt_ds.train.schedule import learning_rate
from igpt_ds.train.sweep import Result, best, finished, read_result, table

ROOT = Path(__file__).parents[2]


def accuracy(value: float) -> dict[str, float]:
    return {"val_loss": 1.0, "val_accuracy": value}


def test_the_first_of_the_best_steps_is_kept_until_patience_ends() -> None:
    early = EarlyStop("val_accuracy", patience=2)
    for step, value in ((0, 0.99), (10, 0.5), (20, 0.7), (30, 0.7), (40, 0.71), (50, 0.6)):
        early.see(step, accuracy(value))
        assert not early.over
    assert (early.best_step, early.best["val_accuracy"]) == (40, 0.71)  # step 0 has learnt nothing and does not count
    early.see(60, accuracy(0.7))
    assert early.over

    again = EarlyStop("val_accuracy", 2, early.state())
    assert (again.state(), again.over) == (early.state(), True)
    early.restore(EarlyState())
    assert (early.best_step, early.over) == (None, False)
    with pytest.raises(ValueError, match="best validation, of step 3, has no val_accuracy"):
        early.restore(EarlyState(3, {"val_loss": 2.0}))


def test_a_validation_made_up_for_is_seen_once() -> None:
    early = EarlyStop("val_accuracy", patience=1)
    early.see(10, accuracy(0.5))
    early.see(10, accuracy(0.5))
    assert not early.over


def test_early_stopping_by_loss_without_patience_and_with_folded_images() -> None:
    early = EarlyStop("val_loss", patience=0)
    for step, loss in ((1, 3.0), (2, 2.0), *((step, 2.5) for step in range(3, 40))):
        early.see(step, {"val_loss": loss})
    assert (early.best_step, early.over) == (2, False)
    last = EarlyStop("val_accuracy", patience=1, keep_best=False)
    for step, value in ((1, 0.9), (2, 0.8), (3, 0.7)):
        last.see(step, accuracy(value))
    assert (last.best_step, last.over) == (3, False)


def test_pruning_keeps_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "COMPLETE").touch()
    remove_together(prune(tmp_path, keep_last=1, keep_every=0, protected=(2,)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.fixture
def fine(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, finetune=Finetune(3, 2, "abc"))


def test_the_rate_stays_at_its_peak(fine: Recipe) -> None:
    assert [learning_rate(fine, step) for step in range(12)] == pytest.approx([0.01 / 3, 0.02 / 3, *[0.01] * 10])


def test_a_recipe_survives_json_and_differs_by_its_start(fine: Recipe, recipe: Recipe) -> None:
    values = json.loads(json.dumps(recipe_to_dict(fine)))
    assert recipe_from_dict(values, "x") == fine
    other = recipe_to_dict(dataclasses.replace(fine, finetune=Finetune(3, 2, "def")))
    ((name, there, here),) = recipe_differences(values, other)
    assert (name, there["start"], here["start"]) == ("finetune", "abc", "def")
    older = {name: value for name, value in recipe_to_dict(recipe).items() if name != "finetune"}
    assert recipe_differences(older, recipe_to_dict(recipe)) == []  # a pre-training of older code
    with pytest.raises(ValueError, match="layer=3 must lie between 0 and n_layer=2"):
        dataclasses.replace(fine, finetune=Finetune(3, 3, "abc"))


@pytest.mark.parametrize(
    ("loss", "gen_scale", "objective", "expected"),
    [
        ("joint", "mean", "ar", math.log(8) + math.log(3)),
        ("clf", "mean", "ar", math.log(3)),
        ("gen", "mean", "bert", math.log(8)),
        ("joint", "sum", "ar", 16 * math.log(8) + math.log(3)),
        ("gen", "sum", "bert", 0.15 * 16 * math.log(8)),
    ],
)
def test_the_loss_of_chance(fine: Recipe, loss: str, gen_scale: str, objective: str, expected: float) -> None:
    changed = dataclasses.replace(fine, objective=objective, finetune=Finetune(3, 2, "abc", loss, gen_scale))
    assert chance_loss(changed) == pytest.approx(expected)
    assert Guard(changed, "fp32").limit() == pytest.approx(expected + 0.5)


def test_the_search_goes_by_the_best_accuracy(tmp_path: Path) -> None:
    rows = [(0, 0.9, 2.0), (1, 0.5, 1.0), (2, 0.6, 1.2), (3, 0.4, 1.4)]
    (tmp_path / "FINISHED").touch()
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"step": step, "val_accuracy": value, "val_loss": loss}) + "\n" for step, value, loss in rows)
    )
    result = read_result(tmp_path, 0.003)
    assert result == Result(0.003, 1.4, None, 0.6)
    results = [Result(0.01, None, 4), result, Result(0.001, 1.0, None, 0.7), Result(0.0003, 0.5, None, 0.65)]
    assert best(results) == results[2]
    assert finished(results)
    assert not finished(results[:3])
    assert table(results).splitlines() == [
        "| learning rate | best validation accuracy |",
        "|---|---|",
        "| 0.01 | lost at step 4 |",
        "| 0.003 | 60.00 % |",
        "| **0.001** | **70.00 %** |",
        "| 0.0003 | 65.00 % |",
    ]


def test_without_a_class_loss_the_search_goes_by_the_lowest_loss(tmp_path: Path, fine: Recipe) -> None:
    """The accuracy is the untrained head's, a matter of ties; the last step is not the one that is kept."""
    gen = dataclasses.replace(fine, finetune=Finetune(3, 2, "abc", "gen"))
    losses = {0.01: (2.0, 1.9), 0.003: (1.0, 1.8), 0.001: (1.5, 1.5)}
    for lr, values in losses.items():
        run_dir = tmp_path / f"{lr:g}"
        run_dir.mkdir()
        (run_dir / "FINISHED").touch()
        write_json(run_dir / "run.json", {"recipe": recipe_to_dict(gen)})
        rows = [{"step": step, "val_loss": loss, "val_accuracy": lr * 50} for step, loss in enumerate((0.1, *values))]
        (run_dir / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [read_result(tmp_path / f"{lr:g}", lr) for lr in losses]
    assert results == [Result(lr, min(values), None, None, lowest=True) for lr, values in losses.items()]
    found = [result for result in results if result is not None]
    assert finished(found)
    assert best(found) == found[1]
    assert table(found).splitlines()[0] == "| learning rate | best validation loss, nats |"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """finetune.py's main, on one rank; everything below stops before the ranks join."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("finetune_story", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


@pytest.fixture
def words(tiny_config: ModelConfig, tiny_dataset: Path, tmp_path: Path) -> list[str]:
    """A fine-tuning of a model dir with the tiny dataset's palette."""
    index = json.loads((tiny_dataset / "index.json").read_text())
    info = {"config": tiny_config, "objective": "ar", "palette_hash": index["palette_hash"], "step": 1, "images_seen": 1}
    save_model(tmp_path / "model", fresh_model(tiny_config, 0).state_dict(), info, tiny_dataset / "palette.npy")
    return ["--model", str(tmp_path / "model"), "--data", str(tiny_dataset), "--run_dir", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--untrained", "-1"], "--untrained -1 must be at least 0"),
        (["--patience", "-1"], "--patience -1 must be at least 0"),
        (["--mask_draws", "0"], "--mask_draws 0 must be at least 1"),
        (["--batch_images", "0"], "--batch_images 0 must be at least 1"),
        (["--epochs", "nan"], "--epochs nan must be a number of at least 0"),
        (["--layer", "3"], "layer=3 must lie between 0 and n_layer=2"),
        (["--results", "x.jsonl"], "has no split 'test'; it has train, val"),
        (["--results", "x.jsonl", "--loss", "gen"], "--results x.jsonl needs an accuracy, and --loss gen trains no class head"),
        (
            ["--results", __file__, "--eval_split", "val"],
            r"test_finetune\.py line 1 is not valid JSON: .*; remove the line",
        ),
        (["--train_split", "trian"], "has no split 'trian'"),
        (["--subsets", "5"], "--subsets 5 needs --labels"),
        (["--labels", "0"], "--labels 0 must be at least 1"),
        (["--labels", "6", "--out", "x"], "--out x does not go with --labels 6: each subset has its model in RUN_DIR"),
        (["--labels", "6", "--loss", "gen"], "--loss gen does not go with --labels 6"),
        (["--lr", "-1"], "lr=-1.0 must be a positive number"),
        (["--layer_from", "none.jsonl"], "--layer_from none.jsonl does not exist"),
        (["--keep_steps", "0"], "--keep_steps 0 must be at least 1"),
        (["--batch_images", "5", "--micro_batch", "2"], "batch_images=5 does not divide into 1 rank x micro batch 2"),
    ],
)
def test_what_does_not_go(main: Any, words: list[str], more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*words, *more])


def test_subsets_beside_other_runs(main: Any, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run" / "subset-3" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run already holds subsets; continue them with --resume auto"):
        main([*words, "--labels", "6", "--batch_images", "12"])
    (tmp_path / "run" / "subset-3" / "run.json").touch()
    with pytest.raises(ValueError, match=r"--run_dir .*run holds runs of --labels"):
        main(words)
    (tmp_path / "run" / "run.json").touch()
    with pytest.raises(ValueError, match=r"--run_dir .*run holds a run with all labels; choose another for --labels 6"):
        main([*words, "--labels", "6"])


def test_the_head_reads_the_layer_with_the_best_probe(words: list[str], tmp_path: Path) -> None:
    start, file = read_info(Path(words[1])), tmp_path / "results.jsonl"
    names = (
        "step",
        "dataset",
        "dataset_hash",
        "n_train",
        "seed",
        "feature_precision",
        "feature_dtype",
        "train_split",
        "eval_split",
    )
    probe: dict[str, object] = {"format": "igpt_ds.result", "version": 2, "kind": "probe", "weights": "trained", "accuracy": 0.1}
    probe |= dict.fromkeys(names, "x") | {"model_hash": start.model_hash, "protocol": "every_layer"}
    probe |= {"step": 1, "n_train": 1, "seed": 0, "dataset_hash": {}}
    found = [("normed", 0, 0.2), ("normed", 1, 0.6), ("normed", 2, 0.5), ("raw", 2, 0.9)]
    write_json_lines(file, [probe | {"features": kind, "layer": layer, "held_out_accuracy": held} for kind, layer, held in found])
    assert best_layer(file, start.model_hash) == 1
    with pytest.raises(ValueError, match=r"--layer_from .* is of trained weights; leave it out with --untrained"):
        parse("", [*words, "--layer_from", str(file), "--untrained", "0"])


def test_a_recipe_has_no_weights(main: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="--recipe igpt_s_ar_32 has no weights; add --untrained SEED for fresh weights, or"):
        main(["--recipe", "igpt_s_ar_32", *words[2:]])
    with pytest.raises(ValueError, match="n_px=4 but the model has n_px=32"):
        main(["--recipe", "igpt_s_ar_32", "--untrained", "0", *words[2:]])


def test_a_warm_up_longer_than_the_run_shrinks_with_it(words: list[str]) -> None:
    """An epoch is ten steps here; twenty epochs are planned."""

    def chosen(steps: int, *more: str) -> int:
        return warmup_steps(parse("", [*words, "--batch_images", "4", *more]), steps, n_images=40)

    assert [chosen(steps) for steps in (200, 10, 9, 1)] == [10, 10, 1, 1]
    assert chosen(10, "--warmup_epochs", "0.5") == 5
    with pytest.raises(ValueError, match="--warmup_epochs 3 of 40 images is 30 steps, more than the run's 20"):
        chosen(20, "--warmup_epochs", "3")


def test_few_labels_train_for_enough_steps_and_from_scratch_has_the_class_loss(
    words: list[str], tiny_config: ModelConfig
) -> None:
    """A pass over 40 images is a third of a step of 128."""
    info = ModelInfo(tiny_config, "ar", "p", 1, 1, "abc")

    def made(*more: str) -> tuple[int, int, str | None]:
        args = parse("", [*words, *more])
        recipe = finetune_recipe(args, info, 40, 3)
        assert recipe.finetune is not None
        return recipe.steps, recipe.warmup_steps, recipe.finetune.loss

    assert made() == (7, 1, "joint")
    assert made("--labels", "40") == (400, 20, "joint")
    assert made("--labels", "40", "--steps", "60", "--untrained", "0") == (60, 3, "clf")
    assert made("--labels", "40", "--epochs", "30", "--batch_images", "4", "--warmup_epochs", "2") == (300, 20, "joint")
    assert made("--untrained", "0", "--loss", "joint") == (7, 1, "joint")
    few = of_subset(parse("", [*words, "--labels", "40", "--results", "r.jsonl"]), 2, SimpleNamespace(n_originals=40))  # type: ignore[arg-type]
    assert (few.run_dir.name, few.results.parent.name, few.val_every) == ("subset-2", "subset-2", 20)


def test_a_run_of_an_earlier_version_keeps_its_warm_up_and_its_loss(
    words: list[str], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """An earlier version warmed up for the whole run where an epoch is longer, and started from scratch with the joint loss."""
    info, more = ModelInfo(tiny_config, "ar", "p", 1, 1, ""), ["--untrained", "0", "--steps", "6", "--batch_images", "4"]
    new = finetune_recipe(parse("", [*words, *more]), info, 40, 3)
    assert (new.warmup_steps, new.finetune) == (1, Finetune(3, 2, "", "clf"))
    begun = dataclasses.replace(new, warmup_steps=6, finetune=Finetune(3, 2, "", "joint"))
    values = {"recipe": recipe_to_dict(begun), "world_size": 1}
    RUN.write(tmp_path / "run" / "run.json", values)
    resumed = [*words, *more, "--resume", "auto"]
    assert finetune_recipe(parse("", resumed), info, 40, 3) == new, "without a checkpoint there is nothing to continue"
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert finetune_recipe(parse("", resumed), info, 40, 3) == begun
    other = finetune_recipe(parse("", [*resumed, "--warmup_epochs", "0.1", "--loss", "clf"]), info, 40, 3)
    assert other == new, "flags decide, and the run directory refuses what differs"


def test_the_stored_views_of_an_image_are_one_image(
    main: Any, tiny_config: ModelConfig, tiny_images: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """37 training images in 3 views: an epoch of 12 images a step has 4 steps; ten of each class are 30 labels in 90 views."""
    options = ShardOptions(4, val_fraction=0.25, images_per_shard=16, crop="random", views=3)
    write_dataset(
        tmp_path / "views", open_source(f"imagefolder:{tiny_images}"), load_palette(tiny_dataset / "palette.npy"), options
    )
    images = open_mixture([tmp_path / "views"], one_view=True)
    recipe = Recipe("r", tiny_config, 12, 100, 0.01, 3)
    write_json(tmp_path / "recipe.json", recipe_to_dict(recipe))
    words = ["--config", str(tmp_path / "recipe.json"), "--untrained", "0", "--data", str(tmp_path / "views")]
    words += ["--run_dir", str(tmp_path / "run"), "--batch_images", "12", "--epochs", "5"]
    args = parse("", words)
    tuned = finetune_recipe(args, starting_point(args), images.n_originals, 3)
    assert (images.n_originals, tuned.steps, tuned.warmup_steps) == (37, 16, 4)
    assert choose_cadence(args, SimpleNamespace(recipe=tuned), images.n_originals).val_every == 4  # type: ignore[arg-type]

    subset = few(images, 30, seed=0, number=1)
    assert (subset.n_originals, subset.n_images) == (30, 90)
    assert Counter(subset.shard_sets[0].all_labels().tolist()) == {0: 30, 1: 30, 2: 30}
    main([*words, "--labels", "30", "--dry_run"])
    assert "5 such runs, one for each subset" in capsys.readouterr().out
    for wrong, message in (
        (31, "a multiple of the 3 classes, with at least 1 and at most 1[0-9] images"),
        (39, "--labels 39 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*words, "--labels", str(wrong)])


def test_a_recipe_of_ones_own(
    main: Any, words: list[str], recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(tmp_path / "recipe.json")]
    with pytest.raises(ValueError, match=r"--config .*recipe.json has no weights; add --untrained SEED for fresh weights"):
        main([*config, *words[2:]])
    write_json(tmp_path / "recipe.json", recipe_to_dict(recipe))
    main([*config, "--untrained", "0", "--dry_run", "--batch_images", "12", *words[2:]])
    shape = recipe.model
    assert f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}" in capsys.readouterr().out
    write_json(tmp_path / "recipe.json", {})
    with pytest.raises(ValueError, match=r"recipe.json is not a recipe: 'model'"):
        main([*config, "--untrained", "0", *words[2:]])


def test_another_palette_and_a_model_dir_in_the_way(main: Any, words: list[str], tmp_path: Path) -> None:
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_json(tmp_path / "model" / "config.json", seal(config | {"palette_hash": "other"}))
    with pytest.raises(ValueError, match=r"and .*model have different palettes; make the shards again with --pal"):
        main(words)
    write_json(tmp_path / "model" / "config.json", config)
    with pytest.raises(ValueError, match=r"--out .*model exists already; choose another name or remove it"):
        main([*words, "--out", str(tmp_path / "model")])


@pytest.fixture
def tuned(tiny_config: ModelConfig, tiny_dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """tuned("out", 8, lr=0.01) -> a checkpoint's manifest in tmp_path/run and what `consolidate` makes of its like: tmp_path/out.

    The checkpoint has no tensors: whose a model dir is must be known without reading any.
    """

    def made(out: str, step: int, run_dir: str = "run", best: int | None = None, **changes: Any) -> Path:
        recipe = Recipe("finetune", tiny_config, 12, 20, 0.003, 4, finetune=Finetune(3, 2, "abc"))
        recipe = dataclasses.replace(recipe, **changes)
        index = json.loads((tiny_dataset / "index.json").read_text())
        manifest = Manifest(
            recipe=recipe,
            data=DataFacts("shards", "d", index["palette_hash"]),
            precision="fp32",
            finetune=FinetuneFacts(("a", "b", "c"), "tiny", "d", "train", 12, 1),
            step=step,
            images_seen=12 * step,
            guards=GuardStates(early=EarlyState(best)),
            world_size=1,
            stage=3,
            files=(),
        )
        checkpoint = tmp_path / run_dir / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        write_manifest(checkpoint, manifest)
        if out:
            weights = Classifier(tiny_config, 3, 2).state_dict()
            save_model(tmp_path / out, weights, _info(manifest), tiny_dataset / "palette.npy")
        return tmp_path / out

    return made


def test_whose_a_model_dir_is(tuned: Callable[..., Path], tmp_path: Path) -> None:
    out, run_dir = tuned("out", 8), tmp_path / "run"
    check_own(out, run_dir, ended=True)  # no validation counted: the newest checkpoint's
    tuned("", 12, best=8)
    check_own(out, run_dir, ended=True)  # the best step's
    config = json.loads((out / "config.json").read_text())
    older = {name: value for name, value in config["class_head"].items() if name not in ("clip", "warmup_steps")}
    rest = {name: value for name, value in config.items() if name not in ("head_std", "dropout", "weight_decay")}
    write_json(out / "config.json", seal(rest | {"class_head": older}))
    check_own(out, run_dir, ended=True)  # written by code that did not write these down

    others: list[dict[str, Any]] = [{"lr": 0.01}, {"seed": 1}, {"clip": 0.0}, {"warmup_steps": 2}, {"dropout": 0.1}]
    others += [{"finetune": Finetune(3, 2, "other")}, {"finetune": Finetune(3, 2, "abc", "clf")}]
    for number, changes in enumerate(others):
        other = tuned(f"out{number}", run_dir=f"run{number}", **({"step": 8} | changes))
        name, there = next(iter(changes.items()))
        what = "(start|loss) is (other|clf)" if name == "finetune" else f"{name} is {there}"
        with pytest.raises(
            ValueError, match=rf"--out .*out{number} holds the model of another run: {what} there and .* here; ch"
        ):
            check_own(other, run_dir, ended=False)
    tuned("", 16, best=16)
    check_own(out, run_dir, ended=False)  # with more patience: a better step may come, or not
    with pytest.raises(ValueError, match=r"out is of step 8, and step 16 is the best by now; remove it and start again"):
        check_own(out, run_dir, ended=True)
    headless = {name: value for name, value in config.items() if name != "class_head"} | {"step": 16, "images_seen": 192}
    write_json(out / "config.json", seal(headless))
    with pytest.raises(ValueError, match="holds the model of another run: classes is None there and "):
        check_own(out, run_dir, ended=False)


def test_a_model_dir_in_the_way_of_resuming(main: Any, words: list[str], tuned: Callable[..., Path], tmp_path: Path) -> None:
    out = tuned("out", 8, run_dir="other")
    resumed = [*words, "--resume", "auto", "--out", str(out)]
    with pytest.raises(
        ValueError, match=r"--out .*out holds the model of another run: .*run has no checkpoint yet; choose anoth"
    ):
        main(resumed)
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"--out .*out exists already; choose another name or remove it"):
        main(resumed)
    assert not (tmp_path / "run").exists()


def test_why_a_step_was_kept(main: Any) -> None:
    why_kept = main.__globals__["why_kept"]
    early, folded = EarlyStop("val_accuracy", 1), EarlyStop("val_accuracy", 1, keep_best=False)
    assert why_kept(early) == "the last step, without a validation"
    for stop in (early, folded):
        stop.see(10, accuracy(0.5))
    assert why_kept(early) == "the best validation: val_loss 1.0000, val_accuracy 0.5000"
    assert why_kept(folded).startswith("the last validation: val_loss")


def test_a_dry_run_prints_and_writes_nothing(
    main: Any, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, "--dry_run", "--batch_images", "12"])
    assert "finetune" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
