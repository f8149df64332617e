"""Classifies images with a fine-tuned network.

In: a network with a class head, shards. Out: predictions, a row, a confusion matrix.

A bert network sees each image through several masks, because its inputs were masked in training, and predicts the class of most
masks (paper 4.6). It runs on all ranks or in one process. Called by finetune.py and `tools/evaluate_classifier.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds import dist
from igpt_ds.data.loader import one_pass
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.probes.votes import vote
from igpt_ds.evaluate.report.results import finetune_row
from igpt_ds.evaluate.report.row_types import FinetuneRow
from igpt_ds.model.objectives import draw_of_masks
from igpt_ds.model.store import ModelInfo
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

_MAKE = "make it with tools/evaluate_classifier.py --confusion"
CONFUSION = Format("igpt_ds.confusion", "confusion matrix", _MAKE, version=2, sealed=2, oldest=1)
MASK_SEED = 0
ClassifyingNetwork = Callable[..., tuple[Any, torch.Tensor]]  # of a model.classifier.Classifier


def check_head(info: ModelInfo) -> None:
    """Refuses a class head that was not trained.

    Raises:
        ValueError: the model was fine-tuned with gen_loss only.
    """
    assert info.class_head is not None
    if info.class_head.loss == "gen":
        raise InputError("the model was fine-tuned with --loss gen, which trains no class head; fine-tune it with joint or clf")


def check_classes(info: ModelInfo, shards: ShardSet) -> None:
    """Refuses shards with other classes or colours than those of the fine-tuning, and a class head that was not trained.

    Raises:
        ValueError: they differ, or the model was fine-tuned with gen_loss only.
    """
    check_head(info)
    assert info.class_head is not None
    if shards.classes != info.class_head.classes:
        raise InputError(f"{shards.path} has other classes than the model was fine-tuned on; name shards of that dataset")
    if shards.palette_hash != info.palette_hash:
        raise InputError(f"{shards.path} has another palette than the model; make the shards again with the model's palette.npy")


def voting_mask(ids: np.ndarray, draw: int, T: int, mask_prob: float | None) -> torch.Tensor | None:
    """The mask of one of the votes on some images, bool [B, T]; None if mask_prob is None, which masks nothing."""
    return draw_of_masks(MASK_SEED, ids, draw, T, mask_prob)


def predict(
    network: ClassifyingNetwork,
    shards: ShardSet,
    batch: int,
    device: torch.device | str,
    mask_prob: float | None,
    mask_draws: int,
) -> np.ndarray:
    """The predicted class of each image through each mask: int64 [M, N]; M = 1 without masks.

    Args:
        network: in eval mode.
        batch: images per forward pass of a rank.
        mask_prob: None masks nothing and ignores mask_draws.
    """
    draws = 1 if mask_prob is None else mask_draws
    found = np.zeros((draws, shards.n_images), dtype=np.int64)
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.no_grad():
        total = -(-shards.n_images // (batch * dist.data_world_size()))
        batches = one_pass(shards.n_images, batch, dist.data_rank(), dist.data_world_size())
        silent = True if dist.rank() else None
        for ids, _ in tqdm(batches, f"classify {shards.split}", total, unit=" batches", leave=False, disable=silent):
            tokens = torch.from_numpy(shards.tokens(ids).reshape(batch, -1)).to(device).long()
            classes = []
            for draw in range(draws):
                mask = voting_mask(ids, draw, tokens.size(1), mask_prob)
                classes.append(network(tokens, None if mask is None else mask.to(device), with_pixels=False)[1].argmax(1))
            mine.append((ids, torch.stack(classes).cpu().numpy()))
    for ids, classes_of in (pair for rank in dist.gather_objects(mine) for pair in rank):
        found[:, ids] = classes_of
    return found


def score_predictions(
    predictions: np.ndarray, labels: np.ndarray, K: int, seed: int = MASK_SEED
) -> tuple[float, float, np.ndarray]:
    """predictions [M, N], labels [N] -> accuracy of the vote, mean accuracy of one mask, confusion int64 [K, K].

    Rows of the confusion are true classes, columns the classes of the vote.
    """
    voted = vote(predictions, K, seed)
    counts = np.bincount(labels * K + voted, minlength=K * K).reshape(K, K)
    return float((voted == labels).mean()), float((predictions == labels).mean()), counts


def result(
    network: ClassifyingNetwork,
    info: ModelInfo,
    held_out: ShardSet | None,
    evaluated: ShardSet,
    batch: int,
    device: torch.device | str,
    mask_draws: int,
) -> tuple[FinetuneRow, Confusion]:
    """Classifies both splits: the row of a fine-tuning, and its confusion matrix.

    Args:
        info: that of the network's model dir.
        held_out: the images that chose the step; None if they were trained on, and the last step was kept.
        evaluated: the images whose accuracy is reported.
    """
    head = info.class_head
    assert head is not None
    mask_prob, K = info.mask_prob if info.objective == "bert" else None, len(head.classes)

    def judged(shards: ShardSet) -> tuple[float, float, np.ndarray]:
        predictions = predict(network, shards, batch, device, mask_prob, mask_draws)
        return score_predictions(predictions, shards.labels(np.arange(shards.n_images)), K)

    held_out_accuracy = None if held_out is None else judged(held_out)[0]
    accuracy, single, counts = judged(evaluated)
    masks = {} if mask_prob is None else {"n_masks": mask_draws, "mask_seed": MASK_SEED, "single_accuracy": single}
    of_both = {shards.split: shards.dataset_hash for shards in (held_out, evaluated) if shards is not None}
    crop = f"pad {head.augment_pad}" if head.augment_pad else ""
    row = finetune_row(
        weights="trained" if head.start else "untrained",
        model_hash=info.model_hash,
        start_hash=head.start,
        model=info.config.to_dict(),
        model_objective=info.objective,
        step=head.start_step,  # of pre-training
        dataset=evaluated.name,
        dataset_hash={head.train_split: head.dataset_hash, **of_both},
        **{
            name: getattr(head, name)
            for name in ("train_split", "n_train", "seed", "loss", "gen_scale", "lr", "batch_images", "precision")
        },
        head_layer=head.layer,
        **{name: value for name in ("dropout", "weight_decay", "head_std") if (value := getattr(info, name))},
        augmentation=" ".join(word for word in (crop, "flip" if head.augment_flip else "") if word) or "none",
        best_step=info.step,
        held_out_split=None if held_out is None else held_out.split,
        eval_split=evaluated.split,
        n_eval=evaluated.n_images,
        held_out_accuracy=held_out_accuracy,
        accuracy=accuracy,
        palette_hash=info.palette_hash,
        **masks,
    )
    return row, Confusion(info.model_hash, evaluated.split, list(head.classes), counts.tolist())


def over_subsets(rows: Sequence[FinetuneRow], pool: ShardSet, n_pool: int, subset_seed: int) -> FinetuneRow:
    """The row of fine-tunings on several random subsets of the labels, from the row of each (paper 4.7).

    The deviation is that of a sample, with n - 1, as in the rows of low_data probes.

    Args:
        pool: the images that the subsets are drawn from.
        n_pool: their number, where the stored views of an image count once.
    """
    first = {name: value for name, value in rows[0].json.items() if name not in ("best_step", "single_accuracy", "git_commit")}
    hashes, accuracies = [row.model_hash for row in rows], [row.accuracy for row in rows]
    single = [row.single_accuracy for row in rows if row.single_accuracy is not None]
    held_out = [row.held_out_accuracy for row in rows if row.held_out_accuracy is not None]
    hash_of = {pool.split: pool.dataset_hash}
    changes = {
        "model_hash": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "dataset_hash": rows[0].dataset_hash | hash_of,
        "n_train": n_pool,
        "n_labels": rows[0].n_train,
        "n_subsets": len(rows),
        "subset_seed": subset_seed,
        "subset_model_hashes": hashes,
        "subset_accuracies": accuracies,
        "best_steps": [row["best_step"] for row in rows],
        "accuracy": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies, ddof=1)) if len(rows) > 1 else None,
        "held_out_accuracy": float(np.mean(held_out)) if len(held_out) == len(rows) else None,
    }
    return finetune_row(**(first | changes | ({"single_accuracy": float(np.mean(single))} if single else {})))


@dataclass(frozen=True)
class Confusion:
    """How often a fine-tuned model takes each class for each other."""

    model_hash: str
    split: str
    classes: list[str]
    counts: list[list[int]]  # [K][K], rows: true classes, columns: predicted ones


def write_confusion(path: Path, confusion: Confusion) -> None:
    """Writes the JSON file of `read_confusion`."""
    CONFUSION.write(path, dataclasses.asdict(confusion))


def read_confusion(path: Path) -> Confusion:
    """The confusion matrix in a file of `tools/evaluate_classifier.py --confusion` or `finetune.py`.

    Raises:
        ValueError: no such file, another format or version, or a field that is missing or has another type.
    """
    found = record_from(Confusion, CONFUSION.read(path), f"confusion matrix {path}", _MAKE)
    K = len(found.classes)
    if [len(row) for row in found.counts] != [K] * K:
        raise InputError(f"confusion matrix {path} has counts of another shape than {K} x {K}, for its {K} classes; {_MAKE}")
    return found
