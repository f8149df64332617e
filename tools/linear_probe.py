"""Fits linear probes: linear classifiers on the features of each layer.

    python tools/linear_probe.py --features features/s features/untrained features/pixels --out results.jsonl
    python tools/linear_probe.py --protocol low_data --features features/s --kinds normed --out results.jsonl

Rows are added to results.jsonl; a new row replaces an older row of the same measurement. A tenth of the training images chooses
the penalty and the layer. The reported accuracy is that on --eval_split. The protocols:

    every_layer one probe and one row for each layer; tables and figures choose the best (paper 4.1)
    concat      the features of five layers around the best one, side by side (paper 4.4)
    low_data    the best layer with 40, 250 and 4000 labels, on five balanced subsets each: mean and deviation (paper 4.7)
    mask_vote   the best layer of a bert model: the most frequent prediction over five masks of each image (paper 4.6)

All protocols except every_layer search the best layer among --layers. If --layers names one layer, they use it. With every_layer,
`--layers 18,19,20,21,22` is one probe of these layers side by side.

--save_probe writes the fitted probe with the highest held-out accuracy of all, for new images (every_layer and concat):

    python tools/linear_probe.py --features features/s --out results.jsonl --save_probe probe.safetensors
    python tools/evaluate_classifier.py --model models/s --probe probe.safetensors --images photo.jpg more_photos
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.console import count, next_command
from igpt_ds.data.subsets import SUBSETS
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet, open_features
from igpt_ds.evaluate.features.manifest import KINDS
from igpt_ds.evaluate.probes.settings import C_GRID, LABELS, N_MASKS, PROBE_PRECISIONS, layer_group
from igpt_ds.evaluate.report.cautions import cautions
from igpt_ds.evaluate.report.results import add_results, by_layer, make_row, read_results
from igpt_ds.evaluate.report.row_types import ProbeRow
from igpt_ds.evaluate.report.tables import markdown_table
from igpt_ds.files import check_writable

with lazy.imports():
    from igpt_ds.evaluate.features.network import pick_device
    from igpt_ds.evaluate.probes import variants
    from igpt_ds.evaluate.probes.linear import Probe, ProbeSettings, linear_probe
    from igpt_ds.evaluate.probes.saved import check_savable, save_probe, saved_probe
    from igpt_ds.evaluate.probes.votes import check_masks


Results: TypeAlias = "Iterator[Probe | variants.LowDataProbe]"


def main(argv: Sequence[str] | None = None) -> None:
    """Probes and prints the table of best layers."""
    args = parse(argv)
    lazy.load()
    read_results(args.out)  # finds a damaged file before the first probe
    check_writable(args.out, args.save_probe)
    settings = ProbeSettings.of(
        args.C_grid, tol=args.tol, seed=args.seed, device=pick_device(args.device), precision=args.precision
    )
    sets = [(open_features(path, args.train_split), open_features(path, args.eval_split)) for path in args.features]
    if args.save_probe:
        check_saved(args, sets)
    work = [(train, evaluated, kind, layers) for train, evaluated in sets for kind, layers in asked(train, args)]
    protocol: Callable[..., Results] = {
        "every_layer": every_layer,
        "concat": concat,
        "low_data": low_data,
        "mask_vote": mask_vote,
    }[args.protocol]
    rows, paths = [], []
    best: tuple[Probe, FeatureSet, FeatureSet] | None = None
    each = {"every_layer": None, "low_data": len(args.n_labels)}.get(args.protocol, 1)  # rows of each; None: one a layer
    total = sum(each or len(layers) + len(side_by_side(args, kind)) for _, _, kind, layers in work)
    with tqdm(total=total, desc="probes", unit=" probes", leave=False, disable=None) as bar:
        for train, evaluated, kind, layers in work:
            for probe in protocol(args, train, evaluated, kind, layers, settings):
                rows.append(make_row(probe, train, evaluated, protocol_of(probe, args)))
                paths.append(train.path)
                add_results(args.out, rows[-1:])
                report(rows[-1], train)
                bar.update()
                better = isinstance(probe, Probe) and (not best or best[0].held_out_accuracy < probe.held_out_accuracy)
                if isinstance(probe, Probe) and better and is_model(train):
                    best = probe, train, evaluated
    for line in cautions(list(zip(paths, rows, strict=True))):
        print(line, file=sys.stderr)
    if by_layer(rows):
        say(markdown_table(by_layer(rows), read_results(args.out)))
    if args.save_probe and best:
        save_best(args, *best)
    say(f"{args.out}: {count(len(rows), 'row')}")
    if args.save_probe:
        flags = ("--model", "MODEL", "--probe", args.save_probe, "--images", "IMAGES")
        say(next_command("python", "tools/evaluate_classifier.py", *flags))
    say(next_command("python", "tools/tables.py", "--results", args.out, label="or" if args.save_probe else "next"))
    if args.protocol == "every_layer" and any(row.features != "pixels" for row in rows):
        figure = ("--out", args.out.with_name("layers.png"), "layers", "--results", args.out)
        say(next_command("python", "tools/figures.py", *figure, label="or"))


def protocol_of(probe: Probe | variants.LowDataProbe, args: argparse.Namespace) -> str:
    """The protocol in a row: layers side by side are "concat", however the user names them."""
    return "concat" if isinstance(probe, variants.ConcatProbe) else str(args.protocol)


def say(line: str) -> None:
    """Prints a line at once, above a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--features", type=Path, nargs="+", required=True, help="feature directories to probe")
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl to add rows to")
    parser.add_argument(
        "--protocol",
        choices=("every_layer", "concat", "low_data", "mask_vote"),
        default="every_layer",
        help="what is probed, see above",
    )
    parser.add_argument(
        "--layers", type=layer_group, nargs="+", help="layers to probe; layers with commas are side by side (default: all)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of features to probe (default: all in --features)")
    parser.add_argument("--train_split", default="train", help="split to fit on")
    parser.add_argument("--eval_split", default="val", help="split whose accuracy is reported")
    parser.add_argument(
        "--C_grid",
        type=float,
        nargs="+",
        default=C_GRID,
        help="inverse penalties to try, as scikit-learn's C for standardised features",
    )
    parser.add_argument(
        "--tol", type=float, default=1e-6, help="a fit ends when no entry of the gradient of objective / (C N) exceeds this"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the held-out tenth, the subsets and broken ties")
    parser.add_argument(
        "--max_train", type=int, help="every_layer: fit on this many training images, classes in proportion (default: all)"
    )
    parser.add_argument(
        "--n_labels", type=int, nargs="+", default=LABELS, help="low_data: labels per subset, one result for each number"
    )
    parser.add_argument("--subsets", type=int, default=SUBSETS, help="low_data: random subsets per number of labels")
    parser.add_argument("--n_masks", type=int, default=N_MASKS, help="mask_vote: masks per image that vote")
    parser.add_argument(
        "--save_probe",
        type=Path,
        metavar="FILE",
        help="every_layer, concat: .safetensors file for the best probe of a trained model",
    )
    cli.add_device(parser)
    parser.add_argument("--precision", choices=PROBE_PRECISIONS, default="fp32", help="precision of the features in memory")
    args = parser.parse_args(argv)
    args.layers = args.layers and list(dict.fromkeys(args.layers))
    if args.protocol != "every_layer":
        if args.max_train is not None:
            raise InputError(f"--max_train is only for --protocol every_layer, not {args.protocol}; omit it")
        if groups := side_by_side(args):
            named = ",".join(map(str, groups[0]))
            raise InputError(f"--layers {named} is only for --protocol every_layer; {args.protocol} needs single layers")
    for name, least in (("subsets", 1), ("n_masks", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)} must be at least {least}")
    return args


def is_model(features: FeatureSet) -> bool:
    """Whether features are of trained weights: probes of others are baselines, which are not saved."""
    return features.manifest.origin.weights == "trained"


def check_saved(args: argparse.Namespace, sets: Sequence[tuple[FeatureSet, FeatureSet]]) -> None:
    """Refuses a --save_probe that could save nothing, before the first probe."""
    if args.save_probe.suffix != ".safetensors":
        raise InputError(f"--save_probe {args.save_probe} has another suffix than its format; use .safetensors")
    if args.protocol not in ("every_layer", "concat"):
        raise InputError(f"--save_probe is for --protocol every_layer and concat, not {args.protocol}, which fits several probes")
    if not any(is_model(train) for train, _ in sets):
        raise InputError(f"--save_probe needs features of a trained model, and {args.features[0]} has none; extract some")
    for train, _ in sets:
        check_savable(train)


def save_best(args: argparse.Namespace, probe: Probe, train: FeatureSet, evaluated: FeatureSet) -> None:
    """Saves the probe and says which one it is."""
    saved = saved_probe(probe, train, evaluated, protocol_of(probe, args))
    save_probe(args.save_probe, saved)
    layers = "+".join(map(str, saved.about.layers))
    accuracies = f"held out {100 * probe.held_out_accuracy:.2f} %, {probe.eval_split} {100 * probe.accuracy:.2f} %"
    say(f"{args.save_probe}: the probe of {train.path} layer {layers} {probe.kind}, {accuracies}")


def side_by_side(args: argparse.Namespace, kind: str = "") -> list[tuple[int, ...]]:
    """The groups of layers that --layers names with commas. Pixels have no layers."""
    return [layers for layers in args.layers or () if len(layers) > 1 and kind != "pixels"]


def asked(features: FeatureSet, args: argparse.Namespace) -> list[tuple[str, list[int]]]:
    """The kinds and layers to probe. Pixels have one layer of one kind, which is always probed."""
    if features.kinds == ["pixels"]:
        return [("pixels", features.layers)]
    single = features.layers if args.layers is None else [layers[0] for layers in args.layers if len(layers) == 1]
    pairs = [(kind, single) for kind in args.kinds or features.kinds]
    for kind, layers in pairs:  # finds missing, torn and damaged files before the first probe
        features.check([*layers, *(layer for some in side_by_side(args) for layer in some)], kind)
    return pairs


def every_layer(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: list[int], settings: ProbeSettings
) -> Results:
    """A probe for each layer."""
    for layer in layers:
        yield linear_probe(train, evaluated, layer, kind, settings, args.max_train)
    for some in side_by_side(args, kind):
        yield variants.side_by_side(train, evaluated, some, kind, settings, args.max_train)


def concat(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: list[int], settings: ProbeSettings
) -> Results:
    """One probe of five layers."""
    variants.window(train.layers, layers[0])  # refuses too few layers before the search
    layer = variants.best_layer(train, layers, kind, settings, say)
    yield variants.concat(train, evaluated, layer, kind, settings)


def low_data(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: list[int], settings: ProbeSettings
) -> Results:
    """A result for each number of labels. The layer is the best one for all labels."""
    for n_labels in args.n_labels:
        variants.balanced_subset(train, n_labels, settings.seed, 0)  # refuses too few labels before the search
    layer = variants.best_layer(train, layers, kind, settings, say)
    chosen_by = "name" if len(layers) == 1 else "held-out tenth of all labels"
    for n_labels in args.n_labels:
        found = variants.low_data(train, evaluated, layer, kind, n_labels, settings, args.subsets)
        yield replace(found, layer_chosen_by=chosen_by)


def mask_vote(
    args: argparse.Namespace, train: FeatureSet, evaluated: FeatureSet, kind: str, layers: list[int], settings: ProbeSettings
) -> Results:
    """One probe, and the vote over its masks."""
    check_masks(train, evaluated, args.n_masks)
    layer = variants.best_layer(train, layers, kind, settings, say)
    yield variants.mask_vote(train, evaluated, layer, kind, settings, args.n_masks)


def report(row: ProbeRow, train: FeatureSet) -> None:
    """Prints one line on a result."""
    layers = "+".join(map(str, row.layers or [row.layer]))
    what = f"{train.path} layer {layers} {row.features}"
    accuracy = f"{row.eval_split} {100 * row.accuracy:.2f} %"
    if row.protocol == "low_data":
        what += f", {row.n_labels} labels"
        over = "one subset" if row.deviation is None else f"{row.n_subsets} subsets, +- {100 * row.deviation:.2f}"
        say(f"{what}: {accuracy} over {over}")
    else:
        ended = f"objective {row['objective']:.6g}, gradient {row['grad_norm']:.1e} after {row['iterations']} iterations"
        vote = f", one mask {100 * row.single_accuracy:.2f} %" if row.single_accuracy is not None else ""
        say(f"{what}: C {row.C:g}, held out {100 * row.held_out_accuracy:.2f} %, {accuracy}{vote}; {ended}")


if __name__ == "__main__":
    cli.run(main)
