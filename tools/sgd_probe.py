"""Fits linear probes by SGD with several learning rates at once, on features larger than memory (paper 3.4, for ImageNet).

    python tools/sgd_probe.py --features features/l_imagenet --layers 18 20 22 --eval_split test --out results.jsonl
    python tools/sgd_probe.py --features features/s --steps 20000 --standardise --rates 1 0.3 0.1 0.03 --out results.jsonl

One row per layer is added to results.jsonl; a new row replaces an older row of the same measurement. A share of the training
images, --held_out, chooses the rate. Then the probe is fitted on all training images, and --eval_split is read once. The same
command continues an interrupted probe from OUT.LAYER_KIND.state. If the features fit into memory, as for CIFAR and STL-10,
tools/linear_probe.py finds the exact optimum.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.console import count, next_command
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet, open_features
from igpt_ds.evaluate.features.manifest import KINDS
from igpt_ds.evaluate.probes.settings import RATES, SGD_HELD_OUT, SgdSettings
from igpt_ds.evaluate.report.cautions import cautions
from igpt_ds.evaluate.report.results import add_results, make_row, read_results
from igpt_ds.evaluate.report.tables import markdown_table
from igpt_ds.files import check_writable
from igpt_ds.plain_files import beside

with lazy.imports():
    from igpt_ds.evaluate.features.network import pick_device
    from igpt_ds.evaluate.probes.sgd_search import RateSearch, SgdProbe, sgd_probe
    from igpt_ds.evaluate.probes.sgd_state import StateFile


def main(argv: Sequence[str] | None = None) -> None:
    """Probes layer by layer and prints the table of best layers."""
    args = parse(argv)
    lazy.load()
    read_results(args.out)  # finds a damaged file before the first probe
    check_writable(args.out)
    search = RateSearch(args.rates, args.together, args.held_out)
    settings = SgdSettings(
        steps=args.steps,
        batch_images=args.batch_images,
        seed=args.seed,
        standardise=args.standardise,
        views=args.views,
        window_bytes=args.window_mib << 20,
        device=pick_device(args.device),
    )
    train, evaluated = (open_features(args.features, split) for split in (args.train_split, args.eval_split))
    rows = []
    for layer, kind in asked(train, args):
        start = time.perf_counter()
        probe = sgd_probe(
            train,
            evaluated,
            layer,
            kind,
            settings,
            search,
            StateFile(beside(args.out, f".{layer:02d}_{kind}.state"), args.save_every),
        )
        rows.append(make_row(probe, train, evaluated, "sgd"))
        add_results(args.out, rows[-1:])
        report(probe, args.features, time.perf_counter() - start)
    for line in cautions([(args.features, row) for row in rows]):
        print(line, file=sys.stderr)
    print(markdown_table(rows, read_results(args.out)))
    print(f"{args.out}: {count(len(rows), 'row')}")
    print(next_command("python", "tools/tables.py", "--results", args.out))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--features", type=Path, required=True, help="feature directory to probe")
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl to add rows to")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to probe (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of features to probe (default: all in --features)")
    parser.add_argument("--train_split", default="train", help="split to fit on")
    parser.add_argument("--eval_split", default="val", help="split whose accuracy is reported")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to try, from large to small")
    parser.add_argument(
        "--together",
        type=int,
        default=4,
        help=("rates that are fitted at once; the search ends when the best rate is not the smallest of those tried"),
    )
    parser.add_argument(
        "--held_out", type=float, default=SGD_HELD_OUT, help="share of the training images that chooses the rate, between 0 and 1"
    )
    parser.add_argument("--steps", type=int, default=SgdSettings.steps, help="optimizer steps of each fit, under one cosine")
    parser.add_argument("--batch_images", type=int, default=SgdSettings.batch_images, help="images per step")
    parser.add_argument(
        "--standardise", action="store_true", help="scale features to mean 0 and deviation 1; needs smaller rates"
    )
    parser.add_argument(
        "--views", type=int, default=1, help="neighbouring rows that show one image, as make_shards.py --views writes them"
    )
    parser.add_argument("--window_mib", type=int, default=1024, help="MiB of features that are in memory and shuffled together")
    parser.add_argument("--save_every", type=int, default=10_000, help="steps between two writings of the state file")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the held-out images and of the order")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device; auto takes a GPU if one exists, else the CPU"
    )
    args = parser.parse_args(argv)
    for name in ("steps", "batch_images", "views", "window_mib", "save_every", "seed"):
        least = 0 if name == "seed" else 1
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)} must be at least {least}")
    return args


def asked(features: FeatureSet, args: argparse.Namespace) -> list[tuple[int, str]]:
    """The layers and kinds to probe, checked to exist. Pixels have one layer of one kind."""
    kinds = features.kinds if features.kinds == ["pixels"] else args.kinds or features.kinds
    for kind in kinds:
        features.check(args.layers or features.layers, kind)
    return [(layer, kind) for kind in kinds for layer in args.layers or features.layers]


def report(probe: SgdProbe, path: Path, seconds: float) -> None:
    """Prints one line on a probe."""
    what = f"{path} layer {probe.layer} {probe.kind}"
    found = (
        f"rate {probe.rate:g}, held out {100 * probe.held_out_accuracy:.2f} %, {probe.eval_split} {100 * probe.accuracy:.2f} %"
    )
    print(f"{what}: {found}, {len(probe.rates)} rates tried, {seconds:.1f} s", flush=True)
    if probe.diverged:
        print(f"{what}: diverged at {' '.join(f'{rate:g}' for rate in probe.diverged)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
