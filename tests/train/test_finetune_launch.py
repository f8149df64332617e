"""Real launches of finetune.py: sharded weights equal plain torch, killed and resumed equals never stopped, BERT, every loss."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from igpt_ds.cli import STOPPED
from igpt_ds.config import Finetune, ModelConfig, Recipe
from igpt_ds.data.loader import Augment, BatchLayout, Loader
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.report.results import read_results
from igpt_ds.json_files import read_json, read_json_lines
from igpt_ds.model.classifier import Classifier, class_loss, total
from igpt_ds.model.dropout import Dropout
from igpt_ds.model.store import load_classifier, load_model, read_info, save_model
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.engine import build_optimizer
from igpt_ds.train.schedule import learning_rate

pytestmark = pytest.mark.slow
Curves = Callable[[str], list[dict[str, Any]]]
Words = Callable[..., list[str]]


@pytest.fixture
def pretrained(tiny_config: ModelConfig, tiny_dataset: Path, tmp_path: Path) -> Callable[[str], Path]:
    """pretrained("ar") -> a model dir whose weights are all drawn, the output matrix too."""

    def made(objective: str) -> Path:
        torch.manual_seed(3)
        model = Transformer(tiny_config, objective=objective)
        with torch.no_grad():
            model.head.weight.normal_(std=0.1)
        shards = ShardSet(tiny_dataset, "train")
        info = {"config": tiny_config, "objective": objective, "palette_hash": shards.palette_hash, "step": 9, "images_seen": 90}
        mask_prob = {"mask_prob": 0.3} if objective == "bert" else {}
        save_model(tmp_path / objective, model.state_dict(), info | mask_prob, tiny_dataset / "palette.npy")
        return tmp_path / objective

    return made


@pytest.fixture
def words(pretrained: Callable[[str], Path], sharded_config: Path, tiny_dataset: Path, tmp_path: Path) -> Words:
    """words("run", "ar", ...) -> a fine-tuning of eight steps, augmented, that writes to tmp_path/run."""

    def command(run_dir: str, objective: str, *more: str) -> list[str]:
        model = tmp_path / objective if (tmp_path / objective).exists() else pretrained(objective)
        fixed = {"model": model, "data": tiny_dataset, "run_dir": tmp_path / run_dir, "ds_config": sharded_config}
        often = {"log_every": 1, "val_every": 2, "save_every": 4, "batch_images": 12, "steps": 8, "lr": 0.01, "patience": 0}
        flags = [word for name, value in (fixed | often).items() for word in (f"--{name}", str(value))]
        return ["finetune.py", *flags, "--augment_pad", "1", "--augment_flip", *more]

    return command


def recipe_of(run_dir: Path) -> Recipe:
    values = read_json(run_dir / "run.json", "run")["recipe"]
    more = {"model": ModelConfig(**values["model"]), "finetune": Finetune(**values["finetune"]), "betas": tuple(values["betas"])}
    return Recipe(**(values | more))


def plain_torch(recipe: Recipe, model_dir: Path | None, data: Path) -> tuple[list[float], Classifier]:
    """The same fine-tuning in a plain loop on one process, without DeepSpeed."""
    finetune = recipe.finetune
    assert finetune is not None
    torch.manual_seed(recipe.seed)
    model = Classifier(recipe.model, finetune.n_classes, finetune.layer, objective=recipe.objective, head_std=recipe.head_std)
    if model_dir is not None:
        model.load_state_dict(load_model(model_dir)[0].state_dict() | {"class_head.weight": model.class_head.weight.data})
    optimizer = build_optimizer(model, recipe)
    batch, shards = recipe.batch_images, ShardSet(data, "train")
    loader = Loader(
        shards, BatchLayout(batch, batch, 0, 1), recipe.seed, augment=Augment(recipe.augment_pad, recipe.augment_flip)
    )
    losses = class_loss(finetune, recipe.model, recipe.objective, recipe.seed, recipe.mask_prob)
    found = []
    for step in range(recipe.steps):
        images = loader.batch(step * batch, 0)
        drops = Dropout(recipe.dropout, recipe.seed, images.positions, recipe.model.n_ctx) if recipe.dropout else None
        gen, clf, _ = losses(partial(model, dropout=drops), images.tokens.long(), images.labels, images.positions)
        loss = total(finetune, gen, clf).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        found.append(loss.item())
    return found, model.eval()


def succeed(done: Any) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return str(done.stdout)


def training_losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_equal_plain_torch_from_the_first_loss_to_the_row(
    launch: Any, tool: Any, words: Words, curves: Curves, tiny_dataset: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    more = ["--micro_batch", "3", "--train_split", "train+val", "--results", str(results), "--eval_split", "val"]
    said = succeed(launch(words("two", "ar", *more), ranks=2))
    assert recipe_of(tmp_path / "two").finetune == Finetune(3, 2, read_info(tmp_path / "ar").model_hash)
    rows = curves("two")
    assert not any("val_loss" in row for row in rows)  # no images are left to validate on
    assert [row["lr"] for row in rows if "lr" in row][-4:] == [0.01] * 4  # warmed up for an epoch of four steps, no cosine

    # The last step's model dir, for validation images that are trained on choose none; and its accuracy, as the tool finds it.
    model, info = load_classifier(tmp_path / "two" / "model")
    assert info.step == 8
    n = ShardSet(tiny_dataset, "val").n_images
    tokens, labels = ShardSet(tiny_dataset, "val").read(np.arange(n))
    with torch.no_grad():
        _, logits = model(torch.from_numpy(tokens.reshape(n, -1)).long())
    accuracy = float((logits.argmax(1).numpy() == labels).mean())
    (row,) = read_results(results)
    assert (row["accuracy"], row["held_out_accuracy"]) == (pytest.approx(accuracy), None)
    assert "model: step 8, the last step, without a validation" in said
    assert (row["weights"], row["step"], row["loss"], row["head_layer"], row["n_train"]) == ("trained", 9, "joint", 2, 48)
    assert row["augmentation"] == "pad 1 flip"
    counts = np.array(read_json(tmp_path / "two" / "confusion.json", "confusion")["counts"])
    assert counts.sum(1).tolist() == np.bincount(labels).tolist()
    assert counts.trace() == round(n * accuracy)
    assert f"val {100 * accuracy:.2f} % ({n} images), which were trained on" in said

    words_of_tool = ["--model", str(tmp_path / "two" / "model"), "--data", str(tiny_dataset), "--eval_split", "val"]
    confusion = ["--confusion", str(tmp_path / "c.json"), "--results", str(results)]
    assert tool("evaluate_classifier", *words_of_tool, *confusion)[0] == 0
    assert read_json(tmp_path / "c.json", "confusion") == read_json(tmp_path / "two" / "confusion.json", "confusion")
    assert len(read_results(results)) == 1  # the same measurement, made again


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("ar", ["--micro_batch", "3"]),
        ("ar", ["--loss", "clf", "--layer", "1", "--dropout", "0.2", "--weight_decay", "0.3", "--head_std", "0.1"]),
        ("bert", ["--sequence_parallel", "2", "--layer", "1", "--gen_scale", "sum", "--clip", "0"]),
    ],
)
def test_every_loss_of_sharded_weights_equals_plain_torch(
    launch: Any, words: Words, curves: Curves, tiny_dataset: Path, tmp_path: Path, objective: str, more: list[str]
) -> None:
    succeed(launch(words("two", objective, *more, "--replay_every", "4"), ranks=2))
    recipe = recipe_of(tmp_path / "two")
    losses, model = plain_torch(recipe, tmp_path / objective, tiny_dataset)
    assert training_losses(curves("two")) == pytest.approx(losses, rel=1e-5, abs=1e-5)
    best = read_info(tmp_path / "two" / "model").step
    validations = {row["step"]: row["val_accuracy"] for row in curves("two") if "val_accuracy" in row and row["step"] > 0}
    assert best == max(validations, key=lambda step: validations[step])
    first = curves("two")[0]
    if not recipe.head_std:
        assert first["val_clf_loss"] == pytest.approx(np.log(3), abs=1e-6)  # the head knows nothing yet
    assert first.get("val_gen_loss") != pytest.approx(np.log(8), abs=1e-3)  # and the transformer does
    if best == recipe.steps:
        ours = load_classifier(tmp_path / "two" / "model")[0].state_dict()
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-4)


def test_killed_and_resumed_ends_early_where_a_whole_run_does(launch: Any, words: Words, curves: Curves, tmp_path: Path) -> None:
    """One rank, then two starts: kill -9 after step 5, and a stop file. The best step's checkpoint outlives the pruning."""
    longer = ["--steps", "60", "--patience", "3", "--keep_last", "1"]
    succeed(launch(words("whole", "ar", *longer)))
    rows = [row for row in curves("whole") if "val_accuracy" in row and row["step"] > 0]
    best = read_info(tmp_path / "whole" / "model").step
    assert best == max(rows, key=lambda row: row["val_accuracy"])["step"]
    assert rows[-1]["step"] == best + 3 * 2 < 60  # three validations without a better one
    kept = {path.name for path in (tmp_path / "whole" / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best:08d}", f"step-{best + 6:08d}"}
    assert (tmp_path / "whole" / "FINISHED").exists()

    process = launch.start(words("killed", "ar", *longer))
    deadline = time.monotonic() + 600
    while not any(row["step"] >= 5 for row in read_json_lines(tmp_path / "killed" / "train.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    launch.end()
    assert not (tmp_path / "killed" / "model").exists()
    stopped = launch(words("killed", "ar", *longer, "--resume", "auto", "--max_minutes", "0"))
    assert stopped.returncode == STOPPED, stopped.stderr[-2000:]
    succeed(launch(words("killed", "ar", *longer, "--resume", "auto")))
    assert curves("killed") == curves("whole")
    one, other = (read_info(tmp_path / name / "model") for name in ("killed", "whole"))
    assert one == other  # the same weights and head, by their hashes

    (tmp_path / "killed" / "FINISHED").unlink()  # killed between its model and its mark: the model is known for its own
    said = succeed(launch(words("killed", "ar", *longer, "--resume", "auto")))
    assert f"model: step {best}, the best validation: " in said
    assert (tmp_path / "killed" / "FINISHED").exists()
    refused = launch(words("killed", "ar", *longer, "--resume", "auto", "--out", str(tmp_path / "ar")))
    assert (refused.returncode, "ar holds the model of another run: recipe is " in refused.stderr) == (2, True)


def test_bert_votes_and_a_network_from_scratch(
    launch: Any, words: Words, curves: Curves, tiny_dataset: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    vote = ["--results", str(results), "--eval_split", "val", "--mask_draws", "3"]
    succeed(launch(words("masked", "bert", "--untrained", "5", *vote)))
    recipe = recipe_of(tmp_path / "masked")
    assert (recipe.seed, recipe.mask_prob) == (5, 0.3)
    losses, _ = plain_torch(recipe, None, tiny_dataset)
    assert training_losses(curves("masked")) == pytest.approx(losses, abs=1e-5)
    (row,) = read_results(results)
    assert (row["weights"], row["step"], row["n_masks"], row["model_objective"]) == ("untrained", 0, 3, "bert")
    assert 0 <= row["single_accuracy"] <= 1

    assert row["loss"] == "clf"  # the paper's baseline (4.5)

    # Two subsets of six labels: one row; what is missing is trained again, and nothing else.
    few = ["--untrained", "5", "--labels", "6", "--subsets", "2", "--steps", "4", "--results", str(tmp_path / "few.jsonl")]
    few += ["--eval_split", "val", "--mask_draws", "2"]
    said = succeed(launch(words("few", "bert", *few), ranks=2))
    (joined,) = read_results(tmp_path / "few.jsonl")
    own = [read_results(tmp_path / "few" / f"subset-{number}" / "results.jsonl")[0] for number in range(2)]
    assert joined["subset_accuracies"] == [one["accuracy"] for one in own]
    assert joined["subset_model_hashes"] == [one["model_hash"] for one in own]
    assert (joined["n_labels"], joined["n_train"], own[0]["n_train"], own[0]["weights"]) == (6, 37, 6, "untrained")
    assert own[0]["dataset_hash"]["train"] != own[1]["dataset_hash"]["train"] != joined["dataset_hash"]["train"]
    assert f"val {100 * joined['accuracy']:.2f} % +- {100 * joined['deviation']:.2f} over 2 subsets of 6 labels" in said
    (tmp_path / "few" / "FINISHED").unlink()
    (tmp_path / "few.jsonl").unlink()
    shutil.rmtree(tmp_path / "few" / "subset-1")
    said = succeed(launch(words("few", "bert", *few, "--resume", "auto"), ranks=2))
    assert ("subset 1 of 2" in said, "subset 2 of 2" in said) == (False, True)
    assert read_results(tmp_path / "few.jsonl") == [joined]
    assert (tmp_path / "few" / "FINISHED").exists()
    succeed(launch(words("few", "bert", *few, "--resume", "auto"), ranks=2))  # nothing is left to do
    refused = launch(words("few", "bert", *few))
    assert (refused.returncode, "few already holds subsets; continue them with --resume auto" in refused.stderr) == (2, True)
    refused = launch(words("few", "bert", *few, "--resume", "auto", "--batch_images", "6"))
    assert (refused.returncode, "--batch_images is 12 there and 6 here" in refused.stderr) == (2, True)

    # The gen_loss alone leaves the head as it was, and the lowest loss chooses the step.
    succeed(launch(words("gen", "bert", "--loss", "gen", "--seed", "1")))
    validations = [row for row in curves("gen") if "val_loss" in row and row["step"] > 0]
    model, info = load_classifier(tmp_path / "gen" / "model")
    assert not model.class_head.weight.any()
    assert info.step == min(validations, key=lambda row: row["val_loss"])["step"]
    assert F.cross_entropy(torch.zeros(1, 3), torch.tensor([0])) == pytest.approx(validations[0]["val_clf_loss"], abs=1e-6)
    assert json.loads((tmp_path / "gen" / "model" / "config.json").read_text())["class_head"]["loss"] == "gen"


def test_the_search_of_the_rate_goes_by_accuracy(launch: Any, words: Words, tmp_path: Path) -> None:
    """tools/sweep_lr.py over one rate of its array; the table and the figure are of accuracies."""
    command = words("unused", "ar")
    for flag in ("--run_dir", "--lr"):
        place = command.index(flag)
        del command[place : place + 2]
    out = tmp_path / "sweep"
    succeed(launch(["tools/sweep_lr.py", "--out", str(out), "--array_index", "1", "--", "python", *command]))
    rows = [row for row in read_json_lines(out / "lr-0.003" / "train.jsonl") if "val_accuracy" in row and row["step"] > 0]
    (out / "lr-0.01").mkdir()
    (out / "lr-0.01" / "LOST.json").write_text('{"step": 3}')
    said = succeed(launch(["tools/sweep_lr.py", "--out", str(out), "--collect"]))
    best = max(row["val_accuracy"] for row in rows)
    assert f"lr 0.003: best validation accuracy {100 * best:.2f} %" in said
    found = read_json(out / "sweep.json", "sweep")
    assert (found["best_lr"], found["results"][1]["val_accuracy"]) == (0.003, best)
    assert (out / "sweep.png").exists()
