"""Classifies images with a fine-tuned model or a saved probe: the accuracy on a split, or the classes of new images.

    python tools/evaluate_classifier.py --model runs/s_cifar10/model --data shards/cifar10_32 --results results.jsonl
    python tools/evaluate_classifier.py --model runs/s_cifar10/model --images cat.jpg photos
    python tools/evaluate_classifier.py --model models/s --probe probe.safetensors --images photos --json > classes.json

With --data, the tool reads the test split, and the validation split for the held-out accuracy of the row, unless the model was
trained on it (finetune.py --train_split train+val). Evaluate only the fine-tuning with the best validation accuracy: a test split
that chooses a model does not measure it. `--confusion` writes as JSON how often each class is predicted for each other. A BERT
model sees each image through --mask_draws masks and predicts the class of most masks; the accuracy of a single mask is printed
too (paper 4.6).

With --images, a table shows the predicted class of each image, and the likeliest ones (BERT: by the mean of the masks).
Images in folders that are called like classes of the model have labels, and the accuracy on them is printed. --probe takes a
probe that tools/linear_probe.py --save_probe fitted on --model instead of a class head. --json prints one object with these keys:

    model, probe      the paths that were given; probe is null without --probe
    classes           the names of the classes
    n_images          the number of images
    n_labelled        how many of them have a label
    accuracy          the share of right predictions among these; null if there are none
    images            for each image: file, class (the predicted one), probability (of this class), top (the three likeliest,
                      each with class and probability), label (null without one), probabilities (one for each of `classes`)
    left_out          the files in folders that are no images, by ending and reason
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.shards.dataset import ImageSet, ShardSet
from igpt_ds.data.shards.index import folded
from igpt_ds.errors import InputError
from igpt_ds.evaluate.probes.settings import N_MASKS
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.files import check_writable

with lazy.imports():
    import torch

    from igpt_ds.api.found import model_dir
    from igpt_ds.data.loader import check_shards
    from igpt_ds.evaluate.classification import check_classes, check_head, result, write_confusion
    from igpt_ds.evaluate.features.network import Network, model_images, open_model, pick_device
    from igpt_ds.evaluate.prediction import Predictions, apply_probe, check_probe_classes, classify, fitted_on
    from igpt_ds.evaluate.probes.saved import load_probe
    from igpt_ds.model.store import load_classifier, read_info

Predict: TypeAlias = "Callable[[ImageSet], Predictions]"


def main(argv: Sequence[str] | None = None) -> None:
    """Classifies, prints and writes."""
    args = parse(argv)
    lazy.load()
    args.model_dir = model_dir(args.model)
    args.device = pick_device(args.device)
    if args.images:
        new_images(args)
    elif args.probe:
        probed_split(args)
    else:
        both_splits(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "--model", type=Path, required=True, help="model dir, run dir or checkpoint; needs a class head without --probe"
    )
    parser.add_argument("--probe", type=Path, metavar="FILE", help="saved probe that replaces the class head (default: none)")
    parser.add_argument("--data", type=Path, help="shard directory with the images; this or --images is required")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="image files or folders to classify")
    parser.add_argument("--json", action="store_true", help="--images: print one JSON object instead of a table, see above")
    parser.add_argument("--val_split", default="val", help="split that chose the training step")
    parser.add_argument("--eval_split", default="test", help="split whose accuracy is reported")
    parser.add_argument("--results", type=Path, help="results.jsonl to add a row to (default: none)")
    parser.add_argument("--confusion", type=Path, help="JSON file for the confusion matrix (default: none)")
    parser.add_argument("--mask_draws", type=int, help=f"bert models: masks per image that vote (default: {N_MASKS})")
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    cli.add_device(parser)
    parser.add_argument("--bf16", action="store_true", help="compute weights and activations in bfloat16, to save memory")
    args = parser.parse_args(argv)
    for name in ("mask_draws", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    if bool(args.data) == bool(args.images):
        raise InputError("--data and --images both give images; give one of them" if args.data else "give --data or --images")
    for name in ("results", "confusion"):
        if getattr(args, name) and (args.images or args.probe):
            raise InputError(f"--{name} is for fine-tuned models on --data; omit it")
    if args.json and not args.images:
        raise InputError("--json is for --images; the accuracy on --data is in the row of --results")
    if args.bf16 and args.probe:
        raise InputError("--bf16 is for fine-tuned models, and a probe has the precision of its features; omit it")
    return args


def new_images(args: argparse.Namespace) -> None:
    """Prints the classes of images that the user names."""
    predict = open_probe(args) if args.probe else open_classifier(args)
    images = model_images(args.model_dir, args.images)
    found = predict(images)
    images.print_left_out()
    if args.json:
        about = {"model": str(args.model), "probe": str(args.probe) if args.probe else None}
        print(json.dumps(about | found.to_dict(images)))
        return
    print(found.table(images.keys))
    accuracy, n = found.accuracy(images.labels_among(found.classes))
    if accuracy is not None:
        others = f"; {images.n_images - n} others have no label" if n < images.n_images else ""
        print(f"accuracy {100 * accuracy:.2f} % of {n} images in folders of the classes{others}")
    elif images.labelled:
        print(f"no accuracy: no folder is called like one of the classes {in_words(found.classes)}")


def in_words(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def open_classifier(args: argparse.Namespace) -> Predict:
    """The function of a fine-tuned model."""
    model, info = load_classifier(args.model_dir)
    check_head(info)
    model.to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    votes = mask_draws(args, info.objective == "bert", args.model)
    return lambda images: classify(model, info, images, args.batch, args.device, votes)


def mask_draws(args: argparse.Namespace, masked: bool, path: Path) -> int:
    """The masks of each image that vote; refuses a number for a model or a probe that sees whole images."""
    if args.mask_draws is not None and not masked:
        raise InputError(f"--mask_draws {args.mask_draws}: {path} sees whole images, and only BERT models see masks; omit it")
    return args.mask_draws or N_MASKS


def open_probe(args: argparse.Namespace) -> Predict:
    """The function of a saved probe."""
    probe, info = load_probe(args.probe), read_info(args.model_dir)
    probe.check_model(info.model_hash, info.palette_hash, args.model, args.probe)
    votes = mask_draws(args, probe.about.mask_prob is not None, args.probe)

    def predict(images: ImageSet) -> Predictions:
        if isinstance(images, ShardSet):
            check_probe_classes(probe, images, args.probe)
        model, _ = open_model(args.model_dir, images)
        return apply_probe(probe, Network(model, args.device, probe.about.precision, batch=args.batch), images, votes)

    return predict


def probed_split(args: argparse.Namespace) -> None:
    """Prints the accuracy of a saved probe on a split."""
    predict, shards = open_probe(args), ShardSet(args.data, args.eval_split).one_view()
    if fitted_on(load_probe(args.probe).about, shards):
        what = f"warning: the probe was fitted on images of split {args.eval_split!r} of {args.data}"
        print(f"{what}, so this accuracy is not that on new images; choose another --eval_split", file=sys.stderr)
    accuracy, n = predict(shards).accuracy(shards.labels(np.arange(shards.n_images)))
    print(f"{args.eval_split}: {100 * (accuracy or 0.0):.2f} % of {n} images")


def both_splits(args: argparse.Namespace) -> None:
    """Prints the accuracies of a fine-tuned model; writes the row and the confusion matrix."""
    model, info = load_classifier(args.model_dir)
    assert info.class_head is not None
    fitted = info.class_head.train_split or ""
    held_out = None if folded(args.val_split, fitted) else ShardSet(args.data, args.val_split).one_view()
    evaluated = ShardSet(args.data, args.eval_split).one_view()
    check_shards(evaluated, info.config)
    check_classes(info, evaluated)
    if args.results:
        read_results(args.results)  # finds a damaged file before the images are classified
    check_writable(args.confusion, args.results)
    model.to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    votes = mask_draws(args, info.objective == "bert", args.model)
    row, confusion = result(model, info, held_out, evaluated, args.batch, args.device, votes)
    row |= {"eval_precision": "bf16" if args.bf16 else "fp32"}
    if args.confusion:
        write_confusion(args.confusion, confusion)
    if args.results:
        add_results(args.results, [row])
    if held_out is None and args.val_split != args.eval_split:
        print(f"{args.val_split}: no accuracy, the model was trained on {fitted}")
    if held_out is not None and args.val_split != args.eval_split and row.held_out_accuracy is not None:
        print(f"{args.val_split}: {100 * row.held_out_accuracy:.2f} % of {held_out.n_images} images")
    seen = ", which the model was trained on" if folded(args.eval_split, fitted) else ""
    single = f", {100 * row.single_accuracy:.2f} % with one mask" if row.single_accuracy is not None else ""
    print(f"{args.eval_split}: {100 * row.accuracy:.2f} % of {evaluated.n_images} images{seen}{single}")
    if args.results:
        print(f"row added to {args.results}")


if __name__ == "__main__":
    cli.run(main)
