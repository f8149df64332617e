"""Classifies a split with a fine-tuned model: accuracy, a row of results, the confusion matrix.

    python tools/evaluate_classifier.py --model runs/s_cifar10/model --data shards/cifar10_32 --results results.jsonl

reads the test split once, and the validation split for the row's held-out accuracy. Of several fine-tunings, evaluate the one
whose validation was the best, and no other: a test split that chooses tells nothing. `--confusion` writes how often each class
was taken for each other, as JSON. A BERT model sees each image through --mask_draws masks, and the class that most of them give
counts; the accuracy of a single mask stands beside it (paper 4.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from igpt_ds import cli
from igpt_ds.data.loader import check_shards
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.classification import check_classes, result, write_confusion
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.model.store import load_classifier


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, classifies both splits, prints and writes."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir with a class head")
    parser.add_argument("--data", type=Path, required=True, help="directory of token shards")
    parser.add_argument("--val_split", default="val", help="split that chose the step")
    parser.add_argument("--eval_split", default="test", help="split that the accuracy is measured on")
    parser.add_argument("--results", type=Path, help="results.jsonl to add a row to")
    parser.add_argument("--confusion", type=Path, help="JSON file to write the confusion matrix to")
    parser.add_argument("--mask_draws", type=int, default=5, help="bert: masks that vote on each image")
    parser.add_argument("--batch", type=int, default=64, help="images at once")
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bfloat16, as a large model needs")
    args = parser.parse_args(argv)
    for name in ("mask_draws", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")

    model, info = load_classifier(args.model)
    held_out, evaluated = ShardSet(args.data, args.val_split), ShardSet(args.data, args.eval_split)
    check_shards(evaluated, info.config)
    check_classes(info, evaluated)
    if args.results:
        read_results(args.results)  # a damaged file is told before the images are classified
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, torch.bfloat16 if args.bf16 else torch.float32)
    row, confusion = result(model, info, held_out, evaluated, args.batch, device, args.mask_draws)
    row |= {"eval_precision": "bf16" if args.bf16 else "fp32"}
    print(f"{args.val_split}: {100 * row.held_out_accuracy:.2f} % of {held_out.n_images} images")
    single = f", {100 * row.single_accuracy:.2f} % with one mask" if row.single_accuracy is not None else ""
    print(f"{args.eval_split}: {100 * row.accuracy:.2f} % of {evaluated.n_images} images{single}")
    if args.confusion:
        write_confusion(args.confusion, confusion)
    if args.results:
        add_results(args.results, [row])
        print(f"row added to {args.results}")


if __name__ == "__main__":
    cli.run(main)
