"""Classifies a split with a fine-tuned model: accuracy, a row of results, the confusion matrix.

    python tools/evaluate_classifier.py --model runs/s_cifar10/model --data shards/cifar10_32 --results results.jsonl

The tool reads the test split, and the validation split for the held-out accuracy of the row. Of several fine-tunings, evaluate
only the one with the best validation accuracy: a test split that chooses a model does not measure it. `--confusion` writes
as JSON how often each class is predicted for each other. A BERT model sees each image through --mask_draws masks and predicts the
class of most masks; the accuracy of a single mask is printed too (paper 4.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.files import check_writable

with lazy.imports():
    import torch

    from igpt_ds.data.loader import check_shards
    from igpt_ds.evaluate.classification import check_classes, result, write_confusion
    from igpt_ds.model.store import load_classifier


def main(argv: Sequence[str] | None = None) -> None:
    """Classifies both splits, prints and writes."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir with a class head")
    parser.add_argument("--data", type=Path, required=True, help="shard directory with the images")
    parser.add_argument("--val_split", default="val", help="split that chose the training step")
    parser.add_argument("--eval_split", default="test", help="split whose accuracy is reported")
    parser.add_argument("--results", type=Path, help="results.jsonl to add a row to (default: none)")
    parser.add_argument("--confusion", type=Path, help="JSON file for the confusion matrix (default: none)")
    parser.add_argument("--mask_draws", type=int, default=5, help="bert models: masks per image that vote")
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--bf16", action="store_true", help="compute weights and activations in bfloat16, to save memory")
    args = parser.parse_args(argv)
    for name in ("mask_draws", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    lazy.load()

    model, info = load_classifier(args.model)
    held_out, evaluated = ShardSet(args.data, args.val_split), ShardSet(args.data, args.eval_split)
    check_shards(evaluated, info.config)
    check_classes(info, evaluated)
    if args.results:
        read_results(args.results)  # finds a damaged file before the images are classified
    check_writable(args.confusion, args.results)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, torch.bfloat16 if args.bf16 else torch.float32)
    row, confusion = result(model, info, held_out, evaluated, args.batch, device, args.mask_draws)
    row |= {"eval_precision": "bf16" if args.bf16 else "fp32"}
    if args.confusion:
        write_confusion(args.confusion, confusion)
    if args.results:
        add_results(args.results, [row])
    if args.val_split != args.eval_split:
        print(f"{args.val_split}: {100 * row.held_out_accuracy:.2f} % of {held_out.n_images} images")
    single = f", {100 * row.single_accuracy:.2f} % with one mask" if row.single_accuracy is not None else ""
    print(f"{args.eval_split}: {100 * row.accuracy:.2f} % of {evaluated.n_images} images{single}")
    if args.results:
        print(f"row added to {args.results}")


if __name__ == "__main__":
    cli.run(main)
