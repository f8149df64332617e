"""Linear probes by SGD, several learning rates at once, from features that need not fit into memory (paper 3.4, for ImageNet).

    python tools/sgd_probe.py --features features/l_imagenet --layers 18 20 22 --eval_split test --out results.jsonl
    python tools/sgd_probe.py --features features/s --steps 20000 --standardise --rates 1 0.3 0.1 0.03 --out results.jsonl

One row a layer goes to results.jsonl; a row that was measured before is replaced. The rate is chosen on --held_out of the
training images, the probe fitted again on all of them, and then --eval_split is read once. An interrupted probe goes on from
OUT.LAYER_KIND.state: the same command again. For CIFAR and STL-10, and wherever features fit into memory, tools/linear_probe.py
finds the optimum itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.evaluate.features.files import FeatureSet, open_features
from igpt_ds.evaluate.features.network import KINDS, pick_device
from igpt_ds.evaluate.probes.sgd_search import HELD_OUT, RATES, RateSearch, SgdProbe, SgdSettings, sgd_probe
from igpt_ds.evaluate.probes.sgd_state import StateFile
from igpt_ds.evaluate.report.results import add_results, make_row, read_results
from igpt_ds.evaluate.report.tables import markdown_table


def main(argv: Sequence[str] | None = None) -> None:
    """Opens everything, probes layer by layer, prints the table of best layers."""
    args = parse(argv)
    read_results(args.out)  # a damaged file is found now and not after the first probe
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
            StateFile(args.out.with_name(f"{args.out.name}.{layer:02d}_{kind}.state"), args.save_every),
        )
        rows.append(make_row(probe, train, evaluated, "sgd"))
        add_results(args.out, rows[-1:])
        report(probe, args.features, time.perf_counter() - start)
    print(markdown_table(rows))
    print(f"{args.out}: {len(rows)} rows")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--features", type=Path, required=True, help="feature directory")
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl to add to")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to probe; all when left out")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds to probe; all when left out")
    parser.add_argument("--train_split", default="train", help="split to fit on")
    parser.add_argument("--eval_split", default="val", help="split whose accuracy is reported")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates, tried from large to small")
    parser.add_argument("--together", type=int, default=4, help="rates fitted at once; the search ends when the best is inside")
    parser.add_argument("--held_out", type=float, default=HELD_OUT, help="part of the training images that chooses the rate")
    parser.add_argument("--steps", type=int, default=SgdSettings.steps, help="of each fit, under one cosine")
    parser.add_argument("--batch_images", type=int, default=SgdSettings.batch_images, help="images of a step")
    parser.add_argument("--standardise", action="store_true", help="features of mean 0 and deviation 1; wants smaller rates")
    parser.add_argument(
        "--views", type=int, default=1, help="neighbouring rows of one image, as make_shards.py --views writes them"
    )
    parser.add_argument("--window_mib", type=int, default=1024, help="features in memory at once, shuffled among themselves")
    parser.add_argument("--save_every", type=int, default=10_000, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out images and of the order")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_images", "views", "window_mib", "save_every", "seed"):
        least = 0 if name == "seed" else 1
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    return args


def asked(features: FeatureSet, args: argparse.Namespace) -> list[tuple[int, str]]:
    """The layers and kinds to probe, each of them there; pixels have one layer of one kind."""
    kinds = features.kinds if features.kinds == ["pixels"] else args.kinds or features.kinds
    pairs = [(layer, kind) for kind in kinds for layer in args.layers or features.layers]
    for layer, kind in pairs:
        features.layer(layer, kind)
    return pairs


def report(probe: SgdProbe, path: Path, seconds: float) -> None:
    """One line on a probe, and a warning where its result needs a second look."""
    what = f"{path} layer {probe.layer} {probe.kind}"
    found = (
        f"rate {probe.rate:g}, held out {100 * probe.held_out_accuracy:.2f} %, {probe.eval_split} {100 * probe.accuracy:.2f} %"
    )
    print(f"{what}: {found}, {len(probe.rates)} rates tried, {seconds:.1f} s", flush=True)
    if probe.diverged:
        print(f"{what}: diverged at {' '.join(f'{rate:g}' for rate in probe.diverged)}", flush=True)
    if probe.grid_edge:
        print(f"warning: {what}: rate {probe.rate:g} is the {probe.grid_edge} end of --rates; widen them", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
