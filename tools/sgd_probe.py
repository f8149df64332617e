"""Fits linear probes by SGD with several learning rates at once, on features larger than memory (paper 3.4, for ImageNet).

    python tools/sgd_probe.py --features features/l_imagenet --layers 18 20 22 --eval_split test --out results.jsonl
    python tools/sgd_probe.py --features features/s --steps 20000 --standardise --rates 1 0.3 0.1 0.03 --out results.jsonl

Layers with commas are side by side, in one probe (paper 4.4). They are read from their files and never copied together:

    python tools/sgd_probe.py --features features/xl_imagenet --layers 28,29,30,31,32 --eval_split test --out results.jsonl
    python tools/sgd_probe.py --features features/xl_imagenet --protocol concat --results layers.jsonl --out results.jsonl

--protocol concat takes five layers around the best single layer by the held-out images, and --protocol mask_vote lets the five
masks of each image of a bert model vote at that layer (paper 4.6). Both read the rows of single layers in --results and --out,
and probe those of --layers that have no row. If --layers names one layer, that is the best.

One row per probe is added to results.jsonl; a new row replaces an older row of the same measurement. A share of the training
images, --held_out, chooses the rate. Then the probe is fitted on all training images, and --eval_split is read once. The same
command continues an interrupted probe from OUT.LAYERS_KIND.state. If the features fit into memory, as for CIFAR and STL-10,
tools/linear_probe.py finds the exact optimum.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.console import count, next_command
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet, open_features
from igpt_ds.evaluate.features.manifest import KINDS, span
from igpt_ds.evaluate.probes.settings import N_MASKS, RATES, SGD_HELD_OUT, RateSearch, SgdSettings, layer_group
from igpt_ds.evaluate.report.cautions import cautions
from igpt_ds.evaluate.report.results import add_results, make_row, read_all, read_results
from igpt_ds.evaluate.report.row_types import ProbeRow
from igpt_ds.evaluate.report.single_layers import held_out_by_layer
from igpt_ds.evaluate.report.tables import markdown_table
from igpt_ds.files import check_writable
from igpt_ds.plain_files import beside

with lazy.imports():
    from igpt_ds.evaluate.features.network import pick_device
    from igpt_ds.evaluate.probes import variants
    from igpt_ds.evaluate.probes.sgd_records import SgdProbe
    from igpt_ds.evaluate.probes.sgd_search import sgd_probe
    from igpt_ds.evaluate.probes.sgd_state import StateFile
    from igpt_ds.evaluate.probes.votes import check_masks


def main(argv: Sequence[str] | None = None) -> None:
    """Probes and prints the table of best layers."""
    args = parse(argv)
    lazy.load()
    read_results(args.out)  # finds a damaged file before the first probe
    check_writable(args.out)
    args.search = RateSearch(args.rates, args.together, args.held_out)
    args.settings = SgdSettings(
        steps=args.steps,
        batch_images=args.batch_images,
        seed=args.seed,
        standardise=args.standardise,
        views=args.views,
        window_bytes=args.window_mib << 20,
        device=pick_device(args.device),
        n_masks=args.n_masks if args.protocol == "mask_vote" else None,
    )
    train, evaluated = (open_features(args.features, split) for split in (args.train_split, args.eval_split))
    protocol = {"every_layer": every_layer, "concat": concat, "mask_vote": mask_vote}[args.protocol]
    rows = []
    for kind, layers in asked(train, args):
        for row in protocol(args, train, evaluated, kind, layers):
            rows.append(row)
    for line in cautions([(args.features, row) for row in rows]):
        print(line, file=sys.stderr)
    print(markdown_table(rows, read_results(args.out)))
    print(f"{args.out}: {count(len(rows), 'row')}")
    print(next_command("python", "tools/tables.py", "--results", args.out))


def every_layer(
    args: argparse.Namespace,
    train: FeatureSet,
    evaluated: FeatureSet,
    kind: str,
    layers: Sequence[tuple[int, ...]],
    centre: int | None = None,
) -> Iterator[ProbeRow]:
    """A probe for each layer, or for each group of layers side by side. The rows name `centre` as the layer in the middle."""
    settings = args.settings
    named = "mask_vote" if settings.n_masks else "sgd"
    for group in layers:
        start = time.perf_counter()
        file = beside(args.out, f".{'+'.join(f'{layer:02d}' for layer in group)}_{kind}.state")
        probe = sgd_probe(train, evaluated, group, kind, settings, args.search, StateFile(file, args.save_every))
        probe = probe if centre is None else replace(probe, layer=centre)
        row = make_row(probe, train, evaluated, named if len(group) == 1 else "concat")
        add_results(args.out, [row])
        report(probe, group, args.features, time.perf_counter() - start)
        yield row


def concat(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: Sequence[tuple[int, ...]]
) -> Iterator[ProbeRow]:
    """One probe of five layers around the best one. Layers without a row are probed before."""
    variants.window(train.layers, layers[0][0])  # refuses too few layers before the search
    best = yield from best_single(args, train, evaluated, kind, layers)
    yield from every_layer(args, train, evaluated, kind, [variants.window(train.layers, best)], best)


def mask_vote(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: Sequence[tuple[int, ...]]
) -> Iterator[ProbeRow]:
    """One probe of the best layer, and the vote over the masks of each image."""
    check_masks(train, evaluated, args.n_masks)
    voting, args.settings = args.settings, replace(args.settings, n_masks=None)
    best = yield from best_single(args, train, evaluated, kind, layers)
    args.settings = voting
    yield from every_layer(args, train, evaluated, kind, [(best,)])


def best_single(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: Sequence[tuple[int, ...]]
) -> Generator[ProbeRow, None, int]:
    """The best layer by the held-out images; the rows of the layers that are probed for it. One layer is not probed."""
    single = [layer for (layer,) in layers]
    best = single[0]
    if len(single) > 1:
        rows = [*read_all(args.results), *read_results(args.out)]
        known = held_out_by_layer(rows, train, kind, args.settings, args.held_out)
        if found := sorted(known.keys() & set(single)):
            print(f"{args.features} {kind}: rows of earlier probes give layers {span(found)}", flush=True)
        for row in every_layer(args, train, evaluated, kind, [(layer,) for layer in single if layer not in known]):
            known[row.layer] = row.held_out_accuracy
            yield row
        best = max(single, key=lambda layer: (known[layer], -layer))
        print(f"{args.features} {kind}: the best layer is {best}, held out {100 * known[best]:.2f} %", flush=True)
    return best


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--features", type=Path, required=True, help="feature directory to probe")
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl to add rows to")
    parser.add_argument(
        "--protocol",
        choices=("every_layer", "concat", "mask_vote"),
        default="every_layer",
        help="every_layer: one probe per entry of --layers; concat: five layers around the best one; mask_vote: its masks vote",
    )
    parser.add_argument(
        "--layers", type=layer_group, nargs="+", help="layers to probe; layers with commas are side by side (default: all)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="concat, mask_vote: result files with rows of single layers, beside those in --out (default: none)",
    )
    parser.add_argument("--n_masks", type=int, default=N_MASKS, help="mask_vote: masks per image that vote")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of features to probe (default: all in --features)")
    parser.add_argument("--train_split", default="train", help="split to fit on")
    parser.add_argument("--eval_split", default="val", help="split whose accuracy is reported")
    _add_fit_flags(parser)
    args = parser.parse_args(argv)
    args.layers = args.layers and list(dict.fromkeys(args.layers))
    if args.protocol == "every_layer" and args.results:
        raise InputError("--results is for --protocol concat and mask_vote; omit it")
    if args.protocol != "every_layer" and (groups := [layers for layers in args.layers or () if len(layers) > 1]):
        raise InputError(
            f"--layers {','.join(map(str, groups[0]))} is for --protocol every_layer; {args.protocol} needs single layers"
        )
    for name in ("steps", "batch_images", "views", "window_mib", "save_every", "n_masks", "seed"):
        least = 0 if name == "seed" else 1
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)} must be at least {least}")
    return args


def _add_fit_flags(parser: argparse.ArgumentParser) -> None:
    # How each probe is fitted.
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
    cli.add_device(parser)


def asked(features: FeatureSet, args: argparse.Namespace) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The kinds and layers to probe, checked to exist. Pixels have one layer of one kind."""
    kinds = features.kinds if features.kinds == ["pixels"] else args.kinds or features.kinds
    groups = args.layers or [(layer,) for layer in features.layers]
    for kind in kinds:
        features.check(dict.fromkeys(layer for group in groups for layer in group), kind)
    return [(kind, groups) for kind in kinds]


def report(probe: SgdProbe, layers: Sequence[int], path: Path, seconds: float) -> None:
    """Prints one line on a probe."""
    what = f"{path} layer {'+'.join(map(str, layers))} {probe.kind}"
    found = (
        f"rate {probe.rate:g}, held out {100 * probe.held_out_accuracy:.2f} %, {probe.eval_split} {100 * probe.accuracy:.2f} %"
    )
    print(f"{what}: {found}, {len(probe.rates)} rates tried, {seconds:.1f} s", flush=True)
    if probe.diverged:
        print(f"{what}: diverged at {' '.join(f'{rate:g}' for rate in probe.diverged)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
